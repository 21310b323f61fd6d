"""PyTorch layers around the operator, and the memory that decode reads."""

from hsa_tl.model.hsa import ChunkEncoder, ChunkMemory, HSALayer
from hsa_tl.model.memory import MemorySpec, PagedMemory

__all__ = ["ChunkEncoder", "ChunkMemory", "HSALayer", "MemorySpec", "PagedMemory"]
