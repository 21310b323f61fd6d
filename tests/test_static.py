"""What a heuristic or a table can produce: lowers, assembles, fits, uses tensor cores.

That is every config of every program's space for the problems tagged ci, and every row of the shipped tables, each
distinct (program, static key, config) once, in make prove; make test assembles the first config of each program. What
only the tuner tries is checked by the arithmetic of legality, and assembled before it can become a row. What was
assembled of the same source and versions is not assembled again.
"""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import prove, tiered

from hsa_tl import cases
from hsa_tl.autotune import cost, static, table
from hsa_tl.autotune.journal import Journal
from hsa_tl.files import cache_folder
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.kernels_tilelang.config_base import blocks_per_sm
from hsa_tl.problem import Problem

ROOT = Path(__file__).parent.parent
CI = [pytest.param(c, p, id=f"{c.name}-{p}") for c in cases.find("ci") for p in config.PROGRAMS]


def shipped() -> dict[tuple, list]:
    """(program, static key) -> the configs that the tables of any device have for it."""
    found: dict[tuple, list] = {}
    for row in (r for device in cost.DEVICES for r in table.shipped(device)):
        for program, c in table.programs(row):
            configs = found.setdefault((program, *(row[k] for k in table.KEY)), [])
            configs += [c] if c not in configs else []
    return found


def usual() -> dict[tuple, list]:
    """The same of the spaces of the cases tagged ci."""
    found: dict[tuple, list] = {}
    for case, program in (param.values for param in CI):
        problem = config.problem_of(program, case.problem)
        found.setdefault((program, *problem.static_key().values()), []).extend(config.space(program, problem))
    return found


USUAL = usual()
SHIPPED = {key: [c for c in configs if c not in USUAL.get(key, ())] for key, configs in shipped().items()}
SHIPPED = {key: configs for key, configs in SHIPPED.items() if configs}


def assembled(program, problem, configs) -> list[dict]:
    """static.analyse of each, as the journal of earlier test runs has it or made now in one run of nvcc."""
    journal, made_with = Journal(cache_folder() / "tests.jsonl"), static.made_with(program)
    names = [static.identity(program, problem, c) for c in configs]
    known = [journal.get(name) for name in names]
    todo = [i for i, record in enumerate(known) if record is None or record["made_with"] != made_with]
    for i, found in zip(todo, static.analyse(program, problem, [configs[i] for i in todo]), strict=True):
        if not found["error"]:  # which may be the machine's
            journal.add(names[i], found | {"made_with": made_with})
        known[i] = found
    return known


def assert_sound(name, program, problem, configs):
    """Each lowers, and where nvcc is here it assembles without a fault, as its own arithmetic says."""
    if reason := static.missing_tools():
        for c in configs:
            source = compile.lower(program, problem, c).kernel_source
            assert program in source and not static.barrier_in_elected_branch(source)
        pytest.skip(f"lowered, not assembled: {reason}")
    for c, found in zip(configs, assembled(program, problem, configs), strict=True):
        row = static.row(name, program, problem, c, found)
        assert static.faults(row) == [], row
        # The config's own arithmetic must agree with what ptxas and the driver would allow.
        assert row["ctas_per_sm"] >= blocks_per_sm(c, problem), row
        assert row["smem_bytes"] <= c.smem_bytes(problem), row
        assert row["roofline_ns"] <= row["ns_per_pair"] < 100 * row["roofline_ns"], row


MEMORY = {"LDG.E.128": "W", "LDG": "L", "STS.128": "S", "STG": "G"}  # wide and other loads; stores


def loads_in_turn(sass) -> bool:
    """Whether loads wait for each other: four of 16 bytes, each behind a store to shared memory of what the one before
    brought, or sixteen of any size, each behind a store to global memory.
    """
    order = "".join(next((x for name, x in MEMORY.items() if op.startswith(name)), "") for _, op, _ in sass)
    return re.search("(WS+){4}|([WL]G){16}", order) is not None


# Selections lower slowly, 3 to 5 s of a core each.
SELECTIONS = [p for p in config.PROGRAMS if p.startswith(("union_", "retrieve_"))]
KINDS = {"attention": [p for p in config.PROGRAMS if p not in SELECTIONS], "selections": SELECTIONS}


@pytest.mark.static
@pytest.mark.parametrize("programs", tiered(KINDS, quick=("attention",)))
def test_the_first_config_of_every_program_assembles(programs):
    """All in one run of nvcc, which reads the headers once."""
    problems = {program: config.problem_of(program, cases.case("paper-d64").problem) for program in programs}
    chosen = {program: config.space(program, problem)[0] for program, problem in problems.items()}
    sources = {}
    for program, c in chosen.items():
        sources[program] = compile.lower(program, problems[program], c).kernel_source
        assert program in sources[program] and not static.barrier_in_elected_branch(sources[program])
    if reason := static.missing_tools():
        pytest.skip(f"lowered, not assembled: {reason}")
    for (program, c), made in zip(chosen.items(), static.assemble_all(list(sources.values())), strict=True):
        sass = cost.parse_sass(made.sass)
        claim = c.tensor_core()
        assert made.spill_bytes == 0 and (not claim or cost.count(sass, claim.upper())), program
        assert not loads_in_turn(sass), program


SMEM_SLACK = 4608  # bytes, and a tenth: what aligning tiles to each other may add


def test_the_published_table_is_of_todays_spaces():
    """The committed table holds every config of the usual spaces, and the arithmetic of each agrees with what ptxas
    and the driver said of it. A changed space or roofline needs `hsa-tl static --out bench/results/static/h200.csv`.
    """
    with (ROOT / "bench/results/static/h200.csv").open() as file:
        published = {(r["case"], r["program"], r["config"]): r for r in csv.DictReader(file)}
    spaces, seen = {}, set()
    for case, program in (param.values for param in CI):
        problem = config.problem_of(program, case.problem)
        for c in config.space(program, problem):
            identity = tuple(static.identity(program, problem, c).values())
            if identity not in seen:  # retrieval has no S and no heads, so that cases may share a row
                seen.add(identity)
                spaces[case.name, program, config.describe(c)] = problem, c
    assert spaces.keys() == published.keys()
    for key, (problem, c) in spaces.items():
        row = published[key]
        smem, ctas = int(row["smem_bytes"]), int(row["ctas_per_sm"])
        assert smem <= c.smem_bytes(problem) <= 1.1 * smem + SMEM_SLACK, key
        assert ctas >= blocks_per_sm(c, problem) >= (ctas - 1 if key[1] in config.planned() else 1), key
        bound, _ = cost.roofline(c, problem, cost.DEVICES["h200"])
        assert bound == pytest.approx(float(row["roofline_ns"]), rel=1e-9), key
        assert not c.tensor_core() or int(row[c.tensor_core()]), key


@prove  # 4 s of two cores each
@pytest.mark.static
@pytest.mark.parametrize("case, program", CI)
def test_every_config_assembles_without_spills_and_with_tensor_cores(case, program):
    problem = config.problem_of(program, case.problem)
    configs = config.space(program, problem)
    assert configs or program.endswith("_sm90a")
    assert_sound(case.name, program, problem, configs)


@prove
@pytest.mark.static
@pytest.mark.skipif(not SHIPPED, reason="no table ships a row: no plan has been tuned on a GPU")
@pytest.mark.parametrize("key", SHIPPED, ids=lambda key: "-".join(map(str, key)))
def test_every_shipped_row_assembles(key):
    program, G, D, S, K, heads_w, masked, dtype = key
    problem = Problem(
        B=1, T=16384, N=16384 // S, HQ=G, H=1, D=D, S=S, K=K, dtype=getattr(torch, dtype), masked=masked,
        per_head=heads_w > 1,
    )  # fmt: skip
    assert_sound("shipped", program, problem, SHIPPED[key])


@prove
@pytest.mark.static
def test_processes_assemble_into_a_journal(tmp_path, monkeypatch):
    """The path that hsa-tl autotune takes, with nothing cached; a second run makes nothing."""
    if reason := static.missing_tools():
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = cases.case("paper-d64").problem
    work = [("hsa_fwd_token", problem, c) for c in config.candidates("hsa_fwd_token", problem)[:2]]
    found = static.analyse_all(work, jobs=1, journal=Journal(tmp_path / "j.jsonl"))
    assert all(f["error"] is None and f["hmma"] and f["copies"] and f["work"]["pairs"] for f in found)

    monkeypatch.setattr(static, "_compile", None)  # not called again
    assert static.analyse_all(work, journal=Journal(tmp_path / "j.jsonl")) == found


def test_faults_are_named():
    row = dict.fromkeys(static.COLUMNS) | {
        "program": "hsa_bwd_dkdv_chunk", "config": "block_M=64,threads=128",
        "spill_bytes": 8, "ctas_per_sm": 0, "hgmma": 0, "hmma": 9, "copies": 0,
    }  # fmt: skip
    assert static.faults(row) == ["8 bytes of spills", "no CTA fits an SM", "no HGMMA instruction"]
    assert static.faults(row | {"spill_bytes": 0, "ctas_per_sm": 1, "hgmma": 1}) == []
    assert static.faults(row | {"error": "RuntimeError: x"}) == ["RuntimeError: x"]


def test_cliffs_are_named():
    row = dict.fromkeys(static.COLUMNS) | {
        "program": "hsa_fwd_token", "config": "threads=128,num_stages=2",
        "spill_bytes": 0, "ctas_per_sm": 1, "hgmma": 0, "hmma": 9, "copies": 0,
    }  # fmt: skip
    assert static.cliffs(row) == ["no asynchronous copy (TMA or cp.async)", "one CTA on an SM"]
    assert static.cliffs(row | {"hmma": 0, "copies": 1, "ctas_per_sm": 2}) == ["no HMMA instruction"]


def test_a_wheels_cuobjdump_is_found(monkeypatch, tmp_path):
    """Where the toolkit has none: NVIDIA's package on PyPI, then triton's."""
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "cuobjdump"
    tool.parent.mkdir(parents=True)
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    nvidia = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(static.importlib.util, "find_spec", lambda name: nvidia if name == "nvidia" else None)
    assert static.find_tool("cuobjdump") == str(tool) and static.find_tool("nvcc") is None
    assert static.missing_tools().endswith("or by pip install nvidia-cuda-nvcc")
    tool.unlink()
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-cuobjdump" in static.missing_tools()


def test_one_program_that_nvcc_refuses_leaves_the_others(monkeypatch, tmp_path):
    """They are assembled in one run, and alone when that fails."""
    runs = []

    def nvcc(sources):
        runs.append(sources)
        if "bad" in sources:
            raise RuntimeError("nvcc refused the program")
        return [static.Assembled(1, 0, 0, x) for x in sources]

    monkeypatch.setattr(static, "missing_tools", lambda: None)
    monkeypatch.setattr(static, "_nvcc", nvcc)
    monkeypatch.setattr(static, "_cache_file", lambda source: tmp_path / source)
    first, bad, last = static.assemble_all(["a", "bad", "b"])
    assert (first.sass, last.sass) == ("a", "b") and isinstance(bad, RuntimeError)
    assert runs == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    assert static.assemble_all(["b", "a"]) == [last, first] and len(runs) == 4, "cached"


def test_the_digest_follows_what_a_program_is_made_of(monkeypatch):
    """Its own files and what they import, and no other program's."""
    read, names = static.Path.read_text, []
    monkeypatch.setattr(static.Path, "read_text", lambda path: names.append(path.name) or read(path))
    assert static.source_digest.__wrapped__("hsa_fwd_union") == static.source_digest.__wrapped__("hsa_fwd_union")
    wanted = {"hsa_fwd_union.py", "macros.py", "config_base.py", "compile.py"}
    assert set(names) == wanted and names.count("hsa_fwd_union.py") == 2


def test_a_barrier_in_an_elected_branch_is_found():
    body = "if (tl::tl_shuffle_elect<128>()) {{ for (;;) {{ {} }} }} __syncthreads();"
    assert static.barrier_in_elected_branch(body.format("tl::__sync_thread_partial(3, 128);"))
    assert not static.barrier_in_elected_branch(body.format("tl::tma_load(x);"))


def test_a_missing_tool_is_one_line(monkeypatch):
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    with pytest.raises(static.MissingTool, match="nvcc and cuobjdump") as error:
        static.table_rows(cases.find("ci"), device="h200")
    assert "\n" not in str(error.value)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0100*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0110*/                   MUFU.EX2 R3, R3 ;
        /*0400*/              @!P0 BRA 0x100 ;
        /*0410*/                   EXIT ;
"""


def test_sass_is_counted_by_innermost_loop():
    sass = cost.parse_sass(SASS)
    assert cost.count(sass, "HMMA") == 1
    (loop,) = cost.inner_loops(sass)
    work = cost.loop_work(loop)
    assert (work["mma_flops"], work["special"], work["wgmma_flops"], work["issue"]) == (4096, 32, 0, 3)


@pytest.mark.parametrize(
    "registers, smem, threads, ctas", [(64, 0, 256, 4), (72, 74240, 256, 3), (255, 0, 128, 2), (32, 232448, 128, 1)]
)
def test_ctas_per_sm(registers, smem, threads, ctas):
    assert static.ctas_per_sm(registers, smem, threads, cost.DEVICES["h200"]) == ctas
