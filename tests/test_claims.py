"""Published figures of caches, recomputed; docs/claims.md is what they make."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("claims", DOCS / "claims.py")
claims = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(claims)
CLAIMS, MODELS = claims.load()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim['model']}: {claim['says']}")
def test_a_published_figure(claim):
    """Its verdict is the one that our number gives."""
    plain, assumed = (
        claims.agrees(claim["value"], claims.recompute(claim, MODELS, assume=assume)) for assume in (False, True)
    )
    verdict = "reproduced" if plain else "needs assumption" if assumed else "differs"
    assert verdict == claim["verdict"], (claim["value"], claims.recompute(claim, MODELS, assume=False))
    assert claim["source"] and (verdict == "reproduced" or claim["why"])


def test_there_are_20_of_them_and_the_page_is_current():
    assert len(CLAIMS) >= 20
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == claims.page()


@pytest.mark.parametrize(
    "value,ours,same", [(2, 2.49, True), (2, 2.51, False), (1.95, 1.953, True), (70.272, 70.27, False)]
)
def test_rounding(value, ours, same):
    assert claims.agrees(value, ours) == same
