"""Matrix products of blocks of work on the CPU.

oneDNN's where PyTorch has it: on CPUs of other makers MKL, which PyTorch multiplies by, leaves half of each vector unit
idle (2.3 times the time on an AMD EPYC with AVX-512). A row gets the same bits whatever rows are beside it.
"""

import torch

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T [M, N], of a [M, K] and b [N, K].

    b or b^T must be contiguous: by another one oneDNN multiplies a thousand times as slowly.
    """
    if _onednn is None or a.dtype != torch.float32 or a.device.type != "cpu":
        return a @ b.T
    return _onednn.default(a, b, None, "none", [], "")
