"""The panel of a config.json without a browser: what it says in Python, what it offers, and what is translated."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from types import SimpleNamespace

import pytest

from jforge import cli, hf, lens
from jforge.explorer import panel
from jforge.explorer.translate import Program, literal
from jforge.explorer.translate.statements import Statements

SHIPPED = {name: hf.load(path) for name, path in cli.CONFIGS.items()}


@pytest.fixture(scope="module")
def rules() -> str:
    return panel.rules()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_kinds_add_up_to_the_model(name):
    """Buffer by buffer those of `lens`, in one table with the totals of `jforge lens`."""
    model = lens.from_config(SHIPPED[name])
    for sizes in ({"context": 131_072, "batch": 1, "dtype": None}, {"context": 777, "batch": 5, "dtype": "fp8"}):
        said, cost = panel.answer(SHIPPED[name], **sizes), model.cost(**sizes)
        row = said["data"]["rows"][0]
        for what in ("stored", "written", "read"):
            found = [n for kind in said["kinds"] for n in kind["bytes"][what]]
            assert sum(found) == sum(getattr(cost, what).values()) == row[what]
        assert len(said["kinds"]) == len(model.kinds)
        for kind, (layer, count) in zip(said["kinds"], model.kinds.items(), strict=True):
            stored = layer.stored(**sizes)
            names = [buffer["name"] for buffer in kind["buffers"]]
            assert {n: b for n, b in zip(names, kind["bytes"]["stored"], strict=True) if b} == {
                n: count * b for n, b in stored.items()
            }


def test_it_says_what_the_command_prints(capsys):
    for name in ("gemma-4-e4b", "deepseek-v4-flash", "qwen3-next-80b-a3b"):
        assert cli.main(["lens", str(cli.CONFIGS[name]), "--context", "128k", "--device", panel.CARD]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        said = panel.answer(SHIPPED[name], 131_072, 1)
        first = said["first"].removeprefix(said["data"]["model_type"])
        assert all(line in printed for line in (first, said["counted"], *said["lines"]))
        step = re.fullmatch(r"1 row of 131,072 tokens: stored (.*); a step reads (.*), writes (.*), and takes at least "
                            r"(.*) on (.*)\.", said["step"])  # fmt: skip
        assert f"131,072 1 {step[1]} {step[2]} {step[3]} {step[4]}" in printed and f"on {step[5]}" in printed


def test_it_offers_what_is_shipped():
    offered = panel.data()
    assert {name: json.loads(text) for name, text in offered["examples"].items()} == SHIPPED
    assert offered["first"] in offered["examples"]
    assert {lens.dtype_of(name) for name in offered["dtypes"]} == set(map(lens.dtype_of, lens.DTYPES))
    assert len(offered["dtypes"]) == len(set(lens.DTYPES.values()))


def test_a_refusal_is_pythons():
    with pytest.raises(NotImplementedError, match="^model_type 'gpt_next' is not known"):
        panel.answer({"model_type": "gpt_next"}, 1, 1)
    with pytest.raises(ValueError, match="^context is 0; it must be a positive integer$"):
        panel.answer(SHIPPED["llama-3.1-8b"], 0, 1)


# --- the translation


def test_the_same_tree_gives_the_same_rules(rules):
    """Whatever the order of sets, which another process has."""
    command = [sys.executable, "-c", "from jforge.explorer import panel; print(panel.rules())"]
    other = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout == rules + "\n"


def test_every_family_is_in_the_rules_and_no_computation(rules):
    assert all(f"[{json.dumps(name)}, " in rules for name in hf.config.FAMILIES)
    assert not re.search(r"einsum|std\.np\b", rules)


def test_methods_of_texts_and_lists_are_there(rules):
    """What the translation asks of any object and only a text or a list has."""
    asked = set(re.findall(r'"([a-z]+)"\)\(', rules)) - {"index"}  # that one is a field
    text = files("jforge.explorer.translate").joinpath("python.js").read_text(encoding="utf-8")
    known = set(
        re.findall(
            r"^  (\w+): \(|[,{] (\w+): \(", text[text.index("const STRINGS") : text.index("function attr")], re.M
        )
    )
    needed = {name for name in asked if hasattr(str, name) or hasattr(list, name)} - set(dir(dict))
    assert len(needed) > 5 and needed <= {name for pair in known for name in pair}


UNKNOWN = {
    "match x:\n    case 1:\n        pass": "Match", "for i in x:\n    pass\nelse:\n    pass": "For",
    "try:\n    pass\nfinally:\n    pass": "Try", "with x:\n    pass": "With", "while x:\n    break": "Break",
    "@x.y\ndef f():\n    pass": "FunctionDef", "async def f():\n    pass": "AsyncFunctionDef", "assert x": "Assert",
    "y = x[::2]": "Subscript", "x[0], y = z": "Subscript", "y = x @ x": "BinOp", "y = ~x": "UnaryOp",
    "y = ...": "Constant", "y = b'x'": "Constant",
}  # fmt: skip


@pytest.mark.parametrize("code", UNKNOWN)
def test_syntax_that_is_not_known_is_named(code):
    source = SimpleNamespace(name="some.module", object="some_module", bound={}, imports={})
    program = SimpleNamespace(
        resolve=lambda module, name: name, module_of=lambda module, name: None, ask=lambda name: None
    )
    with pytest.raises(NotImplementedError, match=rf"^some\.module, line \d: {UNKNOWN[code]} has no translation$"):
        Statements(program, source).visit(ast.parse(code).body[0])


def test_only_what_is_reached_is_translated():
    program = Program({})
    assert program.resolve("jforge.hf.keys", "integer") == "jforge_hf_keys.integer"
    text = program.written()
    assert "jforge_core_config.positive_int = " in text and "jforge_hf_keys.rope_of" not in text
    replaced = Program({"jforge.core.config.positive_int": "mine"})
    replaced.resolve("jforge.hf.keys", "integer")
    assert "mine(key, value)" in replaced.written() and "jforge_core_config" not in replaced.written()


def test_plain_data_is_written_as_javascript():
    found = literal({"a": [1, -2.5, True, None, "</script>"], "b": float("inf")})
    assert found == 'std.dict([["a", [1n, -2.5, true, null, "</script>"]], ["b", Infinity]])'
    with pytest.raises(TypeError, match="a set is no plain data"):
        literal({1})
