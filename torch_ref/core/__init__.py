"""Shared pieces of the mechanisms and ops: dtypes, norms, rotary positions, masked softmax, cache appends."""
