"""README.md and docs/mechanisms.md say what the code says: tables, printed output, snippets, lists of names."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

import jforge
import pallas_kernels
import triton_kernels
from jforge import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MECHANISMS = (ROOT / "docs" / "mechanisms.md").read_text(encoding="utf-8")


def _script(name: str):
    """A file of docs/ that writes the tables of a document."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return _script("mechanisms")


@pytest.fixture(scope="module")
def gpu():
    return _script("kernels")


def test_tables_of_mechanisms_are_those_of_the_code(script):
    assert script.render(MECHANISMS) == MECHANISMS


def test_a_wrong_number_in_a_table_is_noticed(script):
    wrong = MECHANISMS.replace("| `k_index` | B S J=128 | bfloat16 | 256 B a token |", "| `k_index` | 0 B a token |")
    assert wrong != MECHANISMS and script.render(wrong) == MECHANISMS


def test_every_mechanism_has_a_section(script):
    """A heading that names it, an equation below, and its tables."""
    assert sorted(script.mechanisms(MECHANISMS)) == sorted(jforge.names())
    sections = re.split(r"^## ", MECHANISMS, flags=re.MULTILINE)[1:]
    headings = {name: text for text in sections for name in text.splitlines()[0].split(", ")}
    for name in jforge.names():
        assert re.search(r"\n\n    \S", headings[name]), name


def test_bytes_stand_in_tables_alone(script):
    """Prose holds no number that nobody would check."""
    prose = script._BLOCK.sub("", MECHANISMS)
    assert not re.findall(r"\d+ (?:B|KiB|MiB|GiB)\b", prose)


@pytest.mark.parametrize("document", ("README.md", "docs/kernels.md"))
def test_gpu_tables_are_those_of_the_records(gpu, document):
    text = (ROOT / document).read_text(encoding="utf-8")
    names = [name for _, name, _ in gpu._BLOCK.findall(text)]
    assert names == (
        ["dense"] if document == "README.md" else ["proofs", "timing", "dense", "latent", "parts", "states"]
    )
    assert gpu.render(text, gpu.records()) == text


def test_a_slower_or_wrong_kernel_changes_the_gpu_tables(gpu):
    text, rows = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), gpu.records()
    for what in ("decode_attention", "decode_mla", "decode_linear"):
        slower = [row | {"median": 2 * row["median"]} if row["what"] == what else row for row in rows]
        assert gpu.render(text, slower) != text
    apart = [row | {"jax": 2 * row["torch"]} if row["what"] == "timing" else row for row in rows]
    assert gpu.render(text, apart) != text
    for what in ("case", "invariance", "memcheck", "fuzz"):
        at = next(i for i, row in enumerate(rows) if row["what"] == what)
        wrong = [*rows[:at], rows[at] | {"ok": False}, *rows[at + 1 :]]
        assert "| 1 |" in gpu.render(text, wrong)
    for name in ("pallas", "triton"):
        fewer = [row for row in rows if (row.get("implementation"), row.get("case")) != (name, "llama")]
        assert f"Not yet run in {name}: `llama`" in gpu.render(text, fewer)
    other_card = [row | {"device": "B200"} if row.get("case") == "llama" else row for row in rows]
    assert "B200" not in text and "B200, driver" in gpu.render(text, other_card)


def test_every_gpu_record_is_of_a_right_kernel(gpu):
    """Each proof is recorded for both packages, and nothing in the records failed."""
    rows = gpu.records()
    assert all(row.get("ok", True) for row in rows)
    for what in ("case", "invariance", "memcheck", "fuzz"):
        assert {row["implementation"] for row in rows if row["what"] == what} == {"pallas", "triton"}


def printed() -> list[tuple[str, list[str]]]:
    """(command, the lines under it) of every block of README that starts with `$ jforge`."""
    blocks = re.findall(r"^    \$ (jforge .*)\n((?:    .*\n|\n(?=    ))*)", README, flags=re.MULTILINE)
    return [(command, [line[4:] for line in text.rstrip().splitlines()]) for command, text in blocks]


@pytest.mark.parametrize("command,lines", printed(), ids=[command for command, _ in printed()])
def test_readme_prints_what_the_command_prints(capsys, monkeypatch, command, lines):
    monkeypatch.chdir(ROOT)
    argv, _, head = command.partition(" | head -")
    assert cli.main(argv.split()[1:]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == shown[: int(head) if head else None]


SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=["mechanism", "check", "transformers", "kernel"])
def test_a_snippet_of_readme_runs(code):
    """Alone, in a program of its own. That of the laws breaks one, as its comment says."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "README.md", "exec"), {})
    lines = shown.getvalue().splitlines()
    if "jforge.check" in code:
        assert [line.split()[0] for line in lines if "FAILS" in line] == ["L2"]
        assert [line.split()[0] for line in lines if line.endswith(" ok")] == ["L1"]
    if "judge" in code:
        assert re.search(r"\b0 wrong", shown.getvalue())


def test_readme_counts_the_model_types():
    """The count is that of docs/families.md, which its own test holds to the code."""
    (found,) = re.findall(r"every layer of (\d+ of the \d+) causal-LM types", README)
    (counted,) = re.findall(r"<!-- count --> (.*?) <!-- end -->", (ROOT / "docs" / "families.md").read_text())
    assert found.replace("of the", "of") == counted


def test_one_version():
    """In the package, in CITATION.cff, and as the newest entry of the changelog."""
    version = jforge.__version__
    cited, newest = (
        re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, pattern in (("CITATION.cff", r"^version: (.*)$"), ("CHANGELOG.md", r"^## ([\d.]+)"))
    )
    assert cited == [version] and newest[0] == version


def test_readme_names_every_op():
    """The table of ops; both packages export them all."""
    kernels = README.split("## Kernels")[1].split("## Layout")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \|$", kernels, flags=re.MULTILINE)
    said = sorted(op for ops in rows for op in re.findall(r"`(\w+)`", ops))
    for package in (triton_kernels, pallas_kernels):
        assert said == sorted(package.__all__)
