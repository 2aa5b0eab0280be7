"""The `jforge` command. Every one of its commands takes --json.

A mistake in the arguments or in a file ends with one line on stderr and exit code 2; a law or a comparison that fails
ends with exit code 1.
"""

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp

import jforge
from jforge import demo, lens, report, report_bench, report_experiments, report_lens, roofline, viz
from jforge.console import emit, needs
from jforge.explorer import data as facts
from jforge.explorer import page
from jforge.harness import bench, equiv, own_kernel, records
from jforge.harness.backends import before_jax_starts, for_programs_that_run_once, triton_can_run
from jforge.harness.ops import BY_NAME
from jforge.laws import TITLES
from jforge.viz import command as pictures

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
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


def memory(text: str) -> int:
    """80GiB, 24 GB or 512MiB: binary units with an i, decimal ones without."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(i?)b", text.strip().lower().replace(" ", ""))
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a memory: write 80GiB or 24GB")
    return count


def _several(one: Callable[[str], int]) -> Callable[[str], list[int]]:
    return lambda text: [one(part) for part in text.split(",")]


def _mesh(text: str) -> dict[str, int]:
    """data=1,heads=8,slots=1, each axis once."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(axis.strip() not in lens.AXES for axis, *_ in pairs) or len({axis for axis, *_ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh: write {','.join(f'{axis}=2' for axis in lens.AXES)}")
    return {axis.strip(): positive(size.strip()) for axis, _, size in pairs}


def _device(text: str) -> roofline.Device:
    try:
        return roofline.device(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


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
    sub.add_argument("mechanism", nargs="?", metavar="NAME", help="a mechanism of `jforge table` (default: all layers)")
    sub.add_argument("--config", metavar="MODEL", help="a config.json, or a shipped model (default: one of NAME)")
    sub.add_argument("--context", type=context, default=131072, help="tokens in each row (131072, 128k, 1m)")
    sub.add_argument("--batch", type=positive, default=1, help="rows")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the cache")

    sub = command("lens", _lens, "What the caches of a model cost, from its config.json.")
    sub.add_argument("configs", nargs="+", metavar="CONFIG", help="config.json files, - for stdin, or shipped models")
    several = "may be several, with commas"
    sub.add_argument("--context", type=_several(context), default=[8192, 131072], help=f"tokens a row; {several}")
    sub.add_argument("--batch", type=_several(positive), default=[1], help=f"rows; {several}")
    sub.add_argument("--dtype", choices=lens.DTYPES, metavar="DTYPE", help=f"of the cache: {', '.join(lens.DTYPES)}")
    sub.add_argument("--device", type=_device, default="h100", help=", ".join(roofline.DEVICES))
    sub.add_argument("--memory", type=memory, help="bytes that caches may take (80GiB, 24GB; default: the device's)")
    sub.add_argument("--page", type=positive, help="tokens that an engine hands out memory for at once")
    sub.add_argument("--mesh", type=_mesh, default={}, help="devices: data=1,heads=8,slots=1")
    encoder = "tokens that an encoder has read, for the caches of attention to them"
    sub.add_argument("--encoder-tokens", type=positive, metavar="N", help=encoder)
    sub.add_argument("--csv", action="store_true", help="print a line for each model, context and batch")
    sub.add_argument("--plot", metavar="FILE", help="draw memory against context as a PNG, SVG or PDF")

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
    sub = command("explorer", _explorer, "A page that shows what each mechanism's cache keeps, reads and drops.")
    sub.add_argument(
        "--out", metavar="FILE", required=True, help="the page, one HTML file (takes half a minute or more)"
    )

    sub = command("viz", _viz, "Pictures of mechanisms (slots, fields, bytes) and of models (memory, reads, floors).")
    sub.add_argument("targets", nargs="+", metavar="NAME|CONFIG", help="a mechanism, a shipped model or a config.json")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the pictures; it is made")
    sub.add_argument("--context", type=context, default=131072, help="tokens, where a picture is of one length")
    sub.add_argument("--format", choices=pictures.FORMATS, default="svg", help="of the files")

    report_experiments.add(command, positive)

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


def _table(args) -> int:
    emit(args, report.table(args.context, args.dtype), report.show_table)
    return 0


def _lens(args) -> int:
    if args.csv and args.json:
        raise ValueError("--csv and --json are two formats; give one of them")
    if args.plot:
        _drawable(args.plot)
    models, found = [], {}
    for name in args.configs:
        model, shown = _model(name, "CONFIG", encoder_tokens=args.encoder_tokens)
        sizes = {"dtype": args.dtype, "card": args.device, "memory": args.memory, "page": args.page, "mesh": args.mesh}
        models.append(report_lens.lens(shown, model, args.context, args.batch, **sizes))
        found[shown] = model
    if args.plot:
        viz.save(viz.memory(found), args.plot)
    if args.csv:
        report_lens.write_csv(models)
    else:
        emit(args, models if len(models) > 1 else models[0], lambda _: report_lens.show_lens(models))
    return 0


def _drawable(path: str) -> None:
    """Raise ValueError for a file that no picture can be written to."""
    endings = [f".{ending}" for ending in pictures.FORMATS]
    if Path(path).suffix not in endings:
        raise ValueError(f"--plot is {path!r}; it must end in {' or '.join(endings)}")
    needs("matplotlib")
    records.writable("--plot", path)


def _model(
    name: str, argument: str, also: Iterable[str] = (), encoder_tokens: int | None = None
) -> tuple[lens.ModelLens, str]:
    """(the lens of a file, of stdin or of a shipped model, what to call it); also: other names that are known."""
    path = name if name == "-" or os.path.exists(name) else CONFIGS.get(name.lower())
    if path is None:
        known = ", ".join(dict.fromkeys([*also, *CONFIGS]))
        raise ValueError(f"{argument} is {name!r}; there is no such file, and the shipped models are {known}")
    try:
        return lens.from_config(path, encoder_tokens=encoder_tokens), "stdin" if name == "-" else name
    except (ValueError, TypeError, NotImplementedError) as problem:
        raise type(problem)(f"{argument} {name}: {problem}") from None


def _cost(args) -> int:
    layers, source = _layers(args.mechanism, args.config)
    sizes = {"context": args.context, "batch": args.batch, "dtype": jnp.dtype(args.dtype)}
    costs, names = [layer.cost(**sizes) for layer in layers], [layer.mechanism for layer in layers]
    data = report.cost(args.mechanism, source, costs, args.context, args.batch, args.dtype, names)
    emit(args, data, report.show_cost)
    return 0


def _layers(name: str | None, model: str | None) -> tuple[list[lens.LensLayer], str]:
    """(every cache of the model, where they come from); at least one is of `name`, if that is given.

    model: a file, or in any case of letters the name of a shipped config.json or of one of the mechanism's models.
    """
    if name is None:
        if model is None:
            raise ValueError("NAME and --config are both missing; one must say what to count")
        found, source = _model(model, "--config")
        return list(found.layers), source
    att = jforge.get(name)
    if model is None and not att.models:
        raise ValueError(f"{name} has no shipped model; give one with --config FILE")
    model = model or next(iter(att.models))
    own = next((known for known in att.models if known.lower() == model.lower()), None)
    if own and not os.path.exists(model) and model.lower() not in CONFIGS:
        return [lens.LensLayer(0, name, name, att.models[own], None, None, "bfloat16")], f"{own}, one layer"
    found, source = _model(model, "--config", also=att.models)
    others = sorted({layer.mechanism for layer in found.layers})
    if name not in others:
        raise ValueError(f"{model} has no {name} layer; its layers are {', '.join(others)}")
    return list(found.layers), source


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


def _explorer(args) -> int:
    records.writable("--out", args.out)
    for_programs_that_run_once()
    data = facts.build(lambda items: report.track(items, "watching", label=lambda item: item[0]))
    text = page.render(data)
    Path(args.out).write_text(text, encoding="utf-8")
    counts = {what: sum(len(one[what]) for one in data["mechanisms"]) for what in ("settings", "models")}
    counts |= {"out": args.out, "bytes": len(text.encode()), "mechanisms": len(data["mechanisms"])}
    emit(args, counts, report.show_explorer)
    return 0


def _viz(args) -> int:
    needs("matplotlib")
    mechanisms = [name for name in dict.fromkeys(args.targets) if name in jforge.names()]
    found = {}
    for said in args.targets:
        if said != "-" and not os.path.exists(said) and said.lower() not in (*CONFIGS, *mechanisms):
            known = f"a mechanism ({', '.join(jforge.names())}), a file or a shipped model ({', '.join(CONFIGS)})"
            raise ValueError(f"NAME|CONFIG is {said!r}; it must be {known}")
        if said not in mechanisms:
            model, shown = _model(said, "NAME|CONFIG")
            found[shown] = model
    for_programs_that_run_once()
    planned = pictures.plan(mechanisms, pictures.models(found), args.context)
    emit(args, pictures.write(planned, args.out, args.format, report.track), pictures.show_written)
    return 0


def _demo(args) -> int:
    needs("torch", "triton")
    data = demo.run(args.workers)
    emit(args, data, demo.show)
    return 0 if data["laws"]["ok"] and equiv.agrees(data) else 1


def device() -> str:
    return jax.devices()[0].device_kind


if __name__ == "__main__":
    sys.exit(main())
