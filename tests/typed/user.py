"""What a user's program may look like to a type checker: every call of an Attention, a variant, a check, costs."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jforge

gqa: jforge.Attention = jforge.get("gqa")
cfg = gqa.Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
params = gqa.init_params(jax.random.key(0), cfg, dtype=jnp.float32)
cache = gqa.init_cache(cfg, batch=2, capacity=16, dtype=jnp.float32)
x = jnp.ones((2, 5, 16))

y: jax.Array = gqa.forward(params, cfg, x)
y, cache = gqa.prefill(params, cfg, x, cache, lengths=jnp.array([5, 3]))
step = jax.jit(gqa.decode, static_argnames=("cfg", "ops"), donate_argnames="cache")
y, cache = step(params, cfg, x[:, :1], cache)


def sharper(params: dict[str, jax.Array], cfg: Any, x: Any, cache: Any, ops: Any = jforge.ops) -> tuple[jax.Array, Any]:
    """decode with twice the softmax scale."""
    return gqa.decode(params, replace(cfg, scaling=2 * cfg.scaling), x, cache, ops)


variant = gqa._replace(decode=sharper, visible=lambda cfg, q_pos, k_pos: k_pos <= q_pos, summary="sharper")
report = jforge.check(variant, cfg, laws=("L1", "L2"))
failed: list[str] = [row.law for row in report if not row.ok]
cost: jforge.Cost = gqa.cost(cfg, context=1024, batch=2)
total: int = sum(cost.read.values())
shapes: dict[str, tuple[int, ...]] = dict(gqa.shapes(cfg))
slots = [buffer.slots(64) for buffer in gqa.cache_spec(cfg).values()]
bound = partial(gqa.forward, params, cfg)
print(failed, total, shapes["wq"], slots, bound(x).shape, sorted(jforge.names())[0])
