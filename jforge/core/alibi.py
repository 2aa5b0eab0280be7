"""ALiBi (Press et al. 2021): linear biases instead of positions; a head's logits fall with the distance to the key.

    l_t,n,s = cap(scale q_t,n . k_s) + m_n (s - t)        m_n = 2^(-8 (n + 1) / N), N a power of two

s and t are places in the row. A softmax over s does not see m_n t, so nothing of it is in a cached key.
"""

import numpy as np


def slopes(heads: int) -> np.ndarray:
    """m: float32 N. Heads past n, the largest power of two, have every other slope of 2 n heads (BLOOM, MPT)."""
    power = 2 ** (heads.bit_length() - 1)
    more = np.arange(heads - power)
    exponents = np.concatenate([8 * (np.arange(power) + 1) / power, 8 * (2 * more + 1) / (2 * power)])
    return (2.0**-exponents).astype(np.float32)
