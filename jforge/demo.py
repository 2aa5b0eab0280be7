"""`jforge demo`: the project's main job on a model's config.json that ships with it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jforge
from jforge import hf, report
from jforge.harness import equiv
from jforge.harness.timing import time_cpu

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b.json"
DEMO_CONTEXT = 4096


def run(workers: int = 1) -> dict:
    """Llama-3.1-8B from its config.json: bytes, laws, the four backends, decode times of one layer on this machine.
    workers: processes, as in equiv.backends.
    """
    layers = hf.layers(hf.load(CONFIG))
    name, cfg = layers[0]
    att = jforge.get(name)
    context = 131072
    costs = [jforge.get(n).cost(c, context=context) for n, c, *_ in layers]
    parts = {
        "laws": lambda: report.laws(jforge.check(att, att.examples[0])),
        "backends": lambda: equiv.backends(tag="demo", track=report.track, workers=workers),
        "times": lambda: decode_times(att, name, cfg),
    }
    results = {part: run_part() for part, run_part in report.track(parts.items(), "demo", label=lambda item: item[0])}
    return {"cost": report.cost(name, "Llama-3.1-8B", costs, context, 1, "bfloat16"), **results}


def decode_times(att, name: str, cfg) -> list[dict]:
    """One layer, one row of DEMO_CONTEXT tokens, float32: jforge jitted with a donated cache, and torch_ref."""
    import torch

    import torch_ref
    from jforge.harness.backends import to_torch

    params = att.init_params(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (1, 1, cfg.hidden_size))
    tokens = jnp.array([DEMO_CONTEXT - 1], jnp.int32)
    spec = att.cache_spec(cfg)
    leaves = {n: jax.random.normal(jax.random.key(2), b.full_shape(1, DEMO_CONTEXT)) for n, b in spec.items()}
    twin, torch_params = torch_ref.get(name), {k: to_torch(np.asarray(v)) for k, v in params.items()}
    torch_cache = {k: to_torch(np.asarray(v)) for k, v in leaves.items()} | {"length": to_torch(np.asarray(tokens))}
    torch_x = to_torch(np.asarray(x))
    step = jax.jit(lambda p, x, c: att.decode(p, cfg, x, c), donate_argnums=2)
    state = {"cache": spec.cls(**leaves, length=tokens)}

    def ours() -> None:
        y, cache = step(params, x, state["cache"])
        state["cache"] = replace(cache, length=jnp.full((1,), DEMO_CONTEXT - 1, jnp.int32))
        y.block_until_ready()

    def theirs() -> None:
        with torch.no_grad():
            twin.decode(torch_params, cfg, torch_x, torch_cache)

    times = {"jforge, jitted": time_cpu(ours, samples=10), "torch_ref": time_cpu(theirs, samples=10)}
    return [
        {"backend": label, "context": DEMO_CONTEXT, "us": t.median, "p10": t.p10, "p90": t.p90}
        for label, t in times.items()
    ]


def show(data: dict) -> None:
    report.show_cost(data["cost"])
    report.say()
    out = report.Grid("law", "", "error", right=2)
    for law in data["laws"]["laws"]:
        out.add_row(law["law"], law["title"], report.cell(law["error"], law["ok"]))
    report.show("The laws on a small gqa, float64", out)
    report.say()
    report.show_backends(data["backends"])
    report.say()
    out = report.Grid("backend", "median ms", "p10", "p90", right=1)
    for row in data["times"]:
        out.add_row(row["backend"], *(f"{row[k] / 1e3:.1f}" for k in ("us", "p10", "p90")))
    context = data["times"][0]["context"]
    report.show(
        f"Decode step of one Llama-3.1-8B attention layer, {context:,} tokens, float32, on this machine's CPU", out
    )
