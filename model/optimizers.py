"""What moves the parameters: AdamW, and Muon for matrices between hidden states."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hsa_tl.model.model import Model
from hsa_tl.model.recipe import Recipe


class _CPUFloat32(TorchFunctionMode):
    """Tensors on a CPU that are told to become bfloat16 are copied as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """PyTorch's, which finds directions in bfloat16: on a CPU in float32, since many have no products in bfloat16."""

    def step(self, closure=None):
        with _CPUFloat32():
            return super().step(closure)


def make_optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, in which vectors (gains, scales, [CLS]) do not decay; with "muon", Muon for all inner matrices.

    Those are the weights of linear layers but the last. The direction of a Muon step has all singular values near 1, so
    that features keep more dimensions than AdamW leaves them.
    """
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.output]
    inner = linear if recipe.optimizer == "muon" else []
    rest = [p for p in model.parameters() if all(p is not x for x in inner)]
    decay, keep = ([p for p in rest if (p.ndim > 1) == decays] for decays in (True, False))
    groups = [{"params": decay}, {"params": keep, "weight_decay": 0.0}]
    found = [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)]
    if inner:
        options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        found.append(Muon(inner, **options))
    return found
