"""Every model family by its model_type."""

from jforge.hf.families import deepseek_v4, dense, latent, minimax

FAMILIES = dense.FAMILIES | latent.FAMILIES | minimax.FAMILIES | deepseek_v4.FAMILIES
