"""Bugs of DeepSeek-V4's layers (v4_window, csa, hca); test_mutants.py plants them."""

import jax.numpy as jnp
from judges import law, patch, replaced, torch_forward, unread, walks

import jforge
from jforge.attention import v4_compress, v4_window
from jforge.attention.v4_compress import Compressor
from jforge.core.norm import rms_norm

WINDOW, CSA, HCA = (jforge.get(name) for name in ("v4_window", "csa", "hca"))
SMALL = {"hidden_size": 8, "num_attention_heads": 4, "head_dim": 6, "qk_rope_head_dim": 4, "q_lora_rank": 5,
         "o_groups": 2, "o_lora_rank": 3, "sliding_window": 3,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
NEAR = WINDOW.Config(**SMALL)
PICKED = CSA.Config(**SMALL, compress_rate=4, index_n_heads=4, index_head_dim=5, index_topk=2)
ALL = HCA.Config(**SMALL, compress_rate=4)


def _series_swapped(self, params, cfg, u, z, held, positions):
    """The block's own tokens with the series that is for the next block."""
    u, z = (jnp.concatenate(jnp.split(a, 2, axis=-1)[::-1], axis=-1) if self.overlap else a for a in (u, z))
    return right_pool(self, params, cfg, u, z, held, positions)


def _bias_of_the_next_token(self, params, x, order):
    return right_rows(self, params, x, order + 1)


def _one_block_before_the_first(self, params, cfg, u, z, held, positions):
    """Rows of zeros, which block 0 does not have, take part in its softmax."""
    return right_pool(self, params, cfg, u, z, jnp.ones_like(held), positions)


def _rope_before_norm(self, params, cfg, u, z, held, positions):
    """Entries without their norm's weights, turned and then normed: the weights meet turned channels."""
    flat = {**params, f"{self.params}_norm": jnp.ones_like(params[f"{self.params}_norm"])}
    entry = right_pool(self, flat, cfg, u, z, held, positions)
    return rms_norm(entry, params[f"{self.params}_norm"], eps=cfg.rms_norm_eps)


def _position_of_the_last_token(self, params, cfg, u, z, held, positions):
    return right_pool(self, params, cfg, u, z, held, positions + self.rate - 1)


def _not_turned_back(params, cfg, out, positions):
    return right_project_out(params, cfg, out, jnp.zeros_like(positions))


def _query_without_norm(x, weight, *, eps):
    return x if x.ndim == 4 else rms_norm(x, weight, eps=eps)


def _blind_to_its_own_entry(cfg, q_pos, count):
    return (jnp.arange(count) + 1) * cfg.compress_rate <= q_pos[..., None]


def _half_of_the_state(self, length):
    """The block before is where the open one was: nothing moves when a block closes."""
    return length // self.rate * self.rate


def _pads_in_the_state(self, params, cfg, cache, step):
    everything = step._replace(keep=jnp.ones_like(step.keep), length=step.positions[:, -1] + 1)
    return right_extend(self, params, cfg, cache, everything)


def _sink_in_both_parts(params, cfg, x, cache, ops=jforge.ops):
    class Twice:
        """Ops whose call over the entries carries the sink as well."""

        def __getattr__(self, name):
            if name != "decode_attention":
                return getattr(ops, name)
            return lambda *args, **more: ops.decode_attention(*args, **{**more, "sinks": params["sinks"]})

    return HCA.decode(params, cfg, x, cache, Twice())


right_pool, right_rows, right_extend = Compressor.pool, Compressor.rows, Compressor.extend
right_project_out = v4_window.project_out
in_csa, in_hca = torch_forward("csa", PICKED), torch_forward("hca", ALL)

MUTANTS = {
    "CSA: the two series are swapped": (patch(CSA, Compressor, "pool", _series_swapped), in_csa),
    "CSA: block 0 pools rows of a block before it": (
        patch(CSA, Compressor, "pool", _one_block_before_the_first), in_csa),
    "CSA: the block before is lost when one closes": (
        patch(CSA, Compressor, "_base", _half_of_the_state), walks(PICKED)),
    "CSA: the scan of the index keys is not counted": (
        unread(CSA, "k_index"), law("L8", PICKED)),
    "HCA: a token takes the gate bias of the next": (patch(HCA, Compressor, "rows", _bias_of_the_next_token), in_hca),
    "HCA: entries are turned before their norm": (patch(HCA, Compressor, "pool", _rope_before_norm), in_hca),
    "HCA: an entry stands at its last token": (patch(HCA, Compressor, "pool", _position_of_the_last_token), in_hca),
    "HCA: the token that completes an entry does not see it": (
        patch(HCA, v4_compress, "seen", _blind_to_its_own_entry), in_hca),
    "HCA: pads enter the state": (patch(HCA, Compressor, "extend", _pads_in_the_state), walks(ALL)),
    "HCA: the sink enters both parts": (replaced(HCA, decode=_sink_in_both_parts), walks(ALL)),
    "V4: the output is not turned back": (
        patch(WINDOW, v4_window, "project_out", _not_turned_back), torch_forward("v4_window", NEAR)),
    "V4: queries are not normed": (
        patch(WINDOW, v4_window, "rms_norm", _query_without_norm), torch_forward("v4_window", NEAR)),
}  # fmt: skip

JUDGES = {
    "torch_ref on V4": lambda: not (in_csa(CSA) or in_hca(HCA) or torch_forward("v4_window", NEAR)(WINDOW)),
    "walks of V4": lambda: not walks(PICKED)(CSA) and not walks(ALL)(HCA),
    "L8 of CSA": lambda: not law("L8", PICKED)(CSA),
}
"""What notices a mutant notices nothing in the unchanged code."""
