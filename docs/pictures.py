"""The pictures of docs/pictures.md and README.md: `python docs/pictures.py [FOLDER]` (default docs/pictures).

Beside them data.json has a hash of the numbers that each shows, which stands in the svg too; tests/test_viz.py computes
them anew and says which picture is stale.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jforge
from jforge import lens, viz
from jforge.cli import CONFIGS
from jforge.roofline import DEVICES

FOLDER = Path(__file__).parent / "pictures"
CONTEXT = 131_072
MODELS = {
    "Llama-3.1-8B": "llama-3.1-8b", "MiniMax-M2": "minimax-m2", "Gemma-3-27B": "gemma-3-27b",
    "DeepSeek-V3": "deepseek-v3", "DeepSeek-V3.2": "deepseek-v3.2", "gpt-oss-120b": "gpt-oss-120b",
    "Qwen3-Next-80B": "qwen3-next-80b-a3b", "DeepSeek-V4-Pro": "deepseek-v4-pro", "Mistral-7B": "mistral-7b-v0.1",
}  # fmt: skip
"""{label: shipped config.json}: grouped queries, a latent, windows, picks, states and compression."""
OF_ONE = "one layer of each mechanism's first model, one row of 128k tokens, bfloat16"


def models() -> dict[str, lens.ModelLens]:
    return {label: lens.from_config(CONFIGS[name]) for label, name in MODELS.items()}


def costs(labelled: bool) -> dict[str, jforge.Cost]:
    """One layer of every mechanism's first model; labelled: the key names the model too."""
    found = {}
    for name in jforge.names():
        att = jforge.get(name)
        model, cfg = next(iter(att.models.items()))
        found[f"{name}  {model}" if labelled else name] = att.cost(cfg, context=CONTEXT)
    return found


STRIPS = "lightning", "sliding_window", "chunked_local", "streaming", "gqa", "block_sparse", "csa", "nsa"
FIELDS = "sliding_window", "block_sparse", "dsa", "lightning"
PICTURES = {
    "kept_and_read": lambda: viz.kept_and_read(costs(True), OF_ONE),
    "memory": lambda: viz.memory(models()),
    "read": lambda: viz.read(models()),
    "dsa_context": partial(viz.context, "dsa"),
    "slots": partial(viz.slots, STRIPS),
    "field": partial(viz.receptive_field, FIELDS),
    "roofline": lambda: viz.roofline(costs(False), (DEVICES["h100"], DEVICES["b200"]), OF_ONE),
    "floor": lambda: viz.floor(models(), CONTEXT),
}


def stale(name: str, figure, folder: Path = FOLDER) -> str | None:
    """What is wrong with the stored picture if `figure` is that of today; None if nothing is."""
    data, file = viz.digest(figure), folder / f"{name}.svg"
    if json.loads((folder / "data.json").read_text(encoding="utf-8")).get(name) != data:
        return f"{file.name} is stale: the code draws other numbers; run python docs/pictures.py"
    if f"data {data}" not in file.read_text(encoding="utf-8"):
        return f"{file.name} is not the picture that data.json is of; run python docs/pictures.py"
    return None


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    hashes = {}
    for name, draw in PICTURES.items():
        figure = draw()
        viz.save(figure, folder / f"{name}.svg")
        hashes[name] = viz.digest(figure)
    (folder / "data.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
