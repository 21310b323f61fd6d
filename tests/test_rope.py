"""RoPE beyond its training length against the formulas of its papers, and attention's scale by the number of keys."""

import math
from dataclasses import replace

import pytest
import torch

from hsa_tl.model import Model, preset
from hsa_tl.model.attention import SelfAttention, rotate
from hsa_tl.model.rope import extended
from hsa_tl.model.train import reconfigure

FULL = replace(preset("tiny"), attention="full")
D, L = FULL.head_dim, 256


def scores(config, q, k, at):
    """Of queries and keys [1, T, 1, D] at positions `at`, as the model's attention has them."""
    theta = config.rope_frequencies or config.rope_theta
    q, k = (rotate(x, at, theta)[0, :, 0] for x in (q, k))
    return config.score_scale * q @ k.T


def test_position_interpolation_squeezes_positions():
    q, k, at = torch.randn(1, 40, 1, D), torch.randn(1, 40, 1, D), torch.arange(40) * 25
    torch.testing.assert_close(scores(extended(FULL, "pi", 4 * L, L), q, k, at), scores(FULL, q, k, at / 4))


def test_ntk_changes_the_base():
    """The fastest pair stays, the slowest turns a sixteenth as fast."""
    config = extended(FULL, "ntk", 16 * L, L)
    base = 10000.0 * 16 ** (D / (D - 2))
    assert config.rope_frequencies == pytest.approx([base ** (-2 * d / D) for d in range(D // 2)])
    slowest = 10000.0 ** (-(D - 2) / D)
    assert config.rope_frequencies[0] == 1 and config.rope_frequencies[-1] == pytest.approx(slowest / 16)


def test_yarn_interpolates_slow_pairs_only():
    """By turns within the trained length: over 32 stay, under one are interpolated whole, between by share."""
    s = 8
    config = extended(FULL, "yarn", s * L, L)
    shares = []
    for d, got in enumerate(config.rope_frequencies):
        f = 10000.0 ** (-2 * d / D)
        wavelength = 2 * math.pi / f
        shares.append(max(0, min(1, (L / wavelength - 1) / 31)))
        assert got == pytest.approx((1 - shares[-1]) * f / s + shares[-1] * f)
    assert shares[0] == 1 and shares[-1] == 0 and any(0 < x < 1 for x in shares)
    # The paper's 1 / t of the softmax(q k / (t sqrt(D))): sqrt(1 / t) = 0.1 ln s + 1.
    assert config.score_scale == pytest.approx((0.1 * math.log(s) + 1) ** 2)
    own = extended(replace(FULL, score_scale=3.0), "yarn", s * L, L)
    assert own.score_scale == pytest.approx(3 * config.score_scale)


@pytest.mark.parametrize("kind", ("pi", "ntk", "yarn"))
def test_a_trained_model_is_asked_with_it(kind):
    """The weights fit; nothing changes up to the trained length, and everything beyond."""
    model, ids = Model(FULL).eval(), torch.randint(320, (1, 300))
    before = model(ids).logits
    reconfigure(model, extended(FULL, kind, L, L))
    assert torch.equal(model(ids).logits, before)
    reconfigure(model, extended(FULL, kind, 300, L))
    assert not torch.isclose(model(ids).logits[:, 1:], before[:, 1:]).all(-1).any()
    cache = model.new_cache(1)
    parts = torch.cat([model(part, cache=cache).logits for part in ids.split((130, 1, 169), 1)], 1)
    torch.testing.assert_close(parts, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_scores_grow_with_the_logarithm_of_the_keys():
    """Those of a query that sees n keys are times log(n) / log(64): 0 for one, the same for 64."""
    plain, scaled = SelfAttention(16, 2, 1, 8), SelfAttention(16, 2, 1, 8, log_length=64)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 100, 16)
    (q, k, _, _), (q_log, k_log, _, _) = plain.project(x), scaled.project(x)
    n = torch.arange(1, 101)[:, None, None]
    torch.testing.assert_close(q_log, q * n.log() / math.log(64))
    assert torch.equal(k_log, k)
    torch.testing.assert_close(scaled.project(x, keep=7)[0], q_log[:, -7:])
    torch.testing.assert_close(scaled.project(x[:, 30:], 30)[0], q_log[:, 30:])


@pytest.mark.parametrize(
    "change, words",
    (
        ({"attention": "swa", "score_scale": 2.0}, "score_scale must be 1 without attention full, got 2.0"),
        ({"attention": "swa", "log_length": 64}, "log_length must be 0 without attention full, got 64"),
        ({"log_length": 1}, "log_length must be 0 or at least 2, got 1"),
        ({"rope_frequencies": (1.0,)}, r"rope_frequencies must hold 16 or none, got \(1.0,\)"),
    ),
)
def test_bad_options(change, words):
    with pytest.raises(ValueError, match=words):
        replace(FULL, **change)


def test_bad_scalings():
    with pytest.raises(ValueError, match="kind must be one of pi, ntk, yarn, got 'x'"):
        extended(FULL, "x", 512, 256)
    with pytest.raises(ValueError, match="config must have attention 'full', got 'hsa'"):
        extended(preset("tiny"), "pi", 512, 256)
    with pytest.raises(ValueError, match=r"config must have the frequencies of its rope_theta, got \(0.5"):
        extended(replace(FULL, rope_frequencies=(0.5,) * (D // 2)), "pi", 512, 256)
