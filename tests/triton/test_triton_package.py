"""What ptxas says of the kernels, compiled without a GPU, and what a process without an interpreter says."""

import os
import subprocess
import sys

import pytest

from triton_kernels import device, offline

NEED_THE_INTERPRETER = """
import torch, triton_kernels as tk
q, n = torch.ones(1, 1, 1, 16), torch.ones(1, dtype=torch.int32)
for call in (lambda: tk.decode_attention(q, q, q, n, scale=1.0),
             lambda: tk.decode_mla(q, q, q[0], q[0], n, scale=1.0),
             lambda: tk.merge_states(q[None], q[None, ..., 0]),
             lambda: tk.decode_block_sparse(q, q, None, n.view(1, 1, 1, 1), n, block_size=1, scale=1.0),
             lambda: tk.decode_block_sparse(q, q, q, n.view(1, 1, 1, 1), n, block_size=1, scale=1.0),
             lambda: tk.decode_sparse_mla(q, q, q[0], q[0], n.view(1, 1, 1), scale=1.0),
             lambda: tk.index_scores(q, q[0], q[..., 0], n),
             lambda: tk.block_index_scores(q, q[0], n, block_size=1),
             lambda: tk.topk_indices(q, 1),
             lambda: tk.decode_linear(q[0], q[0], q[0], q.new_ones(1, 1, 16, 16), q[0, 0, 0, :1])):
    try: call()
    except TypeError as error: print('TRITON_INTERPRET=1' in str(error))
"""


def test_cpu_tensors_need_the_interpreter():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", NEED_THE_INTERPRETER]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 10


@pytest.mark.parametrize("ops", [("decode_attention", "decode_mla", "merge_states"),
                                 ("decode_block_sparse", "decode_sparse_mla"),
                                 ("decode_linear", "index_scores", "block_index_scores", "topk_indices")])  # fmt: skip
def test_compiled_kernels_fit_sm90(ops):
    rows = offline.report(*ops)
    assert len(rows) == len(list(offline.jobs(offline.RECORDS[op] for op in ops))) <= 40
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 255 and row["shared"] <= device.TARGET.program_shared, row
        halves = row["types"][0] in ("*bf16", "*fp16")
        if row["kernel"] == "linear_kernel":  # the state is read and written in whole vectors, as many as a thread has
            assert row["wide"] >= 2 * row["H"] * row["BLOCK_V"] // (row["num_warps"] * 32 * 4), row
        elif "HEADS_PAD" in row:  # keys are the 64 rows or more that warpgroup MMAs ask for
            assert not halves or (row["hgmma"] > 0 and row["hmma"] == 0 and row["ldgsts"] > 0), row
            assert not halves or row["narrow"] == 0 or row["SCALED"], row
        elif halves and "BLOCK_N" in row:
            assert row["hmma"] + row["hgmma"] > 0 and row["ldgsts"] > 0 and row["narrow"] == 0, row
