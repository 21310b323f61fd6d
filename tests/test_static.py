"""Every program x every config of its space, for the problems tagged ci: lowers, assembles, fits, uses tensor cores."""

import pytest

from hsa_tl import cases
from hsa_tl.autotune import cost, static
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.kernels_tilelang.config_base import blocks_per_sm

CI = [pytest.param(c, p, id=f"{c.name}-{p}") for c in cases.find("ci") for p in config.PROGRAMS]


@pytest.mark.static
@pytest.mark.parametrize("case, program", CI)
def test_every_config_assembles_without_spills_and_with_tensor_cores(case, program):
    configs = config.space(program, case.problem)
    assert configs
    if reason := static.missing_tools():
        for c in configs:
            source = compile.lower(program, case.problem, c).kernel_source
            assert program in source and not static.barrier_in_elected_branch(source)
        pytest.skip(f"lowered, not assembled: {reason}")
    for c in configs:
        row = static.row(case.name, program, case.problem, c, static.analyse(program, case.problem, c))
        assert static.faults(row) == [], row
        # The config's own arithmetic must agree with what ptxas and the driver would allow.
        assert row["ctas_per_sm"] >= blocks_per_sm(c, case.problem), row
        assert row["smem_bytes"] <= c.smem_bytes(case.problem), row
        assert row["roofline_ns"] <= row["ns_per_pair"] < 100 * row["roofline_ns"], row


def test_faults_are_named():
    row = dict.fromkeys(static.COLUMNS) | {
        "program": "hsa_bwd_dkdv_chunk", "config": "block_M=64,threads=128",
        "spill_bytes": 8, "ctas_per_sm": 0, "hgmma": 0, "hmma": 9, "copies": 0,
    }  # fmt: skip
    assert static.faults(row) == ["8 bytes of spills", "no CTA fits an SM", "no HGMMA instruction"]
    assert static.faults(row | {"spill_bytes": 0, "ctas_per_sm": 1, "hgmma": 1}) == []
    assert static.faults(row | {"error": "RuntimeError: x"}) == ["RuntimeError: x"]


def test_a_barrier_in_an_elected_branch_is_found():
    body = "if (tl::tl_shuffle_elect<128>()) {{ for (;;) {{ {} }} }} __syncthreads();"
    assert static.barrier_in_elected_branch(body.format("tl::__sync_thread_partial(3, 128);"))
    assert not static.barrier_in_elected_branch(body.format("tl::tma_load(x);"))


def test_a_missing_tool_is_one_line(monkeypatch):
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    with pytest.raises(static.MissingTool, match="nvcc and cuobjdump") as error:
        static.table_rows(cases.find("ci"))
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
