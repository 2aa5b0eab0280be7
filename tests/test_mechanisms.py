"""What every mechanism refuses, survives and derives, beyond the laws: one table or one loop for all of them."""

import pickle
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judges import compiled, tokens, torch_error, walk, weights

import jforge
from jforge.attention import REGISTRY
from jforge.core import compare
from jforge.core.spec import CacheSpec
from jforge.cost import Work

ROPE = {"rope_type": "default", "rope_theta": 1e4}
HALF = {**ROPE, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 4.0, "original_max_position_embeddings": 32}
ONE = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rope_parameters": ROPE}
TWO = {**ONE, "num_attention_heads": 4, "num_key_value_heads": 2}
MSA = {**TWO, "qk_norm": "head", "norm_offset": 1.0, "rope_parameters": HALF, "index_head_dim": 5,
       "index_block_size": 4, "index_topk_blocks": 3}  # fmt: skip
DSA = {"hidden_size": 9, "num_attention_heads": 2, "q_lora_rank": 7, "kv_lora_rank": 6, "qk_nope_head_dim": 3,
       "qk_rope_head_dim": 4, "v_head_dim": 5, "rope_parameters": ROPE, "index_n_heads": 8, "index_head_dim": 8,
       "index_topk": 4}  # fmt: skip
NSA = {**ONE, "kernel_size": 4, "kernel_stride": 2, "block_size": 8, "topk": 4, "init_blocks": 1, "local_blocks": 2,
       "window_size": 16, "compress": "mean"}  # fmt: skip
NSA_3 = {**NSA, "kernel_size": 3, "kernel_stride": 3, "block_size": 3, "topk": 2, "init_blocks": 0, "local_blocks": 1}
V4 = {"hidden_size": 8, "num_attention_heads": 4, "head_dim": 6, "qk_rope_head_dim": 4, "q_lora_rank": 5,
      "o_groups": 2, "o_lora_rank": 3, "sliding_window": 3, "rope_parameters": YARN}  # fmt: skip
CSA = {**V4, "index_n_heads": 4, "index_head_dim": 5, "index_topk": 2, "compress_rate": 4}
LIGHTNING = {"hidden_size": 8, "num_attention_heads": 4, "head_dim": 3, "layer_index": 2, "num_hidden_layers": 6,
             "block_size": 5}  # fmt: skip

# --- lengths and sizes that the examples do not have

SIZES = {
    # fields, tokens of a walk, tokens in torch_ref
    "sliding_window W=5": ({**ONE, "sliding_window": 5, "attention_bias": True}, 17, 0),
    "sinks W=6": ({**ONE, "sliding_window": 6}, 14, 14),
    "streaming 1+5": ({**ONE, "start_size": 1, "recent_size": 5}, 15, 0),
    "streaming 4+3": ({**ONE, "start_size": 4, "recent_size": 3}, 17, 17),
    "block_sparse homo": ({**TWO, "block_size": 4, "num_global_blocks": 1, "num_local_blocks": 2,
                           "num_random_blocks": 2, "seed": 5}, 19, 19),
    "block_sparse stride": ({**TWO, "block_size": 4, "num_local_blocks": 3, "vert_stride": 8,
                             "homo_head_pattern": False}, 14, 14),
    "moba 5": ({**TWO, "moba_chunk_size": 5, "moba_topk": 2}, 17, 17),
    "moba own block": ({**TWO, "moba_chunk_size": 4, "moba_topk": 1}, 10, 10),
    "nsa weighted": ({**NSA, "kernel_size": 6, "block_size": 6, "topk": 5, "init_blocks": 2, "local_blocks": 1,
                      "window_size": 5, "compress": "weighted", "num_attention_heads": 4, "qk_norm": "flat"}, 17, 21),
    "nsa separate": ({**NSA, "kernel_stride": 4, "window_size": 7, "separate_branches": True, "attention_bias": True},
                     19, 21),
    "nsa mlp": ({**NSA_3, "compress": "mlp", "compress_hidden_size": 3, "attn_logit_softcapping": 2.0}, 0, 21),
    "nsa mlp by default": ({name: value for name, value in NSA_3.items() if name != "compress"}, 17, 21),
    "nsa linear": ({**NSA_3, "compress": "linear", "v_head_dim": 6, "attn_output_gate": True}, 0, 21),
    "lightning 6 heads, last layer": ({**LIGHTNING, "num_attention_heads": 6, "layer_index": 5}, 0, 19),
    "lightning 12 heads": ({**LIGHTNING, "num_attention_heads": 12, "head_dim": 1}, 0, 19),
    "lightning one head": ({**LIGHTNING, "num_attention_heads": 1, "layer_index": 0, "num_hidden_layers": 1}, 0, 19),
    "msa one key head": ({**MSA, "num_key_value_heads": 1, "qk_norm": None, "index_block_size": 5,
                          "index_topk_blocks": 2, "norm_offset": 0.0}, 0, 19),
    "dsa of GLM": ({**DSA, "index_rope_layout": "interleaved"}, 0, 19),
    "dsa of GLM, e4m3": ({**DSA, "index_rope_layout": "interleaved", "index_quantised": True}, 0, 19),
    "dsa NoPE": ({**DSA, "rope_parameters": None, "index_head_dim": 3, "index_topk": 1}, 0, 19),
    "csa m=1": ({**CSA, "compress_rate": 1, "index_topk": 3}, 17, 45),
    "csa L above all": ({**CSA, "compress_rate": 3, "index_topk": 50, "sliding_window": 1}, 0, 45),
    "csa m above T": ({**CSA, "compress_rate": 50, "sliding_window": 40}, 0, 45),
    "csa NoPE": ({**CSA, "rope_parameters": None, "index_head_dim": 4, "o_groups": 4}, 0, 45),
    "hca m=1": ({**V4, "compress_rate": 1}, 0, 45),
    "hca m=7": ({**V4, "compress_rate": 7, "sliding_window": 9, "o_groups": 1}, 17, 45),
    "v4_window W=7": ({**V4, "sliding_window": 7}, 0, 45),
}  # fmt: skip


@pytest.mark.parametrize("size", [size for size, (_, T, _) in SIZES.items() if T])
def test_random_steps_equal_forward(size):
    att, (given, T, _) = jforge.get(size.split()[0]), SIZES[size]
    assert walk(att, att.Config(**given), T) <= compare.OUT["float64"]


@pytest.mark.parametrize("size", [size for size, (_, _, T) in SIZES.items() if T])
def test_torch_ref_agrees_at_more_sizes(size):
    name = size.split()[0]
    att, (given, _, T) = jforge.get(name), SIZES[size]
    assert torch_error(att, name, att.Config(**given), T) <= compare.OUT["float32"]


# --- overflow

OVERFLOWING = [("gqa", 0), ("mla", 0), ("sliding_window", 0), ("sinks", 0), ("sinks", 1), ("streaming", 0),
               ("block_sparse", 0), ("moba", 0), ("nsa", 0), ("nsa", 1), ("msa", 0), ("dsa", 0), ("dsa", 1),
               ("v4_window", 0), ("csa", 0), ("hca", 0)]  # fmt: skip


@pytest.mark.parametrize("name,i", OVERFLOWING, ids=[f"{name}-{i}" for name, i in OVERFLOWING])
def test_a_row_that_overflows_keeps_everything(name, i):
    """Row 1 is full. Under jit its y is NaN and every leaf of it as it was, though row 0 closes all blocks that it can
    in this very step; eagerly a ValueError names it. Rings are shorter than their windows.
    """
    att = jforge.get(name)
    cfg = att.examples[i]
    spec = att.cache_spec(cfg)
    grows = [b for b in spec.values() if b.every and not b.limit]
    asked = 2 * max(b.first or b.every for b in grows) if grows else min(b.limit for b in spec.values()) - 1
    empty = att.init_cache(cfg, 2, asked, jnp.float32)
    full = spec.capacity(empty)
    before = [n for n in range(full) if all(b.entries(n + 1) > b.entries(n) for b in grows)][-1]
    params, x = jax.tree.map(jnp.asarray, (weights(att, cfg, "float32"), tokens(cfg, 2, full, "float32")))
    _, prefill, decode = compiled(att, cfg)
    one = np.array([1, 1], np.int32)
    _, filled = prefill(params, x, empty, np.array([before, full], np.int32))
    _, nearly = prefill(params, x, empty, np.array([before - 1, full - 1], np.int32))
    for old, new, (y, after) in (
        (filled, 1, prefill(params, x, filled, one)),
        (filled, 1, decode(params, x[:, :1], filled)),
        (nearly, 2, decode(params, -x[:, :2], nearly)),  # of two tokens there is room for one
    ):
        assert np.isfinite(y[0]).all() and np.isnan(y[1]).all(), new
        assert after.length.tolist() == [before + 1, old.length[1]]
        for leaf in spec:
            was, now = (np.asarray(getattr(cache, leaf), np.float32) for cache in (old, after))
            np.testing.assert_array_equal(now[1], was[1], err_msg=leaf)
            assert (now[0] != was[0]).any(), leaf
    for step, cache, new in ((att.prefill, filled, 1), (att.decode, filled, 1), (att.decode, nearly, 2)):
        with pytest.raises(ValueError, match=f"row 1 would hold {full + 1} tokens; the cache has capacity {full}"):
            step(params, cfg, x[:, :new], cache)


def test_what_never_overflows():
    """States and rings of their whole size: a step after a million tokens, with concrete lengths, is taken."""
    never = set()
    for name, att in REGISTRY.items():
        for i, cfg in enumerate(att.examples):
            cache = att.init_cache(cfg, 1, 100, jnp.float32)
            if att.cache_spec(cfg).capacity(cache) is None:
                never.add(f"{name}-{i}")
                long, params = replace(cache, length=cache.length + 10**6), weights(att, cfg, "float32")
                jax.eval_shape(
                    lambda p, x, a=att, c=cfg, k=long: a.decode(p, c, x, k), params, tokens(cfg, 1, 1, "float32")
                )
    rings = ("sliding_window", "chunked_local", "streaming", "v4_window")
    states = ("lightning", "gated_deltanet", "kda", "mamba1", "mamba2", "short_conv")
    constant = (*rings, *states)
    assert never == {f"{name}-{i}" for name in constant for i in range(len(REGISTRY[name].examples))} | {"sinks-1"}


# --- bad input


@pytest.mark.parametrize("name", REGISTRY)
def test_another_cache_is_refused(name, untyped):
    """Of another class, also one with more leaves, which it would lose; with a leaf too wide; with too long a ring."""
    att = jforge.get(name)
    cfg, x = att.examples[0], jnp.zeros((2, 1, att.examples[0].hidden_size))
    spec, own = att.cache_spec(cfg), att.init_cache(cfg, 2, 9, jnp.float32)
    other = jforge.get({"mla": "dsa", "lightning": "gqa"}.get(name, "lightning"))
    strange = other.init_cache(other.examples[0], 2, 9, jnp.float32)
    bad = [(leaf, (*getattr(own, leaf).shape[:-1], 99)) for leaf in spec]
    bad += [(leaf, (2, b.limit + 1, *b.shape)) for leaf, b in spec.items() if b.limit]
    for step in (att.prefill, att.decode):
        with pytest.raises(TypeError, match=f"^cache is a {type(strange).__name__}; it must be a {spec.cls.__name__}$"):
            step({}, cfg, x, strange)
        for leaf, shape in bad:
            with pytest.raises(ValueError, match=rf"^cache.{leaf} has shape \({', '.join(map(str, shape))}\)"):
                step({}, cfg, x, replace(own, **{leaf: jnp.zeros(shape)}))


def several(message: str, **values):
    """({field: value}, message) of several values of one field, each named in the message."""
    return [({field: value}, f"{field} is {value!r}; {message}") for field, row in values.items() for value in row]


POSITIVE = "it must be a positive integer$"
NATURAL = "it must be an integer of at least 0$"
BAD = {
    "gqa": ({"hidden_size": 16, "num_attention_heads": 4}, [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads=3"),
        ({"hidden_size": 0}, "hidden_size is 0"), ({"hidden_size": 18}, "head_dim is None"),
        ({"head_dim": 2.5}, "head_dim is 2.5"), ({"qk_norm": "layer"}, "qk_norm is 'layer'"),
        ({"rope_layout": "neox"}, "rope_layout is 'neox'; it must be one of 'half', 'interleaved'"),
        ({"scaling": -1.0}, "scaling is -1.0"), *several("it must be", attn_logit_softcapping=[0, 1e-31, "30"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters has no factor"),
        ({"rope_parameters": {}}, "rope_parameters has no rope_theta"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.8}}, "partial_rotary_factor is 0.8"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 2}}, "partial_rotary_factor is 2")]),
    "mqa": ({"hidden_size": 16, "num_attention_heads": 4}, [({"num_key_value_heads": 2}, "num_key_value_heads is 2")]),
    "mha": ({"hidden_size": 16, "num_attention_heads": 4}, [({"num_key_value_heads": 2}, "num_key_value_heads is 2")]),
    "single_head": ({"hidden_size": 16}, [({"num_attention_heads": 4}, "num_attention_heads is 4")]),
    "mla": (DSA, [*several("", kv_lora_rank=[0], q_lora_rank=[-1], rope_layout=["neox"])]),
    "sliding_window": ({**ONE, "sliding_window": 5}, several(POSITIVE, sliding_window=[0, None, 2.0, True])),
    "sinks": (ONE, several(POSITIVE, sliding_window=[-1, "8"])),
    "streaming": ({**ONE, "start_size": 2, "recent_size": 2},
                  several(POSITIVE, start_size=[0], recent_size=[0, 1.5])),
    "block_sparse": ({**TWO, "block_size": 4}, [
        *several(POSITIVE, block_size=[0], num_local_blocks=[0], vert_stride=[0]),
        *several(NATURAL, num_global_blocks=[-1], num_random_blocks=[1.0], seed=[-3, True])]),
    "moba": ({**TWO, "moba_chunk_size": 4, "moba_topk": 2},
             several(POSITIVE, moba_chunk_size=[0], moba_topk=[0, None])),
    "nsa": (NSA, [
        *several(POSITIVE, kernel_size=[0], kernel_stride=[-1], block_size=[0], topk=[0], window_size=[0],
                 local_blocks=[0]),
        *several(NATURAL, init_blocks=[-1, True]),
        ({"kernel_size": 5}, "kernel_size is 5; it must be a multiple of kernel_stride=2"),
        ({"block_size": 7}, "block_size is 7; it must be a multiple of kernel_stride=2"),
        ({"block_size": 2}, "block_size is 2; .* at least kernel_size=4"),
        ({"topk": 2}, r"topk is 2; it must be at least init_blocks \+ local_blocks"),
        ({"compress": "max"}, "compress is 'max'; it must be one of 'mean', 'weighted', 'linear', 'mlp'"),
        ({"compress": "mlp", "compress_hidden_size": 0}, "compress_hidden_size is 0")]),
    "lightning": (LIGHTNING, [
        *several("it must be an integer in 0..num_hidden_layers - 1 = 5", layer_index=[6, -1, True]),
        *several("", num_hidden_layers=[0], block_size=[0], num_attention_heads=[0], head_dim=[-2], rms_norm_eps=[0]),
        ({"head_dim": None, "num_attention_heads": 3}, "head_dim is None; ")]),
    "msa": (MSA, [
        *several(POSITIVE, index_head_dim=[0], index_block_size=[0], index_topk_blocks=[0, 2.0],
                 index_local_blocks=[0]),
        *several(NATURAL, index_init_blocks=[-1, True]),
        ({"index_init_blocks": 3},
         r"index_topk_blocks is 3; it must be at least index_init_blocks \+ index_local_blocks"),
        ({"index_head_dim": 1}, "index_head_dim is 1; it must be at least the 2 channels that turn")]),
    "dsa": (DSA, [
        ({"q_lora_rank": None}, "q_lora_rank is None; it must be a positive integer"),
        *several(POSITIVE, index_n_heads=[0], index_head_dim=[-8], index_topk=[0, 2.0]),
        ({"index_rope_layout": "neox"}, "index_rope_layout is 'neox'; it must be one of 'half', 'interleaved'"),
        ({"index_head_dim": 3}, "index_head_dim is 3; it must be at least qk_rope_head_dim=4"),
        ({"index_head_dim": 6, "index_quantised": True}, "index_head_dim is 6; it must be a power of two")]),
    "csa": (CSA, [
        *several("", head_dim=[0], sliding_window=[0], q_lora_rank=[None], o_lora_rank=[-1], compress_rate=[0],
                 index_topk=[0], index_n_heads=[True], rms_norm_eps=[0], qk_rope_head_dim=[8]),
        ({"o_groups": 3}, "num_attention_heads is 4; it must be a multiple of o_groups=3"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; it must be even and at most head_dim=6"),
        ({"index_head_dim": 3}, "index_head_dim is 3; it must be at least qk_rope_head_dim=4"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.3}}, "attention_factor is 1.3; it must be 1")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_config_names_the_bad_field(name, untyped):
    config, (given, bad) = jforge.get(name).Config, BAD[name]
    given = {field.name: given[field.name] for field in fields(config) if field.name in given}
    config(**given)
    for changes, message in bad:
        with pytest.raises(ValueError, match=f"^{message}"):
            config(**{**given, **changes})


# --- fields that follow from others


def bare(cfg) -> tuple[dict, set[str]]:
    """(fields that make a Config like cfg, without any that may be None and then reads otherwise; the names of those
    left out).
    """
    given = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.init and f.name != "derived"}
    for name in [f.name for f in fields(cfg) if f.default is None]:
        try:
            if getattr(type(cfg)(**{**given, name: None}), name) is not None:
                del given[name]
        except ValueError:  # head_dim, where hidden_size is no multiple of the heads
            pass
    return given, {f.name for f in fields(cfg) if f.name not in given} - {"derived"}


MAGNIFIED = {**YARN, "mscale": 0.5, "mscale_all_dim": 1.5}
CONFIGS = {f"{name}-{i}": cfg for name, att in REGISTRY.items() for i, cfg in enumerate(att.examples)}


def outcome(make):
    try:
        return make()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_replace_is_a_config_written_anew(cfg, untyped):
    """dataclasses.replace of any field gives the Config, or the refusal, that the same fields give from the start: what
    follows from it follows, and what the user gave stays, also where it is what would follow.
    """
    given, following = bare(cfg)
    changes = [{name: value} for name, old in given.items() if type(old) is int for value in (old + 1, 2 * old)]
    changes += [{"head_dim": 18}, {"scaling": 0.7}, {"rope_parameters": MAGNIFIED}, {"head_dim": 4, "scaling": 0.7}]
    changes = [change for change in changes if change.keys() <= {f.name for f in fields(cfg)}]
    plain = type(cfg)(**given)
    stay = [{}, *({name: getattr(plain, name)} for name in following)]
    for own in stay:
        old = type(cfg)(**given, **own)
        assert old == plain and hash(old) == hash(plain) and repr(old) == repr(plain)
        for start in (old, pickle.loads(pickle.dumps(old)), replace(old)):
            for first in changes:
                anew = outcome(lambda made=given | own | first: type(cfg)(**made))
                assert outcome(lambda start=start, first=first: replace(start, **first)) == anew
                if not isinstance(anew, str):
                    assert replace(anew, **{name: getattr(old, name, None) for name in first}) == old


def test_replace_moves_what_follows():
    """The two that users met: keys four times as wide, and YaRN with its magnitude in the softmax scale."""
    gqa = replace(CONFIGS["gqa-0"], head_dim=16)
    assert (gqa.scaling, gqa.v_head_dim) == (0.25, 16)
    gqa = replace(gqa, head_dim=64)
    assert (gqa.scaling, gqa.v_head_dim) == (0.125, 64)
    att = jforge.get("mla")
    mla = att.Config(**{n: v for n, v in DSA.items() if not n.startswith("index")})
    moved = replace(mla, rope_parameters=MAGNIFIED)
    assert moved.scaling == pytest.approx(7**-0.5 * (1 + 0.15 * np.log(4)) ** 2)
    assert torch_error(att, "mla", moved, 9) <= compare.OUT["float32"]


# --- the modes of JAX that careful users run


@pytest.mark.parametrize("cfg", CONFIGS.items(), ids=CONFIGS)
@pytest.mark.parametrize("dtype,cached", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_strict_promotion_has_nothing_to_object_to(cfg, dtype, cached):
    """Traced with a cache of another dtype than the activations."""
    name, cfg = cfg
    att, key = jforge.get(name.split("-")[0]), jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"):
        params = jax.eval_shape(lambda: att.init_params(key, cfg, jnp.dtype(dtype)))
        x, cache = jnp.zeros((2, 7, cfg.hidden_size), dtype), att.init_cache(cfg, 2, 16, jnp.dtype(cached))
        lengths = jnp.array([7, 5])
        y = jax.eval_shape(lambda p: att.forward(p, cfg, x), params)
        chunk, _ = jax.eval_shape(lambda p, c: att.prefill(p, cfg, x, c, lengths=lengths), params, cache)
        step, _ = jax.eval_shape(lambda p, c: att.decode(p, cfg, x[:, :1], c), params, cache)
        jax.eval_shape(lambda p, c: att.select(p, cfg, x[:, :1], c), params, cache)
    assert {y.dtype, chunk.dtype, step.dtype} == {jnp.dtype(dtype)} and step.shape == (2, 1, cfg.hidden_size)


@pytest.mark.parametrize("name", REGISTRY)
def test_debug_infs_does_not_mind_masks(name):
    """Eager steps of a row with tokens and of one that has none, where every operation is looked at."""
    att = jforge.get(name)
    cfg = att.examples[0]
    params, x = jax.tree.map(jnp.asarray, (weights(att, cfg, "float32"), tokens(cfg, 2, 5, "float32")))
    cache = att.init_cache(cfg, 2, 8, jnp.float32)
    _, cache = compiled(att, cfg)[1](params, x, cache, np.array([5, 0], np.int32))
    with jax.debug_infs(True):
        y, _ = att.decode(params, cfg, x[:, :1], cache)
        att.select(params, cfg, x[:, :1], cache)
    assert np.isfinite(y).all()


# --- what follows from shapes, cache_spec and work

GQA = jforge.get("gqa")
CFG = GQA.examples[0]


def respecced(change):
    """gqa with other buffers."""

    def cache_spec(cfg):
        spec = GQA.cache_spec(cfg)
        return CacheSpec(spec.cls, {name: change(buffer) for name, buffer in spec.items()})

    return GQA._replace(cache_spec=cache_spec)


def test_cache_bytes_and_laws_follow_the_spec_of_a_variant():
    """Keys and values in float32 whatever the cache's dtype: the steps take such a cache as it is."""
    att = respecced(lambda buffer: replace(buffer, dtype="float32"))
    cache = att.init_cache(CFG, 2, 8)
    assert cache.k.dtype == cache.v.dtype == jnp.float32
    assert att.cost(CFG, context=8) == GQA.cost(CFG, context=8, dtype=jnp.float32)
    report = jforge.check(att, CFG, laws=("L1", "L4", "L8", "L9"))
    assert report.ok, report


def test_laws_report_steps_that_do_not_follow_the_spec():
    """A key channel more: the cache follows, prefill and decode say that it is not theirs."""
    att = respecced(lambda buffer: replace(buffer, shape=(buffer.shape[0], buffer.shape[1] + 1)))
    assert att.init_cache(CFG, 2, 8).k.shape[-1] == CFG.head_dim + 1
    for row in jforge.check(att, CFG, laws=("L1", "L2", "L8")):
        assert not row.ok and row.note.startswith("ValueError: cache.k has shape"), row


def test_parameters_follow_the_shapes_and_cost_the_work_of_a_variant():
    att = GQA._replace(
        shapes=lambda cfg: GQA.shapes(cfg) | {"sinks": (cfg.num_attention_heads,)},
        work=lambda cfg, context, capacity, new, closing: Work({"k": capacity}, {"v": new + closing}, context, 3),
    )
    params = att.init_params(jax.random.key(0), CFG)
    assert set(params) == {*GQA.shapes(CFG), "sinks"} and params["sinks"].shape == (CFG.num_attention_heads,)
    cost = att.cost(CFG, context=5, capacity=7, batch=2, dtype=jnp.float32, closing=True)
    slot = 4 * CFG.num_key_value_heads * CFG.head_dim
    assert (cost.read, cost.written, cost.flops, cost.entries_read) == ({"k": 14 * slot}, {"v": 4 * slot}, 10, 6)


def test_what_is_given_is_kept_until_it_is_none():
    """In the same or an earlier _replace, whatever changes later."""
    own, other = (lambda *args, **sizes: "own"), (lambda cfg: None)
    for field, source in (("init_params", "shapes"), ("init_cache", "cache_spec"), ("cost", "work")):
        earlier, same = (
            GQA._replace(**{field: own})._replace(**{source: other}),
            GQA._replace(**{field: own, source: other}),
        )
        assert getattr(earlier, field) is getattr(same, field) is own
        assert getattr(same._replace(**{field: None}), field) is not own
    with pytest.raises(ValueError, match="^shapes is None; init_params follows from it"):
        GQA._replace(shapes=None).init_params(jax.random.key(0), CFG)
    with pytest.raises(ValueError, match="^work is None; cost follows from it"):
        GQA._replace(work=None).cost(CFG, context=3)


@pytest.mark.parametrize("name", REGISTRY)
def test_what_is_traded_is_one_line(name):
    assert 0 < len(REGISTRY[name].traded) <= 100 and "\n" not in REGISTRY[name].traded
