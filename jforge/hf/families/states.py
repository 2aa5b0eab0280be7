"""Families with states that no mechanism has, alone or beside keys and values: convolutions on keys, gated linear
units, RWKV, xLSTM, Zamba's shared attention. Their caches are known, their attention is not converted.
"""

from jforge.core.config import positive, reject
from jforge.hf.families.dense import DENSE, WINDOWS
from jforge.hf.families.parts import base
from jforge.hf.families.ssm import FAMILIES as STATES
from jforge.hf.family import FULL, LINEAR, SLIDING, Family, Layer, kept, listed
from jforge.hf.kept import fixed, keys_and_values
from jforge.hf.keys import integer


def _inkling(config: dict, kind: str) -> dict:
    """Four convolutions: on keys, on values, and on what attention and MLP return. Their rows are float32."""
    near = kind == "hybrid_sliding"
    prefix = "swa_" if near else ""
    K, H = integer(config, f"{prefix}num_key_value_heads"), integer(config, f"{prefix}head_dim", 128)
    rows, D = integer(config, "conv_kernel_size", 4) - 1, integer(config, "hidden_size")
    limit = integer(config, "sliding_window_size") if near else None
    widths = {"k_conv": K * H, "v_conv": K * H, "attention_conv": D, "mlp_conv": D}
    states = {name: fixed(rows, width, dtype="float32") for name, width in widths.items()}
    return {"buffers": keys_and_values(K, H, limit) | states}


def _inkling_kind(config: dict, index: int) -> str:
    """Every sixth layer is full, or all but local_layer_ids."""
    if (kind := listed(config, index)) is not None:
        return kind
    local = config.get("local_layer_ids")
    if not isinstance(local, (list, tuple, type(None))):
        reject("local_layer_ids", local, "a list of layers")
    return "hybrid_sliding" if ((index + 1) % 6 if local is None else index in local) else "hybrid"


def _zaya(config: dict, kind: str) -> dict:
    """Rows of a convolution on queries and keys, and half of the values a token late."""
    N, K = integer(config, "num_attention_heads"), integer(config, "num_key_value_heads", 2)
    H = integer(config, "head_dim", 128)
    rows = integer(config, "cca_time0", 2) + integer(config, "cca_time1", 2) - 2
    limit = integer(config, "sliding_window") if kind == "hybrid_sliding" else None
    return {"buffers": keys_and_values(K, H, limit) | {"conv": fixed(rows, (N + K) * H), "v_late": fixed(K * H // 2)}}


def _recurrent_gemma(config: dict, kind: str) -> dict:
    """RG-LRU: a state of lru_width in float32, and rows of a convolution."""
    if kind == SLIDING:
        limit = {"sliding_window": integer(config, "attention_window_size", 2048)}
        return base(config, None) | limit
    width = integer(config, "lru_width", integer(config, "hidden_size"))
    return {
        "buffers": {
            "state": fixed(width, dtype="float32"),
            "conv": fixed(integer(config, "conv1d_width", 4) - 1, width),
        }
    }


def _recurrent_gemma_kind(config: dict, index: int) -> str:
    kinds = config["block_types"]
    if not isinstance(kinds, (list, tuple)) or not kinds or set(kinds) - {"recurrent", "attention"}:
        reject("block_types", kinds, "a list of 'recurrent' and 'attention'")
    return SLIDING if kinds[index % len(kinds)] == "attention" else "recurrent"


def _rwkv(config: dict, kind: str) -> dict:
    """The last input of either half of a layer; numerator, denominator and largest exponent of its average."""
    D = integer(config, "hidden_size")
    X = integer(config, "attention_hidden_size", D)
    shifted = {name: fixed(D) for name in ("x_attention", "x_mlp")}
    return {"buffers": shifted | {name: fixed(X, dtype="float32") for name in ("numerator", "denominator", "largest")}}


def _xlstm(config: dict, kind: str) -> dict:
    """A matrix, its normaliser and the largest exponent of each head."""
    N, D = integer(config, "num_heads", 8), integer(config, "hidden_size")
    for key in ("qk_dim_factor", "v_dim_factor"):
        positive(key, config[key])
    widths = (64 * -(-int(D * config[key]) // 64) // N for key in ("qk_dim_factor", "v_dim_factor"))
    H, V = widths
    return {"buffers": {"state": fixed(N, H, V), "normaliser": fixed(N, H), "largest": fixed(N, 1)}}


def _zamba(config: dict, kind: str) -> dict:
    """Attention layers are as wide as two hidden states; their mixer has n_mamba_heads states side by side."""
    D = integer(config, "hidden_size")
    if kind == FULL:
        heads = integer(config, "num_attention_heads")
        width = integer(config, "attention_head_dim", 2 * D // heads)
        return base(config | {"head_dim": width, "num_key_value_heads": config.get("num_key_value_heads")}, None)
    if config["model_type"] == "zamba":
        return STATES["jamba"].fields(config, kind)
    heads = integer(config, "n_mamba_heads")
    positive("mamba_expand", config["mamba_expand"])
    return {
        "hidden_size": D, "num_heads": heads, "head_dim": int(config["mamba_expand"] * D) // heads,
        "state_size": integer(config, "mamba_d_state"), "n_groups": integer(config, "mamba_ngroups"),
        "conv_kernel": integer(config, "mamba_d_conv"), "rms_norm_eps": 1e-5, "norm": "gate_first",
    }  # fmt: skip


def _zamba_kind(config: dict, index: int) -> str | tuple[str, str]:
    """A hybrid layer is a shared transformer before its mixer."""
    kind = listed(config, index, "layers_block_type")
    if kind is None and config["model_type"] == "zamba":
        period, offset = integer(config, "attn_layer_period", 6), config["attn_layer_offset"]
        kind = "hybrid" if index == 2 or (index > 2 and (index - 3) % period == offset) else LINEAR
    if kind is None:
        raise ValueError("config has no layers_block_type; it must list the kinds of layers")
    if kind not in ("hybrid", LINEAR, "mamba"):
        reject("layers_block_type", kind, "'hybrid', 'mamba' or 'linear_attention'")
    return (LINEAR, FULL) if kind == "hybrid" else LINEAR


_SERIES = "keys and values pass through convolutions, whose rows are cached too"
_TWICE = "attention over the hidden states beside the embeddings, by weights that layers share"
_INKLING = Family(
    _inkling, _inkling_kind, kept(_SERIES, "hybrid", "hybrid_sliding"),
    names={"sliding_window": "sliding_window_size"},
)  # fmt: skip
_BLOCKS = {"layer_types": "layers_block_type"}
_ZAMBA = {
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_dt_rank": "auto", "mamba_proj_bias": False, "mamba_conv_bias": True,
    "mamba_expand": 2, "attn_layer_offset": 4, "rms_norm_eps": 1e-5,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "inkling2_text": _INKLING._replace(
        defaults={"num_key_value_heads": 8, "swa_num_key_value_heads": 8, "sliding_window_size": 1024}
    ),
    "inkling_text": _INKLING._replace(
        defaults={"num_key_value_heads": 8, "swa_num_key_value_heads": 16, "sliding_window_size": 512}
    ),
    "recurrent_gemma": Family(
        _recurrent_gemma, _recurrent_gemma_kind,
        {SLIDING: WINDOWS[SLIDING]._replace(split=None, lacks="its other layers are gated linear units (RG-LRU)")}
        | kept("its recurrent layers are gated linear units (RG-LRU)", "recurrent"),
        {"block_types": ("recurrent", "recurrent", "attention")}, {"sliding_window": "attention_window_size"},
    ),
    "rwkv": Family(_rwkv, lambda config, index: LINEAR, kept("a recurrence of its own, without attention", LINEAR)),
    "xlstm": Family(
        _xlstm, lambda config, index: LINEAR, kept("a recurrence of its own, without attention", LINEAR),
        {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    ),
    "zamba": Family(
        _zamba, _zamba_kind,
        {LINEAR: Layer("mamba1", None, lacks=_TWICE), FULL: DENSE[FULL]._replace(split=None, lacks=_TWICE)},
        _ZAMBA, _BLOCKS,
    ),
    "zamba2": Family(
        _zamba, _zamba_kind,
        {LINEAR: Layer("mamba2", None, lacks=_TWICE), FULL: DENSE[FULL]._replace(split=None, lacks=_TWICE)},
        _ZAMBA | {"mamba_d_state": 64, "n_mamba_heads": 8, "mamba_ngroups": 1}, _BLOCKS,
    ),
    "zaya": Family(
        _zaya, lambda config, index: listed(config, index) or "hybrid", kept(_SERIES, "hybrid", "hybrid_sliding")
    ),
}  # fmt: skip
