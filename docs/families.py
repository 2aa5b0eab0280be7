"""The lists of docs/families.md. `python docs/families.py` makes them from the families and the installed transformers.

They stand between `<!-- NAME -->` and `<!-- end -->`: `families` and `count` of the causal-LM types, `image_text` and
`image_text_count` of those that take images and text, `bytes` and `refused` of both.
"""

import re
from functools import cache
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from jforge import hf, lens
from jforge.hf.config import text_config
from jforge.hf.families import MISSING

DOCUMENT = Path(__file__).with_suffix(".md")
_QSA = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048,
        "indexer_compress_ratio": 64}  # fmt: skip
ALSO = {
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "lfm2_moe": {"full_attn_idxs": [2, 5]},
    "qwen3_omni_moe_text": {"hidden_size": 3584},
    "qwen4_exp_text": _QSA,
}
"""Where the defaults of a class are no model; by the type of the language model."""


@cache
def config(model_type: str) -> dict:
    """The language model of the default config of a class; of BERT and its kin as a decoder."""
    if model_type in MISSING:
        return {"model_type": model_type}
    found = text_config(transformers.CONFIG_MAPPING[model_type]())
    return found | ALSO.get(found["model_type"], {}) | ({"is_decoder": True} if "is_decoder" in found else {})


def kinds(model_type: str) -> tuple[str, str]:
    """(the mechanisms of its layers, what is missing for `convert`); the one or the other is empty."""
    try:
        return ", ".join(dict.fromkeys(name for name, *_ in hf.layers(config(model_type)))), ""
    except NotImplementedError as error:
        return "", re.sub(r"^(layer \d+ of [\w-]+ is \w+|model_type '[\w-]+' is not converted): ", "", str(error))


def bytes_known(model_type: str) -> bool:
    """Whether the lens answers."""
    try:
        return bool(lens.from_config(config(model_type)).layers)
    except NotImplementedError:
        return False


@cache
def rows() -> list[tuple[str, str, str]]:
    """(model_type, mechanisms, missing piece) of each causal-LM type of transformers."""
    return [(name, *kinds(name)) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


@cache
def image_text_rows() -> list[tuple[str, str, bool]]:
    """(model_type, that of its language model, whether the lens answers) of each type with images and text."""
    names = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return [(name, config(name)["model_type"], bytes_known(name)) for name in names]


def render(text: str) -> str:
    """The document with its lists and counts as the code has them now."""
    found, images = rows(), image_text_rows()
    known = {name: bytes_known(name) for name, *_ in found}
    unknown = [name for name, answered in known.items() if not answered]
    unknown += [inner for _, inner, answered in images if not answered and inner not in unknown]
    table = ["| model_type | convertible | bytes | layers, or what `convert` lacks |", "| --- | --- | --- | --- |"]
    table += [
        f"| `{name}` | {'yes' if names else ''} | {'yes' if known[name] else ''} | {names or missing} |"
        for name, names, missing in found
    ]
    others = ["| model_type | language model | bytes |", "| --- | --- | --- |"]
    others += [f"| `{name}` | `{inner}` | {'yes' if answered else ''} |" for name, inner, answered in images]
    parts = {
        "families": _block(table),
        "count": f" {sum(bool(names) for _, names, _ in found)} of {len(found)} ",
        "bytes": f" {sum(known.values())} of {len(known)} ",
        "image_text": _block(others),
        "image_text_count": f" {sum(answered for *_, answered in images)} of {len(images)} ",
        "refused": _block([f"- `{name}`: {MISSING[name]}" for name in sorted(unknown)]),
    }
    for name, part in parts.items():
        text = re.sub(rf"(<!-- {name} -->).*?(<!-- end -->)", lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    return text


def _block(lines: list[str]) -> str:
    return "\n".join(["", "", *lines, "", ""])


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
