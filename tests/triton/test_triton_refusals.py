"""What has no Triton kernel is refused with the reason, before any launch. Bad arguments are in the ops' contract."""

import numpy as np
import pytest
import torch
from calls import EXAMPLES, given

import triton_kernels as tk

ATTENDING = ("decode_attention", "decode_mla", "decode_block_sparse", "decode_sparse_mla")
CODES = {"k": torch.int8, "v": torch.int8, "k_scale": (2, 100, 2), "v_scale": (2, 100, 2)}
LATENT_CODES = {"latent": torch.int8, "latent_scale": (2, 100)}
TABLE = {"page_table": np.zeros((2, 2), np.int32)}
LATENTS = [
    ({"C": 576}, {}, "C=576"), ({"R": 80}, {}, "R=80"), ({}, LATENT_CODES, "latent_scale"),
]  # fmt: skip
KEYS = [({"I": 257}, {}, "I=257"), ({"J": 257}, {}, "J=257"), ({"I": 200, "J": 200}, {}, "I=200 heads of J=200")]

# op: (sizes that change, arguments that change, how the reason reads); an argument is a dtype, a shape or a value
UNWRITTEN = {
    "decode_attention": [
        ({"H": 320}, {}, "H=320"), ({"V": 320}, {}, "V=320"), ({}, CODES, "k_scale"), ({}, TABLE, "page_table"),
    ],
    "decode_mla": [*LATENTS, *(({"S": page}, TABLE, f"page size is {page}") for page in (48, 8))],
    "decode_block_sparse": [
        ({"H": 272}, {}, "H=272"), ({"V": 272}, {}, "V=272"), ({"H": 528, "V": 0}, {}, "H=528"), ({}, CODES, "k_scale"),
    ],
    "decode_sparse_mla": LATENTS,
    "index_scores": KEYS,
    "block_index_scores": KEYS,
    "decode_linear": [({"H": 1025}, {}, "H=1025")],
}  # fmt: skip
# op: arguments that are float32 whatever the others are
FLOAT32 = {"index_scores": ["weights"], "decode_linear": ["state", "decay", "beta"], "merge_states": ["lses"]}


@pytest.fixture(autouse=True)
def nothing_runs(device, monkeypatch):
    monkeypatch.setattr(tk.runtime, "launch", lambda *args, **kwargs: pytest.fail("launched"))


def changed(arguments, changes):
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            arguments[name] = arguments[name].nan_to_num().to(change)
        elif isinstance(change, tuple):
            arguments[name] = torch.ones(change)
        else:
            arguments[name] = torch.tensor(change)
    return arguments


@pytest.mark.parametrize("op, row", [(op, row) for op, rows in UNWRITTEN.items() for row in rows])
def test_unwritten_calls_say_why(op, row):
    sizes, changes, reason = row
    arguments = changed(given(op, "float32", **sizes, **({"lengths": (1, 1)} if "S" in sizes else {})), changes)
    with pytest.raises(NotImplementedError, match=reason):
        getattr(tk, op)(**arguments)


@pytest.mark.parametrize("op", EXAMPLES)
def test_float64_is_not_taken(op):
    arguments = given(op, "float64")
    with pytest.raises(TypeError, match=f"{op}: {next(iter(arguments))} must be"):
        getattr(tk, op)(**arguments)


@pytest.mark.parametrize("op, name", [(op, name) for op, names in FLOAT32.items() for name in names])
def test_what_must_be_float32_says_so(op, name):
    arguments = given(op, "float32")
    with pytest.raises(TypeError, match=f"{name} must be float32"):
        getattr(tk, op)(**arguments | {name: arguments[name].double()})


@pytest.mark.parametrize("op", ATTENDING)
def test_results_in_float64_are_not_given(op):
    with pytest.raises(TypeError, match="out_dtype"):
        getattr(tk, op)(**given(op), out_dtype=torch.float64)
