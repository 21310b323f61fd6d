"""How a function becomes an operator of torch.library."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("hsa_tl", "DEF")


def operator(fake: Callable):
    """Registers a function of tensors, the first of them given, as hsa_tl::<its name>, without what autocast adds.

    fake: of the same arguments, results of the same shapes and types whose values mean nothing.
    torch.library.custom_op would do, but the first call of what it makes imports the compiler, for a second or two.
    """

    def register(function):
        name = function.__name__

        def run(*args):
            device = args[0].device.type
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hsa_tl::{name}", fake)
        return getattr(torch.ops.hsa_tl, name).default

    return register
