"""Training recipes as data: stages that change window, top-k, context and data, read from YAML.

    recipe = load_recipe("needle-tiny")              # or a path of a YAML file
    recipe.stages[0].length

model/recipes holds the paper's stages, each a file that starts from the checkpoint of the one before.
"""

import re
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import takewhile
from math import cos, inf, pi
from pathlib import Path
from typing import Any

from hsa_tl.model.config import ModelConfig, is_number, preset, require_ints, require_rules
from hsa_tl.validation import require

FOLDER = Path(__file__).parent / "recipes"
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Stage:
    """steps of `batch` * `accumulate` samples of `length` tokens. data: see hsa_tl.model.sources. model: changes of the
    configuration that leave the parameters' shapes alone (window, topk, exclude_window, fusion, distractors, rope,
    impl)."""

    steps: int
    length: int
    batch: int
    data: dict[str, Any]
    accumulate: int = 1
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_ints(self, steps=1, length=2, batch=1, accumulate=1)
        require(isinstance(self.model, dict), "model", "be a mapping of fields", repr(self.model))

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.length * self.batch * self.accumulate


@dataclass(frozen=True)
class Recipe:
    """Linear warm-up over `warmup` steps, then constant; the last `decay` share of the steps falls by a cosine to
    `final` of lr (decay = 1: cosine throughout). optimizer: "adamw", or "muon", which moves the matrices between hidden
    states by orthogonal steps of AdamW's size. start: folder of a run whose last weights are taken. reading: changes
    of the configuration as in a stage, of the trained model.
    source: the pretrained model that a run was converted from; it has no stages, and its tokenizer beside its weights.
    ValueError: names the field, the rule and the value."""

    name: str
    preset: str
    stages: tuple[Stage, ...]
    lr: float
    model: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    warmup: int = 0
    decay: float = 0.0
    final: float = 0.05
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10
    start: str | None = None
    source: str | None = None

    def __post_init__(self):
        require_ints(self, warmup=0, seed=0, checkpoint_every=1, keep=1, log_every=1)
        for name in ("lr", "weight_decay", "decay", "final", "clip"):
            require(is_number(value := getattr(self, name)), name, "be a number", repr(value))
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require_rules(
            self,
            ("name", isinstance(self.name, str), "be a text"),
            *((x, isinstance(getattr(self, x), dict), "be a mapping of fields") for x in ("model", "reading")),
            ("start", self.start is None or isinstance(self.start, str), "be a folder"),
            ("stages", bool(self.stages) == (self.source is None), "name at least one stage, and none beside a source"),
            ("seed", self.seed < 1 << 63, "be below 2^63"),
            ("lr", 0 < self.lr < inf, "be positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, "be at least 0 and finite"),
            ("betas", pair and all(is_number(b) and 0 <= b < 1 for b in self.betas), "be two numbers in [0, 1)"),
            ("decay", 0 <= self.decay <= 1, "lie in [0, 1]"),
            ("final", 0 <= self.final <= 1, "lie in [0, 1]"),
            ("clip", self.clip > 0, "be positive"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"be one of {', '.join(OPTIMIZERS)}"),
            ("dtype", self.dtype in DTYPES, f"be one of {', '.join(DTYPES)}"),
        )
        for stage in (None, *self.stages):
            self.config(stage)

    @property
    def steps(self) -> int:
        return sum(s.steps for s in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Number of the stage that a step belongs to, and the step within it."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        raise ValueError(f"step must lie in [0, {self.steps}), got {step + self.steps}")

    def config(self, stage: Stage | None = None) -> ModelConfig:
        """The model's configuration in a stage; by default after training, with the changes of `reading` alone."""
        changes = self.model | (self.reading if stage is None else stage.model)
        _check_fields("changes of a model", ModelConfig, changes)
        return replace(preset(self.preset), **changes)

    def lr_at(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        first = self.steps * (1 - self.decay)
        if not self.decay or step < first:
            return self.lr * rising
        part = (step - first) / (self.steps - first)
        return self.lr * rising * (self.final + (1 - self.final) * 0.5 * (1 + cos(pi * part)))


def _check_fields(what: str, kind: type, values: dict[str, Any]) -> None:
    """ValueError: names a field that kind does not have, or that is missing, and those that it has."""
    known = [f.name for f in fields(kind)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{what} must have the fields {', '.join(known)}, got {unknown[0]!r}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{what} must have the fields {', '.join(needed)}, got no {missing[0]}")


def recipe_names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def explanation(name: str) -> str:
    """What the first lines of a shipped recipe's file say of it."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in takewhile(lambda x: x.startswith("#"), lines))


def text_recipe(
    name: str, path: Path, *, steps: int, length: int, batch: int, vocab_size: int, tokenizer: Path | None = None
) -> Recipe:
    """The model `tiny` on a token file, with the settings of the recipe text-tiny and one stage."""
    data = {"kind": "text", "path": str(path)} | ({"tokenizer": str(tokenizer)} if tokenizer else {})
    model = {"window": 64, "chunk_size": 64, "topk": 8, "recency": max(2, length // 32)}
    model["vocab_size"] = max(vocab_size, preset("tiny").vocab_size)
    stage = Stage(steps, length, batch, data, model={"distractors": min(3, batch - 1)})
    return Recipe(
        name, "tiny", (stage,), lr=1.5e-3, optimizer="muon", model=model, warmup=min(50, steps // 4), decay=0.3
    )


def recipe_of(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values. ValueError: a field that is missing, unknown or wrong."""
    try:
        _check_fields("a recipe", Recipe, values)
        stages, betas = values["stages"], values.get("betas", Recipe.betas)
        mappings = isinstance(stages, (list, tuple)) and all(isinstance(s, dict) for s in stages)
        require(mappings, "stages", "be a list of mappings", repr(stages))
        for stage in stages:
            _check_fields("a stage", Stage, stage)
        betas = tuple(betas) if isinstance(betas, list) else betas
        return Recipe(**values | {"stages": tuple(Stage(**s) for s in stages), "betas": betas})
    except TypeError as error:
        raise ValueError(f"a recipe must have the fields of Recipe and Stage, got {error}") from None


def load_recipe(name: str | Path) -> Recipe:
    """A recipe of model/recipes by its name, or a YAML file by its path.

    A file with `like: NAME` has that recipe's values where it gives none; the changes of `model` add up.
    ImportError: no PyYAML. ValueError: neither, or not a recipe. OSError: the file cannot be read.
    """
    return recipe_of(_read(name))


def _read(name: str | Path, *above: Path) -> dict[str, Any]:
    """The values of a recipe's file, over those of the recipe that it is like. above: files that are like it."""
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes need PyYAML: pip install 'hsa-tl[train]'") from None
    path = FOLDER / f"{name}.yaml" if str(name) in recipe_names() else Path(str(name))
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"recipe must be a .yaml file or one of {', '.join(recipe_names())}, got {str(name)!r}")
    require(path not in above, "like", "name a recipe that is not like this one", path)
    loader = type("Loader", (yaml.SafeLoader,), {})  # YAML 1.1 takes 1e-3 for a word
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        values = yaml.load(path.read_text(), loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {error}") from None
    require(isinstance(values, dict), path, "hold the fields of a recipe", repr(values))
    values = {"name": path.stem} | values
    if (like := values.pop("like", None)) is not None:
        base = _read(like, path, *above)
        require(isinstance(values.get("model", {}), dict), "model", "be a mapping of fields", values.get("model"))
        values = base | values | {"model": base.get("model", {}) | values.get("model", {})}
    return values
