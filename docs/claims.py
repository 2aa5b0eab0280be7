"""Write docs/claims.md from docs/claims.toml: published figures of caches beside jforge's own, recomputed.

python docs/claims.py            # write the page
python docs/claims.py --check    # fail where it would change
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

from jforge.lens import ModelLens, from_config

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "jforge" / "configs"
UNITS = {"B": 1, "KB": 1e3, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "x": 1, "%": 0.01}
VERDICTS = ("reproduced", "needs assumption", "differs")
HEAD = """# Published figures, recomputed

What papers, blogs and calculators say of caches, beside what `jforge.lens` finds from the models' `config.json`.
Written by `docs/claims.py` from `docs/claims.toml`, which has the source of each figure; `tests/test_claims.py`
recomputes all of them. A figure is *reproduced* when ours, rounded as it is, is the same; it *needs an assumption* when
it is the same only with what the last column says; otherwise it *differs*, and the last column says from where.

| model | the source says | ours | verdict | |
|---|---|---|---|---|
"""


def load() -> tuple[list[dict], dict[str, dict]]:
    """The claims, and the models that they bring along."""
    data = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))
    return data["claim"], data["models"]


def lens(name: str, models: dict[str, dict], changed: dict | None = None) -> ModelLens:
    """A model that ships or stands in the file, with some keys changed; "null" is JSON's."""
    config = models.get(name) or json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "source"} | (changed or {})
    return from_config({key: None if value == "null" else value for key, value in config.items()})


def recompute(claim: dict, models: dict[str, dict], *, assume: bool) -> float:
    """Our value in the claim's unit; assume: with its `config`, `bits` and `eight_bits`."""
    model = lens(claim["model"], models, claim.get("config") if assume else None)
    share = claim.get("bits", 16) / 16 if assume else 1
    sizes = {"context": claim.get("context", 1024), "batch": claim.get("batch", 1), "dtype": claim.get("dtype")}
    of = share * float(model.cost(**sizes).per_token)
    if claim["quantity"] == "stored":
        mesh = claim.get("mesh")
        stored = model.stored(**sizes)
        of = model.stored_per_device(mesh, **sizes) if mesh else sum(stored.values())
        of -= sum(stored[name] / 2 for name in claim.get("eight_bits", ()) if assume)
    if claim["quantity"] in ("saved", "ratio"):
        other = lens(claim["against"], models)
        if claim["quantity"] == "saved":
            of = 1 - of / float(other.cost(**sizes).per_token)
        else:
            of = sum(other.stored(**sizes).values()) / sum(model.stored(**sizes).values())
    return of / UNITS[claim["unit"]]


def agrees(value: float, ours: float) -> bool:
    """Whether ours, rounded to the decimals that the published value has, is that value."""
    decimals = len(repr(value).partition(".")[2]) if isinstance(value, float) else 0
    half = 0.5 * 10.0**-decimals
    return abs(value - ours) <= half * (1 + 1e-9)


def page() -> str:
    claims, models = load()
    rows = []
    for claim in claims:
        ours = recompute(claim, models, assume=False)
        assumed = recompute(claim, models, assume=True)
        shown = f"{ours:,.6g} {claim['unit']}" + (f", assumed {assumed:,.6g}" if assumed != ours else "")
        says = f"{claim['says']} ({claim['source']})"
        rows.append(f"| {claim['model']} | {says} | {shown} | {claim['verdict']} | {claim.get('why', '')} |")
    reproduced, assumed, differs = (sum(c["verdict"] == v for c in claims) for v in VERDICTS)
    counts = f"{reproduced} reproduced, {assumed} with an assumption, {differs} otherwise"
    return HEAD + "\n".join(rows) + f"\n\n{len(claims)} figures: {counts}.\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    path, text = HERE / "claims.md", page()
    if parser.parse_args(argv).check:
        return int(not path.exists() or path.read_text(encoding="utf-8") != text)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
