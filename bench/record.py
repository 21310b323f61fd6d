"""Benchmark rows: the one schema, where a number comes from, and files that are whole or absent."""

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

from hsa_tl.files import locked, write_atomic, write_together

CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = "unknown"  # commit
SOURCES = ("hsa_tl", "kernels_tilelang", "autotune", "model", "bench")  # folders of the package
GPU_STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass(frozen=True)
class Row:
    """One measurement; p20, p50, p80 are None where there is none, and note says why."""

    kernel: str
    provider: str
    mode: str  # of the suite: forward, backward, train = forward + backward, segment, decode, ...
    metric: str  # time, throughput, bandwidth, peak_extra_memory
    unit: str
    x_name: str
    x: int
    p20: float | None
    p50: float | None
    p80: float | None
    config: str
    selection: str
    device: str
    versions: str
    commit: str
    note: str = ""

    @property
    def key(self) -> tuple:
        return (self.kernel, self.provider, self.mode, self.metric, self.x, self.config, self.selection, self.device)


COLUMNS = [f.name for f in fields(Row)]


def json_list(rows: Iterable[dict]) -> str:
    """A JSON list with a row a line."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def read_json(path: Path) -> list[dict]:
    """Rows of a JSON list, each of a model; none if there is no file. ValueError: another file."""
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        if all({"model"} <= row.keys() for row in rows):
            return rows
    except (TypeError, AttributeError, ValueError):
        pass
    raise ValueError(f"{path} must hold rows that hsa-tl wrote, each with its model")


def merge_rows(path: Path, about: dict, rows: Iterable[dict]) -> list[dict]:
    """Rows of about's model and seed, with `about` in each, into a JSON list that keeps those of others; all of them.

    ValueError: not such a file.
    """
    rows = [about | row for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        kept = [row for row in read_json(path) if any(row.get(x) != about.get(x) for x in ("model", "seed"))]
        write_atomic(path, json_list(kept + rows))
    return kept + rows


def csv_text(rows: Iterable[dict], columns: Iterable[str]) -> str:
    """A CSV file of these columns, a row a line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_rows(rows: list[Row], folder: Path, name: str = "bench") -> None:
    """folder/name.csv and folder/name.json, sorted."""
    found = [asdict(r) for r in sorted(rows, key=lambda r: r.key)]
    write_together({folder / f"{name}.csv": csv_text(found, COLUMNS), folder / f"{name}.json": json_list(found)})


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, none if it does not exist. ValueError: a file of another schema."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        points = ("p20", "p50", "p80")
        try:
            return [Row(**r | {q: float(r[q]) if r[q] else None for q in points} | {"x": int(r["x"])}) for r in reader]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must hold rows that hsa-tl wrote, got {error}") from None


def read_folder(folder: Path) -> list[Row]:
    """Rows of all CSV files in the folder. ValueError: none there, or a file of another schema."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read_rows(path)]
    if not rows:
        raise ValueError(f"folder must hold rows of a benchmark, got none in {folder}")
    return rows


def package_versions() -> dict[str, str]:
    """Versions of what a number depends on, without importing any of it."""
    out = {"python": platform.python_version()}
    for name in ("hsa-tl", "torch", "triton", "tilelang"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def versions() -> str:
    return ", ".join(f"{k} {v}" for k, v in package_versions().items())


def field(path: str | Path, name: str) -> str:
    """What stands behind a name in a file of /proc or /sys. OSError: no such file or name."""
    if found := re.search(rf"^{name}\s*:?\s*(.+)$", Path(path).read_text(), re.M):
        return found[1]
    raise OSError(f"{path} has no {name}")


def memory_limit_bytes() -> int:
    """The memory this process may use: the control group's limit or the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return total


def free_bytes(device: str) -> int:
    """Memory that this process may still take on the device."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = memory_limit_bytes()
    with contextlib.suppress(OSError):
        free = min(free, 1024 * int(field("/proc/meminfo", "MemAvailable").split()[0]))
    with contextlib.suppress(OSError):
        used = int((CGROUP / "memory.current").read_text()) - int(field(CGROUP / "memory.stat", "inactive_file"))
        free = min(free, memory_limit_bytes() - used)
    return free


def device_state(device: str) -> str:
    """Clocks, power and temperature of a GPU as nvidia-smi gives them now; "" for a CPU."""
    if torch.device(device).type != "cuda":
        return ""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader"]
    try:
        index = torch.cuda.get_device_properties(device).uuid
        run = subprocess.run([*command, f"--id=GPU-{index}"], check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return f"clocks and power unknown: {type(error).__name__}"
    return ", ".join(f"{name} {value}" for name, value in zip(GPU_STATE, run.stdout.strip().split(", "), strict=True))


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its threads and memory limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = field("/proc/cpuinfo", "model name")
    return f"{model}, {torch.get_num_threads()} threads, {memory_limit_bytes() / 2**30:.0f} GiB memory limit"


def commit() -> str:
    """HSA_TL_COMMIT where it is set, else the checkout's commit, with -dirty and a digest of what is changed or new."""
    root = Path(__file__).resolve().parent.parent
    if named := os.environ.get("HSA_TL_COMMIT"):
        return named
    if not (root / ".git").exists():
        return UNKNOWN

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", root, *args], check=True, capture_output=True, text=True).stdout.strip()

    try:
        # Results are written while measuring: they are no change of what is measured.
        changes = git("diff", "HEAD", "--", ".", ":!bench/results").encode()
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES, ":!bench/results").split("\0")
        changes += b"".join(name.encode() + (root / name).read_bytes() for name in new if name)
        digest = "-dirty-" + hashlib.sha256(changes).hexdigest()[:8] if changes else ""
        return git("rev-parse", "--short=12", "HEAD") + digest
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def origin(device: str) -> dict[str, str]:
    """Where a figure comes from."""
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def same_source(found: dict, source: dict) -> bool:
    """Whether a figure comes from there too, so that it need not be measured again; never if the commit is unknown."""
    return source["commit"] != UNKNOWN and source.items() <= found.items()
