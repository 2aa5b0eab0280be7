"""The explorer's page in Chromium: no errors, Python's numbers at drawn settings, keys, and what axe-core finds.

Run by `make test-browser`. Chromium is the system's own; playwright drives it and downloads nothing.
"""

import json
import random
import re

import jax.numpy as jnp
import pytest

import jforge
from jforge.explorer import data as facts
from jforge.report import size

pytestmark = pytest.mark.browser
LETTERS = """(box) => [...box.querySelectorAll('.slots')].map((strip) =>
    [...strip.children].map((cell) => cell.dataset.letter).join(''))"""


@pytest.fixture(scope="module")
def data(file) -> dict:
    text = file.read_text(encoding="utf-8")
    made = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [one["name"] for one in made["mechanisms"]] == list(jforge.names())
    return made


def rows(tab, table: str) -> list[list[int]]:
    """The bytes in a table, the sum's row last."""
    read = "(t) => [...t.rows].slice(1).map((r) => [...r.querySelectorAll('td[data-bytes]')].map((c) => c.textContent))"
    return [
        [int(cell.replace(",", "").removesuffix(" B")) for cell in row] for row in tab.locator(table).evaluate(read)
    ]


def summed(bytes_of: list[dict[str, int]], names: list[str]) -> list[list[int]]:
    """Of (stored, written, read): a row a buffer, and their sums."""
    each = [[moved.get(n, 0) for moved in bytes_of] for n in names]
    return [*each, [sum(column) for column in zip(*each, strict=True)]]


def test_stepping_gives_pythons_values_at_30_drawn_settings(shown, data):
    """Letters are those of the experiment; bytes are asked of `cost` anew. By drop-downs and keys, as a reader does."""
    draw, tab = random.Random(0), shown()
    for number in range(30):
        side, one = "ab"[number % 2], draw.choice(data["mechanisms"])
        att, setting = jforge.get(one["name"]), draw.randrange(len(one["settings"]))
        tab.select_option(f"#{side}-name", label=one["name"])
        tab.select_option(f"#{side}-setting", index=setting)
        tab.locator("h1").click()  # so that keys are the page's
        step = draw.randrange(1, facts.STEPS)
        tab.keyboard.press("End" if step > 31 else "Home")
        for _ in range(63 - step if step > 31 else step):
            tab.keyboard.press("ArrowLeft" if step > 31 else "ArrowRight")
        assert tab.locator("#position").text_content().startswith(f"{step} ({step + 1} tokens")

        groups = one["settings"][setting]["groups"]
        assert tab.locator(f"#{side}-strips").evaluate(LETTERS) == [group["steps"][step] for group in groups]
        cfg = list(facts.configs(att).values())[setting]
        closes = any("e" in group["steps"][step] for group in groups)
        cost = att.cost(cfg, context=step + 1, dtype=jnp.bfloat16, closing=closes)
        want = summed([cost.stored, cost.written, cost.read], list(att.cache_spec(cfg)))
        assert rows(tab, f"#{side}-bytes table") == want
        bars = tab.locator(f"#{side}-meters b").all_text_contents()
        assert bars == [size(count) for count in want[-1]]

        model, context = draw.choice(list(att.models)), draw.choice(facts.CONTEXTS)
        batch, dtype = draw.choice((1, 7, 64, 4096)), draw.choice(facts.DTYPES)
        tab.select_option(f"#{side}-model", label=model)
        tab.select_option("#context", label=f"{context:,}")
        tab.select_option("#dtype", label=dtype)
        tab.fill("#batch", str(batch))
        cost = att.cost(att.models[model], context=context, batch=batch, dtype=jnp.dtype(dtype))
        want = summed([cost.stored, cost.written, cost.read], list(att.cache_spec(att.models[model])))
        assert rows(tab, f"#{side}-model-box table") == want
        assert tab.locator(f"#{side}-model-box .meters b").all_text_contents() == [size(count) for count in want[-1]]


def test_what_a_step_says(shown):
    """By hand: chunks of 16 at their edge, and a ring of 16 beside them."""
    tab = shown(view="#a=chunked_local&b=sliding_window&token=32")
    said = tab.locator("#a-said").text_content()
    assert said == "Token 32: writes 64 B, reads 64 B of 1,024 B stored. k, v lose tokens 16 to 31."
    assert tab.locator("#a-strips .did").text_content() == "writes slot 0 over token 16; 15 slots left over"
    assert tab.locator("#b-said").text_content().endswith("stored. k, v lose token 16.")
    assert tab.locator("#b-strips .did").text_content() == "writes slot 0 over token 16; reads all 15 from before"
    numbers = tab.locator("#b-strips .slot small").all_text_contents()
    assert numbers == ["32", *(str(token) for token in range(17, 32))]


def test_a_view_is_kept_in_its_address(shown):
    tab = shown(view="#a=dsa&b=hca&token=40&rows=3&context=4096&dtype=float32&b-sizes=1")
    assert tab.locator("#b-setting").input_value() == "1" and tab.locator("#batch").input_value() == "3"
    tab.keyboard.press("ArrowRight")
    tab.reload()
    assert tab.locator("#position").text_content().startswith("41 ")
    assert tab.locator("#a-name option:checked").text_content() == "dsa"
    nonsense = shown(view="#a=nothing&token=99&rows=-1&context=5&dtype=int3&a-sizes=x")
    assert nonsense.locator("#a-name option:checked").text_content() == "gqa"


def test_a_number_of_rows_that_is_none_is_refused_in_one_line(shown):
    tab = shown()
    before = tab.locator("#a-model-box").text_content()
    for bad in ("0", "2.5", "", "5000"):
        tab.fill("#batch", bad)
        assert (
            tab.locator("#batch-error").text_content() == f'Rows is "{bad}"; it must be a whole number from 1 to 4096.'
        )
        assert tab.locator("#a-model-box").text_content() == before
    tab.fill("#batch", "2")
    assert tab.locator("#batch-error").text_content() == "" and "2 rows" in tab.locator("#a-model-box").text_content()


def test_keys_alone_reach_everything(shown):
    """Tab visits each control once, in the order of the page, with an outline; the slider has its own keys."""
    tab, order = shown(), []
    for _ in range(60):
        tab.keyboard.press("Tab")
        name, outline = tab.evaluate(
            "(e => [e.id || e.tagName, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        if name == "BODY":
            break
        assert outline == "solid", name
        order.append(name)
    ids = [name for name in order if name not in ("DIV", "PRE")]
    assert ids == ["back", "step", "on", "a-name", "a-setting", "b-name", "b-setting", "context", "batch", "dtype",
                   "a-model", "b-model", "config-example", "config-file", "config-context", "config-batch",
                   "config-dtype", "config-encoder", "config-text"]  # fmt: skip
    tab.focus("#step")
    for key, at in (("Home", 0), ("ArrowRight", 1), ("End", 63), ("ArrowRight", 63), ("ArrowLeft", 62)):
        tab.keyboard.press(key)
        assert tab.locator("#position").text_content().startswith(f"{at} ")


@pytest.mark.parametrize("width", [390, 320])
def test_a_narrow_screen_does_not_scroll_sideways(shown, data, width):
    tab = shown(width)
    for one in data["mechanisms"]:
        tab.select_option("#a-name", label=one["name"])
        assert tab.evaluate("document.documentElement.scrollWidth") == width, one["name"]


@pytest.mark.parametrize("width,scheme", [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_axe_finds_no_serious_violation(shown, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    for view in ("", "#a=chunked_local&b=nsa&token=36", "#a=mamba2&b=streaming&token=63"):
        found = Axe().run(shown(width, scheme, view)).response["violations"]
        bad = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        assert bad == []


def test_the_checks_see_what_they_look_for(chromium, tmp_path):
    """A page with an image that has no text is found by the same axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    file = tmp_path / "bad.html"
    file.write_text('<!doctype html><html lang="en"><title>t</title><img src="data:,"></html>')
    with chromium.new_context() as context:
        tab = context.new_page()
        tab.goto(file.as_uri())
        assert "image-alt" in [v["id"] for v in Axe().run(tab).response["violations"] if v["impact"] == "critical"]


def test_what_is_scanned_is_seen_to_be_read_whole(data):
    """Buffers that cost has read whole in every step, in everything watched; lists of heads, which may overlap, are not
    among them. One entry that is alone has nothing to be preferred to, so nothing shows.
    """
    scanned = 0
    for one in data["mechanisms"]:
        for setting in one["settings"]:
            names, cost = [buffer["name"] for buffer in setting["buffers"]], setting["cost"]
            for group in setting["groups"]:
                i = names.index(group["buffers"][0])
                if all(read[i] == stored[i] for read, stored in zip(cost["read"], cost["stored"], strict=True)):
                    scanned += 1
                    for row in group["steps"]:
                        assert "-" not in row or (row.count("-") == 1 and "r" not in row), (
                            one["name"],
                            group["buffers"],
                            row,
                        )
    assert scanned > len(data["mechanisms"])
