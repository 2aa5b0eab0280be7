"""The explorer's page: one file that loads nothing, filled from page.html, page.css, the scripts and the data."""

import json
import re
from importlib.resources import files

from jforge import slots
from jforge.explorer import data as facts
from jforge.explorer import panel

NAMES = {".": "empty", "-": "kept"}  # of letters that cannot stand in the name of a style
LIMIT = 2 * 2**20
"""Bytes that a page may have."""


def render(data: dict) -> str:
    """The page that shows `facts.build()`, or some of its mechanisms; the same for the same data."""
    colours = {NAMES.get(letter, letter): slots.KINDS[code][2] for code, letter in facts.LETTERS.items()}
    css = _fill(_part("page.css"), colours=" ".join(f"--kind-{name}: {colour};" for name, colour in colours.items()))
    known = {
        "version": data["version"],
        "steps": data["steps"],
        "last": data["steps"] - 1,
        "toy_dtype": data["toy_dtype"],
    }
    return _fill(
        _part("page.html"), css=css, data=_json(data), offer=_json(panel.data()), rules=_rules(), js=_scripts(), **known
    )


def _json(data: dict) -> str:
    """Without the end of the script around it."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")


def _rules() -> str:
    """The translated lens after what it needs of Python."""
    return "\n".join((_part("translate/numbers.js"), _part("translate/python.js"), panel.rules()))


def _scripts() -> str:
    return "\n".join(map(_part, ("parts.js", "json.js", "page.js", "config.js")))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").rstrip()


def _fill(text: str, **values) -> str:
    """`text` with each {{name}} replaced; every value must have its place and every place a value."""
    found = set()

    def value(match: re.Match) -> str:
        found.add(match[1])
        return str(values[match[1]])

    filled = re.sub(r"\{\{(\w+)\}\}", value, text)
    if missing := values.keys() - found:
        raise KeyError(f"the template has no place for {', '.join(sorted(missing))}")
    return filled
