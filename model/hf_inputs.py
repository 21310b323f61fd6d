"""What transformers hands to `hsa_tl.model.hf`: masks of every form, position_ids, packed documents, past_key_values.

The model wants rows that begin with a document's first token and end in padding, so every document becomes such a row,
and each column of the batch remembers which token of which row it shows.

Shape suffixes: B sequences, T columns of the batch, R documents, L tokens of the longest.
"""

import inspect
from typing import NamedTuple

import torch
from transformers import Cache, GenerationMixin

from hsa_tl.model.generate import SEGMENT
from hsa_tl.model.model import Model
from hsa_tl.validation import require, shape_of

CACHE_NAMES = ("past_key_values", "cache")  # transformers renames the argument in 5.24
CACHE_NAME = CACHE_NAMES["cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]

MEMORY_OPTIONS = ("undo", "offload", "cache_pages", "two_level", "directory", "budget")


class Rows(NamedTuple):
    """The documents of a batch as rows that are padded on the right; without columns they are the batch's own."""

    lengths: list[int]
    columns_RL: torch.Tensor | None = None  # of the flat batch [B * T], 0 behind a row's last token
    real_BT: torch.Tensor | None = None  # which columns hold a token
    row_BT: torch.Tensor | None = None
    # Where a column's token stands in its row; padding shows the token before it, and the first one before all.
    place_BT: torch.Tensor | None = None

    def take(self, x: torch.Tensor, padding: int | None = None) -> torch.Tensor:
        """x [B, T, ...] as [R, L, ...], with the padding, if that is given, where rows hold no token."""
        if self.columns_RL is None:
            return x
        x = x.flatten(0, 1)[self.columns_RL]
        ends = torch.tensor(self.lengths, device=x.device)[:, None]
        return x if padding is None else x.masked_fill(torch.arange(x.shape[1], device=x.device) >= ends, padding)

    def put(self, x_RL: torch.Tensor, columns: slice | torch.Tensor = slice(None), keep: int | None = None):
        """[R, L, ...] as [B, columns, ...]. keep: x is of each row's last so many tokens, and so are the columns."""
        if self.columns_RL is None:
            return x_RL if keep or columns == slice(None) else x_RL[:, columns]
        place_BT = self.place_BT
        if keep:
            first = torch.tensor(self.lengths, device=x_RL.device)[:, None] - keep
            place_BT = (place_BT - first).clamp(0, keep - 1)
        return x_RL[self.row_BT[:, columns], place_BT[:, columns]]


def arrange(real_BT: torch.Tensor, starts_BT: torch.Tensor | None = None) -> Rows:
    """The rows of a batch. real: which columns hold a token. starts: which of these begin a document."""
    order_BT = real_BT.long().cumsum(1)
    first_BT = real_BT & (order_BT == 1)
    starts_BT = first_BT if starts_BT is None else first_BT | (starts_BT & real_BT)
    documents = starts_BT.sum(1).clamp(min=1)
    row_BT = (documents.cumsum(0) - documents)[:, None] + (starts_BT.long().cumsum(1) - 1).clamp(min=0)
    R = int(documents.sum())
    lengths = torch.bincount(row_BT[real_BT], minlength=R)
    before_B = real_BT.sum(1).cumsum(0) - real_BT.sum(1)  # tokens of the sequences before
    rank_BT = before_B[:, None] + (order_BT - 1).clamp(min=0)  # of a column's token among all
    place_BT = rank_BT - (lengths.cumsum(0) - lengths)[row_BT]
    columns_RL = torch.zeros(R, max(1, int(lengths.max())), dtype=torch.int64, device=real_BT.device)
    columns_RL[row_BT[real_BT], place_BT[real_BT]] = real_BT.flatten().nonzero()[:, 0]
    return Rows(lengths.tolist(), columns_RL, real_BT, row_BT, place_BT)


def read_positions(position_ids: torch.Tensor, real_BT: torch.Tensor, past: list[int]) -> torch.Tensor:
    """Which columns begin a document: where positions start again at 0. past: tokens that each sequence holds."""
    B, T = real_BT.shape
    require(
        tuple(position_ids.shape) in ((1, T), (B, T)), "position_ids", f"have shape {[B, T]}", shape_of(position_ids)
    )
    position_BT = position_ids.long().expand(B, T)
    first = torch.tensor(past, device=real_BT.device)[:, None]
    previous = torch.cat([first - 1, position_BT], 1)
    # The column of the token before each column, padding left out; 0 is the past.
    column = torch.arange(1, T + 1, device=real_BT.device) * real_BT
    column = torch.cat([torch.zeros_like(column[:, :1]), column.cummax(1).values[:, :-1]], 1)
    goes_on = position_BT == previous.gather(1, column) + 1
    starts = (position_BT == 0) & (first == 0)
    if not bool((goes_on | starts | ~real_BT).all()):
        raise ValueError(
            "position_ids must count a sequence's tokens one by one, from 0 where a document begins and from the "
            f"cache's {past} where it goes on, got {position_ids.tolist() if T <= 32 else 'others'}"
        )
    return starts


def read_mask(mask: torch.Tensor, B: int, T: int, past: list[int], columns: int):
    """real [B, T], and which columns begin a document or None, of an attention mask of any form that the model has.

    Two dimensions [B, T] or [B, columns + T], columns being those that were read before: bool or 0 and 1, or additive
    (0 and negative). Three or four, [B, (1,) T, ...], where they say what the model does: each token sees its own
    document's tokens up to itself; or [B, 1, 1, T], padding alone. ValueError: anything else.
    """
    shape = list(getattr(mask, "shape", ()))
    if not isinstance(mask, torch.Tensor) or len(shape) not in (2, 3, 4):
        raise ValueError(f"attention_mask must be a tensor of 2, 3 or 4 dimensions, got {type(mask).__name__} {shape}")
    if shape[0] not in (1, B) or shape[-1] not in (T, columns + T):
        rule = f"[{B}, {T}]" + (f" or [{B}, {columns + T}]" if columns else "")
        raise ValueError(f"attention_mask must have shape {rule}, or its square, got shape {shape}")
    seen = _seen(mask)
    if shape[1:-1] == [1, 1] and T > 1:
        seen = seen[:, 0, 0]
    if seen.ndim == 2:
        real, before = seen[:, -T:].expand(B, T), seen[:, :-T].sum(1)
        if shape[-1] > T and (before.expand(B)).tolist() != past:
            raise ValueError(f"attention_mask must show the {past} tokens that were read before, got {before.tolist()}")
        return real, None
    if seen.ndim == 4:
        if seen.shape[1] != 1 and not bool((seen == seen[:, :1]).all()):
            raise ValueError(f"attention_mask must be the same for all heads, got shape {shape}")
        seen = seen[:, 0]
    require(seen.shape[1] == T, "attention_mask", f"have a row for each of {T} tokens", f"shape {shape}")
    seen = seen.expand(B, T, -1)
    square = seen[..., -T:]
    # transformers lets rows of padding see everything, the future too.
    real = square.diagonal(dim1=1, dim2=2) & ~square.triu(1).any(-1)
    first = (square & real[:, None]).byte().argmax(-1)  # of the token's document
    starts = real & (first == torch.arange(T, device=mask.device))
    document = starts.long().cumsum(1)
    want = (document[:, :, None] == document[:, None]) & real[:, None] & torch.ones_like(square[0]).tril()
    old_BT = seen[..., :-T].sum(-1)
    old = torch.tensor(past, device=mask.device)[:, None]
    if not bool(((square == want).all(-1) | ~real).all()) or (shape[-1] > T and bool(((old_BT != old) & real).any())):
        raise ValueError(
            "attention_mask must let each token see its document's tokens up to itself and no others: this model has "
            f"no other mask, got one of shape {shape}"
        )
    return real, starts


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """bool: True where a mask lets see."""
    if mask.dtype == torch.bool:
        return mask
    low, high = (float(x) for x in mask.aminmax()) if mask.numel() else (0.0, 0.0)
    additive = mask.is_floating_point() and (low < 0 or (mask.ndim > 2 and high == 0))
    if additive:
        far = float(mask[mask < 0].max()) if low < 0 else -torch.inf
        if high > 0 or far > -1e3:  # a bias is not a mask
            raise ValueError(f"attention_mask must be 0 and negative enough to mask (-1e3), got {max(far, high)}")
        return mask == 0
    seen = mask == 1
    require(bool((seen | (mask == 0)).all()), "attention_mask", "be 0 and 1", f"values from {low} to {high}")
    return seen


class HSACache(Cache):
    """An hsa_tl.model.cache.Cache where transformers expects past_key_values. It only grows.

    Args:
        capacity (int): tokens of a sequence to make room for at first. Default: 16384.
        memory_options: of `Model.new_cache`: undo, offload, cache_pages, two_level, directory, budget.
    """

    is_compileable = is_croppable = False
    is_linear = is_sliding = (False,)  # transformers asks for each layer; without any it would take all for recurrent

    def __init__(self, capacity: int = 1 << 14, **memory_options):
        super().__init__(layers=[])
        if unknown := memory_options.keys() - MEMORY_OPTIONS:
            raise TypeError(f"memory_options must be among {', '.join(MEMORY_OPTIONS)}, got {min(unknown)}")
        self.options = {"capacity": capacity, **memory_options}
        self.reset()

    def reset(self) -> None:
        """Forgets every token, and how many sequences there were."""
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
    require(len(given) < 2 or given[0] is given[1], "past_key_values and cache", "be one", "two")
    if given and not isinstance(given[0], HSACache):
        raise TypeError(f"past_key_values must be an HSACache, got {type(given[0]).__name__}")
    return given[0] if given else None


def read_rows(inputs, attention_mask, position_ids, cache: HSACache | None) -> Rows:
    B, T = inputs.shape[:2]
    if attention_mask is None and position_ids is None:
        return Rows([T] * B)
    past, columns = ([0] * B, 0) if cache is None else (cache.lengths(B), cache.columns)
    real_BT, starts_BT = torch.ones(B, T, dtype=torch.bool, device=inputs.device), None
    if attention_mask is not None:
        real_BT, starts_BT = read_mask(attention_mask, B, T, past, columns)
    if position_ids is not None:
        counted_BT = read_positions(position_ids, real_BT, past)
        if starts_BT is not None and not torch.equal(starts_BT[:, 1:], (counted_BT & real_BT)[:, 1:]):
            raise ValueError("position_ids must start again where attention_mask begins a document, got others")
        starts_BT = counted_BT
    if bool(real_BT.all()) and (starts_BT is None or not bool(starts_BT[:, 1:].any())):
        return Rows([T] * B)
    return arrange(real_BT, starts_BT)
