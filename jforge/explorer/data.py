"""Everything that the explorer shows, as plain data (JSON): found by experiment, or asked of `Attention.cost`.

    {"steps": 64, "kinds": {letter: words}, "contexts": [...], "dtypes": [...], "mechanisms": [
        {"name": ..., "settings": [setting, ...], "models": [model, ...], "text": [["p" | "pre", ...], ...]}, ...]}

setting: a small cache that STEPS decode steps fill from empty. `groups` are buffers to which each step does the same,
    with the letter of every slot after every step (jforge.slots); `cost` the bytes of each step by buffer.
model: one layer of a shipped model, its bytes at each of CONTEXTS in each of DTYPES, one row.

A registered mechanism takes part by itself: its Config is made from the sizes in SIZES and WIDTHS whose names it has,
and every size that changes what a step does is shown at each of its values. A Config that needs another field is
shown with its `examples`.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields

import jax.numpy as jnp
import numpy as np

import jforge
from jforge import slots
from jforge.core.attention import Attention
from jforge.report import exact, layout

STEPS = 64
CONTEXTS = tuple(2**n for n in range(10, 21))
DTYPES = ("bfloat16", "float32")
TOY_DTYPE = "bfloat16"  # of the bytes; the experiment itself runs in float32, where no rounding hides a read

WIDTHS = {  # of the vectors, alike in all mechanisms, so that the bytes of two can be compared
    "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 8,
    "q_lora_rank": 8, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "index_n_heads": 8,
    "index_head_dim": 8, "o_groups": 2, "o_lora_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_heads": 4, "linear_head_dim": 8,
    "num_heads": 4, "state_size": 8, "intermediate_size": 32, "time_step_rank": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SIZES = {  # of windows, blocks and choices: the first value is the usual one, each other is tried in its place
    "sliding_window": (16, 8, None), "attention_chunk_size": (16, 8), "start_size": (4, 1), "recent_size": (12, 28),
    "block_size": (8, 4), "num_global_blocks": (1, 0), "num_local_blocks": (2, 4), "num_random_blocks": (1, 3),
    "moba_chunk_size": (8, 4), "moba_topk": (3, 2), "kernel_size": (8, 4), "kernel_stride": (4, 2), "topk": (4, 6),
    "window_size": (8, 16), "compress_rate": (4, 8), "index_topk": (4, 8), "index_block_size": (8, 4),
    "index_topk_blocks": (3, 5), "conv_L_cache": (4,), "linear_conv_kernel_dim": (4,), "conv_kernel": (4,),
}  # fmt: skip

LETTERS = {code: letter or "." for code, (_, letter, *_) in slots.KINDS.items()}
LEFT = "d"
KINDS = {LETTERS[code]: words for code, (words, *_) in slots.KINDS.items()} | {LEFT: "left over, counts no more"}
MOVED = ("stored", "written", "read")


def build(track: Callable[[Iterable], Iterable] = iter, names: Iterable[str] | None = None) -> dict:
    """The data of these mechanisms, all registered ones where None; the same for the same tree.

    track: what the mechanisms are drawn through as each is done, for a line of progress.
    """
    chosen = [(name, jforge.get(name)) for name in (jforge.names() if names is None else names)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles a program on one core
        waiting = [
            (name, att, [pool.submit(setting, att, cfg, label) for label, cfg in configs(att).items()])
            for name, att in chosen
        ]
        found = [
            {**said(name, att), "settings": [one.result() for one in made], "models": models(att)}
            for name, att, made in track(waiting)
        ]
    shared = {"version": jforge.__version__, "steps": STEPS, "kinds": KINDS, "toy_dtype": TOY_DTYPE}
    return {**shared, "contexts": CONTEXTS, "dtypes": DTYPES, "mechanisms": found}


def said(name: str, att: Attention) -> dict:
    """What the mechanism's file and fields say of it."""
    text = paragraphs(sys.modules[att.Config.__module__].__doc__ or "")
    return {"name": name, "summary": att.summary, "traded": att.traded, "text": list(text)}


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """("pre", equations as they are laid out) or ("p", a paragraph in one line), in the order of a docstring."""
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        at = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
        if prose := " ".join(lines[:at]):
            yield "p", prose
        if at < len(lines):
            yield "pre", "\n".join(line.removeprefix("    ") for line in lines[at:])


def configs(att: Attention) -> dict[str, object]:
    """{what is other than usual: Config}, the usual one first."""
    cfg = usual(att.Config)
    if cfg is None:
        return {f"example {i}": example for i, example in enumerate(att.examples, 1)}
    found, known = {}, shape(att, cfg)
    names = [f.name for f in fields(cfg) if f.name in SIZES]
    for name in names:
        for value in SIZES[name]:
            other = made(att.Config, {f.name: getattr(cfg, f.name) for f in fields(cfg)} | {name: value})
            if other is not None and shape(att, other) not in (known, *(shape(att, old) for old in found.values())):
                found[f"{name} {'none' if value is None else value}"] = other
    varied = dict.fromkeys(label.split()[0] for label in found)
    label = ", ".join(f"{name} {getattr(cfg, name)}" for name in varied)
    return {label or "one size": cfg, **found}


def usual(config: type):
    """A Config of WIDTHS and the first of SIZES; an optional field that it does not take keeps its default. None:
    it needs a field of another name.
    """
    values = WIDTHS | {name: sizes[0] for name, sizes in SIZES.items()}
    asked = {f.name: f.default is MISSING for f in fields(config) if f.init}
    given = {name: values[name] for name, needed in asked.items() if needed and name in values}
    if len(given) < sum(asked.values()):
        return None
    for name, needed in asked.items():
        more = given | {name: values[name]} if name in values and not needed else given
        if made(config, more) or not made(config, given):
            given = more
    return made(config, given)


def made(config: type, values: dict):
    """The Config, or None where it refuses these values."""
    try:
        return config(**values)
    except (ValueError, TypeError):
        return None


def shape(att: Attention, cfg) -> tuple:
    """What the sizes of a Config change: slots of every buffer, and what steps read and write of them."""
    spec = att.cache_spec(cfg)
    works = [att.work(cfg, context, STEPS, 1, closes) for context in range(1, STEPS + 1, 9) for closes in (False, True)]
    kept = {n: (b.slots(STEPS), b.every, b.first) for n, b in spec.items()}
    return kept, [(dict(work.read), dict(work.written)) for work in works]


def setting(att: Attention, cfg, label: str) -> dict:
    """One Config: what each step does to each slot, by experiment, and its bytes, from `cost`."""
    spec, found = att.cache_spec(cfg), experiment(att, cfg)
    groups: list[dict] = []
    for n, codes in found.items():
        text = ["".join(row) for row in letters(codes)]
        same = next((g for g in groups if g["steps"] == text), None)
        if same:
            same["buffers"].append(n)
        else:
            groups.append({"buffers": [n], "kept": kept(spec[n]), "slots": codes.shape[1], "steps": text})
    closes = [any(bool((codes[t] == slots.ENTRY).any()) for codes in found.values()) for t in range(STEPS)]
    costs = [att.cost(cfg, context=t + 1, dtype=jnp.dtype(TOY_DTYPE), closing=c) for t, c in enumerate(closes)]
    return {"label": label, "groups": groups, "buffers": described(spec, TOY_DTYPE), "cost": moved(spec, costs)}


def experiment(att: Attention, cfg) -> dict[str, np.ndarray]:
    """`jforge.slots.watch` of STEPS decode steps over random tokens, from an empty cache, with random parameters."""
    params, x = slots.random_layer(att, cfg, STEPS)
    return slots.watch(att, params, cfg, x, att.init_cache(cfg, 1, STEPS, jnp.float32))


def letters(codes: np.ndarray) -> np.ndarray:
    """The letter of each step and slot. LEFT is what a step before has written and no later step may read: it counts as
    empty, or it is not read and counts as empty in the next step.
    """
    text = np.vectorize(LETTERS.get, otypes=["U1"])(codes)
    written = np.isin(codes, (slots.WRITTEN, slots.OVER, slots.ENTRY, slots.STATE))
    before = np.cumsum(written, axis=0) > written
    empty = codes == slots.EMPTY
    lapsed = np.isin(codes, (slots.EMPTY, slots.WRITTEN, slots.ENTRY))  # a slot that counts is written OVER
    last = (codes == slots.KEPT) & np.append(lapsed[1:], np.zeros_like(lapsed[:1]), axis=0)
    return np.where((empty & before) | last, LEFT, text)


def kept(buffer) -> str:
    """In words: what a slot of the buffer stands for."""
    if not buffer.has_slots:
        return "a state, no slots"
    if buffer.limit is not None and buffer.every in (None, 1):
        return f"{buffer.slots(STEPS)} slots, used again and again"
    if buffer.every == 1:
        return "a slot for every token"
    return f"an entry for every {buffer.every} tokens"


def models(att: Attention) -> list[dict]:
    """One layer of each shipped model: its bytes, dtype by dtype and context by context."""
    found = []
    for name, cfg in att.models.items():
        spec = att.cache_spec(cfg)
        rows = {d: [att.cost(cfg, context=c, dtype=jnp.dtype(d)) for c in CONTEXTS] for d in DTYPES}
        found.append({
            "name": name,
            "buffers": {d: described(spec, d) for d in DTYPES},
            "cost": {d: moved(spec, costs) for d, costs in rows.items()},
            "per_token": {d: exact(costs[-1].per_token) for d, costs in rows.items()},
        })  # fmt: skip
    return found


def described(spec, dtype: str) -> list[dict]:
    """Name, axes and dtype of every buffer, another layer's that it reads among them."""
    every = {**spec.borrowed, **spec}
    return [{"name": n, "axes": layout(b), "dtype": str(b.dtype_in(dtype))} for n, b in every.items()]


def moved(spec, costs: list) -> dict[str, list[list[int]]]:
    """{stored, written, read: for each Cost the bytes of every buffer, in the order of `described`}."""
    every = {**spec.borrowed, **spec}
    return {what: [[getattr(cost, what).get(n, 0) for n in every] for cost in costs] for what in MOVED}
