"""Hierarchical Sparse Attention: the operator. TileLang, Triton and PyTorch implementations behind one door."""

from hsa_tl.api import build_pairs, fusion_weights, hsa_attention, retrieve_chunks
from hsa_tl.pairs import Pairs

__version__ = "0.1.0"
__all__ = ["Pairs", "build_pairs", "fusion_weights", "hsa_attention", "retrieve_chunks"]
