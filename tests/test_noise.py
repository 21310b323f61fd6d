"""`hsa-tl eval noise`: scores by the gradient against its definition, against leaving chunks out, and on needles."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_eval import invoke, trained
from token_files import write_tokens

from hsa_tl.bench.noise import Prediction, run_noise
from hsa_tl.model import Model, load, preset
from hsa_tl.model.evaluate import needle_samples

TARGETS = np.arange(150, 166)


def prediction(seed: int = 0, **changes) -> Prediction:
    """Of an untrained model in float64, two HSA layers, a last chunk that is not whole."""
    torch.manual_seed(seed)
    model = Model(replace(preset("tiny"), **{"layers": 4, "groups": 2, "topk": 8} | changes)).double().eval()
    for layer in model.layers[2:]:
        torch.nn.init.zeros_(layer.hsa.log_slc_scale)  # weights near even: no chunk has all of a token's
    return Prediction(model, np.random.default_rng(seed).integers(0, 320, 170), TARGETS)


@pytest.mark.parametrize(
    "changes",
    ({}, {"fusion": "softmax1"}, {"fusion": "mass"}, {"topk": "all", "impl": "dense"}, {"recency": 4}),
    ids=str,
)
def test_scores_are_the_gradient_of_the_models_loss(changes):
    asked = prediction(**changes)
    logits = asked.model(torch.from_numpy(np.random.default_rng(0).integers(0, 320, 170))[None]).logits[0, TARGETS - 1]
    bits = torch.nn.functional.cross_entropy(logits, asked.wanted) / np.log(2)
    torch.testing.assert_close(asked.loss(asked.zeros_N), bits)
    scores, step = asked.scores((1.0,)), 1e-5
    for chunk in (0, 4, 8):
        shift = torch.zeros_like(asked.zeros_N)
        shift[chunk] = step
        slope = (asked.loss(shift) - asked.loss(-shift)) / (2 * step)
        assert scores[chunk] == pytest.approx(-slope.item(), rel=1e-5, abs=1e-12) and scores[chunk] != 0
    assert not scores[10:].any()  # its last chunk is not whole, and what no target sees has no score


def test_scores_rank_chunks_as_leaving_them_out_does():
    """Spearman's correlation is above 0.8, and 7 of 8 signs agree, where no prediction is sure."""
    signs = []
    for seed in range(4):
        asked = prediction(seed)
        scores, without = asked.scores((1.0,))[:10], [asked.without(chunk) for chunk in range(10)]
        assert spearmanr(scores, without).statistic > 0.8
        assert scores.sum() == pytest.approx(0, abs=1e-12)  # a softmax gives to others what it takes from one
        signs += (np.sign(scores) == np.sign(without)).tolist()
    assert sum(signs) >= 35


def test_a_needle_helps_most():
    """Its chunk has the greatest score, and the gradient of the model as it is, sure of its answer, does not see it."""
    model = load("needle-tiny")
    for task in ("s-niah", "mq-niah"):
        contexts = list(needle_samples(task, 512, 8))
        rows = list(run_noise(model, task, contexts))
        assert [row.best for row in rows] == [row.needle for row in rows]
        assert all(row.chunks[int(np.argmax(row.without))] == row.needle for row in rows)
        assert sum(row.gradient_best == row.needle for row in rows) < 4


def test_command(tmp_path):
    write_tokens(tmp_path / "text.bin", [b"the same words, " * 400])
    run = trained(tmp_path / "run", {"kind": "text", "path": str(tmp_path / "text.bin")})
    common = ("noise", "--data", tmp_path / "text.bin", "--out", tmp_path, "--threads", 1, "--samples", 2)
    invoke(*common, "--run", "needle-tiny", "--lengths", "256", "--tasks", "s-niah")
    output = invoke(*common, "--run", run, "--lengths", "256,512")
    rows = json.loads((tmp_path / "noise.json").read_text())
    assert [(r["model"], r["length"], r["targets"], r["needle"] is None) for r in rows] == [
        *[("needle-tiny", 256, 1, False)] * 2, *[("run", T, 16, True) for T in (256, 256, 512, 512)],
    ]  # fmt: skip
    assert all(r["commit"] and "torch" in r["versions"] and "threads" in r["device"] for r in rows)
    assert all(len(r["chunks"]) == len(r["scores"]) == len(r["without"]) >= 8 for r in rows)
    assert "the same" in output and "without it" in output and (tmp_path / "noise.png").stat().st_size > 5000
    assert "lengths must be at least 3 chunks of 16" in invoke(*common, "--run", run, "--lengths", "32", code=2)
    one = ("--run", "needle-tiny", "--lengths", "256", "--tasks", "s-niah", "--topk", 1)
    assert "model must weigh several chunks against each other, got topk 1" in invoke(*common, *one, code=2)
    with pytest.raises(ValueError, match="that weighs by scores, got hsa with fusion 'uniform'"):
        prediction(fusion="uniform")
    with pytest.raises(ValueError, match="must have HSA that weighs by scores, got swa"):
        Prediction(Model(replace(preset("tiny"), attention="swa")), np.zeros(9), TARGETS)
