"""docs/own_mechanism.md does what it says, in a folder and a process of its own; what it promises is there."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jforge import laws
from jforge.core import compare

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "own_mechanism.md").read_text(encoding="utf-8")
FILE, *PROGRAM = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
PROMISED = re.findall(r"^\| `([\w.]+)\((.*?)\)` \| ", DOCUMENT, flags=re.MULTILINE)
ASKED = "begin append end attend in_order KVCache qkv project project_out apply_rope rms_norm Buffer CacheSpec".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own")
    (path / "alibi.py").write_text(FILE)
    return path


def python(folder: Path, *arguments: str) -> str:
    """What Python prints there, with XLA as users have it."""
    env = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "", "NO_COLOR": "1", "COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_the_file_is_short():
    assert len(FILE.splitlines()) <= 80


def test_the_program_runs_and_prints_its_row(folder):
    """The laws hold, the kernels agree, the table has the very line."""
    shown = python(folder, "-c", "\n".join(PROGRAM))
    assert [line.split()[0] for line in shown.splitlines() if line.endswith(" ok")] == list(laws.TITLES)
    (row,) = re.findall(r"^    (alibi .*)$", DOCUMENT, flags=re.MULTILINE)
    assert row in [line.rstrip() for line in shown.splitlines()]


def test_the_command_takes_it(folder):
    (command,) = re.findall(r"^    \$ jforge (check alibi:alibi)$", DOCUMENT, flags=re.MULTILINE)
    assert "alibi:alibi" in python(folder, "-m", "jforge.cli", *command.split())


def test_it_is_alibi(folder):
    """The formula written out, in float64: forward, and a prefill of 300 tokens and a step, past both channels."""
    spec = importlib.util.spec_from_file_location("own_alibi", folder / "alibi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    att, T = module.alibi, 301
    (cfg,) = att.examples
    with jax.enable_x64(True):
        params = att.init_params(jax.random.key(0), cfg, jnp.float64)
        x = jax.random.normal(jax.random.key(1), (1, T, cfg.hidden_size), jnp.float64)
        q, k, v = (np.einsum("td,dnh->nth", x[0], params[w]) for w in ("wq", "wk", "wv"))
        out = []
        for n in range(4):
            distance = np.arange(T)[:, None] - np.arange(T)
            logits = q[n] @ k[n // 2].T * 16**-0.5 - 2.0 ** (-2 * (n + 1)) * distance
            weights = np.where(distance >= 0, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
            out.append(weights / weights.sum(axis=-1, keepdims=True) @ v[n // 2])
        want = np.einsum("nth,nhd->td", np.stack(out), params["wo"])[None]
        y, cache = att.prefill(params, cfg, x[:, :-1], att.init_cache(cfg, 1, T, jnp.float64))
        last, _ = att.decode(params, cfg, x[:, -1:], cache)
        got = np.concatenate([y, last], axis=1)
        assert (
            max(compare.relative(att.forward(params, cfg, x), want), compare.relative(got, want))
            <= compare.OUT["float64"]
        )


def test_its_config_is_its_own(folder):
    ask = (
        "import jax, jforge; from alibi import alibi; (cfg,) = alibi.examples\n"
        "try: jforge.get('gqa').init_params(jax.random.key(0), cfg)\n"
        "except TypeError as error: print(error)"
    )
    assert python(folder, "-c", ask) == "cfg is a alibi.Config; it must be a jforge.attention.dense.Config (gqa)\n"


@pytest.mark.parametrize("path,parameters", PROMISED, ids=[path for path, _ in PROMISED])
def test_what_is_promised_is_there(path, parameters):
    """Importable, documented, with these parameters."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(found)
    if parameters != "...":
        plain = [p.replace(annotation=p.empty) for p in inspect.signature(found).parameters.values()]
        assert str(inspect.Signature(plain))[1:-1] == parameters


def test_what_must_be_promised_is():
    assert set(ASKED) <= {path.rpartition(".")[2] for path, _ in PROMISED}


def test_a_typed_program_runs(folder):
    """`make types` has pyright read it; the marker that makes type checkers read jforge travels with the package."""
    assert "['L2']" in python(folder, str(ROOT / "tests" / "typed" / "user.py"))
    assert importlib.resources.files("jforge").joinpath("py.typed").is_file()
