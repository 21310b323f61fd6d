"""Fixtures of all tests: seeds from the node id, poisoned memory, hypothesis profiles, and the gpu rule.

A test marked `gpu` skips where there is no Hopper GPU. Where torch sees any GPU, a skipped gpu test fails. Where it
sees none and HSA_TL_EMULATE=1, those of impl="tilelang" run in the emulator, except those marked `device`.
The last line of a run says what it did not prove.
"""

import collections
import contextlib
import os
import signal
import tempfile
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.overrides import TorchFunctionMode

torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
torch.utils.deterministic.fill_uninitialized_memory = True

generate = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
# Shrinking recompiles kernels for minutes; a failing example is a line of dims and a seed anyway.
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=50, phases=generate, **common)
hypothesis.settings.register_profile("explore", max_examples=500, **common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_files(tmp_path_factory):
    """Compilers and launchers leave temporary files behind: here with pytest's own, of which it keeps three runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)  # asks the environment again
        yield


@pytest.fixture(autouse=True)
def _alike(request):
    """The same seed and threads whatever ran before; tensors are tiny, and a second thread would only spin."""
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def no_hopper() -> str | None:
    """Why gpu tests cannot run here."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs a Hopper GPU: this one has compute capability {major}.{minor}"


EMULATED = os.environ.get("HSA_TL_EMULATE") == "1" and not torch.cuda.is_available()
if EMULATED:
    import emulator


def not_emulated(item) -> str | None:
    """Why the emulator cannot run a gpu test."""
    impl = getattr(item, "callspec", None) and item.callspec.params.get("impl", "tilelang")
    if item.get_closest_marker("device") or impl not in (None, "tilelang"):
        return "needs the GPU itself: the emulator runs what TileLang compiles"
    return None


class OnTheHost(TorchFunctionMode):
    """What a test puts on "cuda" stays on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        args = ["cpu" if isinstance(x, str) and x == "cuda" else x for x in args]
        kwargs = {k: "cpu" if isinstance(x, str) and x == "cuda" else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _emulated(request):
    with contextlib.ExitStack() as stack:
        if EMULATED and request.node.get_closest_marker("gpu"):
            stack.enter_context(OnTheHost())
            stack.enter_context(emulator.attached())
        yield


def pytest_addoption(parser):
    parser.addoption("--passed", help="a file: what it says has passed is left out; it grows test by test")


def pytest_collection_modifyitems(config, items):
    if path := config.getoption("--passed"):
        passed = set(Path(path).read_text().splitlines())
        items[:] = [item for item in items if f"passed {item.nodeid}" not in passed]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := not_emulated(item) if EMULATED else no_hopper()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and torch.cuda.is_available():
        report.outcome = "failed"
        report.longrepr = f"a gpu test may not skip where there is a GPU: {report.longrepr}"
    if (path := item.config.getoption("--passed")) and (call.when == "call" or report.failed):
        with open(path, "a") as file:
            file.write(f"{report.outcome} {item.nodeid}\n")
    return report


def not_proven(reports, markexpr: str) -> list[str]:
    """What the run of these reports leaves open, a phrase each."""
    from hsa_tl.autotune import static

    skipped, lowered = collections.Counter(), set()
    for report in reports:
        if report.skipped and "gpu" in report.keywords:
            skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif "static" in report.keywords:
            lowered.add(report.nodeid)
    found = [f"{count} gpu tests ({reason})" for reason, count in skipped.most_common()]
    if lowered and (reason := static.missing_tools()):
        found.append(f"the assembly of {len(lowered)} static tests, which lower only ({reason})")
    if markexpr == "not prove":
        found.append("what make prove adds")
    return found


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Outermost, so behind the terminal's own last line."""
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        reports = [r for name in ("passed", "failed", "skipped") for r in terminal.stats.get(name, ())]
        if open_ends := not_proven(reports, session.config.option.markexpr):
            terminal.write_line(f"not proven here: {'; '.join(open_ends)}")
    return result
