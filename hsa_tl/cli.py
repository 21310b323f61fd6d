"""hsa-tl: what works here, how accurate and how fast it is, and the demo. Thin commands over the library."""

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from hsa_tl import cases
from hsa_tl.api import IMPLS
from hsa_tl.autotune import cli as autotune_cli
from hsa_tl.autotune import static as static_check
from hsa_tl.bench import gate, plot, record
from hsa_tl.bench.decode import run_decode
from hsa_tl.bench.providers import provider, why_not
from hsa_tl.bench.sweep import run_sweep, selection_inputs
from hsa_tl.demo import default_device, run_demo
from hsa_tl.model import cli as model_cli
from hsa_tl.terminal import (
    make_console,
    one_line_errors,
    parse_length,
    parse_lengths,
    plot_or_say,
    progress_bar,
    show_table,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = make_console()
VERDICTS = {True: "pass", False: "FAIL"}
TOOLS = ("nvcc", "cuobjdump")

Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")]
CaseName = Annotated[str, typer.Option("--case", help="a named problem, see hsa_tl/cases.py")]
Selection = Annotated[str, typer.Option(help="random, overlap, full or text")]


def pick_device(name: str | None) -> str:
    """ValueError if there is no such device here."""
    name = default_device() if name is None else name
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be here: torch sees no CUDA GPU, got 'cuda'; use --device cpu")
    return name


@app.command()
def info() -> None:
    """Versions, the device, and which implementations work here or why not."""
    device = default_device()
    problem = cases.at_length(cases.case("k16-d64").problem, 1024)
    problem = problem if device == "cuda" else cases.on_cpu(problem)
    rows = [*record.package_versions().items(), ("commit", record.commit()), ("device", record.device_name(device))]
    for name in TOOLS:
        rows.append((name, static_check.find_tool(name) or "not found: kernels are not assembled for sm_90a here"))
    show_table(console, "Versions and tools", ("what", "here"), rows)
    rows = [(name, "yes" if (reason := why_not(name, problem)) is None else "no", reason or "") for name in
            IMPLS]  # fmt: skip
    show_table(console, f"Implementations on {device}, {problem.dtype_name}", ("impl", "works", "why not"), rows)


@app.command()
def check(
    case_name: CaseName = "k16-d64",
    tokens: Annotated[
        Optional[str], typer.Option("--T", help="tokens, by default 512 on a CPU and 2k on a GPU")
    ] = None,
    impl: Annotated[Optional[list[str]], typer.Option(help="an implementation; may be repeated")] = None,
    device: Device = None,
    selection: Selection = "random",
) -> None:
    """Numerical comparison: out and every gradient against float64, for each implementation.

    Exit code 1 if one is less accurate than twice the eager equations in the same dtype, 2 if something is missing.
    """
    with one_line_errors():
        device = pick_device(device)
        T = parse_length(tokens or ("512" if device == "cpu" else "2k"))
        base = cases.case(case_name).problem
        problem = cases.at_length(cases.on_cpu(base) if device == "cpu" else base, T)
        if unknown := set(impl or ()) - set(IMPLS):
            raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {unknown.pop()!r}")
        names = [f"hsa-{name}" for name in impl or IMPLS[1:]]
        missing = {n: r for n in names if (r := provider(n).unavailable(problem))}
        if impl and missing:
            raise NotImplementedError("; ".join(f"{n.removeprefix('hsa-')}: {r}" for n, r in missing.items()))
        inputs = selection_inputs(problem, selection)
        with progress_bar(console) as bar:
            step = bar.add_task("float64 oracle", total=1 + len(names))
            want = gate.expected(provider(names[0]).oracle, inputs, problem.S)
            rows, notes, failed = [], [], False
            for n in names:
                short = n.removeprefix("hsa-")
                bar.update(step, advance=1, description=short)
                if n in missing:
                    rows.append((short, "", "", "", "unavailable"))
                    notes.append(f"{short} is unavailable: {missing[n]}")
                    continue
                for a in gate.compare(provider(n).attention, inputs, problem.S, want):
                    failed |= not a.ok
                    notes += [f"{short} {a.message}"] if a.message else []
                    rows.append((short, a.quantity, f"{a.max_error:.1e}", f"{a.rms_error:.1e}", VERDICTS[a.ok]))
    title = f"{problem}, {selection} selection, on {device}: error relative to float64"
    show_table(console, title, ("implementation", "quantity", "max error", "RMS error", "verdict"), rows, right=(2, 3))
    for note in notes:
        console.print(note, markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="attention, or decode: one new token over a cache")] = "attention",
    device: Device = None,
    case_name: CaseName = "k16-d64",
    lengths: Annotated[Optional[str], typer.Option(help="1k,2k,4k or 1k..16k, which doubles")] = None,
    mode: Annotated[Optional[list[str]], typer.Option(help="forward, backward or train (both); repeatable")] = None,
    provider_names: Annotated[
        Optional[list[str]], typer.Option("--provider", help="dense, hsa-auto, hsa-triton, ...; repeatable")
    ] = None,
    selection: Selection = "random",
    out: Annotated[Path, typer.Option(help="folder of bench.csv, bench.json and plots")] = Path("out/bench"),
    minutes: Annotated[Optional[float], typer.Option(help="stop measuring after so long")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """HSA against dense attention by length. Resumes: what OUT already holds of this commit is not measured again.

    decode: retrieval and attention of one token against SDPA over the whole cache, into OUT/decode.csv; not resumed.
    Exit code 1 if a provider is refused by the correctness gate or fails.
    """
    with one_line_errors():
        device = pick_device(device)
        if what not in ("attention", "decode"):
            raise ValueError(f"what to bench must be attention or decode, got {what!r}")
        if what == "decode":
            bench_decode(cases.case(case_name), lengths, provider_names or None, device, out, threads)
            return
        points = parse_lengths(lengths or ("1k..16k" if device == "cpu" else "4k..128k"))
        with progress_bar(console) as bar:
            step = bar.add_task("starting", total=None)
            rows = run_sweep(
                [cases.case(case_name)], points, mode or ("forward", "train"), provider_names or None, selection,
                device, out, None if minutes is None else minutes * 60,
                lambda done, total, what: bar.update(step, completed=done, total=total, description=what),
                threads=threads,
            )  # fmt: skip
        show_speed(rows, f"{case_name}, {selection} selection, {rows[0].device}")
        console.print(f"wrote {out}/bench.csv and bench.json")
        for path in plot_or_say(console, plot.plot_speed, out / "bench.csv", out):
            console.print(f"wrote {path}")
    if any(r.note.startswith(("refused", "failed")) for r in rows):
        raise typer.Exit(1)


def bench_decode(
    case: cases.Case, lengths: str | None, names: list[str] | None, device: str, out: Path, threads: int
) -> None:
    """The decode benchmark; exit code 1 if a provider is refused by the correctness gate."""
    points = parse_lengths(lengths or ("4k,16k,64k,256k" if device == "cpu" else "4k..16m"))
    with progress_bar(console) as bar:
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total, description=description)

        rows = run_decode(case, points, names, device, out, progress, threads=threads)
    show_speed(rows, f"{case.name}, one token, {rows[0].device}")
    console.print(f"wrote {out}/decode.csv and decode.json")
    if any(r.note.startswith("refused") for r in rows):
        raise typer.Exit(1)


def show_speed(rows: list[record.Row], title: str) -> None:
    """Prints a sweep: time, spread, ratio to the fastest dense, throughput and memory, and why a point is missing."""
    at = {(r.mode, r.x, r.provider, r.metric): r for r in rows}
    dense, lines, notes = record.fastest_dense(rows), [], {}
    for r in (r for r in rows if r.metric == "time"):
        if r.p50 is None:
            notes.setdefault((r.provider, r.note), []).append(f"{r.mode} {r.x}")
            continue
        ratio = f"{r.p50 / dense[r.mode, r.x]:.2f}" if (r.mode, r.x) in dense else ""
        rate, memory = (at.get((r.mode, r.x, r.provider, m)) for m in ("throughput", "peak_extra_memory"))
        extra = "" if memory is None or memory.p50 is None else f"{memory.p50:.0f}"
        spread = f"{r.p20:.4g} .. {r.p80:.4g}"
        lines.append((r.mode, r.x, r.provider, f"{r.p50:.4g}", spread, ratio, f"{rate.p50:.0f}", extra))
    names = ("mode", "T", "provider", "ms", "p20 .. p80", "/ dense", "GFLOP/s", "extra MiB")
    show_table(console, title, names, lines, right=(1, 3, 4, 5, 6, 7))
    for (name, note), points in notes.items():
        console.print(f"{name} has no time for {', '.join(points)}: {note}", markup=False, highlight=False)


@app.command()
def demo(
    text: Annotated[Optional[Path], typer.Option(help="a text file; by default Python's own standard library")] = None,
    out: Annotated[Path, typer.Option(help="folder of demo.json and the plots")] = Path("out"),
    tokens: Annotated[str, typer.Option(help="tokens whose selections are measured, one a byte")] = "16k",
    lengths: Annotated[Optional[str], typer.Option(help="lengths of the speed comparison")] = None,
    device: Device = None,
    minutes: Annotated[float, typer.Option(help="time for the speed comparison")] = 2.0,
) -> None:
    """The main job on real text: retrieve, attend, backward on every implementation; accuracy, overlap, speed.

    Exit code 1 if an implementation is inaccurate.
    """
    with one_line_errors():
        device = pick_device(device)
        points = parse_lengths(lengths or ("1k..8k" if device == "cpu" else "4k..64k"))
        ok = run_demo(text, out, parse_length(tokens), points, device, minutes * 60, console)
    if not ok:
        raise typer.Exit(1)


autotune_cli.register(app)
model_cli.register(app)

if __name__ == "__main__":
    app()
