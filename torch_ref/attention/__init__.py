"""The mechanisms: one file each, with the functions init_cache, forward, prefill and decode."""
