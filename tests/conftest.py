"""Fixtures of all tests: seeds from the node id, poisoned memory, hypothesis profiles, and the gpu rule.

A test marked `gpu` skips where there is no Hopper GPU. Where torch sees any GPU, a skipped gpu test fails.
"""

import os
import zlib

import hypothesis
import pytest
import torch

# Tensors are tiny: under xdist, threads of one worker would only spin against those of the other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
torch.utils.deterministic.fill_uninitialized_memory = True

generate = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
# Shrinking recompiles kernels for minutes; a failing example is a line of dims and a seed anyway.
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=50, phases=generate, **common)
hypothesis.settings.register_profile("explore", max_examples=500, **common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def no_hopper() -> str | None:
    """Why gpu tests cannot run here."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs a Hopper GPU: this one has compute capability {major}.{minor}"


def pytest_runtest_setup(item):
    reason = no_hopper() if item.get_closest_marker("gpu") else None
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and torch.cuda.is_available():
        report.outcome = "failed"
        report.longrepr = f"a gpu test may not skip where there is a GPU: {report.longrepr}"
    return report
