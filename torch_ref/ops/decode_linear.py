"""One step of a linear-attention state."""

from ..core import delta
from . import check


def decode_linear(q, k, v, state, decay, *, beta=None):
    """state <- decay state;  u = v, or beta (v - state^T k);  state <- state + k u^T;  out = state^T q.

    The order matters: the delta rule reads the decayed state, and out the state that holds the new token.
    q, k: B N H. v: B N V, of q's dtype. state: float32 or wider, B N H V. decay: float32 or wider; N, one factor per
    head, B N, one per token and head, or B N H, one per key channel. beta: float32 or wider, B N; None: no delta rule.
    Returns out B N V in q's dtype and the new state in state's dtype; sums in float32 or wider. The contract allows a
    backend to overwrite state; this one does not. Raises ValueError (shapes, devices) and TypeError (dtypes).
    Katharopoulos et al. 2020; decay per head: lightning attention (2501.08313); delta rule: DeltaNet (2406.06484),
    Gated DeltaNet (2412.06464); decay per channel: Kimi Linear (2510.26692).
    """
    check.decode_linear(**locals())
    out, new = delta.step(q, k, v, state, decay, beta)
    return out.to(q.dtype), new.to(state.dtype)
