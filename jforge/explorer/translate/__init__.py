"""A part of jforge's Python as JavaScript: what some functions need, and nothing else.

    program = Program({"jforge.core.softmax.wider": "std.wider"})
    program.resolve("jforge.lens", "from_config")     # "jforge_lens.from_config"
    program.written()                                 # the JavaScript in which that name means something

The rules by which a config.json becomes bytes are Python, and the page needs them where there is no Python. They are
not written a second time: the functions, classes and constants that the resolved ones reach are translated, statement
by statement, when the page is made. What the language brings (integers of any size, dicts, dataclasses) and what is
called of its library is in python.js, `std` in the translation; numbers.js has its arithmetic.

Syntax that those files do not use is refused with its place, a NotImplementedError. Annotations and docstrings are left
out. So are functions that take arrays or `Weights`: null stands in their place, and nothing calls them.
"""

from jforge.explorer.translate.expressions import literal
from jforge.explorer.translate.program import Program

__all__ = ["Program", "literal"]
