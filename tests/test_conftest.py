"""The gpu rule: a test marked gpu skips where there is no GPU, and may not skip where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiers import prove

TEST = """
import pytest

@pytest.mark.gpu
def test_runs():
    pass

@pytest.mark.gpu
def test_skips():
    pytest.skip("no reason")

def test_plain():
    pytest.skip("other tests may")
"""


@pytest.mark.parametrize(
    "available, capability, outcome",
    [
        (True, (9, 0), "1 failed, 1 passed, 1 skipped"),
        pytest.param(False, (0, 0), "3 skipped", marks=prove),
        pytest.param(True, (8, 0), "1 skipped, 2 errors", marks=prove),
    ],
    ids=["hopper", "no-gpu", "ampere"],
)
def test_gpu_tests_may_not_skip_on_a_gpu(tmp_path, available, capability, outcome):
    pretend = (
        "import torch\n"
        f"torch.cuda.is_available = lambda: {available}\n"
        f"torch.cuda.get_device_capability = lambda *_: {capability}\n"
    )
    (tmp_path / "conftest.py").write_text(pretend + (Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    *_, closing, last = result.stdout.splitlines()
    if available:  # no gpu test may skip
        assert outcome in last, result.stdout + result.stderr
    else:
        assert outcome in closing and last.startswith("not proven here: 2 gpu tests ("), result.stdout + result.stderr
    assert result.returncode == available
    assert ("a gpu test may not skip where there is a GPU" in result.stdout) == available
