"""Building blocks shared by the mechanisms: the Attention tuple, cache specs, softmax, masks, RoPE, norms.

docs/own_mechanism.md lists those that are promised to mechanisms outside of jforge.
"""
