"""The commands of hsa-tl that evaluate a trained model."""

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from hsa_tl.bench import plot_eval, ruler, selections
from hsa_tl.bench.lengths import MODELS
from hsa_tl.bench.needle_demo import make_weights, run_needles
from hsa_tl.bench.plot import length_label
from hsa_tl.model import checkpoint, data, load
from hsa_tl.model import train as training
from hsa_tl.model.longcontext import LongReader
from hsa_tl.terminal import (
    make_console,
    number,
    parse_lengths,
    pick_device,
    plot_or_say,
    progress_bar,
    seed_option,
    show_table,
    threads_option,
)

console = make_console()


def samples_option(help: str):
    return number(low=1, high=1_000_000, help=help)


def lengths(
    models: Annotated[str, typer.Option(help="any of hsa, full-rope, swa, nsa, nsa-rope")] = ",".join(MODELS),
    seeds: Annotated[int, number(low=1, high=1000, help="seeds 0, 1, ... of each model")] = 5,
    lengths: Annotated[str, typer.Option(help="tokens, 256,4k or 4k..1m, which doubles")] = "256,4k,32k,256k,1m",
    tasks: Annotated[str, typer.Option(help="s-niah, mq-niah, mk-niah-3")] = "s-niah,mq-niah,mk-niah-3",
    samples: Annotated[int, samples_option("contexts of each length and task")] = 100,
    budget: Annotated[
        float, number(low=0, high=1e6, help="seconds for each length and task, unless contexts cost little")
    ] = 60.0,
    recipe: Annotated[str, typer.Option(help="what each model is trained on")] = "needle-tiny",
    out: Annotated[Path, typer.Option(help="folder of lengths.json and lengths.png")] = Path("out/lengths"),
    runs: Annotated[Path, typer.Option(help="folder of the training runs")] = Path("out/train/lengths"),
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Trains HSA and the baselines on needles and measures their accuracy by length. Resumes from what is there."""
    torch.set_num_threads(threads)
    run_needles(
        console, out, runs, models.split(","), list(range(seeds)), parse_lengths(lengths), tasks.split(","),
        samples=samples, budget_s=budget, recipe=recipe,
    )  # fmt: skip


def evaluate(
    what: Annotated[str, typer.Argument(help="ruler, perplexity, or selections: what the first HSA layer reads")],
    run: Annotated[Path, typer.Option(help="folder of a training run")] = Path("out/train/needle-tiny"),
    lengths: Annotated[str, typer.Option(help="tokens, 4k,64k or 4k..1m, which doubles")] = "4k..64k",
    depths: Annotated[str, typer.Option(help="first..last of the needle's depth in [0, 1]")] = "0..1",
    depth_steps: Annotated[int, number(low=1, high=1001, help="depths from first to last")] = 5,
    tasks: Annotated[str, typer.Option(help="s-niah, mk-niah-1 to 3, mq-niah, vt, fwe")] = "s-niah,mq-niah",
    samples: Annotated[int, samples_option("contexts of each length, task and depth")] = 4,
    vocabulary: Annotated[
        Optional[str], typer.Option(help="words or needles; by default what the run was trained on")
    ] = None,
    data_file: Annotated[Path, typer.Option("--data", help="token file, for perplexity and selections")] = Path(
        "out/data/held_out.bin"
    ),
    memory: Annotated[Optional[Path], typer.Option(help="folder that holds the chunk memory, off the heap")] = None,
    topk: Annotated[Optional[int], number(low=1, high=1 << 16, help="chunks to retrieve, by default the run's")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="generate RULER's answers, do not force them")] = False,
    windows: Annotated[int, number(low=1, high=1 << 20, help="places of the file, for perplexity")] = 8,
    before: Annotated[
        Optional[str],
        typer.Option(help="tokens before each place, the same for all runs; by default the longest"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON and the plot")] = Path("out/eval"),
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cpu")] = "cpu",
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """RULER by length and depth, or bits per token by context length, of a trained run; JSON and a plot.

    The JSON keeps the rows of other runs; the plot of perplexity shows them too.
    """
    if what not in ("ruler", "perplexity", "selections"):
        raise ValueError(f"what to evaluate must be ruler, perplexity or selections, got {what!r}")
    device = pick_device(device)
    torch.set_num_threads(threads)
    points = parse_lengths(lengths)
    model = load(run, device)
    if topk is not None:
        training.reconfigure(model, dataclasses.replace(model.config, topk=topk))
    if what == "selections":
        source = dataclasses.asdict(ruler.Run.of(run, model)) | ruler.origin(device)
        save_selections(model, data.TokenFile(data_file), points[-1], out, source)
        return
    reader = LongReader(model, folder=memory)
    with progress_bar(console) as bar:
        step = bar.add_task("read", total=None)

        def on_row(row) -> None:
            bar.update(step, advance=1, description=f"{length_label(row.length)} done")

        if what == "perplexity":
            most = parse_lengths(before)[-1] if before else 0
            rows = ruler.run_perplexity(
                reader, data.TokenFile(data_file), points, windows=windows, before=most, on_row=on_row
            )
        else:
            kinds = {s["data"]["kind"] for s in checkpoint.latest(run).recipe["stages"]}
            chosen = vocabulary or ("needles" if kinds == {"needles"} else "words")
            if chosen not in ruler.VOCABULARIES:
                raise ValueError(f"vocabulary must be words or needles, got {chosen!r}")
            places = parse_depths(depths, depth_steps)
            rows = ruler.run_ruler(
                reader, chosen, tasks.split(","), points, places, samples=samples, generate=generate, on_row=on_row
            )
    written = [out / f"{what}.json"]
    about = ruler.Run.of(run, model)
    kept = ruler.write_rows(rows, about, device, written[0])
    if what == "ruler":
        arguments = rows, about.model, about.trained_length, ruler.chance(chosen)
        written += plot_or_say(console, plot_eval.plot_ruler, *arguments, out / "ruler.png")
    else:
        written += plot_or_say(console, plot_eval.plot_perplexity, kept, out / "perplexity.png")
    names = list(vars(rows[0]))
    cells = [[f"{x:.4g}" if isinstance(x, float) else "" if x is None else x for x in vars(r).values()] for r in rows]
    show_table(console, f"{what} of {run}", names, cells, right=tuple(range(1 if what == "ruler" else 0, len(names))))
    console.print("wrote " + ", ".join(map(str, written)))


def weights(
    recipe: Annotated[str, typer.Argument(help="a recipe of needles")] = "needle-tiny",
    seed: Annotated[int, seed_option("of the training")] = 0,
    samples: Annotated[int, samples_option("contexts of each length and task")] = 100,
    out: Annotated[Path, typer.Option(help="folder; the package's own is model/weights")] = Path("out/weights"),
    threads: Annotated[int, threads_option()] = 1,
) -> None:
    """Trains from nothing, asks at 256 tokens to 1M, and writes the weights that hsa_tl.model.load knows by name.

    RECIPE.safetensors, and RECIPE.json: recipe, commit, versions, CPU, checksum and scores.
    """
    torch.set_num_threads(threads)
    written = make_weights(console, out, recipe, seed, samples=samples)
    console.print("wrote " + ", ".join(map(str, written)))


def save_selections(model, file: data.TokenFile, length: int, out: Path, source: dict) -> None:
    """selections.safetensors for `hsa-tl bench --selection trained=FILE`; their overlap and source as JSON."""
    if length > len(file):
        raise ValueError(f"lengths must be at most the {len(file)} tokens of {file.path}, got {length}")
    indices = selections.trained_selection(model, file.tokens[:length])
    found = selections.statistics(indices, model.config.chunk_size)
    selections.save_selection(out / "selections.safetensors", indices, model.config.chunk_size, found | source)
    rows = [(n, f"{u:.1f}", f"{found['union_share'][n]:.2f}") for n, u in found["union_chunks"].items()]
    chunks = length // found["chunk_size"]
    title = f"{length} tokens, top {found['topk']} of {chunks} chunks, overlap of neighbours {found['overlap']:.2f}"
    show_table(console, title, ("neighbours", "distinct chunks", "share"), rows, right=(0, 1, 2))
    console.print(f"wrote {out / 'selections.safetensors'}, {out / 'selections.json'}")


def parse_depths(text: str, steps: int) -> list[float]:
    """ "0..1" to `steps` depths evenly from the first to the last, "0.5" to one."""
    first, dots, last = text.partition("..")
    try:
        low, high = float(first), float(last if dots else first)
    except ValueError:
        raise ValueError(f"depths must be a number or first..last, got {text!r}") from None
    if not 0 <= low <= high <= 1 or steps < 1:
        raise ValueError(f"depths must rise within [0, 1] in at least one step, got {text!r} in {steps}")
    return [low] if low == high or steps == 1 else [low + (high - low) * i / (steps - 1) for i in range(steps)]


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(lengths)
    app.command("eval")(evaluate)
    app.command()(weights)
