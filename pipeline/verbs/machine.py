"""`doctor` and `bench`: what a machine is fit for, and how fast it is."""

import shutil
from pathlib import Path

from pipeline import distributed, launch
from pipeline.bench.results import Benchmark, Target, require_parts
from pipeline.config import Config, parse_arguments, parse_config
from pipeline.console import closing_box, show_table
from pipeline.errors import ConfigError, RunError
from pipeline.verbs.parsing import command_line, parser_of


def doctor(argv: list[str]) -> int:
    """Look for what a long job would trip over, on every machine; exit 3 when something is red."""
    config, _ = parse_config(parser_of(doctor), argv)
    # Beside RUN, which must not come into being before its first verb.
    exit_dir = Path(config.runs_dir) / f".doctor-{config.name}"
    if distributed.is_rank():
        from pipeline.doctor import examine

        return distributed.run_rank(lambda: examine(config), exit_dir / "exit")
    code = _doctor_together(config, ["doctor", *argv], exit_dir)
    if launch.is_first_node():
        shutil.rmtree(exit_dir, ignore_errors=True)
    if code == 0 and launch.is_first_node():
        closing_box("fit for a long job", {"figures": str(Path(config.runs_dir) / "doctor.json")}, command_line("train", argv))
    return code


def _doctor_together(config: Config, arguments: list[str], exit_dir: Path) -> int:
    from pipeline.doctor import RENDEZVOUS_SECONDS, examine_alone

    try:
        code = launch.launch(arguments, exit_dir, launch.processes_here(), meet_seconds=RENDEZVOUS_SECONDS)
    except RunError as error:
        examine_alone(config, str(error))
        raise
    if code == 1 and launch.num_nodes() > 1 and not distributed.read_outcomes(exit_dir / "exit"):
        examine_alone(config, f"not all of {launch.num_nodes()} machines came within {RENDEZVOUS_SECONDS:.0f} s")
    return code


def bench(argv: list[str]) -> int:
    """Measure the data stage, a training step, checkpoints, a model or the server, beside others, on this machine."""
    parser = parser_of(bench, settings=False)
    parser.add_argument("what", choices=["data", "step", "checkpoint", "model", "serve"], help="what to measure")
    parser.add_argument("path", nargs="?", help="for `model`: a run folder or model.onnx; default: runs/digits")
    parts = "of data: loader, small, memory, step, read, open, write; of serve: digits, photos; all of them"
    parser.add_argument("--parts", default="", help=parts)
    parser.add_argument("--num-images", type=int, default=4000, help="generated JPEGs to measure with")
    parser.add_argument("--workers", type=int, default=2, help="workers of every loader, processes or threads")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each turn")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender has its turn")
    parser.add_argument("--out", default="bench", help="folder of the images, figures and picture")
    options = parse_arguments(parser, argv)
    for name, least in (("num_images", 512), ("workers", 1), ("steps", 100), ("rounds", 1)):
        if options[name] < least:
            raise ConfigError(f"`--{name.replace('_', '-')}` is {options[name]}; it must be {least} or more.")
    out = Path(options.out)
    if options.what == "model":
        return _bench_model(Path(options.path or "runs/digits"), out, options.rounds)
    if options.path is not None:
        raise ConfigError(f"`bench {options.what}` takes no path, but '{options.path}' was given.")
    if options.what == "checkpoint":
        from pipeline.bench.checkpoint import checkpoint_costs, start_seconds

        _show_figures("network", checkpoint_costs(out, options.rounds))
        _show_figures("training", start_seconds(out, options.rounds))
    elif options.what == "step":
        from pipeline.bench.step import judge, step_costs

        costs = step_costs(out, options.steps, options.rounds)
        _show_figures("trainer", costs)
        _show_targets([judge(costs)])
    elif options.what == "serve":
        from pipeline.bench import serve

        _show_benchmark(serve.run_benchmark(out, require_parts(options.parts, serve.PARTS), options.rounds), out)
    else:
        from pipeline.bench import data

        wanted = require_parts(options.parts, data.PARTS)
        measured = data.run_benchmark(out, wanted, options.num_images, options.workers, options.rounds, options.steps)
        _show_benchmark(measured, out / data.RESULTS)
    return 0


def _show_benchmark(benchmark: Benchmark, out: Path) -> None:
    for part, contenders in benchmark.figures.items():
        _show_figures(part, contenders)
    _show_targets(benchmark.targets)
    facts = {"figures": str(out / "bench.json")}
    if (out / "bench.md").is_file():
        facts["table"] = str(out / "bench.md")
    if "loader" in benchmark.figures:
        facts["picture"] = str(out / "bench.png")
    for name, why in benchmark.left_out.items():
        facts[f"without {name}"] = why
    closing_box("measured", facts)


def _bench_model(path: Path, out: Path, rounds: int) -> int:
    from pipeline.bench.model import FIGURES, PICTURE, bench_model

    benchmark = bench_model(path, out, rounds)
    columns = ["contender", "batch", "threads", "p50 ms", "p90 ms", "p99 ms", "images a second", "x fp32"]
    rows = [
        [
            *(row.contender, str(row.batch), str(row.threads)),
            *(f"{milliseconds:.3f}" for milliseconds in (row.p50_ms, row.p90_ms, row.p99_ms)),
            *(f"{row.images_a_second:,.0f}", f"{row.times:.2f}"),
        ]
        for row in benchmark.figures
    ]
    show_table(columns, rows)
    facts = {"model": benchmark.model, "figures": str(out / FIGURES), "picture": str(out / PICTURE)}
    closing_box("measured", facts | {f"without {name}": why for name, why in benchmark.left_out.items()})
    return 0


def _show_targets(targets: list[Target]) -> None:
    rows = [[t.what, f"{t.value:.3g}", t.goal, "met" if t.met else "missed"] for t in targets]
    if rows:
        show_table(["target", "value", "goal", "verdict"], rows)


def _show_figures(part: str, contenders: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for figures in contenders.values() for name in figures))
    rows = [[name, *(f"{figures[c]:,.4g}" if c in figures else "" for c in columns)] for name, figures in contenders.items()]
    show_table([part, *(column.replace("_", " ") for column in columns)], rows)
