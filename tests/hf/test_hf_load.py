"""Reading a config.json from a path."""

import json

import pytest

from jforge.hf_config import load

CONFIG = {"model_type": "llama", "hidden_size": 64}


def test_load(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load(tmp_path / "config.json") == CONFIG == load(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is not JSON: line 1: "),
        (b"[1]", "holds a JSON list; it must hold an object"),
        (b"\xff\xfe{}", "is not a text file in UTF-8"),
    ],
)
def test_load_errors_name_the_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)


def test_load_a_directory(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load(tmp_path)
