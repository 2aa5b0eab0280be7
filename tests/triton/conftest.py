"""Triton reads TRITON_INTERPRET when it is imported, so it is set before anything imports it."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
