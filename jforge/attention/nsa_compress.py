"""How NSA turns a block of raw keys (or values) into one entry: the learned function phi, four of them.

    entry i = phi(row_{i d} + pe_0, ..., row_{i d + l - 1} + pe_{l-1}),   l = kernel_size, d = kernel_stride

Rows are keys before RoPE, and values; a compressed key is rotated afterwards, at the position of its first token. The
paper's phi is an MLP with a position encoding inside the block, keys and values apart; the simpler ones are those of
XunhaoLai/native-sparse-attention-triton (which adds the encoding to keys only: v_pe = 0).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jforge.core.attend import einsum
from jforge.core.params import Drawn
from jforge.core.softmax import accumulation_dtype

KINDS = ("mean", "weighted", "linear", "mlp")


def shapes(kind: str, l: int, K: int, H: int, V: int, F: int | None) -> dict[str, tuple[int, ...]]:  # noqa: E741
    """{parameter: shape} of phi for keys of width H and values of width V; its weights have variance 1/fan_in."""

    def weight(*shape: int, fan_in: int) -> Drawn:
        return Drawn(*shape, gains=(10, fan_in**-0.5))

    out: dict[str, tuple[int, ...]] = {"k_pe": (l, K, H), "v_pe": (l, K, V)}
    for x, width in (("k", H), ("v", V)):
        if kind == "weighted":
            out[f"phi_{x}"] = weight(l, K, fan_in=l)
        elif kind == "linear":
            out[f"phi_{x}"] = weight(l, K, width, width, fan_in=l * width)
        elif kind == "mlp":
            out[f"phi_{x}_in"] = weight(l, K, width, F, fan_in=l * width)
            out[f"phi_{x}_out"] = weight(K, F, width, fan_in=F)
    return out


def compress(params: dict[str, Array], kind: str, which: str, rows: Float[Array, "B E l K H"]) -> Array:
    """The entries B E K H of blocks of rows; which: "k" or "v". float32 or wider."""
    wide = accumulation_dtype(rows)
    rows = rows.astype(wide) + params[f"{which}_pe"].astype(wide)
    if kind == "mean":
        return rows.mean(axis=2)
    if kind == "mlp":
        hidden = jax.nn.silu(einsum("beskh,skhf->bekf", rows, params[f"phi_{which}_in"].astype(wide)))
        return einsum("bekf,kfh->bekh", hidden, params[f"phi_{which}_out"].astype(wide))
    weights = params[f"phi_{which}"].astype(wide)
    return einsum("beskh,sk->bekh" if kind == "weighted" else "beskh,skhj->bekj", rows, weights)


def blocks_of(rows: Float[Array, "B T K H"], l: int, d: int) -> Float[Array, "B E l K H"]:  # noqa: E741
    """The complete blocks of a row's tokens, entry i from token i d; E = 0 before the first is complete."""
    count = max(0, (rows.shape[1] - l) // d + 1)
    return rows[:, jnp.arange(count)[:, None] * d + jnp.arange(l)]
