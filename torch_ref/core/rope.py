"""Rotary position embedding (Su et al. 2021): layouts, partial rotation, frequency scalings.

Channel pair j of a vector at position p is turned by the angle p * theta_j, theta_j = base^(-2j/r), j = 0..r/2-1:
(a, b) -> (a cos - b sin, b cos + a sin). The pair is (x_j, x_{j + r/2}) in layout `half` and (x_{2j}, x_{2j+1}) in
layout `interleaved`.
"""

import math

import torch

from .dtypes import accumulator

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
LAYOUTS = ("half", "interleaved")


def frequencies(rope, head_dim):
    """(theta, factor): r/2 angles per position as a float64 CPU tensor, and the number that multiplies cos and sin.

    rope: mapping with Hugging Face's `rope_parameters` keys. r = head_dim * partial_rotary_factor. theta is a constant
    of the config, so it is made in float64 and rounded once by its user. Of "longrope" it names one of the two sets, as
    `factors`, and attention_factor. "proportional" has angles for all of head_dim, those of the slow channels 0.
    Raises ValueError for an unknown rope_type, an odd r, or factors that are not r/2.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; allowed: {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", 1.0)
    if kind == "proportional":
        return _proportional(rope, head_dim, partial), 1.0
    r = int(head_dim * partial)
    if r < 2 or r % 2 or r > head_dim:
        raise ValueError(
            f"partial_rotary_factor is {partial}: {r} of {head_dim} channels; allowed: an even number >= 2"
        )
    theta = float(rope["rope_theta"]) ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    if kind == "longrope":
        return theta / _long_factors(rope, r), float(rope["attention_factor"])
    if kind == "linear":
        return theta / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(rope, theta), 1.0
    if kind == "yarn":
        return _yarn(rope, theta), _yarn_attention_factor(rope)
    return theta, 1.0


def _proportional(rope, head_dim, partial):
    """base^(-2j/H) for the first floor(partial H / 2) pairs, 0 for the others: pair j is the same as without `partial`,
    so in layout `half` the turned channels lie in both halves (Gemma 4)."""
    if head_dim % 2 or not 0 < partial <= 1:
        raise ValueError(
            f"partial_rotary_factor is {partial} of {head_dim} channels; allowed: above 0 to 1, of an even number"
        )
    theta = float(rope["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    theta[math.floor(partial * head_dim / 2) :] = 0.0
    return theta


def _long_factors(rope, r):
    """What divides each of the r/2 angles (LongRoPE, 2402.13753; Phi-3)."""
    factors = torch.tensor(rope["factors"], dtype=torch.float64)
    if factors.shape != (r // 2,):
        raise ValueError(f"factors has shape {list(factors.shape)}; allowed: {[r // 2]}, one for each pair that turns")
    return factors


def _llama3(rope, theta):
    """Long wavelengths are divided by factor, short ones kept, those between blended (Llama 3.1)."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = length * theta / (2 * math.pi)  # L / wavelength: full turns inside the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * theta / rope["factor"] + blend * theta


def _yarn(rope, theta):
    """theta (1 - ramp) + theta / factor * ramp, ramp rising from the fast to the slow channels (Peng et al. 2023)."""
    r, base, length = 2 * len(theta), rope["rope_theta"], rope["original_max_position_embeddings"]

    def channel(turns):
        """The channel, as a real number, that makes this many turns inside the original context."""
        return r * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = channel(_given(rope, "beta_fast", 32)), channel(_given(rope, "beta_slow", 1))
    if _given(rope, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(r // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return theta * (1 - ramp) + theta / rope["factor"] * ramp


def _yarn_attention_factor(rope):
    """attention_factor, or m(mscale) / m(mscale_all_dim) when both are set, or m(1); m(mu) = 0.1 mu ln(factor) + 1."""

    def magnitude(mu):
        return 0.1 * mu * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:  # a 0 counts as not set, as in transformers
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _given(rope, key, default):
    """rope[key], or the default when the key is missing or None: config.json files spell "unset" both ways."""
    value = rope.get(key)
    return default if value is None else value


def apply_rope(x, positions, theta, factor=1.0, layout="half"):
    """Turn the first 2 len(theta) channels of x by positions * theta; the other channels pass unchanged.

    x: [B, T, heads, H]. positions: int [B, T]. theta, factor: from `frequencies`. Angles and products are float32 or
    wider, whatever x's dtype: bfloat16 cannot tell positions above 256 apart. Returns x's shape and dtype.
    Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rope_layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    acc = accumulator(x.dtype)
    angles = positions[..., None, None].to(acc) * theta.to(x.device, acc)
    cos, sin = factor * angles.cos(), factor * angles.sin()
    turned, rest = x[..., : 2 * len(theta)].to(acc), x[..., 2 * len(theta) :]
    if layout == "half":
        a, b = turned.chunk(2, dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.cat(pairs, dim=-1) if layout == "half" else torch.stack(pairs, dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
