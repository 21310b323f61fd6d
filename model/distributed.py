"""Training on the ranks that torchrun started: data times context parallelism, parameters sharded by FSDP2.

Context parallelism spreads the tokens of a sequence over ranks, the chunk memory with them. Rank r of W holds tokens
[r T / W, (r + 1) T / W), a whole number of chunks. A sliding window takes the keys that it lacks from the ranks before.
Chunks stay where they are: every rank serves the pairs of its own chunks for all tokens, and since HSA's output is a
sum over chunks, the partial outputs are reduce-scattered to the tokens' ranks. Landmarks are few and are gathered, so
retrieval is exact.

Every rank runs the same collectives in the same order, forward and backward, whatever it needs of them. DTensor and
FSDP are imported where they are used: they take a second, which every command would wait for.
"""

import os
import sys
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hsa_tl.model.chunk_memory import BatchMemory, ChunkMemory, with_rolled
from hsa_tl.model.model import Model, ModelOutput
from hsa_tl.model.sources import IGNORE
from hsa_tl.validation import require


def gather(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """x [B, t, ...] of every rank, one after the other: [B, W t, ...]. Gradients add up at their rank."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    return DTensor.from_local(x, mesh, [Shard(1)], run_check=False).full_tensor(grad_placements=[Partial()])


def scatter_sum(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The rank's part [B, t, ...] of the sum of all ranks' x [B, W t, ...]."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(1)]).to_local()


class Neighbours:
    """A KeyCache: the keys before a rank's tokens that a window of `window` tokens reaches (None: all) come from the
    ranks before it."""

    def __init__(self, mesh: DeviceMesh, window: int | None):
        self.mesh, self.window = mesh, window

    def extend(self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        T, rank = k_BTHD.shape[1], self.mesh.get_local_rank()
        tail = T if self.window is None else min(T, self.window - 1)
        before = rank * tail if self.window is None else min(rank * tail, self.window - 1)
        both = torch.stack([k_BTHD, v_BTHD], 2)
        past = gather(both[:, T - tail :], self.mesh)[:, rank * tail - before : rank * tail]
        k, v = torch.cat([past, both], 1).unbind(2)
        return k, v, None


class ShardedMemory(BatchMemory):
    """A Memory over the chunks of all ranks; see hsa_tl.model.chunk_memory. own: this rank's chunks. distractors: other
    sequences of the batch whose chunks, too, every rank holds its part of; all of one come before all of the next."""

    def __init__(self, own: ChunkMemory, mesh: DeviceMesh, distractors: int = 0):
        super().__init__(own, distractors)
        self.mesh, self.part = mesh, own.landmarks.shape[1]  # chunks of a sequence at each rank
        self.landmarks = with_rolled(gather(own.landmarks, mesh), distractors)

    def attend(self, q, weights, indices, **options) -> torch.Tensor:
        mine = self._mine(gather(indices, self.mesh))
        out = super().attend(gather(q, self.mesh), gather(weights, self.mesh), mine, **options)
        return scatter_sum(out.float(), self.mesh).to(q.dtype)  # W 16-bit sums would lose what one process keeps

    def masses(self, q, indices, **options) -> torch.Tensor:
        masses = super().masses(gather(q, self.mesh), self._mine(gather(indices, self.mesh)), **options)
        masses = scatter_sum(masses.masked_fill(masses == -torch.inf, 0.0), self.mesh)  # one rank holds the chunk
        empty = (indices < 0).repeat_interleave(q.shape[2] // indices.shape[2], 2)
        return masses.masked_fill(empty, -torch.inf)

    def _mine(self, everyone: torch.Tensor) -> torch.Tensor:
        """Of every rank's chosen chunks this rank's, as a BatchMemory of its own counts them."""
        chunks = self.part * self.mesh.size()
        held = everyone % chunks // self.part == self.mesh.get_local_rank()
        here = everyone // chunks * self.part + everyone % self.part
        return torch.where((everyone >= 0) & held, here, -1)


class ContextParallel(nn.Module):
    """`model`, with the tokens of each sequence spread over the ranks of `mesh`; parameters are the same everywhere.

    forward: input_ids, labels [B, T], the same on every rank, T a multiple of ranks * chunk_size -> ModelOutput with
    this rank's logits [B, T / W, V] and a loss. The mean of the ranks' losses is the model's loss, and the mean of
    their gradients its gradient: what FSDP2 and DistributedDataParallel compute. logits_to_keep=0: no logits.
    ValueError: another T. NotImplementedError: NSA, MoBA and linear layers; impl "dense" and fusion "one_softmax",
    which are no sums over chunks here.
    """

    def __init__(self, model: Model, mesh: DeviceMesh | None = None):
        super().__init__()
        self.model = model
        self.mesh = mesh or init_device_mesh(model.embedding.weight.device.type, (dist.get_world_size(),))

    def part(self, T: int) -> slice:
        """The tokens of this rank."""
        ranks, S = self.mesh.size(), self.model.config.chunk_size
        require(T % (ranks * S) == 0, "input_ids", f"have a multiple of {ranks} ranks * {S} tokens", T)
        start = T // ranks * self.mesh.get_local_rank()
        return slice(start, start + T // ranks)

    def _before(self, h_BTC: torch.Tensor, n: int) -> torch.Tensor | None:
        """The last n hidden states of the rank before, None for the first rank."""
        if not n:
            return None
        rank, last = self.mesh.get_local_rank(), gather(h_BTC[:, -n:], self.mesh)
        return last[:, (rank - 1) * n : rank * n] if rank else last[:, :n] * 0  # 0: its gradient is collective too

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, logits_to_keep: int | None = None
    ) -> ModelOutput:
        model, part = self.model, self.part(input_ids.shape[1])
        c = model.config
        if not {"hsa", "swa", "full"}.issuperset(c.kinds) or c.impl == "dense" or c.fusion == "one_softmax":
            raise NotImplementedError(
                'context parallelism needs attention "hsa", "swa" or "full", no linear layers, no impl="dense", '
                'no fusion="one_softmax"'
            )
        past = None
        if model.conv is not None and part.start:
            past = model.embedding(input_ids[:, part.start - model.config.conv + 1 : part.start])
        x_BTC = model.embed(input_ids[:, part], past)
        caches = [Neighbours(self.mesh, layer.attention.window) for layer in model.layers]
        lower = model.config.lower_layers
        h_BTC, first_v_BTHD = model.lower(x_BTC, part.start, caches[:lower])
        own = model.encode(h_BTC, part.start, self._before(h_BTC, c.encoder_overlap))
        memory, start = None, part.start
        if own is not None:
            distractors = c.distractors if model.training else 0
            memory = ShardedMemory(own, self.mesh, distractors)
            start += distractors * input_ids.shape[1]
        h_BTC = model.upper(h_BTC, memory, first_v_BTHD, start, caches[lower:])
        logits = None if logits_to_keep == 0 else model.head(h_BTC)
        if labels is None:
            return ModelOutput(logits)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        ranks, total = self.mesh.size(), (targets != IGNORE).sum()
        return ModelOutput(logits, model.loss_sum(h_BTC, targets[:, part]) * ranks / total)


def end_process() -> NoReturn:
    """Ends a rank's process with exit code 0, without the interpreter's teardown.

    A thread of gloo's may still have to drop the last collective's tensors, for which it takes the interpreter's lock;
    Python before 3.14 kills threads that ask for it during the teardown, and that aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Ranks:
    """All ranks that torchrun's environment names, one without it: `context` of them share each sequence's tokens, and
    as many groups as that leaves share each batch's sequences.

    ValueError: context does not divide the ranks.
    """

    def __init__(self, device: str, context: int = 1):
        self.device, self.context = device, context
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        require(self.world % context == 0, "context_parallel", f"divide the {self.world} ranks", context)
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
        module = ContextParallel(model, self.mesh["context"]) if self.context > 1 else model
        if self.world > 1:
            from torch.distributed.fsdp import fully_shard

            # A warning for those who write into a layer's output, at every call of every layer.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            everyone = init_device_mesh(self.device, (self.world,))
            for part in (*model.layers, *([model.encoder] if model.encoder else [])):
                fully_shard(part, mesh=everyone)
            fully_shard(module, mesh=everyone)
        return module

    @property
    def alone(self) -> bool:
        """Whether the CPU's workers may share its work."""
        return self.device == "cpu" and self.world == 1

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the data ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.context).tolist()

    def own(self, size: int) -> tuple[int, int]:
        """First and number of a batch's sequences that are this rank's. ValueError: they do not share out evenly."""
        require(size % self.data == 0, "batch", f"be a multiple of the {self.data} data-parallel ranks", size)
        return self.data_rank * (size // self.data), size // self.data

    def close(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
