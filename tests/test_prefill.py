"""Prefill of long prompts: memory that is linear in the tokens, the same numbers in blocks of queries, and its cost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge.attention import REGISTRY
from jforge.core import attend
from jforge.cost import seen
from jforge.lawbench import Bench
from jforge.traffic import Trace

EXAMPLES = [(name, index) for name, att in REGISTRY.items() for index in range(len(att.examples))]
# One layer of hidden size 512 with 8 heads.
DENSE = {"hidden_size": 512, "num_attention_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
TWO = {**DENSE, "num_key_value_heads": 2}
MLA = {**DENSE, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
       "v_head_dim": 64}  # fmt: skip
V4 = {**DENSE, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 128, "o_groups": 2, "o_lora_rank": 64,
      "sliding_window": 128}  # fmt: skip
BLOCKS = ("lightning", "gated_deltanet", "kda", "mamba2")
"""Whose prefill has products within blocks of tokens."""
LAYERS = {
    "single_head": {**DENSE, "num_attention_heads": 1, "head_dim": 64},
    "mha": DENSE,
    "mqa": DENSE,
    "gqa": TWO,
    "mla": MLA,
    "sliding_window": {**DENSE, "sliding_window": 1024},
    "chunked_local": {**DENSE, "attention_chunk_size": 1024},
    "sinks": DENSE,
    "streaming": {**DENSE, "recent_size": 1020},
    "block_sparse": {**DENSE, "block_size": 64, "num_global_blocks": 1, "num_local_blocks": 2, "num_random_blocks": 2},
    "moba": {**DENSE, "moba_chunk_size": 512, "moba_topk": 3},
    "nsa": {**TWO, "kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16, "window_size": 512},
    "lightning": {"hidden_size": 512, "num_attention_heads": 8},
    "msa": {**TWO, "index_head_dim": 64},
    "dsa": {**MLA, "index_n_heads": 8, "index_head_dim": 64, "index_topk": 512},
    "v4_window": V4,
    "csa": {**V4, "compress_rate": 4, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 128},
    "hca": {**V4, "compress_rate": 128},
    "gated_deltanet": {
        "hidden_size": 512,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "kda": {"hidden_size": 512, "linear_num_heads": 8, "linear_head_dim": 64},
    "mamba1": {"hidden_size": 512, "intermediate_size": 1024, "state_size": 16, "time_step_rank": 32},
    "mamba2": {"hidden_size": 512, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 2},
    "short_conv": {"hidden_size": 512},
}


def temporaries(att, cfg, tokens: int, dtype) -> float:
    """MiB that the compiled prefill of one row holds beside its arguments and results."""
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg, dtype))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 1, tokens, dtype))
    x = jax.ShapeDtypeStruct((1, tokens, cfg.hidden_size), dtype)
    prefill = jax.jit(lambda params, x, cache: att.prefill(params, cfg, x, cache), donate_argnums=2)
    return prefill.lower(params, x, cache).compile().memory_analysis().temp_size_in_bytes / 2**20


def test_a_llama_layer_of_32768_tokens():
    gqa = jforge.get("gqa")
    assert temporaries(gqa, gqa.models["Llama-3.1-8B"], 32768, jnp.bfloat16) <= 2048


@pytest.mark.parametrize("name", REGISTRY)
def test_8192_tokens_of_the_first_shipped_model(name):
    att = REGISTRY[name]
    assert temporaries(att, next(iter(att.models.values())), 8192, jnp.bfloat16) <= 3072


@pytest.mark.parametrize("name", REGISTRY)
def test_twice_the_tokens_take_at_most_twice_the_memory(name):
    """32,768 float32 tokens of a small layer: their scores alone, all at once, would be 32 GiB."""
    att = REGISTRY[name]
    half, whole = (temporaries(att, att.Config(**LAYERS[name]), tokens, jnp.float32) for tokens in (16384, 32768))
    assert whole <= 600 and whole <= 2 * half


@pytest.mark.parametrize("name", REGISTRY)
def test_blocks_of_queries_change_no_number(name, monkeypatch):
    """Of forward, its gradient, and a ragged prefill with NaN in the cache and the pads; of MLA a head at a time."""
    att = REGISTRY[name]
    cfg = att.examples[-1]

    def values(params, x):
        out, back = jax.vjp(lambda params, x: att.forward(params, cfg, x), params, x)
        return out, back(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    with jax.enable_x64(True):
        bench = Bench(att, cfg, 0)
        params, x, lengths = bench.params(), bench.x(), bench.lengths
        whole = jax.jit(values)(params, x)
        monkeypatch.setattr(attend, "SCORES", 3 * len(lengths) * bench.T)
        blocks = jax.jit(lambda *given: values(*given))(params, x)
        for got, want in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
        real = (np.arange(bench.T) < lengths[:, None])[..., None]
        y, _ = bench.ragged(params, np.where(real, x, np.nan), bench.empty(poison=True), lengths)
        np.testing.assert_allclose(y, np.where(real, whole[0], 0), rtol=0, atol=1e-11)


def test_a_long_prompt_is_taken_in_blocks(monkeypatch):
    """The test above would prove nothing if its prompts fitted: of 7 queries 3 at a time, then the last 3 anew."""
    monkeypatch.setattr(attend, "SCORES", 30)
    sizes = []

    def block(rows, keys):
        sizes.append((rows[0].shape[1], keys[0].shape[1]))
        return rows[0] + keys[0].sum(axis=1, keepdims=True)

    rows, keys = jnp.arange(7.0)[None], jnp.ones((1, 8))
    got = attend.over_queries(block, (rows,), 10, (keys,), jnp.array([[0, 0, 1, 3, 4, 4, 7]]))
    np.testing.assert_array_equal(got[0], np.arange(7) + [2, 2, 2, 6, 8, 8, 8])
    assert set(sizes) == {(3, 2), (3, 4), (3, 6), (3, 8)}


# --- cost


@pytest.mark.parametrize("name,index", EXAMPLES)
def test_cost_of_a_prefill_is_what_its_program_touches(name, index):
    """An empty cache and one that holds tokens, to the byte; flops are those of its steps, in prefill's form."""
    att, dtype = REGISTRY[name], jnp.bfloat16
    cfg = att.examples[index]
    spec = att.cache_spec(cfg)
    block = math.lcm(*(b.every or 1 for b in spec.values()), getattr(cfg, "block_size", 1))
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg, dtype))
    for context, new in ((6, 6), (8, 3)):
        context, new = context * block, new * block
        cache = jax.eval_shape(lambda capacity=context: att.init_cache(cfg, 1, capacity, dtype))
        x = jax.ShapeDtypeStruct((1, new, cfg.hidden_size), dtype)
        step = Trace(lambda params, x, cache: att.prefill(params, cfg, x, cache), params, x, cache)
        moved, cost = step.count(closing=True), att.cost(cfg, context=context, new=new, dtype=dtype)
        assert (cost.read, cost.written) == (moved.read, moved.written)
        assert cost.stored == att.cost(cfg, context=context, dtype=dtype).stored
        steps = [att.cost(cfg, context=n, capacity=context).flops for n in range(context - new + 1, context + 1)]
        if name not in ("mla", "dsa", *BLOCKS):  # whose prefill has another form than their steps
            assert cost.flops == sum(steps)


def test_flops_of_the_forms_that_only_prefill_has():
    mla, dsa, lightning = (jforge.get(name) for name in ("mla", "dsa", "lightning"))
    cfg = mla.models["DeepSeek-V3"]
    assert mla.cost(cfg, context=4096, new=4096).flops == 2 * 128 * (128 + 64 + 128) * (4096 * 4097 // 2)
    cfg = dsa.models["DeepSeek-V3.2"]
    picked = 2048 * 2049 // 2 + 2048 * 2048
    indexer = 2 * 64 * 129 * (4096 * 4097 // 2)
    assert dsa.cost(cfg, context=4096, new=4096).flops == 2 * 128 * (128 + 64 + 128) * picked + indexer
    cfg = lightning.models["MiniMax-Text-01"]  # blocks of 256 tokens
    pairs = 2 * (256 * 257 // 2) + 100 * 101 // 2
    states = 4 * 128 * 612 + 3 * 128
    assert lightning.cost(cfg, context=700, new=612).flops == 64 * 128 * (states + 4 * pairs)


def test_flops_of_the_delta_rule_in_blocks():
    """Of a token the keys and the queries meet the state, and it gains the token's; of pairs both meet keys, and weigh
    values; a token's key meets none of its own. Beside that the convolution.
    """
    delta = jforge.get("gated_deltanet")
    cfg = delta.models["Qwen3-Next-80B-A3B"]  # blocks of 64 tokens
    pairs, own = 2 * (64 * 65 // 2) + 10 * 11 // 2, 138
    state, met = 128 * 128 * (6 * 138 + 3), 2 * 256 * (2 * pairs - own)
    assert delta.cost(cfg, context=138, new=138).flops == 32 * (state + met) + 2 * 4 * 8192 * 138
    assert delta.cost(cfg, context=138).flops == 7 * 32 * 128 * 128 + 2 * 4 * 8192


@pytest.mark.parametrize("limit", [None, 1, 3, 50])
@pytest.mark.parametrize("every,first", [(1, None), (4, None), (2, 6), (3, 3)])
def test_seen_is_the_sum_over_the_new_tokens(every, first, limit):
    least = every if first is None else first
    slots = [min(max(1, (n - least) // every + 1), limit or n) for n in range(1, 41)]
    for context in range(1, 41):
        for new in {1, min(2, context), max(1, context // 2), context}:
            want = sum(slots[context - new : context])
            assert seen(context, new, limit, every=every, first=first) == want


def test_a_million_tokens_are_counted_at_once():
    gqa = jforge.get("gqa")
    cost = gqa.cost(gqa.models["Llama-3.1-8B"], context=2**20, new=2**20)
    assert cost.flops == 2 * 32 * 256 * (2**20 * (2**20 + 1) // 2)


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"new": 0}, "new is 0; it must be a positive integer"),
        ({"new": True}, "new is True; it must be a positive integer"),
        ({"new": 9}, "new is 9; of a context of 8 no more tokens are new"),
        ({"new": 2, "closing": True}, "closing is True; it is asked of one token, and of new=2"),
    ],
)
def test_a_prefill_that_cannot_be_is_refused(sizes, message):
    gqa = jforge.get("gqa")
    with pytest.raises(ValueError, match=f"^{message}"):
        gqa.cost(gqa.examples[0], context=8, **sizes)
