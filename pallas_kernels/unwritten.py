"""Ops that have no Mosaic GPU kernel yet. Signatures are the contract's; each call raises before any launch."""


def _unwritten(op: str):
    raise NotImplementedError(f"pallas_kernels.{op} has no kernel yet; jforge.ops.{op} computes the same function")
