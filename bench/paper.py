"""The paper's tables, each by one command: `tiny` for about an hour of a CPU core, `small` for one GPU, never run yet.

RUNS are shipped recipes with changes, each from the weights of another; a table is some of them and what they are
asked. At `tiny` a recipe is divided: context, windows and retrieved tokens by SCALE, and steps end at STEPS.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from hsa_tl.bench import record, ruler
from hsa_tl.bench.compare import grouped, length_label
from hsa_tl.bench.contenders import THREE_LAYERS
from hsa_tl.bench.lengths import rate
from hsa_tl.bench.plot_eval import plot_lengths, plot_perplexity
from hsa_tl.bench.suite import one_of
from hsa_tl.model import load, needles
from hsa_tl.model.data import tokens_of
from hsa_tl.model.longcontext import ONE_SHOT, LongReader
from hsa_tl.model.model import Model
from hsa_tl.model.recipe import Recipe, Stage, load_recipe
from hsa_tl.model.train import Step, train
from hsa_tl.terminal import plot_or_say, progress_bar, show_table

SIZES = ("tiny", "small")
K = 1024  # tokens
SCALE = 64
# What `tiny` divides of a model's changes; chunks have a quarter of the tokens.
DIVIDED = {"window": SCALE, "hsa_window": SCALE, "topk": SCALE // 4, "recency": SCALE // 4, "expert_dim": 6}
STEPS, TOKENS = 250, 1 << 14  # of a stage at `tiny`, at most, and of its steps
WINDOWS = 128  # places of held-out text


@dataclass(frozen=True)
class Run:
    """start: the run whose weights it begins with, and whose model it has where its recipe says nothing else. model:
    changes of the recipe's. stages: of every stage, instead of the recipe's changes there."""

    label: str
    recipe: str
    start: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] | None = None


NARROW = {"window": 512}
FULL = {"attention": "full", "layers": 9, "mlp_dim": 1704}  # what contenders.deeper says of `small`
RUNS = {
    "nsa-rope": Run("NSA, RoPE", "needle-{size}", None, {"attention": "nsa", "rope": ["swa", "nsa"]}, {}),
    "nsa": Run("NSA, NoPE", "needle-{size}", None, {"attention": "nsa"}, {}),
    "base-first": Run("BaseLM, warm-up", "warmup-short-window", None, FULL),
    "base": Run("BaseLM, full attention", "pretrain", "base-first"),
    "copy-first": Run("self-copy warm-up", "warmup-self-copy"),
    "copy": Run("window 4K, self-copy warm-up", "pretrain", "copy-first"),
    "short-first": Run("short-window warm-up", "warmup-short-window"),
    "short": Run("window 4K, short-window warm-up", "pretrain", "short-first"),
    "short-mid": Run("window 4K, mid-trained", "mid-train", "short"),
    "narrow": Run("window 512", "pretrain", "short-first", NARROW),
    "narrow-mid": Run("window 512, mid-trained", "mid-train", "narrow", NARROW),
    "mixture": Run("window 4K, mixture", "mixture"),
    "mixture-mid": Run("window 4K, mixture, mid-trained", "mid-train", "mixture"),
    "wide-first": Run("window 4K, warm-up", "warmup-short-window", stages={"topk": "all"}),
    "wide": Run("window 4K from scratch", "pretrain", "wide-first"),
}


@dataclass(frozen=True)
class Table:
    """What its runs are asked: bits per token of held-out text, and needles, by length at `small`."""

    runs: tuple[str, ...]
    needles: tuple[int, ...]
    bits: tuple[int, ...] = (4 * K, 8 * K, 16 * K)
    tasks: tuple[str, ...] = ("s-niah",)


FAR, BOTH = (4 * K, 16 * K, 64 * K, 256 * K, K * K), ("s-niah", "mq-niah")
TABLES = {
    "table-1": Table(("nsa-rope", "nsa"), (16 * K, 32 * K, 64 * K, 128 * K, 256 * K), (), BOTH),
    "table-2": Table(("base", "copy", "short"), (4 * K, 8 * K, 64 * K, K * K)),
    "figure-4": Table(("short", "short-mid", "narrow", "narrow-mid", "mixture", "mixture-mid"), FAR, tasks=BOTH),
    "seesaw": Table(("short", "wide"), FAR),
}


def tiny(recipe: Recipe) -> Recipe:
    """A recipe of `small` for the preset `tiny`; one of that preset has its steps cut only.

    So short a training learns nothing from RULER in 1 % of the samples: instead half of them are those of the recipe
    `needle-tiny`, and training from nothing begins with that recipe's shorter stages.
    """
    by, curriculum = 1 if recipe.preset == "tiny" else SCALE, load_recipe("needle-tiny").stages

    def divided(model: dict[str, Any]) -> dict[str, Any]:
        small = {k: v // DIVIDED[k] if by > 1 and k in DIVIDED and v != "all" else v for k, v in model.items()}
        small |= THREE_LAYERS if model.get("attention") == "full" else {}
        return small | {"impl": "dense"} if small.get("topk") == "all" else small

    def data(spec: dict[str, Any]) -> dict[str, Any]:
        if "path" not in spec:
            return spec
        text = {k: v for k, v in spec.items() if k != "needles"}
        return {"kind": "mix", "sources": [text, curriculum[-1].data]}

    def stage(s: Stage) -> Stage:
        batch = min(s.tokens, TOKENS) // s.length
        return replace(s, steps=min(s.steps, STEPS), batch=batch, accumulate=1, model=divided(s.model))

    stages = [stage(replace(s, length=s.length // by, batch=s.batch * by, data=data(s.data))) for s in recipe.stages]
    if by > 1 and recipe.start is None:
        stages = [stage(replace(s, model=recipe.stages[0].model)) for s in curriculum[:-1]] + stages
    changes = {"preset": "tiny", "lr": 1.5e-3, "warmup": 50, "dtype": "float32", "model": divided(recipe.model)}
    return replace(recipe, stages=tuple(stages), **changes)


def recipe_of(name: str, size: str) -> Recipe:
    """The recipe of a run of RUNS, with the changes, at that size; its text and its start are the shipped recipe's."""
    run = RUNS[name]
    recipe = load_recipe(run.recipe.format(size=size))
    stages = recipe.stages if run.stages is None else tuple(replace(s, model=run.stages) for s in recipe.stages)
    recipe = replace(recipe, name=name, model=recipe.model | run.model, stages=stages)
    recipe = tiny(recipe) if size == "tiny" else recipe
    before = {} if run.start is None else recipe_of(run.start, size).model
    return replace(recipe, model=before | recipe.model)


def plan(name: str, size: str, seed: int, runs: Path, text: Path, tokenizer: Path | None) -> Recipe:
    """The recipe of a run on the text prepared in a folder, from its start's folder of runs."""

    def placed(spec: dict[str, Any]) -> dict[str, Any]:
        if "sources" in spec:
            return spec | {"sources": list(map(placed, spec["sources"]))}
        if "path" not in spec:
            return spec
        found = spec | {"path": str(text / Path(spec["path"]).name)}
        return found if tokenizer is None else found | {"tokenizer": str(tokenizer)}

    recipe, start = recipe_of(name, size), RUNS[name].start
    stages = tuple(replace(s, data=placed(s.data)) for s in recipe.stages)
    folder = None if start is None else str(runs / f"{start}-{seed}")
    return replace(recipe, seed=seed, stages=stages, start=folder)


def chain(name: str) -> list[str]:
    """The run's name behind those it starts from."""
    start = RUNS[name].start
    return [name] if start is None else [*chain(start), name]


def ask(model: Model, table: Table, size: str, text: Path, samples: int) -> Iterator:
    """Rows of `hsa_tl.bench.ruler` of all that the table asks."""
    by = SCALE if size == "tiny" else 1
    reader, asked = LongReader(model), [T // by for T in table.needles]
    if table.bits:
        file, lengths = tokens_of(text / "held_out.bin", model.tokenizer), [T // by for T in table.bits]
        yield from ruler.run_perplexity(reader, file, lengths, windows=WINDOWS)
    if model.config.attention == "full":
        asked = [T for T in asked if T <= ONE_SHOT]
    vocabulary = "needles" if model.config.vocab_size == needles.VOCAB else "words"
    yield from ruler.run_ruler(reader, vocabulary, list(table.tasks), asked, [None], samples=samples)


def show(console: Console, table: str, size: str, rows: list[dict], out: Path) -> list[Path]:
    """Prints bits and needles by length, and draws both; the plots' files."""
    mine = [r | {"model": RUNS[r["model"]].label, "train_length": r["trained_length"]} for r in rows]
    bits, asked = ([r for r in mine if name in r] for name in ("bits_per_token", "accuracy"))
    lengths, lines = sorted({r["length"] for r in mine}), []
    for (model, seed, what), own in grouped(mine, lambda r: (r["model"], r["seed"], r.get("task", "bits"))).items():
        at = {
            r["length"]: f"{r['bits_per_token']:.3f}" if what == "bits" else rate(r["accuracy"], r["answers"])
            for r in own
        }
        size_M = f"{own[0]['parameters'] / 1e6:.2f}M"
        lines.append((model, size_M, seed, what, *(at.get(T, "") for T in lengths)))
    title = f"{table} at {size}, bits per token and needles right in % with the 95 % interval, by length"
    title += f"; windows and lengths are the paper's over {SCALE}" if size == "tiny" else ""
    names = ("model", "parameters", "seed", "asked", *map(length_label, lengths))
    show_table(console, title, names, lines, right=(1, *range(4, len(names))))
    written = plot_or_say(console, plot_perplexity, bits, out / f"{table}-{size}-text.png") if bits else []
    labels = {r["model"]: r["model"] for r in asked}
    chance = ruler.chance("needles" if size == "tiny" or not bits else "words")
    points, picture = [SimpleNamespace(**r) for r in asked], out / f"{table}-{size}-needles.png"
    return [*written, *plot_or_say(console, plot_lengths, points, chance, picture, labels)]


def run_table(
    console: Console, name: str, size: str, seeds: int, *, out: Path, runs: Path, text: Path,
    tokenizer: Path | None = None, samples: int = 100, device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Trains a table's runs, each behind what it starts from, and asks each; prints, draws and gives its rows.

    out/NAME-SIZE.json grows run by run, and a run that it holds with as many samples is not asked again; runs/SIZE
    resumes, for all tables.
    """
    table, runs = TABLES[one_of("table", name, TABLES)], runs / one_of("size", size, SIZES)
    path = out / f"{name}-{size}.json"
    rows = record.read_json(path)
    with progress_bar(console) as bar:
        step = bar.add_task("train", total=None)
        for seed in range(seeds):
            for last in table.runs:
                mine = [r for r in rows if (r["model"], r["seed"]) == (last, seed)]
                if mine and all(r.get("samples", samples) >= samples for r in mine):
                    continue
                plans = [plan(x, size, seed, runs, text, tokenizer) for x in chain(last)]
                for recipe in plans:

                    def on_step(done: Step, title: str = f"{recipe.name} {seed}", total: int = recipe.steps) -> None:
                        bar.update(step, completed=done.step + 1, total=total, description=f"{title}: {done.loss:.3f}")

                    train(recipe, folder := runs / f"{recipe.name}-{seed}", device=device, on_step=on_step)
                model = load(folder, device)
                about = ruler.Run.of(folder, model)
                about = replace(about, trained_tokens=sum(s.steps * s.tokens for p in plans for s in p.stages))
                rows = ruler.write_rows([*ask(model, table, size, text, samples)], about, device, path)
    wanted = [r for r in rows if r["model"] in table.runs and r["seed"] < seeds]
    wanted.sort(key=lambda r: (table.runs.index(r["model"]), r["seed"]))
    console.print("wrote " + ", ".join(map(str, [path, *show(console, name, size, wanted, out)])))
    return wanted
