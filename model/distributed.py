"""The ranks of a training run that torchrun started: data times context parallelism, parameters sharded by FSDP2."""

import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hsa_tl.model.context_parallel import ContextParallel
from hsa_tl.model.model import Model


class Ranks:
    """All ranks that torchrun's environment names, one without it: `context` of them share each sequence's tokens, and
    as many groups as that leaves share each batch's sequences.

    ValueError: context does not divide the ranks.
    """

    def __init__(self, device: str, context: int = 1):
        self.device, self.context = device, context
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world % context:
            raise ValueError(f"context_parallel must divide the {self.world} ranks, got {context}")
        self.data, self.rank, self.data_rank = self.world // context, 0, 0
        if self.world > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.rank = dist.get_rank()
            self.mesh = init_device_mesh(device, (self.data, context), mesh_dim_names=("data", "context"))
            self.data_rank = self.mesh.get_local_rank("data")

    def shard(self, model: Model) -> nn.Module:
        """What to call instead of the model, whose parameters become shards: see ContextParallel for its loss."""
        module = ContextParallel(model, self.mesh.get_group("context")) if self.context > 1 else model
        if self.world > 1:
            # A warning for those who write into a layer's output, at every call of every layer.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            everyone = init_device_mesh(self.device, (self.world,))
            for part in (*model.layers, *([model.encoder] if model.encoder else [])):
                fully_shard(part, mesh=everyone)
            fully_shard(module, mesh=everyone)
        return module

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the data ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.context).tolist()

    def own(self, size: int) -> tuple[int, int]:
        """First and number of a batch's sequences that are this rank's. ValueError: they do not share out evenly."""
        if size % self.data:
            raise ValueError(f"batch must be a multiple of the {self.data} data-parallel ranks, got {size}")
        return self.data_rank * (size // self.data), size // self.data

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
