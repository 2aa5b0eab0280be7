"""Argument checks of `index_scores` and `decode_sparse_mla`, as in `check`."""

import torch

from . import check


def index_scores(q_index, k_index, weights, lengths, *, k_scale=None):
    """Check the arguments of `index_scores`; shapes and dtypes are those of its docstring."""
    sizes = {}
    check.tensor("q_index", q_index, "B T I J", sizes, check.FLOATS)
    device = q_index.device
    check.tensor("k_index", k_index, "B S J", sizes, (q_index.dtype, *check.QUANTISED), device)
    slot_scales("k_scale", k_scale, "k_index", k_index, sizes)
    check.tensor("weights", weights, "B T I", sizes, (torch.float32, torch.float64), device)
    check.tensor("lengths", lengths, "B", sizes, (torch.int32,), device)


def decode_sparse_mla(
    q_latent, q_rope, latent, k_rope, indices, *, scale, sinks=None, latent_scale=None, out_dtype=None
):
    """Check the arguments of `decode_sparse_mla`; shapes and dtypes are those of its docstring."""
    sizes = {}
    check.tensor("q_latent", q_latent, "B T N C", sizes, check.FLOATS)
    dtype, device = q_latent.dtype, q_latent.device
    check.tensor("q_rope", q_rope, "B T N R", sizes, (dtype,), device)
    check.tensor("latent", latent, "B S C", sizes, (dtype, *check.QUANTISED), device)
    slot_scales("latent_scale", latent_scale, "latent", latent, sizes)
    check.tensor("k_rope", k_rope, "B S R", sizes, (dtype,), device)
    check.tensor("indices", indices, "B T L", sizes, (torch.int32,), device)
    if sinks is not None:
        check.tensor("sinks", sinks, "N", sizes, check.FLOATS, device)
    check.number("scale", scale)
    check.floating_dtype("out_dtype", out_dtype)


def slot_scales(name, scale, stored_name, stored, sizes):
    """scale is float32 B S when stored is quantised, and None otherwise."""
    quantised = stored.dtype in check.QUANTISED
    if quantised and scale is None:
        raise TypeError(f"{name} is None; allowed: a float32 tensor, because {stored_name} has dtype {stored.dtype}")
    if not quantised and scale is not None:
        raise TypeError(f"{name} is given for {stored_name} of dtype {stored.dtype}; allowed: with int8 and float8")
    if scale is not None:
        check.tensor(name, scale, "B S", sizes, (torch.float32,), stored.device)
