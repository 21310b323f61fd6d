"""How a function becomes an operator of torch.library, and what operators say where they have no derivative."""

import torch

LIBRARY = torch.library.Library("hsa_tl", "DEF")


def operator(function):
    """Registers a function of tensors, the first of them given, as hsa_tl::<its name>, without what autocast adds.

    torch.library.custom_op would do, but the first call of what it makes imports the compiler, for a second or two.
    """
    name = function.__name__

    def run(*args):
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.hsa_tl, name).default


def refuse_second_derivative(name: str):
    raise NotImplementedError(
        f"{name} has no second derivative: its gradient cannot be differentiated (create_graph=True, hessian); use "
        "first-order gradients, or differentiate those by finite differences"
    )


def refuse_derivative(name: str, instead: str):
    raise NotImplementedError(f"{name} is for inference and has no gradient: use {instead}")
