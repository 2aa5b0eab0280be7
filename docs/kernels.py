"""The tables of docs/kernels.md and README.md that come from a GPU. `python docs/kernels.py` writes them anew from
docs/gpu_runs.jsonl, prose untouched.

A table stands between `<!-- gpu NAME -->` and `<!-- end -->`; NAME is proofs, timing, dense, latent, parts or states.
"""

import json
import re
from pathlib import Path

from jforge.harness.bench import TIMED
from jforge.harness.ops import CASES

FOLDER = Path(__file__).parent
DOCUMENTS = FOLDER / "kernels.md", FOLDER.parent / "README.md"
PEERS = {"sdpa flash": "SDPA flash", "sdpa cudnn": "SDPA cuDNN", "cudnn (JAX)": "cuDNN (JAX)", "flex": "FlexAttention"}
_BLOCK = re.compile(r"(<!-- gpu (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def records() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "gpu_runs.jsonl").read_text(encoding="utf-8").splitlines()]


def render(text: str, rows: list[dict]) -> str:
    """The document with its tables as the records have them."""
    tables = {"proofs": proofs, "dense": dense, "latent": latent, "parts": parts, "states": states, "timing": timing}

    def table(match: re.Match) -> str:
        return match[1] + "\n".join(["", *tables[match["name"]](rows), ""]) + "\n" + match[3]

    return _BLOCK.sub(table, text)


def _markdown(columns, rows, words: int) -> list[str]:
    """A table whose first `words` columns are words, as is a last one that names commits; all else is numbers."""
    rule = ["---" if i < words or name == "commit" else "---:" for i, name in enumerate(columns)]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (columns, rule, *rows)]


def _cards(rows: list[dict]) -> str:
    return "; ".join(sorted({f"{row['device']}, driver {row['driver']}" for row in rows}))


def _source(chosen: list[dict], rows: list[dict]) -> list[str]:
    """Where timed rows come from: card, driver, commit, and the read ceiling of the same run."""
    commits = sorted({row["commit"] for row in chosen})
    rates = [row["GB_per_s"] for row in rows if row["what"] == "ceiling" and row["commit"] in commits]
    (samples,) = {row["samples"] for row in chosen if "samples" in row}
    ceiling = f"read ceiling {min(rates):.0f} to {max(rates):.0f} GB/s"
    return ["", f"{_cards(chosen)}, commit {', '.join(commits)}, median of {samples}, {ceiling}."]


def _by_size(rows: list[dict], table: str) -> dict[tuple, dict[str, dict]]:
    """{sizes: {implementation: row}} of the timed rows of a table; calls of a dense op without peers are parts."""
    names = ("what", "B", "N", "K", "S", "I", "H", "L", "window", "block_size", "V", "decay", "beta")
    found: dict = {}
    for row in rows:
        if row["what"] in TIMED and TIMED[row["what"]].table == table:
            found.setdefault(tuple(row.get(name) for name in names), {})[row["implementation"]] = row
    return found


def timing(rows: list[dict]) -> list[str]:
    """The one kernel that both frameworks call."""
    (row,) = (row for row in rows if row["what"] == "timing")
    times = f"{row['jax']:.1f} us through JAX, {row['torch']:.1f} us through torch"
    return [f"{times} ({_cards([row])}, commit {row['commit']})."]


def _us(row: dict) -> str:
    return f"{row['median']:.0f}" if row["median"] >= 1000 else f"{row['median']:.1f}"


def dense(rows: list[dict]) -> list[str]:
    columns = ("B, N, K, S", "pallas", "triton", *PEERS.values(), "pallas / best", "triton / best")
    table, chosen = [], []
    for sizes, found in _by_size(rows, "dense").items():
        if PEERS.keys() <= found.keys():
            best = min(found[name]["median"] for name in PEERS)
            ratios = [f"{found[name]['median'] / best:.2f}" for name in ("pallas", "triton")]
            times = [_us(found[name]) for name in ("pallas", "triton", *PEERS)]
            table.append((", ".join(map(str, sizes[1:5])), *times, *ratios))
            chosen += found.values()
    return _markdown(columns, table, 1) + _source(chosen, rows)


def latent(rows: list[dict]) -> list[str]:
    columns = ("B, N, S", "pallas, us", "triton, us", "pallas, GB/s", "triton, GB/s", "SDPA, expanded, us")
    table, chosen = [], []
    for (_, B, N, _, S, *_), found in _by_size(rows, "latent").items():
        ours = found["pallas"], found["triton"]
        rates = [f"{row['GB_per_s']:.0f}" for row in ours]
        table.append((f"{B}, {N}, {S}", *map(_us, ours), *rates, _us(found["sdpa (expanded)"])))
        chosen += found.values()
    return _markdown(columns, table, 1) + _source(chosen, rows)


def parts(rows: list[dict]) -> list[str]:
    columns = ("op", "B, N, K, S", "a row reads", "pallas, us", "triton, us", "pallas, GB/s", "triton, GB/s")
    table, chosen = [], []
    for (op, B, N, K, S, heads, *_), found in (_by_size(rows, "dense") | _by_size(rows, "parts")).items():
        if not PEERS.keys() <= found.keys():
            ours = found["pallas"], found["triton"]
            sizes = ", ".join(str(x or "-") for x in (B, N or heads, K, S))
            read = TIMED[op].reads(ours[0])
            table.append((f"`{op}`", sizes, read, *map(_us, ours), *(f"{row['GB_per_s']:.0f}" for row in ours)))
            chosen += ours
    return _markdown(columns, table, 3) + _source(chosen, rows)


def states(rows: list[dict]) -> list[str]:
    """A step of a recurrent state beside torch's copy of the state, which reads and writes as much."""
    columns = (
        "B, N, H, V",
        "a decay for",
        "delta rule",
        "pallas, us",
        "triton, us",
        "copy, us",
        "pallas / copy",
        "triton / copy",
    )
    table, chosen = [], []
    for found in _by_size(rows, "states").values():
        row, copy = found["pallas"], found["copy"]["median"]
        sizes = ", ".join(str(row[axis]) for axis in "BNHV")
        kind = ("each head", "each head and row", "each key channel")[row["decay"] - 1], "yes" if row["beta"] else ""
        ratios = [f"{found[name]['median'] / copy:.3f}" for name in ("pallas", "triton")]
        table.append((sizes, *kind, *(_us(found[name]) for name in ("pallas", "triton", "copy")), *ratios))
        chosen += found.values()
    return _markdown(columns, table, 3) + _source(chosen, rows)


def proofs(rows: list[dict]) -> list[str]:
    """What was asked of the kernels on a GPU: how often, and how often the answer was wrong."""
    asked = {
        "case": "named case in a dtype, right, and the same bits twice",
        "invariance": "random batch, with `chunk`: a row's bits are those of the row alone",
        "memcheck": "case under compute-sanitizer, each array its own allocation",
        "fuzz": "drawn example judged by the oracle (beside it, refused as documented)",
    }
    table, judged = [], []
    for what, label in asked.items():
        found = [row for row in rows if row["what"] == what and "ok" in row]  # a refusal proves nothing
        cells = []
        for name in ("pallas", "triton"):
            mine = [row for row in found if row["implementation"] == name]
            count = sum(row.get("batches", row.get("judged", 1)) for row in mine)
            refused = f" ({sum(row['refused'] for row in mine)})" if what == "fuzz" else ""
            cells.append(f"{count}{refused}")
        judged += found
        wrong = sum(not row["ok"] for row in found)
        table.append((label, *cells, wrong, ", ".join(sorted({row["commit"] for row in found}))))
    end = ["", f"{_cards(judged)}."]
    for name in ("pallas", "triton"):
        ran = {row["case"] for row in judged if row["what"] == "case" and row["implementation"] == name}
        if due := [f"`{case.name}`" for case in CASES if case.name not in ran]:
            end += ["", f"Not yet run in {name}: {', '.join(due)}."]
    return _markdown(("asked", "pallas", "triton", "wrong", "commit"), table, 1) + end


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render(document.read_text(encoding="utf-8"), records()), encoding="utf-8")
