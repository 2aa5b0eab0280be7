"""Model types of transformers that have no family: what stands in the way."""

MISSING: dict[str, str] = {
    "blt": "bytes in patches: its global layers keep a slot a patch, and how long a patch is depends on the text",
    "gemma4_assistant": "attention over the cache of another model",
    "gemma4_unified_assistant": "attention over the cache of another model",
    "openai-gpt": "transformers keeps no cache for it, so there is nothing to compare ours with",
    "pi0": "actions made by denoising, over the cache of another tower",
    "reformer": "attention by hashes of queries that are keys too; transformers keeps hidden states and buckets",
    "unlimited_ocr_text": "all of the prompt and a window of what was generated: the bytes depend on both lengths",
    "xlm": "attention that is not causal, without a cache",
    "xlnet": "attention in permuted orders with relative positions; transformers keeps hidden states",
}
