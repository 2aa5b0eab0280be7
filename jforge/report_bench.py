"""What `jforge bench` shows: the rows of the benchmarks as a table and as a picture."""

from jforge.report import Grid, say, show


def _shape(row: dict) -> str:
    """The sizes that rows of one op differ in."""
    letters = "".join(f" {axis}{row[axis]:,}" for axis in "BNKISL" if axis in row)
    return letters.lstrip() + "".join(f" {name} {row[name]:,}" for name in ("window", "block_size") if row.get(name))


def show_bench(data: dict) -> None:
    out = Grid("op", "shape", "implementation", "us", "p10", "p90", "GB/s", "% of ceiling", "kernels", right=3)
    for row in data["rows"]:
        if row["what"] == "ceiling":
            say(f"read ceiling {row['GB_per_s']:,.0f} GB/s")
            continue
        head = (row["what"], _shape(row), row["implementation"])
        if "refused" in row:
            out.add_row(*head, "refused", "", "", "", "", "")
            continue
        share = f"{100 * row['of_ceiling']:.0f}" if "of_ceiling" in row else ""
        times = (f"{row[k]:,.1f}" for k in ("median", "p10", "p90"))
        out.add_row(*head, *times, f"{row['GB_per_s']:,.0f}", share, str(row["kernels"] or ""))
    where = f"{data['device']}, commit {data['commit']}"
    dtype = next((row["dtype"] for row in data["rows"] if "dtype" in row), "")
    show(f"Whole calls, merge included, {dtype}, on {where}", out)
    for row in data["rows"]:
        if "refused" in row:
            say(f"{row['implementation']}: {row['refused']}")


def _label(row: dict) -> str:
    """The op and its sizes, one a line, for an axis."""
    return "\n".join((row["what"].removeprefix("decode_"), *_shape(row).split()))


def plot_bench(data: dict, path: str) -> None:
    """Achieved GB/s by shape, one marker an implementation, and the read ceiling as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if "median" in row]
    shapes = list(dict.fromkeys(_label(row) for row in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows)):
        mine = [row for row in rows if row["implementation"] == name]
        x = [shapes.index(_label(row)) for row in mine]
        axes.plot(x, [row["GB_per_s"] for row in mine], "osD^vP*X"[i % 8], label=name, markersize=7, alpha=0.8)
    for row in data["rows"]:
        if row["what"] == "ceiling":
            axes.axhline(row["GB_per_s"], color="grey", linestyle="--", label="read ceiling")
    axes.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axes.set_ylabel("GB/s of q, keys, values and out")
    axes.set_ylim(bottom=0)
    axes.set_title(f"decode ops, whole call, {data['device']}")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
