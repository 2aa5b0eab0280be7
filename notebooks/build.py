"""NN_name.ipynb with its outputs, from NN_name.py: `python notebooks/build.py [NAME...]`.

Without names those are made anew whose source, whose packages or whose jax or torch have changed since; `--check`
executes and compares instead, and exits with 1 where a stored notebook is not what its source makes. What a source may
hold is in README.md.
"""

import argparse
import asyncio
import copy
import hashlib
import os
import re
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PACKAGES = ("jforge", "torch_ref", "triton_kernels", "pallas_kernels")  # each may import the others' parts
LIMIT = 60  # seconds of a whole notebook on 2 cores, the start of its kernel included
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
_XLA = "--xla_cpu_multi_thread_eigen=false --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
LIGHT = {  # several kernels run side by side, and compile small programs that run once
    "OMP_NUM_THREADS": "1", "XLA_FLAGS": _XLA, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
}  # fmt: skip
PLAIN = {"NO_COLOR": "1", "COLUMNS": "120"}
UNSET = ("NPROC", "TRITON_INTERPRET", "PYTEST_CURRENT_TEST")  # what a notebook needs of these it sets itself
TEXTS = ("text/html", "text/markdown", "text/latex", "text/plain")  # the first that an output has is compared
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+)?")


class Fresh(NamedTuple):
    """A notebook as its source makes it now, without the solutions, and the seconds that this took."""

    notebook: NotebookNode
    seconds: float


# the source


def sources(names=(), folder: Path = FOLDER) -> list[Path]:
    """The .py of each name, of all notebooks where none is given. Raises ValueError for one that there is not."""
    found = {path.stem: path for path in sorted(folder.glob("[0-9]*.py"))}
    for name in names:
        if name not in found:
            raise ValueError(f"no notebook is called {name!r}; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def read(source: Path) -> NotebookNode:
    """The notebook of a .py, solutions included. A cell's id follows from its content, so that ids stay."""
    made = jupytext.read(source, fmt="py:percent")
    times: dict[str, int] = {}
    for cell in made.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        name = _digest(cell.source)[:8]
        times[name] = times.get(name, 0) + 1
        cell.id = name if times[name] == 1 else f"{name}-{times[name]}"
    made.metadata = nbformat.from_dict(copy.deepcopy(METADATA))
    made.nbformat, made.nbformat_minor = 4, 5
    return made


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def proofs(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Each solution and a copy of the next code cell, which must check it: what runs after the notebook's end."""
    found = []
    for at, cell in enumerate(cells):
        if tagged(cell, "solution"):
            check = next((c for c in cells[at + 1 :] if c.cell_type == "code"), None)
            if check is None or "exercise(" not in check.source:
                raise ValueError(f"no cell calls exercise(...) after the solution {cell.source!r}")
            found += [copy.deepcopy(cell), copy.deepcopy(check)]
    return found


def fingerprint(source: Path) -> str:
    """Of what a notebook's outputs follow from: itself, this file, the packages, the versions of jax and torch."""
    files = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*")) if path.suffix in (".py", ".json")]
    files += [ROOT / "docs" / "gpu_runs.jsonl", Path(__file__), source]
    parts = [_digest(path.read_text(encoding="utf-8")) for path in files]
    return _digest("\n".join([*parts, *(f"{name} {version(name)}" for name in ("jax", "torch"))]))[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# a run


async def execute(source: Path) -> Fresh:
    """Run a source in a kernel of its own: first what readers see, then each solution with the cell that checks it.

    Raises nbclient's CellExecutionError for a cell that fails, TimeoutError for one that takes too long, and ValueError
    for one that writes to stderr and for a solution that its exercise does not take.
    """
    made = read(source)
    shown = [cell for cell in made.cells if not tagged(cell, "solution")]
    start = time.monotonic()
    made.cells = shown + proofs(made.cells)
    with tempfile.TemporaryDirectory() as own:
        sockets = {"transport": "ipc", "connection_file": os.path.join(own, "kernel.json")}  # no port to be read
        client = NotebookClient(
            made, kernel_name="python3", timeout=LIMIT, record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": str(source.parent)}}, config=Config({"KernelManager": sockets}),
        )  # fmt: skip
        await client.async_execute(env=_environment(own))
    seconds = time.monotonic() - start
    for cell in made.cells:
        _outputs_of(cell)
    said = ["".join(o.get("text", "") for o in check.outputs).strip() for check in made.cells[len(shown) + 1 :: 2]]
    if refused := [line for line in said if not re.match(r"Exercise \d+: right$", line)]:
        raise ValueError(f"solutions are not taken: {'; '.join(refused)}")
    made.cells = shown
    made.metadata = nbformat.from_dict({**copy.deepcopy(METADATA), "jforge": {"hash": fingerprint(source)}})
    return Fresh(made, seconds)


def _environment(own: str) -> dict[str, str]:
    """No history, no colours and no settings of the person who runs it."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, **LIGHT, **PLAIN, "IPYTHONDIR": own, "PYTHONPATH": path}


def _outputs_of(cell: NotebookNode) -> None:
    """Drop what no reader sees (metadata, the text of a figure, the address of a table); refuse stderr."""
    cell.metadata.pop("execution", None)
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr":
            raise ValueError(f"the cell {cell.source!r} writes to stderr: {output.text}")
        if "data" in output:
            output.metadata = NotebookNode()
            if len(output.data) > 1:
                output.data.pop("text/plain", None)


async def execute_all(chosen: list[Path], workers: int) -> list[Fresh | Exception]:
    """One kernel each, `workers` at a time; in the order of `chosen`."""
    free = asyncio.Semaphore(workers)

    async def one(source: Path) -> Fresh:
        async with free:
            return await execute(source)

    return await asyncio.gather(*map(one, chosen), return_exceptions=True)


# the comparison


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Where a stored notebook is not the fresh one, a line a cell. Outputs of cells tagged `varies` are not looked at,
    of a figure only that it is there, and floats may differ by one in their last digit.
    """
    found = []
    for at, (old, new) in enumerate(zip_longest(stored.cells, fresh.cells), 1):
        if old is None or new is None:
            return [*found, f"{len(stored.cells)} cells are stored, its source makes {len(fresh.cells)}"]
        if any(old.get(key) != new.get(key) for key in ("id", "cell_type", "metadata", "source")):
            found.append(f"cell {at} is not the one of its source: {_shorten(old.source)} / {_shorten(new.source)}")
        elif new.cell_type == "code" and not tagged(new, "varies"):
            kept, made = ([_shown(output) for output in cell.outputs] for cell in (old, new))
            if [kind for kind, _ in kept] != [kind for kind, _ in made]:
                found.append(f"cell {at} shows {[kind for kind, _ in made]}, stored are {[kind for kind, _ in kept]}")
            found += [
                f"cell {at} shows {_shorten(b)}, stored is {_shorten(a)}"
                for (_, a), (_, b) in zip(kept, made, strict=False)
                if not same(a, b)
            ]
    return found


def _shown(output: NotebookNode) -> tuple[str, str]:
    """The kind of an output, and its text, "" for a figure."""
    if "data" not in output:
        return output.get("name", output.output_type), output.get("text", "")
    if "image/png" in output.data:
        return "image/png", ""
    kind = next(kind for kind in TEXTS if kind in output.data)
    return kind, output.data[kind]


def same(a: str, b: str) -> bool:
    """Equal but for spaces, and for floats that differ by one in the last place that is printed."""
    words = [" ".join(_NUMBER.sub(" # ", text).split()) for text in (a, b)]
    numbers = [_NUMBER.findall(text) for text in (a, b)]
    return words[0] == words[1] and all(_close(x, y) for x, y in zip(*numbers, strict=True))


def _close(a: str, b: str) -> bool:
    units = [_unit(x) for x in (a, b)]
    if a == b or None in units:
        return a == b
    return abs(float(a.replace(",", "")) - float(b.replace(",", ""))) <= 1.01 * max(units)


def _unit(number: str) -> float | None:
    """What one in the last digit is worth; None of an integer, which has no rounding."""
    digits, _, power = number.lower().partition("e")
    if "." not in digits and not power:
        return None
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def _shorten(text: str, most: int = 200) -> str:
    return repr(text if len(text) <= most else f"{text[: most - 4]} ...")


# the command


def load(source: Path) -> NotebookNode | None:
    """The stored notebook of a source, None where there is none."""
    stored = source.with_suffix(".ipynb")
    return nbformat.read(stored, as_version=4) if stored.exists() else None


def stale(source: Path) -> bool:
    stored = load(source)
    return stored is None or stored.metadata.get("jforge", {}).get("hash") != fingerprint(source)


def problems(source: Path, fresh: Fresh) -> list[str]:
    """What --check finds."""
    stored = load(source)
    found = ["it is not built"] if stored is None else differences(stored, fresh.notebook)
    return found + [f"it took {fresh.seconds:.0f} s, {LIMIT} are allowed"] * (fresh.seconds > LIMIT)


def main(argv: list[str], folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01A_attention_core")
    parser.add_argument("--check", action="store_true", help="execute and compare, write nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="kernels at a time")
    options = parser.parse_args(argv)
    try:
        chosen = sources(options.names, folder)
    except ValueError as error:
        parser.error(str(error))
    if not options.check and not options.names:
        chosen = [source for source in chosen if stale(source)]
    failed = False
    for source, result in zip(chosen, asyncio.run(execute_all(chosen, options.workers)), strict=True):
        if isinstance(result, Exception):
            found = [f"{type(result).__name__}: {result}"]
        else:
            found = problems(source, result) if options.check else []
            if not options.check:
                nbformat.write(result.notebook, source.with_suffix(".ipynb"))
            print(f"{source.stem}: {result.seconds:.1f} s")
        for line in found:
            print(f"{source.stem}: {line}", file=sys.stderr)
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
