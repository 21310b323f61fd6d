"""The model's commands of hsa-tl."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from hsa_tl.bench.plot import plot_loss
from hsa_tl.files import write_atomic
from hsa_tl.model import chat as chats
from hsa_tl.model import checkpoint, data, documents, pretrained
from hsa_tl.model import convert as conversion
from hsa_tl.model import train as training
from hsa_tl.model.distributed import end_process
from hsa_tl.model.landmarks import add_landmarks
from hsa_tl.model.recipe import FOLDER, Recipe, explanation, load_recipe, recipe_names, text_recipe
from hsa_tl.terminal import (
    make_console,
    minutes_option,
    number,
    parse_length,
    pick_device,
    pick_dtype,
    plot_or_say,
    progress_bar,
    seed_option,
    show_table,
    threads_option,
)

console = make_console()


def prepare(
    sources: Annotated[
        Optional[list[Path]],
        typer.Argument(help="folders and files: text, JSON lines, Parquet; by default Python's standard library"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of train.bin and held_out.bin")] = Path("out/data"),
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="a Hugging Face tokenizer.json; by default one token a byte")
    ] = None,
    held_out: Annotated[float, number(low=1e-6, high=0.999999, help="share that training never sees")] = 0.1,
    field: Annotated[str, typer.Option(help="what holds the text in JSON lines and Parquet")] = "text",
    least: Annotated[str, typer.Option(help="tokens of a document, 32k say; shorter ones are left out")] = "1",
) -> None:
    """Text to memory-mapped token files, split into train and held-out.

    A file of text in a folder is whole in one of them; of one file alone the end is held out; rows are split one by
    one. Links are followed, and what this command wrote is never read.
    """
    with progress_bar(console) as bar:
        step = bar.add_task("tokenize", total=None)
        files = data.prepare(
            sources or None, out, data.make_tokenizer(tokenizer), held_out=held_out, field=field,
            least=parse_length(least), progress=lambda done, total: bar.update(step, completed=done, total=total),
        )  # fmt: skip
    rows = [(f.path.stem, f.sidecar.documents, len(f), f.sidecar.dtype) for f in files.values()]
    title = f"Token files in {out}, {files['train'].sidecar.tokenizer}"
    show_table(console, title, ("split", "documents", "tokens", "type"), rows, right=(1, 2))


@contextlib.contextmanager
def lost_ranks():
    """Of several ranks: a collective that failed since another rank is gone, in one line, and exit code 1."""
    try:
        yield
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, NotImplementedError):
            raise
        message = str(error).splitlines()[0][:200]
        typer.echo(f"error: rank {os.environ['RANK']} stops, another one failed or is gone: {message}", err=True)
        raise typer.Exit(1) from None


def _identity(text: Path, tokenizer: Path | None, run: Path) -> str:
    """JSON of what tells a text or folder of texts, and how it is read, from another; run: whose files do not count."""
    mine = run.resolve()
    files = documents.text_files([text], lambda path: data.is_output(path) or mine in path.resolve().parents)
    states = {str(x.path.resolve()): [(s := x.path.stat()).st_size, s.st_mtime_ns] for x in files}
    return json.dumps({"files": states, "tokenizer": None if tokenizer is None else str(tokenizer.resolve())})


def recipe_from(
    name: str | None, text: Path | None, run: Path | None, steps: int | None, length: str | None, batch: int | None,
    tokenizer: Path | None,
) -> tuple[Recipe, Path]:  # fmt: skip
    """The recipe of that name, or one for a token file or a text; and the folder of its run, run if that is given.

    A text is prepared in the run's folder. ValueError: a recipe and options that it has itself, or neither.
    """
    if (name is None) == (text is None):
        got = "neither" if name is None else "both"
        raise ValueError(f"train must have a recipe, which hsa-tl recipes lists, or --data, got {got}")
    if text is None:
        given = {"steps": steps, "length": length, "batch": batch, "tokenizer": tokenizer}
        if mine := [f"--{k}" for k, v in given.items() if v is not None]:
            raise ValueError(f"{mine[0]} must stand beside --data, got it beside a recipe, which has its own")
        recipe = load_recipe(name)
        return recipe, Path("out/train") / recipe.name if run is None else run
    path, named = text, Path(os.path.abspath(text))  # . and .. have no name
    title = named.parent.name if named.stem == "train" else named.stem
    run = Path("out/train") / title if run is None else run
    if not data.sidecar_path(named).is_file():
        path = run / "data" / "train.bin"
        made_of, source = path.parent / "source.json", _identity(text, tokenizer, run)
        if not path.exists():
            data.prepare([text], path.parent, data.make_tokenizer(tokenizer))
            write_atomic(made_of, source)
        elif not made_of.exists() or made_of.read_text() != source:
            raise ValueError(
                f"--data must be what {path} was made of, got another text, state of it or tokenizer: give another "
                f"--out, or remove {path.parent} to prepare it anew"
            )
    recipe = text_recipe(
        title, path, steps=steps or 1000, length=parse_length(length or "1k"), batch=batch or 8,
        vocab_size=data.read_sidecar(path).vocab_size, tokenizer=tokenizer,
    )  # fmt: skip
    return recipe, run


def train(
    recipe: Annotated[
        Optional[str], typer.Argument(help="one that hsa-tl recipes lists, or a YAML file; none with --data")
    ] = None,
    text: Annotated[
        Optional[Path], typer.Option("--data", help="instead of a recipe: a token file, or text as prepare takes it")
    ] = None,
    steps: Annotated[Optional[int], number(low=1, high=10**9, help="with --data; by default 1000")] = None,
    length: Annotated[Optional[str], typer.Option(help="tokens of a sample, with --data; by default 1k")] = None,
    batch: Annotated[
        Optional[int], number(low=1, high=1 << 16, help="samples of a step, with --data; by default 8")
    ] = None,
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="with --data, a Hugging Face tokenizer.json; by default one token a byte")
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="folder of the run; by default out/train/RECIPE")] = None,
    seed: Annotated[Optional[int], seed_option("instead of the recipe's")] = None,
    start: Annotated[Optional[Path], typer.Option(help="a run whose last weights are taken")] = None,
    attention: Annotated[Optional[str], typer.Option(help="hsa, or a baseline: full, swa, linear, nsa or moba")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")] = None,
    context_parallel: Annotated[int, number(low=1, high=4096, help="ranks that share each sequence's tokens")] = 1,
    minutes: Annotated[
        Optional[float], minutes_option("ends with a checkpoint before, but finishes a step; the next call goes on")
    ] = None,
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Trains a recipe, or a small model on a text. Resumes from the newest whole checkpoint in the folder, to the bit.

    Prints loss, validation loss and tokens per second at each checkpoint, and draws loss.png. Other settings on
    an old run are refused: name another folder, and with --start the run whose weights it begins with.
    On many ranks: torchrun --nproc-per-node 4 -m -- hsa_tl.cli train RECIPE. Parameters are sharded over all ranks. A
    rank that dies ends the run; any number of ranks goes on with it.
    """
    begin = time.perf_counter()
    writes = os.environ.get("RANK", "0") == "0"
    console = make_console() if writes else Console(quiet=True)
    with lost_ranks():
        device = pick_device(device)
        chosen, run = recipe_from(recipe, text, out, steps, length, batch, tokenizer)
        changes = {"seed": seed, "start": None if start is None else str(start)}
        if attention is not None:
            changes |= {"name": f"{chosen.name}-{attention}", "model": chosen.model | {"attention": attention}}
            changes["reading"] = {}
            run = run.with_name(changes["name"]) if out is None else run
        chosen = dataclasses.replace(chosen, **{k: v for k, v in changes.items() if v is not None})
        torch.set_num_threads(threads)
        done: list[training.Step] = []
        with progress_bar(console) as bar:
            task = bar.add_task("", total=chosen.steps)

            def on_step(step: training.Step) -> None:
                done.append(step)
                line = f"stage {step.stage + 1}/{len(chosen.stages)} loss {step.loss:.3f}"
                bar.update(task, completed=step.step + 1, description=line)
                if step.validation_loss is not None:
                    at = f"step {step.step + 1}: validation loss {step.validation_loss:.3f}, training {step.loss:.3f}"
                    console.print(f"{at}, {step.tokens_per_second:.0f} tokens/s", markup=False, highlight=False)

            with warnings.catch_warnings(record=True) as caught:
                for kind in (checkpoint.TornCheckpoint, training.NoValidation):
                    warnings.simplefilter("always", kind)
                seconds = math.inf if minutes is None else 60 * minutes - (time.perf_counter() - begin)
                options = {"device": device, "context_parallel": context_parallel, "seconds": seconds}
                try:
                    training.train(chosen, run, on_step=on_step, **options)
                finally:
                    for message in dict.fromkeys(str(warning.message) for warning in caught):
                        console.print(message, markup=False, highlight=False)
    if writes:
        _show_run(console, chosen, run, done)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_process()


def _show_run(console: Console, recipe: Recipe, run: Path, done: list[training.Step]) -> None:
    """Prints a finished run's log and draws it."""
    lines = [json.loads(x) for x in (run / training.LOG).read_text().splitlines()]
    rows = [
        (x["step"] + 1, x["stage"] + 1, f"{x['loss']:.4f}",
         f"{y:.4f}" if (y := x.get("validation_loss")) is not None else "", f"{x['lr']:.2e}",
         f"{x['tokens'] / x['seconds']:.0f}")
        for x in lines[:: -max(1, len(lines) // 10)][::-1]
    ]  # fmt: skip
    names = ("step", "stage", "loss", "validation", "lr", "tokens/s")
    show_table(console, f"{recipe.name}, {recipe.steps} steps", names, rows, right=tuple(range(6)))
    picture = plot_or_say(console, plot_loss, lines, f"{recipe.name}, seed {recipe.seed}", run / "loss.png")
    if not done:
        console.print(f"nothing was left to do: all {recipe.steps} steps are in {run}", soft_wrap=True)
    elif (last := done[-1].step + 1) < recipe.steps:
        console.print(f"out of time after {last} of {recipe.steps} steps: the same call goes on", soft_wrap=True)
    console.print("wrote " + ", ".join(map(str, [run, *picture])), soft_wrap=True)


RUN = "folder of a run, or the name of weights that ship with the package: needle-tiny"
File = Annotated[Optional[Path], typer.Option(help="a text that is read first")]
Memory = Annotated[
    Optional[Path], typer.Option(help="keeps what was read of --file: written the first time, later loaded without it")
]
Temperature = Annotated[float, number(low=0, high=100, help="0 takes the likeliest token")]
TopP = Annotated[float, number(low=1e-6, high=1, help="draws from the likeliest that reach this together")]
Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")]
Dtype = Annotated[str, typer.Option(help="of the weights: float32, or on a GPU bfloat16 or float16")]


def _open(run: str, file: Path | None, memory: Path | None, device: str | None, dtype: str, threads: int):
    """The model, and what `chats.read` gives; a long text shows how far it is read, beside what the command prints."""
    torch.set_num_threads(threads)
    model = pretrained.load(run, pick_device(device), pick_dtype(dtype))
    with progress_bar(Console(stderr=True)) as bar:
        step = bar.add_task("tokens read", total=None)
        text = None if file is None else file.read_bytes()
        return model, chats.read(model, text, memory, progress=lambda done: bar.update(step, completed=done))


def generate(
    run: Annotated[str, typer.Argument(help=RUN)],
    prompt: Annotated[str, typer.Argument(help="what the model writes on")],
    file: File = None,
    memory: Memory = None,
    max_new_tokens: Annotated[int, number(low=0, high=10**9, help="at most; an end token ends it earlier")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[Optional[int], seed_option("of drawing; by default another each time")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Prints what a trained model writes on, token by token."""
    model, cache = _open(run, file, memory, device, dtype, threads)
    tokenizer = model.tokenizer
    ids = [[*(tokenizer.begin if cache is None else ()), *tokenizer.encode(prompt)]]
    if not ids[0]:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    options = {"eos_token": tokenizer.end, "cache": cache}
    for piece in chats.pieces(model, model.stream(ids, max_new_tokens, temperature, top_p, seed, **options)):
        typer.echo(piece, nl=False)
    typer.echo()


def chat(
    run: Annotated[str, typer.Argument(help=RUN)],
    file: File = None,
    memory: Memory = None,
    max_new_tokens: Annotated[int, number(low=1, high=10**9, help="of an answer at most")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[Optional[int], seed_option("of drawing; by default another each time")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Answers line by line what stands on the standard input, in one conversation. Ctrl-C ends an answer, Ctrl-D all.

    A converted model reads its tokenizer's chat template, another one plain lines.
    """
    model, cache = _open(run, file, memory, device, dtype, threads)
    talk = chats.Chat(model, chats.template(run), cache)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        with training.signals(signal.SIGINT) as came:  # it comes between tokens: within one it would tear the cache
            for piece in talk.ask(question, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
                typer.echo(piece, nl=False)
                if came:
                    break
        typer.echo()


def convert(
    source: Annotated[
        Path, typer.Argument(help="a folder of transformers or a GGUF file: Llama, Qwen2, Qwen3, Mistral")
    ],
    run: Annotated[Path, typer.Argument(help="a new folder, for generate and export")],
    window: Annotated[int, number(low=1, high=1 << 30, help="tokens that every layer sees as before")] = 512,
    sinks: Annotated[int, number(low=0, high=1 << 20, help="first tokens that every token sees")] = 4,
    chunk_size: Annotated[int, number(low=16, high=128, help="tokens of a chunk: 16, 32, 64 or 128")] = 64,
    topk: Annotated[str, typer.Option(help="chunks behind the window that a token sees: a number, or all")] = "16",
    selection: Annotated[str, typer.Option(help="mass: of the greatest attention, exact; mean: by mean key")] = "mass",
    far_positions: Annotated[
        int, number(low=0, high=1 << 30, help="that all keys behind the window share, 0 for none")
    ] = 512,
    recency: Annotated[
        int | None, number(low=0, high=1 << 30, help="chunks within which near ones are preferred, 0 for no preference")
    ] = None,
    hsa_layers: Annotated[int, number(low=0, high=1 << 20, help="that choose chunks, evenly spread; 0 for all")] = 0,
) -> None:
    """Gives a pretrained model long memory, without training: a run whose layers see a window and chosen chunks.

    --recency is by default as many chunks as the source was trained to.
    """
    if topk != "all" and not topk.isdecimal():
        raise ValueError(f"topk must be a number of chunks from 0 on or all, got {topk!r}")
    config = conversion.convert(
        source, run, window=window, sinks=sinks, chunk_size=chunk_size,
        topk=topk if topk == "all" else int(topk), selection=selection, far_positions=far_positions,
        recency=recency, hsa_layers=hsa_layers,
    )  # fmt: skip
    chunks = f"{topk} chunks" if topk == "all" or int(topk) else "no chunks"
    where = f", chunks in {hsa_layers} of them" if hsa_layers else ""
    seen = f"{sinks} first tokens, a window of {window} and {chunks} of {chunk_size} by {selection}{where}"
    console.print(f"wrote {run}: {config.layers} layers that see {seen}", soft_wrap=True, markup=False, highlight=False)


def landmarks(
    run: Annotated[Path, typer.Argument(help="a run of hsa-tl convert; its checkpoint is replaced")],
    text: Annotated[Path, typer.Argument(help="an ordinary UTF-8 text")],
    anchors: Annotated[int, number(low=1, high=1 << 12, help="of each key/value head: numbers kept of a chunk")] = 64,
    contexts: Annotated[int, number(low=1, high=1 << 12, help="pieces of the text to read, and one to judge")] = 2,
    length: Annotated[str, typer.Option(help="tokens of a piece")] = "4k",
    tolerance: Annotated[float, number(low=0, high=1, help="a head that may miss more keeps the exact mass")] = 0.4,
    seed: Annotated[int, seed_option("of pieces and anchors")] = 0,
    threads: Annotated[int, threads_option()] = 2,
) -> None:
    """Lets a converted run choose chunks without reading their keys, and prints what this choice misses."""
    torch.set_num_threads(threads)
    tokens = parse_length(length)
    options = {"anchors": anchors, "contexts": contexts, "length": tokens, "tolerance": tolerance, "seed": seed}
    config, found = add_landmarks(run, text.read_bytes(), **options)
    means = ([f"{100 * sum(heads) / len(heads):.1f}" for heads in layers] for layers in found.values())
    rows = [(i + 1, *each) for i, each in enumerate(zip(*means, strict=True)) if config.chooses(i)]
    title = "Share of the attention to all chunks that the chosen ones hold, %"
    show_table(console, title, ("layer", *found), rows, right=(0, 1, 2, 3))
    every, exact = len(rows) * config.kv_heads, len(config.exact_heads)
    chosen = f"{every - exact} of {every} key/value heads choose by {anchors} anchors, {exact} by the exact mass"
    console.print(f"wrote {run}: {chosen}", soft_wrap=True, markup=False, highlight=False)


def export(
    run: Annotated[str, typer.Argument(help=RUN)],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16 or float16")] = "float32",
) -> None:
    """Writes a trained model as a folder that transformers reads: config, safetensors, tokenizer, chat template."""
    pretrained.export(run, folder, pick_dtype(dtype))
    console.print(f"wrote {folder}", soft_wrap=True)


def recipes(
    name: Annotated[Optional[str], typer.Argument(help="prints this one's file; by default lists them all")] = None,
) -> None:
    """The recipes that ship: what each trains, and on what. A YAML file may be `like:` one and give what differs."""
    if name is not None:
        if name not in recipe_names():
            raise ValueError(f"name must be one of {', '.join(recipe_names())}, got {name!r}")
        typer.echo((FOLDER / f"{name}.yaml").read_text(), nl=False)
        return
    rows = []
    for each in recipe_names():
        recipe = load_recipe(each)
        tokens = sum(s.steps * s.tokens for s in recipe.stages)
        what = (recipe.preset, recipe.steps, f"{tokens / 1e6:.0f}M", max(s.length for s in recipe.stages))
        rows.append((each, *what, explanation(each)))
    names = ("recipe", "preset", "steps", "tokens", "longest", "what")
    show_table(console, f"Recipes in {FOLDER}", names, rows, right=(2, 3, 4))
    console.print("hsa-tl recipes NAME prints one, hsa-tl train NAME trains it")


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    for command in (prepare, train, generate, chat, convert, landmarks, export, recipes):
        app.command()(command)
