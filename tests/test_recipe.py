"""The recipe of CONTRIBUTING.md, followed in a copy of the tree: two new files, their registry lines and a heading make
a mechanism that laws, bytes, the comparison with torch_ref, the table, the command line and the docs know.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

MECHANISM = '''
"""Grouped queries whose logits grow with the logarithm of the position, from `log_base` tokens on.

    q_t <- q_t max(1, ln(t + 1) / ln(log_base))        t counts the row's tokens, whatever RoPE is told
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

import jforge.ops as jax_ops
from jforge.attention import dense
from jforge.attention.dense import PLAIN, KVCache
from jforge.core.attend import attend
from jforge.core.attention import Attention
from jforge.core.config import FrozenDict, positive
from jforge.core.params import Params
from jforge.core.step import Tokens, append, begin, end, few_tokens, in_order


@dataclass(frozen=True, kw_only=True)
class Config(dense.Config):
    """The dense family's fields and the length from which logits grow."""

    log_base: float = 512.0

    def __post_init__(self):
        super().__post_init__()
        positive("log_base", self.log_base)


def grown(cfg: Config, q: Array, order: Array) -> Array:
    factor = jnp.maximum(1, jnp.log(order + 1.0) / jnp.log(cfg.log_base))
    return q * factor[..., None, None].astype(q.dtype)


def forward(params: Params, cfg: Config, x: Tokens, positions=None) -> Tokens:
    order, positions = in_order(cfg, x, positions)
    q, k, v = dense.project(params, cfg, x, positions)
    mask = dense.visible(cfg, order[..., None], order[:, None])
    out, _ = attend(grown(cfg, q, order), k, v, mask, **dense.options(params, cfg))
    return dense.project_out(params, cfg, x, out).astype(x.dtype)


def prefill(params: Params, cfg: Config, x: Tokens, cache: KVCache, lengths=None) -> tuple[Tokens, KVCache]:
    step = begin(cfg, dense.cache_spec(cfg), x, cache, lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = append(cache, step, k=k, v=v)
    mask = dense.visible(cfg, step.positions[..., None], jnp.arange(cache.k.shape[1])) & step.keep[..., None]
    q = grown(cfg, q, step.positions).astype(cache.k.dtype)
    out, _ = attend(q, cache.k, cache.v, mask, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


def decode(params: Params, cfg: Config, x: Tokens, cache: KVCache, ops=jax_ops) -> tuple[Tokens, KVCache]:
    step = begin(cfg, dense.cache_spec(cfg), few_tokens(x), cache)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = append(cache, step, k=k, v=v)
    q = grown(cfg, q, step.positions).astype(cache.k.dtype)
    out, _ = ops.decode_attention(q, cache.k, cache.v, cache.length, out_dtype=x.dtype, **dense.options(params, cfg))
    return end(step, dense.project_out(params, cfg, step.x, out), x.dtype), cache


log_n = Attention(
    summary="logits that grow with the logarithm of the position",
    Config=Config, shapes=dense.shapes, cache_spec=dense.cache_spec, work=dense.work,
    forward=forward, prefill=prefill, decode=decode,
    models=FrozenDict({"a model": Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)}),
    examples=(Config(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, log_base=3.0,
                     rope_parameters=PLAIN),),
)
'''

TWIN = '''
"""Grouped queries whose logits grow with ln(t + 1) / ln(log_base), never below 1; the rest as in `dense`."""

import math

import torch

from .. import ops as reference_ops
from ..core.softmax import grouped_attention
from . import dense
from .dense import init_cache
from .step import begin, end, in_order


def forward(params, cfg, x, positions=None):
    order, positions = in_order(x, positions)
    q, k, v = dense.project(params, cfg, x, positions)
    out, _ = grouped_attention(grown(cfg, q, order), k, v, order[:, None] <= order[..., None], **dense.options(cfg))
    return dense.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None):
    step = begin(x, cache, dense.checked_room(cfg, x, cache), lengths)
    q, k, v = dense.project(params, cfg, step.x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    q = grown(cfg, q, step.positions).to(k.dtype)
    out, _ = grouped_attention(q, k, v, step.causal(k.shape[1]), **dense.options(cfg))
    return end(step, dense.project_out(params, cfg, step.x, out)), cache


def decode(params, cfg, x, cache, ops=reference_ops):
    step = begin(x, cache, dense.checked_room(cfg, x, cache, tokens=1))
    q, k, v = dense.project(params, cfg, x, step.positions)
    cache = step.appended(cache, k=k, v=v)
    k, v = cache["k"], cache["v"]
    q = grown(cfg, q, step.positions).to(k.dtype)
    out, _ = ops.decode_attention(q, k, v, cache["length"], out_dtype=x.dtype, **dense.options(cfg))
    return end(step, dense.project_out(params, cfg, x, out)), cache


def grown(cfg, q, order):
    factor = torch.clamp(torch.log(order + 1.0) / math.log(cfg.log_base), min=1)
    return q * factor[..., None, None].to(q.dtype)
'''

HEADING = """
## log_n

    q_t <- q_t max(1, ln(t + 1) / ln b)

<!-- table log_n -->
<!-- end -->
"""

ASK = """
import importlib.util, json, jax, jforge, torch_ref
from pathlib import Path
from jforge import cli, laws
from jforge.core import compare
from jforge.harness.frameworks import against_torch

att = jforge.get("log_n")
(cfg,) = att.examples
spec = importlib.util.spec_from_file_location("tables", "docs/mechanisms.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
print(json.dumps({
    "from": jforge.__file__,
    "laws": [row.law for row in jforge.check(att, cfg) if not row.ok],
    "torch": max(against_torch(att, torch_ref.get("log_n"), cfg).values()) / compare.OUT["float32"],
    "docs": docs.render(Path("docs/mechanisms.md").read_text()).split("<!-- table log_n -->")[1],
}))
"""


def line_in(path: Path, after: str, line: str) -> None:
    text = path.read_text()
    assert text.count(after) == 1, f"{path}: {after}"
    path.write_text(text.replace(after, after + line))


def python(folder: Path, *arguments: str) -> str:
    """What Python prints in the copy, which is imported in the place of the installed tree."""
    command = [sys.executable, *arguments]
    env = {"PYTHONPATH": str(folder), "PATH": "", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_files_and_their_lines_make_a_mechanism(tmp_path):
    for folder in ("jforge", "torch_ref", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    (tmp_path / "jforge" / "attention" / "log_n.py").write_text(MECHANISM.lstrip())
    (tmp_path / "torch_ref" / "attention" / "log_n.py").write_text(TWIN.lstrip())
    line_in(tmp_path / "jforge" / "attention" / "__init__.py", "    lightning,\n", "    log_n,\n")
    line_in(tmp_path / "jforge" / "attention" / "__init__.py", '"gqa": dense.gqa,\n', '    "log_n": log_n.log_n,\n')
    line_in(tmp_path / "torch_ref" / "__init__.py", "    lightning,\n", "    log_n,\n")
    line_in(tmp_path / "torch_ref" / "__init__.py", '"gqa": dense,\n', '    "log_n": log_n,\n')
    with (tmp_path / "docs" / "mechanisms.md").open("a") as document:
        document.write(HEADING)
    found = json.loads(python(tmp_path, "-c", ASK))
    assert found["from"] == str(tmp_path / "jforge" / "__init__.py")
    assert found["laws"] == [] and found["torch"] <= 1
    assert "| a model | `k` | B S K=8 H=128 | bfloat16 | 2,048 B a token |" in found["docs"]
    table = python(tmp_path, "-m", "jforge.cli", "table", "--context", "1k")
    assert re.search(r"^log_n +a model +4,096 ", table, flags=re.MULTILINE)
    cost = json.loads(python(tmp_path, "-m", "jforge.cli", "cost", "log_n", "--context", "1k", "--json"))
    assert cost["model"]["stored"] == 2 * 2 * 8 * 128 * 1024
