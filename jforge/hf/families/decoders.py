"""Decoders of encoder-decoder models that stand alone, and BERT and its kin as decoders: MHA with biases, positions in
the embeddings. Attention over an encoder is not this layer's.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jforge.hf.families.gpts import BIASES, OUT_PROJ, every_head
from jforge.hf.families.parts import Params, bias, own, split, without_rope
from jforge.hf.family import FULL, Family, Layer, all_full, with_encoder
from jforge.hf.keys import lack, only
from jforge.hf.weights import Weights

_DECODER = {
    "d_model": "hidden_size",
    "decoder_attention_heads": "num_attention_heads",
    "decoder_layers": "num_hidden_layers",
}


def _bert(config: dict, kind: str) -> dict:
    """Without is_decoder a token sees those after it too."""
    if not config.get("is_decoder"):
        lack(config, "is_decoder is false: attention that is not causal has no mechanism")
    only(config, position_embedding_type="absolute")
    return without_rope(every_head, **BIASES)(config, kind)


def _roformer(config: dict, kind: str) -> dict:
    """Neighbouring channels turn, all of them; with rotary_value those of the values as well."""
    if config.get("rotary_value"):
        lack(config, "rotary_value is true: values that turn have no mechanism")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return _bert(config, kind) | {"rope_parameters": rope, "rope_layout": "interleaved"}


def _bert_split(w: Weights, cfg: Any) -> Params:
    own = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense"}
    w.names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in own.items() for part in ("weight", "bias")}
    return split()(w, cfg)


def _whisper(w: Weights, cfg: Any) -> Params:
    """Keys have no bias."""
    N, H, D = cfg.num_attention_heads, cfg.head_dim, cfg.hidden_size
    params = own(w, replace(cfg, attention_bias=False)) | w.output("out_proj", N, H, D, bias=True)
    bq, bv = (w.vector(f"{x}_proj.bias", N, H) for x in "qv")
    return params | {"bq": bq, "bk": np.zeros_like(bq), "bv": bv}


_ENCODER = {"is_encoder_decoder": True}
_BERT = with_encoder(Family(_bert, all_full, {FULL: Layer(None, _bert_split)}))
_BART = with_encoder(
    Family(without_rope(every_head, **BIASES), all_full, {FULL: Layer(None, OUT_PROJ)}, _ENCODER, _DECODER)
)
_BERTS = ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
          "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip
_BARTS = ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_BERTS, _BERT),
    **dict.fromkeys(_BARTS, _BART),
    "bigbird_pegasus": with_encoder(
        Family(
            without_rope(every_head, bias),
            all_full,
            {FULL: Layer(None, OUT_PROJ)},
            _ENCODER,
            _DECODER | {"use_bias": "attention_bias"},
        )
    ),
    "roformer": with_encoder(Family(_roformer, all_full, {FULL: Layer(None, _bert_split)})),
    "trocr": _BART._replace(defaults={}),
    "whisper": with_encoder(
        Family(without_rope(every_head, **BIASES), all_full, {FULL: Layer(None, _whisper)}, _ENCODER, _DECODER)
    ),
}
