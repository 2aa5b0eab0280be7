"""Native sparse attention as a loop over queries, entries and blocks, and its test config."""

import dense_family as family
import torch
from dense_family import INF, config

SMALL = dict(
    kernel_size=4,
    kernel_stride=2,
    block_size=6,
    topk=3,
    init_blocks=1,
    local_blocks=1,
    window_size=3,
    compress="mlp",
    compress_hidden_size=3,
    separate_branches=False,
)


def nsa_config(**fields):
    return config(**(SMALL | fields))


def init_params(cfg, dtype=torch.float64):
    d, n, k, h, v = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    size, f = cfg.kernel_size, cfg.compress_hidden_size
    more = {"wgate": (d, n, 3), "k_pe": (size, k, h), "v_pe": (size, k, v)}
    for side, width in (("k", h), ("v", v)):
        if cfg.compress == "weighted":
            more[f"phi_{side}"] = (size, k)
        elif cfg.compress == "linear":
            more[f"phi_{side}"] = (size, k, width, width)
        elif cfg.compress == "mlp":
            more |= {f"phi_{side}_in": (size, k, width, f), f"phi_{side}_out": (k, f, width)}
        if cfg.separate_branches:
            more |= {f"w{side}_cmp": (d, k, width), f"w{side}_win": (d, k, width)}
    params = family.init_params(cfg, dtype, **more)
    return {name: 2 * leaf if name.startswith("phi") else leaf for name, leaf in params.items()}


def compressed(params, cfg, rows, kv, side):
    """One entry of one KV head from its l raw rows, by the formula of cfg.compress."""
    rows = [row + params[f"{side}_pe"][j, kv] for j, row in enumerate(rows)]
    if cfg.compress == "mean":
        return sum(rows) / len(rows)
    if cfg.compress == "weighted":
        return sum(params[f"phi_{side}"][j, kv] * row for j, row in enumerate(rows))
    if cfg.compress == "linear":
        return sum(row @ params[f"phi_{side}"][j, kv] for j, row in enumerate(rows))
    hidden = sum(row @ params[f"phi_{side}_in"][j, kv] for j, row in enumerate(rows))
    return (hidden / (1 + torch.exp(-hidden))) @ params[f"phi_{side}_out"][kv]


def mixed(cfg, q, keys, values):
    """(output, probabilities) of one query over lists of keys and values; 0 over nothing."""
    p = family.probabilities([family.logit(cfg, q, k) for k in keys]) if len(keys) else []
    return sum((w * v for w, v in zip(p, values, strict=True)), torch.zeros(cfg.v_head_dim, dtype=q.dtype)), p


def blocks_of(cfg, t, p_of_heads):
    """The blocks that a KV head selects at t, from its heads' probabilities over the visible entries."""
    current, scores = t // cfg.block_size, {}
    for j in range(current + 1):
        scores[j] = 0.0
        for p in p_of_heads:
            for i, weight in enumerate(p):
                entry = range(i * cfg.kernel_stride, i * cfg.kernel_stride + cfg.kernel_size)
                shared = sum(s // cfg.block_size == j for s in entry)
                scores[j] += weight * shared / cfg.kernel_stride
        if j < cfg.init_blocks or j > current - cfg.local_blocks:
            scores[j] = INF
    return sorted(scores, key=lambda j: (-scores[j], j))[: cfg.topk]


def nsa_loop(params, cfg, x, positions):
    """(y B T D, the selected blocks by (row, t, KV head)) of the paper's equations, a query and a head at a time."""
    l, d, kv_heads = cfg.kernel_size, cfg.kernel_stride, cfg.num_key_value_heads  # noqa: E741
    group, picks, ys = cfg.num_attention_heads // kv_heads, {}, []
    for b, (row, where) in enumerate(zip(x, positions.tolist(), strict=True)):
        q, k, v = family.project_row(params, cfg, row)
        names = [(f"wk_{branch}", f"wv_{branch}") for branch in ("cmp", "win")]
        (raw_k, raw_v), (k_win, v_win) = (
            [family.project_row(params, cfg, row, pair) for pair in names] if cfg.separate_branches else [(k, v)] * 2
        )
        q, k, k_win = (family.rotated(cfg, z, where) for z in (q, k, k_win))
        gates = 1 / (1 + torch.exp(-torch.einsum("td,dng->tng", row, params["wgate"])))
        outs = torch.zeros(len(row), cfg.num_attention_heads, cfg.v_head_dim, dtype=x.dtype)
        for kv in range(kv_heads):
            starts = range(0, len(row) - l + 1, d)
            entry_k = [compressed(params, cfg, raw_k[i : i + l, kv], kv, "k") for i in starts]
            entry_k = [family.rope(cfg, entry, where[i]) for entry, i in zip(entry_k, starts, strict=True)]
            entry_v = [compressed(params, cfg, raw_v[i : i + l, kv], kv, "v") for i in starts]
            heads = range(kv * group, (kv + 1) * group)
            for t in range(len(row)):
                ready = sum(i + l - 1 <= t for i in starts)
                cmp = {n: mixed(cfg, q[t, n], entry_k[:ready], entry_v[:ready]) for n in heads}
                picks[b, t, kv] = blocks_of(cfg, t, [cmp[n][1] for n in heads])
                chosen = [s for s in range(t + 1) if s // cfg.block_size in picks[b, t, kv]]
                recent = range(max(0, t - cfg.window_size + 1), t + 1)
                for n in heads:
                    slc, _ = mixed(cfg, q[t, n], k[chosen, kv], v[chosen, kv])
                    win, _ = mixed(cfg, q[t, n], k_win[recent, kv], v_win[recent, kv])
                    outs[t, n] = sum(g * o for g, o in zip(gates[t, n], (cmp[n][0], slc, win), strict=True))
        ys.append(family.output_row(params, cfg, row, outs))
    return torch.stack(ys), picks
