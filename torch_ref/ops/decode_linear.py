"""One step of a linear-attention state."""


def decode_linear(q, k, v, state, decay, *, beta=None):
    """state <- decay state;  u = v or beta (v - state^T k);  state <- state + k u^T;  out = state^T q."""
    raise NotImplementedError("torch_ref.ops.decode_linear is not written yet")
