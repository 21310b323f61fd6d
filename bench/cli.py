"""The benchmarks' commands of hsa-tl."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from hsa_tl.bench import compare, page, plot, record
from hsa_tl.bench.attention import DIRECTIONS, Attention
from hsa_tl.bench.decode import Decode
from hsa_tl.bench.dispatch import Dispatch
from hsa_tl.bench.micro import Micro
from hsa_tl.bench.model import ModelBench
from hsa_tl.bench.retrieve import Retrieve
from hsa_tl.bench.roofline import Roofline
from hsa_tl.bench.suite import Suite, one_of
from hsa_tl.bench.sweep import MAX_CALL_S, run_sweep
from hsa_tl.terminal import (
    make_console,
    minutes_option,
    number,
    parse_lengths,
    pick_device,
    plot_or_say,
    progress_bar,
    show_table,
    threads_option,
)

SUITES: dict[str, Callable[[], Suite]] = {
    "attention": Attention,
    "retrieve": Retrieve,
    "decode": Decode,
    "model": ModelBench,
    "roofline": Roofline,
    "micro": Micro,
    "dispatch": Dispatch,
}
WHATS = (*SUITES, *DIRECTIONS)  # a direction is the attention suite in that mode
console = make_console()


def show_speed(rows: list[record.Row], title: str) -> None:
    """Prints a sweep: time, spread, ratio to the fastest baseline, rates and memory, and why a point is missing."""
    at = {(r.mode, r.x, r.provider, r.metric): r.p50 for r in rows}
    baseline, lines, notes = compare.fastest_baseline(rows), [], {}
    for r in (r for r in rows if r.metric == "time"):
        if r.p50 is None:
            notes.setdefault((r.provider, r.note), []).append(f"{r.mode} {r.x}")
            continue
        ratio = f"{r.p50 / baseline[r.mode, r.x]:.2f}" if (r.mode, r.x) in baseline else ""
        rates = (at.get((r.mode, r.x, r.provider, m)) for m in ("throughput", "bandwidth", "peak_extra_memory"))
        cells = ("" if x is None else f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in rates)
        lines.append((r.mode, r.x, r.provider, f"{r.p50:.4g}", f"{r.p20:.4g}..{r.p80:.4g}", ratio, *cells))
    names = ("mode", "T", "provider", "ms", "p20..p80", "/ base", "GFLOP/s", "GB/s", "extra MiB")
    show_table(console, title, names, lines, right=(1, 3, 4, 5, 6, 7, 8))
    for (name, note), points in notes.items():
        console.print(f"{name} has no time for {', '.join(points)}: {note}", markup=False, highlight=False)


def bench(
    what: Annotated[str, typer.Argument(help=f"{', '.join(WHATS)}; attention is forward and train")] = "attention",
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")] = None,
    case_name: Annotated[
        Optional[str], typer.Option("--case", help="a problem of hsa_tl/cases.py; of model: a preset")
    ] = None,
    lengths: Annotated[Optional[str], typer.Option(help="1k,2k,4k or 1k..16k, which doubles")] = None,
    mode: Annotated[Optional[list[str]], typer.Option(help="of what is measured; repeatable, by default all")] = None,
    provider_names: Annotated[
        Optional[list[str]], typer.Option("--provider", help="dense, hsa-auto, hsa-triton, ...; repeatable")
    ] = None,
    selection: Annotated[str, typer.Option(help="random, overlap=0.8, full or text")] = "random",
    out: Annotated[Path, typer.Option(help="folder of bench.csv, bench.json and plots")] = Path("out/bench"),
    minutes: Annotated[Optional[float], minutes_option("stop measuring after so long")] = None,
    max_call_s: Annotated[
        float, number("--max-call", low=0, high=86400, help="skip a point whose one call takes longer, in seconds")
    ] = MAX_CALL_S,
    seconds: Annotated[
        float, number(low=0, high=86400, help="time each provider for so long at a point, 3 times at least")
    ] = 2.0,
    threads: Annotated[int, threads_option()] = 2,
    busy: Annotated[
        int, number(low=0, high=1024, help="processes that spin beside it, as on a machine that others use")
    ] = 0,
) -> None:
    """HSA against dense attention by length. Resumes: what OUT already holds of this commit is not measured again.

    retrieve: streaming retrieval of a prefill against materialised scores and torch.topk. decode: one new token over a
    cache, retrieval and attention. model: a training step, a prefill and a token, beside full attention. roofline: a
    matrix product and a copy. micro: on Hopper, what the cost model's constants stand for. dispatch: on a CPU, what a
    call for Hopper takes to its launches. Exit code 1 if a provider is refused by the correctness gate or fails, or
    nothing has a time.
    """
    one_of("what to bench", what, WHATS)
    suite = SUITES.get(what, Attention)()
    modes = [what] if what in DIRECTIONS else mode
    device = pick_device(device)
    case = suite.find_case(case_name or suite.default_case)
    points = parse_lengths(lengths or (suite.cpu_lengths if device == "cpu" else suite.cuda_lengths))
    with progress_bar(console) as bar:
        step = bar.add_task("starting", total=None)
        rows = run_sweep(
            suite, [case], points, modes, provider_names, selection, device, out,
            None if minutes is None else minutes * 60,
            lambda done, total, what: bar.update(step, completed=done, total=total, description=what),
            threads=threads, busy=busy, seconds=seconds, max_call_s=max_call_s,
        )  # fmt: skip
    show_speed(rows, f"{suite.name}, {rows[0].config}, {selection} selection, {rows[0].device}")
    console.print(f"wrote {out}/bench.csv and bench.json")
    for path in plot_or_say(console, plot.plot_speed, out / "bench.csv", out):
        console.print(f"wrote {path}")
    timed = [r for r in rows if r.metric == "time"]
    if all(r.p50 is None for r in timed) or any(r.note.startswith(("refused", "failed")) for r in timed):
        raise typer.Exit(1)


def plot_command(
    folder: Annotated[Optional[Path], typer.Argument(help="of bench.csv; with --page, of one folder a device")] = None,
    out: Annotated[Optional[Path], typer.Option(help="folder of the plots, by default FOLDER")] = None,
    whole_page: Annotated[bool, typer.Option("--page", help="write FOLDER/README.md and each device's plots")] = False,
) -> None:
    """PNG and SVG of what `hsa-tl bench` wrote: time, memory and rates by length, with crossover and roofline."""
    if whole_page:
        paths = page.write_page(folder or Path("bench/results"))
    else:
        folder = folder or Path("out/bench")
        files = plot.plot_rows(record.read_folder(folder), out or folder)
        paths = [p for its in files.values() for p in its]
    for path in paths:
        console.print(f"wrote {path}")


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(bench)
    app.command("plot")(plot_command)
