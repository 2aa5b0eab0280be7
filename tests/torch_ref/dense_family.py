"""What the tests of the mechanisms share: dense configs, and attention as a loop over single tokens and heads."""

import math
from types import SimpleNamespace

import torch

from torch_ref.core.rope import apply_rope, frequencies

torch.set_num_threads(1)  # handing tensors this small to other threads takes several times the work itself

NAN, INF = math.nan, math.inf
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 16}


def config(n=4, k=2, **fields):
    defaults = dict(
        hidden_size=10,
        num_attention_heads=n,
        num_key_value_heads=k,
        head_dim=6,
        v_head_dim=5,
        attention_bias=False,
        attention_output_bias=False,
        qk_norm=None,
        norm_offset=0.0,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_layout="half",
        attn_logit_softcapping=None,
        scaling=None,
        attn_output_gate=False,
        output_gate_type="sigmoid",
        output_gate_per_head=False,
        clip_qkv=None,
        qk_norm_type="rms",
        qk_norm_bias=False,
        qk_norm_weight=True,
        qk_norm_after_rope=False,
        v_norm=False,
        attention_k_eq_v=False,
        alibi=False,
        attn_scale=None,
        floor_scale=8192,
        attn_scale_from=1,
    )
    return SimpleNamespace(**(defaults | fields))


SLOPES = {
    3: [1 / 16, 1 / 256, 1 / 4],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
}

# what the dense part of a config can be; each mechanism is tested on all of them
DENSE = {
    "plain": {},
    "mqa": dict(n=3, k=1, rope_layout="interleaved"),
    "mha": dict(n=3, k=3, rope_parameters=None, scaling=0.7),
    "gemma": dict(qk_norm="head", norm_offset=1.0, attn_logit_softcapping=0.8, scaling=0.9),
    "gpt_oss": dict(attention_bias=True, attention_output_bias=True, rope_parameters=YARN),
    "gated": dict(
        attn_output_gate=True, qk_norm="flat", rope_parameters={"rope_theta": 5e6, "partial_rotary_factor": 0.67}
    ),
}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def init_params(cfg, dtype=torch.float64, **more):
    """The parameters of `dense`, and those that `more` gives the shapes of."""
    d, n, k, h, v = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.v_head_dim
    shapes = {"wq": (d, n, h), "wk": (d, k, h), "wv": (d, k, v), "wo": (n, v, d)}
    if cfg.attention_bias:
        shapes |= {"bq": (n, h), "bk": (k, h), "bv": (k, v)}
    if cfg.attention_k_eq_v:
        shapes = {name: shape for name, shape in shapes.items() if name not in ("wv", "bv")}
    if cfg.attention_output_bias:
        shapes["bo"] = (d,)
    if cfg.qk_norm is not None and cfg.qk_norm_weight:
        one = cfg.qk_norm == "head"
        norms = {"q_norm": (h,) if one else (n, h), "k_norm": (h,) if one else (k, h)}
        shapes |= norms | ({f"{name}_bias": shape for name, shape in norms.items()} if cfg.qk_norm_bias else {})
    if cfg.attn_output_gate:
        shapes["wg"] = (d, n) if cfg.output_gate_per_head else (d, n, v)
    return {name: random(*shape, seed=i, dtype=dtype) / 2 for i, (name, shape) in enumerate((shapes | more).items())}


def tokens(cfg, batch=2, new=7, dtype=torch.float64, seed=99):
    return random(batch, new, cfg.hidden_size, seed=seed, dtype=dtype)


# ---- loops over single tokens


def rope(cfg, vector, position):
    if cfg.rope_parameters is None:
        return vector
    theta, factor = frequencies(cfg.rope_parameters, cfg.head_dim)
    return apply_rope(vector[None, None, None], torch.tensor([[int(position)]]), theta, factor, cfg.rope_layout)[
        0, 0, 0
    ]


def project_row(params, cfg, x, weights=("wq", "wk", "wv")):
    """[z_q, z_k, z_v] of one row x T D, each T heads width, before RoPE; a name longer than two letters has no bias."""
    out = []
    for name in weights:
        source = "wk" if name == "wv" and cfg.attention_k_eq_v else name
        z = torch.stack([x @ params[source][:, i] for i in range(params[source].shape[1])], 1)
        z = z + params["b" + source[1]] if cfg.attention_bias and len(name) == 2 else z
        if name[1] == "v":
            z = torch.stack([head_norm(cfg, token, None, None, "rms") for token in z]) if cfg.v_norm else z
        elif cfg.qk_norm is not None and not cfg.qk_norm_after_rope:
            z = normed(params, cfg, name[1], z)
        out.append(z if cfg.clip_qkv is None else torch.minimum(torch.maximum(z, -bound(cfg)), bound(cfg)))
    return out


def bound(cfg):
    return torch.tensor(cfg.clip_qkv, dtype=torch.float64)


def head_norm(cfg, heads, weight, bias, kind):
    """Each of the vectors heads N H under its norm; weight and bias: N H or None."""
    centred = heads - heads.mean(1, keepdim=True) if kind == "layer" else heads
    out = centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + cfg.rms_norm_eps)
    out = out if weight is None else out * (cfg.norm_offset + weight)
    return out if bias is None else out + bias


def normed(params, cfg, side, z):
    """z T heads H, queries (side "q") or keys, under the norm of the config."""
    weight, bias = params.get(f"{side}_norm"), params.get(f"{side}_norm_bias")
    if cfg.qk_norm == "flat" and weight is not None:
        wide = [w if w is None else w.flatten()[None] for w in (weight, bias)]
        return torch.stack([head_norm(cfg, token.flatten()[None], *wide, cfg.qk_norm_type) for token in z]).view(
            z.shape
        )
    return torch.stack([head_norm(cfg, token, weight, bias, cfg.qk_norm_type) for token in z])


def turned(params, cfg, side, z, positions):
    """z T heads H after RoPE, at one position a token, and after a norm that comes behind it."""
    z = rotated(cfg, z, positions)
    return normed(params, cfg, side, z) if cfg.qk_norm is not None and cfg.qk_norm_after_rope else z


def scaled_by_index(cfg, q):
    """q T N H, each query times the factor of its index."""
    if cfg.attn_scale is None:
        return q
    factors = [1 + cfg.attn_scale * math.log(1 + (t + cfg.attn_scale_from) // cfg.floor_scale) for t in range(len(q))]
    return q * torch.tensor(factors, dtype=q.dtype)[:, None, None]


def rotated(cfg, z, positions):
    return torch.stack(
        [torch.stack([rope(cfg, head, p) for head in token]) for token, p in zip(z, positions, strict=True)]
    )


def logit(cfg, q, k):
    z = (cfg.scaling or 1 / math.sqrt(cfg.head_dim)) * float(q @ k)
    return (
        z
        if cfg.attn_logit_softcapping is None
        else cfg.attn_logit_softcapping * math.tanh(z / cfg.attn_logit_softcapping)
    )


def probabilities(logits, sink=None):
    weights = [math.exp(z) for z in logits]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))
    return [w / total for w in weights]


def output_row(params, cfg, x, outs):
    """y T D of one row from outs T N V."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for n in range(cfg.num_attention_heads):
            out = outs[t, n]
            if cfg.attn_output_gate:
                gate = x[t] @ params["wg"][:, n]  # one number with output_gate_per_head
                out = out * (torch.log1p(gate.exp()) if cfg.output_gate_type == "softplus" else 1 / (1 + (-gate).exp()))
            y[t] += out @ params["wo"][n]
    return y + params["bo"] if cfg.attention_output_bias else y


def loop_over_visible(params, cfg, x, positions, visible, sinks=None):
    """y B T D of attention in which head n of query t sees the tokens visible(q, k, t, n), q and k those of the row."""
    ys = []
    for row, p in zip(x, positions, strict=True):
        q, k, v = project_row(params, cfg, row)
        q, k = scaled_by_index(cfg, turned(params, cfg, "q", q, p)), turned(params, cfg, "k", k, p)
        outs = torch.zeros(len(row), cfg.num_attention_heads, cfg.v_head_dim, dtype=x.dtype)
        for t in range(len(row)):
            for n in range(cfg.num_attention_heads):
                kv = n // (cfg.num_attention_heads // cfg.num_key_value_heads)
                seen = sorted(visible(q, k, t, n))
                slope = SLOPES[cfg.num_attention_heads][n] if cfg.alibi else 0.0
                logits = [logit(cfg, q[t, n], k[s, kv]) + slope * (s - t) for s in seen]
                p_seen = probabilities(logits, None if sinks is None else sinks[n])
                for s, weight in zip(seen, p_seen, strict=True):
                    outs[t, n] += weight * v[s, kv]
        ys.append(output_row(params, cfg, row, outs))
    return torch.stack(ys)


def default_positions(x):
    return torch.arange(x.shape[1]).expand(x.shape[:2])


def odd_positions(x):
    """Positions with gaps, another in each row."""
    return torch.stack(
        [torch.arange(x.shape[1]) * (b + 1) + 3 * b + torch.arange(x.shape[1]) // 4 for b in range(len(x))]
    )


# ---- caches


def poisoned_cache(att, cfg, batch, capacity, dtype=torch.float64):
    """An empty cache with NaN in every slot; a running sum, a linear state and the rows of a convolution have no slots,
    they start at 0."""
    cache = att.init_cache(cfg, batch, capacity, dtype)
    kept = ("length", "k_sum", "state", "conv")
    return {name: leaf if name in kept else torch.full_like(leaf, NAN) for name, leaf in cache.items()}


def filled(att, cfg, params, first=(13, 6), capacity=16, dtype=torch.float64):
    """A cache of two rows after a ragged prefill, NaN in everything that holds nothing."""
    x = tokens(cfg, new=max(first), dtype=next(iter(params.values())).dtype)
    return att.prefill(params, cfg, x, poisoned_cache(att, cfg, 2, capacity, dtype), int32(*first))[1]


def fold_decode(att, params, cfg, x, cache):
    ys = []
    for t in range(x.shape[1]):
        y, cache = att.decode(params, cfg, x[:, t : t + 1], cache)
        ys.append(y)
    return torch.cat(ys, 1), cache


def same_caches(cache, other):
    """Both hold the same: the same numbers where numbers are, the same poison elsewhere."""
    assert cache.keys() == other.keys()
    for name in cache:
        assert cache[name].dtype == other[name].dtype
        one, two = (leaf.float() if leaf.dtype == torch.float8_e4m3fn else leaf for leaf in (cache[name], other[name]))
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, equal_nan=True)


def row_of(cache, row):
    return {name: leaf[row : row + 1] for name, leaf in cache.items()}


def spied(ops):
    """(calls, namespace): the ops, and what each call is given and gives back, in order."""
    calls = {name: [] for name in ops.__all__}

    def spy(name):
        def call(*args, **options):
            result = getattr(ops, name)(*args, **options)
            calls[name].append((args, options, result))
            return result

        return call

    return calls, SimpleNamespace(**{name: spy(name) for name in calls})
