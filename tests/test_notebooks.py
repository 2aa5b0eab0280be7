"""Every notebook runs, is the one its source makes, and has all its parts; the builder notices where it is not."""

import asyncio
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
_spec = importlib.util.spec_from_file_location("build_notebooks", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
SOURCES = build.sources()
MECHANISM = re.compile(r"(0[2-9]|1[016])A_")  # the notebooks of mechanisms


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_what_its_source_makes(source):
    """The solutions, which it does not hold, run after it: each exercise takes its own."""
    assert build.problems(source, asyncio.run(build.execute(source))) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_has_its_parts(source):
    """3 to 6 exercises at the end, each with a solution; a prediction; the six questions; a picture."""
    cells = build.read(source).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    code = [cell for cell in cells if cell.cell_type == "code"]
    checks = [at for at, cell in enumerate(code) if "exercise(" in cell.source]
    assert 3 <= len(checks) <= 6 and checks[-1] == len(code) - 1
    for number, at in enumerate(checks, 1):
        blank, solution, check = (cell.source for cell in code[at - 2 : at + 1])
        assert blank == f"answer_{number} = None" and build.tagged(code[at - 1], "solution"), number
        called = re.search(rf"^exercise\(\s*{number},\s+answer_{number},\s", check, flags=re.MULTILINE)
        assert f"answer_{number}" in solution and called, number
    for at, cell in enumerate(code):
        if build.tagged(cell, "predict"):
            assert cell.source == "guess = None" and "reveal(" in code[at + 1].source
    text = "\n".join(cell.source for cell in code)
    assert "TRITON_INTERPRET" not in text  # BACKENDS asks for it, where no GPU is
    assert any(build.tagged(cell, "predict") for cell in code)
    assert "@jaxtyped(typechecker=beartype)" in text
    assert not MECHANISM.match(source.stem) or ("questions(" in text and "picture(" in text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_readers_see_figures_and_no_solution(source):
    stored = build.load(source)
    said = [_said(cell) for cell in stored.cells if cell.cell_type == "code" and "exercise(" in cell.source]
    assert said == [f"Exercise {number}: not answered yet\n" for number in range(1, len(said) + 1)]
    shown = [kind for cell in stored.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in shown
    assert not any(build.tagged(cell, "solution") for cell in stored.cells)


def test_every_stored_notebook_has_a_source_and_a_line_in_the_list():
    names = [source.stem for source in SOURCES]
    assert names == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.ipynb\) \|", text, flags=re.MULTILINE)
    assert listed == [(name, name) for name in names]


# the builder

TINY = """# %% [markdown]
# # Two numbers

# %%
import time

print("a number", 2 / 3)

# %% tags=["varies"]
print(time.time())

# %%
answer_1 = None

# %% tags=["solution"]
answer_1 = 4

# %%
print("Exercise 1:", {None: "not answered yet", 4: "right"}.get(answer_1, "wrong"))  # as exercise(1, answer_1) does
"""


def _said(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A notebook that needs no package, built once; its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "00_tiny.py").write_text(TINY)
    assert build.main([], folder) == 0
    return folder


def test_a_built_notebook(tiny):
    """It has outputs, no solution and no time of its run."""
    stored = build.load(tiny / "00_tiny.py")
    nbformat.validate(stored)
    assert _said(stored.cells[1]) == "a number 0.6666666666666666\n" and _said(stored.cells[2])
    assert "answer_1 = 4" not in (tiny / "00_tiny.ipynb").read_text()
    assert not any("execution" in cell.metadata for cell in stored.cells)


def test_what_is_built_again(tiny, tmp_path, monkeypatch):
    """A notebook that has changed, or whose packages have; one without changes only by name."""
    source = tmp_path / "00_tiny.py"
    source.write_text(TINY)
    assert build.stale(source)
    stored = (tiny / "00_tiny.ipynb").read_text()
    source.with_suffix(".ipynb").write_text(stored)
    assert not build.stale(source)
    with monkeypatch.context() as patch:
        patch.setattr(build, "version", lambda name: "another")
        assert build.stale(source)
    source.write_text(TINY.replace("2 / 3", "1 / 3"))
    assert build.stale(source)


def test_a_notebook_that_is_slow_or_not_built_or_not_there(tiny, tmp_path, capsys):
    source = tiny / "00_tiny.py"
    fresh = build.Fresh(build.load(source), build.LIMIT + 1)
    assert build.problems(source, fresh) == ["it took 61 s, 60 are allowed"]
    assert build.problems(tmp_path / "00_tiny.py", fresh._replace(seconds=1)) == ["it is not built"]
    with pytest.raises(SystemExit):
        build.main(["01_none"], tiny)
    assert "no notebook is called '01_none'; there are 00_tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where,planted,noticed",
    [
        ("0.6666666666666666", "0.6666666666666666", None),
        ("0.6666666666666666", "0.6667", None),  # rounded otherwise
        ("0.6666666666666666", "0.6668", "cell 2 shows"),
        ("a number 0", "the number 0", "cell 2 shows"),
        ("1: not answered yet", "1: right", "cell 5 shows"),
        ("2 / 3", "4 / 6", "cell 2 is not the one of its source"),
    ],
)
def test_a_planted_difference_is_noticed(tiny, tmp_path, capsys, where, planted, noticed):
    (tmp_path / "00_tiny.py").write_text(TINY)
    text = (tiny / "00_tiny.ipynb").read_text()
    assert text.count(where) == 1
    (tmp_path / "00_tiny.ipynb").write_text(text.replace(where, planted))
    assert build.main(["--check"], tmp_path) == int(noticed is not None)
    assert (noticed or "") in capsys.readouterr().err


def test_what_a_kernel_may_not_do(tmp_path, capsys):
    """Fail, warn, or refuse its own solution; each is said, and nothing is written."""
    bad = {"00_fails": TINY.replace("2 / 3", "2 / 0"), "01_warns": "# %%\nimport sys\nprint(1, file=sys.stderr)\n",
           "02_refuses": TINY.replace("answer_1 = 4", "answer_1 = 5")}  # fmt: skip
    for name, text in bad.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert build.main(["--workers", "2"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "writes to stderr" in said
    assert "02_refuses: ValueError: solutions are not taken: Exercise 1: wrong" in said
    assert not list(tmp_path.glob("*.ipynb"))


@pytest.mark.parametrize(
    "a,b,equal",
    [
        ("1e-07", "2e-07", True),
        ("1e-07", "3e-07", False),
        ("12.34 us", "12.35  us", True),
        ("12.34 us", "12.36 us", False),
        ("1,024 B", "1,025 B", False),
        ("4.00", "4", False),
        ("nan", "0.0", False),
        ("0.5 and 1", "0.5 and", False),
    ],
)
def test_numbers_may_differ_in_their_last_place(a, b, equal):
    assert build.same(a, b) == equal
