"""NSA's three branches, as its formulas have them; what chooses chunks is learned; memory is linear in the tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsa_tl.model import Model, nsa, preset
from hsa_tl.model.attention import rotate
from hsa_tl.model.nsa import NativeSparseAttention

C, A, H, D, S, T = 32, 4, 2, 8, 16, 150
WINDOW, THETA = 20, 10000.0


def layer(**options):
    options = {"chunk_size": S, "topk": 4, "window": WINDOW, "rope_theta": THETA} | options
    return NativeSparseAttention(C, A, H, D, **options)


def attention(q, k, v, seen):
    """q [T, D], k and v [P, D], seen [T, P]: a row that sees nothing is 0; and its weights."""
    p = (q @ k.T / math.sqrt(D)).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return p @ v, p


def by_the_formulas(m, x):
    """Of one sequence x [T, C]: heads [T, A, D], and the chunks that each key/value head's queries chose."""
    t, n = torch.arange(T), T // S
    x = m.norm(x)
    turn = lambda y, at, theta: y if theta is None else rotate(y[None], at, theta)[0]  # noqa: E731
    q = m.q_norm(m.q(x).view(T, A, D))
    k_w, v_w = m.k_norm(m.k(x).view(T, H, D)), m.v(x).view(T, H, D)
    k_c, v_c, k_s, v_s = m.kv(x).view(T, 4, H, D).unbind(1)
    k_s = turn(m.selected_norm(k_s), t, m.far_theta)
    chunks = lambda y, h: y[: n * S, h].view(n, S, D)  # noqa: E731
    mlp = lambda f, y: f.vector(torch.nn.functional.silu(f.hidden((y + f.position_SD).flatten(1))))  # noqa: E731
    gates = torch.sigmoid(m.gate(x)).view(T, 3, A)
    whole = (torch.arange(n) + 1) * S <= t[:, None]
    near = (t <= t[:, None]) & (t > t[:, None] - WINDOW)
    out, chosen = torch.empty(T, A, D), []
    for h in range(H):
        k = turn(m.compressed_norm(mlp(m.compress_k, chunks(k_c, h)))[:, None], torch.arange(n) * S, m.far_theta)[:, 0]
        v = mlp(m.compress_v, chunks(v_c, h))
        heads = range(h * A // H, (h + 1) * A // H)
        far_q = {a: turn(q[:, a : a + 1], t, m.far_theta)[:, 0] for a in heads}
        read = {a: attention(far_q[a], k, v, whole) for a in heads}
        importance = sum(p for _, p in read.values())
        rows = []
        for row in range(T):
            past = row // S
            forced = {0, past - 1, past - 2} & set(range(past))
            rest = sorted(set(range(past)) - forced, key=lambda c, row=row: -importance[row, c].item())
            rows.append(sorted([*forced, *rest[: m.topk - len(forced)]]))
        chosen.append(rows)
        seen = torch.tensor([[p // S in row for p in range(T)] for row in rows])
        for a in heads:
            window = attention(turn(q[:, a : a + 1], t, THETA)[:, 0], turn(k_w, t, THETA)[:, h], v_w[:, h], near)[0]
            branches = read[a][0], attention(far_q[a], k_s[:, h], v_s[:, h], seen)[0], window
            out[:, a] = sum(gates[:, i, a : a + 1] * y for i, y in enumerate(branches))
    return out, chosen


@pytest.mark.parametrize("far_theta", (None, THETA), ids=("nope", "rope"))
def test_branches_and_gates(far_theta, monkeypatch):
    m, x = layer(far_theta=far_theta), torch.randn(2, T, C)
    asked = []
    run = nsa.selected_attention
    monkeypatch.setattr(nsa, "selected_attention", lambda *y, **z: asked.append(y[3]) or run(*y, **z))
    got, lse, _ = m.attend(x)
    assert lse is None
    for b in range(2):
        want, chosen = by_the_formulas(m, x[b])
        torch.testing.assert_close(got[b], want)
        assert [[[c for c in r if c >= 0] for r in rows] for rows in asked[0][b].transpose(0, 1).tolist()] == chosen
    torch.testing.assert_close(m.attend(x, keep=7)[0], got[:, -7:])


def test_the_first_and_the_nearest_are_selected_and_ties_go_to_the_lower():
    m = layer(topk=5)
    importance = torch.tensor([0, 0.1, 0.3, 0.3, 0.3, 0.3, 0, 0]).expand(1, 3, 1, 8)
    seen = torch.tensor([[True] * n + [False] * (8 - n) for n in (8, 2, 0)])
    assert m.select(importance, seen)[0, :, 0].tolist() == [[0, 2, 3, 6, 7], [0, 1, -1, -1, -1], [-1] * 5]
    many = torch.ones(1, 2000, dtype=torch.bool)
    assert m.select(torch.zeros(1, 1, 1, 2000), many).flatten().tolist() == [0, 1, 2, 1998, 1999]


def test_what_chooses_chunks_is_learned():
    """By the compression branch: where its heads should be a chunk's value, its keys change until that is selected."""
    torch.manual_seed(0)
    m, x = layer(), torch.randn(1, T, C)
    run, found = m._compressed, []
    m._compressed = lambda *y: found.append(run(*y)) or found[-1]
    m.attend(x)
    target = next(c for c in range(1, 6) if not (found[0][1][0, -1] == c).any())
    values = m.kv(m.norm(x))[:, : T // S * S].unflatten(2, (4, H, D))[:, :, 1].unflatten(1, (-1, S))
    wanted = m.compress_v(values).detach()[0, target].repeat_interleave(A // H, 0)
    optimizer = torch.optim.Adam(m.compress_k.parameters(), 0.05)
    for _ in range(30):
        m.attend(x)
        (found[-1][0][0, -1] - wanted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (found[-1][1][0, -1] == target).any(-1).all()


def test_a_block_of_tokens_at_a_time_changes_nothing(monkeypatch):
    m, x = layer(), torch.randn(2, T, C)

    def results():
        m.zero_grad()
        out = m.attend(x)[0]
        out.square().sum().backward()
        return [out, *(p.grad for n, p in m.named_parameters() if n != "out.weight")]

    whole = results()
    monkeypatch.setattr(nsa, "BLOCK_SCORES", 500)
    for got, want in zip(results(), whole, strict=True):
        torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(y, torch.Tensor) and "expand" not in str(func):
                self.elements = max(self.elements, y.untyped_storage().nbytes() // y.element_size())
        return out


def test_scores_of_all_tokens_never_exist_together(monkeypatch):
    monkeypatch.setattr(nsa, "BLOCK_SCORES", 1 << 14)
    monkeypatch.setattr(nsa, "selected_attention", lambda q, *_, **__: (q, None))
    tokens = 4096
    m, x = layer(), torch.randn(1, tokens, C)
    with Largest() as largest:
        m.attend(x)[0].sum().backward()
    assert 1 << 13 < largest.elements < tokens * (tokens // S) // 2


def test_a_top_k_without_room_for_the_forced_is_refused():
    for topk in (1, 2):
        with pytest.raises(ValueError, match=f"topk must be at least 3 with attention nsa, got {topk}"):
            replace(preset("tiny"), attention="nsa", topk=topk)


@pytest.mark.parametrize("impl", ("reference", "dense"))
def test_impl_reaches_the_selection(impl, monkeypatch):
    asked = []
    run = nsa.selected_attention
    monkeypatch.setattr(nsa, "selected_attention", lambda *y, **z: asked.append(z["impl"]) or run(*y, **z))
    Model(replace(preset("tiny"), attention="nsa", impl=impl, topk="all"))(torch.zeros(1, 40, dtype=torch.int64))
    assert asked == ["auto" if impl == "dense" else impl]
