"""The tuner's commands of hsa-tl."""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from hsa_tl import cases
from hsa_tl.autotune import calibrate as calibration
from hsa_tl.autotune import cost, explain, measure, plan, static_page, table, tuner
from hsa_tl.autotune import static as static_check
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench.suite import one_of
from hsa_tl.cases import Case
from hsa_tl.files import write_atomic
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.terminal import make_console, minutes_option, number, parse_lengths, progress_bar, say, show_table

console = make_console()
SHORT = {  # in a terminal's table
    "threads=": "t=", "num_stages=": "s=", "block_M=": "M=",
    ",reduce_add=0": "", "reduce_add=1": "add", ",q_registers=0": "", "q_registers=1": "q", ",blocks=0": "",
    "blocks=": "b=",
}  # fmt: skip
DTYPES = ("bfloat16", "float16")
DEFAULT = "paper-d128"
JOURNAL = "candidates that are finished; by default the user's own. A run goes on from it"


def short(config: str) -> str:
    for word, less in SHORT.items():
        config = config.replace(word, less)
    return config


def show_static(console: Console, rows: list[dict], title: str) -> bool:
    """Prints static rows and what is wrong with them; False if one has a fault."""
    lines, notes, slow = [], [], {}
    for r in rows:
        wrong = static_check.faults(r)
        name = f"{r['case']} {r['program']} {r['config']}"
        notes += [f"{name}: {fault}" for fault in wrong]
        for cliff in static_check.cliffs(r)[len(wrong) :]:
            slow.setdefault((r["program"], cliff), []).append(short(r["config"]))
        read = [""] * 7
        if r["ns_per_pair"] is not None:
            read = [r["registers"], r["spill_bytes"], f"{r['smem_bytes'] / 1024:.0f}", r["ctas_per_sm"]]
            read += [r["hgmma"] or r["hmma"], f"{r['ns_per_pair']:.2f}", r["limiter"]]
        timed = [f"{r['median_us']:.0f}" if r["median_us"] else ""] if "median_us" in r else []
        lines.append((r["case"], r["program"], short(r["config"]), *read, f"{r['roofline_ns']:.2f}", *timed))
    names = ("case", "program", "config", "regs", "spill", "smem", "CTAs", "MMA", "ns/pair", "limiter", "roof")
    names += ("us",) if any("median_us" in r for r in rows) else ()
    show_table(console, title, names, lines, right=(3, 4, 5, 6, 7, 8, 10, 11))
    for (program, cliff), where in slow.items():
        total = sum(r["program"] == program for r in rows)
        say(console, f"{program}: {cliff}: {len(where)} of {total}")
    say(console, *notes)
    return not notes


def progress_of(bar, description: str) -> Callable[[int, int], None]:
    step = bar.add_task(description, total=None)
    return lambda done, total: bar.update(step, completed=done, total=total)


def static(
    case_names: Annotated[
        Optional[list[str]], typer.Option("--case", help="repeatable; by default those tagged ci")
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200 or h800: whose bandwidths the prediction takes")] = "h200",
    out: Annotated[Optional[Path], typer.Option(help="a CSV file to write, and README.md beside it")] = None,
    jobs: Annotated[int, number(low=1, high=1024, help="compilations at once")] = 2,
) -> None:
    """Lowers and assembles every config for sm_90a and reads registers, spills, SASS; predicts ns per pair. No GPU.

    Exit code 1 if a config spills, fails or misses its tensor-core instructions, 2 if nvcc or cuobjdump is missing.
    """
    one_of("device", device, cost.DEVICES)
    chosen = tuple(map(cases.case, case_names)) if case_names else cases.find("ci")
    with progress_bar(console) as bar:
        progress = progress_of(bar, "lower, assemble, read")
        journal = tuner.default_journal()
        rows = static_check.table_rows(chosen, device=device, jobs=jobs, journal=journal, progress=progress)
    ok = show_static(
        console, rows, f"sm_90a, predicted for {device}; smem in KiB, pair = (token, key/value head, chunk)"
    )
    if out:
        static_page.write(rows, out)
        console.print(f"wrote {out}", soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


def given(base: Case, lengths: list[int] | None, dims: dict[str, int], dtype: str | None) -> list[Case]:
    """The case with these dims instead of its own, at each of the lengths."""
    p, changes = base.problem, {k: v for k, v in dims.items() if v is not None}
    HQ, H, S = (changes.get(name, getattr(p, name)) for name in ("HQ", "H", "S"))
    if HQ % H:
        raise ValueError(f"HQ must be a multiple of H = {H}, got {HQ}")
    if S not in (16, 32, 64, 128):
        raise ValueError(f"S must be a power of two between 16 and 128, got {S}")
    if dtype is not None:
        changes["dtype"] = getattr(torch, one_of("dtype", dtype, DTYPES))
    made = []
    for T in lengths or [p.T]:
        problem = cases.at_length(cases.at_length(p, T, **changes), T)  # N and masked follow the new S
        made.append(Case(str(problem) if changes else base.name, problem, base.tags, base.why))
    return made


def autotune(
    case_names: Annotated[
        Optional[list[str]], typer.Option("--case", help=f"a named problem, repeatable; by default {DEFAULT}")
    ] = None,
    tag: Annotated[Optional[str], typer.Option(help="all cases of a tag: tune, ci, bench")] = None,
    lengths: Annotated[Optional[str], typer.Option("--T", "--lengths", help="tokens: 16k, 4k,64k or 4k..1m")] = None,
    hq: Annotated[Optional[int], number("--HQ", low=1, high=4096, help="query heads")] = None,
    h: Annotated[Optional[int], number("--H", low=1, high=4096, help="key/value heads")] = None,
    d: Annotated[Optional[int], number("--D", low=1, high=1024, help="head dimension")] = None,
    s: Annotated[Optional[int], number("--S", low=1, high=1024, help="chunk size")] = None,
    k: Annotated[Optional[int], number("--K", low=1, high=65536, help="chunks that a token chooses")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="bfloat16 or float16")] = None,
    device: Annotated[
        Optional[list[str]], typer.Option(help="h100, h200 or h800: predicts, repeatable; by default the GPU here")
    ] = None,
    program: Annotated[
        Optional[list[str]], typer.Option(help="hsa_fwd_union, ...; repeatable; by default all of hsa_attention")
    ] = None,
    minutes: Annotated[
        Optional[float], minutes_option("end after so long; by default 9 where it measures, else when all is done")
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(help="a table, or a folder of <device>.json, to merge what is measured into; by default the "
                     "user's own"),
    ] = None,
    journal_path: Annotated[Optional[Path], typer.Option("--journal", help=JOURNAL)] = None,
    jobs: Annotated[int, number(low=1, high=1024, help="compilations at once")] = 2,
    explained: Annotated[bool, typer.Option("--explain", help="why a config is chosen, and its neighbours")] = False,
) -> None:  # fmt: skip
    """From a problem to a table: every candidate assembled and ranked, and measured where a Hopper GPU is present.

    An interrupted run goes on where it stopped. Exit code 2 if nvcc or cuobjdump is missing.
    """
    here = cost.device_name()
    devices = [one_of("device", name, cost.DEVICES) for name in device or [here or "h200"]]
    programs = tuple(one_of("program", name, configs.planned()) for name in program or configs.tuned())
    named = [cases.case(name) for name in case_names or ()] + list(cases.find(tag) if tag else ())
    if tag and not cases.find(tag):
        raise ValueError(f"tag must be one that a case has, got {tag!r}")
    points = parse_lengths(lengths) if lengths else None
    dims = {"HQ": hq, "H": h, "D": d, "S": s, "K": k}
    wanted = [x for c in named or [cases.case(DEFAULT)] for x in given(c, points, dims, dtype)]
    for case in wanted:
        if not any(configs.space(name, case.problem) for name in programs):
            reason = configs.why_illegal(programs[0], case.problem, configs.config_of(programs[0])())
            raise ValueError(f"problem must suit one of {', '.join(programs)}, got {case.problem}: {reason}")
    journal = Journal(journal_path) if journal_path else tuner.default_journal()
    if explained:
        if out or minutes is not None:
            raise ValueError("out and minutes must be left out with --explain, which measures nothing")
        for case, name, where in itertools.product(wanted, programs, devices):
            if configs.space(name, case.problem):
                show_explanation(explain.explain(name, case, where, journal, jobs=jobs), case, where)
        return
    measured = not device and here is not None
    if out and not measured:
        raise ValueError("out must be left out where nothing is measured: a table has no predictions")
    minutes = 9.0 if measured and minutes is None else minutes
    chosen, shown = run(wanted, devices[0], programs, journal, jobs, minutes, measured)
    if measured:
        path = table.user_path(here) if out is None else out if out.suffix == ".json" else out / f"{here}.json"
        table.merge(path, here, chosen)
        console.print(f"wrote {path}", soft_wrap=True)
    how = f"measured on {here}" if measured else f"static, predicted for {devices[0]}"
    if len(wanted) == 1:
        parts = [part | ({"median_us": row["median_us"]} if measured else {}) for row in shown for part in row["parts"]]
        show_static(console, parts, f"{wanted[0].problem}: {how}, best first")
    if measured:
        show_chosen(chosen, f"Fastest plans: {how}")
        show_agreement(journal, here)
    else:
        show_predicted(wanted, devices, f"Plans: {how}")


def run(
    wanted: list[Case], device: str, programs: tuple[str, ...], journal: Journal, jobs: int,
    minutes: float | None, measured: bool,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Ranks, and measures what is to be measured. The table rows of what was measured, and the last case's plans.

    ValueError: the minutes are over before all is assembled; what is done is in the journal.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    chosen, rows = [], []
    work = [(n, c.problem, x) for c in wanted for n in programs for x in configs.candidates(n, c.problem)]
    with progress_bar(console) as bar:
        show = progress_of(bar, "lower, assemble, read")

        def progress(done: int, total: int) -> None:
            show(done, total)
            if done < total and time.monotonic() > end:
                raise ValueError(
                    f"minutes must suffice for {total} candidates, got {minutes:g}: {done} are assembled, and the same "
                    "call goes on from them"
                )

        static_check.analyse_all(work, jobs=jobs, journal=journal, progress=progress)
        for i, case in enumerate(wanted):
            rows = tuner.rank(case, device, programs=programs, journal=journal)
            if measured:
                seconds, show = max(0.0, end - time.monotonic()), progress_of(bar, f"measure {case.name}")
                rows = measure.measure(
                    case, rows, device=device, seconds=seconds / (len(wanted) - i), journal=journal, progress=show
                )
                chosen += tuner.best(case, rows)
    return chosen, rows


def show_chosen(rows: list[dict], title: str) -> None:
    lines = [
        (r["direction"], r["D"], r["K"], r["T"][1], r["overlap"][1], plan_text(table.programs(r)),
         f"{r['ns_per_pair']:.2f}", r["candidates"], f"{r['median_us']:.0f}")
        for r in rows
    ]  # fmt: skip
    names = ("direction", "D", "K", "T", "overlap", "plan", "ns/pair", "of", "us")
    show_table(console, title, names, lines, right=(1, 2, 3, 4, 6, 7, 8))


def plan_text(programs: tuple) -> str:
    return "; ".join(f"{name} {short(configs.describe(config))}" for name, config in programs)


def show_predicted(wanted: list[Case], devices: list[str], title: str) -> None:
    """Prints the plans that calls of the cases get on each device, by the class of the selection."""
    lines = []
    for device, case, direction, overlap in itertools.product(devices, wanted, plan.DIRECTIONS, tuner.CLASSES):
        try:
            made = plan.choose(direction, case.problem, json.dumps({"overlap": float(overlap)}), device=device)
            text, ns = plan_text(made.programs), f"{made.ns_per_pair:.2f}"
        except NotImplementedError as error:
            text, ns = str(error), ""
        lines.append((device, case.problem, direction, overlap, text, ns))
    names = ("device", "problem", "direction", "overlap", "plan", "ns/pair")
    show_table(console, title, names, lines, right=(3, 5))


def show_agreement(journal: Journal, device: str) -> None:
    """Prints the rank correlation of prediction and measurement, strategy by strategy."""
    found = calibration.samples(journal, device)
    for strategy in dict.fromkeys(x.strategy for x in found):
        mine = [x for x in found if x.strategy == strategy]
        if len(mine) > 2:
            names, rank = " and ".join(strategy), calibration.agreement(mine, cost.DEVICES[device])
            console.print(f"{names}: Spearman of prediction and measurement {rank:.2f} over {len(mine)}")


def show_explanation(e: explain.Explanation, case: Case, device: str) -> None:
    c, row = e.chosen, e.chosen.row
    console.print(f"{e.program}, {case.problem}, {device}", style="bold", highlight=False, markup=False)
    lines = [f"chosen: {c.config}", f"because: {e.origin}"]
    if row["ns_per_pair"] is None:
        lines.append(f"fails: {row['error']}")
    else:
        bounds = ", ".join(f"{name} {ns:.2f}" for name, ns in e.bounds.items())
        lines.append(f"predicted: {row['ns_per_pair']:.3f} ns/pair, limiter {row['limiter']}; ns by limit: {bounds}")
        cliffs = static_check.cliffs(row)
        lines.append(f"roofline: {row['roofline_ns']:.3f} ns/pair; cliffs: {', '.join(cliffs) or 'none'}")
    lines.append("measured: " + (f"{c.median_us:.4g} us" if c.median_us else "not yet on this device"))
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    near = []
    for n in e.neighbours:
        if n.illegal:
            near.append((n.change, "", "", n.illegal))
            continue
        known = n.row["ns_per_pair"] is not None
        ratio = f"{n.row['ns_per_pair'] / row['ns_per_pair']:.3f}" if known and row["ns_per_pair"] else ""
        why = "; ".join([n.row["limiter"] or "", *static_check.cliffs(n.row)])
        near.append((n.change, ratio, f"{n.median_us:.4g}" if n.median_us else "", why))
    show_table(console, "neighbours", ("change", "x predicted", "us", "why"), near, right=(1, 2))


def calibrate(
    device: Annotated[str, typer.Option(help="h100, h200 or h800")],
    out: Annotated[
        Optional[Path], typer.Option(help="the constants file to write, as autotune/devices has them")
    ] = None,
    journal_path: Annotated[Optional[Path], typer.Option("--journal", help=JOURNAL)] = None,
) -> None:
    """Fits the assumed constants of a device to its measurements; prints the rank correlation before and after.

    Exit code 2 if there is no measurement.
    """
    one_of("device", device, cost.DEVICES)
    journal = Journal(journal_path) if journal_path else tuner.default_journal()
    found, old = calibration.samples(journal, device), cost.DEVICES[device]
    new = calibration.fit(found, old)
    lines = [(n, f"{getattr(old, n):.4g}", f"{getattr(new, n):.4g}") for n in old.free]
    show_table(console, f"{device}: {len(found)} measurements", ("constant", "old", "fitted"), lines, right=(1, 2))
    before, after = (calibration.agreement(found, x) for x in (old, new))
    console.print(f"Spearman of prediction and measurement: {before:.3f}, fitted {after:.3f}")
    if out:
        write_atomic(out, calibration.text(old, new))
        console.print(f"wrote {out}", soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command()(static)
    app.command()(autotune)
    app.command()(calibrate)
