"""Hierarchical Sparse Attention: the operator. TileLang, Triton and PyTorch implementations behind one door."""

from hsa_tl.api import build_pairs, fusion_weights, hsa_attention, hsa_decode, retrieve_chunks, retrieve_decode
from hsa_tl.chunks import chunk_means
from hsa_tl.decode_retrieval import landmark_bounds
from hsa_tl.fusion import top_p_chunks
from hsa_tl.pairs import Pairs, selection_overlap
from hsa_tl.selected import merge_attention, selected_attention, selected_decode

__version__ = "0.1.0"
__all__ = [
    "Pairs",
    "build_pairs",
    "chunk_means",
    "fusion_weights",
    "hsa_attention",
    "hsa_decode",
    "landmark_bounds",
    "merge_attention",
    "retrieve_chunks",
    "retrieve_decode",
    "selected_attention",
    "selected_decode",
    "selection_overlap",
    "top_p_chunks",
]
