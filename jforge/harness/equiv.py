"""What `jforge equiv` compares: the backends of an op with float64, the mechanisms with other frameworks. Plain data;
report.py prints it.
"""

import math
import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import jforge
from jforge.core import compare
from jforge.harness.backends import BACKENDS, Backend, for_programs_that_run_once, gpu, judge, passes
from jforge.harness.op import Case
from jforge.harness.ops import BY_NAME, cases

Track = Callable[[Iterable, str], Iterator]  # passes items on, and may show how many are done

WORTH_PROCESSES = 40  # questions below which starting processes takes longer than they save


def _quietly(items: Iterable, description: str) -> Iterator:
    yield from items


def backends(
    ops: Collection[str] = tuple(BY_NAME), tag: str | None = None, track: Track = _quietly, workers: int = 1
) -> list[dict]:
    """The cases (of some ops, of a tag) in every dtype that a backend is judged in here: error against float64, or why
    it was refused. workers: processes that share the cases on a machine without a GPU; a program that asks for more
    than one must be safe to import.
    """
    work = [(c, b.name, d) for c in cases(tag=tag) if c.op in ops for b in BACKENDS.values() for d in _dtypes(b)]
    if gpu() or workers == 1 or len(work) < WORTH_PROCESSES:
        return [_row(item) for item in track(work, "comparing backends")]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=for_programs_that_run_once) as pool:
        rows = pool.map(_row, work)
        return [next(rows) for _ in track(work, "comparing backends")]


def _dtypes(backend: Backend) -> tuple[str, ...]:
    return backend.gpu_dtypes if gpu() else backend.dtypes


def _row(item: tuple[Case, str, str]) -> dict:
    case, backend, dtype = item
    row = {"case": case.name, "op": case.op, "backend": backend, "dtype": dtype}
    try:
        errors = judge(BACKENDS[backend], BY_NAME[case.op], case, dtype)
    except NotImplementedError as refusal:
        return row | {"refused": str(refusal)}
    return row | {"out": number(errors[0]), "lse": number(errors[1]), "ok": passes(errors, dtype)}


def frameworks(names: Collection[str], track: Track = _quietly) -> list[dict]:
    """These mechanisms in float32: against torch_ref on every example, against transformers on tiny random models."""
    import torch_ref
    from jforge.harness import frameworks, tiny_models

    rows = []
    work = [(n, cfg) for n in names for cfg in jforge.get(n).examples]
    for name, cfg in track(work, "comparing with torch_ref"):
        errors = frameworks.against_torch(jforge.get(name), torch_ref.get(name), cfg)
        rows.append(
            {"mechanism": name, "judge": "torch_ref", "subject": f"N={cfg.num_attention_heads}", **_judged(errors)}
        )
    models = [name for name, model in tiny_models.MODELS.items() if model.mechanism in names]
    for name in track(models, "comparing with transformers"):
        mechanism, errors = tiny_models.against_transformers(name)
        rows.append({"mechanism": mechanism, "judge": "transformers", "subject": name, **_judged(errors)})
    return rows


def _judged(errors: dict[str, float]) -> dict:
    worst = max(errors.values())
    return {"errors": {mode: number(e) for mode, e in errors.items()}, "ok": worst <= compare.OUT["float32"]}


def number(error: float) -> float | None:
    """JSON has no infinity: None stands for an error that is not a number."""
    return error if math.isfinite(error) else None


def agrees(data: dict) -> bool:
    """Nothing that was compared is outside its tolerance; a refusal is not a disagreement."""
    return all(row.get("ok", True) for part in ("backends", "frameworks") for row in data.get(part, []))
