"""The shipped config.json files: how they are read, what their layers are, how many bytes they keep."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from families import LLAMA

import jforge
from jforge import cli, stack
from jforge.attention import REGISTRY, lightning
from jforge.harness.tiny_configs import LLAMA3
from jforge.hf import layer, layers, load

STATES = ("gated_deltanet", "kda", "mamba1", "mamba2", "short_conv")
EXAMPLES = Path(jforge.__file__).parent / "configs"


def example(name: str) -> dict:
    return load(EXAMPLES / f"{name}.json")


def config_of(name: str, index: int):
    return layer(example(name), index)[1]


# Reading a file


def test_load(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load(tmp_path / "config.json") == LLAMA == load(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is not JSON: line 1: "),
        (b"[1]", "holds a JSON list; it must hold an object"),
        (b"\xff\xfe{}", "is not a text file in UTF-8"),
    ],
)
def test_load_errors_name_the_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)


def test_load_a_directory(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_imports_neither_transformers_nor_torch():
    code = f"import sys; from jforge.hf import layers, load; layers(load({str(EXAMPLES / 'qwen3-8b.json')!r}))"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES.parents[1])


# What they say

LLAMA31 = LLAMA3 | {"original_max_position_embeddings": 8192, "partial_rotary_factor": 1}
GPT = dict(hidden_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64, scaling=64**-0.5)
GEMMA = dict(hidden_size=5376, num_attention_heads=32, num_key_value_heads=16, head_dim=128, scaling=168**-0.5)
GEMMA |= dict(qk_norm="head", norm_offset=1.0, attn_logit_softcapping=None)
V3 = dict(hidden_size=7168, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128)
V3 |= dict(qk_rope_head_dim=64, v_head_dim=128, rope_layout="interleaved", attention_bias=False)
GLM5 = dict(num_attention_heads=64, q_lora_rank=2048, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=192)
GLM5 |= dict(v_head_dim=256, scaling=256**-0.5, index_n_heads=32, index_head_dim=128, index_topk=2048)
GLM5 |= dict(rope_layout="interleaved", index_rope_layout="interleaved")


def rope(theta: float, share: float = 1) -> dict:
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}


def shape(hidden: int, heads: int, kv_heads: int, head_dim: int = 128, **fields) -> dict:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return sizes | fields


PLAIN = {"attention_bias": False, "attention_output_bias": False, "qk_norm": None}
EXPECTED = {  # mechanisms, how many layers differ, fields by layer
    "llama-3.1-8b": (["gqa"] * 32, 1, {0: shape(4096, 32, 8, **PLAIN, rope_parameters=LLAMA31)}),
    "qwen3-8b": (["gqa"] * 36, 1, {0: shape(4096, 32, 8, qk_norm="head", rope_parameters=rope(1e6))}),
    "minimax-m2": (["gqa"] * 62, 1, {0: shape(3072, 48, 8, qk_norm="flat", rope_parameters=rope(5e6, 0.5))}),
    "mistral-7b-v0.1": (
        ["sliding_window"] * 32, 1, {0: shape(4096, 32, 8, **PLAIN, sliding_window=4096, rope_parameters=rope(1e4))},
    ),
    "gemma-3-27b": (
        (["sliding_window"] * 5 + ["gqa"]) * 10 + ["sliding_window"] * 2,
        2,
        {0: GEMMA | {"sliding_window": 1024, "rope_parameters": rope(1e4)}, 5: GEMMA},
    ),
    "gpt-oss-120b": (
        ["sinks"] * 36,
        2,
        {i: GPT | {"attention_bias": True, "attention_output_bias": True, "sliding_window": (128, None)[i % 2]}
         for i in range(36)},
    ),
    "deepseek-v3": (["mla"] * 61, 1, {0: V3 | {"scaling": 192**-0.5 * (0.1 * math.log(40) + 1) ** 2}}),
    "deepseek-v2-lite": (
        ["mla"] * 27,
        1,
        {0: dict(num_attention_heads=16, q_lora_rank=None, scaling=192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)},
    ),
    "kimi-k2": (["mla"] * 61, 1, {0: {"num_attention_heads": 64}}),
    "deepseek-v3.2": (["dsa"] * 61, 1, {}),
    "glm-5": (["dsa"] * 78, 1, {0: GLM5 | {"rope_parameters": rope(1e6)}}),
    "glm-5.2": (["dsa"] * 78, 2, {0: GLM5 | {"rope_parameters": rope(8e6)}}),
    "minimax-text-01": (
        (["lightning"] * 7 + ["gqa"]) * 10,
        71,
        {7: shape(6144, 64, 8, qk_norm=None, rope_parameters=rope(1e7, 0.5))}
        | {i: {"layer_index": i} for i in range(80) if i % 8 != 7},
    ),
    "minimax-m3": (["gqa"] * 3 + ["msa"] * 57, 2, {}),
    "deepseek-v4-flash": (["v4_window"] * 2 + ["csa", "hca"] * 20 + ["csa"], 3, {}),
    "qwen3-next-80b-a3b": ((["gated_deltanet"] * 3 + ["gqa"]) * 12, 2, {3: {"rope_parameters": rope(1e7, 0.25)}}),
    "kimi-linear-48b-a3b": ((["kda"] * 3 + ["mla"]) * 6 + ["kda"] * 2 + ["mla"], 2, {}),
    "nemotron-h-8b": (["mamba2"] * 4 + (["gqa"] + ["mamba2"] * 5) * 4, 2, {4: {"head_dim": 128}}),
    "falcon-h1-1.5b": (["mamba2", "gqa"] * 24, 2, {1: shape(2048, 8, 2, **PLAIN, rope_parameters=rope(1e11))}),
    "lfm2-1.2b": (
        (["short_conv"] * 2 + ["gqa"]) * 3 + ["short_conv", "gqa"] * 3 + ["short_conv"],
        2,
        {2: {"num_key_value_heads": 8, "head_dim": 64, "qk_norm": "head", "rope_parameters": rope(1e6)}},
    ),
    "gemma-3n-e4b": (
        (["sliding_window"] * 4 + ["gqa"]) * 7, 4, {34: {"kv_shared": True, "scaling": 1.0, "v_norm": True}},
    ),
    "gemma-4-e4b": ((["sliding_window"] * 5 + ["gqa"]) * 7, 4, {23: {"kv_shared": False, "head_dim": 512}}),
    "llama-4-scout": (
        (["chunked_local"] * 3 + ["gqa"]) * 12,
        2,
        {0: {"attention_chunk_size": 8192, "qk_norm_after_rope": True},
         3: {"attn_scale": 0.1, "rope_parameters": None}},
    ),
    "deepseek-v4-pro": (["hca"] * 2 + ["csa", "hca"] * 29 + ["csa"], 2, {}),
}  # fmt: skip


def test_every_example_is_expected():
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_layers(name):
    mechanisms, different, fields = EXPECTED[name]
    got = layers(example(name))
    kinds = {(mechanism, cfg) for mechanism, cfg, *_ in got}
    assert [mechanism for mechanism, *_ in got] == mechanisms and len(kinds) == different
    for index, expected in fields.items():
        assert {field: getattr(got[index][1], field) for field in expected} == expected


@pytest.mark.parametrize(
    "name, index, rope",
    [
        ("gemma-3-27b", 5, {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
        ("gpt-oss-120b", 0, {"rope_theta": 1.5e5, "truncate": False}),
        ("deepseek-v3", 0, {"rope_type": "yarn", "rope_theta": 10000}),
        ("deepseek-v3.2", 0, {"factor": 40}),
    ],
)
def test_scaled_rope(name, index, rope):
    found = config_of(name, index).rope_parameters
    assert {key: found[key] for key in rope} == rope


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_example_reads_the_same_through_transformers(path):
    config = load(path)
    names = {"kimi_k2": "deepseek_v3", "minimax_text_01": "minimax"}
    known_as = names.get(config["model_type"], config["model_type"])
    theirs = transformers.AutoConfig.for_model(**config | {"model_type": known_as})
    assert layers(theirs) == layers(config)


@pytest.mark.parametrize(
    "name, model",
    [
        ("llama-3.1-8b", "Llama-3.1-8B"),
        ("mistral-7b-v0.1", "Mistral-7B-v0.1"),
        ("gemma-3-27b", "Gemma-3-27B"),
        ("gpt-oss-120b", "gpt-oss-120b"),
        ("minimax-text-01", "MiniMax-Text-01"),
        ("minimax-m3", "MiniMax-M3"),
        ("deepseek-v3", "DeepSeek-V3"),
        ("deepseek-v3.2", "DeepSeek-V3.2"),
        ("deepseek-v4-flash", "DeepSeek-V4-Flash"),
        ("deepseek-v4-pro", "DeepSeek-V4-Pro"),
        ("qwen3-next-80b-a3b", "Qwen3-Next-80B-A3B"),
        ("nemotron-h-8b", "Nemotron-H-8B"),
        ("falcon-h1-1.5b", "Falcon-H1-1.5B"),
        ("lfm2-1.2b", "LFM2-1.2B"),
        ("llama-4-scout", "Llama-4-Scout"),
    ],
)
def test_examples_are_the_models_of_the_mechanisms(name, model):
    """With RoPE, norms and biases as the file has them; of a hybrid, the layers that are not full attention."""
    found = layers(example(name))
    kinds = {mechanism for mechanism, _ in found}
    for mechanism in kinds - ({"gqa"} if len(kinds) > 1 else set()):
        shipped = [cfg for title, cfg in REGISTRY[mechanism].models.items() if title.startswith(model)]
        own = {cfg for kind, cfg in found if kind == mechanism}
        assert shipped and own & set(shipped) and (mechanism == "lightning" or own <= set(shipped))


def test_shipped_models_without_positions_are_those_that_have_none():
    nope = {title for att in REGISTRY.values() for title, cfg in att.models.items()
            if getattr(cfg, "rope_parameters", None) is None}  # fmt: skip
    states = {title for name in STATES for title in jforge.get(name).models}
    assert nope == {"Kimi-Linear", "MiniMax-Text-01"} | states


def test_layers_of_one_model_differ_in_what_their_kind_says():
    local, full = (config_of("gpt-oss-120b", index) for index in (0, 1))
    assert dataclasses.replace(local, sliding_window=None) == full
    dense, blocks = (config_of("minimax-m3", index) for index in (0, 3))
    assert all(getattr(dense, f.name) == getattr(blocks, f.name) for f in dataclasses.fields(dense))
    sizes = {"hidden_size": 6144, "num_attention_heads": 64, "head_dim": 128}
    assert config_of("minimax-text-01", 0) == lightning.Config(**sizes, rms_norm_eps=1e-6)


@pytest.mark.parametrize("name, pattern", [("glm-5", "F" * 78), ("glm-5.2", "FFF" + "SSSF" * 18 + "SSS")])
def test_which_layers_of_glm_share_picks(name, pattern):
    assert "".join("FS"[cfg.index_shared] for _, cfg, *_ in layers(example(name))) == pattern


def test_slopes_of_minimax_text_01():
    """Golden values of heads 0, 31 and 63 in layers 0 and 78."""
    got = np.array([lightning.slopes(config_of("minimax-text-01", index))[[0, 31, 63]] for index in (0, 78)])
    want = [[0.91701321, 0.06250063, 0.00390629], [0.01161693, 0.00079177, 0.00004949]]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-9)


@pytest.mark.parametrize(
    "name, model_type",
    [("minimax-text-01", "minimax"), ("minimax-text-01", "minimax_m1"), ("kimi-k2", "deepseek_v3")],
)
def test_other_names_of_the_same_model(name, model_type):
    assert layers(example(name) | {"model_type": model_type}) == layers(example(name))


def test_kimi_k2_inside_a_multimodal_model():
    config = example("kimi-k2")
    multimodal = {"model_type": "kimi_k25", "text_config": config, "vision_config": {"hidden_size": 1152}}
    assert layers(multimodal) == layers(config)


BYTES = [  # mechanism, file, context, {key: value} of the report, and of the sum over all layers
    ("sinks", "gpt-oss-120b", "8k", {"layers": 36}, {"bytes_per_token": 18 * 2048}
     | dict.fromkeys(("read", "stored"), 18 * 2048 * (128 + 8192))),
    ("sliding_window", "gemma-3-27b", "8k", {"layers": 52}, {"read": 52 * 8192 * 1024}),
    ("gqa", "gemma-3-27b", "8k", {"layers": 10}, {"read": 10 * 8192 * 8192}),
    ("mla", "deepseek-v3", "4k", {"layers": 61}, dict.fromkeys(("written", "bytes_per_token"), 70272)),
    # a latent of 576 channels and, where there is an indexer, a key of 128
    ("dsa", "deepseek-v3.2", "4k", {}, dict.fromkeys(("written", "bytes_per_token"), 61 * 1408)),
    ("dsa", "glm-5.2", "4k", {}, dict.fromkeys(("written", "bytes_per_token"), 21 * 1408 + 57 * 1152)),
    ("lightning", "minimax-text-01", "8k", {"layers": 70}, {"stored": 70 * 4 * 64 * 128 * 128}),
    ("gqa", "minimax-text-01", "8k", {"layers": 10}, {"stored": 10 * 8192 * 2 * 8 * 128 * 2}),
    ("msa", "minimax-m3", "8k", {"layers": 57}, {"stored": 57 * 8192 * 2304}),
    # a ring of 128 in bfloat16, entries of 1024 B, index keys of 256 B, float32 rows
    ("v4_window", "deepseek-v4-flash", "8k", {"layers": 2}, {"stored": 2 * 128 * 1024}),
    ("csa", "deepseek-v4-flash", "8k", {"layers": 21},
     {"stored": 21 * (128 * 1024 + 2048 * (1024 + 256) + 65536 + 16384)}),
    ("hca", "deepseek-v4-pro", "8k", {"layers": 31}, {"stored": 31 * (128 * 1024 + 64 * 1024 + 524288)}),
]  # fmt: skip


HYBRIDS = {  # mechanisms2.md A to G: bytes a token, and fixed ones, in MiB
    "qwen3-next-80b-a3b": (12 * 2048, 36 * (2 + 48 / 1024)),
    "kimi-linear-48b-a3b": (7 * 1152, 20 * (2 + 72 / 1024)),
    "nemotron-h-8b": (4 * 4096, 24 * (4 + 60 / 1024)),
    "falcon-h1-1.5b": (24 * 1024, 24 * (3 + 21 / 1024)),
    "lfm2-1.2b": (6 * 2048, 10 * 8 / 1024),
    "gemma-3n-e4b": (8192, 16),
    "gemma-4-e4b": (16384, 20),
    "llama-4-scout": (49152, 1.125 * 1024),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_golden_bytes_of_hybrids(name):
    """The whole model at 131,072 tokens, states and convolutions included, of layers that share the owners alone."""
    a_token, fixed = HYBRIDS[name]
    cost = stack.cost(layers(example(name)), context=131072)
    assert (cost.per_token, cost.fixed) == (a_token, fixed * 2**20)
    assert sum(cost.stored.values()) == a_token * 131072 + fixed * 2**20


@pytest.mark.parametrize("mechanism, name, context, own, total", BYTES)
def test_cost(mechanism, name, context, own, total, capsys):
    path = str(EXAMPLES / f"{name}.json")
    assert cli.main(["cost", mechanism, "--config", path, "--context", context, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    wanted = own | total
    assert {key: got["layers_of_mechanism"][key] for key in wanted} == wanted
    if name == "deepseek-v3":
        assert got["layer"]["written"] == got["layer"]["bytes_per_token"] == 1152
