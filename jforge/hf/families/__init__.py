"""Every model family by its model_type."""

from jforge.hf.families import (
    convs,
    decoders,
    deepseek_v4,
    deltas,
    dense,
    gemmas,
    gpts,
    latent,
    llamas,
    minimax,
    others,
    ssm,
    states,
    windows,
    wrapped,
)
from jforge.hf.families.missing import MISSING

FAMILIES = {}
for _kin in (
    dense, llamas, windows, gemmas, gpts, decoders, latent, minimax, deepseek_v4, deltas, ssm, convs, wrapped, others,
    states,
):  # fmt: skip
    FAMILIES |= _kin.FAMILIES

__all__ = ["FAMILIES", "MISSING"]
