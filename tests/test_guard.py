"""What every function of an Attention refuses before it runs, and what users read of it and of its Config."""

import inspect
import pydoc
from dataclasses import dataclass, fields, replace
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from judges import tokens, weights

import jforge
from jforge.attention import REGISTRY
from jforge.core import protocols

KEY = jax.random.key(0)
GQA = jforge.get("gqa")
CFG = GQA.examples[0]


def calls(att, cfg, params, x, cache) -> dict:
    """{name: a call} of every function that takes a Config."""
    return {
        "forward": lambda: att.forward(params, cfg, x),
        "prefill": lambda: att.prefill(params, cfg, x, cache),
        "decode": lambda: att.decode(params, cfg, x[:, :1], cache),
        "select": lambda: att.select(params, cfg, x[:, :1], cache),
        "init_params": lambda: att.init_params(KEY, cfg),
        "init_cache": lambda: att.init_cache(cfg, 1, 4),
        "cost": lambda: att.cost(cfg, context=4),
        "cache_spec": lambda: att.cache_spec(cfg),
        "shapes": lambda: att.shapes(cfg),
        "visible": lambda: att.visible(cfg, jnp.arange(3)[:, None], jnp.arange(3)),
        "tokens_of": lambda: att.tokens_of(cfg, None, 3),
        "work": lambda: att.work(cfg, 4, 4, 1, False),
    }


@pytest.mark.parametrize("name", REGISTRY)
def test_the_config_of_another_mechanism_is_a_type_error(name, untyped):
    """That of each other mechanism, parents and subclasses among them; the message names both."""
    att = jforge.get(name)
    own = att.examples[0]
    params, x, cache = weights(att, own, "float32"), jnp.zeros((1, 2, own.hidden_size)), att.init_cache(own, 1, 4)
    others = [(other, REGISTRY[other].examples[0]) for other in REGISTRY if other != name]
    for other, cfg in others:
        for call in calls(att, cfg, params, x, cache).values():
            with pytest.raises(TypeError, match=rf"^cfg is a jforge\S+ \({other}\); it must be a \S+ \({name}\)$"):
                call()
    with pytest.raises(TypeError, match=r"^cfg is a dict; it must be"):
        att.forward(params, {"hidden_size": 8}, x)


@dataclass(frozen=True, kw_only=True)
class Named(GQA.Config):
    """A subclass that no Attention has."""

    label: str = "mine"


@dataclass(frozen=True, kw_only=True)
class Own(GQA.Config):
    """A subclass that is the Config of a variant."""

    gain: float = 2.0


def louder(params, cfg, x, positions=None):
    return cfg.gain * GQA.forward(params, GQA.Config(hidden_size=8, num_attention_heads=2), x, positions)


def test_own_configs():
    """A subclass that adds a label is taken; one that is the Config of a variant is the variant's alone."""
    given = {"hidden_size": 8, "num_attention_heads": 2}
    plain, named, own = GQA.Config(**given), Named(**given), Own(**given)
    params, x = GQA.init_params(KEY, plain), jnp.ones((1, 3, 8))
    want = GQA.forward(params, plain, x)
    assert (GQA.forward(params, named, x) == want).all()
    variant = GQA._replace(Config=Own, forward=louder)
    assert (variant.forward(params, own, x) == 2 * want).all()
    for att, cfg in ((GQA, own), (variant, plain), (variant, named)):
        with pytest.raises(TypeError, match=r"^cfg is a test_guard\.|^cfg is a jforge\.attention\.dense\.Config"):
            att.forward(params, cfg, x)
    moved = variant._replace(prefill=GQA.prefill, visible=GQA.visible)  # functions of another tuple: their files' ones
    _, cache = moved.prefill(params, own, x, moved.init_cache(own, 1, 4))
    assert cache.length.tolist() == [3] and moved.visible(own, jnp.array(1), jnp.array(0))


def test_a_wrapped_function_is_the_one_that_runs():
    @wraps(GQA.forward)
    def twice(*args, **kwargs):
        return 2 * GQA.forward(*args, **kwargs)

    params, x = GQA.init_params(KEY, CFG), jnp.ones((1, 3, CFG.hidden_size))
    assert (GQA._replace(forward=twice).forward(params, CFG, x) == 2 * GQA.forward(params, CFG, x)).all()


@pytest.mark.parametrize("name", REGISTRY)
def test_a_parameter_is_named(name, untyped):
    """Each that is missing, where forward is traced, and each with an axis too long: eagerly and in a traced step."""
    att = jforge.get(name)
    cfg = att.examples[-1]
    params, x, cache = weights(att, cfg, "float32"), jnp.zeros((1, 1, cfg.hidden_size)), att.init_cache(cfg, 1, 4)
    step = jax.jit(att.decode, static_argnames="cfg")
    for parameter, shape in att.shapes(cfg).items():
        fewer = {other: array for other, array in params.items() if other != parameter}
        with pytest.raises(ValueError, match=f"^params has no {parameter}; it must have one of shape "):
            jax.eval_shape(lambda fewer, x: att.forward(fewer, cfg, x), fewer, x)
        wide = params | {parameter: np.zeros((1, *shape), np.float32)}
        for call in (lambda wide=wide: att.forward(wide, cfg, x), lambda wide=wide: step(wide, cfg, x, cache)):
            with pytest.raises(ValueError, match=rf"^params\['{parameter}'\] has shape \(1, .*; it must be \("):
                call()
    more = params | {"unused": np.zeros(3, np.float32)}
    assert jax.eval_shape(lambda more: att.forward(more, cfg, x), more).shape == x.shape


def test_parameters_are_looked_at_where_a_function_is_traced_alone():
    looked = []

    def shapes(cfg):
        looked.append(cfg)
        return GQA.shapes(cfg)

    att = GQA._replace(shapes=shapes)
    params, x = GQA.init_params(KEY, CFG), jnp.zeros((1, 1, CFG.hidden_size))
    step, cache = jax.jit(att.decode, static_argnames="cfg"), att.init_cache(CFG, 1, 4)
    for _ in range(3):
        _, cache = step(params, CFG, x, cache)
    assert len(looked) == 1
    assert jax.jit(att.decode, static_argnames="cfg")._cache_size() == step._cache_size() == 1  # one function object
    own = att._replace(init_params=lambda key, cfg, dtype=None: {}, forward=lambda params, cfg, x, positions=None: x)
    assert own.forward({}, CFG, x) is x and len(looked) == 1  # who draws them oneself knows their shapes


def test_arrays_of_another_framework_are_named(untyped):
    params = weights(GQA, CFG, "float32")
    x, cache = tokens(CFG, 1, 3, "float32"), GQA.init_cache(CFG, 1, 4, jnp.float32)
    assert GQA.forward(params, CFG, x).dtype == jnp.float32  # NumPy's are welcome
    foreign, say = torch.from_numpy(x), "is a torch.Tensor; it must be a JAX or NumPy array$"
    bad = {
        "x": lambda: GQA.forward(params, CFG, foreign),
        "positions": lambda: GQA.forward(params, CFG, x, torch.arange(3)[None]),
        r"params\['wo'\]": lambda: GQA.forward(params | {"wo": torch.from_numpy(params["wo"])}, CFG, x),
        "lengths": lambda: GQA.prefill(params, CFG, x, cache, lengths=torch.tensor([3])),
        r"cache\.v": lambda: GQA.decode(params, CFG, x[:, :1], replace(cache, v=torch.zeros(cache.v.shape))),
    }
    for name, call in bad.items():
        with pytest.raises(TypeError, match=f"^{name} {say}"):
            call()
    with pytest.raises(TypeError, match="^x is a list; it must be a JAX or NumPy array$"):
        GQA.forward(params, CFG, x.tolist())
    with pytest.raises(TypeError, match="^params is a list; it must be a dict of arrays by name$"):
        GQA.forward(list(params.values()), CFG, x)


# --- what users read


def test_a_config_without_positions_says_so():
    given = {"hidden_size": 8, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    assert "rope_parameters=None (NoPE: no rotary positions), " in repr(GQA.Config(**given))
    assert "NoPE" not in repr(GQA.Config(**given, rope_parameters=rope))
    for key, value in (("rope_theta", 5e5), ("partial_rotary_factor", 0.5), ("rope_scaling", None)):
        said = rf"^{key} is {value}; jforge.attention.dense.Config has no such field: .* rope_parameters=\{{'rope_type'"
        with pytest.raises(TypeError, match=said):
            GQA.Config(**given, **{key: value})
        with pytest.raises(TypeError, match=f"^{key} is {value}; .* has no such field: it has no rotary positions$"):
            jforge.get("lightning").Config(**given, **{key: value})
    with pytest.raises(TypeError, match=r"'rope_theta': 500000\.0\}$"):
        replace(CFG, rope_theta=5e5)


@pytest.mark.parametrize("name", REGISTRY)
def test_help_of_a_config_says_what_each_field_is(name):
    config = jforge.get(name).Config
    text = pydoc.plain(pydoc.render_doc(config))
    for field in fields(config):
        assert field.name == "derived" or f"\n |  {field.name}: " in text, field.name
    if "rope_parameters" in {field.name for field in fields(config)}:
        assert "no positions at all (NoPE)" in text


def test_help_of_attention_says_what_each_field_is():
    """Its signature, as its Protocol has it, and what it does."""
    text = pydoc.plain(pydoc.render_doc(jforge.Attention))
    typed = {name: kind for name, kind in jforge.Attention.__base__.__annotations__.items()
             if getattr(kind, "__module__", "") == protocols.__name__}  # fmt: skip
    assert len(typed) == 15
    for name, protocol in typed.items():
        said = protocol.__doc__.splitlines()[0]
        assert f"{name}\n |      {said}\n" in text
        taken = list(inspect.signature(protocol.__call__).parameters)[1:]
        assert [word.partition("=")[0] for word in said[1:].partition(") ->")[0].split(", ") if word != "*"] == taken
    for name in ("summary", "traded", "Config", "models", "examples"):
        assert getattr(jforge.Attention, name).__doc__ in text
