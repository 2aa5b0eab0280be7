"""jforge/hf/defaults.json: what files of image-text models leave to the classes of transformers.

`python docs/hf_defaults.py` makes it from the installed transformers. A text_config often has a model_type and little
else, or not even that: LLaVA's says "llama" and means the sizes of LlamaConfig.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from jforge.hf.config import SECTIONS
from jforge.hf.families import FAMILIES

DOCUMENT = Path(__file__).parents[1] / "jforge" / "hf" / "defaults.json"
# what a family asks for and has no default of its own: widths, heads and layers under every name they have
SIZES = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "n_embd", "n_head", "n_layer", "d_model",
    "decoder_attention_heads", "decoder_layers", "embed_dim", "attention_heads", "layers", "num_heads", "num_layers",
    "d_kv", "num_decoder_layers", "num_decoder_attention_heads", "n_layers", "n_heads",
)  # fmt: skip


def inner(config: Any) -> Any:
    """The language model's config, or the config itself."""
    found = (getattr(config, key, None) for key in SECTIONS)
    nested = next((one for one in found if isinstance(one, transformers.PretrainedConfig)), None)
    return config if nested is None else inner(nested)


def made(name: str) -> Any | None:
    """The default config of a class; None of one that needs arguments."""
    try:
        return transformers.CONFIG_MAPPING[name]()
    except Exception:  # a class may refuse in ways of its own
        return None


def defaults() -> dict[str, dict]:
    wrappers, sizes = {}, {}
    for name in sorted(transformers.CONFIG_MAPPING):
        if (config := made(name)) is None:
            continue
        text = inner(config)
        if text is not config and text.model_type in FAMILIES:
            wrappers[name] = text.model_type
        if name in FAMILIES and text is config:
            given = {key: getattr(type(text), key, None) for key in SIZES}
            same = type(text).attribute_map  # other names of other keys
            sizes[name] = {k: v for k, v in given.items() if type(v) is int and same.get(k, k) == k}
    return {"sizes": sizes, "wrappers": wrappers}


def render() -> str:
    """The file: a line for each model type."""
    parts = []
    for key, table in defaults().items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items())
        parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
