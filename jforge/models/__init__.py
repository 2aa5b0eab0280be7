"""Tiny decoders around any registered mechanism, in flax.nnx, for experiments: the attention is all of jforge's own.

    cfg = models.ModelConfig(vocab_size=256, layers=(models.layer("gqa", 64, heads=4),) * 2, intermediate_size=128)
    model = models.Decoder(cfg, rngs=nnx.Rngs(0))
    models.generate(model, prompts, lengths, new=32).tokens

Needs the extra `models` (flax).
"""

from jforge.models.config import ModelConfig, layer, matched
from jforge.models.decoder import Decoder
from jforge.models.generate import Generated, generate

__all__ = ["Decoder", "Generated", "ModelConfig", "generate", "layer", "matched"]
