"""The lens: bytes of real caches, sizes that fit, one line for every bad file, and the command."""

import json
import re
import resource
import subprocess
import sys
import time

import jax
import pytest

from jforge import cli, hf, lens, roofline
from jforge.attention import REGISTRY
from jforge.core.config import shown
from jforge.hf.kept import KEPT, Kept, fixed, slots
from pallas_kernels import device as pallas_device

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "head_dim": 16,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16,
}  # fmt: skip


def run(capsys, *argv):
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


# bytes


@pytest.mark.parametrize("name", cli.CONFIGS)
def test_stored_bytes_are_those_of_the_caches(name):
    """Every layer of every shipped model: the arrays that init_cache would make at its sizes, without making them."""
    model = lens.from_config(cli.CONFIGS[name])
    assert [(one.mechanism, one.config) for one in model.layers] == [
        pair[:2] for pair in hf.layers(hf.load(cli.CONFIGS[name]))
    ]
    total = 0
    for layer, count in model.kinds.items():
        att = REGISTRY[layer.mechanism]
        made = jax.eval_shape(lambda att=att, layer=layer: att.init_cache(layer.config, 2, 300, "bfloat16"))
        leaves = {leaf: getattr(made, leaf) for leaf in att.cache_spec(layer.config)}
        stored = layer.stored(context=300, batch=2)
        assert stored == {leaf: a.size * a.dtype.itemsize for leaf, a in leaves.items()}
        total += count * sum(stored.values())
        assert layer.convertible and not (layer.shares is not None and stored)
    assert sum(model.kinds.values()) == len(model.layers)
    assert sum(model.stored(context=300, batch=2).values()) == total


def test_reads_and_writes_are_those_of_cost():
    model = lens.from_config(cli.CONFIGS["gemma-4-e4b"])
    for layer in model.layers:
        cost = REGISTRY[layer.mechanism].cost(layer.config, context=5000, batch=3)
        assert layer.read(context=5000, batch=3) == cost.read and layer.written(context=5000, batch=3) == cost.written
    readers = [layer for layer in model.layers if layer.shares is not None]
    assert readers and all(layer.stored(context=9) == {} == layer.written(context=9) for layer in readers)
    assert all(model.layers[layer.shares].shares is None and sum(layer.read(context=9).values()) for layer in readers)


def test_dict_path_and_object_agree(tmp_path):
    import transformers  # it takes seconds, and no other test here needs it

    theirs = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = [
        lens.from_config(c).layers for c in (LLAMA, tmp_path / "config.json", str(tmp_path / "config.json"), theirs)
    ]
    assert all(layers == found[0] for layers in found)


@pytest.mark.parametrize(
    "scheme,dtype,share",
    [
        (None, "bfloat16", 1.0),
        ({"type": "float", "num_bits": 8}, "fp8", 0.5),
        ({"type": "int", "num_bits": 8, "strategy": "tensor"}, "int8", 0.5),
    ],
)
def test_the_file_declares_the_dtype(scheme, dtype, share):
    model = lens.from_config(LLAMA | {"quantization_config": {"kv_cache_scheme": scheme, "quant_method": "x"}})
    plain = lens.from_config(LLAMA)
    assert model.dtype == dtype and dtype in model.notes[0]
    stored = sum(model.stored(context=10).values())
    assert stored == share * sum(plain.stored(context=10).values()) == 3 * 2 * 10 * 2 * 16 * 2 * share
    assert model.stored(context=10, dtype="float32") == plain.stored(context=10, dtype="float32")


def test_states_keep_more_than_8_bits():
    """A delta rule's state is float32 and its convolution's rows bfloat16, whatever the keys and values are."""
    model = lens.from_config(cli.CONFIGS["qwen3-next-80b-a3b"])
    wide, narrow = (model.stored(context=64, dtype=dtype) for dtype in ("bf16", "fp8"))
    assert narrow == wide | {"k": wide["k"] // 2, "v": wide["v"] // 2}


def test_positions_do_not_touch_the_cache():
    """Dynamic NTK has no mechanism, and its cache is Llama's."""
    config = LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    model = lens.from_config(config)
    assert model.stored(context=77) == lens.from_config(LLAMA).stored(context=77)
    assert not model.layers[0].convertible and "'dynamic'" in model.layers[0].lacks
    with pytest.raises(NotImplementedError, match="'dynamic'"):
        hf.layers(config)
    with pytest.raises(NotImplementedError, match="use_cla"):  # layers that share keys: the cache itself is not known
        lens.from_config(LLAMA | {"model_type": "hunyuan_v1_dense", "use_cla": True})


def test_a_bias_does_not_touch_the_cache():
    config = hf.load(cli.CONFIGS["deepseek-v4-flash"])
    biased, plain = lens.from_config(config | {"attention_bias": True}), lens.from_config(config)
    assert biased.stored(context=999) == plain.stored(context=999)
    assert not any(layer.convertible for layer in biased.layers) and all(layer.convertible for layer in plain.layers)


def test_a_default_is_noted_where_it_counts():
    del (config := dict(GEMMA))["num_key_value_heads"]
    assert any("num_key_value_heads=4" in note for note in lens.from_config(config).notes)
    assert not any(
        "not in the file" in note for note in lens.from_config(GEMMA | {"attn_logit_softcapping": 1.0}).notes
    )


def test_buffers_of_no_mechanism():
    """A step reads what slots hold and writes one, passes over a state whole, and only reads what is given."""
    kept = Kept({"k": slots(2, 4), "ring": slots(1, 4, limit=8), "state": fixed(3, 5, dtype="float32"),
                 "cross": slots(2, 4, limit=6)}, given=("cross",))  # fmt: skip
    layer = lens.LensLayer(0, "x", KEPT, kept, None, "nothing", "bfloat16")
    assert layer.stored(context=20) == {"k": 20 * 16, "ring": 8 * 8, "state": 60, "cross": 6 * 16}
    assert layer.read(context=20) == layer.stored(context=20)
    assert layer.written(context=20) == {"k": 16, "ring": 8, "state": 60}
    assert layer.read(context=3, batch=2)["ring"] == 2 * 3 * 8


# sizes that fit


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-27b", "deepseek-v4-flash", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize("page", [None, 64])
def test_the_longest_context_and_the_largest_batch(name, page):
    model, memory = lens.from_config(cli.CONFIGS[name]), 24 * 10**9

    def held(context, batch):
        return sum(model.stored(context=context, batch=batch, page=page).values())

    longest = model.max_context(memory=memory, batch=3, page=page)
    assert held(longest, 3) <= memory < held(longest + 1, 3)
    most = model.max_batch(memory=memory, context=5000, page=page)
    assert held(5000, most) <= memory < held(5000, most + 1)
    assert model.max_context(memory=1, page=page) == 0 == model.max_batch(memory=1, context=5, page=page)


def test_a_window_in_every_layer_has_no_longest_context():
    assert lens.from_config(cli.CONFIGS["mistral-7b-v0.1"]).max_context(memory=10**9) is None


def test_pages_round_up_what_grows():
    model = lens.from_config(GEMMA)
    assert model.stored(context=17, page=16) == {n: 2 * 2 * 2 * 16 * (32 + 8) for n in "kv"}
    assert model.stored(context=32, page=16) == model.stored(context=32)


@pytest.mark.parametrize("mesh,share", [({"heads": 2}, 2), ({"heads": 8}, 1), ({"slots": 5}, 5), ({"data": 3}, 3)])
def test_a_device_of_a_mesh(mesh, share):
    """Two key heads over 8 devices are replicated."""
    model = lens.from_config(LLAMA)
    whole = sum(model.stored(context=20, batch=3).values())
    assert model.stored_per_device(mesh, context=20, batch=3) == whole // share
    with pytest.raises(ValueError, match="mesh is 'rows'"):
        model.stored_per_device({"rows": 2}, context=20)
    with pytest.raises(ValueError, match="divisor of batch=3"):
        model.stored_per_device({"data": 2}, context=20, batch=3)


def test_the_floor_is_bytes_over_bandwidth_or_flops_over_peak():
    model, card = lens.from_config(cli.CONFIGS["llama-3.1-8b"]), roofline.device("H100")
    cost = model.cost(context=8192, batch=4)
    moved = sum(cost.read.values()) + sum(cost.written.values())
    assert model.floor("h100", context=8192, batch=4) == moved / card.bandwidth > cost.flops / card.flops
    slow = card._replace(flops=1e9)
    assert model.floor(slow, context=8192, batch=4) == cost.flops / 1e9


def test_cards_are_those_of_the_kernels():
    for card in pallas_device.DEVICES:
        ours = roofline.device(card.name)
        assert ours.bandwidth == card.bandwidth * 1e9 and round(ours.flops / 1e12) == card.tflops


def test_when_a_step_is_bound_by_arithmetic():
    """At the batch that is named the two times cross: weights once and rows times their caches, against all flops."""
    model, card = lens.from_config(cli.CONFIGS["mistral-7b-v0.1"]), roofline.device("h100")
    first = model.compute_bound_from(card, context=2)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    cost = model.cost(context=2)
    moved = sum(cost.read.values()) + sum(cost.written.values())

    def computes(batch):
        return batch * (2 * weights + cost.flops) / card.flops >= (2 * weights + batch * moved) / card.bandwidth

    assert computes(first) and not computes(first - 1)
    assert model.compute_bound_from(card, context=4096) is None  # each row brings more bytes than it has flops for


def test_cards_have_sources():
    for name, card in roofline.DEVICES.items():
        assert roofline.device(name.upper()) is card and card.source and card.memory > 2e10
        assert 100 < card.ridge < 400
    with pytest.raises(ValueError, match="device is 'tpu'; it must be one of h100"):
        roofline.device("tpu")


# bad files

NESTED = 10**5
FILES = {
    "empty": "", "blank": " \n", "array": "[]", "null": "null", "number": "1", "string": '"llama"', "cut": '{"a": ',
    "single quotes": "{'model_type': 'llama'}", "trailing comma": '{"model_type": "llama",}', "comment": "{} // no",
    "nan": '{"a": NaN}', "infinity": '{"a": Infinity}', "too large": '{"a": 1e400}', "too small": '{"a": 1e-400}',
    "lost digits": '{"a": 9007199254740993.0}', "brackets": "[" * NESTED, "braces": '{"a":' * NESTED,
    "key twice": '{"model_type": "llama", "model_type": "gpt2"}', "inner key twice": '{"a": {"b": 1, "b": 1}}',
    "long integer": '{"a": ' + "9" * 5000 + "}", "latin-1": b'{"a": "\xe9"}', "utf-16": '{"a": 1}'.encode("utf-16"),
}  # fmt: skip
CONFIGS = {
    "no type": ({}, "model_type"),
    "null type": ({"model_type": None}, "model_type"),
    "type a number": ({"model_type": 3}, "model_type is 3"),
    "type a list": ({"model_type": ["llama"]}, "model_type is"),
    "unknown type": ({"model_type": "nothing", "num_hidden_layers": 2}, "'nothing' is not known"),
    "unknown type alone": ({"model_type": "nothing"}, "'nothing' is not known"),
    "text_config a list": ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
    "bias in quotes": (LLAMA | {"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
    "layers a list": (LLAMA | {"layer_types": "full"}, "layer_types is 'full'"),
    "layers too few": (LLAMA | {"layer_types": ["full_attention"]}, "layer_types"),
    "layers too many": (LLAMA | {"layer_types": ["full_attention"] * 10**5}, "100,000 entries"),
    "layers of no kind": (LLAMA | {"layer_types": ["other"] * 3}, "is other"),
    "rope a list": (LLAMA | {"rope_scaling": [1]}, "rope_scaling"),
    "rope of no type": (LLAMA | {"rope_scaling": {"rope_type": "odd"}}, "rope_type is 'odd'"),
    "yarn without factor": (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "max_position_embeddings"),
    "scheme of 4 bits": (LLAMA | {"quantization_config": {"kv_cache_scheme": {"num_bits": 4, "type": "int"}}},
                         "kv_cache_scheme"),
    "scheme a string": (LLAMA | {"quantization_config": {"kv_cache_scheme": "fp8"}}, "kv_cache_scheme"),
    "quantization a list": (LLAMA | {"quantization_config": [1]}, "quantization_config"),
    "heads that do not divide": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads"),
    "window of 0": (GEMMA | {"sliding_window": 0}, "sliding_window is 0"),
    "window in quotes": (GEMMA | {"sliding_window": "8"}, "sliding_window is '8'"),
    "layers in quotes": (LLAMA | {"model_type": "lfm2", "full_attn_idxs": "0"}, "full_attn_idxs is '0'; it must be a"),
    "no window": (GEMMA | {"sliding_window": None}, "sliding_window"),
}  # fmt: skip
for _key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
    CONFIGS[f"no {_key}"] = ({k: v for k, v in LLAMA.items() if k != _key}, _key)
for _key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
    for _value in (0, -1, 1.5, "32", True):
        CONFIGS[f"{_key}={_value!r}"] = (LLAMA | {_key: _value}, f"{_key} is {_value!r}")
for _value in (10**6, 10**30):
    CONFIGS[f"{_value} layers"] = (LLAMA | {"num_hidden_layers": _value}, "num_hidden_layers is 10")


def one_line(problem: BaseException) -> str:
    text = str(problem)
    assert "\n" not in text and len(text) < 3000, text[:300]
    return text


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(FILES[name] if isinstance(FILES[name], bytes) else FILES[name].encode())
    started = time.monotonic()
    with pytest.raises(ValueError) as problem:
        lens.from_config(path)
    assert "config.json" in one_line(problem.value) and len(str(problem.value)) < 400 + len(str(path))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_says_no_cache(name):
    config, says = CONFIGS[name]
    started = time.monotonic()
    with pytest.raises((ValueError, NotImplementedError)) as problem:
        lens.from_config(config)
    assert says in one_line(problem.value)
    assert time.monotonic() - started < 5


def test_there_are_60_of_them_and_none_passes_by_mistake():
    assert len(FILES) + len(CONFIGS) >= 60
    assert lens.from_config(LLAMA).layers and lens.from_config(GEMMA).layers


def test_what_is_no_config_at_all(tmp_path):
    for wrong in (3, None, [LLAMA]):
        with pytest.raises(TypeError, match="config is a"):
            lens.from_config(wrong)
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="cannot be read"):
            lens.from_config(path)


def test_long_values_are_shortened():
    assert shown([1] * 10**6).endswith("(1,000,000 entries)") and len(shown("x" * 10**6)) < 220
    assert shown([1, 2]) == "[1, 2]"


# the command


def test_the_command(capsys):
    code, out, _ = run(capsys, "lens", "llama-3.1-8b", "--context", "8k,128k", "--batch", "1,64")
    assert code == 0 and out.startswith("llama-3.1-8b: 131,072 B a token, nothing fixed, bfloat16 cache")
    assert "16.0 GiB" in out and "1024.0 GiB" in out.replace(",", "")
    code, out, _ = run(capsys, "lens", "llama-3.1-8b", "--context", "8k", "--json", "--memory", "80GiB")
    data = json.loads(out)
    assert code == 0 and data["rows"][0]["stored"] == 2**30 and data["limits"]["max_context"] == {"1": 655360}
    assert data["rows"][0]["buffers"]["k"] == {"stored": 2**29, "written": 2**16, "read": 2**29}


def test_models_side_by_side(capsys):
    names = "llama-3.1-8b", "deepseek-v3", "qwen3-next-80b-a3b"
    code, out, _ = run(capsys, "lens", *names, "--context", "8k")
    assert code == 0 and all(out.count(name) >= 2 for name in names)
    code, out, _ = run(capsys, "lens", *names, "--context", "8k,16k", "--csv")
    head, *rows = out.splitlines()
    assert code == 0 and head.startswith("model,context,batch,dtype,stored") and len(rows) == 6
    code, out, _ = run(capsys, "lens", *names, "--json")
    assert [one["model"] for one in json.loads(out)] == list(names)


def test_a_config_from_stdin(capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(LLAMA)))
    code, out, _ = run(capsys, "lens", "-", "--dtype", "fp8", "--mesh", "heads=2,slots=2", "--page", "16")
    assert code == 0 and out.startswith("stdin: 192 B a token") and "mesh heads=2, slots=2" in out


def test_a_layer_without_a_mechanism_says_so(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}))
    code, out, _ = run(capsys, "lens", str(path))
    assert code == 0 and "not convertible, full_attention: rope_type is 'dynamic'" in out


@pytest.mark.parametrize(
    "argv,says",
    [
        (("lens",), "CONFIG"),
        (("lens", "nothing.json"), "CONFIG is 'nothing.json'; there is no such file, and the shipped models are"),
        (("lens", "llama-3.1-8b", "--context", "8x"), "'8x' is no token count"),
        (("lens", "llama-3.1-8b", "--batch", "0"), "'0' is no positive integer"),
        (("lens", "llama-3.1-8b", "--dtype", "int4"), "int4"),
        (("lens", "llama-3.1-8b", "--device", "tpu"), "device is 'tpu'"),
        (("lens", "llama-3.1-8b", "--memory", "80"), "'80' is no size of a memory"),
        (("lens", "llama-3.1-8b", "--mesh", "rows=2"), "'rows=2' is no mesh"),
        (("lens", "llama-3.1-8b", "--mesh", "heads=2,heads=2"), "is no mesh"),
        (("lens", "llama-3.1-8b", "--mesh", "data=2"), "divisor of batch=1"),
        (("lens", "llama-3.1-8b", "--json", "--csv"), "--csv and --json"),
        (("cost",), "NAME and --config"),
    ],
)
def test_a_bad_argument_is_one_line(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1


def test_cost_of_a_whole_model(capsys):
    code, out, _ = run(capsys, "cost", "--config", "gemma-3-27b", "--context", "8k", "--json")
    data = json.loads(out)
    assert code == 0 and data["model"] == data["layers_of_mechanism"] and data["model"]["layers"] == 62
    assert data["model"]["stored"] == sum(lens.from_config(cli.CONFIGS["gemma-3-27b"]).stored(context=8192).values())


@pytest.mark.parametrize("text,count", [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5kb", 1500), ("7b", 7)])
def test_sizes_of_a_memory(text, count):
    assert cli.memory(text) == count


def test_layers_that_also_attend_to_an_encoder(capsys, tmp_path):
    path = tmp_path / "config.json"
    sizes = {"d_model": 64, "decoder_layers": 3, "decoder_attention_heads": 4, "is_encoder_decoder": True}
    path.write_text(json.dumps({"model_type": "bart", "encoder_layers": 3, "encoder_attention_heads": 4} | sizes))
    code, out, _ = run(capsys, "lens", str(path), "--encoder-tokens", "1000", "--context", "1k")
    assert code == 0 and "6 caches of 2 kinds" in out and f"{3 * 1000 * 2 * 64 * 2 / 1024:.1f} KiB fixed" in out
    model = lens.from_config(path, encoder_tokens=1000)
    assert not any("not in the file" in note for note in model.notes)  # nothing is missing, whatever is counted beside
    code, out, _ = run(capsys, "lens", str(path), "--context", "1k")
    assert code == 0 and "nothing fixed" in out and "cross-attention caches are left out" in out


def test_a_plot_of_models(capsys, tmp_path):
    path = tmp_path / "memory.svg"
    code, *_ = run(capsys, "lens", "llama-3.1-8b", "deepseek-v3", "--plot", str(path))
    assert code == 0 and "llama-3.1-8b" in path.read_text() and "deepseek-v3" in path.read_text()
    code, out, err = run(capsys, "lens", "llama-3.1-8b", "--plot", "memory.gif")
    assert code == 2 and out == "" and "'memory.gif'; it must end in .svg or .png or .pdf" in err


def test_shipped_files_have_sources():
    listed = re.findall(
        r"^\| ([\w.-]+) \| [\w.-]+/[\w.-]+", (cli.CONFIGS["glm-5"].parent / "README.md").read_text(), re.M
    )
    assert listed == sorted(cli.CONFIGS, key=lambda name: name.replace("-", " ")) and len(listed) >= 24


def test_the_command_is_quick():
    """Processor time beyond `import jax`, the median of three shipped files: at most a second."""

    def spent(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    names = "deepseek-v4-flash", "gemma-3n-e4b", "minimax-text-01"
    assert sorted(spent("-m", "jforge", "lens", name) for name in names)[1] <= spent("-c", "import jax") + 1


def test_a_layer_that_reads_the_first_one_says_so(capsys, tmp_path):
    path = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 2, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2}
    path.write_text(json.dumps({**GEMMA, **sizes, "model_type": "gemma3n_text"}))
    code, out, _ = run(capsys, "lens", str(path))
    assert code == 0 and "none of its own; reads that of place 0" in out
