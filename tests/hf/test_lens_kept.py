"""Caches that no mechanism computes: what a step reads and writes of them, and the keys of an encoder."""

import pytest

from jforge import hf, lens
from jforge.hf.kept import Kept, fixed, keys_and_values, of_encoder, ring_of, slots

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
BART = {"model_type": "bart", "d_model": 64, "decoder_attention_heads": 4, "decoder_layers": 2}


def test_a_step_reads_all_and_writes_a_slot():
    cost = Kept(keys_and_values(2, 8) | {"state": fixed(3, 5, dtype="float32")}).cost(context=10, batch=3)
    assert cost.stored == {"k": 3 * 10 * 16 * 2, "v": 3 * 10 * 16 * 2, "state": 3 * 15 * 4}
    assert cost.read == cost.stored
    assert cost.written == {"k": 3 * 16 * 2, "v": 3 * 16 * 2, "state": 3 * 15 * 4}


@pytest.mark.parametrize("context, read", [(7, 7), (16, 16), (24, 16), (27, 19), (31, 23), (32, 16)])
def test_picks_are_whole_blocks_and_the_open_one(context, read):
    """Two blocks of 8 at most, and what lies behind the last whole block."""
    kept = Kept({"k": slots(4), "k_index": slots(2)}, picked={"k": (16, 8)})
    assert kept.cost(context=context).read == {"k": read * 4 * 2, "k_index": context * 2 * 2}
    assert kept.cost(context=context).stored == {"k": context * 4 * 2, "k_index": context * 2 * 2}


def test_slots_before_the_first_token():
    cost = Kept(keys_and_values(1, 4, more=32)).cost(context=10)
    assert cost.stored["k"] == 42 * 4 * 2 and cost.per_token == 2 * 4 * 2 and cost.fixed == 2 * 32 * 4 * 2


def test_what_another_layer_holds_is_read_and_not_stored():
    kept = Kept({"k_index": slots(2)}, picked={"latent": (4, 1)}, borrowed={"latent": slots(8)})
    cost = kept.cost(context=10)
    assert cost.stored == {"k_index": 40} and cost.written == {"k_index": 4}
    assert cost.read == {"k_index": 40, "latent": 4 * 8 * 2}


def test_an_encoders_keys_are_only_read():
    cost = Kept(**of_encoder(100, 2, 8)).cost(context=10)
    assert cost.stored == cost.read == {"k_cross": 100 * 16 * 2, "v_cross": 100 * 16 * 2} and not cost.written


def test_a_cache_cut_to_a_window():
    cut = ring_of(Kept({"latent": slots(8), "k_rope": slots(2)}).spec, 4)
    assert cut.cost(context=3).stored == {"latent": 3 * 8 * 2, "k_rope": 3 * 2 * 2}
    assert cut.cost(context=100).stored == {"latent": 4 * 8 * 2, "k_rope": 4 * 2 * 2}


def test_caches_of_an_encoder_are_counted_where_its_tokens_are_given():
    alone, both = lens.from_config(BART), lens.from_config(BART, encoder_tokens=100)
    note = "cross-attention caches are left out: give encoder_tokens"
    assert note in alone.notes and note not in both.notes
    assert both.stored(context=10) == alone.stored(context=10) | {
        "k_cross": 2 * 100 * 64 * 2,
        "v_cross": 2 * 100 * 64 * 2,
    }
    assert both.written(context=10) == alone.written(context=10)
    assert both.read(context=10)["k_cross"] == 2 * 100 * 64 * 2
    assert [layer.kind for layer in both.layers] == ["full_attention", "cross_attention"] * 2
    assert [layer.convertible for layer in both.layers] == [True, False] * 2
    assert [name for name, _ in hf.layers(BART)] == ["mha", "mha"]


def test_no_encoder_no_tokens_of_one():
    llama = SIZES | {"model_type": "llama"}
    with pytest.raises(ValueError, match="^encoder_tokens is 9; it must be None: llama keeps no keys of an encoder$"):
        lens.from_config(llama, encoder_tokens=9)
    with pytest.raises(ValueError, match="^encoder_tokens is 0; it must be a positive integer$"):
        lens.from_config(BART, encoder_tokens=0)
    bert = SIZES | {"model_type": "bert", "is_decoder": True}
    with pytest.raises(ValueError, match="bert keeps no keys of an encoder"):
        lens.from_config(bert, encoder_tokens=9)
    assert len(lens.from_config(bert | {"add_cross_attention": True}, encoder_tokens=9).layers) == 4


def test_layers_that_see_an_image_alone_keep_nothing_of_text():
    """Llama 3.2 Vision."""
    text = SIZES | {"model_type": "mllama_text_model", "num_hidden_layers": 5, "cross_attention_layers": [3]}
    config = {"model_type": "mllama", "text_config": text | {"num_key_value_heads": 2}}
    assert [layer.index for layer in lens.from_config(config).layers] == [0, 1, 2, 4]
    seen = lens.from_config(config, encoder_tokens=1601)
    assert [layer.index for layer in seen.layers] == [0, 1, 2, 3, 4]
    assert seen.stored(context=9)["k_cross"] == 1601 * 2 * 16 * 2


def test_latents_of_another_layer():
    """Mistral Large 4: layer 2 reads those of layer 0 and keeps index keys of its own, layer 3 those of 1 and none."""
    config = SIZES | {"model_type": "mistral_large4_text", "num_hidden_layers": 4, "kv_source_layers": [0, 1, 0, 1]}
    config |= {"no_rope_layers": [1, 0, 1, 0], "indexer_types": ["full", "full", "full", "shared"], "index_topk": 4}
    config |= {"kv_lora_rank": 8, "qk_rope_head_dim": 2, "index_head_dim": 3}
    found = lens.from_config(config).layers
    assert [sorted(layer.stored(context=10)) for layer in found] == [
        ["k_index", "k_rope", "latent"], ["k_index", "latent"], ["k_index"], []
    ]  # fmt: skip
    assert [layer.shares for layer in found] == [None, None, 0, 1]
    assert found[3].read(context=10) == {"latent": 4 * 8 * 2} and found[3].written(context=10) == {}


def test_two_attentions_in_a_layer():
    config = SIZES | {"model_type": "longcat_flash", "num_layers": 2, "kv_lora_rank": 8, "qk_rope_head_dim": 2}
    del config["num_hidden_layers"]
    found = lens.from_config(config)
    assert [layer.index for layer in found.layers] == [0, 0, 1, 1]
    assert found.stored(context=10) == {"latent": 4 * 10 * 8 * 2, "k_rope": 4 * 10 * 2 * 2}


def test_bytes_without_a_mechanism_have_no_flops():
    config = {"model_type": "rwkv", "hidden_size": 8, "num_hidden_layers": 2}
    found = lens.from_config(config)
    assert sum(found.stored(context=1).values()) == sum(found.stored(context=1000).values()) == 2 * (2 * 16 + 3 * 32)
    assert found.compute_bound_from("h100", context=10) is None
    with pytest.raises(NotImplementedError, match="layer 0 of rwkv is linear_attention: a recurrence of its own"):
        hf.layers(config)
