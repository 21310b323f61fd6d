"""The training loop: a recipe's stages, resumable to the bit, on one device or on the ranks that torchrun started.

    model = train(load_recipe("needle-tiny"), Path("out/needle-tiny"))

A step reads the samples that its number names, so that a resumed run is the run that was never stopped.
"""

import contextlib
import functools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from hsa_tl import workers
from hsa_tl.files import InUse, locked, write_atomic
from hsa_tl.model import checkpoint
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.data import FileTokenizer
from hsa_tl.model.distributed import Ranks
from hsa_tl.model.mlp import MoE
from hsa_tl.model.model import Model
from hsa_tl.model.optimizers import make_optimizers
from hsa_tl.model.pretrained import load
from hsa_tl.model.recipe import Recipe, Stage, recipe_of
from hsa_tl.model.sources import IGNORE, Batch, Source, make_source, tokenizer_of, validation_source
from hsa_tl.validation import require

LOG, LOCK = "log.jsonl", ".lock"
PART_TOKENS = 1024  # of a batch on a CPU, which a worker trains on at a time, alone; the same for any number of them

VALIDATION_BATCHES = 4


class NoValidation(UserWarning):
    """There is held-out data, which cannot give samples."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the training with a checkpoint. number: the signal's."""

    def __init__(self, number: int, step: int, recipe: Recipe, run: Path):
        name = signal.Signals(number).name
        super().__init__(
            f"{name} ended training with a checkpoint: {step} of {recipe.steps} steps are in {run}, and the same call "
            "does the others"
        )
        self.number = number


@dataclass(frozen=True)
class Step:
    """What a step did; one line of log.jsonl."""

    step: int
    stage: int
    loss: float  # mean over the labels, in nats
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    validation_loss: float | None = None  # behind the step, where a checkpoint was due

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def reconfigure(model: Model, config: ModelConfig) -> None:
    """Changes the model's configuration in place; parameters stay as they are. ValueError: they would not fit, or
    belong to other layers."""
    with torch.device("meta"):
        other, before = Model(config), Model(model.config)  # FSDP2 puts other classes into the model itself
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, other)]
    require(shapes[0] == shapes[1], "config", "leave the parameters' shapes alone", "another model's")
    kinds = [{k: type(v) for k, v in m.named_modules()} for m in (before, other)]
    require(kinds[0] == kinds[1], "config", "leave the layers' kinds alone", f"attention {config.attention!r}")
    for name, module in other.named_modules():
        kept = model.get_submodule(name)
        for field, value in vars(module).items():
            if not field.startswith("_") and field != "training" and not isinstance(value, torch.Tensor):
                setattr(kept, field, value)


def _spread(function):
    """Makes a function of a module, .., ranks use the CPU's workers where it is alone there."""

    @functools.wraps(function)
    def run(*args):
        return workers.call(function, *args) if args[-1].alone else function(*args)

    return run


def _parts(batches: list[Batch], module: nn.Module, ranks: Ranks) -> list[Batch]:
    """The batches, cut into what a worker trains on at a time; a mixture of experts counts what it sees, and a
    sequence's distractors are of its own part."""
    if not ranks.alone or any(isinstance(m, MoE) for m in module.modules()):
        return batches
    rows = max(PART_TOKENS // batches[0].input_ids.shape[1], module.config.distractors + 1)
    cut = [(tensor.tensor_split(max(1, len(tensor) // rows)) for tensor in b) for b in batches]
    return [Batch(*x) for b in cut for x in zip(*b, strict=True)]


def _labels(*batches: Batch) -> int:
    return sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in batches)


def _loss(module: nn.Module, part: Batch, recipe: Recipe, ranks: Ranks) -> torch.Tensor:
    with torch.autocast(ranks.device, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        return module(part.input_ids.to(ranks.device), labels=part.labels.to(ranks.device), logits_to_keep=0).loss


@_spread
def train_step(
    module: nn.Module, optimizers, recipe: Recipe, batches: list[Batch], lr: float, ranks: Ranks
) -> tuple[float, float]:
    """Gradients of the batches taken together, over all ranks, one update; loss and gradient norm."""
    total = max(1.0, *ranks.sum(_labels(*batches)))
    parameters = [p for p in module.parameters() if p.requires_grad]
    losses = []

    def differentiate(part: Batch):
        share = _labels(part) / total
        with torch.enable_grad():
            loss = _loss(module, part, recipe, ranks)
            scaled = loss * (share * ranks.data)  # gradients are averaged over the ranks
        if ranks.world > 1:
            scaled.backward()
            return loss.item() * share, ()
        return loss.item() * share, torch.autograd.grad(scaled, parameters, allow_unused=True)

    def add(result):
        loss, gradients = result
        losses.append(loss)
        for parameter, gradient in zip(parameters, gradients):  # noqa: B905
            if parameter.grad is None:
                parameter.grad = None if gradient is None else gradient.clone()  # one tensor may be of two parameters
            elif gradient is not None:
                parameter.grad += gradient

    workers.each(_parts(batches, module, ranks), differentiate, add)
    (loss_sum,) = ranks.sum(sum(losses))
    norm = nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor's
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient must be finite, got norm {norm.item()} and loss {loss_sum}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, norm.item()


@_spread
def validate(module: nn.Module, recipe: Recipe, batches: list[Batch], ranks: Ranks) -> float:
    """The loss over the labels of the batches, over all ranks; changes nothing."""
    total = max(1.0, *ranks.sum(_labels(*batches)))
    losses = []

    def measure(part: Batch):
        with torch.no_grad():
            return _loss(module, part, recipe, ranks).item() * (_labels(part) / total)

    module.eval()
    try:
        workers.each(_parts(batches, module, ranks), measure, losses.append)
    finally:
        module.train()
        if ranks.world > 1:
            module.reshard()  # no backward did
    return ranks.sum(sum(losses))[0]


def _start(recipe: Recipe, device: str) -> Model:
    torch.manual_seed(recipe.seed)
    model = Model(recipe.config(recipe.stages[0])).to(device)
    if recipe.start is not None:
        found = checkpoint.latest(Path(recipe.start))
        require(found is not None, "start", "be a folder with a checkpoint", recipe.start)
        checkpoint.load(found, model)
    return model


@contextlib.contextmanager
def signals(*numbers: int) -> Iterator[list[int]]:
    """Those of these signals as they come; the second of a kind ends the process as ever.

    Only in the main thread, which alone gets signals, and only where nobody else handles them.
    """
    came: list[int] = []
    old = {}

    def note(number: int, _frame) -> None:
        came.append(number)
        signal.signal(number, old[number])

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                old[number] = signal.getsignal(number)
                signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    recipe: Recipe, run: Path, *, device: str = "cpu", context_parallel: int = 1, seconds: float = math.inf,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Model:  # fmt: skip
    """Trains to the recipe's end in the folder run, from its newest checkpoint if there is one.

    Under torchrun every rank calls it: `context_parallel` of them share each sequence's tokens, the others each
    batch's sequences, and all of them the parameters (FSDP2). Another number of ranks may resume the run.

    Writes checkpoints, log.jsonl and, where tensorboard is installed, its events. on_step sees every step. At each
    checkpoint it validates, on what `sources.validation_source` has. Where another step would end behind `seconds`, it
    ends with a checkpoint, for another call to go on from; so it does on SIGINT (Ctrl-C) and SIGTERM.
    ValueError: run holds checkpoints of another recipe; a stage, `reading` or start that cannot be. InUse, a
    ValueError: another process trains in run. FloatingPointError: a gradient that is not finite. Interrupted, a
    KeyboardInterrupt: a signal came, and the checkpoint is written.
    """
    require(recipe.source is None, "source", "be None in training, where start names a run", recipe.source)
    end = time.perf_counter() + seconds
    ranks = Ranks(device, context_parallel)
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            try:
                stack.enter_context(locked(run / LOCK, wait=False))
            except InUse:
                raise InUse(f"run must be a folder that no other process trains in, got {run}") from None
        ranks.sum(0.0)  # before another rank reads the run
        came = stack.enter_context(signals(signal.SIGINT, signal.SIGTERM))
        return _train(recipe, run, ranks, end, on_step, came)


def _train(
    recipe: Recipe, run: Path, ranks: Ranks, end: float, on_step: Callable[[Step], None], signals: list[int]
) -> Model:
    device, found = ranks.device, checkpoint.latest(run)
    model = _start(recipe if found is None else replace(recipe, start=None), device)
    module = ranks.shard(model)
    optimizers = make_optimizers(model, recipe)
    values, first = json.loads(json.dumps(asdict(recipe))), 0
    if found is not None:
        theirs = json.loads(json.dumps(asdict(recipe_of(found.recipe))))  # defaults of fields that are newer
        if theirs != values:
            differ = sorted(k for k in values if theirs[k] != values[k])
            raise ValueError(
                f"run must hold checkpoints of this recipe, got others in {run}: {', '.join(differ)}; to train its "
                f"weights on with these settings, take another folder and start: {run}"
            )
        checkpoint.load(found, model, optimizers)
        torch.set_rng_state(found.rng["cpu"])
        if "cuda" in found.rng:
            torch.cuda.set_rng_state(found.rng["cuda"])
        first = found.step
    sources = _sources(recipe, first, ranks)
    writes, writer = ranks.rank == 0, None
    if writes:
        kept = None if found is None else run  # without a checkpoint, what stands there may be another recipe's
        if isinstance(tokenizer := tokenizer_of(recipe.stages[-1].data, kept), FileTokenizer):
            tokenizer.keep(run)
        # Lines of steps that the resumed run will do again go.
        lines = (run / LOG).read_text().splitlines(keepends=True) if (run / LOG).exists() else []
        write_atomic(run / LOG, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] < first))
    with contextlib.suppress(ImportError):  # where the tensorboard package is installed
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run) if writes else None
    held_out: list[Batch] = []
    stage_number, stopped, saving_s = None, False, 0.0
    with (run / LOG if writes else Path(os.devnull)).open("a", buffering=1) as log:
        for step in range(first, recipe.steps):
            begin = time.perf_counter()
            number, within = recipe.stage_at(step)
            stage = recipe.stages[number]
            if number != stage_number:
                stage_number, held_out = number, _held_out(recipe, stage, ranks)
                reconfigure(model, recipe.config(stage))
            at, (mine, size) = within * stage.batch * stage.accumulate, ranks.own(stage.batch)
            batches = [sources[number].batch(at + i * stage.batch + mine, size) for i in range(stage.accumulate)]
            lr = recipe.lr_at(step)
            loss, norm = train_step(module, optimizers, recipe, batches, lr, ranks)
            model.update_balance()
            spent = time.perf_counter() - begin
            first = step + 1
            due = first % recipe.checkpoint_every == 0 or first == recipe.steps
            validation = validate(module, recipe, held_out, ranks) if due and held_out else None
            done = Step(step, number, loss, lr, norm, stage.tokens, spent, validation)
            if step % recipe.log_every == 0 or first == recipe.steps or validation is not None:
                log.write(json.dumps(vars(done)) + "\n")
                for name in ("loss", "lr", "grad_norm", "tokens_per_second", "validation_loss") if writer else ():
                    if (value := getattr(done, name)) is not None:
                        writer.add_scalar(name, value, step)
            late = time.perf_counter() + spent + saving_s > end
            late, stopped = (x > 0 for x in ranks.sum(float(late), float(bool(signals))))  # of any rank
            if due or late or stopped:
                saved = time.perf_counter()
                rng = {"cpu": torch.get_rng_state()}
                if device == "cuda":
                    rng["cuda"] = torch.cuda.get_rng_state()
                checkpoint.save(run, first, values, model, optimizers, rng, recipe.keep)
                saving_s = time.perf_counter() - saved
            on_step(done)
            if late or stopped:
                break
    if writer:
        writer.close()
    ranks.close()
    if stopped or signals:
        raise Interrupted(signals[0] if signals else signal.SIGTERM, first, recipe, run)
    return load(run, device)


def _held_out(recipe: Recipe, stage: Stage, ranks: Ranks) -> list[Batch]:
    """This rank's batches of a stage's validation, none where there is nothing to validate on."""
    mine, size = ranks.own(stage.batch)
    try:
        source = validation_source(stage.data, stage.length, recipe.seed)
        return [] if source is None else [source.batch(i * stage.batch + mine, size) for i in range(VALIDATION_BATCHES)]
    except (ValueError, OSError) as error:
        warnings.warn(f"no validation in steps of {stage.length} tokens: {error}", NoValidation, stacklevel=2)
        return []


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Says which part of a recipe an error is of."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{part}: {error}") from error


def _sources(recipe: Recipe, first: int, ranks: Ranks) -> dict[int, Source]:
    """By number, of the stages that a step from `first` on belongs to.

    ValueError: one of these, or `reading`, is none of this model, these ranks and the files there are. It would be
    known after the stages before it, which take hours.
    """
    with torch.device("meta"):
        model = Model(recipe.config(recipe.stages[0]))
    sources = {}
    done = recipe.stage_at(first)[0] if first < recipe.steps else len(recipe.stages)
    for number, stage in list(enumerate(recipe.stages))[done:]:
        name = f"of stage {number + 1}"
        with _naming(f"model {name}"):
            reconfigure(model, recipe.config(stage))
        with _naming(f"batch {name}"):
            _, size = ranks.own(stage.batch)
            others = model.config.distractors if model.encoder is not None else 0
            require(others < size, "distractors", f"be below the batch's {size} sequences", others)
        with _naming(f"data {name}"):
            source = sources[number] = make_source(stage.data, stage.length, recipe.seed * 1000 + number)
            V = model.config.vocab_size
            require(source.vocab_size <= V, "data", f"have at most the model's {V} token ids", source.vocab_size)
    with _naming("reading"):
        reconfigure(model, recipe.config())
    return sources
