"""Features of text: rare n-grams count more, and every vector has the same length."""

import math
from dataclasses import replace

import pytest
import torch

from hsa_tl import api, cases, text

SMALL = cases.at_length(cases.on_cpu(cases.case("k16-d64").problem), 640, HQ=6, H=2, D=32, S=16, K=4)
WORDS = b"".join(f"line {i}: the key of {i % 97} is {i * i % 1009}\n".encode() for i in range(60))


def test_files_are_read_until_there_is_enough():
    every = text.read_corpus()
    first = every.files[1][1]  # bytes of the first file
    for at_least, n in ((first, 1), (first + 1, 2)):
        assert text.read_corpus(at_least=at_least).files == every.files[:n]


def test_unions_are_of_tokens_that_have_a_choice():
    """Of those that see more than K chunks, two at a time: 3 and 2 distinct chunks of one head, 4 of the other."""
    indices = torch.zeros(1, 3 * 16 + 16, 2, 2, dtype=torch.int32)
    indices[0, 3 * 16 :, 0] = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]]).repeat(4, 1)
    indices[0, 3 * 16 :, 1] = torch.arange(32).view(16, 2)
    assert text.choosing(indices, 16).shape == (1, 16, 2, 2)
    assert text.union_size(indices, 16, 2) == (3 + 2 + 4 + 4) / 4
    with pytest.raises(ValueError, match="must hold at least 64 tokens for K = 2, S = 16, got 63"):
        text.choosing(indices[:, 1:], 16)


def test_an_n_gram_counts_by_the_chunks_that_hold_it():
    """Once for each: log(chunks / chunks that hold it)."""
    buckets = torch.tensor([[7, 7, 1, 2], [7, 3, 3, 4], [7, 5, 6, 1]])
    held = {7: 3, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    want = torch.tensor([math.log(3 / held[x]) for x in buckets.flatten().tolist()])
    torch.testing.assert_close(text._rarity(buckets.flatten(), 4), want)


def test_features_have_a_mean_square_of_one():
    f = text.text_features(WORDS, SMALL, retrieval_dim=16)
    for name in ("landmarks", "k", "v", "q", "q_slc"):
        x = getattr(f, name)
        x = x[:, 8:] if name.startswith("q") else x  # the first query heads look back past the first byte
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]), msg=name)


def test_the_chunk_that_says_the_same_is_found(monkeypatch):
    """A text whose last chunk repeats an earlier one."""
    T, S = SMALL.T, SMALL.S
    data = WORDS[: T - S] + WORDS[5 * S : 6 * S]
    monkeypatch.setattr(text, "WINDOW", S)
    f = text.text_features(data, SMALL)
    _, indices = api.retrieve_chunks(f.q_slc, f.landmarks, 1, chunk_size=S)
    assert (indices[0, -1] == 5).all()
    with pytest.raises(ValueError, match="problem must have B = 1 for text, got B = 2"):
        text.text_features(data, replace(SMALL, B=2))
