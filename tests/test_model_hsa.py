"""The layers: causal, incremental, trainable."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl.model import ChunkEncoder, HSALayer

S, C, T = 16, 32, 75


@pytest.fixture
def layers():
    encoder = ChunkEncoder(C, kv_heads=2, head_dim=16, retrieval_dim=8, chunk_size=S)
    return encoder, HSALayer(C, 4, 2, 16, 8, topk=3)


def test_learned_vectors_begin_as_small_as_asked():
    encoder = ChunkEncoder(1024, kv_heads=1, head_dim=16, retrieval_dim=8, chunk_size=S, std=0.3)
    for x in (encoder.cls_C, encoder.position_SC):
        assert x.mean().abs() < 0.05 and x.std().item() == pytest.approx(0.3, rel=0.1)


def test_a_later_token_changes_no_earlier_output(layers):
    encoder, layer = layers
    x = torch.randn(2, T, C)
    before = layer(x, encoder(x))
    for p in (0, S - 1, S, 2 * S, T - 1):
        changed = x.clone()
        changed[:, p:] = torch.randn(2, T - p, C)
        after = layer(changed, encoder(changed))
        torch.testing.assert_close(after[:, :p], before[:, :p])
        assert not torch.equal(after[:, -1], before[:, -1]) or p == T - 1


def test_segments_equal_one_shot(layers):
    """Prefill in segments, each over the memory of what came before and of itself."""
    encoder, layer = layers
    x = torch.randn(1, T, C)
    whole = layer(x, encoder(x))
    for cut in (1, S, 40):
        parts = [layer(x[:, :cut], encoder(x[:, :cut])), layer(x[:, cut:], encoder(x), start=cut)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_before_the_first_whole_chunk_the_output_is_zero(layers):
    encoder, layer = layers
    x = torch.randn(1, T, C)
    out = layer(x, encoder(x))
    assert (out[:, :S] == 0).all() and (out[:, S:] != 0).any(-1).all()


@pytest.mark.parametrize("heads", (2, 4))
def test_all_chunks_by_matrix_products_alone(heads, layers):
    """As the operator over every chunk; weights for each key/value head or each query head."""
    memory = layers[0](torch.randn(2, T, C))
    chunks = memory.landmarks.shape[1]
    q, weights = torch.randn(2, T, 4, 16), torch.rand(2, T, heads, chunks)
    every = torch.arange(chunks).int().expand(2, T, 2, -1)
    torch.testing.assert_close(memory.attend_all(q, weights), memory.attend(q, weights, every))
    torch.testing.assert_close(memory.masses_all(q), memory.masses(q, every))


@pytest.mark.parametrize("retrieval_heads", (1, 2))
def test_mass_is_one_softmax_with_a_bonus_for_each_key_of_a_chunk(retrieval_heads):
    """exp(s_c) sum_j exp(q . k_j) over the chosen chunks: their scores, added to the scores of their keys."""
    encoder = ChunkEncoder(32, 2, 16, 16, 16, retrieval_heads=retrieval_heads)
    layer = HSALayer(32, 4, 2, 16, 16, topk=3, fusion="mass", retrieval_heads=retrieval_heads)
    x = torch.randn(2, T, 32)
    memory = encoder(x)
    q, q_slc = layer.queries(x)
    scores, indices = memory.retrieve(q_slc, 0, 3)
    slots = indices[..., None] == torch.arange(memory.landmarks.shape[1])
    bonus = torch.where(slots, scores[..., None], -torch.inf).amax(-2)  # [B, T, R, chunks]
    bonus = bonus.repeat_interleave(4 // retrieval_heads, 2).repeat_interleave(16, 3).transpose(1, 2)
    k, v = (y.repeat_interleave(2, 2).transpose(1, 2) for y in (memory.k, memory.v))
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bonus).nan_to_num(0)
    torch.testing.assert_close(layer(x, memory), layer.out(want.transpose(1, 2).flatten(2)))
    strong = HSALayer(32, 4, 2, 16, 16, topk=3, fusion="mass", retrieval_heads=retrieval_heads, mass_power=2.5)
    strong.load_state_dict(layer.state_dict())
    indices = indices.repeat_interleave(2 // retrieval_heads, 2)
    weights = scores.repeat_interleave(4 // retrieval_heads, 2).exp() * memory.masses(q, indices).exp()
    weights = (weights**2.5).nan_to_num(0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(strong(x, memory), strong.out(memory.attend(q, weights, indices).flatten(2)))


def test_an_overlap_tells_a_chunk_what_stands_before_it():
    """So many tokens before each chunk, whoever gives them, and zeros before the first; without it none."""
    x = torch.randn(2, 3 * S, C)
    encoder = ChunkEncoder(C, 2, 16, 8, S, overlap=3)
    whole = encoder(x)
    for i, past in enumerate((None, x[:, S - 3 : S], x[:, 2 * S - 3 : 2 * S])):
        part = encoder(x[:, i * S : (i + 1) * S], past_BPC=past)
        torch.testing.assert_close(part.landmarks, whole.landmarks[:, i : i + 1])
        torch.testing.assert_close(part.k, whole.k[:, i * S : (i + 1) * S])
        torch.testing.assert_close(part.v, whole.v[:, i * S : (i + 1) * S])
    x.requires_grad_()
    for overlap in (0, 1, 3, S + 2):
        encoder = ChunkEncoder(C, 2, 16, 8, S, overlap=overlap)
        (gradient,) = torch.autograd.grad(encoder(x).landmarks[:, 2].square().sum(), x)
        assert gradient.any(-1).any(0).nonzero()[[0, -1], 0].tolist() == [2 * S - overlap, 3 * S - 1]


def test_every_parameter_gets_a_gradient(layers):
    encoder, layer = layers
    x = torch.randn(1, T, C)
    layer(x, encoder(x)).square().sum().backward()
    for name, p in [*encoder.named_parameters(), *layer.named_parameters()]:
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_it_learns_to_copy_from_the_chunk_it_must_find():
    """The landmark of one chunk carries the token's key; the layer must learn to retrieve and read that chunk."""
    torch.manual_seed(0)
    encoder = ChunkEncoder(C, kv_heads=1, head_dim=32, retrieval_dim=16, chunk_size=S)
    layer = HSALayer(C, 2, 1, 32, 16, topk=4)
    with torch.no_grad():
        layer.q_slc.weight.copy_(encoder.landmark.weight)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *layer.parameters()], 3e-3)
    losses = []
    for _ in range(120):
        keys = torch.nn.functional.normalize(torch.randn(8, 4, C // 2), dim=-1) * 4
        values = torch.randn(8, 4, C // 2)
        x = torch.cat([torch.cat([keys, values], -1).repeat_interleave(S, 1), torch.zeros(8, 1, C)], 1)
        target = torch.randint(4, (8,))
        x[:, -1, : C // 2] = keys[torch.arange(8), target]
        out = layer(x[:, -1:], encoder(x), start=4 * S)[:, 0, C // 2 :]
        loss = (out - values[torch.arange(8), target]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.5 * first, (first, last)


def test_landmarks_without_norm_keep_their_size():
    """Keys and values are the same, and landmarks are linear in their projection of the [CLS]."""
    encoders = [ChunkEncoder(32, 1, 16, 8, 16, landmark_norm=on) for on in (True, False)]
    encoders[1].load_state_dict({k: v for k, v in encoders[0].state_dict().items() if k != "landmark_norm.weight"})
    x = torch.randn(2, 40, 32)
    for encoder, size in zip(encoders, (1.0, 3.0), strict=True):
        before = encoder(x)
        with torch.no_grad():
            encoder.landmark.weight.mul_(3)
        torch.testing.assert_close(encoder(x).landmarks, size * before.landmarks)
    assert all(torch.equal(a, b) for a, b in zip(encoders[0](x)[:2], encoders[1](x)[:2], strict=True))
    with torch.no_grad():
        for block in encoders[1].blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
        cls = encoders[1].cls_C + encoders[1].position_SC[16]
        torch.testing.assert_close(encoders[1](x).landmarks, encoders[1].landmark(cls).expand(2, 3, 1, 8))
