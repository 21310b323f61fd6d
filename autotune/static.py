"""The static check: lower for sm_90a, assemble, read ptxas and SASS, predict. Needs nvcc and cuobjdump, no GPU."""

import errno
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from hsa_tl.autotune import cost
from hsa_tl.autotune.journal import Journal, key_of
from hsa_tl.bench import record
from hsa_tl.cases import Case
from hsa_tl.files import cache_folder, write_atomic
from hsa_tl.kernels_tilelang.config import PROGRAMS, describe, parse, problem_of, space
from hsa_tl.problem import Problem

COLUMNS = (
    "case", "program", "direction", "D", "G", "S", "K", "heads_w", "masked", "dtype", "config", "threads", "device",
    "registers", "spill_bytes", "smem_bytes", "ctas_per_sm", "hgmma", "hmma", "ns_per_pair", "limiter", "roofline_ns",
    "error", "versions", "commit",
)  # fmt: skip
READ = (
    "registers", "spill_bytes", "smem_bytes", "ctas_per_sm", "hgmma", "hmma", "copies", "work", "error",
)  # fmt: skip
BATCH = 3  # candidates of one run of nvcc, which spends most of its time on the headers
ASYNCHRONOUS = ("UTMALDG", "UBLKCP", "LDGSTS")  # TMA of a tile, of a run of bytes, and cp.async
# As compile.PASS_CONFIGS has TileLang call it.
NVCC_FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "--use_fast_math", "--cubin", "-w", "-Xptxas", "-v",
)  # fmt: skip


class MissingTool(FileNotFoundError):
    """nvcc or cuobjdump cannot be found."""


@dataclass(frozen=True)
class Assembled:
    """What ptxas and cuobjdump say of one program; smem_bytes is the static part."""

    registers: int
    spill_bytes: int
    smem_bytes: int
    sass: str


def find_tool(name: str) -> str | None:
    """Path of a CUDA tool: of NVIDIA's wheels, on PATH, under CUDA_HOME, or the one that triton's package carries.

    The wheels come first: they are of the versions that were tested together.
    """
    folders = []
    nvidia, triton = (importlib.util.find_spec(package) for package in ("nvidia", "triton"))
    if nvidia:  # nvidia/cu13/bin, and before CUDA 13 nvidia/<part>/bin
        folders += [str(p) for base in nvidia.submodule_search_locations for p in sorted(Path(base).glob("*/bin"))]
    folders += [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


WHEELS = {"nvcc": "nvidia-cuda-nvcc", "cuobjdump": "nvidia-cuda-cuobjdump"}


def missing_tools() -> str | None:
    """One line that says what the static check lacks, or None."""
    lacking = [name for name in WHEELS if find_tool(name) is None]
    if not lacking:
        return None
    return (
        f"the static check needs {' and '.join(lacking)} of the CUDA toolkit, 12.8 or later: on PATH, under CUDA_HOME, "
        f"or by pip install {' '.join(WHEELS[name] for name in lacking)}"
    )


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([find_tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout


def nvcc_release() -> str:
    return re.search(r"V([0-9.]+)", nvcc_version()).group(1)


def _cache_file(source: str) -> Path:
    text = nvcc_version() + " ".join(NVCC_FLAGS) + source
    return cache_folder() / "static" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def assemble_all(sources: list[str]) -> list[Assembled | Exception]:
    """Compiles CUDA sources of a kernel each for sm_90a, or why nvcc refuses one; cached by source and nvcc version.

    What is not cached goes through one run of nvcc, which then reads the headers once.
    """
    if reason := missing_tools():
        raise MissingTool(reason)
    todo = [x for x in dict.fromkeys(sources) if not _cache_file(x).is_file()]
    try:
        made = _nvcc(todo) if todo else []
    except RuntimeError as error:
        if len(sources) == 1:
            return [error]
        return [x for source in sources for x in assemble_all([source])]  # says which
    for source, result in zip(todo, made, strict=True):
        write_atomic(_cache_file(source), json.dumps(asdict(result)))
    return [Assembled(**json.loads(_cache_file(source).read_text())) for source in sources]


def _nvcc(sources: list[str]) -> list[Assembled]:
    """RuntimeError if nvcc refuses one of them, OSError if the disk is full."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    names = [re.search(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", x).group(1) for x in sources]
    own = [f"{name}_{i}" for i, name in enumerate(names)]
    text = "\n".join(re.sub(rf"\b{name}\b", new, x) for x, name, new in zip(sources, names, own, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder) / "program.cu", Path(folder) / "program.cubin"
        cu.write_text(text)
        includes = [f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
        run = subprocess.run(
            [find_tool("nvcc"), *NVCC_FLAGS, *includes, "-o", cubin, cu], capture_output=True, text=True
        )
        if run.returncode:
            kind = OSError if os.strerror(errno.ENOSPC) in run.stderr else RuntimeError
            raise kind(f"nvcc refused the program: {run.stderr[-800:]}")
        sass = subprocess.run(
            [find_tool("cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True
        )

    def parts(text: str, head: str) -> dict[str, str]:
        """Kernel name -> what stands between its head line and the next one's."""
        _, *found = re.split(head, text)
        return dict(zip(found[::2], found[1::2], strict=True))

    reports = parts(run.stderr, r"Compiling entry function '(\w+)'")
    programs = parts(sass.stdout, r"Function : (\w+)")

    def number(pattern: str, report: str) -> int:
        match = re.search(pattern, report)
        return int(match.group(1)) if match else 0

    made = []
    for name in own:
        report = reports[name]
        spills = number(r"(\d+) bytes spill stores", report) + number(r"(\d+) bytes spill loads", report)
        registers, smem = number(r"Used (\d+) registers", report), number(r"(\d+) bytes smem", report)
        made.append(Assembled(registers, spills, smem, programs[name]))
    return made


def barrier_in_elected_branch(source: str) -> bool:
    """Whether CUDA source waits at a barrier inside a branch that one elected thread takes: it would never return."""
    for found in re.finditer(r"if \(tl::tl_shuffle_elect<\d+>\(\)\) \{", source):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        if re.search(r"__syncthreads|__sync_thread_partial", source[found.end() : end]):
            return True
    return False


def ctas_per_sm(registers: int, smem: int, threads: int, device: cost.Device) -> int:
    """CTAs resident on an SM: registers by partition, shared memory with 1 KB reserved for each, 2048 threads."""
    warps = threads // 32
    warps_for_partition = device.registers // 4 // (-(-registers // 8) * 8 * 32)
    by_registers = warps_for_partition * 4 // warps
    by_smem = device.smem // (-(-smem // 128) * 128 + 1024)
    return max(0, min(by_registers, by_smem, 2048 // threads, 32))


def analyse(program: str, problem: Problem, options: list) -> list[dict]:
    """What lowering, ptxas and SASS say of configs of a program, assembled together; the same for any B, T, N and H.

    One that does not lower or assemble has its error, and None for the rest.
    """
    lowered = [_lower(program, problem, config) for config in options]
    made = iter(assemble_all([source for source, _ in lowered if isinstance(source, str)]))
    return [
        _read(problem, config, next(made) if isinstance(source, str) else source, dynamic)
        for config, (source, dynamic) in zip(options, lowered, strict=True)
    ]


def _lower(program: str, problem: Problem, config) -> tuple[str | Exception, int]:
    """The CUDA source, or why there is none, and the bytes of dynamic shared memory."""
    from hsa_tl.kernels_tilelang.compile import lower

    try:
        artifact = lower(program, problem, config)
        (function,) = artifact.device_mod.functions.values()
        dynamic = int(function.attrs["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in function.attrs else 0
        if barrier_in_elected_branch(artifact.kernel_source):
            raise RuntimeError("a barrier stands inside a branch that one elected thread takes")
    except OSError:  # such as a full disk: no property of the program
        raise
    except Exception as error:
        return error, 0
    return artifact.kernel_source, dynamic


def _read(problem: Problem, config, made: Assembled | Exception, dynamic: int) -> dict:
    found = dict.fromkeys(READ)
    if isinstance(made, Exception):
        return found | {"error": f"{type(made).__name__}: {str(made).strip().splitlines()[-1][:200]}"}
    sass, smem = cost.parse_sass(made.sass), dynamic + made.smem_bytes
    ctas = ctas_per_sm(made.registers, smem, config.total_threads(), cost.DEVICES["h100"])  # all are alike in this
    found |= {"registers": made.registers, "spill_bytes": made.spill_bytes, "smem_bytes": smem, "ctas_per_sm": ctas}
    found |= {"hgmma": cost.count(sass, "HGMMA"), "hmma": cost.count(sass, "HMMA")}
    found["copies"] = sum(cost.count(sass, op) for op in ASYNCHRONOUS)
    try:
        found["work"] = cost.pass_work(config, problem, sass)
    except ValueError as error:
        found["error"] = f"ValueError: {error}"
    return found


def row(case: str, program: str, problem: Problem, config, found: dict, device: str = "h200") -> dict:
    """One row of the static table: what analyse() found, and the prediction for a device."""
    gpu = cost.DEVICES[device]
    made = {"case": case, "program": program, "direction": config.DIRECTION, **problem.static_key(), **found}
    made |= {"config": describe(config), "threads": config.threads, "device": device}
    made |= {"roofline_ns": cost.roofline(config, problem, gpu)[0], "ns_per_pair": None, "limiter": None}
    if not found["error"]:
        ctas = max(1, found["ctas_per_sm"])
        made["ns_per_pair"], made["limiter"] = cost.predict(config, problem, ctas, found["work"], gpu)
    return made


def faults(row: dict) -> list[str]:
    """Why a row fails the static check: an error, spills, a CTA that does not fit, tensor cores that are not used."""
    if row["error"]:
        return [row["error"]]
    claim = parse(row["program"], row["config"]).tensor_core()
    found = []
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes of spills")
    if row["ctas_per_sm"] < 1:
        found.append("no CTA fits an SM")
    if claim and not row[claim]:
        found.append(f"no {claim.upper()} instruction")
    return found


def cliffs(row: dict) -> list[str]:
    """faults(), and what makes a program slow without making it wrong: copies that wait, one CTA for each SM."""
    found = faults(row)
    if row["error"]:
        return found
    config = parse(row["program"], row["config"])
    if getattr(config, "num_stages", 0) > 1 and not row["copies"]:
        found.append("no asynchronous copy (TMA or cp.async)")
    if row["ctas_per_sm"] == 1:
        found.append("one CTA on an SM")
    return found


def identity(program: str, problem: Problem, config) -> dict:
    """What analyse() depends on, beside the versions and the programs' source."""
    return {"program": program, "config": describe(config), **problem.static_key()}


def made_with(program: str) -> dict[str, str]:
    """The versions and the source that analyse() of the program depends on; nvcc's where it is here."""
    known = {"tilelang": metadata.version("tilelang"), "source": source_digest(program)}
    return known if missing_tools() else known | {"nvcc": nvcc_release()}


@functools.cache
def source_digest(program: str) -> str:
    """Of the source of the program, of what it imports, of the compiler's door and of what reads it back."""
    (folder,) = importlib.util.find_spec("hsa_tl.kernels_tilelang").submodule_search_locations
    files, found = [Path(folder) / f"{program}.py"], {}
    while files:
        if (file := files.pop()).is_file() and file not in found:
            found[file] = file.read_text()
            imported = re.findall(r"^from hsa_tl\.kernels_tilelang\.(\w+) import", found[file], re.MULTILINE)
            files += [Path(folder) / f"{name}.py" for name in imported]
    sources = [found[file] for file in sorted(found)] + [(Path(folder) / "compile.py").read_text()]
    sources += [inspect.getsource(f) for f in (Problem.static_key, _nvcc, _lower, _read, *cost.READERS)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def _compile(todo: list[tuple], jobs: int) -> Iterator[tuple[int, dict]]:
    """(place in todo, what analyse() finds) as they are ready. A process that dies costs only what killed it."""
    batches: dict[tuple, list[int]] = {}
    for i, (program, problem, _) in enumerate(todo):
        batches.setdefault((program, *problem.static_key().values()), []).append(i)
    batches = [x[i : i + BATCH] for x in batches.values() for i in range(0, len(x), BATCH)]
    alone = []

    def submit(pool: ProcessPoolExecutor, batch: list[int]):
        return pool.submit(analyse, *todo[batch[0]][:2], [todo[i][2] for i in batch])

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers:
        futures = {submit(workers, batch): batch for batch in batches}
        try:
            for future in as_completed(futures):
                try:
                    yield from zip(futures[future], future.result(), strict=True)
                except BrokenProcessPool:
                    alone += futures[future]
        finally:
            workers.shutdown(cancel_futures=True)  # where the caller has enough
    for i in alone:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            try:
                yield i, submit(worker, [i]).result()[0]
            except BrokenProcessPool:
                yield i, dict.fromkeys(READ) | {"error": "BrokenProcessPool: the compiler's process died"}


def analyse_all(
    work: list[tuple], *, jobs: int | None = None, journal: Journal | None = None, progress=None
) -> list[dict]:
    """analyse() of each (program, problem, config), each distinct one once, in parallel processes, BATCH at a time.

    What the journal holds of these versions is not made again, and what is made goes there at once. progress(done,
    total) after each. Raises MissingTool when something must be assembled and nvcc or cuobjdump is not there.
    """
    journal = Journal(None) if journal is None else journal
    names = [{"kind": "static", **identity(*x)} for x in work]
    todo = {}
    for name, x in zip(names, work, strict=True):
        known = journal.get(name)
        if known is None or not made_with(x[0]).items() <= known["made_with"].items():
            todo[key_of(name)] = x
    if todo and (lacking := missing_tools()):
        raise MissingTool(lacking)
    total = len(set(map(key_of, names)))
    tell = progress or (lambda done, total: None)
    tell(total - len(todo), total)
    todo = list(todo.values())
    made = _compile(todo, jobs or min(4, os.cpu_count() or 1)) if todo else ()
    for done, (i, found) in enumerate(made, total - len(todo) + 1):
        program, *_ = todo[i]
        journal.add({"kind": "static", **identity(*todo[i])}, found | {"made_with": made_with(program)})
        tell(done, total)
    return [{k: journal.get(name)[k] for k in READ} for name in names]


def table_rows(
    cases: tuple[Case, ...], *, device: str, programs: Iterable[str] = PROGRAMS, first_only: bool = False, **options
) -> list[dict]:
    """Rows of every program x every config of its space for the cases; options: see analyse_all.

    first_only: the heuristic config alone. Raises MissingTool when nvcc or cuobjdump is not there.
    """
    if reason := missing_tools():
        raise MissingTool(reason)
    work = {}
    for case in cases:
        for program in programs:
            problem = problem_of(program, case.problem)
            for config in space(program, problem)[: 1 if first_only else None]:
                key = tuple(identity(program, problem, config).values())
                work.setdefault(key, (case.name, program, problem, config))
    found = analyse_all([x[1:] for x in work.values()], **options)
    source = {"versions": f"{record.versions()}, nvcc {nvcc_release()}", "commit": record.commit()}
    return [row(*x, f, device) | source for x, f in zip(work.values(), found, strict=True)]
