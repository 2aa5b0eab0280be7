"""Tables and numbers as plain text."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

COLOURS = {"bold": "1", "dim": "2", "red": "31"}


def width() -> int:
    """Columns of the terminal, or COLUMNS where that is set; 120 where the output goes elsewhere."""
    return shutil.get_terminal_size((120, 24)).columns


def error(value: float | None) -> str:
    """An error in one digit, a count of violations as it is; None stands for one that is not finite."""
    if value is None or value != value:
        return "inf"
    return f"{value:.0e}" if isinstance(value, float) and value else f"{value:.0f}"


def styled(text: str, style: str) -> str:
    """`text` in a style of COLOURS where it goes to a terminal that may show colours."""
    if style not in COLOURS or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[{COLOURS[style]}m{text}\x1b[0m"


def wrapped(line: str, indent: int = 0) -> str:
    """A line folded between words to the width of the terminal, from its second line on indented."""
    return textwrap.fill(line, width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int, room: int | None = None) -> str:
    """The rows in columns, the first `left` of them aligned to the left and numbers to the right. What has no room
    beside the first column comes below, in blocks that repeat it: nothing is cut.

    A title of several lines is one of its column; a cell that starts with "! " is shown in red, without the mark.
    """
    room = width() if room is None else room
    titles = [title.split("\n") for title in columns]
    tall = max(map(len, titles))
    head = [[([""] * (tall - len(t)) + t)[line] for t in titles] for line in range(tall)]
    plain = [*head, *([cell.removeprefix("! ") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in (*blocks[-1], i)) - 2 > room:
            blocks.append([0])
        blocks[-1].append(i)
    lines = []
    for number, block in enumerate(blocks):
        lines += [""] if number else []
        for at, row in enumerate(plain):
            cells = (row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in block)
            marked = at >= tall and [rows[at - tall][i].startswith("! ") for i in block]
            shown = [styled(c, "red") if marked and marked[n] else c for n, c in enumerate(cells)]
            line = "  ".join(shown).rstrip()
            lines.append(styled(line, "bold") if at < tall else line)
    return "\n".join(lines)
