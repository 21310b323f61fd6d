"""An agenda: steps in order within a budget of time, each recorded at once, so that the next machine goes on."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hsa_tl.files import write_atomic


@dataclass(frozen=True)
class Step:
    """A part of the agenda. run(seconds left) returns a detail for the record and raises when the step fails."""

    name: str
    run: Callable[[float], dict]
    share: float  # of the whole budget, at most
    required: bool = False  # its failure ends the agenda


@dataclass
class State:
    """What is done, for one device, commit and set of versions; another of these starts anew."""

    device: str
    commit: str
    versions: str
    steps: dict[str, dict] = field(default_factory=dict)


def read_state(path: Path, device: str, commit: str, versions: str) -> State:
    """The state in path if it is of the same device, commit and versions, else an empty one."""
    new = State(device, commit, versions)
    if not path.is_file():
        return new
    old = State(**json.loads(path.read_text()))
    return old if (old.device, old.commit, old.versions) == (device, commit, versions) else new


def run_agenda(steps: list[Step], state: State, path: Path, seconds: float, clock=time.monotonic) -> bool:
    """Runs the steps that are not done yet, in order, and records each at once. False if a step failed.

    A failed step is tried again by the next run; a failed required step ends this one.
    """
    end, ok = clock() + seconds, True
    for step in steps:
        if state.steps.get(step.name, {}).get("status") == "done":
            continue
        left = min(end - clock(), step.share * seconds)
        if left <= 0:
            state.steps[step.name] = {"status": "no time left"}
            continue
        begin = clock()
        try:
            detail = step.run(left)
            status = "done" if detail.pop("finished", True) else "unfinished"
        except Exception as error:
            status, detail, ok = "failed", {"error": f"{type(error).__name__}: {error}"[-2000:]}, False
        state.steps[step.name] = {"status": status, "seconds": round(clock() - begin, 1), **detail}
        write_atomic(path, json.dumps(asdict(state), indent=1) + "\n")
        if status == "failed" and step.required:
            break
    write_atomic(path, json.dumps(asdict(state), indent=1) + "\n")
    return ok
