"""The past_key_values of `hsa_tl.model.hf`."""

import inspect

from transformers import Cache, GenerationMixin

from hsa_tl.model.generate import SEGMENT
from hsa_tl.model.model import Model

CACHE_NAMES = ("past_key_values", "cache")  # transformers renames the argument in 5.24
CACHE_NAME = CACHE_NAMES["cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]

MEMORY_OPTIONS = ("undo", "offload", "cache_pages", "two_level", "directory")


class HSACache(Cache):
    """An hsa_tl.model.cache.Cache where transformers expects past_key_values. It only grows.

    Args:
        capacity (int): tokens of a sequence to make room for at first. Default: 16384.
        memory_options: of `Model.new_cache`: undo, offload, cache_pages, two_level, directory.
    """

    is_compileable = is_croppable = False
    is_linear = is_sliding = (False,)  # transformers asks for each layer; without any it would take all for recurrent

    def __init__(self, capacity: int = 1 << 14, **memory_options):
        super().__init__(layers=[])
        if unknown := memory_options.keys() - MEMORY_OPTIONS:
            raise TypeError(f"memory_options must be among {', '.join(MEMORY_OPTIONS)}, got {min(unknown)}")
        self.options = {"capacity": capacity, **memory_options}
        self.state, self.columns = None, 0  # columns: of the batch that were read
        self.unread = None  # what a forward with gradients saw: inputs [B, T], lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def lengths(self, B: int) -> list[int]:
        """Tokens that each of B sequences holds."""
        if self.unread is not None:
            return self.unread[1]
        return [0] * B if self.state is None else self.state.lengths

    def read(self, model: Model, B: int):
        """The Cache, with everything in it."""
        if self.state is None:
            self.state = model.new_cache(B, **self.options)
        if self.unread is not None:
            (inputs, lengths), self.unread = self.unread, None
            for begin in range(0, inputs.shape[1], SEGMENT):
                part = inputs[:, begin : begin + SEGMENT]
                counts = [min(max(0, n - begin), part.shape[1]) for n in lengths]
                model.hidden(part, self.state, 0, counts)
        return self.state

    def _only_grows(self, *args, **options):
        raise NotImplementedError("past_key_values of this model only grow: beam search and assistants cannot use them")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _only_grows


def one_cache(*caches) -> HSACache | None:
    """The cache that came under one of its names."""
    given = [x for x in caches if x is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise ValueError("past_key_values and cache must be one, got two")
    if given and not isinstance(given[0], HSACache):
        raise TypeError(f"past_key_values must be an HSACache, got {type(given[0]).__name__}")
    return given[0] if given else None
