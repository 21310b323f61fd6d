"""The tuner with a fake compiler, clock and GPU: order, budget, check before time, interleaving, margins, resume."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
from tuning import FakeGpu, compile_by, fake_compiler

from hsa_tl import cases
from hsa_tl.autotune import calibrate, cost, explain, measure, plan, static, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.impl import tilelang
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.problem import Problem
from hsa_tl.testing import make_inputs

CASE = cases.case("paper-d128")
UNION = ("hsa_fwd_union_sm90a",)


@pytest.fixture(autouse=True)
def no_machine(monkeypatch, tmp_path):
    plan.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(static, "missing_tools", lambda: None)
    monkeypatch.setattr(static, "nvcc_release", lambda: "13.0")
    compile_by(monkeypatch, fake_compiler)


def ranked(programs=UNION, case=CASE, journal=None):
    return tuner.rank(case, "h200", programs=programs, journal=journal)


def run(gpu, rows, seconds=1e6, journal=None, case=CASE):
    return measure.measure(case, rows, device="h200", seconds=seconds, rig=gpu.rig(), journal=journal)


def config_of(row):
    """Of the plan's first program."""
    return tuner.programs_of(row)[0][1]


def test_the_union_has_enough_candidates():
    """Each by the arithmetic of legality; hsa-tl autotune --program hsa_fwd_union assembles them all."""
    for problem in (cases.case(name).problem for name in ("paper-d128", "paper-d64", "k16-d128", "k16-d64")):
        found = []
        for program in ("hsa_fwd_union", "hsa_fwd_union_sm90a"):
            mine, usual = configs.candidates(program, problem), configs.space(program, problem)
            assert len(set(mine)) == len(mine) and mine[: len(usual)] == usual
            found += mine
        assert len(found) >= 24


def test_the_chunk_program_is_tried_at_every_tile_and_depth():
    """And each of them with both ways to sum a token's pairs."""
    ways = {}
    for program in ("hsa_fwd_chunk", "hsa_fwd_chunk_sm90a"):
        for c in configs.candidates(program, cases.case("paper-d64").problem):
            ways.setdefault((c.block_M, c.threads, getattr(c, "num_stages", 0)), set()).add(c.reduce_add)
    plain = {(64, 128, 0), (128, 128, 0), (128, 256, 0), (192, 128, 0)}
    assert ways == {tile: {0, 1} for tile in plain | {(128, 256, stages) for stages in (1, 2, 3, 4)}}


def test_a_failing_candidate_is_a_recorded_result(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    rows = ranked(journal=journal)
    failed = [r for r in rows if r["faults"]]
    assert {r["faults"][0] for r in failed} == {"RuntimeError: nvcc refused the program", "16 bytes of spills"}
    assert rows[-len(failed) :] == failed, "last"
    assert len(Journal(tmp_path / "j.jsonl").records) == len(rows) == len(configs.candidates(*UNION, CASE.problem))


def test_a_compiler_that_dies_is_a_recorded_result(monkeypatch):
    """Those of its batch are tried alone."""
    deadly = configs.candidates("hsa_fwd_union_sm90a", CASE.problem)[4]

    def compiler(program, problem, config):
        if config == deadly:
            raise BrokenProcessPool
        return fake_compiler(program, problem, config)

    others = [r for r in ranked() if config_of(r) != deadly]
    compile_by(monkeypatch, compiler)
    rows = ranked()
    error = "BrokenProcessPool: the compiler's process died"
    assert [r["faults"] for r in rows if config_of(r) == deadly] == [[error]]
    assert sorted(map(str, (config_of(r) for r in rows if r["faults"]))) == sorted(
        map(str, [deadly, *(config_of(r) for r in others if r["faults"])])
    )


def test_ranks_take_turns_among_groups():
    """A short tuning sees the best of every strategy before any second best."""
    rows = [r for r in ranked(configs.tuned()) if not r["faults"]]
    groups = [tuner.group(r) for r in rows]
    first = len(set(groups))
    assert len(set(groups[:first])) == first and groups[0][0] == configs.tuned()[0] and first == 8
    for g in set(groups):
        ns = [r["ns_per_pair"] for r, x in zip(rows, groups, strict=True) if x == g]
        assert ns == sorted(ns)


def test_ranking_goes_on_from_the_journal(tmp_path, monkeypatch):
    """Nothing is compiled twice, not for another device or length either; a torn last line costs one candidate."""
    path, compiled = tmp_path / "j.jsonl", []

    def compiler(*x):
        compiled.append(x)
        return fake_compiler(*x)

    compile_by(monkeypatch, compiler)
    first = ranked(journal=Journal(path))
    longer = replace(CASE, problem=cases.at_length(CASE.problem, 1 << 20))
    for case, device in ((CASE, "h200"), (CASE, "h100"), (longer, "h200")):
        again = tuner.rank(case, device, programs=UNION, journal=Journal(path))
        assert len(again) == len(first) == len(compiled)
    path.write_bytes(path.read_bytes()[:-40])
    assert ranked(journal=Journal(path)) == first
    assert len(compiled) == len(first) + 1
    lines = path.read_text().splitlines()
    assert sum(json.loads(line)["name"]["kind"] == "static" for line in lines if line.endswith("}}")) == len(first)


def test_another_version_is_ranked_anew(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    ranked(journal=journal)
    monkeypatch.setattr(static, "source_digest", lambda program: "other")
    compile_by(monkeypatch, lambda *x: fake_compiler(*x) | {"registers": 7})
    ranked(journal=journal)
    assert {r["registers"] for _, r in journal.all(kind="static") if r["error"] is None} == {7}


def test_without_nvcc_a_journal_that_was_carried_along_ranks(monkeypatch):
    """As on a lease: of the same source. Another source must be assembled, which says what it lacks."""
    journal = Journal(None)
    first = ranked(journal=journal)
    monkeypatch.setattr(static, "missing_tools", lambda: "needs nvcc")
    assert ranked(journal=journal) == first
    monkeypatch.setattr(static, "source_digest", lambda program: "other")
    with pytest.raises(static.MissingTool, match="needs nvcc"):
        ranked(journal=journal)


def test_best_first_until_the_time_is_up():
    rows, gpu = ranked(), FakeGpu()
    seen = run(gpu, rows, seconds=40)
    good = [r for r in rows if not r["faults"]]
    assert 3 < len(seen) < len(good) and gpu.checked() == [config_of(r) for r in good[: len(seen)]]
    assert all(r["median_us"] for r in seen) and gpu.now < 60


def test_kernels_are_compiled_ahead_of_their_looks(tmp_path):
    """What is not measured yet, in the order of the looks; a look waits for its own."""
    rows, gpu, given = ranked(), FakeGpu(), []

    @contextlib.contextmanager
    def ahead(work):
        given.append([programs[0][1] for _, programs in work])
        yield lambda i: gpu.log.append(("ready", given[-1][i]))

    journal = Journal(tmp_path / "j.jsonl")
    seen = run(gpu, rows, seconds=40, journal=journal)
    gpu.log.clear()
    rig = replace(gpu.rig(), ahead=ahead)
    measure.measure(CASE, rows, device="h200", seconds=1e6, rig=rig, journal=journal)
    good = [config_of(r) for r in rows if not r["faults"]]
    assert given == [good[len(seen) :]]
    assert [x[:2] for x in gpu.log if x[0] != "time"] == [(what, c) for c in given[0] for what in ("ready", "check")]


def test_nothing_is_timed_unless_it_is_right():
    rows = ranked()
    wrong, refused, *_ = [config_of(r) for r in rows]
    gpu = FakeGpu(wrong=(wrong,), refused=(refused,))
    seen = {config_of(r): r for r in run(gpu, rows)}
    assert seen[wrong]["error"] == "AssertionError: out: max error 1 above 0.1" and seen[wrong]["median_us"] is None
    assert seen[refused]["error"] == "RuntimeError: nvcc refused the program"
    assert not {wrong, refused} & {x[1] for x in gpu.log if x[0] == "time"}
    assert tuner.best(CASE, list(seen.values()))


def test_contenders_are_timed_in_turns_and_margins_reported():
    rows = [r for r in ranked() if not r["faults"]]
    groups = [tuner.group(r) for r in rows]
    largest = max(groups, key=groups.count)
    mine = [config_of(r) for r, group in zip(rows, groups, strict=True) if group == largest]
    pick, fast, near, *rest = mine
    gpu = FakeGpu(slow=dict.fromkeys(rest, 500.0) | {pick: 130.0, fast: 100.0, near: 105.0})
    seen = {config_of(r): r for r in run(gpu, rows)}
    late = [x[1] for x in gpu.log if x[0] == "time" and x[1] in mine][3 * len(mine) :]
    assert set(late) == {pick, fast, near} and late[:6] == [fast, near, pick, pick, near, fast]
    times = {c: [x for x in gpu.log if x[0] == "time" and x[1] == c] for c in mine}
    assert len(times[fast]) == 3 * measure.ROUNDS and len(times[rest[-1]]) == 3
    best = seen[fast]
    assert best["median_us"] == pytest.approx(100.0 * 1.01, rel=0.02)  # geometric mean of 2, 1 and 1/2 times 100
    assert [best["over_runner_up"], best["over_static"]] == pytest.approx([1.05, 1.3], rel=0.02)
    assert seen[rest[-1]]["rounds"] == dict.fromkeys(tuner.CLASSES, 1)
    seen[rest[-1]]["selections"] = dict.fromkeys(tuner.CLASSES, 1.0)  # a lucky round is none of seven
    rows = tuner.best(CASE, list(seen.values()))
    assert [r["overlap"] for r in rows] == [[0.0, 0.4], [0.5, 0.8], [0.9, 1.0]]
    assert all(table.programs(r) == tuner.programs_of(best) and r["T"] == [8193, 16384] for r in rows)
    assert [r["median_us"] for r in rows] == list(best["selections"].values()) and rows[0]["candidates"] == len(mine)


def test_measuring_goes_on_from_the_journal(tmp_path):
    rows, path = ranked(), tmp_path / "j.jsonl"
    first = run(FakeGpu(), rows, seconds=40, journal=Journal(path))
    gpu = FakeGpu()
    second = run(gpu, rows, seconds=1e6, journal=Journal(path))
    done = {config_of(r) for r in first}
    assert len(second) > len(first) and not done & set(gpu.checked())
    again = FakeGpu()
    assert run(again, rows, journal=Journal(path)) == second and not again.log


def test_a_candidate_that_twice_ends_the_process_is_given_up(tmp_path):
    """A kernel that hangs must not eat every lease."""
    rows, path = ranked(), tmp_path / "j.jsonl"
    bad = config_of(rows[1])
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(FakeGpu(dies=(bad,)), rows, journal=Journal(path))
    seen = {config_of(r): r for r in run(FakeGpu(dies=(bad,)), rows, journal=Journal(path))}
    assert seen[bad]["error"].startswith("did not finish") and seen[config_of(rows[2])]["median_us"]


def test_a_lost_device_ends_the_run_and_keeps_the_rest(tmp_path):
    rows, journal = ranked(), Journal(tmp_path / "j.jsonl")
    gpu = FakeGpu(refused=(config_of(rows[1]),))
    rig = replace(gpu.rig(), alive=lambda: False)
    with pytest.raises(RuntimeError, match="lost the device"):
        measure.measure(CASE, rows, device="h200", seconds=1e6, rig=rig, journal=journal)
    assert len(journal.all(kind="measured")) == 2


def _tune_slowly(path, table_path, programs):
    """A whole tuning in another process; a candidate takes 20 ms."""
    static.missing_tools, static.nvcc_release = (lambda: None), (lambda: "13.0")
    gpu = FakeGpu()
    rig = replace(gpu.rig(), check=lambda *x: time.sleep(0.02))
    journal = Journal(path)
    rows = measure.measure(
        CASE, ranked(programs, journal=journal), device="h200", seconds=1e6, rig=rig, journal=journal
    )
    table.merge(table_path, "h200", tuner.best(CASE, rows))


def test_resume_after_kill_9(tmp_path):
    path, context = tmp_path / "j.jsonl", multiprocessing.get_context("fork")  # which imports nothing again
    child = context.Process(target=_tune_slowly, args=(path, tmp_path / "t.json", UNION))
    child.start()
    finished = 0
    while finished < 4:
        assert child.is_alive()
        time.sleep(0.01)
        finished = sum(bool(r["rounds"]) for _, r in Journal(path).all(kind="measured"))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    journal = Journal(path)
    done = {name["programs"]["hsa_fwd_union_sm90a"] for name, r in journal.all(kind="measured") if r["rounds"]}
    rows, gpu = ranked(journal=journal), FakeGpu()
    seen = run(gpu, rows, journal=journal)
    assert 4 <= len(done) < len(seen) == sum(not r["faults"] for r in rows)
    assert not done & {configs.describe(c) for c in gpu.checked()} and len(gpu.checked()) == len(seen) - len(done)


def test_two_processes_tune_at_once(tmp_path):
    path, out, context = tmp_path / "j.jsonl", tmp_path / "t.json", multiprocessing.get_context("fork")
    halves = (UNION, ("hsa_bwd_chunk",))
    children = [context.Process(target=_tune_slowly, args=(path, out, programs)) for programs in halves]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert all(json.loads(line)["record"] for line in path.read_text().splitlines())
    rows = table.read(out)
    assert {r["direction"] for r in rows} == {"forward", "backward"}
    assert len({table.identity(r) for r in rows}) == len(rows) >= 6


def test_tune_keeps_the_best_in_the_users_cache(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(measure, "gpu_rig", gpu.rig)
    rows = measure.tune("forward", CASE.problem, "h200")
    assert table.read(table.user_path("h200")) == sorted(rows, key=table.identity)
    assert {r["direction"] for r in rows} == {"forward"} and rows[-1]["deterministic"]
    assert plan.choose("forward", CASE.problem, "", True, device="h200").programs == table.programs(rows[-1])
    gpu.wrong = [
        c for name in configs.tuned() if name.startswith("hsa_bwd") for c in configs.candidates(name, CASE.problem)
    ]
    with pytest.raises(RuntimeError, match=r"no plan for the backward .* passed its check"):
        measure.tune("backward", CASE.problem, "h200")


def test_the_fit_finds_the_constants_that_measurements_follow(tmp_path, monkeypatch):
    """Times made by other constants: the fit predicts them, and its file reads back."""
    old = cost.DEVICES["h200"]
    true = replace(old, l2=4.4e12, hbm=3.9e12, reduce=3.1e12)
    journal = Journal(tmp_path / "j.jsonl")
    for name in ("k16-d128", "k16-d64"):
        case = replace(CASE, problem=cases.at_length(cases.case(name).problem, 4096))
        for row in ranked(("hsa_fwd_token", "hsa_fwd_chunk", "hsa_bwd_chunk"), case, journal):
            if row["ns_per_pair"] is None:
                continue
            rounds = {}
            (part,) = row["parts"]
            for selection, overlap in measure.overlaps(case.problem).items():
                ns, _ = cost.predict(config_of(row), case.problem, part["ctas_per_sm"], part["work"], true, overlap)
                rounds[selection] = [ns * case.problem.pairs / 1e3]
            name = measure.name_of(row, case.problem, "h200")
            journal.add(name, {"error": None, "rounds": rounds})
    found = calibrate.samples(journal, "h200")
    assert len(found) > 100 and not calibrate.samples(journal, "h100")
    with monkeypatch.context() as patch:
        patch.setattr(static, "source_digest", lambda program: "newer")
        ranked(("hsa_fwd_token",), case, journal)
    assert 100 < len(calibrate.samples(journal, "h200")) < len(found)
    fitted = calibrate.fit(found, old)
    assert fitted.l2 == pytest.approx(true.l2, rel=0.05) and fitted.reduce == pytest.approx(true.reduce, rel=0.05)
    assert fitted.hbm == old.hbm, "published, so not free"
    before, after = (calibrate.agreement(found, d) for d in (old, fitted))
    assert after > before and after > 0.99
    file = cost.make_device(**json.loads(calibrate.text(old, fitted)))
    assert file.l2 == pytest.approx(fitted.l2, rel=1e-3) and file.free == old.free and file.sms == old.sms
    with pytest.raises(ValueError, match="measurements of h100 must be in the journal, got none"):
        calibrate.fit([], cost.DEVICES["h100"])


def test_explain_says_why(monkeypatch, tmp_path):
    """Constraint, prediction, measurement and the neighbours of the config that the lookup takes."""
    journal = Journal(tmp_path / "j.jsonl")
    e = explain.explain("hsa_fwd_union_sm90a", CASE, "h200", journal)
    assert e.origin == "the best prediction of all strategies, 0.746 ns/pair"
    chosen = plan.choose("forward", CASE.problem, device="h200").programs
    assert e.chosen.config == configs.describe(dict(chosen)["hsa_fwd_union_sm90a"])
    near = {n.change: n for n in e.neighbours}
    assert near["block_M 192 -> 256"].illegal == "threads must be 32 to 384 in whole warps, got 512"
    assert near["num_stages 2 -> 3"].row["ns_per_pair"] and near["num_stages 2 -> 3"].median_us is None
    assert list(e.bounds.values()) == sorted(e.bounds.values(), reverse=True)
    rows = run(FakeGpu(), ranked(journal=journal), journal=journal)
    table.merge(table.user_path("h200"), "h200", tuner.best(CASE, rows))
    plan.clear()
    e = explain.explain("hsa_fwd_union_sm90a", CASE, "h200", journal)
    assert e.origin.startswith("measured, user's table, ")
    assert e.chosen.median_us and any(n.median_us for n in e.neighbours)


SMALL = cases.on_cpu(Problem(B=1, T=48, N=3, HQ=2, H=1, D=16, S=16, K=2))


@pytest.mark.parametrize("direction", plan.DIRECTIONS)
def test_a_plan_is_checked_and_run_through_the_public_operator(monkeypatch, direction):
    """On the CPU target. What computes the wrong thing is told."""
    programs = plan.choose(direction, SMALL).programs
    monkeypatch.setattr(measure, "_inputs", lambda problem, selection: make_inputs(problem))
    result = measure.launch(direction, SMALL, programs, "0.9")()
    results = {"forward": 1, "backward": 4, "selected_forward": 2, "selected_backward": 3}
    assert len([result] if direction == "forward" else result) == results[direction]
    measure.check(direction, SMALL, programs, "cpu")
    ran = []

    def doubled(direction, call, config, deterministic, run=tilelang.run_plan):
        ran.append((direction, json.loads(config)))
        return {name: 2 * x for name, x in run(direction, call, config, deterministic).items()}

    monkeypatch.setattr(tilelang, "run_plan", doubled)
    with pytest.raises(AssertionError, match=r"error"):
        measure.check(direction, SMALL, programs, "cpu")
    assert ran[-1][0] == direction and all(ran[-1][1][name] == vars(config) for name, config in programs)


def test_the_fastest_plan_without_atomics_is_kept_beside_a_faster_one():
    """So that deterministic=True never lacks a row that was measured."""
    rows = [r for r in ranked(("hsa_bwd_chunk",)) if not r["faults"]]
    fast = {config_of(r): 50.0 for r in rows if config_of(r).reduce_add}
    seen = run(FakeGpu(slow=fast), rows)
    found = tuner.best(CASE, seen)
    assert [(r["deterministic"], r["overlap"][1]) for r in found] == [
        (x, overlap) for overlap in (0.4, 0.8, 1.0) for x in (False, True)
    ]
    assert all(table.programs(r)[0][1].reduce_add != r["deterministic"] for r in found)
    assert len({table.identity(r) for r in found}) == 6
    table.merge(table.user_path("h200"), "h200", found)
    for deterministic in (True, False):
        ((_, config),) = plan.choose("backward", CASE.problem, "", deterministic, device="h200").programs
        assert config.reduce_add != deterministic
