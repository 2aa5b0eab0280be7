"""Pictures of caches: each function answers one question and returns a matplotlib Figure; nothing is drawn by hand.

    figure = memory({"llama": lens.from_config("config.json")}, CONTEXTS)      # also read, floor
    figure = kept_and_read({"gqa": att.cost(cfg, context=131_072)})            # also roofline
    figure = context("dsa")                              # one mechanism: also slots, receptive_field
    save(figure, "picture.svg")

Numbers come from `jforge.lens`, `Attention.cost` and the traffic of the traced step; slots and receptive fields from
experiments on small layers. `drawn(figure)` reads back what a figure shows, `digest(figure)` is a hash of that.
matplotlib (extra `viz`) is imported by the first picture.
"""

from jforge.viz.costs import kept_and_read, roofline
from jforge.viz.data import digest, drawn
from jforge.viz.field import receptive_field
from jforge.viz.growth import CONTEXTS, context, memory, read
from jforge.viz.steps import floor
from jforge.viz.strips import slots
from jforge.viz.style import save

__all__ = [
    "CONTEXTS", "context", "digest", "drawn", "floor", "kept_and_read", "memory", "read", "receptive_field", "roofline",
    "save", "slots",
]  # fmt: skip
