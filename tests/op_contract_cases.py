"""Calls that every package must refuse: op -> [(what changes of a good call, the error, how the message begins)].

Arrays are NumPy's, so that each package converts them. The beginnings are torch_ref's; the argument and the error are
what all packages say. What only torch can be asked stands apart.
"""

import numpy as np

INF, NAN, V, T = float("inf"), float("nan"), ValueError, TypeError


def f32(*shape):
    return np.zeros(shape, np.float32)


def f16(*shape):
    return np.zeros(shape, np.float16)


def int8(*shape):
    return np.zeros(shape, np.int8)


def int32(*values):
    return np.array(values, np.int32)


def lists(*shape, dtype="int32"):
    """Distinct numbers along the last axis."""
    return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()


CACHE = {"q": f32(3, 2, 4, 5), "k": f32(3, 11, 2, 5), "v": f32(3, 11, 2, 3)}
LATENTS = {"q_latent": f32(3, 2, 3, 5), "q_rope": f32(3, 2, 3, 4), "latent": f32(3, 9, 5), "k_rope": f32(3, 9, 4)}
KEYS = {"q_index": f32(4, 2, 3, 5), "k_index": f32(4, 9, 5)}
LENGTHS, KEY_LENGTHS = {"lengths": int32(9, 2, 5)}, {"lengths": int32(9, 6, 1, 0)}
GOOD = {
    "decode_attention": CACHE | LENGTHS | {"scale": 0.4},
    "decode_mla": LATENTS | LENGTHS | {"scale": 0.4},
    "decode_block_sparse": CACHE | {"block_indices": lists(3, 2, 2, 3)} | LENGTHS | {"block_size": 8, "scale": 0.4},
    "decode_sparse_mla": LATENTS | {"indices": lists(3, 2, 4), "scale": 0.4},
    "index_scores": KEYS | {"weights": f32(4, 2, 3)} | KEY_LENGTHS,
    "block_index_scores": KEYS | KEY_LENGTHS | {"block_size": 4},
    "topk_indices": {"scores": f32(3), "k": 1},
    "decode_linear": {
        **{"q": f32(3, 2, 5), "k": f32(3, 2, 5), "v": f32(3, 2, 4), "state": f32(3, 2, 5, 4), "decay": f32(2)},
    },
    "merge_states": {"outs": f32(2, 1, 1, 1, 3), "lses": f32(2, 1, 1, 1)},
}

ALL_LENGTHS = [
    ({"lengths": f32(3)}, T, "lengths has dtype torch.float32; allowed: int32"),
    ({"lengths": np.array([9, 2, 5])}, T, "lengths has dtype torch.int64; allowed: int32"),
    ({"lengths": int32(9, 2)}, V, "lengths has shape [2]; allowed: [B=3]"),
    ({"lengths": int32(9, -1, 5)}, V, "lengths[1] is -1; allowed: 0 to "),
    ({"lengths": int32(9, 2, 12)}, V, "lengths[2] is 12; allowed: 0 to "),
]
ALL_PAGES = [
    ({"page_table": lists(2, 3)}, V, "page_table has shape [2, 3]; allowed: [B=3 P]"),
    ({"page_table": int32(0, 3, 0)[:, None]}, V, "page_table[1, 0] is 3; allowed: 0 to 2, the pages of the pool"),
]
ALL_SCALES = [
    ({"scale": None}, T, "scale is "),
    ({"scale": np.complex64(1)}, T, "scale is "),
    ({"scale": NAN}, V, "scale is nan; allowed: a number from -3.4e+38 to 3.4e+38"),
    ({"scale": INF}, V, "scale is inf; allowed: a number"),
    ({"scale": np.float16(-INF)}, V, "scale is -inf; allowed: a number"),
    ({"scale": 1e39}, V, "scale is 1e+39; allowed: a number from -3.4e+38"),
    ({"scale": -(10**400)}, V, "scale is -1000"),
]
CHUNKS = [({"chunk": -8}, V, "chunk is -8; allowed: an int >= 1")]
WINDOWS = [
    ({"window": 0}, V, "window is 0; allowed: an int >= 1"),
    ({"window": 2.0}, T, "window is a float; allowed: an int >= 1"),
    *CHUNKS,
]
BLOCKS = [
    ({"block_size": 0}, V, "block_size is 0; allowed: an int >= 1"),
    ({"block_size": 4.0}, T, "block_size is a float; allowed: an int >= 1"),
]
POOLS = {"page_table": lists(3, 1)}
CODES = {"k": int8(3, 11, 2, 5), "v": int8(3, 11, 2, 3)}
OVER_A_CACHE = [
    ({"q": f32(3, 4, 5)}, V, "q has shape [3, 4, 5]; allowed: [B T N H]"),
    ({"q": f32(3, 0, 4, 5)}, V, "q has shape [3, 0, 4, 5]; allowed: [B T N H]"),
    ({"q": f32(3, 2, 5, 5)}, V, "q has N=5 heads; allowed: a multiple of the K=2 heads of k"),
    ({"q": lists(3, 2, 4, 5)}, T, "q has dtype torch.int32; allowed: float16, bfloat16, float32, float64"),
    ({"q": f16(3, 2, 4, 5)}, T, "k has dtype torch.float32; allowed: float16, int8, float8_e4m3fn, float8_e5m2"),
    ({"k": f32(3, 11, 2, 6)}, V, "k has shape [3, 11, 2, 6]; allowed: [B=3 S K H=5]"),
    ({"k": f16(3, 11, 2, 5)}, T, "k has dtype torch.float16; allowed: float32, int8, float8_e4m3fn, float8_e5m2"),
    ({"v": f16(3, 11, 2, 3)}, T, "v has dtype torch.float16; allowed: float32, int8, float8_e4m3fn, float8_e5m2"),
    ({"v": f32(3, 8, 2, 3)}, V, "v has shape [3, 8, 2, 3]; allowed: [B=3 S=11 K=2 V]"),
    *(({"softcap": cap}, V, f"softcap is {cap}; allowed: a number from 1e-30 to 1e+38") for cap in (0.0, -1.0, INF)),
    *(({"softcap": cap}, V, f"softcap is {cap}; allowed: a number from 1e-30") for cap in (1e-31, 1.1e38, 10**39)),
    ({"sinks": f32(2)}, V, "sinks has shape [2]; allowed: [N=4]"),
    ({"k_scale": f32(3, 11, 2)}, T, "k_scale is given for k of dtype torch.float32; allowed: with int8, "),
    (CODES, T, "k_scale is None; allowed: a float32 tensor, because k has dtype torch.int8"),
    (CODES | {"k_scale": f32(3, 11, 2)}, T, "v_scale is None; allowed: a float32 tensor"),
    (POOLS | {"k": f32(0, 11, 2, 5), "v": f32(0, 11, 2, 3)}, V, "k has shape [0, 11, 2, 5]; allowed: [pages page K"),
    (POOLS | {"k": f32(3, 0, 2, 5), "v": f32(3, 0, 2, 3)}, V, "k has shape [3, 0, 2, 5]; allowed: [pages page K"),
    *(*ALL_LENGTHS, *ALL_PAGES, *ALL_SCALES),
]
LATENT_CODES = {"latent": int8(3, 9, 5)}
OVER_LATENTS = [
    ({"q_latent": f32(3, 0, 3, 5)}, V, "q_latent has shape [3, 0, 3, 5]; allowed: [B T N C]"),
    ({"q_latent": lists(3, 2, 3, 5)}, T, "q_latent has dtype torch.int32; allowed: float16, bfloat16, "),
    ({"q_rope": f32(3, 2, 4, 4)}, V, "q_rope has shape [3, 2, 4, 4]; allowed: [B=3 T=2 N=3 R]"),
    ({"q_rope": f16(3, 2, 3, 4)}, T, "q_rope has dtype torch.float16; allowed: float32"),
    ({"latent": f32(3, 9, 6)}, V, "latent has shape [3, 9, 6]; allowed: [B=3 S C=5]"),
    ({"latent": f32(3, 9, 1, 5)}, V, "latent has shape [3, 9, 1, 5]; allowed: [B=3 S C=5]"),
    ({"latent": f16(3, 9, 5)}, T, "latent has dtype torch.float16; allowed: float32, int8, "),
    ({"latent_scale": f32(3, 9)}, T, "latent_scale is given for latent of dtype torch.float32; allowed: with int8, "),
    ({"k_rope": f32(3, 8, 4)}, V, "k_rope has shape [3, 8, 4]; allowed: [B=3 S=9 R=4]"),
    ({"k_rope": int8(3, 9, 4)}, T, "k_rope has dtype torch.int8; allowed: float32"),
    ({"sinks": f32(1)}, V, "sinks has shape [1]; allowed: [N=3]"),
    (LATENT_CODES, T, "latent_scale is None; allowed: a float32 tensor, because latent has dtype torch.int8"),
    (LATENT_CODES | {"latent_scale": f32(3, 9, 1)}, V, "latent_scale has shape [3, 9, 1]; allowed: [B=3 S=9]"),
    (LATENT_CODES | {"latent_scale": f16(3, 9)}, T, "latent_scale has dtype torch.float16; allowed: float32"),
    *ALL_SCALES,
]
KEY_CODES = {"k_index": int8(4, 9, 5)}
OVER_KEYS = [
    ({"q_index": f32(4, 3, 5)}, V, "q_index has shape [4, 3, 5]; allowed: [B T I J]"),
    ({"k_index": f32(4, 9, 6)}, V, "k_index has shape [4, 9, 6]; allowed: [B=4 S J=5]"),
    ({"k_index": f32(4, 9, 1, 5)}, V, "k_index has shape [4, 9, 1, 5]; allowed: [B=4 S J=5]"),
    ({"k_index": f16(4, 9, 5)}, T, "k_index has dtype torch.float16; allowed: float32, int8, "),
    (KEY_CODES, T, "k_scale is None; allowed: a float32 tensor, because k_index has dtype torch.int8"),
    (KEY_CODES | {"k_scale": f32(4, 8)}, V, "k_scale has shape [4, 8]; allowed: [B=4 S=9]"),
    (KEY_CODES | {"k_scale": f16(4, 9)}, T, "k_scale has dtype torch.float16; allowed: float32"),
    ({"k_scale": f32(4, 9)}, T, "k_scale is given for k_index of dtype torch.float32; allowed: with int8, "),
    ({"lengths": f32(4)}, T, "lengths has dtype torch.float32; allowed: int32"),
    ({"lengths": np.array([1, 2, 3, 4])}, T, "lengths has dtype torch.int64; allowed: int32"),
    ({"lengths": int32(1, 2, 3)}, V, "lengths has shape [3]; allowed: [B=4]"),
    ({"lengths": int32(1, 10, 3, 4)}, V, "lengths[1] is 10; allowed: 0 to 9, the number of slots"),
]
CASES = {
    "decode_attention": [
        *(*OVER_A_CACHE, *WINDOWS),
        ({"alibi": f32(2)}, V, "alibi has shape [2]; allowed: [N=4]"),
        ({"alibi": f16(4)}, T, "alibi has dtype torch.float16; allowed: float32, float64"),
    ],
    "decode_mla": [
        *(*OVER_LATENTS, *ALL_LENGTHS, *ALL_PAGES, *WINDOWS),
        (POOLS | {"latent": f32(0, 9, 5), "k_rope": f32(0, 9, 4)}, V, "latent has shape [0, 9, 5]; allowed: [pages"),
    ],
    "decode_block_sparse": [
        *(*OVER_A_CACHE, *BLOCKS, *CHUNKS),
        ({"block_indices": lists(3, 2, 2, 3, dtype="int64")}, T, "block_indices has dtype torch.int64; allowed: int32"),
        ({"block_indices": lists(2, 2, 2, 3)}, V, "block_indices has shape [2, 2, 2, 3]; allowed: [B=3 T=2 lists L]"),
        ({"block_indices": lists(3, 2, 2, 0)}, V, "block_indices has shape [3, 2, 2, 0]; allowed: [B=3 T=2 lists L]"),
        (
            {"block_indices": lists(3, 2, 3, 3)},
            V,
            "block_indices has 3 lists per query; allowed: K=2, one per KV head,",
        ),
        (CODES | {"v": None}, T, "k_scale is None; allowed: a float32 tensor"),
        ({"v": None, "v_scale": f32(3, 11, 2)}, T, "v_scale is given with v=None; allowed: None, because the values"),
    ],
    "decode_sparse_mla": [
        *(*OVER_LATENTS, *CHUNKS),
        ({"indices": lists(3, 2, 4, dtype="int64")}, T, "indices has dtype torch.int64; allowed: int32"),
        ({"indices": lists(3, 1, 4)}, V, "indices has shape [3, 1, 4]; allowed: [B=3 T=2 L]"),
    ],
    "index_scores": [
        *OVER_KEYS,
        ({"weights": f32(4, 2, 1)}, V, "weights has shape [4, 2, 1]; allowed: [B=4 T=2 I=3]"),
        ({"weights": f16(4, 2, 3)}, T, "weights has dtype torch.float16; allowed: float32, float64"),
    ],
    "block_index_scores": [
        *(*OVER_KEYS, *BLOCKS),
    ],
    "topk_indices": [
        *(({"k": k}, V, f"k is {k}; allowed: an int >= 1") for k in (0, -1)),
        *(({"k": k}, T, "k is ") for k in (2.0, True, None)),
        ({"scores": int32(3)}, T, "scores has dtype torch.int32; allowed: float16, bfloat16, float32, float64"),
        ({"scores": f32()}, V, "scores has shape []; allowed: [..., S], at least one dimension"),
    ],
    "decode_linear": [
        ({"q": lists(3, 2, 5)}, T, "q has dtype torch.int32; allowed: float16, bfloat16, float32, float64"),
        ({"k": f32(3, 2, 4)}, V, "k has shape [3, 2, 4]; allowed: [B=3 N=2 H=5]"),
        ({"k": f16(3, 2, 5)}, T, "k has dtype torch.float16; allowed: float32"),
        ({"v": f32(3, 1, 4)}, V, "v has shape [3, 1, 4]; allowed: [B=3 N=2 V]"),
        ({"v": f16(3, 2, 4)}, T, "v has dtype torch.float16; allowed: float32"),
        ({"state": f32(3, 2, 4, 5)}, V, "state has shape [3, 2, 4, 5]; allowed: [B=3 N=2 H=5 V=4]"),
        ({"state": f16(3, 2, 5, 4)}, T, "state has dtype torch.float16; allowed: float32, float64"),
        ({"decay": 0.5}, T, "decay is "),
        ({"decay": f32()}, V, "decay has shape []; allowed: [N], [B N], [B N H]"),
        ({"decay": f32(3, 2, 5, 4)}, V, "decay has shape [3, 2, 5, 4]; allowed: [N], [B N], [B N H]"),
        ({"decay": f32(3)}, V, "decay has shape [3]; allowed: [N=2]"),
        ({"decay": f32(2, 2)}, V, "decay has shape [2, 2]; allowed: [B=3 N=2]"),
        ({"decay": f32(3, 2, 4)}, V, "decay has shape [3, 2, 4]; allowed: [B=3 N=2 H=5]"),
        ({"decay": f16(2)}, T, "decay has dtype torch.float16; allowed: float32, float64"),
        ({"beta": f32(2)}, V, "beta has shape [2]; allowed: [B=3 N=2]"),
        ({"beta": f16(3, 2)}, T, "beta has dtype torch.float16; allowed: float32, float64"),
    ],
    "merge_states": [
        ({"lses": f32(2, 1, 1)}, V, "lses has shape [2, 1, 1]; allowed: [parts=2 B=1 T=1 N=1]"),
        ({"lses": f16(2, 1, 1, 1)}, T, "lses has dtype torch.float16; allowed: float32, float64"),
        ({"outs": f32(0, 1, 1, 1, 3), "lses": f32(0, 1, 1, 1)}, V, "outs has shape [0, 1, 1, 1, 3]; allowed: [parts B"),
    ],
}
# Of torch alone: an argument that is no tensor, and one that lies on another device than the first.
NOT_A_TENSOR = dict.fromkeys(CASES, "q") | {
    **dict.fromkeys(("decode_mla", "decode_sparse_mla"), "q_latent"),
    **dict.fromkeys(("index_scores", "block_index_scores"), "q_index"),
    **{"topk_indices": "scores", "decode_linear": "decay", "merge_states": "outs"},
}
ELSEWHERE = {
    **{"decode_attention": "v", "decode_mla": "k_rope", "decode_block_sparse": "v", "decode_sparse_mla": "indices"},
    **{"index_scores": "weights", "block_index_scores": "k_index", "decode_linear": "decay", "merge_states": "lses"},
}
