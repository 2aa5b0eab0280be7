"""The command line: tables, JSON, and mistakes that end with one line and exit code 2."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import own_alibi
import pytest

import jforge
import torch_ref
from jforge import cli, demo, laws, report, report_bench, text
from jforge.attention import REGISTRY
from jforge.core import compare
from jforge.harness import bench, equiv
from jforge.harness.backends import BACKENDS
from jforge.harness.op import Work
from jforge.harness.ops import BY_NAME, cases
from jforge.harness.timing import Call, jax_call

CONFIGS = Path(jforge.__file__).parent / "configs"
CONFIG = CONFIGS / "llama-3.1-8b.json"


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_table_lists_every_mechanism(capsys):
    code, out, _ = run(capsys, "table", "--context", "1k", "--json")
    rows = {row["mechanism"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and set(rows) == set(jforge.names())
    assert rows["gqa"]["bytes_per_token"] == 4096 and rows["gqa"]["stored_bytes"] == 4096 * 1024
    code, out, _ = run(capsys, "table", "--context", "1k")
    assert code == 0 and all(name in out for name in jforge.names()) and "4,096" in out


@pytest.mark.parametrize("width", [160, 120, 100, 80, 40])
def test_table_cuts_no_number(capsys, monkeypatch, width):
    """Each column of every mechanism is there, whole, in its line of some block; down to 80 no line is longer."""
    monkeypatch.setenv("COLUMNS", str(width))
    rows = report.table(131072, "bfloat16")["rows"]
    report.show_table({"context": 131072, "dtype": "bfloat16", "rows": rows})
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split() for line in lines if line.startswith("mechanism")]
    assert [name for head in heads for name in head if name != "mechanism"] == ["model", *report._TABLE]
    assert len(heads) == 1 or width < 120
    for row in rows:
        mine = [line.split() for line in lines if line.split()[:1] == [row["mechanism"]]][: len(heads)]
        shown = [cell for line in mine for cell in line[1:]]
        numbers = [column(row) for column in report._TABLE.values()]
        assert shown == " ".join([row["model"], *numbers]).split()
    assert width < 80 or max(map(len, lines)) <= width


def test_a_case_against_all_backends_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"case": "four_queries_window", "ok": True, "out": 1e-7}
    backends = [{**row, "backend": b.name, "dtype": d} for b in BACKENDS.values() for d in b.dtypes]
    report.show_backends(backends)
    out = capsys.readouterr().out
    assert out.count("1e-07") == len(backends) == 10 and max(map(len, out.splitlines()[2:])) <= 80


def test_cells_that_fail_are_red_on_a_terminal_alone(monkeypatch):
    row = [["a", "! 1e-01"]]
    assert text.table("xy", row, left=1) == "x      y\na  1e-01"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert text.table("xy", row, left=1).endswith("a  \x1b[31m1e-01\x1b[0m")


def scanned(name: str, context: int) -> int:
    att = jforge.get(name)
    cfg = next(iter(att.models.values()))
    return report.scanned(att.cache_spec(cfg), att.cost(cfg, context=context))


def test_scanned_bytes_are_those_of_the_index():
    """An index key of 128 channels a token; of moba's means one a block, once a context is longer than its lists."""
    context = 131072
    assert scanned("msa", context) == scanned("dsa", context) == 256 * context
    assert scanned("csa", context) == 256 * context // 4
    assert scanned("gqa", context) == 4096 * context
    assert scanned("sliding_window", context) == scanned("lightning", context) == scanned("block_sparse", context) == 0
    assert scanned("moba", 2**20) == 4 * 8 * 128 * 2**20 // 4096
    assert scanned("moba", context) > 4096 * context


@pytest.mark.parametrize("text,tokens", [("131072", 131072), ("128k", 131072), ("1m", 2**20), ("1M", 2**20), ("3", 3)])
def test_context_units(text, tokens):
    assert cli.context(text) == tokens


def test_cost_of_llama(capsys):
    """mechanisms.md 1.4: 4096 B a token and layer in bfloat16, 32 layers."""
    code, out, _ = run(capsys, "cost", "gqa", "--config", str(CONFIG), "--context", "128k", "--batch", "2", "--json")
    data = json.loads(out)
    assert code == 0 and data["layers_of_mechanism"]["layers"] == data["model"]["layers"] == 32
    assert data["layer"]["bytes_per_token"] == 2 * 4096
    assert data["layers_of_mechanism"]["read"] == data["layers_of_mechanism"]["stored"] == 2 * 32 * 4096 * 131072
    assert data["layers_of_mechanism"]["written"] == 2 * 32 * 4096
    code, out, _ = run(capsys, "cost", "gqa", "--config", str(CONFIG), "--context", "128k")
    assert code == 0 and "17,179,869,184 B" in out and "16.0 GiB" in out


def test_cost_of_a_model_with_two_kinds_of_one_mechanism(capsys):
    """gpt-oss: every other layer has a window of 128. 2 * 8 * 64 * 2 B a token and layer."""
    argv = "cost", "sinks", "--config", str(CONFIGS / "gpt-oss-120b.json"), "--context", "8k"
    data = json.loads(run(capsys, *argv, "--json")[1])
    assert [(kind["layers"], kind["read"]) for kind in data["kinds"]] == [
        (list(range(0, 36, 2)), 2048 * 128),
        (list(range(1, 36, 2)), 2048 * 8192),
    ]
    assert data["model"]["layers"] == 36 and data["model"]["read"] == 18 * 2048 * (128 + 8192)
    code, out, _ = run(capsys, *argv)
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert code == 0 and {"layer 0, k", "18 like layer 0", "layer 1, v", "18 like layer 1", "36 layers"} <= set(rows)
    assert f"{18 * 2048 * 8192:,} B" in rows["18 like layer 1"] and f"{18 * 2048 * 8320:,} B" in rows["36 layers"]
    assert "layer 0: one more token a row adds 0 B;" in out and "layer 1: one more token a row adds 2,048 B;" in out
    assert "36 layers: one more token a row adds 36,864 B" in out


def test_cost_of_a_model_with_two_mechanisms(capsys):
    """gemma-3: one full layer after five with a window of 1024; both belong to the model's sum. 8192 B a token."""
    argv = "cost", "gqa", "--config", str(CONFIGS / "gemma-3-27b.json"), "--context", "8k"
    data = json.loads(run(capsys, *argv, "--json")[1])
    assert {kind["mechanism"]: len(kind["layers"]) for kind in data["kinds"]} == {"sliding_window": 52, "gqa": 10}
    assert data["layers_of_mechanism"]["layers"] == 10 and data["layers_of_mechanism"]["read"] == 10 * 8192 * 8192
    assert data["model"]["read"] == 8192 * (10 * 8192 + 52 * 1024)
    _, out, _ = run(capsys, *argv)
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "layer 5, k" in rows and "layer 0, k" not in rows
    assert f"{52 * 8192 * 1024:,} B" in rows["52 layers, sliding_window"]
    assert f"{data['model']['read']:,} B" in rows["62 layers"]


@pytest.mark.parametrize(
    "name,model,layers",
    [("gqa", "llama-3.1-8b", 32), ("gqa", "Llama-3.1-8B", 32), ("csa", "deepseek-v4-pro", 61),
     ("mqa", "falcon-7b", 1), ("sinks", "gpt-oss-120b WINDOW", 1)],
)  # fmt: skip
def test_cost_of_a_shipped_model(capsys, monkeypatch, tmp_path, name, model, layers):
    """By name, in any case of letters: the whole model where its config.json is shipped, else one layer."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "cost", name, "--config", model, "--json")
    data = json.loads(out)
    assert code == 0 and data["model"]["layers"] == layers and model.lower() in data["source"].lower()


def test_layers_that_cost_the_same_are_one_kind(capsys):
    """The lightning layers of MiniMax-Text-01 have Configs of their own (each its index), and one cost."""
    _, out, _ = run(capsys, "cost", "lightning", "--config", str(CONFIGS / "minimax-text-01.json"))
    assert "70 like layer 0" in out and "10 layers, gqa" in out and "80 layers" in out


def test_check_reports_a_broken_law(capsys, monkeypatch, tmp_path):
    """Somebody's own Attention, as module:attribute from the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import jforge\n"
        "gqa = jforge.get('gqa')\n"
        "good = gqa._replace(examples=gqa.examples[:1])\n"
        "bad = good._replace(visible=lambda cfg, q_pos, k_pos: k_pos < q_pos)\n"
    )
    code, out, _ = run(capsys, "check", "mine:bad", "--json")
    (row,) = json.loads(out)
    (law,) = (law for law in row["laws"] if not law["ok"])
    assert code == 1 and law["law"] == "L7" and law["error"] == len(law["where"]["pairs"]) == 10
    assert row["points_at"].startswith("visible") and (row["number"], row["of"]) == (1, 1)
    code, out, _ = run(capsys, "check", "mine:good")
    assert code == 0 and "mine:good" in out


def test_check_of_one_law_and_one_config(capsys):
    """Every law says on stderr that it is done, also through a pipe; stdout is the result alone."""
    code, out, err = run(capsys, "check", "gqa", "--law", "L9", "--law", "L1", "--config", "2", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["config"] == str(jforge.get("gqa").examples[1])
    assert [law["law"] for law in row["laws"]] == ["L9", "L1"] and (row["number"], row["of"]) == (2, 4)
    assert [line.split(",")[0] for line in err.splitlines()] == ["gqa 2/4: L9 ok", "gqa 2/4: L1 ok"]


def test_check_says_the_config_once_and_counts_as_counts(capsys, monkeypatch):
    gqa = jforge.get("gqa")
    broken = gqa._replace(forward=lambda *args, **options: 2 * gqa.forward(*args, **options),
                          visible=lambda cfg, q_pos, k_pos: k_pos < q_pos)  # fmt: skip
    monkeypatch.setitem(REGISTRY, "broken", broken)
    code, out, _ = run(capsys, "check", "broken", "--law", "L1", "--law", "L2", "--law", "L7")
    text = " ".join(out.split())
    assert code == 1 and text.count("Config(") == 4 and text.count("this points at forward") == 4
    for i, line in enumerate(line for line in out.splitlines() if line.startswith("broken") and "breaks" not in line):
        assert line.split()[:2] == ["broken", f"{i + 1}/4"] and line.split()[-1] == "10"


def test_the_command_and_the_function_give_one_verdict(capsys):
    """Of a correct mechanism that XLA's level 0 compiles wrong."""
    code, out, _ = run(capsys, "check", "own_alibi:alibi", "--law", "L7", "--json")
    here = report.laws(jforge.check(own_alibi.alibi, laws=("L7",)))
    assert code == 0 and json.loads(out)[0]["laws"] == json.loads(json.dumps(here["laws"]))


def test_equiv_of_an_op_and_a_mechanism(capsys):
    code, out, _ = run(capsys, "equiv", "merge_states", "mha", "--json")
    data = json.loads(out)
    assert code == 0 and {row["op"] for row in data["backends"]} == {"merge_states"}
    assert {row["backend"] for row in data["backends"]} == {"jforge", "torch_ref", "triton", "pallas"}
    assert {(row["mechanism"], row["judge"]) for row in data["frameworks"]} == {
        ("mha", "torch_ref"), ("mha", "transformers"),
    }  # fmt: skip
    assert all(row["ok"] and max(row["errors"].values()) <= 1e-5 for row in data["frameworks"])


def test_equiv_in_processes_says_the_same(monkeypatch):
    """In the order of the questions, whoever answers them."""
    monkeypatch.setattr(equiv, "WORTH_PROCESSES", 1)
    alone, shared = (equiv.backends(["merge_states"], workers=workers) for workers in (1, 2))
    assert alone == shared and len(alone) == 20


@pytest.mark.parametrize("command", ["equiv", "demo"])
def test_progress_shows_when_piped(capsys, monkeypatch, command):
    """On stderr, a line at the start of each part and one at its end; none of them is in what is piped."""
    if command == "demo":
        monkeypatch.setattr(demo, "decode_times", lambda *_: [])
        monkeypatch.setattr(jforge, "check", lambda *_: laws.Report(()))
        monkeypatch.setattr(equiv, "cases", lambda tag: cases("merge_states"))
    code, out, err = run(capsys, *[command, "merge_states"][: 1 if command == "demo" else 2], "--json")
    lines = err.splitlines()
    assert code == 0 and json.loads(out)
    assert "comparing backends: 1 of 20, 0 s" in lines
    assert any(line.startswith("comparing backends: 20 of 20 done in") for line in lines)
    assert command == "equiv" or [line.split(":")[0] for line in lines if line.startswith("demo")] == [
        "demo laws", "demo backends", "demo times", "demo"
    ]  # fmt: skip


def test_the_demo_shows_what_it_measures(capsys, monkeypatch):
    """The times and the checked laws are few; all else is the demo's own."""
    times = [{"backend": "jforge, jitted", "context": 4096, "us": 1500.0, "p10": 1400.0, "p90": 1600.0}]
    check, some = jforge.check, ("L1", "L8")
    monkeypatch.setattr(demo, "decode_times", lambda *_: times)
    monkeypatch.setattr(jforge, "check", lambda att, cfg: check(att, cfg, laws=some))
    monkeypatch.setattr(equiv, "cases", lambda tag: cases("merge_states"))
    code, out, _ = run(capsys, "demo")
    assert code == 0 and [law for law in laws.TITLES if f"{law}   {laws.TITLES[law]}" in out] == [*some]
    for shown in ("Llama-3.1-8B", "131,072 B", "merge_many", "4,096 tokens", "jforge, jitted"):
        assert shown in out


def test_progress_keeps_to_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(report.track(iter("ab"), "counting")) == ["a", "b"] and list(report.track([], "counting")) == []
    assert capsys.readouterr().err == "\r\x1b[Kcounting: 1, 0 s\r\x1b[Kcounting: 2, 0 s\r\x1b[K"


def test_equiv_of_a_wrong_mechanism_fails(capsys, monkeypatch):
    twin = torch_ref.get("single_head")
    right = twin.forward
    monkeypatch.setattr(twin, "forward", lambda *args: 1.001 * right(*args))
    code, out, _ = run(capsys, "equiv", "single_head")
    assert code == 1 and "1e-03" in out and "float64 oracle" not in out


BAD = [
    ((), "COMMAND"),
    (("tabel",), "'tabel'"),
    (("table", "--context", "12x"), "'12x'"),
    (("table", "--context", "0"), "'0'"),
    (("table", "--dtype", "int8"), "'int8'"),
    (("table", "--colour"), "--colour"),
    (("cost",), "NAME"),
    (("cost", "nope"), "'nope'"),
    (("cost", "gqa", "--batch", "-1"), "-1"),
    (("cost", "gqa", "--config", "missing.json"), "missing.json"),
    (("cost", "gqa", "--config", "llama-9b"), "Llama-3.1-8B"),
    (("cost", "mla", "--config", "llama-3.1-8b"), "no mla layer"),
    (("cost", "gqa", "--config", "broken.json"), "line 1"),
    (("cost", "gqa", "--config", "list.json"), "list"),
    (("cost", "mqa", "--config", str(CONFIG)), "no mqa layer"),
    (("cost", "gqa", "--config", "uneven.json"), "uneven.json: num_attention_heads is 32"),
    (("cost", "gqa", "--config", "rope.json"), "rope_type"),
    (("cost", "gqa", "--config", "alien.json"), "alien"),
    (("check", "nope"), "'nope'"),
    (("check", "gqa", "--law", "L99"), "'L99'"),
    (("check", "gqa", "--config", "5"), "gqa has 4 examples"),
    (("check", "gqa", "--config", "0"), "'0'"),
    (("equiv", "gqa", "nope"), "'nope'"),
    (("bench", "decode_everything"), "'decode_everything'"),
    (("bench", "decode_mla"), "decode_mla can be timed on a GPU alone"),
    (("bench", "--plot", "out.jpg"), "out.jpg"),
    (("bench", "--plot", "nowhere/out.png"), "'nowhere/out.png'"),
    (("bench", "--out", "nowhere/out.jsonl"), "'nowhere/out.jsonl'"),
    (("bench", "--out", "."), "'.'"),
    (("bench", "--samples", "-1"), "'-1' is no positive integer"),
    (("check", "no_such_module:x"), "no_such_module"),
    (("check", "json:nothing"), "nothing"),
    (("check", "broken_module:att"), "ZeroDivisionError"),
    (("check", ":att"), "':att'"),
    (("check", "json:"), "'json:'"),
    (("check", "json:dumps"), "jforge.Attention"),
]


@pytest.mark.parametrize("argv,named", BAD, ids=[" ".join(argv)[:40] or "nothing" for argv, _ in BAD])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, argv, named, untyped):
    monkeypatch.chdir(tmp_path)
    llama = json.loads(CONFIG.read_text())
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[1]")
    Path("broken_module.py").write_text("1 / 0")
    Path("uneven.json").write_text(json.dumps({**llama, "num_key_value_heads": 3}))
    Path("rope.json").write_text(json.dumps({**llama, "rope_scaling": {"rope_type": "spiral", "factor": 2.0}}))
    Path("alien.json").write_text(json.dumps({**llama, "model_type": "alien"}))
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("jforge") and named in err


DENSE = BY_NAME["decode_attention"]
SMALL = Work({"B": 1, "N": 4, "K": 2, "S": 64, "H": 8}, {"scale": 0.3})


def test_bench_on_a_cpu_records_and_draws(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.TIMED, DENSE.name, replace(DENSE, cpu=(SMALL,)))
    out, png = tmp_path / "rows.jsonl", tmp_path / "rates.png"
    code, shown, _ = run(capsys, "bench", DENSE.name, "--samples", "2", "--out", str(out), "--plot", str(png))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and {row["implementation"] for row in rows} == {"jforge (XLA)", "torch_ref"}
    assert all(row["median"] > 0 and row["error"] <= 1e-5 and row["device"] == "cpu" for row in rows)
    assert "jforge (XLA)" in shown and "B1 N4 K2 S64" in shown and png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("got,want", [(0.0, 1.0), (1.0, np.nan), (np.nan, np.nan)])
def test_a_wrong_kernel_gets_no_time(got, want):
    """The gate: a row whose output is wrong is refused, not timed, and NaN agrees with nothing."""
    call = Call("wrong", lambda i: jnp.full((1, 1, 4, 8), got), lambda: None)
    row = bench._gated_row(DENSE, SMALL, call, 1, jnp.full((1, 1, 4, 8), want), 5, 3000.0)
    assert row["refused"] == "wrong result" and "median" not in row


def test_a_state_that_is_not_written_gets_no_time():
    """Of decode_linear the new state is judged too."""
    op, small = BY_NAME["decode_linear"], Work({"B": 2, "N": 3, "H": 8, "V": 8, "decay": 2, "beta": 1}, {})
    arrays = bench._inputs(op, small, 0)
    want = bench._reference(op, small, arrays)
    row = bench._gated_row(op, small, Call("unwritten", lambda i: (want[0], arrays[3]), lambda: None), 1, want, 5, 1.0)
    assert row["refused"] == "wrong result"
    out, state = jax_call("jforge", lambda *a: op.run(jforge.ops, {}, *a), [arrays], carry=3).run(0)
    assert max(compare.worst_row(*pair) for pair in zip((out, state), want, strict=True)) < 1e-2


@pytest.mark.parametrize("timed", bench.TIMED.values(), ids=bench.TIMED)
def test_every_benchmark_can_be_called(timed):
    """At the smallest sizes: the arguments that a record draws fit its op, and it moves bytes."""
    work = timed.bench[0]
    small = {axis: min(size, 128 if axis == "S" else 2) for axis, size in work.sizes.items()}
    small |= {axis: 32 for axis in "HCRJ" if axis in small}
    small |= {"L": 1, "K": 1} if "L" in small else {}
    options = {name: min(value, 1) if name == "topk" else value for name, value in work.options.items()}
    tiny = replace(work, sizes=small, options=options)
    results = jax.tree.leaves(bench._reference(timed, tiny, bench._inputs(timed, tiny, 0)))
    assert all(np.isfinite(result).all() for result in results) and timed.moved(**small, **options) > 0


def test_sizes_of_a_benchmark_row():
    row = {"what": "decode_block_sparse", "B": 64, "N": 64, "K": 4, "S": 131072, "H": 128, "L": 16, "block_size": 128}
    assert report_bench._shape(row) == "B64 N64 K4 S131,072 L16 block_size 128"
    assert report_bench._shape({"B": 1, "S": 8, "window": 0}) == "B1 S8"


def test_json_has_no_infinity():
    assert equiv.number(float("inf")) is None and equiv.number(0.5) == 0.5


def test_sizes():
    assert [report.size(n) for n in (0, 4096, 10240, 2**24, 2**31, 2**41)] == [
        "0 B", "4,096 B", "10.0 KiB", "16.0 MiB", "2.0 GiB", "2,048.0 GiB"
    ]  # fmt: skip
    assert [report.exact(n) for n in (4097.0, 1000, 2.5)] == ["4,097", "1,000", "2.50"]
