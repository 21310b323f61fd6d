"""Launchers of the Triton kernels of `hsa_attention`: the baseline on NVIDIA GPUs.

Softmax is complete inside one chunk, so backward needs nothing saved: row maximum and row sum are recomputed, and
delta = rowsum(p * dp) is the gradient of the weight. CPU tensors run under Triton's interpreter.
"""

from __future__ import annotations

import json
import math

import torch

from hsa_tl.impl import triton_launch
from hsa_tl.impl.triton_kernels import dkdv_kernel, dq_kernel, forward_kernel
from hsa_tl.impl.triton_launch import launch
from hsa_tl.problem import power_of_two

_LAUNCH_KEYS = ("num_warps", "num_stages")
_CONFIG_KEYS = {forward_kernel: _LAUNCH_KEYS, dq_kernel: _LAUNCH_KEYS}
_CONFIG_KEYS[dkdv_kernel] = ("block_M", *_LAUNCH_KEYS, "num_splits")
_HOPPER_SHARED_BYTES = 232448
_REGISTER_AREA = 64 * 128  # S * D up to which ptxas keeps dk and dv of one chunk in registers together


def _shared_bytes(kernel, rows: int, num_stages: int, S: int, block_D: int, itemsize: int) -> int:
    """Shared memory of one program, as Triton 3.9 allocates it: a streamed tile once for each buffer, others once."""
    if kernel is dkdv_kernel:
        elements = 2 * S * block_D + num_stages * 2 * rows * block_D + rows * S
    else:
        buffers = num_stages if rows >= 64 else max(1, num_stages - 1)
        elements = buffers * 2 * S * block_D + (2 if kernel is dq_kernel else 1) * rows * block_D + rows * S
    return elements * itemsize + 512


def plan(kernel, G: int, D: int, S: int, itemsize: int, shared_limit: int = _HOPPER_SHARED_BYTES) -> dict | None:
    """block_M, num_warps and num_stages for one kernel, or None if nothing fits in `shared_limit` bytes.

    Chosen from ptxas reports for sm_90a (no spills at D = 64 and 128, S = 64), not from timings.
    """
    block_D = power_of_two(max(16, D))
    least = power_of_two(max(16, G))
    area = S * block_D
    hopper = shared_limit >= _HOPPER_SHARED_BYTES
    heights, stages = (least,), (2, 1)
    if itemsize == 4:  # no tensor cores: operands go through registers, so few rows on many warps
        num_warps = 8 if area * least <= 16 * _REGISTER_AREA else 16
    elif kernel is dkdv_kernel:
        # 64 rows on 4 warps leave room for two programs on an SM, each of which hides the other's loads. Without
        # wgmma the tiles of k and v stay in registers: half of the rows, twice the warps.
        large = area > (_REGISTER_AREA if hopper else 4096)
        num_warps = 8 if large or least > 64 else 4
        heights = tuple(max(least, rows) for rows in ((64, 32, 16) if hopper or not large else (32, 16)))
    else:
        num_warps = 2 if area < 4096 else 4 if area <= _REGISTER_AREA and least <= 64 else 8
        if 3 * _shared_bytes(kernel, least, 3, S, block_D, itemsize) <= shared_limit:
            stages = (3, 2, 1)  # one more buffer for k and v, as long as three programs share an SM
    for rows in heights:
        for num_stages in stages:
            if _shared_bytes(kernel, rows, num_stages, S, block_D, itemsize) <= shared_limit:
                settings = {"block_M": rows, "num_warps": num_warps, "num_stages": num_stages}
                if kernel is dkdv_kernel and itemsize < 4 and hopper and block_D >= 64 and area <= 4096:
                    settings["maxnreg"] = 168  # 65536 registers hold three programs; ptxas asks for 164 to 218
                return settings
    return None


def _overrides(config: str, kernel, G: int) -> dict:
    """The fields of `config`, JSON of {kernel name: fields}, for one kernel; ValueError names what is wrong."""
    named = json.loads(config or "{}")
    kernels, keys = tuple(f.__name__ for f in _CONFIG_KEYS), _CONFIG_KEYS[kernel]
    if unknown := named.keys() - {*kernels, "overlap"}:
        raise ValueError(f"config must name kernels among {', '.join(kernels)}, got {sorted(unknown)}")
    fields = named.get(kernel.__name__, {})
    least = power_of_two(max(16, G))
    for key, value in fields.items():
        if key not in keys:
            raise ValueError(f"config[{kernel.__name__!r}] must have no fields but {', '.join(keys)}, got {key!r}")
        if type(value) is not int or value < 1:
            raise ValueError(f"config[{key!r}] must be a positive int, got {value!r}")
        if key in ("block_M", "num_warps") and value & (value - 1):
            raise ValueError(f"config[{key!r}] must be a power of two, got {value}")
        if key == "block_M" and value < least:
            raise ValueError(f"config['block_M'] must be at least {least} for {G} query heads a group, got {value}")
    return dict(fields)


def _device_shared_bytes(device=None) -> int:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def unavailable(problem, kernels=(forward_kernel, dq_kernel, dkdv_kernel)) -> str | None:
    """Why this implementation cannot run `problem` here; None if it can."""
    reason = triton_launch.unavailable(problem)
    if reason or problem.device_type == "cpu":
        return reason
    limit = _device_shared_bytes(problem.device_index)
    for kernel in kernels:
        if plan(kernel, problem.G, problem.D, problem.S, problem.dtype.itemsize, limit) is None:
            return f"{kernel.__name__} needs more than the {limit} bytes of shared memory that a block can have"
    return None


def _setup(kernel, q, k, weights, indices, config):
    G, D, S, H = q.shape[2] // k.shape[3], q.shape[3], k.shape[2], k.shape[3]
    if q.device.type == "cpu":
        settings = {"block_M": power_of_two(max(64, G)), "num_warps": 4, "num_stages": 1}
    else:
        settings = plan(kernel, G, D, S, q.dtype.itemsize, _device_shared_bytes(q.device))
    settings |= _overrides(config, kernel, G)
    constants = {
        "H": H,
        "G": G,
        "D": D,
        "S": S,
        "K": indices.shape[3],
        "PER_HEAD": weights is not None and weights.shape[2] != H,
    }
    constants["BLOCK_D"] = power_of_two(max(16, D))
    constants |= {key: settings[key] for key in ("num_warps", "num_stages", "maxnreg") if key in settings}
    if kernel is dkdv_kernel:
        constants["ROWS"] = settings["block_M"]
    else:
        constants["ROWS"] = power_of_two(max(16, G))
        constants["SLOTS"] = power_of_two(indices.shape[3])
    return constants, settings.get("num_splits")


def _default_splits(device, programs: int, blocks: int) -> int:
    """Programs for each chunk: enough to fill the device twice, as long as each has some 8 blocks of rows to sum."""
    if device.type == "cpu":
        return 1
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, blocks // (8 * programs)))


def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    return run_forward(q, k, v, weights, indices, chunk_len, scale, config)[0]


def run_forward(q, k, v, weights, indices, chunk_len, scale, config):
    """out [B, T, HQ, D], and where weights is None lse [B, T, HQ]."""
    B, T, HQ, _ = q.shape
    N, H = k.shape[1], k.shape[3]
    q, k, v, weights, indices = map(_contiguous, (q, k, v, weights, indices))
    out = torch.empty_like(q)
    lse = q.new_empty(B, T, HQ, dtype=torch.float32) if weights is None else None
    constants, _ = _setup(forward_kernel, q, k, weights, indices, config)
    launch(
        forward_kernel, (T, H, B), q, k, v, weights, indices, None, chunk_len, out, lse, T, N, None, None,
        scale * math.log2(math.e), **constants,
    )  # fmt: skip
    return out, lse


def backward(
    do, q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False,
    out=None, lse=None, dlse=None,
):  # fmt: skip
    """dq, dk, dv, dweights, always deterministic; of one softmax (weights None) it takes out, lse and dlse too."""
    B, T, _, _ = q.shape
    _, N, S, H, _ = k.shape
    do, q, k, v, weights, indices, out, lse, dlse = map(_contiguous, (do, q, k, v, weights, indices, out, lse, dlse))
    scale_log2 = scale * math.log2(math.e)

    dq = torch.empty_like(q)
    dweights = None if weights is None else torch.zeros_like(weights)  # the kernel skips empty slots at a row's end
    delta = None if lse is None else torch.empty_like(lse)
    constants, _ = _setup(dq_kernel, q, k, weights, indices, config)
    launch(
        dq_kernel, (T, H, B), do, q, k, v, weights, indices, chunk_len, out, lse, dlse, delta, dq, dweights, T, N,
        scale, scale_log2, **constants,
    )  # fmt: skip

    constants, splits = _setup(dkdv_kernel, q, k, weights, indices, config)
    tokens = constants["ROWS"] // constants["G"]
    splits = splits or _default_splits(q.device, B * H * N, indices.numel() // tokens)
    dk, dv = (torch.empty_like(k) if splits == 1 else k.new_empty(splits, *k.shape, dtype=torch.float32) for _ in "kv")
    together = S * constants["BLOCK_D"] <= _REGISTER_AREA
    for want_dk, want_dv in [(True, True)] if together else [(True, False), (False, True)]:
        launch(
            dkdv_kernel, (N * splits, H, B), do, q, k, v, weights, chunk_len, lse, delta, pairs.pair, pairs.offsets,
            dk, dv, T, N, splits, scale, scale_log2, WANT_DK=want_dk, WANT_DV=want_dv, **constants,
        )  # fmt: skip
    if splits > 1:
        dk, dv = dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)
    return dq, dk, dv, dweights


def _contiguous(x):
    return None if x is None else x.contiguous()
