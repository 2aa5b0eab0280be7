"""Keys of a file that a cache obeys, whatever the masks of the model do, and what a file leaves to its class."""

import importlib.util
import json
from pathlib import Path

import lens_types
import pytest
import transformers

from jforge import hf, lens
from jforge.harness import hf_shim
from jforge.hf.config import SIZES as SIZES_OF_CLASSES
from jforge.hf.config import WRAPPERS
from jforge.hf.families import FAMILIES

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
LLAMA = SIZES | {"model_type": "llama"}
MISTRAL = SIZES | {"model_type": "mistral"}
OWN_CACHE = {"rwkv", "xlstm", "gpt_neo"}  # nothing that transformers builds from a config; of GPT-Neo APART says why
TYPES = sorted((FAMILIES.keys() & set(transformers.CONFIG_MAPPING)) - OWN_CACHE - set(WRAPPERS))
KEYS = {
    "none": {},
    "window": {"layer_types": None, "sliding_window": 5},
    "chunk": {"layer_types": None, "attention_chunk_size": 5},
    "list": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
    "a layer": {"layer_types": None, "per_layer_config": {"1": {"sliding_window": 5}}},
}


def file_with(config, keys: dict) -> dict:
    """What transformers would write, with other keys."""
    given = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "per_layer_config")}
    given |= {key: value for key, value in keys.items() if value is not None}
    if kinds := keys.get("layer_types"):
        count = lens_types.text_of(config).num_hidden_layers
        given["layer_types"] = (kinds * count)[:count]
    return given


def windows(file: dict) -> dict[int, int | None]:
    """{layer: its window}, of those that keep something."""
    limits = {}
    for layer in lens.from_config(file).layers:
        rings = {buffer.limit for buffer in layer.spec.values()} - {None}
        limits[layer.index] = max(rings, default=None)
    return limits


@pytest.mark.pinned
@pytest.mark.parametrize("keys", KEYS)
def test_windows_are_those_of_the_cache(keys):
    """Every type whose config transformers takes with these keys: the same windows, or a refusal, never others."""
    agreed, refused = 0, []
    for name in TYPES:
        config = lens_types.config_of(name)
        given = file_with(config, KEYS[keys]) if keys != "none" else config.to_dict()
        try:
            theirs = hf_shim.windows(type(config).from_dict(given))
        except Exception:  # noqa: S112 - what transformers does not take has no cache to compare with
            continue
        try:
            ours = windows(given)
        except (NotImplementedError, ValueError):
            refused.append(name)
            continue
        agreed += 1
        common = [i for i in ours if i < len(theirs)]  # a decoder's layers are not those that its config counts
        assert [theirs[i] for i in common] == [ours[i] for i in common], name
    assert agreed >= {"none": 190, "window": 180, "chunk": 180, "list": 160, "a layer": 50}[keys]
    assert len(refused) <= 20, refused


@pytest.mark.pinned
def test_keys_that_a_file_omits_mean_the_class():
    """Every type whose file may leave all but widths, heads and layers to its class: the caches of that class."""
    compared, lists = 0, set()
    for name in TYPES:
        file = SIZES_OF_CLASSES.get(name, {}) | lens_types.FILLED.get(name, {})
        whole = transformers.CONFIG_MAPPING[name](**file)
        try:
            found = lens_types.counted(file | {"model_type": name}, 5000)
        except ValueError as error:
            assert "must list the" in str(error), name
            lists.add(name)
            continue
        assert found == lens_types.counted(whole, 5000), name
        compared += 1
    assert compared >= 195
    assert lists == {"deepseek_v4", "kimi_linear", "minimax", "minimax_m3_vl_text", "nemotron_h"}  # docs/divergences.md


def test_a_window_that_no_mask_knows_is_counted_and_not_converted():
    found = lens.from_config(LLAMA | {"sliding_window": 8}).layers
    assert [layer.mechanism for layer in found] == ["sliding_window"] * 3
    assert not any(layer.convertible for layer in found)
    with pytest.raises(NotImplementedError, match="layer 0 of llama is sliding_attention; only its full_attention"):
        hf.layers(LLAMA | {"sliding_window": 8})
    assert [layer.mechanism for layer in lens.from_config(LLAMA | {"attention_chunk_size": 8}).layers] == [
        "chunked_local"
    ] * 3


def test_the_cache_of_mistral_obeys_a_list_and_its_mask_does_not():
    config = MISTRAL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config |= {"num_hidden_layers": 4}
    found = lens.from_config(config).layers
    assert [layer.mechanism for layer in found] == ["sliding_window", "gqa"] * 2
    assert [layer.convertible for layer in found] == [True, False] * 2
    assert "is full_attention in the cache and sliding_attention in the mask" in found[1].lacks
    assert [name for name, _ in hf.layers(config)] == ["sliding_window"] * 4


@pytest.mark.parametrize("key", [1, "1", "01"])
def test_a_layer_has_sizes_of_its_own(key):
    config = LLAMA | {"per_layer_config": {key: {"num_key_value_heads": 4, "head_dim": 8}}}
    assert [(cfg.num_key_value_heads, cfg.head_dim) for _, cfg in hf.layers(config)] == [(2, 16), (4, 8), (2, 16)]
    stored = [layer.stored(context=10) for layer in lens.from_config(config).layers]
    assert [bytes_of["k"] for bytes_of in stored] == [10 * 2 * 16 * 2, 10 * 4 * 8 * 2, 10 * 2 * 16 * 2]


def test_bad_entries_of_a_layer_are_named():
    with pytest.raises(ValueError, match=r"^per_layer_config\[1\] is 3; it must be an object$"):
        hf.layers(LLAMA | {"per_layer_config": {"1": 3}})
    with pytest.raises(NotImplementedError, match="^per_layer_config skips parts of layer 1"):
        lens.from_config(LLAMA | {"per_layer_config": {"1": {"skip": ["attention"]}}})


def test_old_names_of_kinds():
    """GLM-5's and Qwen4's."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    glm = sizes | {"model_type": "glm_moe_dsa", "layer_types": ["deepseek_sparse_attention"] * 2}
    assert [name for name, _ in hf.layers(glm)] == ["dsa", "dsa"]
    qwen = sizes | {"model_type": "qwen4_exp_text", "layer_types": ["qwen_sparse_attention", "linear_attention"]}
    qwen |= {"indexer_kv_heads": 1, "indexer_head_dim": 4, "indexer_budget": 8, "indexer_compress_ratio": 4}
    assert [layer.mechanism for layer in lens.from_config(qwen).layers] == ["kept", "gated_deltanet"]


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"model_type": "recurrent_gemma", "block_types": []},
            "block_types is []; it must be a list of 'recurrent' and",
        ),
        ({"model_type": "mllama_text_model", "cross_attention_layers": 3}, "cross_attention_layers is 3; it must be a"),
        (
            {"model_type": "mistral_large4_text", "kv_source_layers": [0, 2, 2]},
            "kv_source_layers[1] is 2; it must be a",
        ),
        (
            {"model_type": "hy_v4", "indexer_types": ["shared"] * 3},
            "indexer_types is ['shared', 'shared', 'shared']; it",
        ),
        ({"model_type": "inkling_text", "local_layer_ids": 1}, "local_layer_ids is 1; it must be a list of layers"),
        ({"model_type": "xlstm", "qk_dim_factor": "a"}, "qk_dim_factor is 'a'; it must be a positive number"),
        ({"model_type": "cpmant", "prompt_length": "q"}, "prompt_length is 'q'; it must be a positive integer"),
        (
            {"model_type": "zamba2", "layers_block_type": ["mamba", "x", "mamba"]},
            "layers_block_type is 'x'; it must be",
        ),
    ],
)
def test_bad_values_are_named(keys, said):
    with pytest.raises(ValueError) as problem:
        lens.from_config(SIZES | keys)
    assert str(problem.value).startswith(said) and "\n" not in str(problem.value)


# --- sections of models of several inputs


VICUNA = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}}


def test_a_section_means_its_class():
    """LLaVA-1.5's text_config has a model_type and nothing that a cache shows."""
    found = lens.from_config(VICUNA)
    assert found.stored(context=100) == {"k": 32 * 100 * 4096 * 2, "v": 32 * 100 * 4096 * 2}
    said = "not in the file, so as the class has it: hidden_size=4096, num_attention_heads=32, num_hidden_layers=32"
    assert said in found.notes
    bare = lens.from_config({"model_type": "llava", "text_config": {"vocab_size": 32064}})
    assert bare.stored(context=100) == found.stored(context=100)


def test_a_name_that_the_file_has_is_not_filled_twice():
    inner = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "num_attention_heads": 4}
    found = lens.from_config({"model_type": "vision-encoder-decoder", "decoder": inner})
    assert [layer.config.head_dim for layer in found.layers] == [16, 16]


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config", "thinker_config"])
def test_sections_under_other_names(key):
    assert lens.from_config({"model_type": "some_vl", key: LLAMA}).layers == lens.from_config(LLAMA).layers
    nested = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": SIZES}}
    assert lens.from_config(nested).model_type == "qwen2_5_omni_text"


def test_a_flat_file_has_no_class_to_fall_back_on():
    with pytest.raises(ValueError, match="^config has no num_attention_heads$"):
        lens.from_config({"model_type": "llama", "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="^config has no text_config, where llava files have their language model$"):
        lens.from_config(SIZES | {"model_type": "llava"})
    assert lens.from_config(SIZES | {"model_type": "qwen2_vl"}).model_type == "qwen2_vl_text"  # published so


def test_an_unknown_type_is_named():
    with pytest.raises(NotImplementedError, match="^model_type 'gpt_next' is not known; known are "):
        lens.from_config({"model_type": "gpt_next"})


@pytest.mark.pinned
def test_the_table_of_defaults_is_current():
    where = Path(__file__).parents[2] / "docs" / "hf_defaults.py"
    spec = importlib.util.spec_from_file_location("hf_defaults", where)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.render() == script.DOCUMENT.read_text(encoding="utf-8"), "python docs/hf_defaults.py makes it anew"
    assert WRAPPERS["llava"] == "llama" and set(WRAPPERS.values()) <= set(FAMILIES)


WRONG = (None, 5, -1, 2.5, "x", True, [], [1], ["x"], [None], {}, {"a": 1})
OF_THEIR_OWN = ("bamba", "codegen", "dbrx", "dots1", "falcon_h1", "falcon_mamba", "gpt2", "jamba", "lfm2", "mamba2",
                "nemotron_h", "qwen2_moe", "recurrent_gemma", "zamba2")  # fmt: skip


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_a_wrong_value_of_any_key_is_one_line_or_no_matter(untyped, name):
    """No TypeError, KeyError or division by zero of Python's own, whatever the value of a key that the class has."""
    file = json.loads(lens_types.config_of(name).to_json_string(use_diff=False)) | {"model_type": name}
    lens.from_config(file)
    refused = 0
    for key in file.keys() - {"model_type"}:
        for value in WRONG:
            try:
                model = lens.from_config(file | {key: value})
                model.stored(context=100), model.read(context=100)
            except (ValueError, NotImplementedError) as problem:
                refused += 1
                assert str(problem) and "\n" not in str(problem)
    assert refused > 30
