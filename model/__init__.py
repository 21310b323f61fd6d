"""PyTorch layers around the operator."""

from hsa_tl.model.hsa import ChunkEncoder, ChunkMemory, HSALayer

__all__ = ["ChunkEncoder", "ChunkMemory", "HSALayer"]
