"""Hierarchical Sparse Attention: the operator. TileLang, Triton and PyTorch implementations behind one door."""

from hsa_tl.api import (
    build_pairs,
    fusion_weights,
    hsa_attention,
    hsa_decode,
    retrieve_chunks,
    retrieve_decode,
)
from hsa_tl.decode_retrieval import landmark_bounds
from hsa_tl.pairs import Pairs, selection_overlap

__version__ = "0.1.0"
__all__ = [
    "Pairs",
    "build_pairs",
    "fusion_weights",
    "hsa_attention",
    "hsa_decode",
    "landmark_bounds",
    "retrieve_chunks",
    "retrieve_decode",
    "selection_overlap",
]
