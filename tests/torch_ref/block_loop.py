"""Mechanisms over blocks as loops: which blocks a query chooses, one block after the other; their test configs."""

import math

import dense_family as family
import numpy
import torch
from dense_family import config

PATTERNS = {
    "local": dict(num_global_blocks=0, num_local_blocks=2, num_random_blocks=0, vert_stride=None),
    "bigbird": dict(num_global_blocks=1, num_local_blocks=1, num_random_blocks=2, vert_stride=None, seed=3),
    "phi": dict(num_global_blocks=0, num_local_blocks=2, num_random_blocks=0, vert_stride=3),
    "all_parts": dict(num_global_blocks=1, num_local_blocks=2, num_random_blocks=1, vert_stride=5, seed=8),
}
INDEX = dict(index_head_dim=7, index_block_size=3, index_topk_blocks=3, index_local_blocks=1, index_init_blocks=0)
# of 17 tokens, blocks of 3: what the index part of an msa config can be, beside a cap and norms with an offset
GEMMA = family.DENSE["gemma"]
SELECTIONS = {
    "own_block": GEMMA | dict(index_topk_blocks=1),
    "single_tokens": GEMMA | dict(index_block_size=1, index_topk_blocks=5, index_head_dim=9),
    "first_and_last": GEMMA | dict(index_topk_blocks=4, index_local_blocks=2, index_init_blocks=1),
    "all_forced": GEMMA | dict(index_block_size=2, index_topk_blocks=4, index_local_blocks=2, index_init_blocks=2),
    "too_small_a_budget": GEMMA
    | dict(index_block_size=2, index_topk_blocks=2, index_local_blocks=3, index_init_blocks=1),
    "one_block": GEMMA | dict(index_block_size=32),
}


# ---- static patterns


def pattern_config(pattern="all_parts", homo=False, **fields):
    defaults = dict(block_size=3, homo_head_pattern=homo, seed=0) | PATTERNS[pattern]
    return config(**(defaults | fields))


def blocks_of(cfg, head, i):
    """A_n(i) by the definition, a condition for each block."""
    head = 0 if cfg.homo_head_pattern else head
    g, w, r, stride = cfg.num_global_blocks, cfg.num_local_blocks, cfg.num_random_blocks, cfg.vert_stride
    rest = [j for j in range(i + 1) if g <= j <= i - w]
    if len(rest) > r:
        rest = numpy.random.default_rng([cfg.seed, head, i]).choice(rest, r, replace=False).tolist()
    allowed = set()
    for j in range(i + 1):
        step = max(1, (stride or 0) // cfg.num_attention_heads)
        strided = stride is not None and (j + head * step + 1) % stride == 0
        if j < g or j > i - w or j in rest or strided:
            allowed.add(j)
    return allowed


def pattern_sees(cfg):
    def sees(q, k, t, n):
        return [s for s in range(t + 1) if s // cfg.block_size in blocks_of(cfg, n, t // cfg.block_size)]

    return sees


# ---- MoBA


def moba_config(size=3, topk=3, **fields):
    return config(**fields, moba_chunk_size=size, moba_topk=topk, dense_decode=False)


def moba_sees(cfg):
    """The query's own block, and of the past ones those whose mean key it likes best."""
    size, group = cfg.moba_chunk_size, cfg.num_attention_heads // cfg.num_key_value_heads

    def sees(q, k, t, n):
        gates = {j: float(q[t, n] @ k[j * size : (j + 1) * size, n // group].mean(0)) for j in range(t // size)}
        best = sorted(gates, key=lambda j: (-gates[j], j))[: cfg.moba_topk - 1]
        return [s for s in range(t + 1) if s // size in {*best, t // size}]

    return sees


# ---- MSA


def msa_config(**fields):
    return config(**(INDEX | fields))


def msa_params(cfg):
    width, heads = cfg.index_head_dim, cfg.num_key_value_heads
    shapes = {"wq_index": (10, heads, width), "wk_index": (10, width)}
    return family.init_params(cfg, **shapes, q_index_norm=(width,), k_index_norm=(width,))


def index_vectors(cfg, params, row, positions):
    """q: T K J and k: T J of one row, a vector at a time."""

    def vector(x, weight, norm, position):
        z = x @ weight
        z = z / torch.sqrt((z * z).mean() + cfg.rms_norm_eps) * (cfg.norm_offset + params[norm])
        return family.rope(cfg, z, position)

    pairs = list(zip(row, positions.tolist(), strict=True))
    k = [vector(x, params["wk_index"], "k_index_norm", p) for x, p in pairs]
    heads = params["wq_index"].unbind(1)
    return [[vector(x, w, "q_index_norm", p) for w in heads] for x, p in pairs], k


def picked_blocks(cfg, q, keys, t):
    """The blocks of one index head at token t: forced ones first, then by score, a lower block before a higher."""
    current, size = t // cfg.index_block_size, cfg.index_block_size
    ranks = []
    for block in range(current + 1):
        scores = [float(q @ keys[s]) for s in range(t + 1) if s // size == block]
        forced = block < cfg.index_init_blocks or block > current - cfg.index_local_blocks
        ranks.append((-math.inf if forced else -max(scores), block))
    return [block for _, block in sorted(ranks)[: cfg.index_topk_blocks]]


def msa_loop(params, cfg, x, positions):
    group, size, ys = cfg.num_attention_heads // cfg.num_key_value_heads, cfg.index_block_size, []
    for row, where in zip(x, positions, strict=True):
        q, keys = index_vectors(cfg, params, row, where)
        picks = [[picked_blocks(cfg, head, keys, t) for head in heads] for t, heads in enumerate(q)]

        def sees(_q, _k, t, n, picks=picks):
            return [s for s in range(t + 1) if s // size in picks[t][n // group]]

        ys.append(family.loop_over_visible(params, cfg, row[None], where[None], sees)[0])
    return torch.stack(ys)
