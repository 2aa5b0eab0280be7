"""jforge and torch_ref against the attention of JAX and of torch, where those can express a mechanism.

Values and gradients. What is outside is the attention alone: both sides share the projections of jforge or of
torch_ref. A softcap is expressed by torch's FlexAttention only, as a change of scores.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judges import tokens, weights

import jforge
import torch_ref
from jforge.attention import dense, mla
from jforge.core import blocks, compare
from jforge.harness.backends import to_torch
from torch_ref.attention import dense as theirs_dense
from torch_ref.attention import mla as theirs_mla

T = 13
DENSE = ("single_head", "mha", "mqa", "gqa", "sliding_window", "block_sparse")
PLAIN = [(name, i) for name in (*DENSE, "mla") for i, cfg in enumerate(jforge.get(name).examples)
         if getattr(cfg, "attn_logit_softcapping", None) is None]  # fmt: skip
CAPPED = [(name, i) for name in DENSE for i, cfg in enumerate(jforge.get(name).examples)
          if cfg.attn_logit_softcapping is not None]  # fmt: skip


def mask_of(name: str, cfg) -> np.ndarray:
    """bool 1 N T T, or with 1 for N, from the definition of the mechanism."""
    t, s = np.arange(T)[:, None], np.arange(T)
    seen = s <= t
    if name == "sliding_window":
        seen &= s > t - cfg.sliding_window
    if name == "block_sparse":
        lists = jforge.attention.block_sparse._lists(cfg, jnp.arange(T)[None], T)
        heads = blocks.visible(lists, cfg.block_size, jnp.arange(T)[None], T, cfg.num_attention_heads)
        return np.moveaxis(np.asarray(heads), 2, 1)
    return seen[None, None]


def biases_of(cfg) -> np.ndarray | None:
    """float32 1 N T T of ALiBi, from its definition where heads are no power of two; None without it."""
    if not getattr(cfg, "alibi", False):
        return None
    heads = cfg.num_attention_heads
    power = max(n for n in (1, 2, 4, 8) if n <= heads)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return (np.array(slopes)[None, :, None, None] * (np.arange(T) - np.arange(T)[:, None])).astype(np.float32)


def outside_jax(name: str, cfg):
    """forward with jax.nn.dot_product_attention in its middle; a window by its own argument."""
    mask, at = mask_of(name, cfg), jnp.broadcast_to(jnp.arange(T), (2, T))
    window = {"local_window_size": (cfg.sliding_window - 1, 0)} if name == "sliding_window" else {"mask": mask}
    window |= {"bias": biases_of(cfg)}

    def forward(params, x):
        if name != "mla":
            q, k, v = dense.project(params, cfg, x, at)
            out = _padded(q, k, v, scale=cfg.scaling, **window)
            return dense.project_out(params, cfg, x, out)
        q = jnp.concatenate(mla.queries(params, cfg, x, at), axis=-1)
        k, v = mla.expand(params, *mla.latents(params, cfg, x, at))
        return mla.project_out(params, cfg, _padded(q, k, v, scale=cfg.scaling, mask=mask))

    return forward


def _padded(q, k, v, **options):
    """JAX's wants values as wide as keys: zeros behind the narrower change nothing."""
    wide = max(q.shape[-1], v.shape[-1])
    q, k, full = (jnp.pad(a, [(0, 0)] * 3 + [(0, wide - a.shape[-1])]) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, full, **options)[..., : v.shape[-1]]


def outside_torch(name: str, cfg, attention):
    """torch_ref's forward with `attention` (q, k, v, mask, scale) of torch, heads first, in its middle."""
    mask, bias, at = torch.tensor(mask_of(name, cfg)), biases_of(cfg), torch.arange(T)[None]
    if bias is not None:
        mask = torch.where(mask, torch.tensor(bias), -torch.inf)

    def forward(params, x):
        at_rows = at.expand(len(x), T)
        if name != "mla":
            q, k, v = theirs_dense.project(params, cfg, x, at_rows)
        else:
            q_nope, q_rope, latent, k_rope = theirs_mla.project(params, cfg, x, at_rows)
            q = torch.cat([q_nope, q_rope], dim=-1)
            k_nope = torch.einsum("bsc,cnh->bsnh", latent, params["wk_b"])
            k = torch.cat([k_nope, k_rope[:, :, None].expand(*k_nope.shape[:3], -1)], dim=-1)
            v = torch.einsum("bsc,cnv->bsnv", latent, params["wv_b"])
        out = attention(*(a.transpose(1, 2) for a in (q, k, v)), mask, cfg.scaling).transpose(1, 2)
        if name == "mla":
            return theirs_mla.project_out(params, cfg, x, out)
        return theirs_dense.project_out(params, cfg, x, out)

    return forward


def sdpa(q, k, v, mask, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def jax_values(forward, params, x) -> list:
    """[y, and the gradients of a weighted sum of it by every parameter and by x]."""

    def both(params, x):
        y, back = jax.vjp(forward, params, x)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    y, (by_params, by_x) = jax.jit(both)(params, x)
    return [y, by_x, *(by_params[name] for name in sorted(params))]


def torch_values(forward, params, x) -> list:
    params = {name: to_torch(p).requires_grad_() for name, p in params.items()}
    x = to_torch(x).requires_grad_()
    y = forward(params, x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    return [y.detach(), x.grad, *(params[name].grad for name in sorted(params))]


def same(got: list, want: list, dtype: str) -> None:
    for one, other in zip(got, want, strict=True):
        assert compare.relative(np.asarray(one), np.asarray(other)) <= compare.OUT[dtype]


@pytest.mark.parametrize("name,index", PLAIN)
def test_jforge_is_the_attention_of_jax(name, index):
    att = jforge.get(name)
    cfg = att.examples[index]
    params, x = weights(att, cfg, "float32"), tokens(cfg, 2, T, "float32")
    got = jax_values(lambda params, x: att.forward(params, cfg, x), params, x)
    same(got, jax_values(outside_jax(name, cfg), params, x), "float32")


@pytest.mark.parametrize("name,index", PLAIN)
def test_both_are_the_attention_of_torch(name, index):
    att = jforge.get(name)
    cfg = att.examples[index]
    params, x = weights(att, cfg, "float64"), tokens(cfg, 2, T, "float64")
    want = torch_values(outside_torch(name, cfg, sdpa), params, x)
    theirs = torch_ref.get(name)
    same(torch_values(lambda params, x: theirs.forward(params, cfg, x), params, x), want, "float64")
    with jax.enable_x64(True):
        same(jax_values(lambda params, x: att.forward(params, cfg, x), params, x), want, "float64")


@pytest.mark.parametrize("name,index", CAPPED)
def test_a_softcap_is_that_of_flex_attention(name, index):
    """Values alone: on a CPU FlexAttention has no gradient."""
    att = jforge.get(name)
    cfg = att.examples[index]
    cap, params, x = cfg.attn_logit_softcapping, weights(att, cfg, "float32"), tokens(cfg, 2, T, "float32")

    def flex(q, k, v, mask, scale):
        from torch.nn.attention.flex_attention import flex_attention

        def score(value, b, h, t, s):
            return torch.where(mask[0, 0 if mask.shape[1] == 1 else h, t, s], cap * torch.tanh(value / cap), -torch.inf)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs without being compiled
            return flex_attention(q, k, v, score_mod=score, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    given = {n: to_torch(p) for n, p in params.items()}, to_torch(x)
    with torch.no_grad():
        want = outside_torch(name, cfg, flex)(*given)
        theirs = torch_ref.get(name).forward(given[0], cfg, given[1])
    same([theirs, jax.jit(lambda params, x: att.forward(params, cfg, x))(params, x)], [want, want], "float32")


def test_a_mask_that_is_off_by_one_is_noticed():
    """What notices nothing above would notice this."""
    att = jforge.get("sliding_window")
    cfg = att.examples[1]
    params, x = weights(att, cfg, "float64"), tokens(cfg, 2, T, "float64")
    wider = att.Config(**{**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}, "sliding_window": 2})
    want = torch_values(outside_torch("sliding_window", wider, sdpa), params, x)
    with pytest.raises(AssertionError):
        got = torch_values(lambda params, x: torch_ref.get("sliding_window").forward(params, cfg, x), params, x)
        same(got, want, "float64")
