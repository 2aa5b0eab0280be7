"""What commands share: how they print what they found, and what they say when a package is missing."""

import json
from importlib.util import find_spec

EXTRAS = {
    "torch": "torch", "triton": "torch", "transformers": "hf", "matplotlib": "viz", "flax": "models", "optax": "models",
}  # fmt: skip


def emit(args, data, render) -> None:
    """Print `data` as JSON, or let `render` print its tables."""
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        render(data)


def needs(*packages: str) -> None:
    """Raise ValueError that says what to install, before anything is computed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        extras = ",".join(dict.fromkeys(EXTRAS[package] for package in missing))
        raise ValueError(f"needs {' and '.join(missing)}: pip install 'jforge[{extras}]'")
