"""DSA: configs and weights of DeepSeek-V3.2, GLM-5 and GLM-5.2, and what their indexers pick."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from test_hf_mla import SHAPES as LATENT

import jforge
from jforge import cli, hf_config
from jforge.attention import dsa, mla
from jforge.core import compare
from jforge.core.compare import OUT
from jforge.harness import tiny_models
from jforge.harness.tiny_models import against_transformers
from jforge.hf import convert
from jforge.hf_config import layer, layers, load

EXAMPLES = Path(hf_config.__file__).parent / "configs"
V32, GLM = "deepseek_v32", "glm_moe_dsa, shared picks"
SHAPE = {
    "hidden_size": 10,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 2,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "index_topk": 4,
}
TINY = SHAPE | {"model_type": "deepseek_v32"}
GLM_TINY = SHAPE | {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared", "full"]}
PERIODIC = SHAPE | {"model_type": "glm_moe_dsa"}
INDEXER = {
    "indexer.wq_b.weight": (24, 6),
    "indexer.wk.weight": (8, 10),
    "indexer.k_norm.weight": (8,),
    "indexer.k_norm.bias": (8,),
    "indexer.weights_proj.weight": (3, 10),
}
SHAPES = {f"{name}.weight": shape for name, shape in LATENT.items()}


def shared_of(config) -> str:
    """A letter a layer: S where it takes the picks of another."""
    return "".join("FS"[cfg.index_shared] for _, cfg in layers(config))


def weights(index: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"model.layers.{index}.self_attn.{x}": rng.normal(size=s).astype("float32") for x, s in shapes.items()}


# Configs


def test_deepseek_v32():
    got = layers(load(EXAMPLES / "deepseek-v3.2.json"))
    assert len(got) == 61 and set(got) == {got[0]}
    name, cfg = got[0]
    published = dsa.dsa.models["DeepSeek-V3.2"]
    assert name == "dsa" and cfg.rope_parameters["factor"] == 40
    assert dataclasses.replace(cfg, rope_parameters=published.rope_parameters) == published


@pytest.mark.parametrize(
    "name, pattern, theta", [("glm-5", "F" * 78, 1e6), ("glm-5.2", "FFF" + "SSSF" * 18 + "SSS", 8e6)]
)
def test_glm_5(name, pattern, theta):
    config = load(EXAMPLES / f"{name}.json")
    assert {mechanism for mechanism, _ in layers(config)} == {"dsa"} and shared_of(config) == pattern
    cfg = layer(config, 0)[1]
    assert (cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim) == (64, 2048, 512, 64)
    assert (cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.scaling) == (192, 256, 256**-0.5)
    assert (cfg.index_n_heads, cfg.index_head_dim, cfg.index_topk) == (32, 128, 2048)
    assert (cfg.rope_layout, cfg.index_rope_layout) == ("interleaved", "interleaved")
    assert dict(cfg.rope_parameters) == {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1}


def test_a_deepseek_v3_file_with_index_topk_is_v32():
    assert layers(TINY | {"model_type": "deepseek_v3"}) == layers(TINY)
    assert layer(TINY | {"model_type": "deepseek_v3", "index_topk": None}, 0)[0] == "mla"


@pytest.mark.parametrize(
    "keys, pattern",
    [
        ({}, "FFFFFFFF"),
        ({"indexer_types": ["full", "shared"] * 4}, "FSFSFSFS"),
        ({"index_topk_pattern": "FFSSSFSS"}, "FFSSSFSS"),
        ({"index_topk_pattern": ["full", "shared"] * 4}, "FSFSFSFS"),
        ({"index_topk_freq": 3}, "FFSSFSSF"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFS"),
        ({"index_topk_pattern": "FSSSSSSS", "index_topk_freq": 2}, "FSSSSSSS"),
        ({"indexer_types": ["full"] * 8, "index_topk_pattern": "FSSSSSSS", "index_topk_freq": 2}, "FFFFFFFF"),
    ],
)
def test_which_layers_share_picks(keys, pattern):
    config = SHAPE | {"num_hidden_layers": 8, **keys}
    assert shared_of(config | {"model_type": "glm_moe_dsa"}) == pattern
    assert shared_of(transformers.GlmMoeDsaConfig(num_key_value_heads=2, **config)) == pattern


@pytest.mark.parametrize("config", [TINY, GLM_TINY])
def test_latent_norms_keep_their_own_eps(config):
    assert layer(config | {"rms_norm_eps": 0.01}, 0)[1].rms_norm_eps == 1e-6


LIST = "it must be num_hidden_layers=3 times 'full' or 'shared' .*, 'full' first$"


@pytest.mark.parametrize(
    "config, error, message",
    [
        (TINY | {"index_topk": 0}, ValueError, "index_topk is 0; it must be a positive integer"),
        (TINY | {"index_n_heads": "8"}, ValueError, "index_n_heads is '8'; it must be a positive integer"),
        (TINY | {"index_head_dim": 3}, ValueError, "index_head_dim is 3; it must be at least qk_rope_head_dim=4"),
        (TINY | {"q_lora_rank": None}, ValueError, "q_lora_rank is None; it must be a positive integer"),
        (TINY | {"num_key_value_heads": 1}, ValueError, "num_key_value_heads is 1; it must be num_attention_heads=2"),
        (TINY | {"index_topk_freq": 4}, NotImplementedError, "index_topk_freq is 4: only 1 has a mechanism"),
        (TINY | {"index_topk_pattern": "FSF"}, NotImplementedError, "index_topk_pattern is 'FSF': only None has"),
        (TINY | {"indexer_types": ["full"] * 3}, NotImplementedError, r"indexer_types is \['full', .*: only None"),
        (TINY | {"indexer_rope_interleave": True}, NotImplementedError, "indexer_rope_interleave is True: only False"),
        (TINY | {"rope_interleave": False}, NotImplementedError, "rope_interleave is False: only True has a mech"),
        (TINY | {"layer_types": ["full_attention"] * 3}, NotImplementedError, "layer 0 of deepseek_v32 is full_atten"),
        (
            SHAPE | {"model_type": "deepseek_v3", "index_topk": None, "layer_types": ["indexed_attention"] * 3},
            ValueError,
            "config has no index_topk",
        ),
        (GLM_TINY | {"indexer_rope_interleave": False}, NotImplementedError, "indexer_rope_interleave is False: only"),
        (GLM_TINY | {"indexer_types": ["full"]}, ValueError, rf"indexer_types is \['full'\]; {LIST}"),
        (GLM_TINY | {"indexer_types": ["shared"] * 3}, ValueError, rf"indexer_types is .*; {LIST}"),
        (GLM_TINY | {"indexer_types": ["full", {}, 1]}, ValueError, rf"indexer_types is .*; {LIST}"),
        (PERIODIC | {"index_topk_pattern": "FXF"}, ValueError, f"index_topk_pattern is 'FXF'; {LIST}"),
        (PERIODIC | {"index_topk_pattern": 3}, ValueError, f"index_topk_pattern is 3; {LIST}"),
        (PERIODIC | {"index_topk_freq": -1}, ValueError, "index_topk_freq is -1; it must be a"),
    ],
)  # fmt: skip
def test_what_the_parser_refuses(config, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        layers(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, stored", [("deepseek-v3.2", 61 * 1408), ("glm-5.2", 21 * 1408 + 57 * 1152)])
def test_cost(name, stored, capsys):
    """Bytes a token of all layers: a latent of 576 channels and, where there is an indexer, a key of 128."""
    assert cli.main(["cost", "dsa", "--config", str(EXAMPLES / f"{name}.json"), "--context", "4k", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["all_layers"]["bytes_per_token"] == got["all_layers"]["written"] == stored


# Weights


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
def test_where_the_rows_go(model_type):
    state = weights(1, SHAPES | INDEXER)
    att, cfg, params = convert(SHAPE | {"model_type": model_type}, state, 1)
    assert att is dsa.dsa and {n: p.shape for n, p in params.items()} == dsa.shapes(cfg)
    w = {key.removeprefix("model.layers.1.self_attn."): value for key, value in state.items()}
    for head in range(3):
        rows = w["indexer.wq_b.weight"][8 * head : 8 * head + 8]
        np.testing.assert_array_equal(params["wq_index"][:, head], rows.T)
    np.testing.assert_array_equal(params["wk_index"], w["indexer.wk.weight"].T)
    np.testing.assert_array_equal(params["ww_index"], w["indexer.weights_proj.weight"].T)
    np.testing.assert_array_equal(params["k_index_norm"], w["indexer.k_norm.weight"])
    np.testing.assert_array_equal(params["k_index_bias"], w["indexer.k_norm.bias"])
    latent = convert(SHAPE | {"model_type": "deepseek_v3", "index_topk": None}, weights(1, SHAPES), 1)[2]
    assert all((params[name] == value).all() for name, value in latent.items())


def test_a_layer_that_shares_has_no_indexer():
    _, cfg, params = convert(GLM_TINY, weights(1, SHAPES), 1)
    assert {n: p.shape for n, p in params.items()} == dsa.shapes(cfg) == mla.shapes(cfg)


@pytest.mark.parametrize(
    "config, shapes, message",
    [
        *((TINY, {k: v for k, v in (SHAPES | INDEXER).items() if k != name}, f"{name} is missing") for name in INDEXER),
        (TINY | {"index_n_heads": 2}, SHAPES | INDEXER, r"wq_b.weight has shape \(24, 6\); it must be \(16, 6\)"),
        (TINY | {"index_head_dim": 12}, SHAPES | INDEXER, r"wq_b.weight has shape \(24, 6\); it must be \(36, 6\)"),
        (TINY | {"q_lora_rank": 5}, SHAPES | INDEXER, r"q_a_proj.weight has shape \(6, 10\); it must be \(5, 10\)"),
        (TINY, SHAPES | INDEXER | {"indexer.wk.bias": (8,)}, "wk.bias is in the state dict, but the config has no"),
        (GLM_TINY, SHAPES | INDEXER, "indexer.wq_b.weight is in the state dict, but the config has no place for it"),
        (TINY | {"model_type": "deepseek_v3", "index_topk": None}, SHAPES | INDEXER, "indexer.wq_b.weight is in the"),
    ],
)
def test_bad_weights(config, shapes, message):
    with pytest.raises(ValueError, match=message):
        convert(config, weights(1, shapes), 1)


# Against transformers where a sequence outgrows index_topk = 4

EDGES = {"prefill 4, decode": (4,) + (1,) * 6, "chunks": (4, 4, 1, 1)}


@pytest.mark.parametrize("name", [V32, GLM])
def test_steps_about_index_topk(name):
    _, errors = against_transformers(name, EDGES)
    assert set(errors) == {"forward", "cache", *EDGES}
    assert max(errors.values()) <= OUT["float32"], errors


class Seen:
    """One full forward of a tiny model: by layer what its attention saw and returned, and what its indexer picked."""

    def __init__(self, name: str):
        self.model = tiny_models.MODELS[name].build()
        count = self.model.config.num_hidden_layers
        self.weights = self.model.state_dict()
        self.picks: dict[int, np.ndarray] = {}
        for index in range(count):
            if (indexer := tiny_models.attention_module(self.model, index).indexer) is not None:
                indexer.register_forward_hook(self._keep(index))
        (self.steps,) = tiny_models.run(self.model, tuple(range(count)), (tiny_models.TOKENS,), use_cache=False)

    def _keep(self, index: int):
        def hook(module, args, output):
            self.picks[index] = masked(output.numpy())

        return hook

    def layer(self, index: int, **keys):
        """(Config, params) of a layer, of the model's config with `keys` instead of its own."""
        return convert(self.model.config.to_dict() | keys, self.weights, index)[1:]


def masked(picks: np.ndarray) -> np.ndarray:
    """-1 for the tokens that come after the query: transformers fills up with them and masks them afterwards."""
    return np.where(picks > np.arange(picks.shape[1])[:, None], -1, picks)


@cache
def seen(name: str) -> Seen:
    return Seen(name)


def exact_scores(cfg, params, x) -> np.ndarray:
    """Index scores in float64, B T T."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(p, jnp.float64) for name, p in params.items()}
        x = jnp.asarray(x, jnp.float64)
        B, T, _ = x.shape
        q, k, w = dsa.project_index(wide, cfg, x, jnp.broadcast_to(jnp.arange(T), (B, T)))
        return np.asarray(jforge.ops.index_scores(q, k, w, jnp.full(B, T, jnp.int32)))


def compared_picks(name: str, index: int, **changes) -> compare.Picks:
    """Ours, with these fields of the Config changed, against transformers'; scores within 1e-5 of each other tie."""
    cfg, params = seen(name).layer(index)
    x = seen(name).steps[index].x
    wrong = dataclasses.replace(cfg, **changes)
    got = jax.jit(dsa.index, static_argnums=1)(params, wrong, x, dsa.dsa.init_cache(wrong, *x.shape[:2], jnp.float32))
    scores = exact_scores(cfg, params, x)
    epsilon = OUT["float32"] * np.abs(scores[np.isfinite(scores)]).max()
    return compare.picks(got, seen(name).picks[index], scores, cfg.index_topk, epsilon)


@pytest.mark.parametrize("name", [V32, GLM])
@pytest.mark.parametrize("index", [0, 1])
def test_picks(name, index):
    got = compared_picks(name, index)
    assert got.wrong == 0 and got.tied <= 1, got
    assert got.rows == tiny_models.BATCH * tiny_models.TOKENS


@pytest.mark.parametrize("name, layout", [(V32, "interleaved"), (GLM, "half")])
def test_picks_of_the_other_rope_layout_are_wrong(name, layout):
    assert compared_picks(name, 0, index_rope_layout=layout).wrong > 0


def test_shared_layers_take_the_picks_of_the_last_indexer():
    """Not those of the first, and the ones before a query is full are not attended."""
    got = seen(GLM)
    assert sorted(got.picks) == [0, 1] and (got.picks[0] != got.picks[1]).any()
    for index in (2, 3):
        np.testing.assert_array_equal(masked(got.steps[index].indices), got.picks[1])
        assert error_of_forward(GLM, index, picks=got.picks[1]) <= OUT["float32"]
        assert error_of_forward(GLM, index, picks=got.picks[0]) > 1e-2


# What the comparison sees


def error_of_forward(name: str, index: int = 0, picks=None, change=None, **keys) -> float:
    cfg, params = seen(name).layer(index, **keys)
    step = seen(name).steps[index]
    given = {} if picks is None else {"indices": jnp.asarray(picks)}
    got = jax.jit(dsa.forward, static_argnums=1)(change(params) if change else params, cfg, step.x, **given)
    return compare.worst_vector(got, step.y)


@pytest.mark.parametrize(
    "name, keys",
    [
        (V32, {"index_topk": 3}),
        (V32, {"index_topk": 5}),
        (V32, {"index_topk": None}),  # the default, more than there are tokens
        (V32, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}),
        (V32, {"model_type": "glm_moe_dsa", "indexer_types": ["full"] * 2}),
        (GLM, {"model_type": "deepseek_v32", "indexer_types": None}),
    ],
)
def test_every_key_matters(name, keys):
    assert error_of_forward(name) <= OUT["float32"]
    assert error_of_forward(name, **keys) > 1e-2


@pytest.mark.parametrize("leaf", ["wq_index", "wk_index", "ww_index", "k_index_norm", "k_index_bias"])
def test_every_weight_of_the_indexer_matters(leaf):
    assert error_of_forward(V32, change=lambda params: params | {leaf: params[leaf][..., ::-1]}) > 1e-2


@pytest.mark.parametrize("buffer", ["k_rope", "k_index"])
def test_the_order_of_cached_rope_channels_matters(buffer, monkeypatch):
    spec = tiny_models.MODELS[GLM]
    apart = {name: count for name, count in spec.pairs_apart.items() if name != buffer}
    monkeypatch.setitem(tiny_models.MODELS, GLM, dataclasses.replace(spec, layers=(0,), pairs_apart=apart))
    _, errors = against_transformers(GLM, EDGES)
    assert errors.pop("cache") > 0.1
    assert max(errors.values()) <= OUT["float32"]
