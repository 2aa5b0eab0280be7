"""The `jforge` command: table, cost, check, equiv, bench and demo. Every command takes --json.

A mistake in the arguments or in a file ends with one line on stderr and exit code 2; a law or a comparison that fails
ends with exit code 1.
"""

import argparse
import importlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import jax
import jax.numpy as jnp

import jforge
from jforge import hf
from jforge.harness import bench, equiv, records
from jforge.harness.backends import for_programs_that_run_once
from jforge.harness.ops import BY_NAME
from jforge.laws import TITLES

try:
    from jforge import demo, report, report_bench
except ImportError as missing:  # `import jforge` works without it, so this is the first to notice
    print(
        f"jforge: the command line needs {missing.name.partition('.')[0]}: pip install 'jforge[cli]'", file=sys.stderr
    )
    sys.exit(2)

DTYPES = ("bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def context(text: str) -> int:
    """131072, 128k or 1m: a positive count of tokens, k = 2^10 and m = 2^20."""
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2]] if match else 0
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count: write 131072, 128k or 1m")
    return tokens


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def parser() -> Parser:
    top = Parser(prog="jforge", description="Executable reference and kernel lab for LLM attention.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    def command(name: str, run, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.set_defaults(run=run)
        return sub

    sub = command("table", _table, "Every mechanism: what it stores and what a decode step reads.")
    sub.add_argument("--context", type=context, default=131072, help="tokens in the row (131072, 128k, 1m)")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the cache")

    sub = command("cost", _cost, "Bytes and flops of a decode step of a model, by buffer.")
    sub.add_argument("mechanism", metavar="NAME", help="a mechanism, as `jforge table` lists them")
    sub.add_argument("--config", metavar="FILE", help="a model's config.json (default: a shipped model of NAME)")
    sub.add_argument("--context", type=context, default=131072, help="tokens in each row (131072, 128k, 1m)")
    sub.add_argument("--batch", type=positive, default=1, help="rows")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the cache")

    sub = command("check", _check, "The laws, for mechanisms of jforge or your own Attention.")
    sub.add_argument(
        "names", nargs="*", metavar="NAME", help="mechanisms, or module:attribute (default: all of jforge)"
    )
    sub.add_argument("--law", action="append", choices=TITLES, help="may be repeated (default: all)")
    sub.add_argument("--config", type=positive, metavar="N", help="the N-th example of each NAME (default: all)")

    sub = command("equiv", _equiv, "Agreement of the four backends and of the frameworks, as measured here.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="ops or mechanisms (default: all; takes minutes)")

    sub = command(
        "bench", _bench, "Times of the decode ops: the kernels and their peers on a GPU, XLA and torch on a CPU."
    )
    sub.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all that have a benchmark)")
    sub.add_argument("--samples", type=positive, default=50, help="timed calls a row")
    sub.add_argument("--out", metavar="FILE", help="append the rows to FILE as JSON lines")
    sub.add_argument("--plot", metavar="FILE", help="draw the rates as a PNG")
    sub = command("demo", _demo, "Bytes, laws, agreement and decode times for Llama-3.1-8B.")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 1
    except (ValueError, TypeError, NotImplementedError) as problem:  # bad input, worded where it was found
        text = " ".join(str(problem).split())
        print(f"jforge {args.command}: {text}", file=sys.stderr)
        return 2


def emit(args, data, render) -> None:
    """Print `data` as JSON, or let `render` print its tables."""
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        render(data)


def _table(args) -> int:
    emit(args, report.table(args.context, args.dtype), report.show_table)
    return 0


def _cost(args) -> int:
    layers, source = _layers(args.mechanism, args.config)
    sizes = {"context": args.context, "batch": args.batch, "dtype": jnp.dtype(args.dtype)}
    each = {layer: jforge.get(layer[0]).cost(layer[1], **sizes) for layer in dict.fromkeys(layers)}
    costs, names = [each[layer] for layer in layers], [name for name, _ in layers]
    data = report.cost(args.mechanism, source, costs, args.context, args.batch, args.dtype, names)
    emit(args, data, report.show_cost)
    return 0


def _layers(name: str, path: str | None) -> tuple[list, str]:
    """((mechanism, Config) of every layer, where they come from); at least one layer is of `name`."""
    att = jforge.get(name)
    if path is None:
        if not att.models:
            raise ValueError(f"{name} has no shipped model; give one with --config FILE")
        model, cfg = next(iter(att.models.items()))
        return [(name, cfg)], f"{model}, one layer"
    config = hf.load(path)
    try:
        found = hf.layers(config)
    except (ValueError, TypeError, NotImplementedError) as problem:
        raise type(problem)(f"--config {path}: {problem}") from None
    others = sorted({mechanism for mechanism, _ in found})
    if name not in others:
        raise ValueError(f"{path} has no {name} layer; its layers are {', '.join(others)}")
    return found, path


def _check(args) -> int:
    """Checks run side by side, since most of their time is XLA's, which compiles a program on one core."""
    work = [target for name in args.names or jforge.names() for target in _configs(name, _attention(name), args.config)]
    laws = tuple(args.law or TITLES)

    def check(target) -> dict:
        name, att, number, count, cfg = target
        label = name if count < 2 else f"{name} {number}/{count}"
        started = time.monotonic()

        def each(row) -> None:
            report.progress(f"{label}: {row.law} {'ok' if row.ok else 'FAILS'}, {time.monotonic() - started:.0f} s")

        result = jforge.check(att, cfg, laws=laws, each=each)
        return {"mechanism": name, "config": str(cfg), "number": number, "of": count, **report.laws(result)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(check, work))
    emit(args, rows, report.show_laws)
    return 0 if all(row["ok"] for row in rows) else 1


def _configs(name: str, att: jforge.Attention, chosen: int | None) -> list[tuple]:
    """(name, att, number, count, Config) of each example, or of one. None for a Config fails: it proves nothing."""
    configs = att.examples or (None,)
    if chosen is not None and chosen > len(configs):
        raise ValueError(f"--config is {chosen}; {name} has {len(configs)} example{'s' * (len(configs) > 1)}")
    every = [(name, att, i, len(configs), cfg) for i, cfg in enumerate(configs, 1)]
    return every if chosen is None else [every[chosen - 1]]


def _attention(name: str) -> jforge.Attention:
    """A registered mechanism, or module:attribute imported from the working directory."""
    if ":" not in name:
        return jforge.get(name)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"NAME is {name!r}; it must be a mechanism or module:attribute")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as problem:  # whatever the user's module does while it is imported
        raise ValueError(
            f"{name}: module {module!r} cannot be imported ({type(problem).__name__}: {problem})"
        ) from None
    if not hasattr(found, attribute):
        raise ValueError(f"{name}: module {module!r} has no attribute {attribute!r}")
    found = getattr(found, attribute)
    if not isinstance(found, jforge.Attention):
        raise TypeError(f"{name} is a {type(found).__name__}; it must be a jforge.Attention")
    return found


def _equiv(args) -> int:
    ops, mechanisms = tuple(BY_NAME), jforge.names()
    for name in args.names:
        if name not in (*ops, *mechanisms):
            known = f"an op ({', '.join(ops)}) or a mechanism ({', '.join(mechanisms)})"
            raise ValueError(f"NAME is {name!r}; it must be {known}")
    for_programs_that_run_once()
    chosen = args.names or (*ops, *mechanisms)
    backends = equiv.backends([op for op in ops if op in chosen], track=report.track)
    frameworks = equiv.frameworks([name for name in mechanisms if name in chosen], track=report.track)
    data = {"backends": backends, "frameworks": frameworks, "device": device()}
    emit(args, data, report.show_equiv)
    return 0 if equiv.agrees(data) else 1


def _bench(args) -> int:
    for op in args.ops:
        if op not in bench.TIMED:
            raise ValueError(f"{op!r} has no benchmark; there are {', '.join(bench.TIMED)}")
    if args.plot and not args.plot.endswith(".png"):
        raise ValueError(f"--plot is {args.plot!r}; it must end in .png")
    for option, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            records.writable(option, path)
    rows = list(report.track(bench.run(args.ops or bench.TIMED, samples=args.samples), "timing"))
    if not rows:
        raise ValueError(f"{', '.join(args.ops)} can be timed on a GPU alone, and here is none")
    data = {**records.environment(), "rows": rows}
    if args.out:
        records.append(args.out, rows, records.environment())
    if args.plot:
        report_bench.plot_bench(data, args.plot)
    emit(args, data, report_bench.show_bench)
    return 0


def _demo(args) -> int:
    data = demo.run()
    emit(args, data, demo.show)
    return 0 if data["laws"]["ok"] and equiv.agrees(data) else 1


def device() -> str:
    return jax.devices()[0].device_kind


if __name__ == "__main__":
    sys.exit(main())
