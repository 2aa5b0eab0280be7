"""What works after `pip install .` alone: jax, numpy and jaxtyping, every optional package blocked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jforge

OPTIONAL = (
    "torch",
    "triton",
    "transformers",
    "matplotlib",
    "pandas",
    "rich",
    "flax",
    "optax",
    "hypothesis",
    "pytest",
    "chex",
)
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
AS_MODULE = "import runpy; runpy.run_module('jforge', run_name='__main__', alter_sys=True)"
OWN = """
import jax.numpy as jnp

def merge(outs, lses):
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(lses.max(0)), 0, lses.max(0)))[..., None]
    total = weights.sum(0)
    return jnp.where(total > 0, jnp.where(weights > 0, weights * outs, 0).sum(0) / total, 0).astype(outs.dtype)
"""


def plain(code: str, *argv: str, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BLOCK + code, *argv]
    environment = {"PYTHONPATH": str(Path(jforge.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


@pytest.mark.parametrize(
    "argv,shown",
    [
        (["--version"], f"jforge {jforge.__version__}"),
        (["--help"], "equiv"),
        (["table", "--context", "1k"], "4,096"),
        (["cost", "gqa", "--config", "llama-3.1-8b"], "17,179,869,184 B"),
    ],
)
def test_commands_without_extras(argv, shown):
    result = plain(AS_MODULE, *argv)
    assert result.returncode == 0 and shown in result.stdout and result.stderr == ""


def test_check_and_own_kernels_without_extras(tmp_path):
    """The laws, and a JAX function of one's own under the cases of an op."""
    (tmp_path / "own.py").write_text(
        OWN + "import jforge\natt = jforge.get('single_head')\natt = att._replace(examples=att.examples[:1])\n"
    )
    result = plain(AS_MODULE, "check", "own:att", "--json", cwd=tmp_path)
    assert result.returncode == 0 and all(row["ok"] for row in json.loads(result.stdout)), result.stderr
    result = plain(AS_MODULE, "equiv", "merge_states", "--backend", "own:merge", cwd=tmp_path)
    assert result.returncode == 0 and "6 judged, 0 wrong, 0 refused" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "argv,install",
    [
        ("equiv merge_states", "needs torch and triton: pip install 'jforge[torch]'"),
        ("equiv mha", "needs torch and transformers: pip install 'jforge[torch,hf]'"),
        ("bench decode_attention", "needs torch and triton: pip install 'jforge[torch]'"),
        ("viz gqa --out pictures", "needs matplotlib: pip install 'jforge[viz]'"),
        ("demo", "needs torch and triton: pip install 'jforge[torch]'"),
    ],
)
def test_what_needs_torch_says_so_before_it_computes(argv, install):
    """In one line; a computation would start XLA."""
    start = "import atexit; from jax._src import xla_bridge\n"
    start += "atexit.register(lambda: print(len(xla_bridge._backends)))\n"
    result = plain(start + AS_MODULE, *argv.split())
    assert result.returncode == 2 and result.stdout == "0\n"
    assert result.stderr == f"jforge {argv.split()[0]}: {install}\n"


def test_import_gives_its_parts_when_they_are_asked_for():
    code = "import jforge\n"
    code += "assert not {'jforge.hf', 'jforge.stack', 'jforge.tasks', 'jforge.harness'} & set(sys.modules)\n"
    code += "jforge.hf.convert, jforge.stack, jforge.tasks.get, jforge.check, jforge.harness.judge, jforge.get('gqa')\n"
    code += "import jforge.lessons\n"
    code += "print(jforge.__version__); assert not hasattr(jforge, 'x') and not hasattr(jforge.harness, 'x')"
    result = plain(code)
    assert (result.returncode, result.stdout) == (0, f"{jforge.__version__}\n"), result.stderr


def test_import_takes_little_more_than_jax():
    """Seconds of the processor, as others may use it too; the best of three."""
    code = "import time, jax; start = time.process_time(); import jforge; print(time.process_time() - start)"
    assert min(float(plain(code).stdout) for _ in range(3)) <= 0.3
