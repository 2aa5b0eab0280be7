"""Building blocks shared by the mechanisms: the Attention tuple, cache specs, softmax, masks, RoPE, norms."""
