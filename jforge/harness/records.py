"""Records of runs: JSON lines that say where each number came from."""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax


def environment(commit: str | None = None) -> dict:
    """What a record must say about where it came from; `commit` where the tree has no .git to ask."""
    import torch
    import triton

    def shell(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    driver = shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (jax, torch, triton)},
        },
        "commit": commit or shell("git", "rev-parse", "--short", "HEAD") or None,
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
    }


def append(path: str | Path, rows: list[dict], where: dict) -> None:
    """Add rows as JSON lines, each with the environment `where` that it came from."""
    with Path(path).open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**where, **row}) + "\n")


def writable(option: str, path: str) -> None:
    """Raise ValueError unless a file can be written at `path`; nothing in it changes."""
    new = not os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as problem:
        raise ValueError(f"{option} is {path!r}; it cannot be written: {problem.strerror}") from None
    if new:
        os.remove(path)
