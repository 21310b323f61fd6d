"""The operators under torch.func and forward-mode differentiation, of which torch.library's registration knows nothing.

Reverse mode works: torch.func.grad, vjp, jacrev, and vmap of them, a sample at a time. What there is no formula for,
forward mode and second derivatives, raises and names the public function; left alone it would be 0 in silence.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from hsa_tl import ops
from hsa_tl.registry import refuse_derivative, refuse_second_derivative

_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def _differentiated() -> bool:
    """Whether the call is inside a torch.func transform that takes derivatives."""
    return any(level.key() in _DERIVATIVES for level in get_interpreter_stack() or ())


def _refuse_forward_mode(name: str):
    raise NotImplementedError(
        f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize, forward_ad): use reverse "
        "mode, that is backward() or torch.func.grad, vjp or jacrev"
    )


def _each_sample(function, info, in_dims, args):
    """The rule of vmap: a call for each sample."""
    calls = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(x) for x in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


def _rule(name: str, operator, setup, backward):
    """An autograd.Function of the operator, which torch.func takes where it refuses torch.library's own."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

        @staticmethod
        def jvp(ctx, *tangents):
            _refuse_forward_mode(name)

        @staticmethod
        def vmap(info, in_dims, *args):
            return _each_sample(Rule.apply, info, in_dims, args)

    return Rule.apply


def _once(name: str, operator):
    """The rule of a backward operator."""
    return _rule(name, operator, lambda ctx, inputs, output: None, lambda ctx, *_: refuse_second_derivative(name))


def _transformable(name: str, operator, setup, backward):
    """The operator, called as ever where nothing transforms it."""
    rule = _rule(name, operator, setup, backward)

    def call(*args):
        compiling = torch.compiler.is_compiling()
        if not compiling and _differentiated():
            return rule(*args)
        if forward_ad._current_level >= 0:
            floats = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
            if compiling or any(forward_ad.unpack_dual(x).tangent is not None for x in floats):
                _refuse_forward_mode(name)
        if compiling or torch.is_grad_enabled():
            return operator(*args)
        with torch._C._AutoDispatchBelowAutograd():  # which would be asked in Python
            return operator(*args)

    return call


def _inference(name: str, operator, instead: str):
    return _transformable(
        name, operator, lambda ctx, inputs, output: None, lambda ctx, *_: refuse_derivative(name, instead)
    )


_attention_backward = _once("hsa_attention", ops.attention_backward)
_selected_backward = _once("selected_attention", ops.selected_backward)
_retrieve_backward = _once("retrieve_chunks", ops.retrieve_backward)
attention = _transformable(
    "hsa_attention",
    ops.attention,
    ops.attention_setup,
    lambda ctx, do: ops.attention_gradients(ctx, do, _attention_backward),
)
selected = _transformable(
    "selected_attention",
    ops.selected,
    ops.selected_setup,
    lambda ctx, do, dlse: ops.selected_gradients(ctx, do, dlse, _selected_backward),
)
retrieve = _transformable(
    "retrieve_chunks",
    ops.retrieve,
    ops.retrieve_setup,
    lambda ctx, dscores, _: ops.retrieve_gradients(ctx, dscores, _retrieve_backward),
)
decode = _inference("hsa_decode", ops.decode, "hsa_attention")
selected_decode = _inference("selected_decode", ops.selected_decode, "selected_attention")
retrieve_decode = _inference("retrieve_decode", ops.retrieve_decode, "retrieve_chunks")
