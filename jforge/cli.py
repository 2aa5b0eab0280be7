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
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp

import jforge
from jforge import demo, hf, report, report_bench
from jforge.harness import bench, equiv, own_kernel, records
from jforge.harness.backends import before_jax_starts, for_programs_that_run_once, triton_can_run
from jforge.harness.ops import BY_NAME
from jforge.laws import TITLES

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
EXTRAS = {"torch": "torch", "triton": "torch", "transformers": "hf", "matplotlib": "viz"}
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
    top.add_argument("--version", action="version", version=f"jforge {jforge.__version__}")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    def command(name: str, run, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.set_defaults(run=run)
        return sub

    def own(sub: Parser) -> Parser:
        sub.add_argument("--backend", metavar="MODULE:FUNCTION", help="your own function in the place of one OP")
        sub.add_argument("--framework", choices=tuple(own_kernel.FRAMEWORKS), help="whose arrays it takes")
        return sub

    sub = command("table", _table, "Every mechanism: what it stores and what a decode step reads.")
    sub.add_argument("--context", type=context, default=131072, help="tokens in the row (131072, 128k, 1m)")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the cache")

    sub = command("cost", _cost, "Bytes and flops of a decode step of a model, by buffer.")
    sub.add_argument("mechanism", metavar="NAME", help="a mechanism, as `jforge table` lists them")
    sub.add_argument("--config", metavar="MODEL", help="a config.json, or a shipped model (default: one of NAME)")
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
    own(sub).add_argument("--dtype", choices=own_kernel.DTYPES, help="of --backend's inputs (default: all of these)")

    sub = command(
        "bench", _bench, "Times of the decode ops: the kernels and their peers on a GPU, XLA and torch on a CPU."
    )
    sub.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all that have a benchmark)")
    own(sub).add_argument("--samples", type=positive, default=50, help="timed calls a row")
    sub.add_argument("--out", metavar="FILE", help="append the rows to FILE as JSON lines")
    sub.add_argument("--plot", metavar="FILE", help="draw the rates as a PNG")
    sub = command("demo", _demo, "Bytes, laws, agreement and decode times for Llama-3.1-8B.")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.workers = (os.cpu_count() or 1) if argv is None else 1  # a program that calls main may not be safe to import
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


def _layers(name: str, model: str | None) -> tuple[list, str]:
    """((mechanism, Config) of every layer, where they come from); at least one layer is of `name`.

    model: a file, or in any case of letters the name of a shipped config.json or of one of the mechanism's models.
    """
    att = jforge.get(name)
    if model is None:
        if not att.models:
            raise ValueError(f"{name} has no shipped model; give one with --config FILE")
        model = next(iter(att.models))
        return [(name, att.models[model])], f"{model}, one layer"
    path = model if os.path.exists(model) else CONFIGS.get(model.lower())
    if path is None:
        for known, cfg in att.models.items():
            if known.lower() == model.lower():
                return [(name, cfg)], f"{known}, one layer"
        known = ", ".join(dict.fromkeys([*att.models, *CONFIGS]))
        raise ValueError(f"--config is {model!r}; there is no such file, and the shipped models are {known}")
    config = hf.load(path)
    try:
        found = hf.layers(config)
    except (ValueError, TypeError, NotImplementedError) as problem:
        raise type(problem)(f"--config {model}: {problem}") from None
    others = sorted({mechanism for mechanism, _ in found})
    if name not in others:
        raise ValueError(f"{model} has no {name} layer; its layers are {', '.join(others)}")
    return found, model


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
    """A registered mechanism, or module:attribute."""
    if ":" not in name:
        return jforge.get(name)
    found = _imported("NAME", name, "a mechanism or module:attribute")
    if not isinstance(found, jforge.Attention):
        raise TypeError(f"{name} is a {type(found).__name__}; it must be a jforge.Attention")
    return found


def _imported(argument: str, name: str, allowed: str):
    """What module:attribute names, imported from the working directory."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{argument} is {name!r}; it must be {allowed}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as problem:  # whatever the user's module does while it is imported
        raise ValueError(
            f"{name}: module {module!r} cannot be imported ({type(problem).__name__}: {problem})"
        ) from None
    if not hasattr(found, attribute):
        raise ValueError(f"{name}: module {module!r} has no attribute {attribute!r}")
    return getattr(found, attribute)


def _own(args, ops: list[str]) -> own_kernel.Own | None:
    """--backend, in the place of the one op that is named."""
    if args.backend is None:
        for option in ("framework", "dtype"):
            if value := getattr(args, option, None):
                raise ValueError(f"--{option} is {value!r}; it goes with --backend module:function")
        return None
    if len(ops) != 1 or ops[0] not in BY_NAME:
        given = ", ".join(ops) or "none"
        raise ValueError(f"--backend stands for one op of {', '.join(BY_NAME)}; the ops given are: {given}")
    before_jax_starts()
    triton_can_run()
    function = _imported("--backend", args.backend, "module:function")
    framework = args.framework or own_kernel.framework_of(function, args.backend)
    needs(*(["torch"] if framework == "torch" else []))
    return own_kernel.Own(args.backend, function, framework)


def needs(*packages: str) -> None:
    """Raise ValueError that says what to install, before anything is computed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        extras = ",".join(dict.fromkeys(EXTRAS[package] for package in missing))
        raise ValueError(f"needs {' and '.join(missing)}: pip install 'jforge[{extras}]'")


def _equiv(args) -> int:
    ops, mechanisms = tuple(BY_NAME), jforge.names()
    for name in args.names:
        if name not in (*ops, *mechanisms):
            known = f"an op ({', '.join(ops)}) or a mechanism ({', '.join(mechanisms)})"
            raise ValueError(f"NAME is {name!r}; it must be {known}")
    own = _own(args, args.names)
    chosen = args.names or (*ops, *mechanisms)
    if own is None:
        some, others = set(ops) & set(chosen), set(mechanisms) & set(chosen)
        needs("torch", *(["triton"] if some else []), *(["transformers"] if others else []))
    for_programs_that_run_once()
    if own is not None:
        return _equiv_own(args, own)
    backends = equiv.backends([op for op in ops if op in chosen], track=report.track, workers=args.workers)
    frameworks = equiv.frameworks([name for name in mechanisms if name in chosen], track=report.track)
    data = {"backends": backends, "frameworks": frameworks, "device": device()}
    emit(args, data, report.show_equiv)
    return 0 if equiv.agrees(data) else 1


def _equiv_own(args, own: own_kernel.Own) -> int:
    dtypes = [args.dtype] if args.dtype else own_kernel.DTYPES
    named = {"name": own.name, "framework": own.framework}
    verdict = own_kernel.judge(own.function, args.names[0], dtypes=dtypes, track=report.track, **named)
    emit(args, {**own_kernel.plain(verdict), "device": device()}, lambda _: print(verdict))
    return 0 if verdict.ok else 1


def _bench(args) -> int:
    for op in args.ops:
        if op not in bench.TIMED:
            raise ValueError(f"{op!r} has no benchmark; there are {', '.join(bench.TIMED)}")
    if args.plot and not args.plot.endswith(".png"):
        raise ValueError(f"--plot is {args.plot!r}; it must end in .png")
    own = _own(args, args.ops)
    needs("torch", "triton", *(["matplotlib"] if args.plot else []))
    for option, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            records.writable(option, path)
    rows = list(report.track(bench.run(args.ops or bench.TIMED, samples=args.samples, own=own), "timing"))
    if not rows:
        raise ValueError(f"{', '.join(args.ops)} can be timed on a GPU alone, and here is none")
    data = {**records.environment(), "rows": rows}
    if args.out:
        records.append(args.out, rows, records.environment())
    if args.plot:
        report_bench.plot_bench(data, args.plot)
    emit(args, data, report_bench.show_bench)
    mine = [row for row in rows if own is not None and row.get("implementation") == own.name]
    wrong = any(row.get("refused") == bench.WRONG for row in mine)
    return 1 if wrong or (mine and not any("median" in row for row in mine)) else 0


def _demo(args) -> int:
    needs("torch", "triton")
    data = demo.run(args.workers)
    emit(args, data, demo.show)
    return 0 if data["laws"]["ok"] and equiv.agrees(data) else 1


def device() -> str:
    return jax.devices()[0].device_kind


if __name__ == "__main__":
    sys.exit(main())
