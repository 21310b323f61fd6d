"""The commands of hsa-tl that measure speed, and what a trained model can do."""

import dataclasses
import inspect
import math
import os
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console

from hsa_tl.bench import compare, noise, page, paper, plot, plot_eval, record, ruler, selections, tradeoff
from hsa_tl.bench.attention import DIRECTIONS, Attention
from hsa_tl.bench.compare import length_label
from hsa_tl.bench.contenders import MODELS
from hsa_tl.bench.decode import Decode
from hsa_tl.bench.dispatch import Dispatch
from hsa_tl.bench.lengths import TASKS, make_weights, run_lengths
from hsa_tl.bench.model import ModelBench
from hsa_tl.bench.retrieve import Retrieve
from hsa_tl.bench.roofline import Micro, Roofline
from hsa_tl.bench.suite import one_of
from hsa_tl.bench.sweep import MAX_CALL_S, Sweep
from hsa_tl.model import data, load, pretrained
from hsa_tl.model import train as training
from hsa_tl.model.cli import RUN, lost_ranks
from hsa_tl.model.distributed import Ranks, end_process
from hsa_tl.model.longcontext import LongReader
from hsa_tl.terminal import (
    make_console,
    minutes_option,
    number,
    parse_lengths,
    pick_device,
    plot_or_say,
    progress_bar,
    say,
    seed_option,
    show_table,
    threads_option,
)

SUITES = {s.name: s for s in (Attention, Retrieve, Decode, ModelBench, Roofline, Micro, Dispatch)}
WHATS = (*SUITES, *DIRECTIONS)  # a direction is the attention suite in that mode
console = make_console()


def show_speed(console: Console, rows: list[record.Row], title: str) -> None:
    """Prints a sweep: time, spread, ratio to the fastest baseline, rates and memory, and why a point is missing."""
    at = {(r.mode, r.x, r.provider, r.metric): r.p50 for r in rows}
    baseline, lines = compare.fastest_baseline(rows), []
    for r in compare.times(rows):
        ratio = f"{r.p50 / baseline[r.mode, r.x]:.2f}" if (r.mode, r.x) in baseline else ""
        rates = (at.get((r.mode, r.x, r.provider, m)) for m in ("throughput", "bandwidth", "peak_extra_memory"))
        cells = ("" if x is None else f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in rates)
        lines.append((r.mode, r.x, r.provider, f"{r.p50:.4g}", f"{r.p20:.4g}..{r.p80:.4g}", ratio, *cells))
    names = ("mode", "T", "provider", "ms", "p20..p80", "/ base", "GFLOP/s", "GB/s", "extra MiB")
    show_table(console, title, names, lines, right=(1, 3, 4, 5, 6, 7, 8))
    say(console, *(f"{name} has no time for {at}: {note}" for (name, note), at in compare.missing(rows).items()))


def say_written(paths) -> None:
    console.print("wrote " + ", ".join(map(str, paths)))


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
    selection: Annotated[str, typer.Option(help="random, overlap=0.8, full, text or trained=FILE")] = "random",
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
    if mode and what in DIRECTIONS:
        raise ValueError(f"mode must be left out of bench {what}, got {', '.join(mode)}")
    suite = SUITES.get(what, Attention)()
    modes = [what] if what in DIRECTIONS else mode
    device = pick_device(device)
    case = suite.find_case(case_name or suite.default_case)
    points = parse_lengths(lengths or (suite.cpu_lengths if device == "cpu" else suite.cuda_lengths))
    with progress_bar(console) as bar:
        step = bar.add_task("starting", total=None)
        rows = Sweep(
            suite, case, points, modes, provider_names, selection, device, out,
            math.inf if minutes is None else minutes * 60,
            lambda done, total, what: bar.update(step, completed=done, total=total, description=what),
            threads=threads, busy=busy, seconds=seconds, max_call_s=max_call_s,
        ).run()  # fmt: skip
    show_speed(console, rows, f"{suite.name}, {rows[0].config}, {selection} selection, {rows[0].device}")
    plots = plot_or_say(console, plot.plot_speed, out / "bench.csv", out)
    say_written([out / "bench.csv", out / "bench.json", *plots])
    failed = any(note.startswith(("refused", "failed")) for _, note in compare.missing(rows))
    if failed or not compare.times(rows):
        raise typer.Exit(1)


def plot_command(
    folder: Annotated[Optional[Path], typer.Argument(help="of bench.csv; with --page, of one folder a device")] = None,
    out: Annotated[Optional[Path], typer.Option(help="folder of the plots, by default FOLDER")] = None,
    whole_page: Annotated[bool, typer.Option("--page", help="write FOLDER/README.md and each device's plots")] = False,
) -> None:
    """PNG and SVG of what `hsa-tl bench` wrote: time, memory and rates by length, with crossover and roofline."""
    if whole_page:
        if out:
            raise ValueError(f"out must be left out with --page, whose plots stand beside their rows, got {out}")
        say_written(page.write_page(folder or Path("bench/results")))
        return
    folder = folder or Path("out/bench")
    files = plot.plot_rows(record.read_folder(folder), out or folder)
    say_written(path for paths in files.values() for path in paths)


def lengths(
    models: Annotated[str, typer.Option(help=f"any of {', '.join(MODELS)}")] = ",".join(MODELS),
    every: Annotated[
        bool, typer.Option("--all", help="the fair table: the best of 3 learning rates; at most 5 or 3 seeds")
    ] = False,
    seeds: Annotated[int, number(low=1, high=1000, help="seeds 0, 1, ... of each model; --all takes no more")] = 5,
    lengths: Annotated[str, typer.Option(help="tokens, 256,4k or 4k..1m, which doubles")] = "256,4k,32k,256k,1m",
    tasks: Annotated[str, typer.Option(help=f"any of {', '.join(TASKS)}")] = ",".join(TASKS),
    samples: Annotated[int, number(low=1, high=1_000_000, help="contexts of each length and task")] = 100,
    haystacks: Annotated[
        Optional[int], number(low=1, high=1 << 20, help="that these share, by default each has its own")
    ] = None,
    budget: Annotated[
        float, number(low=0, high=1e6, help="seconds for each length and task, unless contexts cost little")
    ] = 600.0,
    recipe: Annotated[str, typer.Option(help="what each model is trained on")] = "needle-tiny",
    out: Annotated[Path, typer.Option(help="folder of lengths.json and lengths.png")] = Path("out/lengths"),
    runs: Annotated[Path, typer.Option(help="folder of the training runs")] = Path("out/train/lengths"),
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Trains HSA and the baselines on needles and measures their accuracy by length. Resumes from what is there, which
    may be of other commits.

    Runs on a CPU. --all: with the learning rate of half, one or two times the recipe's whose seed 0 has the least
    validation loss, or that a model's rows in OUT have; HSA with a part taken out has 3 seeds at most, the others 5.
    """
    torch.set_num_threads(threads)
    run_lengths(
        console, out, runs, models.split(","), list(range(seeds)), parse_lengths(lengths), tasks.split(","),
        samples=samples, haystacks=haystacks, budget_s=budget, recipe=recipe, fair=every,
    )  # fmt: skip


def paper_command(
    table: Annotated[str, typer.Argument(help=f"one of {', '.join(paper.TABLES)}")],
    size: Annotated[str, typer.Option(help="tiny, about an hour of a CPU core, or small, for one GPU")] = "tiny",
    seeds: Annotated[int, number(low=1, high=1000, help="seeds 0, 1, ... of each run")] = 1,
    samples: Annotated[int, number(low=1, high=1_000_000, help="contexts of each length and task")] = 100,
    data_folder: Annotated[Path, typer.Option("--data", help="what hsa-tl prepare wrote")] = Path("out/data"),
    tokenizer: Annotated[Optional[Path], typer.Option(help="that the text was prepared with, by default none")] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON and the plots")] = Path("out/paper"),
    runs: Annotated[Path, typer.Option(help="folder of the training runs")] = Path("out/train/paper"),
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")] = None,
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Trains what a table of the paper compares, and asks it: bits per token and needles by length. Resumes from what
    is there, which may be of other commits."""
    torch.set_num_threads(threads)
    options = {"out": out, "runs": runs, "text": data_folder, "tokenizer": tokenizer, "samples": samples}
    paper.run_table(console, table, size, seeds, **options, device=pick_device(device))


TAKES = {  # of the options of eval those that not every measurement takes
    "ruler": ("tasks", "samples", "depths", "depth_steps", "vocabulary", "memory", "haystack", "generate"),
    "perplexity": ("data_file", "memory", "windows", "before"),
    "selections": ("data_file",),
    **dict.fromkeys(("noise", *tradeoff.SETTINGS), ("tasks", "samples", "data_file")),
}


def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            help="ruler, perplexity, selections: what HSA layers read, noise: which chunks helped and which hurt, "
            "budget or topp: what fewer chunks cost and save"
        ),
    ],
    run: Annotated[str, typer.Option(help=RUN)] = "out/train/needle-tiny",
    lengths: Annotated[str, typer.Option(help="tokens, 4k,64k or 4k..1m, which doubles")] = "4k..64k",
    depths: Annotated[str, typer.Option(help="first..last of the needle's depth in [0, 1]")] = "0..1",
    depth_steps: Annotated[int, number(low=1, high=1001, help="depths from first to last")] = 5,
    tasks: Annotated[
        str,
        typer.Option(
            help=f"of needles: {', '.join(TASKS)}; in words: s-niah, mk-niah-1 to 3, mq-niah, mv-niah, vt, fwe, cwe, "
            "qa, babi-1 to 3"
        ),
    ] = "s-niah,mq-niah",
    samples: Annotated[int, number(low=1, high=1_000_000, help="contexts of each length, task and depth")] = 4,
    vocabulary: Annotated[
        Optional[str], typer.Option(help="words or needles; by default what the run was trained on")
    ] = None,
    data_file: Annotated[Path, typer.Option("--data", help="token file, of what reads text")] = Path(
        "out/data/held_out.bin"
    ),
    memory: Annotated[Optional[Path], typer.Option(help="folder that holds the chunk memory, off the heap")] = None,
    topk: Annotated[
        Optional[int], number(low=0, high=1 << 16, help="chunks to retrieve, 0 for windows only; by default the run's")
    ] = None,
    haystack: Annotated[
        Optional[Path], typer.Option(help="UTF-8 text to hide things in, for RULER in words; by default some sentences")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="generate RULER's answers, do not force them")] = False,
    windows: Annotated[int, number(low=1, high=1 << 20, help="places of the file, for perplexity")] = 8,
    before: Annotated[
        Optional[str], typer.Option(help="tokens before each place, the same for all runs; by default the longest")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON and the plot")] = Path("out/eval"),
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cpu")] = "cpu",
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """RULER by length and depth, or bits per token by context length, of a trained run; JSON and a plot.

    The JSON keeps the rows of other runs and of another --topk; the plot of perplexity shows them too. budget, topp and
    noise ask needles, or in the text that --data names: at several shares of the chunks kept and of the weight read, or
    for an answer or the last chunk's tokens what each chunk that was read adds. ruler and perplexity on many ranks,
    which share each context: torchrun --nproc-per-node 4 -m -- hsa_tl.cli eval ruler --threads 1.
    """
    given = {name: x for name, x in locals().items() if x != inspect.signature(evaluate).parameters[name].default}
    one_of("what to evaluate", what, TAKES)
    if others := given.keys() & set().union(*TAKES.values()) - {*TAKES[what]}:
        raise ValueError(f"{min(others)} must be left out of eval {what}, got {given[min(others)]}")
    for name in {"selections": ["lengths"], "perplexity": ["before"]}.get(what, []):
        if name in given and len(parse_lengths(given[name])) > 1:
            raise ValueError(f"{name} must be one for {what}, got {given[name]}")
    if what != "selections":
        record.read_json(out / f"{what}.json")  # what cannot be added to is known before
    device = pick_device(device)
    torch.set_num_threads(threads)
    points = parse_lengths(lengths)
    ranks = Ranks(device, int(os.environ.get("WORLD_SIZE", "1")))
    if ranks.world > 1 and what not in ("ruler", "perplexity"):
        raise ValueError(f"{what} must be measured by one process, got {ranks.world}")
    model = load(run, device)
    if topk == 0 and (model.encoder is None or what not in ("ruler", "perplexity")):
        raise ValueError(f"topk must be positive for {what} of this model, got 0")
    if topk:
        training.reconfigure(model, dataclasses.replace(model.config, topk=topk))
    read = ruler.WINDOWS if topk == 0 else f", topk {topk}" if topk else ""
    if what in ("noise", *tradeoff.SETTINGS):
        contexts = tradeoff.contexts(model, data_file, tasks.split(","), points, samples)
        named = {"model": Path(run).name + read} | record.origin(device)
        if what == "noise":
            noise.show_noise(console, model, named, list(contexts), out)
        else:
            show_tradeoff(model, what, named, contexts, out / f"{what}.json")
        return
    about = ruler.Run.of(run, model)
    if what == "selections":
        source = dataclasses.asdict(about) | record.origin(device)
        save_selections(model, data.tokens_of(data_file, model.tokenizer), points[-1], out, source)
        return
    more = read + (f", {ranks.world} ranks" if ranks.world > 1 else "")
    about = dataclasses.replace(about, model=about.model + more)
    group = dist.group.WORLD if ranks.world > 1 else None
    reader = LongReader(model, folder=memory, retrieve=topk != 0, group=group)
    if what == "perplexity":
        most = parse_lengths(before)[-1] if before else 0
        file = data.tokens_of(data_file, model.tokenizer)
        found = ruler.run_perplexity(reader, file, points, windows=windows, before=most)
    else:
        kinds = {s.data["kind"] for s in pretrained.trained(run)[0].stages}
        chosen = vocabulary or ("needles" if kinds == {"needles"} else "words")
        one_of("vocabulary", chosen, ruler.VOCABULARIES)
        places = parse_depths(depths, depth_steps)
        options = {"samples": samples, "generate": generate, "haystack": haystack}
        found = ruler.run_ruler(reader, chosen, tasks.split(","), points, places, **options)
    rows = []
    with lost_ranks(), progress_bar(console if ranks.rank == 0 else Console(quiet=True)) as bar:
        step = bar.add_task("read", total=None)
        for row in found:
            rows.append(row)
            bar.update(step, advance=1, description=f"{length_label(row.length)} done")
    ranks.close()
    if ranks.rank > 0:
        end_process()
    kept = ruler.write_rows(rows, about, device, out / f"{what}.json")
    if what == "ruler":
        arguments = rows, about.model, about.trained_length, ruler.chance(chosen)
        written = plot_or_say(console, plot_eval.plot_ruler, *arguments, out / "ruler.png")
    else:
        written = plot_or_say(console, plot_eval.plot_perplexity, kept, out / "perplexity.png")
    names = [name for name in vars(rows[0]) if name != "bits"]
    cells = [[getattr(r, name) for name in names] for r in rows]
    cells = [[f"{x:.4g}" if isinstance(x, float) else "" if x is None else x for x in row] for row in cells]
    show_table(console, f"{what} of {run}", names, cells, right=tuple(range(1 if what == "ruler" else 0, len(names))))
    say_written([out / f"{what}.json", *written])
    if ranks.world > 1:
        end_process()


def weights(
    recipe: Annotated[str, typer.Argument(help="a recipe of needles")] = "needle-tiny",
    seed: Annotated[int, seed_option("of the training")] = 0,
    samples: Annotated[int, number(low=1, high=1_000_000, help="contexts of each length and task")] = 100,
    out: Annotated[Path, typer.Option(help="folder; the package's own is model/weights")] = Path("out/weights"),
    threads: Annotated[int, threads_option()] = 1,
) -> None:
    """Trains from nothing, asks at 256 tokens to 1M, and writes the weights that hsa_tl.model.load knows by name.

    RECIPE.safetensors, and RECIPE.json: recipe, commit, versions, CPU, checksum and scores.
    """
    torch.set_num_threads(threads)
    say_written(make_weights(console, out, recipe, seed, samples=samples))


def show_tradeoff(model, what: str, about: dict, contexts, out: Path) -> None:
    """Every context at every value of the setting; rows as JSON, which keeps those of other models."""
    rows = [row for task, each in contexts for row in tradeoff.run_tradeoff(model, what, task, each)]
    record.merge_rows(out, about, map(dataclasses.asdict, rows))
    names = list(vars(rows[0]))[1:]
    cells = [["" if (x := getattr(r, name)) is None else x for name in names] for r in rows]
    show_table(console, f"{what} of {about['model']}", names, cells, right=(0, *range(2, len(names))))
    say_written([out])


def save_selections(model, file: data.TokenFile, length: int, out: Path, source: dict) -> None:
    """selections.safetensors, of the first HSA layer, for `hsa-tl bench --selection trained=FILE`; as JSON their
    overlap and source, and each layer's weight by distance, which is drawn."""
    ruler.require_tokens(file, length)
    layers, S = selections.trained_selections(model, file.tokens[:length]), model.config.chunk_size
    share = model.config.kv_heads // model.config.retrieval_heads
    indices = next(iter(layers.values()))[1][:, :, ::share]
    by_layer = {f"layer {i + 1}": selections.weight_by_distance(*x, S) for i, x in layers.items()}
    found = selections.statistics(indices, S) | {"weight_by_distance": by_layer}
    selections.save_selection(out / "selections.safetensors", indices, S, found | source)
    rows = [(n, f"{u:.1f}", f"{found['union_share'][n]:.2f}") for n, u in found["union_chunks"].items()]
    title = f"{length} tokens, top {found['topk']} of {length // S} chunks, overlap of neighbours"
    title += f" {found['overlap']:.2f}, first HSA layer"
    show_table(console, title, ("neighbours", "distinct chunks", "share"), rows, right=(0, 1, 2))
    rows = [
        (f"{2**i - 1} to {2 ** (i + 1) - 2}", *(f"{share:.3f}" for share in shares))
        for i, shares in enumerate(zip(*by_layer.values(), strict=True))
    ]
    names = ("chunks between", *by_layer)
    show_table(console, "Weight by distance, tokens of the second half", names, rows, right=tuple(range(len(names))))
    picture = plot_or_say(console, plot_eval.plot_distances, found | source, out / "selections.png")
    say_written([out / "selections.safetensors", out / "selections.json", *picture])


def parse_depths(text: str, steps: int) -> list[float]:
    """ "0..1" to `steps` depths evenly from the first to the last, "0.5" to one."""
    first, dots, last = text.partition("..")
    try:
        low, high = float(first), float(last if dots else first)
    except ValueError:
        raise ValueError(f"depths must be a number or first..last, got {text!r}") from None
    if not 0 <= low <= high <= 1 or steps < 1:
        raise ValueError(f"depths must rise within [0, 1] in at least one step, got {text!r} in {steps}")
    return np.linspace(low, high, steps if low < high else 1).tolist()


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(bench)
    app.command("plot")(plot_command)
    app.command()(lengths)
    app.command("paper")(paper_command)
    app.command("eval")(evaluate)
    app.command()(weights)
