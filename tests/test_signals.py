"""SIGINT and SIGTERM end training with a checkpoint, from which it goes on to the bit."""

import signal

import pytest
from test_train import assert_same, toy, weights
from typer.testing import CliRunner

from hsa_tl.cli import app
from hsa_tl.model import checkpoint
from hsa_tl.model import train as training


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_training_with_a_checkpoint(tmp_path, number):
    recipe = toy(checkpoint_every=1000)
    whole = weights(training.train(recipe, tmp_path / "whole"))
    handler, run = signal.getsignal(number), tmp_path / "run"

    def on_step(step):
        if step.step == 1:
            signal.raise_signal(number)

    with pytest.raises(training.Interrupted, match=f"{number.name} ended training .*: 3 of 6 steps are in"):
        training.train(recipe, run, on_step=on_step)
    assert signal.getsignal(number) is handler and checkpoint.latest(run).step == 3
    assert_same(weights(training.train(recipe, run)), whole)


def test_a_second_signal_ends_training_at_once(tmp_path):
    def on_step(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        training.train(toy(checkpoint_every=1000), tmp_path, on_step=on_step)
    assert not isinstance(stop.value, training.Interrupted) and checkpoint.latest(tmp_path) is None


def test_the_callers_own_handler_stays(tmp_path):
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        training.train(toy(steps=2), tmp_path, on_step=lambda step: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM] * 2


def test_the_command_says_what_a_signal_left(tmp_path, monkeypatch):
    """And what there was to warn of."""
    (tmp_path / "step-00000009").mkdir()
    step = training.train_step

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(training, "train_step", interrupted)
    monkeypatch.setattr("hsa_tl.model.cli.load_recipe", lambda name: toy())
    result = CliRunner().invoke(app, ["train", "toy", "--out", str(tmp_path), "--device", "cpu", "--threads", "1"])
    assert result.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM ended training with a checkpoint: 1 of 6 steps are in" in result.output
    assert "skipped a torn checkpoint" in result.output
