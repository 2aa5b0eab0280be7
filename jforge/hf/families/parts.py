"""What families of dense models share: the fields that all spell alike, biases, windows, and where their weights go."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from jforge.core.config import positive, positive_int
from jforge.hf.family import FULL, SLIDING
from jforge.hf.keys import integer, lack, rope_of
from jforge.hf.weights import Weights

Part = Callable[[dict, str], dict]
Split = Callable[[Weights, Any], dict[str, np.ndarray]]
Params = dict[str, np.ndarray]


def base(config: dict, rope: dict | None, *, head_dim: int | None = None) -> dict:
    """What all families spell alike. A null num_key_value_heads means as many as heads; without a head_dim in the
    file and in `head_dim`, the class's default, it is hidden / heads. A null head_dim is refused where there is a
    default, as in transformers.
    """
    if head_dim is not None and "head_dim" in config:
        positive_int("head_dim", config["head_dim"])
    heads, eps = integer(config, "num_attention_heads"), config.get("rms_norm_eps", 1e-6)
    positive("rms_norm_eps", eps)
    return {
        "hidden_size": integer(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer(config, "num_key_value_heads", heads),
        "head_dim": integer(config, "head_dim", head_dim),
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }


def fields(
    *parts: Part, theta: float = 1e4, partial: float | None = None, head_dim: int | None = None, **fixed: Any
) -> Part:
    """`fields` of a family that has `base`, these parts, and these values, which no key says.

    theta, partial: the defaults of the class for RoPE; where partial is None it always turns all channels.
    """

    def of(config: dict, kind: str) -> dict:
        rope = rope_of(config, kind, theta=theta, partial=partial)
        out = base(config, rope, head_dim=head_dim) | fixed
        return reduce(or_, (part(config, kind) for part in parts), out)

    return of


def without_rope(*parts: Part, **fixed: Any) -> Part:
    """`fields` of a family whose positions are added to its embeddings, or are ALiBi's."""

    def of(config: dict, kind: str) -> dict:
        return reduce(or_, (part(config, kind) for part in parts), base(config, None) | fixed)

    return of


def causal(config: dict, kind: str) -> dict:
    if config.get("use_bidirectional_attention"):
        lack(config, "use_bidirectional_attention is set: attention that is not causal has no mechanism")
    return {}


def bias(config: dict, kind: str) -> dict:
    """`attention_bias` puts a bias on q, k, v and on o alike."""
    given = bool(config.get("attention_bias"))
    return {"attention_bias": given, "attention_output_bias": given}


def qkv_bias(config: dict, kind: str) -> dict:
    """`attention_bias` puts a bias on q, k and v alone."""
    return {"attention_bias": bool(config.get("attention_bias"))}


def window(config: dict, kind: str) -> dict:
    """The window of a layer that has one; a null is an error there, not the class default."""
    return {"sliding_window": integer(config, "sliding_window")} if kind == SLIDING else {}


def multiplier(config: dict, kind: str) -> dict:
    """Granite's attention_multiplier is the scale of the logits."""
    return {"scaling": config.get("attention_multiplier")}


def clip(config: dict, kind: str) -> dict:
    return {"clip_qkv": config.get("clip_qkv")}


def full_without_rope(config: dict, kind: str) -> dict:
    """Full layers between windows have no positions."""
    return {"rope_parameters": None} if kind == FULL else {}


def own(w: Weights, cfg: Any, gate: str | None = None) -> Params:
    """q_proj, k_proj and v_proj with their biases, and the gate's weight.

    gate: its name; None: with an output gate (Qwen3-Next) q_proj holds, head by head, [query | gate].
    """
    D, N, K, H, V = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    if cfg.attn_output_gate and gate is None:
        both = w.linear("q_proj", D, N, H + V)
        params = {"wq": both[..., :H], "wg": both[..., H:]}
    else:
        params = {"wq": w.linear("q_proj", D, N, H)}
    shapes = {"q": (N, H)}
    if not cfg.kv_shared:
        shapes |= {"k": (K, H)} | ({} if cfg.attention_k_eq_v else {"v": (K, V)})
    params |= {f"w{x}": w.linear(f"{x}_proj", D, *shapes[x]) for x in "kv" if x in shapes}
    if cfg.attention_bias:
        params |= {f"b{x}": w.vector(f"{x}_proj.bias", *shape) for x, shape in shapes.items()}
    if cfg.attn_output_gate and gate is not None:
        params["wg"] = w.linear(gate, D, N) if cfg.output_gate_per_head else w.linear(gate, D, N, V)
    return params


def norms(w: Weights, cfg: Any, names: str = "{}_norm") -> Params:
    """The weights of the norms of q and k, and their biases; names: with q and k in the place of the braces."""
    if not cfg.qk_norm or not cfg.qk_norm_weight:
        return {}
    params = {}
    owners = {"q": cfg.num_attention_heads} | ({} if cfg.kv_shared else {"k": cfg.num_key_value_heads})
    for x, heads in owners.items():
        shape = (cfg.head_dim,) if cfg.qk_norm == "head" else (heads, cfg.head_dim)
        if cfg.qk_norm == "heads" and not w.has(f"{names.format(x)}.weight"):  # StableLM: a module for each head
            each = [w.take(f"{names.format(x)}.norms.{n}.weight", cfg.head_dim) for n in range(heads)]
            params[f"{x}_norm"] = np.stack(each)
            continue
        whole = shape if cfg.qk_norm == "heads" else (int(np.prod(shape)),)
        params[f"{x}_norm"] = w.take(f"{names.format(x)}.weight", *whole).reshape(shape)
        if cfg.qk_norm_bias:
            params[f"{x}_norm_bias"] = w.take(f"{names.format(x)}.bias", *whole).reshape(shape)
    return params


def split(out: str = "o_proj", names: str = "{}_norm", gate: str | None = None) -> Split:
    """q_proj, k_proj, v_proj, an output projection, norms and a gate under these names."""

    def of(w: Weights, cfg: Any) -> Params:
        N, V, D = cfg.num_attention_heads, cfg.v_head_dim, cfg.hidden_size
        return own(w, cfg, gate) | norms(w, cfg, names) | w.output(out, N, V, D, cfg.attention_output_bias)

    return of


projections = split()
"""q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm."""


def with_sinks(w: Weights, cfg: Any) -> Params:
    """One sink logit a query head beside the projections."""
    return projections(w, cfg) | {"sinks": w.take("sinks", cfg.num_attention_heads)}


# --- projections of q, k and v as one


def _in_order(rows: np.ndarray, cfg: Any) -> tuple[np.ndarray, ...]:
    """[all queries | all keys | all values]."""
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    parts = np.split(rows, (N * H, (N + K) * H))
    return tuple(part.reshape(heads, H, *rows.shape[1:]) for part, heads in zip(parts, (N, K, K), strict=True))


def _by_group(rows: np.ndarray, cfg: Any) -> tuple[np.ndarray, ...]:
    """For each key/value head its G queries, then its key, then its value.

    With K = N that is [query | key | value] head by head, with K = 1 it is [all queries | key | value].
    """
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    groups = rows.reshape(K, N // K + 2, H, *rows.shape[1:])
    return groups[:, :-2].reshape(N, H, *rows.shape[1:]), groups[:, -2], groups[:, -1]


def _codegen(rows: np.ndarray, cfg: Any) -> tuple[np.ndarray, ...]:
    """Four blocks, each with the queries, the values and the keys of a quarter of the heads, in this order."""
    N, H = cfg.num_attention_heads, cfg.head_dim
    blocks = rows.reshape(4, 3, N // 4, H, *rows.shape[1:])
    q, v, k = (blocks[:, i].reshape(N, H, *rows.shape[1:]) for i in range(3))
    return q, k, v


PACKINGS = {"seq": _in_order, "head": _by_group, "group": _by_group, "codegen": _codegen}
"""How the rows of one projection are those of q, k and v."""


def fused(packing: str, name: str, out: str, names: str = "{}_norm", conv: bool = False) -> Split:
    """q, k and v in one projection `name`, packed so; conv: Conv1D modules, whose weights are [in, out]."""
    unpack = PACKINGS[packing]

    def of(w: Weights, cfg: Any) -> Params:
        D, N, K, H = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        rows = (N + 2 * K) * H
        weight = w.transposed(name, D, rows) if conv else w.linear(name, D, rows)
        params = {f"w{x}": np.moveaxis(part, -1, 0) for x, part in zip("qkv", unpack(weight.T, cfg), strict=True)}
        if cfg.attention_bias:
            params |= zip(("bq", "bk", "bv"), unpack(w.take(f"{name}.bias", rows), cfg), strict=True)
        if conv:
            params |= {"wo": w.transposed(out, N * H, D).reshape(N, H, D), "bo": w.take(f"{out}.bias", D)}
        else:
            params |= w.output(out, N, H, D, cfg.attention_output_bias)
        return params | norms(w, cfg, names)

    return of
