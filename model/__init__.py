"""The PyTorch model around the operator: HSA-UltraLong, its layers, its baselines, and the memory that decode reads."""

from hsa_tl.model.chunk_memory import ChunkMemory
from hsa_tl.model.config import ModelConfig, baseline, preset
from hsa_tl.model.hsa import ChunkEncoder, HSALayer
from hsa_tl.model.memory import MemorySpec, PagedMemory
from hsa_tl.model.model import Model, ModelOutput
from hsa_tl.model.pretrained import load

__all__ = [
    "ChunkEncoder",
    "ChunkMemory",
    "HSALayer",
    "MemorySpec",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "PagedMemory",
    "baseline",
    "load",
    "preset",
]
