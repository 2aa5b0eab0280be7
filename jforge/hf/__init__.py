"""Models of Hugging Face: config.json -> the mechanism and Config of every layer, and their weights -> params.

    layers(load("config.json"))  ->  [("gqa", Config(hidden_size=4096, ...)), ...]
    att, cfg, params = convert(model.config, model.state_dict(), layer=0)
    y = att.forward(params, cfg, hidden_states)          # what layers[0].self_attn makes of its hidden_states

Neither transformers nor torch is imported.
"""

from jforge.hf.config import layer, layers, load
from jforge.hf.convert import convert
from jforge.hf.families import FAMILIES

__all__ = ["FAMILIES", "convert", "layer", "layers", "load"]
