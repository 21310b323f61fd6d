"""What a benchmark is made of: providers that do the same work, a gate, and what the work costs. sweep.py runs any."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hsa_tl import cases
from hsa_tl.cases import Case
from hsa_tl.files import sha256_of
from hsa_tl.problem import Problem


class Work(NamedTuple):
    """What one call does at least, whatever runs it."""

    flops: int
    moved_bytes: int  # every input read once, every output written once
    held_bytes: int = 0  # beyond inputs and outputs; known only where it may be more than the machine has
    note: str = ""  # what of the problem was timed, where it is not all


class Suite(ABC):
    """A kind of measurement: its providers, modes and inputs. One instance for one sweep; it may cache."""

    name: str
    # The operation that each provider computes; dense_attention is what the others are held against.
    providers: ClassVar[Mapping[str, str]]
    # By type of device: what a sweep takes by itself, where it is not all.
    defaults: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    modes: tuple[str, ...]
    default_modes: tuple[str, ...] = ()  # (): all
    selections: tuple[str, ...] = ("random",)  # kinds
    default_case = "k16-d64"
    cpu_lengths: str  # by default, as `hsa-tl bench --lengths` takes them
    cuda_lengths: str
    multiple_of_chunk = False  # whether T must be one of S
    dims = "HQ={p.HQ} H={p.H} D={p.D} S={p.S} K={p.K}"  # what its rows say of a problem p

    @abstractmethod
    def gate_problem(self, problem: Problem) -> Problem:
        """The small problem that the gate compares at."""

    @abstractmethod
    def gate(self, name: str, problem: Problem) -> list[str]:
        """What is wrong with the provider's results for a gate_problem."""

    @abstractmethod
    def inputs(self, problem: Problem, selection: str) -> Any:
        """What `call` takes, on the problem's device."""

    @abstractmethod
    def call(self, name: str, problem: Problem, inputs: Any, mode: str) -> Callable[[], object]:
        """One call of the provider, without arguments: what is timed."""

    @abstractmethod
    def work(self, name: str, problem: Problem, mode: str) -> Work:
        """FLOPs and bytes of a call."""

    def unavailable(self, name: str, problem: Problem, mode: str) -> str | None:
        """Why the provider cannot run here, precisely, or None."""
        return None

    def does(self, name: str, mode: str, selection: str) -> bool:
        """Whether mode and kind of selection mean anything for the provider; if not, it has no row."""
        return True

    def find_case(self, name: str) -> Case:
        """The case of that name. ValueError lists the names."""
        return cases.case(name)

    def input_bytes(self, problem: Problem) -> int:
        """What `inputs` takes, where it may be more than the machine has."""
        return 0

    def label(self, p: Problem) -> str:
        """The problem without its length."""
        return f"{self.dims.format(p=p)} {p.dtype_name}".strip()


def parse_selection(text: str) -> tuple[str, float]:
    """ "random", "full", "text", "trained=FILE", "overlap" or "overlap=0.8" to its kind and share of overlap.

    ValueError otherwise.
    """
    kind, equals, share = text.partition("=")
    if kind == "trained" and share:
        return kind, 0.0
    try:
        overlap = float(share) if equals else 0.8
    except ValueError:
        overlap = -1.0
    if kind not in ("random", "overlap", "full", "text") or not 0 <= overlap <= 1 or (equals and kind != "overlap"):
        raise ValueError(f"selection must be one of random, overlap=0..1, full, text, trained=FILE, got {text!r}")
    return kind, overlap


def selection_label(text: str) -> str:
    """ "overlap=0.8" for "overlap", "trained=NAME-CHECKSUM" for a file, else the kind. OSError: it cannot be read."""
    kind, overlap = parse_selection(text)
    if kind == "trained":
        file = Path(text.partition("=")[2])
        return f"trained={file.stem}-{sha256_of(file)[:8]}"
    return f"overlap={overlap:g}" if kind == "overlap" else kind


def one_of(what: str, name: str, known) -> str:
    """name, or a ValueError that lists what is known."""
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    return name


def error_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]
