"""Online softmax, written once: the step over a tile of scores, the loop over tiles, the sink and the normalisation.

Scores x stand for logits x * f.unit. They are scaled after the maximum is taken off,

    P = exp2((x - max) * f.unit * log2 e),

because a product that is rounded for the maximum and fused into the difference is not the same number twice: at logits
of 1e9 the exponent would be off by hundreds. So equal scores weigh the same, and logits up to the largest float32 do
not overflow. The maximum and lse leave in natural-log units. `axis` is where the query rows lie in a tile of scores: 1
with keys on the rows of the MMA, 0 with query rows on them.
"""

import math

import numpy as np

from pallas_kernels.compat import BY_COLUMN, BY_ROW, TILE, jnp, lax, plgpu, spread
from pallas_kernels.tiles import load_heads

LOG2E = math.log2(math.e)
LOWEST, LARGEST = (float(end) for end in (np.finfo(np.float32).min, np.finfo(np.float32).max))


def power(difference, unit: float = 1.0):
    """exp(unit * difference) of a score and a maximum."""
    return jnp.exp2(difference * min(unit * LOG2E, LARGEST))


def begin(result: tuple, rows: int, mass: tuple, axis: int):
    """(acc, top, mass) before the first tile: the numerators, the running maximum of each row, the sums of P.

    The maximum is finite from the start, so that no difference is inf - inf.
    """
    vector = (BY_ROW, BY_COLUMN)[axis]
    acc = plgpu.layout_cast(jnp.zeros(result, jnp.float32), TILE)
    top = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), vector)
    return acc, top, plgpu.layout_cast(jnp.zeros(mass, jnp.float32), TILE if len(mass) == 2 else vector)


def step(f, x, top, axis: int):
    """(new maximum, factor of what was summed under the old one, P) of a tile of scores, -inf where they are unseen."""
    raised = jnp.maximum(top, x.max(axis=1 - axis))
    return raised, power(top - raised, f.unit), power(x - spread(raised, x.shape, axis), f.unit)


def attend(where, p_s, result: tuple, slots, scores, values, add):
    """The carry after all tiles of a program with keys on the rows of the MMA; P^T goes through `p_s`:

        S^T = K Q^T,   P^T = exp(S^T - max),   O^T <- O^T exp(old max - max) + V^T P^T.

    slots(i) is where the i-th tile lies, scores(at, seen) its S^T [block, rows] masked by seen(), values(at) its values
    once they are there, add(at, acc, shrink) the new O^T, `result` in shape. mass is summed over keys after the loop.
    """
    f = where.f
    keys_by_rows = f.block, f.rows

    def turn(i, carry):
        acc, top, mass = carry
        at = slots(i)
        seen, blank = where.tile(i)
        raised, shrink, p = step(f, scores(at, seen), top, 1)
        mass = mass * spread(shrink, keys_by_rows, 1) + p
        p_s.transpose((1, 0))[...] = p.astype(p_s.dtype)
        blank(values(at))
        plgpu.commit_smem()
        return add(at, acc, shrink), raised, mass

    acc, top, mass = lax.fori_loop(0, where.steps, turn, begin(result, f.rows, keys_by_rows, 1))
    return acc, top, mass.sum(axis=0)


def finish(where, acc, top, mass, axis: int, row_s):
    """(acc / mass, top, mass) of a program, top as a logit, with the sinks folded in where its result is final."""

    def widen(vector):
        return spread(vector, acc.shape, axis)

    # The clamp keeps the product finite, and out of the difference to the sink, into which it would be fused.
    top = jnp.where(mass > 0, jnp.maximum(top * where.f.unit, LOWEST), LOWEST)
    if where.sinks is not None:
        sink = load_heads(where, where.sinks, row_s, (BY_ROW, BY_COLUMN)[axis])
        acc, top, mass = fold_sink(acc, top, mass, sink, widen)
    return normalised(acc, mass, widen), top, mass


def fold_sink(acc, top, mass, sink, widen):
    """The carry with one more logit, which has no value; top is a logit. widen(vector) has the shape of acc."""
    raised = jnp.maximum(top, sink)
    shrink = power(top - raised)
    return acc * widen(shrink), raised, mass * shrink + power(sink - raised)


def normalised(acc, mass, widen):
    """acc / mass, 0 where nothing was seen."""
    share = jnp.where(mass > 0, 1 / mass, 0.0)
    return acc * widen(share)


def natural_lse(top, mass):
    """log of the sum of the exponentials, -inf where nothing was seen."""
    return top + jnp.log2(mass) * math.log(2)
