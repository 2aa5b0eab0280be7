"""What a figure shows, read back from its artists: numbers and names, without looks."""

import hashlib
import json
from typing import Any

import numpy as np


def drawn(figure) -> dict[str, Any]:
    """{"question", "axes": a list of {"title", "lines": {label: [x, y]}, "points": {label: [[x, y]]}, "images"}}.

    Artists without a label are decoration and left out. Of an image of codes the codes are given, of one of
    magnitudes where it is not 0: their last digits are the machine's.
    """
    return {"question": question(figure), "axes": [_axes(ax) for ax in figure.axes]}


def question(figure) -> str:
    """What the figure answers: its title."""
    return figure.get_suptitle().strip()


def digest(figure) -> str:
    """A hash of what is drawn; floats count to six digits."""
    text = json.dumps(drawn(figure), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _axes(ax) -> dict[str, Any]:
    lines = {line.get_label(): [*map(_numbers, line.get_data())] for line in ax.lines if _named(line)}
    points = {c.get_label(): _numbers(c.get_offsets()) for c in ax.collections if _named(c)}
    images = {image.get_label(): _cells(image.get_array()) for image in ax.images if _named(image)}
    found = {"title": ax.get_title(loc="left"), "lines": lines, "points": points, "images": images}
    return {key: value for key, value in found.items() if value}


def _named(artist) -> bool:
    return not str(artist.get_label()).startswith("_")


def _numbers(values) -> list:
    """Whole numbers as they are, others to six digits."""

    def plain(value):
        if isinstance(value, list):
            return [plain(one) for one in value]
        return int(value) if value == int(value) else float(f"{value:.6g}")

    return plain(np.asarray(values, np.float64).tolist())


def _cells(array) -> list[str]:
    """A row of an image as a word: a digit a cell."""
    array = np.ma.asarray(array)
    codes = array.filled(0) if array.dtype.kind in "iu" else ~np.ma.getmaskarray(array)
    return ["".join(str(int(code)) for code in row) for row in codes]
