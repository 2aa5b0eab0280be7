"""Checks of what a user hands to a mechanism: one line that names the argument, its value and what is allowed."""

import torch

from ..ops import check


def check_tokens(x, hidden_size, tokens=None):
    """x: float B T D, with T = tokens when that is given."""
    check.tensor("x", x, "B T D", {"D": hidden_size} | ({} if tokens is None else {"T": tokens}), check.FLOATS)


def check_positions(positions, x):
    """positions: int32 or int64 B T on x's device."""
    check.tensor("positions", positions, "B T", _sizes(x), (torch.int32, torch.int64), x.device)


def check_lengths(lengths, x):
    """lengths: int32 B on x's device; on the CPU each must be 0 to T."""
    check.tensor("lengths", lengths, "B", _sizes(x), (torch.int32,), x.device)
    if lengths.device.type == "cpu":
        check.length_values(lengths, x.shape[1], "the tokens of x")


def check_cache(cache, x, **slots):
    """cache["length"]: int32 B. cache[name]: float B S *slots[name], all of one S and dtype, on x's device."""
    check.tensor('cache["length"]', cache["length"], "B", _sizes(x), (torch.int32,), x.device)
    sizes, dtypes = _sizes(x), check.FLOATS
    for name, shape in slots.items():
        dims = [f"{name}{i}" for i in range(len(shape))]
        check.tensor(
            f'cache["{name}"]',
            cache[name],
            " ".join(["B", "S", *dims]),
            sizes | dict(zip(dims, shape, strict=True)),
            dtypes,
            x.device,
        )
        sizes["S"], dtypes = cache[name].shape[1], (cache[name].dtype,)


def _sizes(x):
    return {"B": x.shape[0], "T": x.shape[1]}
