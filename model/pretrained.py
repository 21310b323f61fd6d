"""Trained models by name or by run, and the weights that ship with the package.

    model = hsa_tl.model.load("needle-tiny")             # or Path("out/train/needle-tiny"), a run of hsa-tl train
    model.tokenizer.encode("MARK k3 v5")

model/weights/NAME.safetensors holds parameters, NAME.json its recipe, where it comes from, checksum and scores.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hsa_tl.files import write_together
from hsa_tl.model import checkpoint
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.model import Model
from hsa_tl.model.recipe import Recipe, recipe_of
from hsa_tl.validation import require

FOLDER = Path(__file__).parent / "weights"
TOKENIZER = "tokenizer"  # of a converted run: its source's, as transformers saves it


@dataclass(frozen=True)
class Shipped:
    """What stands beside weights. accuracy: by task and length, as `hsa-tl lengths` measures it, with its answers."""

    recipe: dict[str, Any]
    steps: int
    sha256: str
    train_seconds: float
    device: str
    versions: str
    commit: str
    accuracy: list[dict[str, Any]]


def shipped_names() -> list[str]:
    """Names that `load` knows."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def shipped(name: str) -> Shipped:
    """What is known of shipped weights. ValueError: another name, or a file that is damaged."""
    require(name in shipped_names(), "name", f"be one of {', '.join(shipped_names())}", repr(name))
    path = FOLDER / f"{name}.json"
    try:
        return Shipped(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must hold what is known of weights, got {error}") from None


def trained(run_or_name: str | Path) -> tuple[Recipe, int, Callable[[Model], None]]:
    """The recipe of what `load` knows, how many of its steps were done, and what fills a model with the weights."""
    if isinstance(run_or_name, str) and run_or_name in shipped_names():
        about, path = shipped(run_or_name), FOLDER / f"{run_or_name}.safetensors"
        return recipe_of(about.recipe), about.steps, lambda model: model.load_state_dict(_weights(path, about))
    if (found := checkpoint.latest(Path(run_or_name))) is not None:
        return recipe_of(found.recipe), found.step, lambda model: checkpoint.load(found, model)
    names = ", ".join(shipped_names())
    raise ValueError(f"run_or_name must be a folder with a checkpoint or one of {names}, got {str(run_or_name)!r}")


def load(run_or_name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A trained model in eval mode, configured as after training.

    Args:
        run_or_name: folder of a run of `hsa-tl train` or `hsa-tl convert`, whose newest whole checkpoint is taken, or
            the name of weights that ship with the package: "needle-tiny". A str that is such a name means the weights;
            a Path is a folder.
        device: where the parameters are put. Default: "cpu".
        dtype: of the parameters, which are never held in another. Default: torch.float32.

    Returns:
        The Model; `model.tokenizer` (hsa_tl.model.data.Tokenizer) is the source's of a converted model, else the one of
        the recipe's last stage, of which the run keeps a copy.

    Raises:
        ValueError: neither a run nor a name; shipped weights whose checksum is not what it was. ImportError: shipped
        weights without safetensors.
    """
    from hsa_tl.model import sources  # numpy: only who loads needs it

    recipe, _, fill = trained(run_or_name)
    model = _new(recipe.config(), device, dtype)
    fill(model)
    if recipe.source is None:
        model.tokenizer = sources.tokenizer_of(recipe.stages[-1].data, Path(run_or_name))
    else:
        model.tokenizer = sources.make_tokenizer(Path(run_or_name) / TOKENIZER / "tokenizer.json")
    return model.eval()


_BUILDING = threading.Lock()  # the default dtype is the whole process's


def _new(config: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> Model:
    with _BUILDING, torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Model(config)
        finally:
            torch.set_default_dtype(default)


def _weights(path: Path, about: Shipped) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise ImportError("shipped weights need safetensors: pip install 'hsa-tl[model]'") from None
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != about.sha256:
        raise ValueError(f"{path} must have the sha256 {about.sha256}, got {got}")
    return load(data)


# Of a model that was not trained on chats: the messages' texts, a line each.
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def export(run_or_name: str | Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a trained model as a folder of transformers: config, safetensors, tokenizer, chat template.

    AutoModelForCausalLM and AutoTokenizer read it, with trust_remote_code=True where hsa_tl is installed.

    Args:
        run_or_name: as for `load`.
        folder: new, or empty.
        dtype: of the weights. Default: torch.float32.

    Raises:
        ValueError: neither a run nor a name; a folder that holds something. ImportError: no transformers.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from hsa_tl.model.hf import HSAConfig, HSAForCausalLM
    except ImportError:
        raise ImportError("a folder of transformers needs the package: pip install 'hsa-tl[hf]'") from None
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())), "folder", "be new or empty", folder)
    model = load(run_or_name, dtype=dtype)
    fast, end = model.tokenizer.fast(), model.tokenizer.end
    special = {} if end is None else dict.fromkeys(("eos_token", "pad_token"), fast.id_to_token(end))
    with torch.device("meta"):
        made = HSAForCausalLM(HSAConfig(model.config, eos_token_id=end, pad_token_id=end))
    made.model = model
    made.save_pretrained(folder)
    if (kept := Path(run_or_name) / TOKENIZER).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(kept)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    tokenizer.save_pretrained(folder)


def save_weights(run: Path, folder: Path, name: str, **origin) -> list[Path]:
    """Writes folder/NAME.safetensors and NAME.json, which `load` reads from the package, of a finished run.

    origin: the fields of Shipped that the run does not tell. ValueError: the run is not finished.
    """
    from safetensors.torch import save

    from hsa_tl.model import checkpoint

    found = checkpoint.latest(run)
    if found is None or found.step != recipe_of(found.recipe).steps:
        raise ValueError(f"run must be finished, got {'no checkpoint' if found is None else found.step} in {run}")
    state = load(run).state_dict()
    data = save({k: v.clone() for k, v in state.items()})  # tied parameters share memory
    about = Shipped(found.recipe, found.step, hashlib.sha256(data).hexdigest(), **origin)
    written = [folder / f"{name}.safetensors", folder / f"{name}.json"]
    write_together({written[0]: data, written[1]: json.dumps(asdict(about), indent=1) + "\n"})
    return written
