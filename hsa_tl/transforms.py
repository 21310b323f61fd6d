"""The operators' derivatives, also under torch.func and forward mode, of which torch.library knows nothing.

Reverse mode works: torch.func.grad, vjp, jacrev, and vmap of them, a sample at a time. What there is no formula for,
forward mode and second derivatives, raises and names the public function; left alone it would be 0 in silence.
"""

import functools

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from hsa_tl import near, ops

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

    methods = {
        "forward": operator, "setup_context": setup, "backward": backward,
        "jvp": lambda *_: _refuse_forward_mode(name),
        "vmap": lambda info, in_dims, *args: _each_sample(rule.apply, info, in_dims, args),
    }  # fmt: skip
    rule = type("Rule", (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})
    return rule.apply


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


def _refusal(message: str):
    def refuse(*_):
        raise NotImplementedError(message)

    return refuse


def _differentiable(name: str, operator, setup, gradients, backward):
    """The operator, whose gradients are those of another operator, `backward`, which has none."""
    refuse = _refusal(
        f"{name} has no second derivative: its gradient cannot be differentiated (create_graph=True, hessian); use "
        "first-order gradients, or differentiate those by finite differences"
    )
    torch.library.register_autograd(backward, refuse)
    torch.library.register_autograd(operator, functools.partial(gradients, backward), setup_context=setup)
    rule = _rule(name, backward, lambda *_: None, refuse)
    return _transformable(name, operator, setup, functools.partial(gradients, rule))


def _inference(name: str, operator, instead: str):
    refuse = _refusal(f"{name} is for inference and has no gradient: use {instead}")
    torch.library.register_autograd(operator, refuse)
    return _transformable(name, operator, lambda *_: None, refuse)


def _attention_setup(ctx, inputs, output):
    q, k, v, weights, indices, pair, offsets, chunk_len, *ctx.static, _ = inputs
    ctx.save_for_backward(q, k, v, weights, indices, pair, offsets, chunk_len)


def _attention_gradients(backward, ctx, do):
    q, k, v, weights, indices, pair, offsets, chunk_len = ctx.saved_tensors
    if pair is None:  # under vmap a tensor does not say whether it takes part in a gradient
        pair, offsets = ops.build_pairs(indices, k.shape[1], False)
    gradients = backward(do, q, k, v, weights, indices, pair, offsets, chunk_len, *ctx.static)
    return (*gradients, *(None,) * 9)


def _selected_setup(ctx, inputs, output):
    q, k, v, indices, pair, offsets, chunk_len, *ctx.static = inputs
    ctx.save_for_backward(q, k, v, indices, *output, pair, offsets, chunk_len)


def _selected_gradients(backward, ctx, do, dlse):
    q, k, v, indices, out, lse, pair, offsets, chunk_len = ctx.saved_tensors
    if pair is None:  # as in _attention_gradients
        pair, offsets = ops.build_pairs(indices, k.shape[1], False)
    gradients = backward(do, dlse, q, k, v, indices, out, lse, pair, offsets, chunk_len, *ctx.static)
    return (*gradients, *(None,) * 8)


def _retrieve_setup(ctx, inputs, output):
    q_slc, landmarks, _, chunk_size, q_start, _, cu_seqlens, recency, span, scale, *_ = inputs
    ctx.static, ctx.recency_static = (chunk_size, scale), (span, chunk_size, q_start)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], q_slc, landmarks, cu_seqlens, recency)


def _retrieve_gradients(backward, ctx, dscores, _):
    *saved, cu_seqlens, recency = ctx.saved_tensors
    gradients = backward(dscores, *saved, cu_seqlens, *ctx.static)
    drecency = near.drecency(dscores, saved[0], cu_seqlens, recency, *ctx.recency_static)
    return (*gradients, *(None,) * 5, drecency, *(None,) * 4)


attention = _differentiable(
    "hsa_attention", ops.attention, _attention_setup, _attention_gradients, ops.attention_backward
)
selected = _differentiable(
    "selected_attention", ops.selected, _selected_setup, _selected_gradients, ops.selected_backward
)
retrieve = _differentiable("retrieve_chunks", ops.retrieve, _retrieve_setup, _retrieve_gradients, ops.retrieve_backward)
decode = _inference("hsa_decode", ops.decode, "hsa_attention")
selected_decode = _inference("selected_decode", ops.selected_decode, "selected_attention")
retrieve_decode = _inference("retrieve_decode", ops.retrieve_decode, "retrieve_chunks")
