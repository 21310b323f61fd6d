"""The sweep: a wrong provider is refused, rows have the schema, resume and merge; what is missing says so."""

import dataclasses
import functools
import json
import subprocess
import threading
import time

import pytest

from hsa_tl import cases
from hsa_tl.bench import providers, record, sweep, timing
from hsa_tl.bench.attention import Attention, flops_of
from hsa_tl.bench.providers import D_R
from hsa_tl.bench.sweep import Sweep

CASE = dataclasses.replace(
    cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 128, HQ=2, D=16, S=16, K=2)
)
METRICS = {"time", "throughput", "bandwidth", "peak_extra_memory"}


def attention(folder, names=("dense", "hsa-reference"), lengths=(64,), modes=("train",), **options):
    options = {"min_repeats": 1, "seconds": 0.0} | options
    return Sweep(
        Attention(), CASE, lengths, modes, names, device="cpu", out_dir=folder, **{"threads": 1} | options
    ).run()


def times(rows):
    return {r.provider: r for r in rows if r.metric == "time"}


@pytest.mark.parametrize("name", ["hsa-reference", "retrieve", "hsa-with-retrieval", "dense"])
def test_a_wrong_provider_is_refused(name, monkeypatch, tmp_path):
    right = providers.PROVIDERS[name]
    wrong = dataclasses.replace(right, attention=lambda **tensors: right.attention(**tensors) * 1.01)
    monkeypatch.setitem(providers.PROVIDERS, name, wrong)
    rows = times(attention(tmp_path, (name, "dense-expanded")))
    assert rows[name].p50 is None and rows[name].note.startswith("refused by the gate: out")
    assert rows["dense-expanded"].p50 > 0


def test_a_provider_that_raises_is_a_row(monkeypatch, tmp_path):
    right = providers.PROVIDERS["hsa-reference"]

    def late(q, **tensors):
        if q.shape[1] == 64:
            raise RuntimeError("no such length\nmore")
        return right.attention(q=q, **tensors)

    monkeypatch.setitem(providers.PROVIDERS, "hsa-reference", dataclasses.replace(right, attention=late))
    row = times(attention(tmp_path))["hsa-reference"]
    assert row.p50 is None and row.note == "failed: RuntimeError: no such length"


def test_a_provider_that_raises_while_it_is_timed_costs_no_others_time(monkeypatch, tmp_path):
    right, called = providers.PROVIDERS["hsa-reference"], []

    def later(q, **tensors):
        called.append(q.shape[1])
        if called.count(64) == 2:
            raise RuntimeError("out of memory")
        return right.attention(q=q, **tensors)

    monkeypatch.setitem(providers.PROVIDERS, "hsa-reference", dataclasses.replace(right, attention=later))
    rows = times(attention(tmp_path))
    assert rows["hsa-reference"].note == "failed: RuntimeError: out of memory" and rows["dense"].p50 > 0


def test_an_unavailable_provider_is_a_row_that_says_why(tmp_path):
    (row,) = attention(tmp_path, ("dense-fa3",))
    assert row.p50 is None and row.note == "unavailable: needs CUDA tensors, the problem is on cpu"


def test_rows_have_the_schema_and_resume(monkeypatch, tmp_path):
    monkeypatch.setenv("HSA_TL_COMMIT", "abc")
    first = attention(tmp_path)
    assert {r.metric for r in first} == METRICS
    for r in first:
        assert r.device and r.versions and r.commit and r.unit and r.x == 64 and r.config
    assert attention(tmp_path) == first, "measured again"
    assert attention(None) != first
    assert {r.key for r in record.read_rows(tmp_path / "bench.csv")} == {r.key for r in first}
    assert len(json.loads((tmp_path / "bench.json").read_text())) == len(first)


def test_rows_of_others_stay(monkeypatch, tmp_path):
    first = attention(tmp_path)
    monkeypatch.setattr(record, "device_name", lambda device: "another machine")
    second = attention(tmp_path, selection="overlap=0.5")
    assert {r.selection for r in second} == {"overlap=0.5"} and {r.device for r in second} == {"another machine"}
    key = functools.partial(sorted, key=lambda r: r.key)
    assert record.read_rows(tmp_path / "bench.csv") == key([*first, *second])


def test_rows_that_another_process_measures_meanwhile_stay(tmp_path):
    others = []

    def meanwhile(*_):
        if not others:
            others.extend(attention(tmp_path, ("dense",), (32,)))

    mine = attention(tmp_path, progress=meanwhile)
    assert {r.key for r in record.read_folder(tmp_path)} == {r.key for r in [*mine, *others]}


@pytest.mark.parametrize("line", ("a,b,c", "a,b,c,d,e,f,many" + 9 * ",", 20 * "a,"), ids=("cut", "a word", "long"))
def test_a_damaged_file_is_named(line, tmp_path):
    (tmp_path / "bench.csv").write_text(",".join(record.COLUMNS) + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"bench.csv must hold rows that hsa-tl wrote, got"):
        record.read_rows(tmp_path / "bench.csv")
    (tmp_path / "x.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"x.json must hold rows that hsa-tl wrote"):
        record.read_json(tmp_path / "x.json")


def test_rows_of_two_runs_that_end_at_once_stay(tmp_path, monkeypatch):
    read = record.read_json

    def slowly(path):
        found = read(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(record, "read_json", slowly)
    merge = functools.partial(record.merge_rows, tmp_path / "x.json", rows=[{}])
    threads = [threading.Thread(target=merge, args=({"model": name, "seed": 0},)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row["model"] for row in read(tmp_path / "x.json")} == {"a", "b"}


def test_another_commit_is_measured_again(monkeypatch, tmp_path):
    first = attention(tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "another")
    again = attention(tmp_path)
    assert {r.commit for r in again} == {"another"} and {r.key for r in again} == {r.key for r in first}


def test_an_unknown_commit_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "commit", lambda: record.UNKNOWN)
    assert attention(tmp_path) != attention(tmp_path)


def test_a_new_file_of_the_package_makes_the_tree_dirty(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "bench" / "record.py"))
    monkeypatch.delenv("HSA_TL_COMMIT", raising=False)
    assert record.commit() == record.UNKNOWN
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for args in (("init",), ("-c", "user.name=x", "-c", "user.email=x@y", "commit", "--allow-empty", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *args], check=True, capture_output=True)
    clean = record.commit()
    for name in ("notes.txt", "bench/results/bench.csv"):
        (tmp_path / name).write_text("x")
    assert record.commit() == clean and "dirty" not in clean
    found = {clean}
    for text in ("x", "y"):
        (tmp_path / "bench" / "new.py").write_text(text)
        found.add(record.commit())
    assert len(found) == 3 and all(x.startswith(clean) for x in found)


def test_a_sweep_out_of_time_says_so(tmp_path):
    assert all("time is up" in r.note for r in attention(tmp_path, deadline_s=-1.0))


def test_a_point_too_large_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "free_bytes", lambda device: 1000)
    (row,) = attention(tmp_path, ("dense-math",))
    assert row.note == "not measured: needs 9.83e+04 bytes, 1e+03 are free"


@pytest.mark.parametrize("lengths", [(4096, 1 << 16), (1 << 16,)])
def test_a_point_too_slow_is_known_beforehand(lengths, monkeypatch, tmp_path):
    """Also where it is the first one, or where what would tell was measured before and is kept."""
    ran = []
    right = providers.PROVIDERS["hsa-reference"]

    def slow(q, **tensors):
        ran.append(q.shape[1])
        time.sleep(0.02 * q.shape[1] / 4096)
        return q

    passes = dataclasses.replace(right, attention=slow)
    monkeypatch.setitem(providers.PROVIDERS, "hsa-reference", passes)
    monkeypatch.setattr(Attention, "gate", lambda *args: [])
    options = {"names": ("hsa-reference",), "modes": ("forward",), "max_call_s": 0.2}
    for _ in range(2):
        row = attention(tmp_path, lengths=lengths, **options)[-1]
        assert row.x == 1 << 16 and row.note.endswith("s, the limit is 0 s") and max(ran) <= 1 << 13


def test_a_call_without_products_says_nothing_of_longer_ones(tmp_path):
    """One chunk has no past chunk to score, so its time is no time of a FLOP."""
    rows = attention(tmp_path, ("retrieve",), lengths=(16, 128), modes=("forward",), max_call_s=1.0)
    assert all(r.p50 is not None for r in rows) and {r.x for r in rows} == {16, 128}


def test_what_selects_for_itself_has_no_row_of_anothers_selection(tmp_path):
    names = ("hsa-reference", "hsa-with-retrieval")
    assert set(times(attention(tmp_path, names, selection="full"))) == {"hsa-reference"}
    assert set(times(attention(tmp_path, names))) == set(names)


def test_rounds_go_both_ways():
    order = []
    timing.measure({n: functools.partial(order.append, n) for n in "abc"}, min_repeats=4, seconds=0)
    assert "".join(order) == "abccbaabccba"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"names": ("x",)}, r"provider must be one of dense, .*got 'x'"),
        ({"modes": ("x",)}, r"mode must be one of forward, backward, train, got 'x'"),
        ({"selection": "overlap=2"}, r"selection must be one of .*got 'overlap=2'"),
        ({"selection": "random=0.5"}, r"selection must be one of .*got 'random=0.5'"),
        ({"names": ("retrieve",), "selection": "full"}, "providers must have train of full, got retrieve"),
        ({"lengths": (0,)}, "lengths must be at least 1, got 0"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        attention(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_metrics_name_their_units():
    assert set(sweep.METRICS) == METRICS


@pytest.mark.parametrize("name", ["hsa-reference", "hsa-with-retrieval"])
def test_a_sweep_calls_as_users_do(name, monkeypatch):
    """Without an overlap, which was found outside the time."""
    asked, run = [], providers.api.hsa_attention
    right = providers.PROVIDERS[name]
    record = lambda *x, **y: asked.append(y.get("config")) or run(*x, **y)  # noqa: E731
    monkeypatch.setattr(providers.api, "hsa_attention", record)
    if name == "hsa-reference":
        monkeypatch.setitem(providers.PROVIDERS, name, dataclasses.replace(right, attention=record))
    suite, problem = Attention(), cases.on_cpu(cases.at_length(CASE.problem, 256))
    suite.call(name, problem, suite.inputs(problem, "random"), "train")()
    assert asked == [None]


def test_backward_of_retrieval_counts_pairs():
    """Queries and landmarks, of the slots that hold a chunk."""
    p = cases.at_length(CASE.problem, 100, H=2, HQ=2, B=3)
    pairs = sum(min(p.K, t // p.S) for t in range(100))
    assert flops_of("retrieval", p, "backward") == 2 * 2 * D_R * 3 * 2 * pairs
    assert flops_of("retrieval", p, "forward") == 2 * D_R * 3 * 2 * sum(t // p.S for t in range(100))


@pytest.mark.parametrize("name", ["paper-d128", "tail-perhead"])
def test_bytes_are_those_of_the_tensors(name):
    """Weights of each query head are as many as there are query heads."""
    suite, p = Attention(), cases.on_cpu(cases.at_length(cases.case(name).problem, 100))
    tensors = suite.inputs(p, "random")
    sizes = {n: x.numel() * x.element_size() for n, x in tensors.items()}
    moved = sum(sizes[n] for n in (*providers.HSA, "q"))  # out is as large as q
    assert suite.work("hsa-auto", p, "forward").moved_bytes == moved
    gradients = sum(sizes[n] for n in ("q", "k", "v", "weights"))
    assert suite.work("hsa-auto", p, "backward").moved_bytes == moved + gradients
    weights = tensors["dweights"].numel() * 4
    assert suite.work("retrieve", p, "forward").moved_bytes == sizes["q_slc"] + sizes["landmarks"] + weights
