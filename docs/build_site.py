"""The documentation as a site: `python docs/build_site.py [FOLDER]` writes FOLDER/html (default docs/_build/html).

Its pages are the documents of this folder, the notebooks with their stored outputs, and what is made here: a page for
each mechanism in the registry and one for each public function. A link to nothing, and any other warning of Sphinx, is
an error. Documents link to files of the repository as they lie; where such a file is no page, its name is left.
"""

import argparse
import inspect
import re
import shutil
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
from sphinx.cmd.build import main as sphinx

import jforge
import jforge.harness
import jforge.hf
import jforge.lens
import jforge.roofline
import jforge.stack
import jforge.viz
import pallas_kernels
import torch_ref
import triton_kernels
from jforge import lessons, slots, traffic
from jforge.attention import dense
from jforge.core import attend, config, masks, norm, ring, rope, spec, step
from jforge.report import exact, layout, size

ROOT = Path(__file__).parent.parent
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"
CONTEXT = 131_072
EVERY_MECHANISM = "mechanism/*"  # in index.md: their pages, in the order of the registry

OPS = [name for name in jforge.ops.__all__ if name != "mix"]

# --- pages of mechanisms


def mechanism(name: str) -> str:
    """What the code says of a mechanism: equations, six answers, buffers, bytes, op, where sources disagree."""
    att = jforge.get(name)
    parts = [f"# {name}", f"{_sentence(att.summary)}", f"What is traded: {att.traded}." if att.traded else ""]
    parts += ["## Equations and sources", _literal(inspect.getdoc(inspect.getmodule(inspect.unwrap(att.forward))))]
    model, cfg = next(iter(att.models.items()), ("its first example", att.examples[0]))
    parts += ["## Six answers", f"One layer of {model}, one row of {CONTEXT:,} tokens.", _answers(name, cfg)]
    parts += ["## Cache", _literal(inspect.getdoc(att.cache_spec(cfg).cls)), _buffers(att, cfg)]
    parts += ["## Bytes", _formula(att, cfg)]
    parts += ["## Op and kernels", _ops(att, cfg)]
    if disagreements := _disagreements(name, att):
        parts += ["## Where sources disagree", disagreements]
    parts += ["## Config", _literal(inspect.getdoc(att.Config))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _literal(text: str | None) -> str:
    return f"```text\n{(text or '').rstrip()}\n```"


def _table(*rows: tuple) -> str:
    rule = tuple("---" for _ in rows[0])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (rows[0], rule, *rows[1:]))


def _answers(name: str, cfg) -> str:
    rows, last = [("question", "of", "answer")], None
    for question, of, answer in lessons.answers(jforge.get(name), cfg, CONTEXT, "bfloat16"):
        rows.append(("" if question == last else question, of, answer))
        last = question
    return _table(*rows)


def _buffers(att, cfg) -> str:
    cost, spec = att.cost(cfg, context=CONTEXT), att.cache_spec(cfg)
    rows = [("buffer", "shape", "dtype", "stored", "a step writes", "a step reads")]
    for n, buffer in spec.items():
        moved = (part.get(n, 0) for part in (cost.stored, cost.written, cost.read))
        rows.append((f"`{n}`", layout(buffer), buffer.dtype_in("bfloat16"), *map(size, moved)))
    return _table(*rows)


def _formula(att, cfg) -> str:
    """Each buffer's share of `stored`, in slots times elements times bytes, and the sum."""
    terms, cost = [], att.cost(cfg, context=CONTEXT)
    for n, buffer in att.cache_spec(cfg).items():
        slots = "" if not buffer.has_slots else f"{_slots(buffer)} x "
        elements = " x ".join(map(str, buffer.shape)) or "1"
        terms.append(f"{n}: {slots}{elements} x {buffer.dtype_in('bfloat16').itemsize} B")
    whole = f"stored = {exact(cost.fixed)} + {_number(cost.per_token)} x tokens    B a row and layer"
    return _literal("\n".join([*terms, "", whole]))


def _slots(buffer) -> str:
    grown = "tokens" if buffer.every == 1 else f"tokens / {buffer.every}"
    if buffer.every is None:
        return str(buffer.limit)
    return grown if buffer.limit is None else f"min({grown}, {buffer.limit})"


def _number(value) -> str:
    return f"{value.numerator:,} / {value.denominator:,}" if isinstance(value, Fraction) else f"{value:,}"


def ops_of(att, cfg) -> list[str]:
    """The ops that a decode step calls, in their order."""
    called: list[str] = []

    def noted(name: str) -> Callable:
        def call(*args, **options):
            called.append(name)
            return getattr(jforge.ops, name)(*args, **options)

        return call

    ops = SimpleNamespace(**{name: noted(name) for name in OPS})
    params = jax.eval_shape(lambda: att.init_params(jax.random.key(0), cfg))
    cache = jax.eval_shape(lambda: att.init_cache(cfg, 1, 8, jnp.float32))
    x = jax.ShapeDtypeStruct((1, 1, cfg.hidden_size), jnp.float32)
    jax.eval_shape(lambda params, x, cache: att.decode(params, cfg, x, cache, ops), params, x, cache)
    return list(dict.fromkeys(called))


def _ops(att, cfg) -> str:
    rows = [("op", "definition", "PyTorch", "Triton", "Pallas")]
    packages = (("jforge.ops", jforge.ops), ("torch_ref.ops", torch_ref.ops), ("triton_kernels", triton_kernels),
                ("pallas_kernels", pallas_kernels))  # fmt: skip
    for op in ops_of(att, cfg):
        rows.append((f"`{op}`", *(f"[{place}](../api/{place}.{op}.md)" for place, _ in packages)))
    return "A decode step calls\n\n" + _table(*rows)


def _disagreements(name: str, att) -> str:
    """The rows of divergences.md that name the mechanism or a model of it."""
    models = " ".join(att.models)
    words = {name.replace("_", " "), *re.findall(r"\w+-\w[\w.]*", models), *re.findall(r"\b[A-Z]\d[\w.]*", models)}
    lines = (DOCS / "divergences.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b(?!\.\d)" for word in sorted(words)), re.IGNORECASE)
    found = [line for line in table[2:] if pattern.search(line)]
    return "\n".join([*table[:2], *found]) if found else ""


# --- pages of functions


def reference() -> dict[str, str]:
    """{page: its text} of the public functions and classes, and of the index of them."""
    modules = {place: _members(module) for place, module in _modules().items()}
    pages, index = {}, ["# Reference", "Every public function and class, from its docstring."]
    for place, members in modules.items():
        index += [f"## {place}", _summary(inspect.getdoc(_modules()[place]))]
        links = []
        for name, member in members:
            pages[f"api/{place}.{name}.md"] = _page(place, name, member)
            links.append(f"- [`{name}`]({place}.{name}.md): {_summary(inspect.getdoc(member))}")
        toc = "\n".join(f"{place}.{name}" for name, _ in members)
        index += ["\n".join(links), f"```{{toctree}}\n:hidden:\n\n{toc}\n```"]
    pages["api/index.md"] = "\n\n".join(index) + "\n"
    return pages


def _modules() -> dict[str, ModuleType]:
    return {
        module.__name__: module
        for module in (
            jforge, jforge.ops, jforge.caches, jforge.stack, jforge.hf, jforge.lens, jforge.roofline, jforge.harness,
            torch_ref, torch_ref.ops,
            triton_kernels, pallas_kernels, step, attend, spec, ring, masks, rope, norm, config, dense, traffic,
            sys.modules["jforge.cost"], slots, lessons, jforge.viz,
        )
    }  # fmt: skip


def _members(module: ModuleType) -> list[tuple[str, object]]:
    """Public functions and classes: those in `__all__`, or those that the module defines."""
    if named := getattr(module, "__all__", None):
        found = [(name, getattr(module, name)) for name in named]
    else:
        found = [(n, m) for n, m in vars(module).items() if getattr(m, "__module__", "") == module.__name__]
    return [(n, m) for n, m in found if not n.startswith("_") and (inspect.isfunction(m) or inspect.isclass(m))]


def _page(place: str, name: str, member) -> str:
    try:
        given = f"{name}{inspect.signature(member)}"
    except (TypeError, ValueError):
        given = name
    module = inspect.getmodule(inspect.unwrap(member) if inspect.isfunction(member) else member)
    where = f"Defined in `{module.__name__}`." if module and module.__name__ != place else ""
    fields = ""
    if inspect.isclass(member):
        documented = [(n, inspect.getdoc(m)) for n, m in vars(member).items() if _documented(n, m)]
        fields = "\n\n".join(f"## {n}\n\n{_literal(text)}" for n, text in documented)
    parts = [f"# {place}.{name}", f"```python\n{_wrapped(given)}\n```", where, _literal(inspect.getdoc(member)), fields]
    if "top of this file" in (inspect.getdoc(member) or ""):
        parts += ["## The top of the file", _literal(inspect.getdoc(module))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _documented(name: str, member) -> bool:
    return (
        not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and bool(inspect.getdoc(member))
    )


def _wrapped(signature: str) -> str:
    """One argument a line where it is long; values that are no Python, as Python."""
    signature = re.sub(r"<(?:class|module|function) '?([\w.<>]+)'?[^>]*>", r"\1", signature)
    return signature if len(signature) <= 100 else signature.replace("(", "(\n    ", 1).replace(", ", ",\n    ")


def _summary(text: str | None) -> str:
    """Its first paragraph, outside of code without the characters that markdown would take for its own."""
    parts = (text or "").split("\n\n")[0].replace("\n", " ").strip().split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_<|\[\]])", r"\\\1", part) for i, part in enumerate(parts))


# --- the tree


def sources(folder: Path) -> None:
    """All that Sphinx reads, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("mechanism", "api", "notebooks"):
        (folder / name).mkdir(parents=True)
    for document in DOCS.glob("*.md"):
        text = _relinked(document).replace(EVERY_MECHANISM, "\n".join(f"mechanism/{n}" for n in jforge.names()))
        (folder / document.name).write_text(text, encoding="utf-8")
    for name in ("conf.py", "site.css"):
        shutil.copy(DOCS / name, folder)
    for pictures in ("figures", "pictures", "experiments"):
        shutil.copytree(DOCS / pictures, folder / pictures, ignore=shutil.ignore_patterns("*.json", "*.jsonl"))
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        shutil.copy(notebook, folder / "notebooks")
    names = "\n".join(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")))
    readme = _relinked(NOTEBOOKS / "README.md", "../")
    (folder / "notebooks" / "index.md").write_text(f"{readme}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")
    for name in jforge.names():
        (folder / "mechanism" / f"{name}.md").write_text(mechanism(name), encoding="utf-8")
    for page, text in reference().items():
        (folder / page).write_text(text, encoding="utf-8")


def _relinked(document: Path, up: str = "") -> str:
    """Its text with links to files of the repository as links to pages, or as the names of the files."""

    def link(match: re.Match) -> str:
        label, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        real = (document.parent / path).resolve()
        if real.parent == DOCS and real.suffix == ".md":
            return f"[{label}]({up}{real.name}{'#' * bool(anchor)}{anchor})"
        if real.parent == NOTEBOOKS and real.suffix == ".ipynb":
            return f"[{label}]({'' if up else 'notebooks/'}{real.name})"
        if real == NOTEBOOKS / "README.md":
            return f"[{label}]({'' if up else 'notebooks/'}index.md)"
        if path.startswith(("mechanism/", "api/", "notebooks/", "figures/", "pictures/", "experiments/")):
            return match[0]
        if not real.exists():
            raise FileNotFoundError(f"{document.name} links to {target}, which is not there")
        return f"`{label}`" if "`" not in label else label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, document.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS / "_build")
    folder = parser.parse_args(argv).folder
    sources(folder / "src")
    failed = sphinx(["-W", "--keep-going", "-n", "-q", "-E", "-j", "2", str(folder / "src"), str(folder / "html")])
    if not failed:
        print(f"built {folder / 'html' / 'index.html'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
