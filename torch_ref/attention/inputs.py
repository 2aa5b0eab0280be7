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
    check.length_values(lengths, x.shape[1], "the tokens of x")


def check_cache(cache, x, **slots):
    """cache["length"]: int32 B. cache[name]: float B S *slots[name], all of one S and dtype, on x's device."""
    check.tensor('cache["length"]', cache["length"], "B", _sizes(x), (torch.int32,), x.device)
    sizes, dtypes = _sizes(x), check.FLOATS
    for name, shape in slots.items():
        dims = [f"{name}{i}" for i in range(len(shape))]
        known = sizes | dict(zip(dims, shape, strict=True))
        check.tensor(f'cache["{name}"]', cache[name], " ".join(["B", "S", *dims]), known, dtypes, x.device)
        sizes["S"], dtypes = cache[name].shape[1], (cache[name].dtype,)


def check_buffer(cache, x, name, dims, sizes, dtypes):
    """cache[name]: a tensor with the dimensions dims and their sizes, as in `check.tensor`, on x's device."""
    check.tensor(f'cache["{name}"]', cache[name], dims, {"B": len(x)} | sizes, dtypes, x.device)


def check_parameters(params, shapes):
    """params[name]: a tensor of the very shape shapes[name]; a broadcast would give something else without a word."""
    for name, shape in shapes.items():
        check.is_tensor(f'params["{name}"]', params[name])
        if list(params[name].shape) != list(shape):
            raise ValueError(f'params["{name}"] has shape {list(params[name].shape)}; allowed: {list(shape)}')


def check_counts(cfg, least, *names):
    """Every cfg.name is an int >= least."""
    for name in names:
        check.integer(name, getattr(cfg, name), least)


def check_choice(cfg, name, *allowed):
    """cfg.name is one of the allowed values."""
    value = getattr(cfg, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(str(choice) for choice in allowed)}")


def check_multiple(cfg, name, of):
    """cfg.name is a multiple of cfg.of."""
    if getattr(cfg, name) % getattr(cfg, of):
        raise ValueError(f"{name} is {getattr(cfg, name)}; allowed: a multiple of {of} {getattr(cfg, of)}")


def check_off(cfg, reason, *names):
    """Every cfg.name is False, for the reason given."""
    for name in names:
        if getattr(cfg, name):
            raise ValueError(f"{name} is {getattr(cfg, name)}; allowed: False, because {reason}")


def ring_room(name, slots, window, what="the window"):
    """The tokens that a row may have in all in a ring: its slots, or None when it has the window's W of them."""
    if slots > window:
        raise ValueError(f'cache["{name}"] has S={slots} slots; allowed: at most {window}, {what}')
    return slots if slots < window else None


def _sizes(x):
    return {"B": x.shape[0], "T": x.shape[1]}
