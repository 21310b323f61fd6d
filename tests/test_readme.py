"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_snippets():
    operator, layer, model = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(operator, names)
    q, k, q_slc, landmarks = (torch.randn(1, n, h, 64) for n, h in ((256, 4), (256, 1), (256, 1), (4, 1)))
    assert names["attend"](q, k, k, q_slc, landmarks).shape == q.shape
    exec(layer, names)
    assert names["MyModel"]()(torch.randn(2, 130, 256)).shape == (2, 130, 256)
    exec(model, {"input_ids": torch.randint(0, 320, (1, 40)), "segment": torch.randint(0, 320, (1, 100))})
