"""What the language does, it does translated: translated.py in Python and in Chromium."""

import inspect

import pytest
import translated

from jforge.explorer.translate import Program

pytestmark = pytest.mark.browser
NAMES = [name for name, made in vars(translated).items()
         if inspect.isfunction(made) and not inspect.signature(made).parameters]  # fmt: skip


@pytest.fixture(scope="module")
def program() -> str:
    made = Program({"jforge.core.config.Described": "null"})
    for name in NAMES:
        made.resolve("tests.browser.translated", name)
    return made.written()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_in_both(shown, program, name):
    found = shown().evaluate(f"(() => {{\n{program}\nreturn std.repr(tests_browser_translated.{name}()); }})()")
    assert found == repr(getattr(translated, name)())
