"""What `jforge train` and `jforge experiment` do and show."""

import time
from collections.abc import Callable
from pathlib import Path

from jforge import report
from jforge.console import emit, needs
from jforge.harness import records

EXPERIMENTS = ("retrieval",)


def add(command: Callable, positive: Callable[[str], int]) -> None:
    """The two commands, by the `command` of jforge.cli's parser."""
    from jforge.tasks import names

    sub = command("train", _train, "Train a tiny model of one mechanism on a task; taken up again where it was.")
    sub.add_argument("mechanism", metavar="NAME", help="a mechanism of `jforge table`")
    sub.add_argument("--task", choices=names(), default="recall", help="what it learns")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the checkpoint and the log; it is made")
    for option, default, text in (
        ("--steps", 1000, "steps, a multiple of 100"), ("--length", 64, "tokens a row"), ("--rows", 64, "rows a step"),
        ("--width", 64, "hidden_size"), ("--heads", 4, "query heads"), ("--layers", 2, "layers"),
    ):  # fmt: skip
        sub.add_argument(option, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")
    sub.add_argument("--short-conv", type=positive, metavar="TAPS", help="a convolution before every layer")
    sub.add_argument("--rate", type=float, default=2e-3, help="the largest learning rate (default: 0.002)")
    sub.add_argument("--seed", type=int, default=0, help="of the parameters and the rows")

    sub = command("experiment", _experiment, "Train every mechanism at equal parameters and say what each remembers.")
    sub.add_argument("experiment", choices=EXPERIMENTS, help="which one")
    sub.add_argument("--preset", choices=("smoke", "cpu", "gpu"), default="smoke", help="how large (default: smoke)")
    sub.add_argument("--mechanisms", nargs="+", metavar="NAME", help="only these (default: those of the preset)")
    sub.add_argument("--tasks", nargs="+", choices=names(), metavar="TASK", help=f"only these of {', '.join(names())}")
    sub.add_argument("--seeds", type=positive, help="runs of each rate (default: the preset's)")
    sub.add_argument("--seconds", type=positive, metavar="N", help="stop after so long; the same command goes on")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the results; it is made")
    sub.add_argument("--figures", action="store_true", help="draw the results that are in DIR; train nothing")
    sub.add_argument("--commit", help="what the results say they were made by, where there is no git to ask")


def _train(args) -> int:
    needs("flax", "optax")
    from jforge import models, tasks
    from jforge.experiments import store
    from jforge.experiments.training import Plan, Run

    task = tasks.get(args.task)()
    layer = models.layer(args.mechanism, args.width, args.heads, args.length)
    model = models.ModelConfig(
        vocab_size=task.vocab_size, layers=(layer,) * args.layers, intermediate_size=2 * args.width,
        short_conv=args.short_conv,
    )  # fmt: skip
    plan = Plan(model=model, task=task, stages=((args.steps, args.length),), rows=args.rows)
    begun = time.monotonic()

    def each(step, losses):
        rest = f"{time.monotonic() - begun:.0f} s"
        report.progress(f"step {step} of {plan.steps}: loss {losses[-plan.every :].mean():.4f}, {rest}")

    from jforge.experiments import measures

    state = store.kept(plan, [Run(args.rate, args.seed)], args.out, each)
    score = measures.score(model, state.params, task, args.length)
    found = {"mechanism": args.mechanism, "task": args.task, "parameters": model.parameters, "steps": plan.steps,
             "accuracy": float(score.accuracy[0]), "loss": float(score.loss[0]), "chance": task.chance,
             "out": args.out}  # fmt: skip
    emit(args, found, lambda _: report.say(
        f"{args.mechanism} on {args.task}, {model.parameters:,} parameters: {found['accuracy']:.1%} of held-out "
        f"answers right (chance {task.chance:.1%}), loss {found['loss']:.4f}; checkpoint and log in {args.out}"
    ))  # fmt: skip
    return 0


def _experiment(args) -> int:
    needs("flax", "optax")
    from jforge.experiments import presets, retrieval, summary

    preset, folder = presets.PRESETS[args.preset], Path(args.out)
    chosen = _units(presets, preset, args)
    if args.figures:
        lines = retrieval.read(folder / retrieval.RESULTS)
        if not lines:
            raise ValueError(f"--out is {args.out!r}; it holds no {retrieval.RESULTS}")
        return _finish(args, folder, summary.rows(lines))
    _made(folder)
    records.writable("--out", str(folder / retrieval.RESULTS))
    begun = time.monotonic()

    def said(unit, step, losses):
        place, spent = f"{chosen.index(unit) + 1} of {len(chosen)}, {unit.name}", time.monotonic() - begun
        report.progress(f"{place}: step {step} of {unit.plan.steps}, loss {losses[-1].min():.3f}, {spent:.0f} s")

    command = f"jforge experiment {args.experiment} --preset {args.preset}"
    where, seconds = retrieval.where_run(args.commit, command), args.seconds or float("inf")
    try:
        lines = retrieval.run(preset, chosen, folder, where, seeds=args.seeds, seconds=seconds, said=said)
    except retrieval.OutOfTime:
        done = {line["unit"] for line in retrieval.read(folder / retrieval.RESULTS)} & {unit.name for unit in chosen}
        report.say(f"{len(done)} of {len(chosen)} models done in {args.out}; the same command goes on")
        return 0
    return _finish(args, folder, summary.rows(lines))


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"--out is {str(folder)!r}; it cannot be made: {problem.strerror}") from None


def _units(presets, preset, args) -> list:
    import jforge

    for name in args.mechanisms or ():
        jforge.get(name)
    if unknown := [task for task in args.tasks or () if task not in preset.tasks]:
        raise ValueError(f"--tasks has {unknown[0]!r}; the preset {args.preset} has {', '.join(preset.tasks)}")
    return presets.units(preset, args.mechanisms, args.tasks)


def _finish(args, folder: Path, rows: list[dict]) -> int:
    """Print the table; draw the figures where that is asked."""
    made = _draw(folder, rows) if args.figures else []
    emit(args, {"rows": rows, "figures": made}, lambda data: show(data["rows"], data["figures"]))
    return 0


def _draw(folder: Path, rows: list[dict]) -> list[str]:
    needs("matplotlib")
    from jforge import viz
    from jforge.viz import recall

    made = []
    for name, draw in recall.figures(rows).items():
        viz.save(draw(), folder / f"{name}.svg")
        made.append(f"{name}.svg")
    return made


def show(rows: list[dict], figures: list[str]) -> None:
    """A table a task: accuracy at every length, bytes, the rate; then what the failures are, in words."""
    from jforge.experiments import summary

    for task in dict.fromkeys(row["task"] for row in rows):
        some = [row for row in rows if row["task"] == task]
        first, lengths = some[0], sorted({int(n) for row in some for n in row.get("accuracy", {})})
        columns = ("mechanism", "conv", "size", *(f"at\n{n}" for n in lengths), "read", "kept", "rate")
        table = report.Grid(*columns, right=3)
        for row in some:
            found = [_cell(row.get("accuracy", {}).get(str(n))) for n in lengths]
            taps = "-" if row["short_conv"] is None else str(row["short_conv"])
            moved = [report.size(row[what]) for what in ("read", "stored")]
            rate = f"{row['rate']:g}" if "rate" in row else "none"
            table.add_row(row["mechanism"], taps, row["scale"], *found, *moved, rate)
        chance = f"chance {100 * first['chance']:.1f}; bytes at {first['trained']} tokens"
        report.show(f"{task}: right answers in percent, {chance}", table)
        for row in some:
            if words := summary.in_words(row):
                report.say(f"{row['mechanism']}: {words}", indent=2)
        report.say()
    if figures:
        report.say(f"drawn: {', '.join(figures)}")


def _cell(found) -> str:
    if found is None:
        return "-"
    middle, spread = found
    return f"{100 * middle:.1f}" + (f" ±{100 * spread:.1f}" if spread else "")
