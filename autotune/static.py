"""The static check: lower for sm_90a, assemble, read ptxas and SASS, predict. Needs nvcc and cuobjdump, no GPU."""

import csv
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from hsa_tl.autotune import cost
from hsa_tl.autotune.journal import Journal, key_of
from hsa_tl.bench import record
from hsa_tl.cases import Case
from hsa_tl.files import cache_folder, write_atomic
from hsa_tl.kernels_tilelang.config import PROGRAMS, describe, parse, space, static_key
from hsa_tl.problem import Problem

COLUMNS = (
    "case", "program", "direction", "D", "G", "S", "K", "heads_w", "masked", "dtype", "config", "threads", "device",
    "registers", "spill_bytes", "smem_bytes", "ctas_per_sm", "hgmma", "hmma", "ns_per_pair", "limiter", "roofline_ns",
    "error", "versions", "commit",
)  # fmt: skip
READ = (
    "registers", "spill_bytes", "smem_bytes", "ctas_per_sm", "hgmma", "hmma", "copies", "work", "error",
)  # fmt: skip
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
    """Path of a CUDA tool: on PATH, under CUDA_HOME, from NVIDIA's wheels, or the one that triton's package carries."""
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    nvidia, triton = (importlib.util.find_spec(package) for package in ("nvidia", "triton"))
    if nvidia:  # nvidia/cu13/bin, and before CUDA 13 nvidia/<part>/bin
        folders += [str(p) for base in nvidia.submodule_search_locations for p in sorted(Path(base).glob("*/bin"))]
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
    """What nvcc --version prints."""
    return subprocess.run([find_tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout


def nvcc_release() -> str:
    return re.search(r"V([0-9.]+)", nvcc_version()).group(1)


def _cache_file(source: str) -> Path:
    text = nvcc_version() + " ".join(NVCC_FLAGS) + source
    return cache_folder() / "static" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def assemble(source: str) -> Assembled:
    """Compiles CUDA source for sm_90a; cached by source and nvcc version in the user's cache folder."""
    if reason := missing_tools():
        raise MissingTool(reason)
    cached = _cache_file(source)
    if cached.is_file():
        return Assembled(**json.loads(cached.read_text()))
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder) / "program.cu", Path(folder) / "program.cubin"
        cu.write_text(source)
        includes = [f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
        run = subprocess.run(
            [find_tool("nvcc"), *NVCC_FLAGS, *includes, "-o", cubin, cu], capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(f"nvcc refused the program: {run.stderr[-800:]}")
        sass = subprocess.run(
            [find_tool("cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True
        )

    def number(pattern: str) -> int:
        match = re.search(pattern, run.stderr)
        return int(match.group(1)) if match else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    result = Assembled(number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes smem"), sass.stdout)
    write_atomic(cached, json.dumps(asdict(result)))
    return result


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


def analyse(program: str, problem: Problem, config) -> dict:
    """What lowering, ptxas and SASS say of a config; the same on any device and for any B, T, N and H.

    A program that does not lower or assemble has its error, and None for the rest.
    """
    from hsa_tl.kernels_tilelang.compile import lower

    found = dict.fromkeys(READ)
    try:
        artifact = lower(program, problem, config)
        (function,) = artifact.device_mod.functions.values()
        dynamic = int(function.attrs["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in function.attrs else 0
        if barrier_in_elected_branch(artifact.kernel_source):
            raise RuntimeError("a barrier stands inside a branch that one elected thread takes")
        made = assemble(artifact.kernel_source)
        sass = cost.parse_sass(made.sass)
        smem = dynamic + made.smem_bytes
        ctas = ctas_per_sm(made.registers, smem, config.total_threads(), cost.DEVICES["h100"])  # all are alike in this
        found |= {"registers": made.registers, "spill_bytes": made.spill_bytes, "smem_bytes": smem, "ctas_per_sm": ctas}
        found |= {"hgmma": cost.count(sass, "HGMMA"), "hmma": cost.count(sass, "HMMA")}
        found |= {"copies": sum(cost.count(sass, op) for op in ASYNCHRONOUS)}
        found |= {"work": cost.pass_work(config, problem, sass)}
    except MissingTool:
        raise
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    return found


def row(case: str, program: str, problem: Problem, config, found: dict, device: str | cost.Device = "h200") -> dict:
    """One row of the static table: what analyse() found, and the prediction for a device."""
    gpu = cost.DEVICES[device] if isinstance(device, str) else device
    made = {"case": case, "program": program, "direction": config.DIRECTION, **static_key(problem), **found}
    made |= {"config": describe(config), "threads": config.threads, "device": gpu.name}
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
    return {"program": program, "config": describe(config), **static_key(problem)}


def made_with() -> str:
    """The versions and the source that analyse() depends on."""
    return f"tilelang {metadata.version('tilelang')}, nvcc {nvcc_release()}, programs {programs_digest()}"


@functools.cache
def programs_digest() -> str:
    """Of the source of the programs and of what reads them back."""
    (folder,) = importlib.util.find_spec("hsa_tl.kernels_tilelang").submodule_search_locations
    sources = [path.read_text() for path in sorted(Path(folder).rglob("*.py"))]
    sources += [inspect.getsource(f) for f in (assemble, analyse, *cost.READERS)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def _pool(jobs: int) -> Executor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def analyse_all(
    work: list[tuple], *, jobs: int | None = None, journal: Journal | None = None, progress=None, compiler=analyse
) -> list[dict]:
    """analyse() of each (program, problem, config), each distinct one once, in parallel processes.

    What the journal holds of these versions is not made again, and what is made goes there at once. progress(done,
    total) after each. Raises MissingTool when something must be assembled and nvcc or cuobjdump is not there.
    compiler: in place of analyse, in this process.
    """
    journal = Journal(None) if journal is None else journal
    source = {"kind": "static", "made_with": made_with()} if missing_tools() is None else None
    names = [{"kind": "static", **identity(*x)} for x in work]
    todo = {}
    for name, x in zip(names, work, strict=True):
        known = journal.get(name)
        if known is None or (source and known["made_with"] != source["made_with"]):
            todo[key_of(name)] = (name, x)
    if todo and source is None:
        raise MissingTool(missing_tools())
    total = len({key_of(name) for name in names})
    if progress:
        progress(total - len(todo), total)
    if todo:
        with _pool(jobs or min(4, os.cpu_count() or 1)) if compiler is analyse else ThreadPoolExecutor(1) as pool:
            futures = {pool.submit(compiler, *x): name for name, x in todo.values()}
            for i, future in enumerate(as_completed(futures), 1):
                journal.add(futures[future], future.result() | source)
                if progress:
                    progress(total - len(todo) + i, total)
    return [{k: journal.get(name)[k] for k in READ} for name in names]


def table_rows(cases: tuple[Case, ...], *, device="h200", programs=PROGRAMS, first_only=False, **options) -> list[dict]:
    """Rows of every program x every config of its space for the cases; options: see analyse_all.

    first_only: the heuristic config alone. Raises MissingTool when nvcc or cuobjdump is not there.
    """
    if reason := missing_tools():
        raise MissingTool(reason)
    work = {}
    for case in cases:
        for program in programs:
            for config in space(program, case.problem)[: 1 if first_only else None]:
                key = tuple(identity(program, case.problem, config).values())
                work.setdefault(key, (case.name, program, case.problem, config))
    found = analyse_all([x[1:] for x in work.values()], **options)
    source = {"versions": f"{record.versions()}, nvcc {nvcc_release()}", "commit": record.commit()}
    return [row(*x, f, device) | source for x, f in zip(work.values(), found, strict=True)]


PAGE = """# Static check of the TileLang programs

Every config of every program for the problems tagged ci, lowered for sm_90a, assembled by nvcc and read back: registers
a thread at launch, spills, shared memory, CTAs for each SM, tensor-core instructions. ns/pair is a prediction for an
{device} (`autotune/cost.py`; a pair is one token, key/value head and chunk; for the union tile all its tokens agree),
beside the roofline. Nothing here is a measurement. Written by `hsa-tl static --out` at commit {commit} with
{versions}; all columns: [{name}]({name}).

| case | program | config | registers | spills | smem | CTAs/SM | MMA | ns/pair | limiter | roofline |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write_page(rows: list[dict], path: Path) -> None:
    """The rows of write_csv's file `path` as a Markdown table in README.md beside it."""
    lines = [
        f"| {r['case']} | `{r['program']}` | {r['config'].replace(',', ', ')} | {r['registers']} | {r['spill_bytes']} "
        f"| {r['smem_bytes']} | {r['ctas_per_sm']} | {r['hgmma'] or r['hmma'] or ''} | {r['ns_per_pair']:.3g} "
        f"| {r['limiter']} | {r['roofline_ns']:.3g} |"
        if r["error"] is None
        else f"| {r['case']} | `{r['program']}` | {r['config'].replace(',', ', ')} | {r['error']} |"
        for r in rows
    ]
    first = rows[0]
    head = PAGE.format(device=first["device"].upper(), name=path.name, **{k: first[k] for k in ("versions", "commit")})
    write_atomic(path.with_name("README.md"), head + "\n".join(lines) + "\n")


def write_csv(rows: list[dict], path: Path) -> None:
    """The rows as CSV, COLUMNS first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
