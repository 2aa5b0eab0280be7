"""The panel of a config.json in Chromium: what it answers and refuses is what Python does, word for word.

The page's own function is asked directly, which is what the form shows; the form is tried at the end.
"""

import json
import random
import re

import lens_types
import pytest
import test_lens
from test_lens_keys import KEYS, TYPES, file_with

from jforge import cli, lens
from jforge.explorer import panel
from jforge.hf.config import load
from jforge.hf.families import MISSING

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("untyped")]  # refusals are the product's own
SIZES = [(131_072, 1, None, None), (5_000, 3, "fp8", None), (17, 64, "float32", None)]
"""context, batch, dtype, tokens of an encoder."""
ASK = """(cases) => cases.map(([text, ...sizes]) => {
    try { return jforge.answer(text, ...sizes); } catch (error) { return { refused: error.message }; }
}).map((said) => JSON.stringify(said, (_, x) => typeof x === "bigint" ? JSON.rawJSON(x) : x))"""
SHIPPED = {name: load(path) for name, path in cli.CONFIGS.items()}
REFUSED = {"blt", "gemma4_unified_assistant", "openai-gpt", "pi0", "reformer", "unlimited_ocr", "xlm", "xlnet"}
NAMES = sorted({*lens_types.CAUSAL, *lens_types.IMAGE_TEXT, *TYPES} - {"gemma4_assistant"})  # its class builds none


@pytest.fixture
def page(shown):
    """asked(cases): what the page says of each (config, context, batch, dtype, tokens of an encoder)."""
    tab = shown()

    def ask(cases: list[tuple]) -> list[dict]:
        given = [[config if isinstance(config, str) else json.dumps(config), *sizes] for config, *sizes in cases]
        return [json.loads(said) for said in tab.evaluate(ASK, given)]

    return ask


def python(config, *sizes) -> dict:
    """The same of Python, as the page's JSON has it."""
    try:
        return json.loads(json.dumps(panel.answer(config, *sizes)))
    except (ValueError, NotImplementedError) as problem:
        return {"refused": str(problem)}


def written(name: str) -> dict:
    """The file that transformers writes of a type's default config."""
    return json.loads(lens_types.config_of(name).to_json_string())


def compare(page, cases: list[tuple]) -> list[dict]:
    """Ask both sides; what they agree on."""
    found = page(cases)
    for case, ours in zip(cases, found, strict=True):
        assert ours == python(*case), case
    return found


def test_every_shipped_file(page):
    """At sizes around a window, a chunk and a block too, in every dtype."""
    cases = [(config, *sizes) for config in SHIPPED.values() for sizes in SIZES]
    more = [(*SIZES[0][:2], dtype, None) for dtype in panel.data()["dtypes"]]
    more += [(context, 2, None, None) for context in (1, 128, 129, 1025, 8193)]
    cases += [(SHIPPED[name], *sizes) for name in SHIPPED for sizes in more]
    found = compare(page, cases)
    assert not any("refused" in said for said in found)
    assert found[0]["data"]["rows"][0]["stored"] == sum(lens.from_config(cases[0][0]).stored(context=131_072).values())


@pytest.mark.pinned
def test_every_type_of_transformers(page):
    cases = [(written(name), *sizes) for name in NAMES for sizes in SIZES[:2]]
    found = compare(page, cases)
    refused = {case[0]["model_type"] for case, said in zip(cases, found, strict=True) if "refused" in said}
    assert refused == REFUSED
    assert len(NAMES) == 304 and sum("refused" not in said for said in found) == 296 * 2


@pytest.mark.pinned
@pytest.mark.parametrize("keys", [keys for keys in KEYS if keys != "none"])
def test_keys_that_a_cache_obeys(page, keys):
    """Windows, chunks, lists and single layers in every type, whose answer or refusal is Python's."""
    files = [json.dumps(file_with(lens_types.config_of(name), KEYS[keys]), default=str) for name in TYPES]
    finite = [text.replace("Infinity", "1e9") for text in files]  # limits of a time step, of no cache
    cases = [(json.loads(text), *SIZES[1]) for text in finite]
    found = compare(page, cases)
    assert sum("refused" in said for said in found) < len(found) // 2


@pytest.mark.pinned
def test_models_that_read_an_encoder(page):
    names = ["bart", "blip", "mllama", "musicgen", "prophetnet", "t5gemma2", "udop", "whisper", "llama"]
    cases = [(written(name), 8192, 2, None, tokens) for name in names for tokens in (1500, 7)]
    found = compare(page, cases)
    assert ["refused" in said for said in found] == [False] * 16 + [True] * 2
    assert all(any("cross" in kind["title"] for kind in said["kinds"]) for said in found[:16])


WHISPER = {"model_type": "whisper", "d_model": 64, "decoder_layers": 3, "decoder_attention_heads": 4}
VALUES = (None, 0, -1, 1.5, 7.0, "x", "true", True, False, 2, 3, 64, [], {}, [1], {"a": 1}, 10**20)


def test_a_key_that_is_missing_or_wrong(page):
    """Each shipped file without one of its keys, and with another value for it, drawn."""
    draw, cases = random.Random(0), []
    for config in SHIPPED.values():
        part = config.get("text_config", config)
        changed = [{**part, key: value} for key in part for value in draw.sample(VALUES, 1)]
        changed += [{k: v for k, v in part.items() if k != key} for key in part]
        cases += [({**config, "text_config": one} if part is not config else one, *SIZES[0]) for one in changed]
    found = compare(page, cases)
    assert len(cases) > 1000 and 0.2 < sum("refused" in said for said in found) / len(cases) < 0.8


def test_what_has_no_cache_or_an_unknown_one(page):
    """The configs of tests/test_lens.py, and types without a family: Python's line."""
    cases = [(config, *SIZES[0]) for config, _ in test_lens.CONFIGS.values()]
    cases += [({"model_type": name}, *SIZES[0]) for name in MISSING]
    for said in compare(page, cases):
        test_lens.one_line(ValueError(said["refused"]))


TEXTS = [
    '{"a": 1.0}', '{"a": 1e2}', '{"a": 1E+2, "b": -0.5e-3}', '{"a": [0, -1, 12345678901234567890]}', '{"a": 0.1}',
    '{"a": {"b": [true, false, null, {}, []]}}', '\ufeff{"a": "\\u00e9\\n\\"it\'s\\""}', ' {\t"a"\r\n:\n"" } ',
    '{"a": 1e22}', '{"a": 123456789012345680000.0}', '{"a": 1e-320}', '{"a": -0.0}', '{"a": 1e300}',
    '{"a": .5}', '{"a": 01}', '{"a": 1.}', '{"a": +1}', '{"a": -}', '{"a": "\t"}', '{"a": "\\x"}', "{} {}", '{"a" 1}',
    "{a: 1}", '{"a": 1,}', '{,}', '{"a": tru}', '{"a": -Infinity}', '{"a": 1e309}', '{"a": 123456789012345678901.0}',
    '{"a": constructor}', '{"a": 1e-324}', '{"a": 1, "a": 1}', '{"a": "', "[", "]", "{", "nul",
]  # fmt: skip


def test_json_is_read_as_python_reads_it(shown, tmp_path):
    """The same value, whole numbers told from others, or a refusal."""

    def read(text: str) -> str | None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        try:
            return repr(load(tmp_path / "config.json"))
        except ValueError:
            return None

    said = "(texts) => texts.map((text) => { try { return std.repr(json.parse(text)); } catch { return null; } })"
    assert shown().evaluate(said, TEXTS) == [read(text) for text in TEXTS]
    assert 10 < sum(read(text) is not None for text in TEXTS) < 16


def test_nothing_that_is_asked_of_python_is_missing(shown):
    """Every `std` and `std.math` of the translation."""
    missing = """([names, functions]) => [...names.filter((name) => !(name in std)),
        ...functions.filter((name) => !(name in std.math))]"""
    rules = panel.rules()
    names, functions = (sorted(set(re.findall(rf"\b{where}\.(\w+)", rules))) for where in ("std", r"std\.math"))
    assert len(names) > 60 and len(functions) > 4
    assert shown().evaluate(missing, [names, functions]) == []


# --- the form


def shows(tab) -> dict:
    """What the panel says now."""
    line = "(id) => document.getElementById(id).textContent"
    said = {name: tab.evaluate(line, f"config-{name}") for name in ("error", "first", "step", "counted")}
    return said | {"hidden": tab.locator("#config-answer").is_hidden()}


def answered(tab) -> None:
    tab.wait_for_function("document.getElementById('config-error').textContent === ''")
    assert tab.locator("#config-answer").is_visible()


def refused(tab) -> str:
    """The one line that stands in the place of an answer."""
    tab.wait_for_function("document.getElementById('config-error').textContent !== ''")
    said = shows(tab)
    assert said["hidden"] and "\n" not in said["error"]
    return said["error"]


def test_the_form_shows_the_answer(shown):
    tab = shown()
    assert shows(tab)["first"] == panel.answer(SHIPPED[panel.FIRST], 131_072, 1)["first"]
    tab.select_option("#config-example", label="llama-3.1-8b")
    assert shows(tab)["first"] == "llama: 131,072 B a token, nothing fixed, bfloat16 cache"
    tab.fill("#config-text", json.dumps(SHIPPED["gemma-3-27b"]))
    tab.wait_for_function("document.getElementById('config-first').textContent.startsWith('gemma3_text')")
    assert tab.locator("#config-example").input_value() == "0"
    tab.fill("#config-context", "5000")
    tab.fill("#config-batch", "7")
    tab.select_option("#config-dtype", label="fp8")
    want = panel.answer(SHIPPED["gemma-3-27b"], 5000, 7, "fp8")
    assert {name: shows(tab)[name] for name in ("first", "step", "hidden")} == {
        "first": want["first"], "step": want["step"], "hidden": False
    }  # fmt: skip
    cells = tab.locator("#config-table td[data-bytes]").evaluate_all("(all) => all.map((cell) => cell.textContent)")
    buffers = [list(row) for kind in want["kinds"] for row in zip(*kind["bytes"].values(), strict=True)]
    total = [sum(column) for column in zip(*buffers, strict=True)]
    assert cells == [f"{count:,} B" for row in [*buffers, total] for count in row]
    assert tab.locator("#config-table tr.kind").all_text_contents() == [kind["title"] for kind in want["kinds"]]
    assert tab.locator("#config-lines li").all_text_contents() == want["lines"]
    row = want["data"]["rows"][0]
    assert total == [row["stored"], row["written"], row["read"]]


@pytest.mark.parametrize("name", test_lens.FILES)
def test_a_file_that_is_no_config(shown, name):
    tab, content = shown(), test_lens.FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    tab.set_input_files("#config-file", {"name": "config.json", "mimeType": "application/json", "buffer": content})
    assert len(refused(tab)) < 400


def test_a_file_is_read(shown):
    tab, content = shown(), (cli.CONFIGS["qwen3-8b"]).read_bytes()
    tab.set_input_files("#config-file", {"name": "config.json", "mimeType": "application/json", "buffer": content})
    tab.wait_for_function("document.getElementById('config-first').textContent.startsWith('qwen3')")
    answered(tab)


@pytest.mark.parametrize("field,name", [("context", "Tokens in each row"), ("batch", "Rows")])
def test_a_size_that_is_none_is_refused_in_one_line(shown, field, name):
    tab = shown()
    for bad in ("0", "2.5", "", "-3", "9999999999999"):
        tab.fill(f"#config-{field}", bad)
        assert refused(tab).startswith(f'{name} is "{bad}"; it must be a whole number from 1 to ')
    tab.fill(f"#config-{field}", "12")
    answered(tab)


def test_tokens_of_an_encoder(shown):
    tab = shown()
    tab.fill("#config-encoder", "1500")
    assert refused(tab) == "encoder_tokens is 1500; it must be None: gemma3_text keeps no keys of an encoder"
    tab.fill("#config-text", json.dumps(WHISPER))
    answered(tab)
    assert shows(tab)["first"] == panel.answer(WHISPER, 131_072, 1, None, 1500)["first"]
    tab.fill("#config-encoder", "")
    answered(tab)
    assert shows(tab)["first"] == panel.answer(WHISPER, 131_072, 1)["first"]


def test_a_refusal_follows_and_goes(shown):
    """No old number stays beside the line, and the next text is answered."""
    tab = shown()
    for text, says in (("{", "the text is not JSON: line 1: "), ("", "There is no config.json yet"),
                       ('{"model_type": "gpt_next"}', "model_type 'gpt_next' is not known")):  # fmt: skip
        tab.fill("#config-text", text)
        tab.wait_for_function(
            "(says) => document.getElementById('config-error').textContent.startsWith(says)", arg=says
        )
        refused(tab)
        tab.select_option("#config-example", label="llama-3.1-8b")
        answered(tab)


def test_a_long_line_does_not_scroll_sideways(shown):
    tab = shown(390)
    tab.fill("#config-text", json.dumps({"model_type": "gpt_next", "num_hidden_layers": 2}))
    refused(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
