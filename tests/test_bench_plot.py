"""Plots, verdicts and the page: images are images, and every sentence follows from the rows."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_tl.bench import compare, page, plot, plot_eval, record
from hsa_tl.bench.cli import SUITES
from hsa_tl.bench.record import Row
from hsa_tl.bench.ruler import WINDOWS, RulerRow, paired
from hsa_tl.cli import app


def row(provider, mode, T, ms, metric="time", kernel=None, **changes):
    kernel = kernel or ("dense_attention" if provider.startswith("dense") else "hsa_attention")
    unit = {"time": "ms", "throughput": "GFLOP/s", "bandwidth": "GB/s", "peak_extra_memory": "MiB"}[metric]
    values = (None,) * 3 if ms is None else (0.9 * ms, ms, 1.1 * ms)
    fields = {"config": "k16-d64: HQ=16 D=64", "selection": "random", "device": "a CPU", "versions": "torch 2"}
    fields |= {"commit": "abc", "note": ""} | changes
    return Row(kernel, provider, mode, metric, unit, "T", T, *values, **fields)


def rows(dense=(1.0, 4.0, 16.0), hsa=(2.0, 4.0, 8.0), mode="train"):
    out = []
    for i, T in enumerate((1024, 2048, 4096)):
        out += [row("dense", mode, T, dense[i]), row("hsa-auto", mode, T, hsa[i])]
        for metric in ("throughput", "bandwidth", "peak_extra_memory"):
            out += [row(n, mode, T, 10.0 + i, metric) for n in ("dense", "hsa-auto")]
    return out


def test_ratios_and_the_crossover():
    name, ratio = compare.ratios(rows(), "train")
    assert name == "hsa-auto" and ratio == {1024: 2.0, 2048: 1.0, 4096: 0.5}
    assert compare.crossover(ratio) == pytest.approx(2048)
    assert compare.crossover({1024: 4.0, 4096: 0.25}) == pytest.approx(2048)
    assert compare.crossover({1024: 0.5, 2048: 0.4}) is None and compare.crossover({1024: 2.0}) is None
    assert compare.crossover({1024: 2.0, 2048: 0.5, 4096: 1.2}) is None, "a plot would mark a length from which it wins"
    # The whole of what is paid comes before a part of it.
    both = [*rows(), row("hsa-with-retrieval", "train", 1024, 3.0, kernel="hsa_with_retrieval")]
    assert compare.ratios(both, "train") == ("hsa-with-retrieval", {1024: 3.0})


@pytest.mark.parametrize(
    "hsa, words",
    [
        (
            (2.0, 2.0, 2.0),
            "**`hsa-auto` loses to the fastest baseline at 1K**: 2.00 times the time at 1K, 8.0 times",
        ),
        ((0.5, 2.0, 2.0), "`hsa-auto` beats the fastest baseline at every length measured: 2.0 times as fast at 1K"),
        ((2.0, 8.0, 32.0), "**`hsa-auto` loses to the fastest baseline at every length measured**: 2.00 times the"),
    ],
)
def test_the_verdict_says_where_we_lose(hsa, words):
    assert compare.verdict(rows(hsa=hsa), "train").startswith(words)
    assert compare.verdict(rows(), "forward") == ""


def test_the_fastest_baseline_counts():
    faster = [*rows(), row("dense-flash", "train", 1024, 0.1)]
    assert compare.ratios(faster, "train")[1][1024] == pytest.approx(20.0)


def is_image(path):
    data = path.read_bytes()
    return len(data) > 5000 and (data.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in data[:2000])


def test_plots_are_images(tmp_path):
    record.write_rows(rows(), tmp_path)
    paths = plot.plot_speed(tmp_path / "bench.csv", tmp_path)
    assert {p.name for p in paths} == {"speed.png", "speed.svg", "speed-rates.png", "speed-rates.svg"}
    assert all(map(is_image, paths))
    svg = (tmp_path / "speed.svg").read_text()
    assert "crossover 2K" in svg and "2.0x faster at 4K" in svg and "GiB" not in svg
    roof = row("matmul", "rate", 2048, 99.0, "throughput", "roofline")
    plot.plot_rows([*rows(), roof], tmp_path)
    assert "matmul, measured" in (tmp_path / "speed-rates.svg").read_text()
    with pytest.raises(ValueError, match="rows must hold a measured time, got none"):
        plot.plot_rows([row("dense", "train", 64, None, note="unavailable: x")], tmp_path)


def width(path):
    return int.from_bytes(path.read_bytes()[16:20], "big")  # of a PNG's header


def test_many_panels_are_lines_of_a_figure(tmp_path):
    many = [r for mode in ("retrieve", "attend", "decode") for r in rows(mode=mode) if r.metric != "peak_extra_memory"]
    files = next(iter(plot.plot_rows(many, tmp_path).values()))
    assert all(width(p) < 1900 for p in files if p.suffix == ".png")


def test_every_provider_has_a_name_and_a_style():
    suites = (s() for name, s in SUITES.items() if name not in ("roofline", "micro"))
    known = {name for s in suites for name in s.providers}
    assert all(plot.look(name)[0] != name for name in known)


@pytest.mark.parametrize(
    "lengths", ([256, 4096], [1000, 1024, 2048], [2**k for k in range(8, 25)], [1024], [128 * k for k in range(1, 40)])
)
def test_ticks_do_not_collide(lengths):
    ticks = plot.length_ticks(lengths)
    assert set(ticks) <= set(lengths) and ticks[-1] == lengths[-1] and ticks == sorted(ticks)
    share = [math.log(b / a) / math.log(lengths[-1] / lengths[0]) for a, b in itertools.pairwise(ticks)]
    assert all(x > 0.124 for x in share) and (len(lengths) > 2 or ticks == lengths)


@pytest.mark.parametrize(
    "right, n, low, high",
    ((10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (1, 4, 0.0456, 0.6994)),
)
def test_wilsons_interval(right, n, low, high):
    """Values of Wilson's formula from tables."""
    assert plot.interval(right, n) == pytest.approx((low, high), abs=1e-3)


def ruler_rows(lengths, depths):
    return [RulerRow("generated", t, T, d, 0.5, 8, 4, 1.0) for t in ("s-niah", "vt") for T in lengths for d in depths]


@pytest.mark.parametrize("lengths", ([1024], [2**k for k in range(8, 25)]), ids=len)
@pytest.mark.parametrize("depths", ([None], [0.0, 0.5, 1.0]), ids=len)
def test_a_plot_of_ruler_says_what_it_shows(lengths, depths, tmp_path):
    png, svg = plot_eval.plot_ruler(ruler_rows(lengths, depths), "text-tiny-swa", 1024, 1 / 96, tmp_path / "r.png")
    text = svg.read_text()
    words = ("sliding window only (text-tiny-swa)", "trained at 1K tokens", "generated, 4 contexts", "chance, 1 in 96",
             "S-NIAH", "variable tracking", "Wilson")  # fmt: skip
    assert all(word in text for word in words) and ">0.0<" in text and ">1.0<" in text and width(png) < 1900


def test_a_plot_of_perplexity_begins_at_0(tmp_path):
    common = {"parameters": 600000, "trained_length": 1024, "tokens": 512, "windows": 64, "seed": 0}
    found = [
        common | {"model": name, "length": T, "bits_per_token": 1.5 + 0.001 * T / 1024, "standard_error": 0.02}
        for name in ("text-tiny", "mine") for T in (1024, 2048)
    ]  # fmt: skip
    text = plot_eval.plot_perplexity(found, tmp_path / "p.png")[1].read_text()
    words = ("HSA (text-tiny), 0.60M, 1 seed", "mine, 0.60M", "last 512 tokens of 64 places", "95 % interval", ">0.0")
    assert all(word in text for word in words)


def test_a_plot_of_perplexity_in_pairs(tmp_path, monkeypatch):
    """Seeds of a recipe are one line; a change is of the same places, a mean of seeds too."""
    common = {"parameters": 1, "trained_length": 1024, "tokens": 512, "windows": 2, "bits_per_token": 1.5}
    found = [
        common | {"model": "mine", "seed": seed, "length": T, "bits": [2.0 + seed, 1.0 + more]}
        for T, more in ((1024, 0), (4096, 0.5)) for seed in (0, 1)
    ]  # fmt: skip
    found.append(common | {"model": f"mine{WINDOWS}", "seed": 0, "length": 1024, "bits": [1.0, 1.0]})
    pairs = []
    monkeypatch.setattr(plot_eval, "paired", lambda *x: pairs.append(paired(*x)) or pairs[-1])
    png, svg = plot_eval.plot_perplexity(found, tmp_path / "p.png")
    words = ("mine, 0.00M, 2 seeds", "from the shortest", "dashed: windows alone", "last 512 tokens of 2 places")
    assert is_image(png) and all(word in svg.read_text() for word in words)
    assert pairs == [(0, 0), (0.25, 0.25)]
    assert "in pairs" not in plot_eval.plot_perplexity([*found[:1], found[4]], tmp_path / "p.png")[1].read_text()


def test_a_plot_of_the_loss(tmp_path):
    lines = [
        {"step": i, "stage": i // 2, "loss": 5.0 - i, "validation_loss": 5.5 if i == 3 else None} for i in range(4)
    ]
    png, svg = plot.plot_loss(lines, "toy, seed 0", tmp_path / "loss.png")
    assert is_image(png) and all(word in svg.read_text() for word in ("toy, seed 0", "training", "validation", "steps"))


def test_every_group_has_its_plot(tmp_path):
    other = [dataclasses.replace(r, selection="overlap=0.8") for r in rows()]
    other += [dataclasses.replace(r, device="another CPU") for r in rows()]
    files = plot.plot_rows(rows() + other, tmp_path)
    names = [p.name for paths in files.values() for p in paths if p.suffix == ".png"]
    assert len(files) == 3 and len(set(names)) == 6


def test_the_page(tmp_path):
    folder = tmp_path / "cpu"
    folder.mkdir()
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "h200.csv").write_text("case,program\n")
    missing = row("dense-fa3", "train", 1024, None, note="unavailable: needs CUDA tensors")
    partly = row("hsa-triton", "train", 1024, 9.0, note="with the launches; 3 repeats; queries 0 to 9 only")
    record.write_rows([*rows(), missing, partly, row("copy", "rate", 64, 7.0, "bandwidth", "roofline")], folder)
    paths = page.write_page(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert paths[0] == tmp_path / "README.md" and all(p.exists() for p in paths)
    assert "a CPU; commit abc; torch 2" in text and "measured copy: 7 GB/s" in text
    assert "| 1K | 1 (1.00), 10 MiB | 2 (2.00), 10 MiB | 9 (9.00) |" in text
    assert "`dense-fa3`, train 1K: unavailable: needs CUDA tensors" in text
    assert (
        "- queries 0 to 9 only (`hsa-triton`)\n- with the launches (`hsa-triton`)" in text and "repeats (" not in text
    )
    lost = text.split("## Where we lose")[1].split("## cpu")[0]
    assert "loses to the fastest baseline at 1K" in lost
    assert "![k16-d64](cpu/speed.png)" in text and "several commits" not in text
    page.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_the_committed_rows_are_readable():
    found = record.read_folder(Path(page.__file__).parent / "results" / "cpu")
    assert found and all(math.isfinite(r.p50) for r in compare.times(found))


def test_the_command(tmp_path):
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    record.write_rows(rows(), tmp_path / "results" / "cpu")
    run = CliRunner().invoke(app, ["plot", str(tmp_path / "results" / "cpu"), "--out", str(tmp_path / "plots")])
    assert run.exit_code == 0 and (tmp_path / "plots" / "speed.svg").exists(), run.output
    run = CliRunner().invoke(app, ["plot", "--page", str(tmp_path / "results")])
    assert run.exit_code == 0 and (tmp_path / "results" / "README.md").exists(), run.output
    run = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert run.exit_code == 2 and "folder must hold rows of a benchmark, got none" in run.output
    run = CliRunner().invoke(app, ["plot", "--page", str(tmp_path / "results"), "--out", "x"])
    assert run.exit_code == 2 and "out must be left out with --page" in run.output
