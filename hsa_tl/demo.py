"""`hsa-tl demo`: HSA on real text, forward and backward. Every number of out/demo.json is measured in this run."""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from hsa_tl import api, cases, text
from hsa_tl.autotune import static as static_check
from hsa_tl.autotune.cli import show_static
from hsa_tl.bench import plot, plot_eval, record
from hsa_tl.bench.attention import Attention
from hsa_tl.bench.cli import show_speed
from hsa_tl.bench.lengths import ask_shipped, train_and_ask
from hsa_tl.bench.providers import Tensors, provider
from hsa_tl.bench.selections import TILES, statistics
from hsa_tl.bench.sweep import Sweep
from hsa_tl.files import write_atomic
from hsa_tl.model import load
from hsa_tl.model.recipe import load_recipe
from hsa_tl.problem import Problem
from hsa_tl.terminal import plot_or_say, say, show_table
from hsa_tl.testing import check_retrieval, make_selection

TOPKS = (16, 64)
ACCURACY_TOKENS = {"cpu": 256, "cuda": 2048}
STATIC_CASE = "paper-d128"
STATIC_PROGRAMS = ("hsa_fwd_union_sm90a", "hsa_fwd_chunk_sm90a", "hsa_bwd_chunk_sm90a", "hsa_decode_split")
THREADS = 1  # a thread that waits for another one's core costs more than two save
JUDGED_TOKENS = 1024  # the last ones, which see most; float64 takes its time
UNION_PAYS = 0.45  # of the chunks walked token by token
SPEED = ("hsa-auto", "retrieve", "hsa-with-retrieval")
# What each act does and its seconds on two quiet cores of an AMD EPYC, all caches empty.
ACTS = {
    "accuracy": ("out and gradients of every implementation against float64, on retrieved chunks of text", 30),
    "selections": ("what retrieval finds in text, against float64 and beside chance", 5),
    "speed": ("HSA against dense attention, forward and backward", 40),
    "static table": ("programs assembled for an H200, not run", 30),
    "plots": ("what was measured, as pictures", 5),
    "needles": ("a model of 0.6M parameters, trained at 256 tokens, finds needles in noise at up to 1M", 45),
}
TRAIN_S = 300
SPEED_S = 45  # of the speed comparison, most
WRITES = (".json", ".csv", ".png", ".svg")


def _base(device: str) -> Problem:
    return cases.on_cpu(cases.case("k16-d64").problem) if device == "cpu" else cases.case("paper-d128").problem


def accuracy(
    problem: Problem, tensors: Tensors, impls: Iterable[str], progress: Callable[[str], None] = lambda what: None
) -> list[dict]:
    """out and gradients of each implementation against float64, or why it cannot run."""
    progress("float64 oracle")
    want = provider("hsa-reference").expected(tensors, problem.S)
    rows = []
    for impl in impls:
        progress(impl)
        p = provider(f"hsa-{impl}")
        row = {"implementation": impl, "unavailable": p.unavailable(problem)}
        if row["unavailable"] is None:
            start = time.perf_counter()
            results = p.compare(tensors, problem.S, want)
            row |= {"seconds": time.perf_counter() - start, "errors": [r._asdict() for r in results]}
        rows.append(row)
    return rows


def selections(corpus: text.Corpus, problem: Problem, topks) -> tuple[list[dict], torch.Tensor]:
    """What retrieval does on text, judged by the oracle and beside chance; and the first K's indices."""
    f = text.text_features(corpus.data, problem)
    rows, first = [], None
    for K in topks:
        start = time.perf_counter()
        scores, chosen = api.retrieve_chunks(f.q_slc, f.landmarks, K, chunk_size=problem.S)
        seconds = time.perf_counter() - start
        last = slice(-JUDGED_TOKENS, None)
        wrong = check_retrieval(
            scores[:, last], chosen[:, last], f.q_slc[:, last], f.landmarks, chunk_size=problem.S,
            q_start=max(0, problem.T - JUDGED_TOKENS),
        )  # fmt: skip
        first = chosen if first is None else first
        by_chance = make_selection(1, problem.T, problem.H, K, problem.S)
        for kind, indices in (("text", chosen), ("random", by_chance)):
            found = statistics(indices, problem.S)
            share = found["union_share"]
            rows.append({
                "selection": kind, "K": K, "tokens": problem.T, "chunks": problem.N,
                "retrieve_seconds": seconds if kind == "text" else None,
                "message": "; ".join(wrong) if kind == "text" else "",
                "overlap": found["overlap"], "union_chunks": found["union_chunks"], "union_share": share,
                "union_pays_from_tokens": next((int(n) for n, s in share.items() if s < UNION_PAYS), None),
                "best_chunk_found": text.best_chunk_found(corpus.data, indices, problem.S),
            })  # fmt: skip
    return rows, first


def static_rows(console: Console) -> list[dict]:
    """The static table for an H200, of the first config of each program; one line instead where a tool is missing."""
    try:
        return static_check.table_rows(
            (cases.case(STATIC_CASE),), device="h200", programs=STATIC_PROGRAMS, first_only=True, jobs=2
        )
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        say(console, f"No static table for an H200 here: {reason}")
        return []


def show_accuracy(console: Console, rows: list[dict], title: str) -> bool:
    """Prints what `accuracy` found; False if a result is less accurate than it must be."""
    lines, notes, wrong = [], [], []
    for row in rows:
        name = row["implementation"]
        if row["unavailable"]:
            lines.append((name, "", "", "", "unavailable"))
            notes.append(f"{name} is unavailable: {row['unavailable']}")
        for e in row.get("errors", ()):
            verdict = "FAIL" if e["message"] else "pass"
            lines.append((name, e["quantity"], f"{e['max_error']:.1e}", f"{e['rms_error']:.1e}", verdict))
            wrong += [f"{name} {e['message']}"] if e["message"] else []
    names = ("implementation", "quantity", "max error", "RMS error", "verdict")
    show_table(console, f"{title}: error relative to float64", names, lines, right=(2, 3))
    say(console, *notes, *wrong)
    return not wrong


def _show_selections(console: Console, rows: list[dict]) -> None:
    lines = []
    for r in rows:
        unions = (f"{r['union_chunks'][str(n)]:.0f} ({r['union_share'][str(n)]:.2f})" for n in TILES)
        pays = r["union_pays_from_tokens"]
        share = (f"{r['overlap']:.2f}", *unions, f"{pays} tokens" if pays else "never", f"{r['best_chunk_found']:.2f}")
        lines.append((r["K"], r["selection"], *share))
    unions = (f"union of {n}" for n in TILES)
    names = ("K", "selection", "overlap", *unions, f"< {UNION_PAYS} from", "best chunk found")
    title = f"{rows[0]['tokens']} tokens: overlap of neighbours, distinct chunks (share of tokens x K)"
    show_table(console, title, names, lines, right=(0, 2, 3, 4, 5, 7))
    wrong = [f"K={r['K']}: {r['message']}" for r in rows if r["message"]]
    judged = f"selections and scores of the last {min(JUDGED_TOKENS, rows[0]['tokens'])} tokens, against float64"
    say(console, *(wrong or [f"{judged}: pass"]))


def run_demo(
    path: Path | None, out: Path, tokens: int, lengths: list[int], device: str, minutes: float | None,
    console: Console, needles: str | None = "ask",
) -> bool:  # fmt: skip
    """Runs the demo, prints its tables and writes demo.json, speed.csv, lengths.json and the plots under out.

    minutes: after so many no act begins, and a ValueError says so. needles: "ask" the weights that ship, "train" them
    first, or None: neither. Returns False if an implementation or a selection is less accurate than it must be.
    ValueError, OSError: a text that cannot be read, is too short or is not UTF-8, a folder that cannot be written;
    before the first act.
    """
    base = _base(device)
    topks = tuple(K for K in TOPKS if (K + 1) * base.S + max(TILES) <= tokens)
    if not topks:
        raise ValueError(f"tokens must be at least {(min(TOPKS) + 1) * base.S + max(TILES)}, got {tokens}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes:g}")
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    corpus = text.read_corpus(path, at_least=max(tokens, *lengths, *ACCURACY_TOKENS.values()))
    if needles == "ask":
        load("needle-tiny")  # whole, and all that it needs is here
    elif needles == "train":
        load_recipe("needle-tiny")
    _make_folder(out)
    plan = _plan(device, needles)
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def act(name: str) -> Iterator[None]:
        if time.monotonic() > end:
            raise ValueError(f"minutes must suffice for every act, got {minutes:g}, over before {name}")
        what, expected = plan[name]
        number = f"{list(plan).index(name) + 1}/{len(plan)}"
        console.print(f"\n{number} {name}: {what}; {expected}", markup=False, highlight=False, soft_wrap=True)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(THREADS)
    try:
        source = {"device": record.device_name(device), "versions": record.package_versions()}
        source["commit"] = record.commit()
        console.print(f"text: {corpus.name}, the first {tokens} bytes, one token each\ndevice: {source['device']}")
        with act("accuracy"):
            K = 4 if device == "cpu" else 16
            small = cases.at_length(base, ACCURACY_TOKENS[device], K=K)
            errors = accuracy(small, text.text_inputs(small, corpus).to(device)._asdict(), api.IMPLS[1:])
        accurate = show_accuracy(console, errors, f"{small}, text")
        with act("selections"):
            found, chosen = selections(corpus, cases.at_length(cases.on_cpu(base), tokens), topks)
        _show_selections(console, found)
        with act("speed"):
            dense = ("dense-expanded",) if device == "cpu" else ("dense", "dense-cudnn", "dense-flash")
            case = dataclasses.replace(cases.case("k16-d64"), name="demo", problem=base)
            speed = Sweep(
                Attention(corpus), case, lengths, ("forward", "train"), (*dense, *SPEED), "text", device,
                deadline_s=min(SPEED_S, end - time.monotonic()), threads=None, min_repeats=1, seconds=0.5,
            ).run()  # fmt: skip
        show_speed(console, speed, f"{speed[0].config.split(': ')[1]}, text, {speed[0].device}")
        with act("static table"):
            static = static_rows(console)
        if static:
            show_static(console, static, "smem in KiB, pair = (token, chunk)")
        with act("plots"):
            record.write_rows(speed, out, "speed")
            written = _plots(console, out, corpus, chosen[0, :, 0], base.S, found)
        if needles is not None:
            with act("needles"):
                ask = train_and_ask if needles == "train" else ask_shipped
                ask(console, out)
    finally:
        torch.set_num_threads(threads)
    result = source | {
        "text": {"name": corpus.name, "bytes": len(corpus.data), "tokens": tokens}, "seconds": seconds,
        "accuracy": {"problem": str(small), "implementations": errors}, "selections": found,
        "speed": [dataclasses.asdict(r) for r in speed], "static": static,
    }  # fmt: skip
    write_atomic(out / "demo.json", json.dumps(result, indent=1, default=str) + "\n")
    console.print("\nseconds: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    console.print("wrote " + ", ".join(str(p) for p in (out / "demo.json", out / "speed.csv", *written)))
    return accurate and not any(r["message"] for r in found)


def _plan(device: str, needles: str | None) -> dict[str, tuple[str, str]]:
    """Of each act of this run: what it does, and how long it takes."""
    plan = {}
    for name, (what, expected) in ACTS.items():
        if name == "needles" and needles is None:
            continue
        if name == "needles" and needles == "train":
            what, expected = what.replace("trained", "trained here"), expected + TRAIN_S
        if name == "static table" and static_check.missing_tools():
            expected = 0
        spent = f"{expected / 60:.0f} minutes" if expected > 90 else f"{expected:.0f} s"
        known = f"about {spent} on two quiet cores" if device == "cpu" else "not timed on a GPU yet"
        plan[name] = what, known
    return plan


def _make_folder(out: Path) -> None:
    """A folder in which every file of the demo can be written. ValueError: why not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {out}: {error.strerror}") from None
    if taken := [p for p in sorted(out.iterdir()) if p.suffix in WRITES and p.is_dir()]:
        raise ValueError(f"{taken[0]} must be a file or absent, got a folder")


def _plots(console: Console, out: Path, corpus, chosen, S: int, found: list[dict]) -> list[Path]:
    if plot_or_say(console, plot.pyplot) == []:
        return []
    map_path = out / "chosen_chunks.png"
    return [
        *plot_or_say(console, plot.plot_speed, out / "speed.csv", out),
        *plot_or_say(console, plot_eval.plot_unions, found, UNION_PAYS, corpus.name, out / "unions.png"),
        *plot_or_say(console, plot_eval.plot_chosen, chosen, S, corpus.files, corpus.name, map_path),
    ]
