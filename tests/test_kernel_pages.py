"""docs/kernel_triton.md and docs/kernel_mosaic.md say what the kernels are: excerpts, plans, numbers, figures."""

import contextlib
import importlib.util
import io
import itertools
import re
import textwrap
from pathlib import Path

import PIL.Image
import pytest

from jforge.harness.ops import BY_NAME
from pallas_kernels.plan import Config

ROOT = Path(__file__).parent.parent
PAGES = {"triton": ROOT / "docs" / "kernel_triton.md", "pallas": ROOT / "docs" / "kernel_mosaic.md"}
TEXTS = {package: page.read_text(encoding="utf-8") for package, page in PAGES.items()}
MEASURED = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


_LINES = r"((?:(?!```).*\n)*)"  # of a fenced block


def excerpts(text: str) -> list[tuple[str, str]]:
    """(file, code) of the python blocks under a line `From FILE:`."""
    return re.findall(rf"^From (\S+):\n```python\n{_LINES}```$", text, flags=re.MULTILINE)


def printing(text: str) -> list[tuple[str, str]]:
    """(code, what the page says that it prints) of the python blocks with a text block under them."""
    return re.findall(rf"^```python\n{_LINES}```\n```text\n{_LINES}```$", text, flags=re.MULTILINE)


def stands(code: str, source: str) -> bool:
    """Whether consecutive lines of the source are the code, up to their common indentation."""
    wanted, lines = textwrap.dedent(code), source.splitlines()
    count = len(wanted.splitlines())
    windows = ("\n".join(lines[i : i + count]) + "\n" for i in range(len(lines) - count + 1))
    return any(textwrap.dedent(window) == wanted for window in windows)


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "page", "exec"), {})
    return shown.getvalue()


EXCERPTS = [(package, *pair) for package, text in TEXTS.items() for pair in excerpts(text)]


@pytest.mark.parametrize("package, file, code", EXCERPTS, ids=[f"{p}-{c.split()[0]}" for p, _, c in EXCERPTS])
def test_an_excerpt_stands_in_its_file(package, file, code):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert stands(code, source)
    for line in filter(str.strip, code.splitlines()):
        assert not stands(code.replace(line, line + "  # changed", 1), source)
        changed = source.replace(line, line + "  # changed")
        assert changed != source and not stands(code, changed)


@pytest.mark.parametrize("package", PAGES)
def test_every_python_block_is_an_excerpt_or_prints(package):
    text = TEXTS[package]
    count = text.count("\n```python\n")
    assert len(excerpts(text)) + len(printing(text)) == count and len(excerpts(text)) > 5 and len(printing(text)) > 0


PRINTING = [pair for text in TEXTS.values() for pair in printing(text)]


@pytest.mark.parametrize("code, said", PRINTING, ids=[code.split()[1] for code, _ in PRINTING])
def test_a_block_prints_what_the_page_shows(code, said):
    assert said and printed(code) == said


def rows(text: str, heading: str) -> list[dict[str, str]]:
    """A table by its first heading, as dicts."""
    lines = text[text.index(f"| {heading} |") :].splitlines()
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    first, _, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return [dict(zip(first, cells, strict=True)) for cells in rest]


@pytest.mark.parametrize("package", PAGES)
def test_the_numbers_of_a_page_are_those_of_the_record(package):
    measured = {row["B, N, K, S"]: row[package] for row in rows(MEASURED, "B, N, K, S")}
    ceiling = int(re.search(r"read ceiling (\d+)", MEASURED)[1])
    assert f"{ceiling} GB/s is what a kernel that" in TEXTS[package]
    for row in rows(TEXTS[package], "B, N, K, S"):
        B, _, K, S = map(int, row["B, N, K, S"].split(", "))
        moved = BY_NAME["decode_attention"].moved(B=B, N=0, K=K, S=S, H=128)
        assert row[f"{package}, us"] == measured[row["B, N, K, S"]]
        assert row["k and v, MB"] == f"{moved / 1e6:.1f}"
        assert row[f"at {ceiling} GB/s, us"] == f"{moved / ceiling / 1e3:.1f}"


# --- figures


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures_script", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_show_the_figures_that_the_script_makes(figures):
    shown = {name for text in TEXTS.values() for name in re.findall(r"\]\(figures/(\w+)\.png\)", text)}
    assert shown == set(figures.FIGURES)
    assert shown <= {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}


@pytest.mark.parametrize("name", ["triton_grid", "mosaic_pipeline"])
def test_a_committed_figure_has_the_plan_of_today(figures, name):
    figure = figures.FIGURES[name]()
    with PIL.Image.open(ROOT / "docs" / "figures" / f"{name}.png") as image:
        assert image.text["Description"] == figures.titles(figure) and 1000 <= image.width <= 1400
    figures.plots().close(figure)


def test_another_plan_changes_a_figure(figures, monkeypatch):
    plan = figures.make_facts
    monkeypatch.setattr(figures, "make_facts", lambda *args, **more: plan(*args, **more, config=Config(128, 2)))
    figure = figures.mosaic_pipeline()
    assert figures.titles(figure).startswith(" | 2 stages; a K tile is 128 x 128, 32 KiB")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sum(name.startswith("k.tiles") for name in names) == 2 and len(names) == 2 * 2 + 2
    figures.plots().close(figure)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_ring_in_the_figure_keeps_its_barriers(figures, stages):
    """Nothing shares a slot, a tile is read when its copy is done, and a copy overwrites what was read."""
    spans = figures.timeline(stages, 12)
    for lane in {span.lane for span in spans}:
        ordered = sorted((span for span in spans if span.lane == lane), key=lambda span: (span.start, span.end))
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(ordered)), lane
        if lane not in ("producer", "consumer"):
            kinds = [span.kind for span in ordered if span.kind != "full"]
            assert kinds == ["copy", "read"] * len(range(int(lane[1:]), 12, stages))
