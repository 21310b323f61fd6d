"""Retrieval in PyTorch, on any device, of which the other implementations take pieces from where it stands."""

from hsa_tl.decode_retrieval import retrieve_decode as retrieve_decode
from hsa_tl.retrieval import dlandmarks as dlandmarks
from hsa_tl.retrieval import retrieve as retrieve
