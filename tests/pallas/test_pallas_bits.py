"""The tests of bits.py, in a process of their own: XLA's usual emitters round a row alike in programs of other shapes,
the older ones that conftest.py asks for do not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("bits.py")


def test_bits_do_not_depend_on_what_is_beside_a_row():
    usual = {**os.environ, "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=usual, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15
