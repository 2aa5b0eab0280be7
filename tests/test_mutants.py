"""Planted bugs, each of which some judge must catch; docs/mutants.md lists them.

A mutant is a change to the product, planted with monkeypatch, and the judge that has to notice it: a law, a walk (four
laws in one), torch_ref, or the op cases against the float64 oracle. The same judges pass on the unchanged code.
"""

import re
from pathlib import Path

import mutants_dense
import mutants_sparse
import mutants_v4
import pytest
import test_dsa
import test_index_ops
import test_lightning
import test_mla
import test_msa
import test_states
from fuzz_bugs import BUGS

FILES = mutants_dense, mutants_sparse, mutants_v4, test_mla, test_lightning, test_msa, test_dsa, test_states
MUTANTS = {name: planted for file in FILES for name, planted in file.MUTANTS.items()}
JUDGES = {name: judge for file in FILES for name, judge in file.JUDGES.items()}


@pytest.mark.parametrize("name", JUDGES)
def test_the_judges_pass_the_unchanged_code(name, untyped):
    assert JUDGES[name]()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch, untyped):
    plant, notices = MUTANTS[name]
    assert notices(plant(monkeypatch)), f"nobody noticed: {name}"


def test_every_mutant_is_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "mutants.md").read_text()
    rows = [row for row in re.findall(r"^\| (.+?) \|", text, flags=re.MULTILINE) if not row.startswith("bug")]
    assert rows == [*MUTANTS, *test_index_ops.MUTANTS, *BUGS]
