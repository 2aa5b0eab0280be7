"""Rotary position embedding: two layouts, partial rotation, and the scaling rules of shipped models.

    theta_j = base^(-2j/r), j = 0..r/2-1;   phi = position * theta_j;   (a, b) -> (a cos - b sin, b cos + a sin)

`half` rotates the pairs (x_j, x_{j+r/2}) as Llama, Qwen and Gemma do in Hugging Face layout; `interleaved` rotates
(x_2j, x_2j+1) as DeepSeek's MLA and Meta's own checkpoints do. Only the first r = partial_rotary_factor * H channels
turn; "proportional" (Gemma 4) has a frequency for all H channels instead, 0 from j = partial_rotary_factor * H / 2 on.
"longrope" (Phi-3) divides theta_j by factors[j], the short or the long list of the model: chosen once, as a key that
was stored does not turn again. Frequencies are made once in float64; angles are float32 or wider, since bfloat16 loses
positions above 256.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jforge.core.config import FrozenDict, positive, reject
from jforge.core.softmax import accumulation_dtype

LAYOUTS = ("half", "interleaved")
TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("attention_factor",),
    "proportional": (),
}


def freeze(parameters: Mapping | None) -> FrozenDict | None:
    """Check a `rope_parameters` dict and make it hashable; None means NoPE. Raises ValueError naming the key."""
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping):
        reject("rope_parameters", parameters, "a dict or None")
    out = {k: v for k, v in parameters.items() if v is not None}
    kind = out.setdefault("rope_type", "default")
    if kind not in TYPES:
        reject("rope_type", kind, f"one of {', '.join(TYPES)}")
    for key in ("rope_theta", *_NEEDS[kind]):
        if key not in out:
            raise ValueError(f"rope_parameters has no {key}; rope_type {kind!r} needs it")
        positive(key, out[key])
    if kind == "longrope":
        _check_factors(out.get("factors"))
    fraction = out.setdefault("partial_rotary_factor", 1.0)
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        reject("partial_rotary_factor", fraction, "in (0, 1]")
    return FrozenDict(out)


def _check_factors(factors) -> None:
    if not isinstance(factors, (list, tuple)):
        reject("factors", factors, "a list of positive numbers, one for each rotated pair, in rope_type 'longrope'")
    for factor in factors:
        positive("factors", factor)


def rotary_dim(parameters: Mapping, head_dim: int) -> int:
    """How many leading channels turn, if only by an angle of 0: even, at most head_dim."""
    spread = parameters["rope_type"] == "proportional"
    dim = head_dim if spread else int(head_dim * parameters["partial_rotary_factor"])
    if dim < 2 or dim % 2:
        allowed = f"such that an even number of the {head_dim} channels turns, not {dim}"
        reject("partial_rotary_factor", parameters["partial_rotary_factor"], allowed)
    if "factors" in parameters and len(parameters["factors"]) != dim // 2:
        reject("factors", parameters["factors"], f"{dim // 2} numbers, one for each pair of the {dim} rotated channels")
    return dim


def frequencies(parameters: Mapping, dim: int) -> tuple[np.ndarray, float]:
    """(theta_j as float64[dim/2], the factor on cos and sin) for `dim` rotated channels."""
    theta = float(parameters["rope_theta"]) ** (-np.arange(0, dim, 2) / dim)
    match parameters["rope_type"]:
        case "linear":
            return theta / parameters["factor"], 1.0
        case "llama3":
            return _llama3(theta, parameters), 1.0
        case "yarn":
            return _yarn(theta, parameters, dim), _yarn_attention_factor(parameters)
        case "longrope":
            return theta / np.array(parameters["factors"], float), parameters["attention_factor"]
        case "proportional":
            turning = np.arange(dim // 2) < int(dim * parameters["partial_rotary_factor"] / 2)
            return np.where(turning, theta, 0.0), 1.0
    return theta, 1.0


def _llama3(theta: np.ndarray, p: Mapping) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * theta / (2 * math.pi)  # L / wavelength
    blend = turns >= low if high == low else np.clip((turns - low) / (high - low), 0, 1)  # equal in Llama 4 Scout
    return (1 - blend) * theta / p["factor"] + blend * theta


def yarn_range(p: Mapping, dim: int) -> tuple[float, float]:
    """The channels between which YaRN blends: corr(n) = dim ln(L / (2 pi n)) / (2 ln base) at beta_fast, beta_slow."""

    def corrected(rotations: float) -> float:
        span = p["original_max_position_embeddings"] / (2 * math.pi * rotations)
        return dim * math.log(span) / (2 * math.log(p["rope_theta"]))

    low, high = corrected(p.get("beta_fast", 32)), corrected(p.get("beta_slow", 1))
    if p.get("truncate", True):  # gpt-oss ships truncate = False
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _yarn(theta: np.ndarray, p: Mapping, dim: int) -> np.ndarray:
    low, high = yarn_range(p, dim)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return theta * (1 - ramp) + theta / p["factor"] * ramp


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """m(s, mu) = 0.1 mu ln s + 1, and 1 for s <= 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(p: Mapping) -> float:
    if (given := p.get("attention_factor")) is not None:
        return given
    if p.get("mscale") and p.get("mscale_all_dim"):
        return yarn_magnitude(p["factor"], p["mscale"]) / yarn_magnitude(p["factor"], p["mscale_all_dim"])
    return yarn_magnitude(p["factor"])


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    parameters: Mapping | None,
    layout: str = "half",
    dim: int | None = None,
) -> Float[Array, "B T N H"]:
    """Rotate the first r channels of every head by its token's position; None (NoPE) returns x.

    dim: r, where it is not partial_rotary_factor * H (an indexer turns as many channels as the main heads).
    """
    if parameters is None:
        return x
    dim = rotary_dim(parameters, x.shape[-1]) if dim is None else dim
    theta, factor = frequencies(parameters, dim)
    wide = accumulation_dtype(x)
    angle = (positions[..., None].astype(wide) * theta.astype(wide))[:, :, None]  # B T 1 dim/2
    cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
    turned, rest = x[..., :dim].astype(wide), x[..., dim:]
    if layout == "half":
        a, b = turned[..., : dim // 2], turned[..., dim // 2 :]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    return jnp.concatenate([out.astype(x.dtype), rest], axis=-1)
