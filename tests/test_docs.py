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
from jforge.hf_families import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MECHANISMS = (ROOT / "docs" / "mechanisms.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    """docs/mechanisms.py, which writes the tables."""
    spec = importlib.util.spec_from_file_location("mechanisms_script", ROOT / "docs" / "mechanisms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_snippet_of_readme_runs():
    """Its last line breaks one law, as its comment says."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "README.md", "exec"), {})
    assert [line.split()[0] for line in shown.getvalue().splitlines() if "FAILS" in line] == ["L7"]


def test_readme_names_every_model_type():
    (text,) = re.findall(r"It knows the model types\n(.*?)\n\nA layer", README, flags=re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(FAMILIES)


def test_readme_names_every_op():
    """The table of ops, which says that both packages have them all: none is a stand-in that only raises."""
    kernels = README.split("## Kernels")[1].split("## Layout")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \|$", kernels, flags=re.MULTILINE)
    said = sorted(op for ops in rows for op in re.findall(r"`(\w+)`", ops))
    for package in (triton_kernels, pallas_kernels):
        written = [op for op in package.__all__ if not getattr(package, op).__module__.endswith("unwritten")]
        assert said == sorted(written)
