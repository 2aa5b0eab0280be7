"""Pictures show what the code says: their numbers, read back from the artists, the strips of real caches, the stale."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from judges import compiled

import jforge
from jforge import cli, lens, viz
from jforge.roofline import DEVICES
from jforge.slots import EMPTY, ENTRY, OVER, READ, WRITTEN
from jforge.viz import command, field, strips, style
from jforge.viz.field import HIDDEN, SAID, SKIPPED
from jforge.viz.toys import toy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
LLAMA = "llama-3.1-8b"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pictures_script", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(script):
    """{picture: the figure of today}, each drawn when it is asked for."""
    made = {}

    def get(name: str):
        return made.setdefault(name, script.PICTURES[name]()) if name not in made else made[name]

    return get


def only(figure) -> dict:
    (axes,) = viz.drawn(figure)["axes"]
    return axes


NAMES = ("kept_and_read", "memory", "read", "dsa_context", "slots", "field", "roofline", "floor")


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_of_the_pages_is_stale(script, figures, name):
    assert script.stale(name, figures(name)) is None


def test_a_stale_picture_is_named(script, tmp_path):
    """After other numbers, and where the svg is another than data.json says."""
    figure = viz.memory({"one": lens.from_config(cli.CONFIGS[LLAMA])}, (1024, 2048))
    viz.save(figure, tmp_path / "memory.svg")
    (tmp_path / "data.json").write_text(json.dumps({"memory": viz.digest(figure)}))
    assert script.stale("memory", figure, tmp_path) is None
    other = viz.memory({"one": lens.from_config(cli.CONFIGS[LLAMA])}, (1024, 4096))
    assert "memory.svg is stale: the code draws other numbers" in script.stale("memory", other, tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({"memory": viz.digest(other)}))
    assert "memory.svg is not the picture" in script.stale("memory", other, tmp_path)


def test_the_page_shows_every_picture_and_how_it_is_made(script):
    shown = re.findall(r"\]\(pictures/(\w+)\.svg\)", PAGE)
    assert shown == list(script.PICTURES) == list(NAMES)
    assert {path.stem for path in script.FOLDER.glob("*.svg")} == set(shown)
    commands = re.findall(r"^    (jforge viz (?:.*\\\n)*.*)", PAGE, flags=re.MULTILINE)
    assert len(commands) == len(NAMES) - 1
    for line in commands:
        args = cli.parser().parse_args(line.replace("\\\n", " ").split()[1:])
        assert all(said in jforge.names() or said in cli.CONFIGS for said in args.targets), line
    assert all(path.stat().st_size < 130_000 for path in script.FOLDER.glob("*.svg"))


def test_memory_and_reads_are_those_of_the_lens(script, figures):
    for part, name in (("stored", "memory"), ("read", "read")):
        lines = only(figures(name))["lines"]
        assert list(lines) == list(script.MODELS)
        for label, (contexts, values) in lines.items():
            model = lens.from_config(cli.CONFIGS[script.MODELS[label]])
            some = {n: sum(getattr(model, part)(context=n).values()) for n in contexts[::10]}
            assert values[::10] == list(some.values()), label
            assert contexts == [2**n for n in range(10, 21)]
    by_hand = [2 * 8 * 128 * 2 * 32 * 2**n for n in range(10, 21)]  # k and v, heads, channels, bytes, layers, tokens
    assert only(figures("memory"))["lines"]["Llama-3.1-8B"][1] == by_hand
    said = [text.get_text() for text in figures("memory").axes[0].texts]
    assert set(script.MODELS) <= set(said)  # at the lines' ends


def test_kept_and_read_is_the_cost_of_every_mechanism(figures):
    figure = figures("kept_and_read")
    lines, names = only(figure)["lines"], [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(name.split()[0] for name in names) == sorted(jforge.names())
    for at, name in enumerate(names):
        mechanism, model = name.split("  ")
        att = jforge.get(mechanism)
        cost = att.cost(att.models[model], context=131072)
        assert lines["kept"][0][at] == sum(cost.stored.values()) and lines["kept"][1][at] == at
        assert lines["read"][0][at] == sum(cost.read.values())


def test_a_mechanism_s_reads_lie_on_those_of_the_traced_step(figures):
    lines, att = only(figures("dsa_context"))["lines"], jforge.get("dsa")
    cfg = att.models["DeepSeek-V3.2"]
    for label, part in (("kept", "stored"), ("read", "read")):
        assert lines[label][1] == [sum(getattr(att.cost(cfg, context=n), part).values()) for n in lines[label][0]]
    assert lines["k_index"][1] == [128 * 2 * n for n in lines["k_index"][0]]
    read = dict(zip(*lines["read"], strict=True))
    assert [read[n] for n in lines["read, traced"][0]] == lines["read, traced"][1]
    assert len(lines["read, traced"][0]) == 3


def test_roofs_and_floors_by_hand(figures):
    axes, h100 = only(figures("roofline")), DEVICES["h100"]
    dots = axes["points"][f"on {h100.name}"]
    assert len(dots) == len(jforge.names())
    for dense, reached in dots:
        assert reached == pytest.approx(min(dense * 3.35e12, 989.4e12) / 1e12, rel=1e-4)
    costs = {name: jforge.get(name).cost(next(iter(jforge.get(name).models.values())), context=131072)
             for name in jforge.names()}  # fmt: skip
    want = [c.flops / (sum(c.read.values()) + sum(c.written.values())) for c in costs.values()]
    assert [dense for dense, _ in dots] == pytest.approx(want, rel=1e-5)
    assert axes["lines"][h100.name][0][1] == pytest.approx(989.4 / 3.35, rel=1e-4)
    figure = figures("floor")
    row = [label.get_text() for label in figure.axes[0].get_yticklabels()].index("Llama-3.1-8B")
    moved = 2 * 8 * 128 * 2 * 32 * (131072 + 1)
    assert only(figure)["lines"][h100.name][0][row] == pytest.approx(1e3 * moved / 3.35e12, rel=1e-5)


@pytest.mark.parametrize("name", ["gqa", "sliding_window", "streaming"])
def test_strips_are_those_of_a_real_cache(name):
    """After 64 steps a slot is empty in the figure's codes where it is in the cache that one prefill fills."""
    small, (at,) = toy(name), viz.slots(name).axes
    _, cache = compiled(small.att, small.cfg)[1](
        small.params, small.x, small.att.init_cache(small.cfg, 1, 64, jnp.float32)
    )
    codes = {n: image.get_array() for image in at.images for n in image.get_label().split(", ")}
    assert set(codes) == set(small.att.cache_spec(small.cfg))
    for n, found in codes.items():  # slots down, steps to the right
        held = np.any(np.asarray(getattr(cache, n))[0] != 0, axis=(1, 2))
        assert (held == (found[:, -1] != EMPTY)).all(), n


@pytest.mark.parametrize("name", ["block_sparse", "csa", "nsa"])
def test_every_step_of_a_strip_writes_and_reads_what_the_cost_says(name):
    """As many slots as `work` has of this or of a closing step, and never more reads than that."""
    small, found = toy(name), strips.watched(name)
    slots = [n for n, buffer in small.att.cache_spec(small.cfg).items() if buffer.has_slots]
    for step in range(64):
        works = [small.att.work(small.cfg, step + 1, 64, 1, closes) for closes in (False, True)]
        for n in slots:
            codes = found[n][step]
            wrote = int(np.isin(codes, (WRITTEN, OVER, ENTRY)).sum())
            assert wrote in {work.written.get(n, 0) for work in works}, (n, step)
            assert int((codes == READ).sum()) <= max(work.read.get(n, 0) for work in works), (n, step)


def test_what_strips_show_by_hand():
    """A ring of 16, entries of 4 tokens, the 6 picks of a step."""
    ring = strips.watched("sliding_window")["k"]
    over = np.argwhere(ring == OVER)
    assert [tuple(one) for one in over] == [(t, t % 16) for t in range(16, 64)]
    csa = strips.watched("csa")
    assert [tuple(one) for one in np.argwhere(csa["c_kv"] == ENTRY)] == [(t, t // 4) for t in range(3, 64, 4)]
    assert {int((csa["c_kv"][t] == READ).sum()) for t in range(28, 64) if t % 4 != 3} == {6}
    assert (np.isin(csa["k_index"], (READ, ENTRY)).sum(axis=1) == np.arange(1, 65) // 4).all()


def test_the_measured_field_is_what_the_mechanism_says(script, figures):
    """In every cell of the figure, and a mechanism that hides a token is seen."""
    axes = [one["images"] for one in viz.drawn(figures("field"))["axes"]]
    said = [images["said"] for images in axes if "said" in images]
    measured = [images["measured"] for images in axes if "measured" in images]
    assert len(said) == len(measured) == len(script.FIELDS)
    for claim, found in zip(said, measured, strict=True):
        assert [row.replace(str(SKIPPED), "0").replace(str(SAID), "1") for row in claim] == found
    assert any(str(SKIPPED) in row for row in said[2])  # dsa leaves some unpicked
    window = np.tril(np.ones((64, 64), int)) - np.tril(np.ones((64, 64), int), -16)
    assert measured[0] == ["".join(map(str, row)) for row in window]
    assert not any("not visible" in images for images in axes)


def test_influence_that_is_not_visible_is_marked(monkeypatch):
    """`visible` of a sliding window that says one key too few."""
    small = toy("sliding_window", 24)

    def short(cfg, q, k):
        return small.att.visible(cfg, q, k) & (k > q - cfg.sliding_window + 1)

    monkeypatch.setattr(field, "toy", lambda *_: small._replace(att=small.att._replace(visible=short)))
    says, shows = viz.drawn(viz.receptive_field("sliding_window", 24))["axes"]
    marked = [(t, s) for t, row in enumerate(shows["images"]["not visible"]) for s, cell in enumerate(row) if int(cell)]
    assert marked == [(t, t - 15) for t in range(15, 24)]
    assert all(says["images"]["said"][t][s] == str(HIDDEN) for t, s in marked)


def test_a_picture_is_the_same_bytes_twice_and_leaves_the_settings_alone(tmp_path):
    before, model = dict(matplotlib.rcParams), lens.from_config(cli.CONFIGS[LLAMA])
    for ending in command.FORMATS:
        for name in ("a", "b"):
            viz.save(viz.memory({"costs $x$ and $y$": model}, (1024, 2048)), tmp_path / f"{name}.{ending}")
        one, two = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
        assert one == two and len(one) > 1000, ending
    assert dict(matplotlib.rcParams) == before


def test_labels_are_spread_in_their_order():
    assert style.spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert style.spread([0.99, 0.2, 0.98], 0.1, 0, 1) == pytest.approx([1.0, 0.2, 0.9])
    assert style.spread([0.0, 0.05, 0.1], 0.1, 0, 1) == pytest.approx([0, 0.1, 0.2])


def test_words_of_ticks():
    assert [style.tokens(n) for n in (1000, 1024, 3072, 2**20)] == ["1,000", "1k", "3k", "1M"]
    assert [style.short(n) for n in (1000, 4096, 2**14, 1.5 * 2**30, 2**38)] == [
        "1000 B", "4 KiB", "16 KiB", "1.5 GiB", "256 GiB"
    ]  # fmt: skip


# the command


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["viz", *argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_models_side_by_side(capsys, tmp_path):
    """Files are named, data are those of the lens, an own picture of the name is replaced, and the rest left alone."""
    out, own = tmp_path / "new" / "pictures", tmp_path / "config.json"
    own.write_text(cli.CONFIGS["mistral-7b-v0.1"].read_text())
    out.mkdir(parents=True)
    (out / "memory.svg").write_text("old")
    (out / "notes.txt").write_text("mine")
    code, text, _ = run(capsys, LLAMA.upper(), str(own), "--out", str(out), "--context", "4k", "--json")
    rows = {row["picture"]: row for row in json.loads(text)}
    assert code == 0 and list(rows) == ["memory", "read", "kept_and_read", "roofline", "floor"]
    assert {Path(row["file"]) for row in rows.values()} | {out / "notes.txt"} == set(out.iterdir())
    assert (out / "notes.txt").read_text() == "mine"
    label = tmp_path.name
    models = {LLAMA.upper(): lens.from_config(cli.CONFIGS[LLAMA]), label: lens.from_config(own)}
    assert rows["memory"]["data"] == viz.digest(viz.memory(models))
    assert f"data {rows['memory']['data']}" in (out / "memory.svg").read_text()
    assert rows["floor"]["data"] == viz.digest(viz.floor(models, 4096))


def test_a_mechanism_has_three_pictures(capsys, tmp_path):
    code, text, _ = run(capsys, "lightning", "lightning", "--out", str(tmp_path), "--format", "png")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert code == 0 and files == ["lightning_context.png", "lightning_field.png", "lightning_slots.png"]
    assert all(name in text.replace("\n", "") for name in files) and "3 pictures" in text


def test_names_of_models_differ():
    said = ["a/config.json", "b/config.json", "x/m.json", "y/m.json", "llama-3.1-8b"]
    assert command._names(said) == ["a", "b", "x/m.json", "y/m.json", "llama-3.1-8b"]


@pytest.mark.parametrize(
    "argv,said",
    [
        (["gqq"], "NAME|CONFIG is 'gqq'; it must be a mechanism (single_head, "),
        (["gqa", "no/config.json"], "NAME|CONFIG is 'no/config.json'; it must be"),
        (["README.md"], "README.md is not JSON"),
        (["gqa", "--context", "0"], "'0' is no token count"),
        (["gqa", "--format", "gif"], "invalid choice: 'gif'"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(ROOT)
    code, out, error = run(capsys, *argv, "--out", str(tmp_path / "new"))
    assert code == 2 and out == "" and error.count("\n") == 1 and said in error
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_said_before_anything_is_drawn(capsys, monkeypatch, tmp_path):
    def never(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(command.growth, "memory", never)
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, LLAMA, "--out", str(tmp_path / "file"))
    assert code == 2 and error.count("\n") == 1 and "it cannot be made a folder: File exists" in error
    (tmp_path / "floor.svg").mkdir()
    code, _, error = run(capsys, LLAMA, "--out", str(tmp_path))
    assert code == 2 and error.count("\n") == 1 and "floor.svg'; it cannot be written: Is a directory" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "floor.svg"]


def test_a_model_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="none keeps no cache"):
        command.models({"none": lens.ModelLens((), (), "none", "bfloat16")})
