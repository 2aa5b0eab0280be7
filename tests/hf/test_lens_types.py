"""The lens against the caches of every type of transformers, buffer by buffer: full widths, six layers or one period.

docs/families.md lists what is answered and what is refused, docs/divergences.md what differs by design (APART).
"""

import json

import lens_types
import pytest
import torch
import transformers
from lens_types import APART, CAUSAL, IMAGE_TEXT

from jforge import lens
from jforge.hf.families import MISSING

pytestmark = pytest.mark.pinned

REFUSED = set(MISSING) | {"unlimited_ocr"}  # the latter by the type of its language model
ENCODED = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
           "prophetnet"]  # fmt: skip
ANSWERED = {"causal": [n for n in CAUSAL if n not in REFUSED], "images": [n for n in IMAGE_TEXT if n not in REFUSED]}
CASES = [
    (name, head) for head, names in (ANSWERED | {"texts": ENCODED, "speech": ["whisper"]}).items() for name in names
]


@pytest.fixture(autouse=True)
def one_thread():
    """Of products that are not computed more would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name, head", CASES, ids=map("-".join, CASES))
def test_each_cache_holds_what_the_lens_says(name, head):
    theirs = lens_types.held(name, head)
    layers, cross = lens_types.counted(theirs.config, theirs.context, bool(theirs.cross))
    assert list(map(sorted, layers)) == list(map(sorted, theirs.layers))
    assert list(map(sorted, cross)) == list(map(sorted, theirs.cross))
    assert cross or head not in ("texts", "speech")
    # from the file that transformers writes, in which defaults of sections are left out
    written = json.loads(theirs.config.to_json_string())
    assert lens_types.counted(written, theirs.context, bool(theirs.cross)) == (layers, cross)


def test_how_many_types_are_answered():
    assert (len(CAUSAL), len(IMAGE_TEXT)) == (189, 97)
    assert (len(ANSWERED["causal"]), len(ANSWERED["images"])) == (182, 95)


def test_other_sizes_would_be_noticed():
    """One layer more, another width or another window, and none of the comparisons above would hold."""
    theirs = lens_types.held("gemma2", "causal")
    assert theirs.context > theirs.config.sliding_window
    for other in ({"head_dim": 128}, {"num_key_value_heads": 2}, {"sliding_window": 100}, {"num_hidden_layers": 5}):
        config = theirs.config.to_dict() | other
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
        assert lens_types.counted(config, theirs.context)[0] != theirs.layers


@pytest.mark.parametrize("name", sorted(MISSING))
def test_what_is_refused_says_why(name):
    with pytest.raises(NotImplementedError, match=f"^model_type '{name}' is not converted: ") as refusal:
        lens.from_config({"model_type": name})
    assert str(refusal.value).endswith(MISSING[name])


def test_the_section_of_a_model_may_be_refused():
    with pytest.raises(NotImplementedError, match="all of the prompt and a window of what was generated"):
        lens.from_config(transformers.CONFIG_MAPPING["unlimited_ocr"]())


def test_what_differs_by_design_is_in_the_documents():
    text = (lens_types.ROOT / "docs" / "divergences.md").read_text(encoding="utf-8")
    assert not [model for model, what in APART.items() if what not in text]
