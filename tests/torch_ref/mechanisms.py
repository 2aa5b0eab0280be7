"""Every mechanism of torch_ref with its test configs, parameters and the loop that judges it."""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import block_loop
import dense_family as family
import dsa_loop
import lightning_loop
import nsa_loop
import state_loops
import torch
import v4_loop
from dense_family import DENSE, YARN, config

import torch_ref

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "nsa": {
        "mean": dict(compress="mean"),
        "weighted": dict(compress="weighted", separate_branches=True),
        "linear": dict(compress="linear"),
        "mlp_separate": dict(separate_branches=True, qk_norm="head", attention_bias=True),
        "stride_is_size": dict(kernel_size=4, kernel_stride=4, block_size=4, topk=2, local_blocks=2),
        "stride_1": dict(kernel_size=3, kernel_stride=1, block_size=4, topk=2, init_blocks=0, separate_branches=True),
        "entry_is_block": dict(kernel_size=6, kernel_stride=3, block_size=6, window_size=1, init_blocks=2, topk=4),
        "few_forced": dict(init_blocks=0, local_blocks=0, topk=1),
        "more_forced_than_topk": dict(init_blocks=2, local_blocks=2, topk=1),
    },
    "moba": {f"{size}_{topk}": dict(size=size, topk=topk) for size, topk in ((1, 4), (4, 1), (7, 2), (3, 99))},
}


class Case(NamedTuple):
    """loop(params, cfg, x, positions): y B T D by the equations. tokens: how many show all that the config can do."""

    att: ModuleType
    cfg: SimpleNamespace
    params: dict
    loop: Callable
    tokens: int = 17


def in_chunk(cfg):
    size = cfg.attention_chunk_size
    return lambda q, k, t, n: [s for s in range(t + 1) if s // size == t // size]


def under_mask(sees_of):
    """Dense attention, with the sinks that params has, where head n of query t sees the tokens sees_of(cfg) gives."""

    def loop(params, cfg, x, positions):
        return family.loop_over_visible(params, cfg, x, positions, sees_of(cfg), params.get("sinks"))

    return loop


def last(cfg):
    window = getattr(cfg, "sliding_window", None)
    return lambda q, k, t, n: range(0 if window is None else max(0, t + 1 - window), t + 1)


def y_of(loop):
    return lambda *args: loop(*args)[0]


def streaming_loop(params, cfg, x, positions):
    """The tokens kept, in a list; sinks meet the query where the dropped tokens would not have been."""
    ys = []
    for row, where in zip(x, positions.tolist(), strict=True):
        q, k, v = family.project_row(params, cfg, row)
        q = family.scaled_by_index(cfg, q)
        outs = torch.zeros(len(row), cfg.num_attention_heads, cfg.v_head_dim, dtype=x.dtype)
        kept = []
        for t in range(len(row)):
            dropped = t - len(kept)
            if len(kept) == cfg.start_size + cfg.recent_size:
                del kept[cfg.start_size]
                dropped += 1
            kept.append(t)
            for n in range(cfg.num_attention_heads):
                kv = n // (cfg.num_attention_heads // cfg.num_key_value_heads)
                logits = []
                for s in kept:
                    at = where[t] - (dropped if s < cfg.start_size else 0)
                    query = family.rope(cfg, q[t, n], at)
                    logits.append(family.logit(cfg, query, family.rope(cfg, k[s, kv], where[s])))
                for s, weight in zip(kept, family.probabilities(logits), strict=True):
                    outs[t, n] += weight * v[s, kv]
        ys.append(family.output_row(params, cfg, row, outs))
    return torch.stack(ys)


def dense_cases():
    """{name: (cfg, params, loop)} of the mechanisms that are dense attention under a mask, on every kind of config."""
    made = {"single_head": config(n=1, k=1), "mha": config(**DENSE["mha"]), "mqa": config(**DENSE["mqa"])}
    made |= {f"gqa:{kind}": config(**DENSE[kind]) for kind in ("plain", "gemma", "gpt_oss", "gated")}
    made["gqa:llama3"] = config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})
    made["gqa:exact_yarn"] = config(attention_bias=True, rope_parameters=YARN | {"truncate": False})
    made |= {f"sliding_window:{kind}": config(**fields, sliding_window=5) for kind, fields in DENSE.items()}
    made = {name: (cfg, family.init_params(cfg), under_mask(last)) for name, cfg in made.items()}
    for kind, fields in DENSE.items():
        for window in (None, 5):
            cfg = config(**fields, sliding_window=window)
            params = family.init_params(cfg, sinks=(cfg.num_attention_heads,))
            made[f"sinks:{window}_{kind}"] = cfg, params | {"sinks": 4 * params["sinks"]}, under_mask(last)
        cfg = config(**fields, attention_chunk_size=5)
        made[f"chunked_local:{kind}"] = cfg, family.init_params(cfg), under_mask(in_chunk)
        cfg = config(**fields, start_size=2, recent_size=5)
        made[f"streaming:{kind}"] = cfg, family.init_params(cfg), streaming_loop
    return made


def block_cases():
    """{name: (cfg, params, loop, tokens)} of the mechanisms over blocks."""
    made, patterns = {}, {kind: block_loop.pattern_config(**fields) for kind, fields in DENSE.items()}
    for name in block_loop.PATTERNS:
        patterns |= {f"{name}_{homo}": block_loop.pattern_config(name, homo) for homo in (True, False)}
    for kind, cfg in patterns.items():
        made[f"block_sparse:{kind}"] = cfg, family.init_params(cfg), under_mask(block_loop.pattern_sees), 19
    for kind, fields in (DENSE | VARIANTS["moba"]).items():
        cfg = block_loop.moba_config(**fields)
        made[f"moba:{kind}"] = cfg, family.init_params(cfg), under_mask(block_loop.moba_sees), 19
    for kind, fields in (DENSE | block_loop.SELECTIONS).items():
        cfg = block_loop.msa_config(**fields)
        made[f"msa:{kind}"] = cfg, block_loop.msa_params(cfg), block_loop.msa_loop
    for kind, fields in (DENSE | VARIANTS["nsa"]).items():
        cfg = nsa_loop.nsa_config(**fields)
        made[f"nsa:{kind}"] = cfg, nsa_loop.init_params(cfg), y_of(nsa_loop.nsa_loop), 23
    return made


def latent_cases():
    """{name: (cfg, params, loop, tokens)} of the mechanisms whose cache is no keys and values."""
    made = {}
    for kind, cfg in dsa_loop.MLA.items():
        made[f"mla:{kind}"] = cfg, dsa_loop.init_params(cfg, indexer=False), dsa_loop.mla_loop, 9
    for kind, cfg in dsa_loop.CONFIGS.items():
        made[f"dsa:{kind}"] = cfg, dsa_loop.init_params(cfg), y_of(dsa_loop.dsa_loop), 9
    for name, (att, cfg) in v4_loop.CASES.items():
        made[name] = cfg, v4_loop.init_params(att, cfg), functools.partial(v4_loop.v4_loop, att), 14
    for kind, cfg in lightning_loop.CONFIGS.items():
        made[f"lightning:{kind}"] = cfg, lightning_loop.init_params(cfg), y_of(lightning_loop.lightning_loop)
    for name, cfg in state_loops.CONFIGS.items():
        mechanism = name.split(":")[0]
        params = state_loops.init_params(torch_ref.get(mechanism), cfg)
        made[name] = cfg, params, y_of(state_loops.LOOPS[mechanism])
    return made


CASES = {
    name: Case(torch_ref.get(name.split(":")[0]), *parts)
    for name, parts in (dense_cases() | block_cases() | latent_cases()).items()
}
FIRST = {}  # a case of every mechanism
for _name, _case in CASES.items():
    FIRST.setdefault(_name.split(":")[0], _case)
