"""jforge.stack against transformers' decoder layers with their MLP left out: MiniMax-01's hybrid and MiniMax-M3's."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch

import jforge
from jforge import hf, stack
from jforge.core import compare
from jforge.harness import hf_shim, tiny_models
from jforge.harness.tiny_configs import MINIMAX, MINIMAX_M3, Model

EPS = 0.01  # of every norm in the tiny models
EIGHT = ["linear_attention"] * 7 + ["full_attention"]
WITHOUT_MLP = {"mlp_alpha_factor": 1.0, "mlp_beta_factor": 0.0}
SPLITS = {  # few sizes: every new one is a compilation
    "prefill 1, decode": (1,) * 10,
    "prefill 5, decode": (5,) + (1,) * 5,
    "chunks": (1, 5, 1, 1),
}


class Nothing(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def minimax(kinds=EIGHT):
    """MiniMax-01's pattern, softmax in the last of 8 layers: (model, the block of given norm weights)."""
    model = Model("MiniMax", MINIMAX | WITHOUT_MLP | {"layer_types": kinds}).build().model
    for layer in model.layers:
        layer.post_attention_layernorm = torch.nn.Identity()  # the MLP's norm: it acts on the residual too
    return model, lambda norms: partial(stack.scaled_post_norm, norms, scales_of(kinds), eps=EPS)


def scales_of(kinds) -> list[tuple[float, float]]:
    names = [kind.removesuffix("_attention") for kind in kinds]
    return [tuple(MINIMAX[f"{name}_attn_{x}_factor"] for x in ("alpha", "beta")) for name in names]


def minimax_m3():
    """A dense layer, then block-sparse ones, about which the residual is the plain one."""
    model = Model("MiniMaxM3VL", MINIMAX_M3).build().model
    for layer in model.layers:
        layer.mlp = Nothing()
    return model, lambda norms: partial(stack.pre_norm, norms, eps=EPS, offset=1.0)


MODELS = {"minimax": minimax, "minimax_m3": minimax_m3}


class Both:
    """A stack and the transformers model with its weights, on the same embedded tokens."""

    def __init__(self, model, bind):
        self.model, self.bind = model, bind
        self.model.norm = torch.nn.Identity()
        self.layers = tuple(hf.layers(self.model.config))
        weights = self.model.state_dict()
        self.params = [hf.convert(self.model.config, weights, i)[2] for i in range(len(self.layers))]
        self.norms = [jnp.asarray(layer.input_layernorm.weight.detach().numpy()) for layer in self.model.layers]
        self.x = self.model.embed_tokens(tiny_models.tokens(10)).detach()
        self.compiled = {}

    def ours(self, function, x, *rest):
        def call(params, norms, x, *rest):
            return function(params, self.layers, x, *rest, self.bind(norms))

        compiled = self.compiled.setdefault(function, jax.jit(call))
        return compiled(self.params, self.norms, x.numpy(), *rest)

    @torch.no_grad()
    def theirs(self, x, store=None, done=0):
        places = {}
        if hf_shim.counts_no_tokens(store):
            places = tiny_models.positions_and_masks(done, x.shape[1])
        out = self.model(inputs_embeds=x, **hf_shim.given(self.model, store), **places)
        return out.last_hidden_state.numpy()

    def caches(self, cache, store) -> float:
        """The worst error of any layer's cache."""
        errors = []
        for i, ((name, cfg), own) in enumerate(zip(self.layers, cache, strict=True)):
            theirs = tuple(leaf.numpy() for leaf in tiny_models.contents(store, i))
            errors.append(tiny_models.cache_error(jforge.get(name).cache_spec(cfg), own, theirs))
        return max(errors)


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    return Both(*MODELS[request.param]())


def test_the_pattern_of_minimax_01():
    names = [name for name, _ in hf.layers(minimax()[0].config)]
    assert names == ["lightning"] * 7 + ["gqa"]


def test_forward_is_that_of_transformers(both):
    got, want = both.ours(stack.forward, both.x), both.theirs(both.x)
    assert compare.worst_vector(got, want) <= compare.OUT["float32"]


@pytest.mark.parametrize("split", SPLITS)
def test_steps_and_caches_are_those_of_transformers(both, split):
    store = hf_shim.empty_cache(both.model)
    cache, done = stack.init_cache(both.layers, 2, 12, jnp.float32), 0
    for size in SPLITS[split]:
        x = both.x[:, done : done + size]
        function = stack.decode if done > 0 and size == 1 else stack.prefill
        y, cache = both.ours(function, x, cache)
        assert compare.worst_vector(y, both.theirs(x, store, done)) <= compare.OUT["float32"]
        assert both.caches(cache, store) <= compare.OUT["float32"]
        done += size
    assert all((own.length == done).all() for own in cache)


@pytest.mark.parametrize("change", ["alpha", "beta", "residual", "eps"])
def test_each_part_of_the_scaled_residual_counts(change):
    kinds = EIGHT[-2:]
    linear, full = scales_of(kinds)
    swapped = {
        "alpha": [(full[0], linear[1]), (linear[0], full[1])],
        "beta": [(linear[0], full[1]), (full[0], linear[1])],
    }
    scales = swapped.get(change, [linear, full])

    def wrong(norms):
        if change == "residual":  # of x, not of its norm
            return partial(stack.pre_norm, norms, eps=EPS)
        return partial(stack.scaled_post_norm, norms, scales, eps=10 * EPS if change == "eps" else EPS)

    pair = Both(minimax(kinds)[0], wrong)
    assert compare.worst_vector(pair.ours(stack.forward, pair.x), pair.theirs(pair.x)) > 1e-2


def test_transformers_needs_positions_and_masks():
    """Why the comparison gives them: left alone, a model with lightning in layer 0 takes the last token for the first.

    When this fails, transformers counts the tokens and `positions_and_masks` can go.
    """
    model = Model("MiniMax", MINIMAX | {"layer_types": EIGHT[-2:]}).build()
    ids = tiny_models.tokens(4)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits[:, -1]
        errors = {}
        for given in (True, False):
            store = hf_shim.empty_cache(model)
            model(input_ids=ids[:, :3], **hf_shim.given(model, store))
            places = tiny_models.positions_and_masks(3, 1) if given else {}
            got = model(input_ids=ids[:, 3:], **hf_shim.given(model, store), **places).logits[:, -1]
            errors[given] = float((got - want).norm() / want.norm())
    assert errors[True] <= compare.OUT["float32"] and errors[False] > 1e-2
