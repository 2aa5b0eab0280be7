"""DeepSeek sparse attention: `mla` in which every query attends the L tokens that a lightning indexer scores highest.

    I_t   = the min(index_topk, t + 1) tokens s <= t of largest score_t,s (`dsa_indexer`), in ties the lower token
    o_t,n = sum over s in I_t of p_s v_s,n,   p = softmax(scaling q_t,n . k_s,n),   q, k, v and both forms as in `mla`

All heads share I_t, so decode gathers each latent once. With index_topk >= t + 1 it is `mla`.
DeepSeek-V3.2; GLM-5 (index_rope_layout "interleaved"). In GLM-5.2 most layers take the picks of an earlier layer
(index_shared): they have no indexer and no index keys.

cfg: the fields of `mla` with a q_lora_rank (Lq), index_topk (L), index_n_heads (I), index_head_dim (J),
index_rope_layout ("half" in DeepSeek-V3.2, or "interleaved"), index_quantised, index_shared.
params: those of `mla`; without index_shared wq_index Lq I J, wk_index D J, k_index_norm J, k_index_bias J and
ww_index D I.
cache: that of `mla` (latent: B S C, k_rope: B S R, length: int32 B); without index_shared k_index B S J, after norm and
RoPE, with index_quantised in float8_e4m3fn and k_index_scale: float32 B S.
"""

import torch

from .. import ops as reference_ops
from ..ops import check as ops_check
from ..ops.index_scores import masked_index_scores
from . import dsa_indexer as indexer
from . import inputs, mla
from .step import begin, end, in_order, token_by_token


def init_cache(cfg, batch, capacity, dtype=torch.bfloat16):
    """An empty cache with room for `capacity` tokens per row, all in dtype but quantised index keys."""
    keys = {} if cfg.index_shared else indexer.init_cache(cfg, batch, capacity, dtype)
    return mla.init_cache(cfg, batch, capacity, dtype) | keys


def forward(params, cfg, x, positions=None, indices=None):
    """y: B T D from x: B T D without a cache. positions: int B T, default 0..T-1, feed RoPE only.

    indices: int32 B T L', the picks of another layer, with index_shared and only then; picks outside 0..t are ignored.
    y has x's dtype. Raises ValueError and TypeError for wrong arguments.
    """
    check(params, cfg, x, indices)
    order, positions = in_order(x, positions)
    causal = order[:, None] <= order[..., None]
    if not cfg.index_shared:
        new = indexer.project(params, cfg, x, positions, x.dtype)
        indices = choose(cfg, masked_index_scores(new.q, new.k, new.weights, causal, new.k_scale))
    projected = mla.project(params, cfg, x, positions)
    out = mla.attend_naive(params, cfg, *projected, picked(indices, x.shape[1]) & causal)
    return mla.project_out(params, cfg, x, out)


def prefill(params, cfg, x, cache, lengths=None, indices=None):
    """(y, cache) after appending the first lengths[b] of the T tokens of row b, as in `mla.prefill`.

    indices: as in `forward`; slots of the cache, those of pads are ignored.
    """
    check(params, cfg, x, indices)
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    q_nope, q_rope, latent, k_rope = mla.project(params, cfg, step.x, step.positions)
    after, seen = step.appended(cache, latent=latent, k_rope=k_rope), step.causal(cache["latent"].shape[1])
    if not cfg.index_shared:
        keys, indices = keys_and_picks(params, cfg, step, cache, seen)
        after |= keys
    mask, stored = picked(indices, seen.shape[-1]) & seen, after["latent"].dtype
    out = mla.attend_naive(params, cfg, q_nope.to(stored), q_rope.to(stored), after["latent"], after["k_rope"], mask)
    return end(step, mla.project_out(params, cfg, step.x, out)), after


@token_by_token
def decode(params, cfg, x, cache, ops=reference_ops, indices=None):
    """(y, cache) after appending 1 to 16 tokens per row; x, y: B T D. Dtypes and rows without room: as in `prefill`.

    ops: any namespace with `decode_sparse_mla` and, without index_shared, `index_scores` and `topk_indices`.
    """
    check(params, cfg, x, indices, tokens=1)
    step = begin(x, cache, checked_room(cfg, x, cache))
    q_nope, q_rope, latent, k_rope = mla.project(params, cfg, x, step.positions)
    after = step.appended(cache, latent=latent, k_rope=k_rope)
    latent, k_rope = after["latent"], after["k_rope"]
    if cfg.index_shared:
        indices = indices.masked_fill(indices > step.positions[..., None], -1)
    else:
        new = indexer.project(params, cfg, x, step.positions, latent.dtype)
        keys = indexer.appended(cache, new, step)
        after |= keys
        k_scale = keys.get("k_index_scale")
        scores = ops.index_scores(new.q, keys["k_index"], new.weights, after["length"], k_scale=k_scale)
        indices = choose(cfg, scores, ops)
    out = mla.attend_absorbed(params, cfg, q_nope, q_rope, latent, k_rope, indices, ops.decode_sparse_mla)
    return end(step, mla.project_out(params, cfg, x, out)), after


def index(params, cfg, x, cache, lengths=None):
    """indices: int32 B T L, the picks of the tokens that `prefill` with the same arguments would append; -1 is none.

    By score descending, in ties by token ascending; all -1 at pads and in rows without room (an error on the CPU).
    """
    if cfg.index_shared:
        raise ValueError("index_shared is True; allowed: False, because a layer without an indexer cannot pick")
    check(params, cfg, x, None)
    step = begin(x, cache, checked_room(cfg, x, cache), lengths)
    return keys_and_picks(params, cfg, step, cache, step.causal(cache["latent"].shape[1]))[1]


def keys_and_picks(params, cfg, step, cache, seen):
    """(keys, indices): the index keys after the step's new tokens, as stored, and each query's picks among `seen`."""
    new = indexer.project(params, cfg, step.x, step.positions, cache["latent"].dtype)
    keys = indexer.appended(cache, new, step)
    scores = masked_index_scores(new.q, keys["k_index"], new.weights, seen, keys.get("k_index_scale"))
    return keys, choose(cfg, scores)


def choose(cfg, scores, ops=reference_ops):
    """int32 B T L: the index_topk slots of largest score B T S; -inf is never picked."""
    return ops.topk_indices(scores, cfg.index_topk)


def picked(indices, slots):
    """bool B T S: the slots that indices, int32 B T L, names; what lies outside 0..S-1 names none."""
    inside = (indices >= 0) & (indices < slots)
    chosen = torch.zeros(*indices.shape[:2], slots + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, indices.long().masked_fill(~inside, slots), True)[..., :slots]


def check(params, cfg, x, indices, tokens=None):
    """Raise ValueError or TypeError for fields, parameters, tokens and picks that do not fit together."""
    inputs.check_tokens(x, cfg.hidden_size, tokens)
    inputs.check_counts(cfg, 1, "index_topk")
    if cfg.q_lora_rank is None:
        raise ValueError("q_lora_rank is None; allowed: an int >= 1, the width of the latent that indexes")
    if not cfg.index_shared:
        indexer.check(params, cfg)
        if indices is not None:
            raise ValueError("indices is given; allowed: None without index_shared, because the layer picks by itself")
        return
    if indices is None:
        raise ValueError("indices is None; allowed with index_shared: int32 B T L, the picks of another layer")
    sizes = {"B": x.shape[0], "T": x.shape[1]}
    ops_check.tensor("indices", indices, "B T L", sizes, (torch.int32,), x.device)


def checked_room(cfg, x, cache):
    """As `mla.checked_room`."""
    slots = mla.checked_room(cfg, x, cache)
    if not cfg.index_shared:
        indexer.check_buffers(cfg, x, cache, slots)
    return slots
