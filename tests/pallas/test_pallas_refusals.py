"""What has no Mosaic kernel is refused with the reason, before any launch. Bad arguments are in the ops' contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import PALLAS, abstract, same, zeros

SIZES = dict(B=1, T=1, N=4, K=1, S=64, H=64, C=64, R=64, L=2, I=4, J=64, P=2, V=64)
PAGES = {"page_table": np.zeros((1, 1), np.int32)}
SCALES = {name: np.ones((1, 64, 1), np.float32) for name in ("k_scale", "v_scale")}
NEEDED = {
    "decode_attention": {"scale": 1.0}, "decode_mla": {"scale": 1.0}, "decode_sparse_mla": {"scale": 1.0},
    "decode_block_sparse": {"scale": 1.0, "block_size": 8}, "block_index_scores": {"block_size": 8},
}  # fmt: skip
CODES, LATENTS, KEYS = dict(k="int8", v="int8"), dict(latent="int8"), dict(k_index="int8")
LATENT_SCALE, KEY_SCALE = {"latent_scale": np.ones((1, 64), np.float32)}, {"k_scale": np.ones((1, 64), np.float32)}
WIDE = {"out_dtype": "float64"}

# op: (sizes that change, dtypes that change, options, how the reason reads)
REFUSED = {
    "decode_attention": [
        ({}, dict.fromkeys("qkv", "float32"), {}, "tf32"), ({"S": 12}, {}, {}, "multiple of 8"),
        ({"H": 72}, {}, {}, "multiples of 16"), ({"V": 320}, {}, {}, "up to 256"), ({}, {}, WIDE, "float32"),
        ({"S": 12}, {}, PAGES, "page=12 .* multiple of 8"), ({}, CODES, SCALES, "k_scale"),
    ],
    "decode_mla": [
        ({}, {"*": "float32"}, {}, "tf32"), ({"S": 12}, {}, {}, "multiple of 8"),
        ({"C": 96}, {}, {}, "multiples of 64"), ({"C": 576}, {}, {}, "up to 512"),
        ({"R": 12}, {}, {}, "multiples of 8"), ({"R": 128}, {}, {}, "up to 64"),
        ({"S": 12}, {}, PAGES, "page=12 .* multiple of 8"), ({}, LATENTS, LATENT_SCALE, "latent_scale"),
    ],
    "decode_sparse_mla": [
        ({}, {"*": "float32"}, {}, "tf32"), ({}, {}, WIDE, "float32"), ({"C": 96}, {}, {}, "multiples of 64"),
        ({"C": 576}, {}, {}, "up to 512"), ({"R": 12}, {}, {}, "multiples of 8"), ({"R": 128}, {}, {}, "up to 64"),
        ({"S": 0}, {}, {}, "S=0"), ({"L": 0}, {}, {}, "L=0"), ({"N": 0}, {}, {}, "N=0"),
        ({}, LATENTS, LATENT_SCALE, "latent_scale"),
    ],
    "decode_block_sparse": [
        ({}, {"*": "float32"}, {}, "tf32"), ({}, {}, WIDE, "float32"), ({}, {}, {"block_size": 4}, "block_size is 4"),
        ({}, {}, {"block_size": 256}, "block_size is 256"), ({"S": 12}, {}, {}, "multiple of 8"),
        ({"S": 0}, {}, {}, "S=0"), ({"L": 0}, {}, {}, "L=0"), ({"T": 0}, {}, {}, "T=0"),
        ({"H": 72}, {}, {}, "multiples of 16"), ({"V": 320}, {}, {}, "up to 256"),
        ({"H": 80}, {}, {"block_size": 1}, "multiples of 64"), ({"S": 12}, {}, PAGES, "multiple of 8"),
        ({"S": 24}, {}, PAGES | {"block_size": 16}, "divide it"), ({"H": 96}, {"v": None}, {}, "multiples of 64"),
        ({}, {"v": None}, {"softcap": 3.0}, "softcap is 3.0"), ({}, CODES, SCALES, "k_scale"),
    ],
    **dict.fromkeys(("index_scores", "block_index_scores"), [
        ({}, {"*": "float32"}, {}, "tf32"), ({"S": 12}, {}, {}, "multiple of 8"),
        ({"J": 24}, {}, {}, "multiples of 16"),
        ({"J": 16}, KEYS, KEY_SCALE, "multiples of 32"), ({"J": 272}, {}, {}, "up to 256"),
    ]),
    "merge_states": [({"V": 0}, {}, {}, "V=0"), ({"V": 6}, {"lses": "float32"}, {}, "16 bytes")],
}  # fmt: skip
REFUSED["index_scores"] = [*REFUSED["index_scores"], ({"I": 264, "J": 256}, {}, {}, "must fit")]
REFUSED["block_index_scores"] = [*REFUSED["block_index_scores"], ({}, {}, {"block_size": 24}, "block_size is 24")]


def call(op, sizes, types, options):
    types = dict(lses="float32") | types
    arrays = abstract(op, SIZES | sizes, types.pop("*", "float16"), **types)
    return getattr(PALLAS.ops, op)(*zeros(arrays), **NEEDED.get(op, {}) | options)


@pytest.mark.parametrize("op, changes", [(op, row) for op, rows in REFUSED.items() for row in rows])
def test_unsupported_calls_say_why(op, changes):
    *changes, reason = changes
    with pytest.raises(NotImplementedError, match=reason):
        call(op, *changes)


@pytest.mark.parametrize(
    "H, V, state, reason",
    [(12, 64, "float32", "H=12"), (264, 64, "float32", "up to 256"), (64, 40, "float32", "V=40"),
     (64, 64, "float64", "state has dtype float64")],
)  # fmt: skip
def test_unsupported_states_say_why(H, V, state, reason):
    with jax.enable_x64(state == "float64"), pytest.raises(NotImplementedError, match=reason):
        q, v = jnp.zeros((1, 2, H), jnp.float16), jnp.zeros((1, 2, V), jnp.float16)
        PALLAS.ops.decode_linear(q, q, v, jnp.zeros((1, 2, H, V), state), jnp.ones(2, jnp.float32))


@pytest.mark.parametrize("empty", "BTN")
def test_a_merge_of_no_rows(empty):
    out, lse = call("merge_states", {empty: 0}, {}, {})
    shape = tuple((SIZES | {empty: 0})[axis] for axis in "BTNV")
    assert out.shape == shape and out.dtype == jnp.float16
    assert lse.shape == shape[:-1] and lse.dtype == jnp.float32


def test_topk_is_the_definitions():
    """It has no kernel: the order, -1 for -inf and the errors are those of jforge.ops, where they are tested."""
    import jforge.ops

    scores = jnp.asarray([[1, 2, 2, -np.inf, 0, np.nan]], jnp.bfloat16)
    assert same([PALLAS.ops.topk_indices(scores, 8)], [jforge.ops.topk_indices(scores, 8)])
