"""hsa-tl: what works here, how accurate and how fast it is, and the demo. Thin commands over the library."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from hsa_tl import __version__, api, cases, ops
from hsa_tl.api import IMPLS
from hsa_tl.autotune import cli as autotune_cli
from hsa_tl.autotune import static as static_check
from hsa_tl.bench import cli as bench_cli
from hsa_tl.bench import record
from hsa_tl.bench.attention import selection_inputs
from hsa_tl.bench.providers import provider, why_not
from hsa_tl.bench.suite import error_line
from hsa_tl.demo import accuracy, run_demo, show_accuracy
from hsa_tl.files import writable
from hsa_tl.model import cli as model_cli
from hsa_tl.problem import Problem
from hsa_tl.terminal import (
    Commands,
    default_device,
    make_console,
    minutes_option,
    parse_length,
    parse_lengths,
    pick_device,
    progress_bar,
    say,
    show_table,
)

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = make_console()
INFO_TOKENS = 128

Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")]
CaseName = Annotated[str, typer.Option("--case", help="a named problem, see hsa_tl/cases.py")]
Selection = Annotated[str, typer.Option(help="random, overlap=0.8, full, text or trained=FILE")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hsa-tl {__version__}")
        raise typer.Exit()


@app.callback(help=__doc__)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="the version, and no more")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command()
def info() -> None:
    """Versions, the device, the caches, which implementations work here or why not, and what auto takes.

    Each implementation runs a small call of the operator: what is said to work did.
    """
    device = default_device()
    rows = [*record.package_versions().items(), ("commit", record.commit())]
    rows += [("GPU", gpu()), ("device", record.device_name(device))]
    missing = "not found: kernels are not assembled for sm_90a here"
    rows += [(name, static_check.find_tool(name) or missing) for name in ("nvcc", "cuobjdump")]
    rows += caches().items()
    show_table(console, "Versions, device and tools", ("what", "here"), rows)
    base = cases.at_length(cases.case("k16-d64").problem, INFO_TOKENS)
    problem = base if device == "cuda" else cases.on_cpu(base)
    reasons = {name: try_out(name, problem) for name in IMPLS[1:]}
    rows = [(name, "yes" if reason is None else "no", reason or "") for name, reason in reasons.items()]
    show_table(console, f"Implementations on {device}, {problem.dtype_name}", ("impl", "works", "why not"), rows)
    say(console, *why_auto(problem))


def gpu() -> str:
    """The GPU, or why there is none."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is built without CUDA"
    return f"none: torch is built for CUDA {torch.version.cuda}, and sees no device"


def caches() -> dict[str, str]:
    """Where what is compiled and tuned is kept, by the variable that names it."""
    home = Path(os.path.expanduser("~"))
    folders = {
        "XDG_CACHE_HOME": Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "hsa-tl",
        "TILELANG_CACHE_DIR": Path(os.environ.get("TILELANG_CACHE_DIR") or home / ".tilelang" / "cache"),
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = {name: writable(folder, name) == folder for name, folder in folders.items()}
    lost = "cannot be written: what is compiled is kept for one process only"
    return {name: str(folder) if kept[name] else f"{folder} {lost}" for name, folder in folders.items()}


def try_out(name: str, problem: Problem) -> str | None:
    """Why an implementation cannot run the problem here, or None; it runs it."""
    if reason := why_not(name, problem):
        return reason
    try:
        inputs = selection_inputs(problem, "random")
        tensors = {k: getattr(inputs, k) for k in ("q", "k", "v", "weights", "indices")}
        api.hsa_attention(**tensors, chunk_size=problem.S, impl=name)
    except Exception as error:
        return error_line(error)
    return None


def why_auto(problem: Problem) -> list[str]:
    """What impl="auto" takes for attention, and why."""
    order = ops.preferred(problem)
    taken = ops.resolve("auto", problem)
    if problem.device_type == "cpu":
        why = "on a CPU it is the fastest; tilelang and triton run there for tests"
    else:
        passed = [f"{name} cannot: {why_not(name, problem)}" for name in order[: order.index(taken)]]
        why = "; ".join([f"the first of {', '.join(order)} that can", *passed])
    return [f"auto takes {taken}: {why}"]


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

    Exit code 1 if one is less accurate than its arithmetic allows (hsa_tl.accuracy), 2 if something is missing.
    """
    device = pick_device(device)
    T = parse_length(tokens or ("512" if device == "cpu" else "2k"))
    base = cases.case(case_name).problem
    problem = cases.at_length(cases.on_cpu(base) if device == "cpu" else base, T)
    if unknown := set(impl or ()) - set(IMPLS):
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {unknown.pop()!r}")
    missing = {n: r for n in impl or () if (r := provider(f"hsa-{n}").unavailable(problem))}
    if missing:
        raise NotImplementedError("; ".join(f"{n}: {reason}" for n, reason in missing.items()))
    tensors, names = selection_inputs(problem, selection)._asdict(), impl or IMPLS[1:]
    with progress_bar(console) as bar:
        step = bar.add_task("starting", total=1 + len(names))
        rows = accuracy(problem, tensors, names, lambda what: bar.update(step, advance=1, description=what))
    if not show_accuracy(console, rows, f"{problem}, {selection} selection, on {device}"):
        raise typer.Exit(1)


@app.command()
def demo(
    text: Annotated[Optional[Path], typer.Option(help="a text file; by default Python's own standard library")] = None,
    out: Annotated[Path, typer.Option(help="folder of demo.json and the plots")] = Path("out"),
    tokens: Annotated[str, typer.Option(help="tokens whose selections are measured, one a byte")] = "16k",
    lengths: Annotated[Optional[str], typer.Option(help="lengths of the speed comparison")] = None,
    device: Device = None,
    minutes: Annotated[Optional[float], minutes_option("begin no act when so many are over")] = None,
    needles: Annotated[
        bool, typer.Option(help="ask the weights that ship with the package at a million tokens")
    ] = True,
    train: Annotated[bool, typer.Option("--train", help="train them here first: some 5 minutes more")] = False,
) -> None:
    """The main job on real text: retrieve, attend, backward on every implementation; accuracy, overlap, speed, needles.

    Exit code 1 if an implementation or a selection is inaccurate.
    """
    if train and not needles:
        raise ValueError("train must be left out with --no-needles, got both")
    device = pick_device(device)
    points = parse_lengths(lengths or ("1k,4k" if device == "cpu" else "4k..64k"))
    last = None if not needles else "train" if train else "ask"
    ok = run_demo(text, out, parse_length(tokens), points, device, minutes, console, last)
    if not ok:
        raise typer.Exit(1)


autotune_cli.register(app)
bench_cli.register(app)
model_cli.register(app)

if __name__ == "__main__":
    app()
