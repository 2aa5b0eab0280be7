"""The explorer's data against caches and cost, its page as one small file, and its command."""

import json
import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

import jforge
from jforge import cli, slots
from jforge.explorer import data as facts
from jforge.explorer import page

SOME = ("gqa", "chunked_local", "hca")


@pytest.fixture(scope="module")
def built() -> dict:
    return facts.build(names=SOME)


def usual(data: dict, name: str) -> dict:
    return next(one for one in data["mechanisms"] if one["name"] == name)["settings"][0]


def each(data: dict):
    """(Attention, Config, setting) of everything watched."""
    for one in data["mechanisms"]:
        att = jforge.get(one["name"])
        for cfg, setting in zip(facts.configs(att).values(), one["settings"], strict=True):
            yield att, cfg, setting


def test_stored_bytes_are_those_of_real_caches(built):
    for att, cfg, setting in each(built):
        for step in (0, 15, 16, 63):
            cache = att.init_cache(cfg, 1, step + 1, jnp.bfloat16)
            sizes = [getattr(cache, buffer["name"]).nbytes for buffer in setting["buffers"]]
            assert setting["cost"]["stored"][step] == sizes


def test_written_bytes_are_the_slots_that_the_experiment_saw_written(built):
    """Of buffers with slots, which a step writes one by one; in hca a step that completes an entry writes it too."""
    for att, cfg, setting in each(built):
        spec, names = att.cache_spec(cfg), [buffer["name"] for buffer in setting["buffers"]]
        for group in setting["groups"]:
            for n in group["buffers"]:
                slot = spec[n].slot_bytes("bfloat16") if spec[n].has_slots else None
                for step, row in enumerate(group["steps"] if slot else ()):
                    seen = sum(letter in "wxe" for letter in row)
                    assert setting["cost"]["written"][step][names.index(n)] == seen * slot, (n, step)


def test_a_chunk_is_left_behind_at_once(built):
    """C = 16. At token 32 the new one takes slot 0, and no step reads the other 15 again until they are written."""
    steps = usual(built, "chunked_local")["groups"][0]["steps"]
    assert steps[31:34] == ["r" * 15 + "w", "x" + "d" * 15, "rw" + "d" * 14]
    assert steps[63] == "r" * 15 + "w" and steps[0] == "w" + "." * 15


def test_an_entry_of_hca_is_complete_with_its_last_token(built):
    setting = usual(built, "hca")
    entries = next(group for group in setting["groups"] if group["buffers"] == ["c_kv"])
    assert entries["kept"] == "an entry for every 4 tokens" and entries["slots"] == 16
    assert [step for step, row in enumerate(entries["steps"]) if "e" in row] == list(range(3, 64, 4))
    assert setting["label"] == "sliding_window 16, compress_rate 4"


@pytest.mark.parametrize("name", jforge.names())
def test_every_mechanism_has_sizes_at_which_something_happens(name):
    """Its own file is not asked: a Config of the shared sizes, and others that change what steps do."""
    att = jforge.get(name)
    found = facts.configs(att)
    assert facts.usual(att.Config) == next(iter(found.values()))
    shapes = [facts.shape(att, cfg) for cfg in found.values()]
    assert all(a != b for i, a in enumerate(shapes) for b in shapes[:i])
    grows = {n: b.slots(facts.STEPS) for n, b in att.cache_spec(next(iter(found.values()))).items() if b.has_slots}
    assert all(count > 1 for count in grows.values())


def test_every_size_is_of_some_mechanism():
    known = {name for att in map(jforge.get, jforge.names()) for name in att.Config.__dataclass_fields__}
    assert set(facts.SIZES) | set(facts.WIDTHS) <= known


def test_a_config_with_a_field_of_another_name_is_shown_by_its_examples():
    @dataclass(frozen=True)
    class Strange(jforge.get("gqa").Config):
        rings: int = 2

    @dataclass(frozen=True, kw_only=True)
    class Stranger(jforge.get("gqa").Config):
        rings: int

    att = jforge.get("gqa")
    assert facts.usual(Strange).rings == 2 and facts.usual(Stranger) is None
    cfg = Stranger(hidden_size=8, num_attention_heads=2, rings=3)
    assert facts.configs(att._replace(Config=Stranger, examples=(cfg, cfg))) == {"example 1": cfg, "example 2": cfg}


@pytest.mark.parametrize("name", jforge.names())
def test_model_bytes_are_those_of_cost_and_rows_multiply_them(name):
    """The page multiplies by the rows itself."""
    att, draw = jforge.get(name), np.random.default_rng(len(name))
    for model, cfg in zip(facts.models(att), att.models.values(), strict=True):
        for dtype in facts.DTYPES:
            at, rows = int(draw.integers(len(facts.CONTEXTS))), int(draw.integers(2, 4096))
            cost = att.cost(cfg, context=facts.CONTEXTS[at], batch=rows, dtype=jnp.dtype(dtype))
            for what in facts.MOVED:
                shown = {
                    b["name"]: rows * n
                    for b, n in zip(model["buffers"][dtype], model["cost"][dtype][what][at], strict=True)
                }
                assert {n: count for n, count in shown.items() if count} == {
                    n: count for n, count in getattr(cost, what).items() if count
                }


def test_left_over_is_what_no_step_reads_again():
    codes = np.array([[slots.WRITTEN, slots.EMPTY], [slots.READ, slots.WRITTEN], [slots.OVER, slots.KEPT]])
    codes = np.append(codes, [[slots.READ, slots.EMPTY], [slots.KEPT, slots.WRITTEN]], axis=0)
    assert ["".join(row) for row in facts.letters(codes)] == ["w.", "rw", "xd", "rd", "-w"]


def test_a_docstring_in_paragraphs():
    text = "A title\nin two lines.\n\n    a = b\n      + c\n\nWords:\n    d\n"
    assert list(facts.paragraphs(text)) == [
        ("p", "A title in two lines."),
        ("pre", "a = b\n  + c"),
        ("p", "Words:"),
        ("pre", "d"),
    ]


def test_the_page_is_one_small_file_that_loads_nothing(built):
    text = page.render(built)
    data = len(json.dumps(built)) * (len(jforge.names()) / len(SOME) - 1)
    assert len(text.encode()) + data < page.LIMIT * 0.75  # roughly; make test-browser weighs the page of all mechanisms
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, nothing is fetched
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert not re.search(r"\bsrc\s*=|@import|url\(|\bfetch\(|XMLHttpRequest|import\(|\{\{", text)
    shown = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(shown) == json.loads(json.dumps(built))


def test_no_text_of_the_data_can_end_its_script():
    data = {"version": "</script><b>", "steps": 1, "toy_dtype": "bfloat16"}
    assert (
        page.render(data).count("</script>") == page.render(data | {"version": ""}).count("</script>") + 1
    )  # the heading


def test_the_same_tree_gives_the_same_page():
    assert page.render(facts.build(names=["short_conv"])) == page.render(facts.build(names=["short_conv"]))


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["explorer", *argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_command_writes_the_page_over_the_named_file(capsys, monkeypatch, tmp_path, built):
    monkeypatch.setattr(facts, "build", lambda track: built)
    monkeypatch.setattr(cli, "for_programs_that_run_once", lambda: None)
    out = tmp_path / "page.html"
    out.write_text("something longer than nothing")
    code, shown, _ = run(capsys, "--out", str(out), "--json")
    text = out.read_text(encoding="utf-8")
    settings = sum(len(one["settings"]) for one in built["mechanisms"])
    want = {"out": str(out), "bytes": len(text.encode()), "mechanisms": 3, "settings": settings, "models": 5}
    assert code == 0 and json.loads(shown) == want and text == page.render(built)
    code, shown, _ = run(capsys, "--out", str(out))
    assert code == 0 and " ".join(shown.split()).startswith(f"{out}: 3 mechanisms in {settings} sizes, 5 models, ")


def test_mistakes_are_one_line_before_anything_is_watched(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "build", lambda track: pytest.fail("watched"))
    code, shown, said = run(capsys, "--out", str(tmp_path / "no" / "page.html"))
    assert (code, shown, said.count("\n")) == (2, "", 1) and "--out is" in said and "cannot be written" in said
    code, shown, said = run(capsys)
    assert (code, shown, said.count("\n")) == (2, "", 1) and "--out" in said
