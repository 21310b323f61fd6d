"""Figures in the README and docs/ are those of the files in bench/results."""

import csv
import json
import re
from pathlib import Path

import numpy as np

from hsa_tl.bench.ruler import WINDOWS, paired

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
K, M = 1 << 10, 1 << 20
LENGTHS = (256, 4 * K, 32 * K, 256 * K, M)


def cells(*values: str) -> str:
    """A line of a table."""
    return "|" + "".join(f" {v} |" if v else " |" for v in values)


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def words(page: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / page).read_text().split())


def in_page(page: str, line: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    assert line in lines, f"{page} must have the line that the results give:\n{line}"


class Speed:
    """Medians of bench.csv, random selections; and the commits of those that were asked for."""

    def __init__(self):
        with (RESULTS / "bench.csv").open() as file:
            rows = [r for r in csv.DictReader(file) if r["selection"] == "random" and r["p50"]]
        self.at = {(r["config"], r["mode"], r["provider"], int(r["x"]), r["metric"]): r for r in rows}
        self.commits = set()

    def __call__(self, config: str, mode: str, T: int, *providers: str, metric: str = "time") -> float:
        """The least of the providers'."""
        rows = [self.at[config, mode, p, T, metric] for p in providers]
        self.commits |= {r["commit"] for r in rows}
        return min(float(r["p50"]) for r in rows)


def test_figures_of_speed():
    speed, dims = Speed(), "k16-d64: HQ=16 H=1 D=64 S=64 K=16 "
    for T in (1024, 4096, 16384):
        line = [str(T)]
        for mode in ("forward", "train"):
            dense = speed(f"{dims}float32", mode, T, "dense", "dense-expanded")
            ours = speed(f"{dims}float32", mode, T, "hsa-with-retrieval")
            line += [number(dense), number(ours), f"{ours / dense:.2f}"]
        in_page("README.md", cells(*line))
    for commit in speed.commits:
        assert commit in words("README.md")
    for T in (65536, 262144):
        line = [str(T)]
        for p in ("materialise", "hsa-auto"):
            config = "k16-d64: R=1 D_r=64 S=64 K=16 float32"
            line.append(f"{speed(config, 'prefill', T, p):.0f} ms")
            line.append(f"{speed(config, 'prefill', T, p, metric='peak_extra_memory'):.0f} MiB")
        in_page("docs/results.md", cells(*line))
    for T in (4096, 262144, 16777216):
        dense = speed(f"{dims}D_r=64 float32", "decode", T, "dense", "dense-grouped")
        ours = speed(f"{dims}D_r=64 float32", "decode", T, "hsa-auto")
        in_page("docs/results.md", cells(str(T), number(dense), number(ours)))
    for commit in speed.commits:
        assert commit in words("docs/results.md")


def percent(values: list[float]) -> str:
    """The median, with the worst and the best where they differ."""
    low, mid, high = (round(100 * sorted(values)[i]) for i in (0, len(values) // 2, -1))
    return str(mid) if low == high else f"{mid} ({low} to {high})"


def needle_rows() -> list[dict]:
    return json.loads((RESULTS / "lengths.json").read_text())


def accuracies(rows: list[dict], recipe: str, model: str, task: str, T: int) -> list[float]:
    """Of each seed, in their order."""
    found = [r for r in rows if (r["recipe"], r["model"], r["task"], r["length"]) == (recipe, model, task, T)]
    return [r["accuracy"] for r in sorted(found, key=lambda r: r["seed"])]


def test_figures_of_linear_attention():
    found, page = json.loads((RESULTS / "linear.json").read_text()), "docs/results.md"
    names = {
        "hsa": "HSA over windows of 32",
        "hsa-linear, no bound": "HSA over linear layers that may remember everything",
        "hsa-linear": "HSA over linear layers, 1/e within 32 tokens",
    }  # fmt: skip
    asked = [r for r in (*found["rows"], *found["hsa_taken_out"]) if r["task"] == "s-niah"]
    for model, name in names.items():
        mine = [r for r in asked if r["model"] == model]
        shown = (f"{100 * r['accuracy']:.0f}" for r in mine)
        assert [r["length"] for r in mine] == [256, 4 * K, 32 * K, 64 * K, 256]
        in_page(page, cells(name, f"{mine[0]['parameters'] / 1e6:.2f}M", *shown))
    text = words(page)
    step, prefill, decode = (f"{r['cpu_ratio']:.2f}" for r in found["cost"])
    assert f"{step} for a training step of 256 tokens, {prefill} for a prefill of 16K, {decode} for a token" in text
    assert all(r["commit"] in text for rows in found.values() for r in rows)


def test_figures_of_text():
    rows = json.loads((RESULTS / "perplexity.json").read_text())
    text = words("docs/results.md")
    by = {(r["model"], r["seed"], r["length"]): r for r in rows}
    assert all(r["commit"] in text + words("docs/long-context.md") for r in rows)

    def bits(model, seed):
        at = ((model, seed, n * K) for n in (1, 2, 4, 8, 16, 32, 64))
        return [f"{by[key]['bits_per_token']:.3f}" if key in by else "" for key in at]

    def size(model, seed):
        return f"{next(r['parameters'] for r in rows if (r['model'], r['seed']) == (model, seed)) / 1e6:.2f}M"

    for model, name in (
        ("text-tiny-before", "HSA by AdamW, without recency and distractors"),
        ("text-tiny-baselm", "full attention, RoPE"), ("text-tiny-baselm, YaRN", "full attention, RoPE by YaRN"),
        ("text-tiny-baselm-adamw", "full attention, RoPE, by AdamW"),
        ("text-tiny-swa", "window of 64 only, by AdamW"),
    ):  # fmt: skip
        in_page("docs/results.md", cells(name, size(model, 0), *bits(model, 0), ""))
    far = json.loads((RESULTS / "perplexity-256k.json").read_text())
    other = {(r["model"], r["seed"], r["length"]): r["bits"] for r in far}
    for model, name in (("text-tiny", "HSA"), ("text-tiny-adamw", "HSA by AdamW")):
        seeds = sorted({r["seed"] for r in rows if r["model"] == model})
        for seed in seeds:
            change, error = paired(*(by[model, seed, T]["bits"] for T in (64 * K, K)))
            of, at = size(model, seed), bits(model, seed)
            in_page("docs/results.md", cells(f"{name}, seed {seed}", of, *at, f"{change:+.4f} ({error:.4f})"))
        changes = [np.mean(by[model, seed, 64 * K]["bits"]) - np.mean(by[model, seed, K]["bits"]) for seed in seeds]
        farther = np.mean([paired(other[model, seed, 256 * K], other[model, seed, K])[0] for seed in seeds])
        assert f"{np.mean(changes):+.4f} at 64K and {farther:+.4f} at 256K" in text
        alone = np.mean([by[model + WINDOWS, seed, K]["bits_per_token"] for seed in seeds])
        gain = alone - np.mean([by[model, seed, K]["bits_per_token"] for seed in seeds])
        if model == "text-tiny":
            assert f"the same model has {alone:.3f} at 1K" in text and f"is worth {gain:.2f} bits" in text
            full = [by["text-tiny-baselm", 0, n * K]["bits_per_token"] for n in (1, 16)]
            told = (
                f"reads 64K with {-np.mean(changes):.3f} bits per byte less than 1K, where those of full attention rise"
            )
            assert f"{told} from {full[0]:.2f} to {full[1]:.2f} by 16K" in words("README.md")
    whole, page = "text-tiny-3-distractors", words("docs/long-context.md")
    told = [by[model, 0, n * K]["bits"] for model in (whole, "text-tiny-adamw") for n in (1, 64)]
    three, seven = paired(*told[1::-1]), paired(*told[:1:-1])
    assert f"{np.mean(told[0]):.3f} at 1K and {np.mean(told[1]):.3f} at 64K, a change of {three[0]:+.4f}" in page
    assert f"300 steps gave {seven[0]:+.4f}" in page
    gains = [
        np.mean([by[model + "-adamw", s, K]["bits_per_token"] - by[model, s, K]["bits_per_token"] for s in range(n)])
        for model, n in (("text-tiny", 3), ("text-tiny-baselm", 1))
    ]
    assert "takes {:.2f} bits off HSA at 1K and {:.2f} off full attention".format(*gains) in text
    better = by["text-tiny-baselm", 0, K]["bits_per_token"] - np.mean([by["text-tiny", s, K]["bits"] for s in range(3)])
    assert f"HSA is {better:.2f} bits better at the training length" in text
    worse = np.subtract(*(by["text-tiny-before", 0, n * K]["bits_per_token"] for n in (64, 1)))
    assert f"recency and distractors](long-context.md) {worse:.3f} at 64K" in text
    at = [r for r in json.loads((RESULTS / "ruler.json").read_text()) if r["length"] == 16 * M]
    for task, name in (("s-niah", "S-NIAH"), ("mq-niah", "MQ-NIAH")):
        mine = [r for r in at if r["task"] == task]
        right = round(sum(r["accuracy"] * r["answers"] for r in mine))
        assert f"{name} {right} of {sum(r['answers'] for r in mine)}" in text
        assert mine[0]["commit"] in text


def test_figures_of_muon():
    found, page = json.loads((RESULTS / "muon.json").read_text()), words("docs/model-and-training.md")
    bf16, float32 = (round(r["milliseconds"]["muon"] - r["milliseconds"]["adamw"]) for r in found["step"])
    assert f"takes {float32} ms more of one thread with AVX2, where in bfloat16" in page
    assert f"it takes {bf16} ms more (commit {found['commit']}" in page


def test_figures_of_shared_contexts():
    rows = json.loads((RESULTS / "ranks.json").read_text())
    text = words("docs/long-context-and-serving.md")
    assert {r["length"] for r in rows} == {M} and all(r["commit"] in text for r in rows)
    for ranks in ("", ", 2 ranks", ", 4 ranks"):
        mine = [r for r in rows if r["model"] == f"needle-tiny-hsa{ranks}"]
        right, asked = sum(r["answers"] * r["accuracy"] for r in mine), sum(r["answers"] for r in mine)
        generated = sum(r["answers"] for r in mine if r["method"] == "generated")
        assert f"each gave {right:.0f} of {asked} right answers, {generated} of them generated" in text


def test_figures_of_fewer_chunks():
    page = "docs/long-context-and-serving.md"
    for setting in ("budget", "topp"):
        rows = json.loads((RESULTS / f"{setting}.json").read_text())

        def line(name, task, field, show, rows=rows):
            mine = [r for r in rows if r["task"] == task]
            in_page(page, cells(f"{name} at {mine[0]['length'] // K}K", *(show(r[field]) for r in mine)))

        for task, name in (("s-niah", "S-NIAH"), ("mq-niah", "MQ-NIAH")):
            line(name, task, "score", lambda x: f"{100 * x:.0f} %")
            if setting == "topp":
                line(f"chunks read, {name}", task, "chunks", "{:.1f}".format)
        line("bits per byte of text", "held_out", "score", "{:.3f}".format)
        if setting == "topp":
            line("chunks read, text", "held_out", "chunks", "{:.1f}".format)
        line("CPU time, text", "held_out", "cpu_ratio", "{:.2f}".format)
        assert all(r["commit"] in words(page) for r in rows)


def test_figures_of_noise():
    rows, page = json.loads((RESULTS / "noise.json").read_text()), "docs/results.md"
    truth = {id(r): r["chunks"][int(np.argmax(r["without"]))] for r in rows}
    for task, name in (("s-niah", "S-NIAH at 1K"), ("mq-niah", "MQ-NIAH at 1K"), ("held_out", "text at 4K")):
        mine = [r for r in rows if r["task"] == task]
        found, alone = (sum(r[x] == truth[id(r)] for r in mine) for x in ("best", "gradient_best"))
        ranks = "{:.2f} ({:.2f})".format(*(np.mean([r[x] for r in mine]) for x in ("ranks", "gradient_ranks")))
        read = f"{np.mean([len(r['chunks']) for r in mine]):.0f}"
        shown = ranks if task == "held_out" else ""
        in_page(page, cells(name, read, f"{found} of {len(mine)} ({alone})", shown))
    needles, text = ([r for r in rows if (r["needle"] is None) == kind] for kind in (False, True))
    assert all(truth[id(r)] == r["needle"] for r in needles)
    signs = np.concatenate([np.sign([r["scores"], r["without"]]) for r in text], 1)
    told = words(page)
    most, least = ([f(r["without"]) for r in text] for f in (max, min))
    assert f"rises by {np.mean([max(r['without']) for r in needles]):.1f} bits in the mean" in told
    assert max(sorted(np.abs(r["without"]))[-2] for r in needles) < 0.001
    assert f"{100 * np.mean(signs[0] == signs[1]):.0f} % of the scores have the right sign" in told
    assert f"{100 * np.mean(signs[1] < 0):.0f} % of the chunks that were read hurt" in told
    assert f"costs {-np.mean(least):.3f} bits a byte in the mean, and the best is worth {np.mean(most):.3f}" in told
    assert all(r["commit"] in told for r in rows)


def test_figures_of_options():
    """Value residual and RoPE's extensions: each line of both tables, differences in pairs of places."""
    rows, page = json.loads((RESULTS / "options.json").read_text()), "docs/results.md"
    bits = {(r["option"], r["length"]): r["bits"] for r in rows}
    cost = {r["option"]: r["cost_per_step"] for r in rows if "cost_per_step" in r}

    def change(option, length, base):
        return "{:+.3f} ({:.3f})".format(*paired(bits[option, length], base[: len(bits[option, length])]))

    for name in ("none", "resformer", "svformer"):
        option = f"value_residual {name}"
        shown = "" if name == "none" else change(option, K, bits["value_residual none", K])
        at = (f"{np.mean(bits[option, T]):.3f}" for T in (512, K))
        in_page(page, cells(name, *at, shown, f"{cost[option]:.2f}"))
    names = {"rope": "as trained", "pi": "position interpolation", "ntk": "NTK-aware", "yarn": "YaRN"}
    for kind, name in names.items():
        in_page(page, cells(name, *(change(f"rope {kind}", n * K, bits["rope rope", 512]) for n in (1, 2, 4, 8))))
    text = words(page)
    assert all(r["commit"] in text and r["trained_commit"] in text for r in rows)


def test_figures_of_two_tiers():
    rows, page, texts = json.loads((RESULTS / "tiers.json").read_text()), "docs/results.md", ("chosen", "broad")
    bits = {(r["model"], r["text"]): r["bits"] for r in rows}
    names = {"broad": "broad text alone", "mixed": "one mixture", "two-tier": "two tiers"}
    for model, name in names.items():
        in_page(page, cells(name, *(f"{np.mean(bits[model, text]):.3f}" for text in texts)))
    change = ("{:+.3f} ({:.3f})".format(*paired(bits["two-tier", text], bits["mixed", text])) for text in texts)
    in_page(page, cells("two tiers minus one mixture", *change))
    assert all(r["commit"] in words(page) for r in rows)


def test_figures_of_the_bound_of_recency():
    found = json.loads((RESULTS / "recency_bound.json").read_text())
    text = {r["span"]: f"{r['change']:+.4f} ({r['error']:.4f})" for r in found["text_same_slope"]}
    needles = {r["span"]: r for r in found["needles"] if r["length"] == 64 * K and r["bound"]}
    for span, r in needles.items():
        right = f"{round(100 * r['accuracy'])} %"
        in_page("docs/long-context.md", cells(f"{span} chunks", text.get(span, ""), f"{r['bound']:.2f}", right))
    assert f"commit {found['commit']} " in words("docs/long-context.md")


def test_figures_of_long_contexts_of_text():
    """The tables: each run's bits, its change in pairs of places, and where the weight of seed 1 goes."""
    found = json.loads((RESULTS / "text_length.json").read_text())
    cost, page = found["cost_per_step"]["steps"], "docs/long-context.md"
    costs = (found["cost_of_distractors"][commit] for commit in ("1d2694731f8b", "a3fbc000510f"))
    shares = (max(0, round(100 * (x / none - 1))) for none, *others in costs for x in others)
    said = "copied for them: {} and {} %, where the code before it takes {} and {} % when measured in turns"
    assert said.format(*shares) in words(page)
    names = {
        "text-today": "as before", "text-recency": "recency", "text-distractors": "3 distractors",
        "text-both": "recency and 3 distractors",
    }  # fmt: skip
    bits = {(r["model"], r["seed"], r["length"]): r["bits"] for r in found["rows"]}
    for model, seed in {key[:2] for key in bits if key[0] in names}:
        at = [bits[model, seed, T] for T in (K, 4 * K, 16 * K, 64 * K)]
        alone, (change, error) = bits[model + WINDOWS, seed, K], paired(at[-1], at[0])
        shown = (*(f"{np.mean(x):.3f}" for x in (*at, alone)), f"{change:+.4f} ({error:.4f})")
        in_page(page, cells(names[model], str(seed), *shown, f"{cost[model]['ratio']:.2f}"))
    chunks = np.arange(32 * K, 64 * K) // 64  # before each token of the second half
    up_to = {"spread evenly": [np.minimum(1, n / chunks).mean() for n in (1, 15, 255)]}
    for model, name in names.items():
        (shares,) = found["weight_by_distance"][f"{model}, seed 1"]["weight_by_distance"].values()
        up_to[name] = np.cumsum(shares)[[0, 3, 7]]
    for name, (first, near, middle) in up_to.items():
        in_page(page, cells(name, *(f"{x:.2f}" for x in (first, near, middle - near, 1 - middle))))
    text = words(page)
    for model in ("text-today", "text-both"):
        at = [np.mean([bits[model, seed, T] for seed in (1, 2, 3)], 0) for T in (64 * K, K)]
        assert "{:+.4f} ({:.4f})".format(*paired(*at)) in text
    assert {r["commit"] for r in found["rows"]} <= set(re.findall(r"\b[0-9a-f]{12}\b", text))


def test_figures_of_other_levers_of_text():
    found, page = json.loads((RESULTS / "text_levers.json").read_text()), "docs/long-context.md"
    bits = {(r["model"], r["length"]): r["bits"] for r in found["rows"]}
    names = {
        "both": "recency and 3 distractors", "joint": 'fusion "joint"', "softmax1": 'fusion "softmax1"',
        "topk-4": "4 chunks instead of 8", "distractors-7": "7 distractors", "mass": 'fusion "mass"',
        "topk-4-from-the-first-stage": "4 chunks, from the first stage on",
        "distractors-half": "3 distractors every second 10 steps",
        "distractors-throughout": "3 distractors in the first stage too", "noise": "noise on the scores that choose",
        "bypass": "HSA through the feed-forward layer alone", "4k": "samples of 4K, 1 distractor",
        "4k-topk-4": "samples of 4K, 1 distractor, 4 chunks",
        "long-files": "samples of 4K of long files, 1 distractor",
    }  # fmt: skip
    assert {model for model, _ in bits if not model.endswith(WINDOWS)} == set(names) <= set(found["recipes"])
    for model, name in names.items():
        at = [bits[model, T] for T in (K, 4 * K, 16 * K, 64 * K)]
        shown = (f"{np.mean(x):.3f}" for x in (*at, bits[model + WINDOWS, K]))
        changes = ("{:+.4f} ({:.4f})".format(*paired(*x)) for x in ((at[-1], at[0]), (at[0], bits["both", K])))
        in_page(page, cells(name, *shown, *changes))
    full = {(r["model"], r["length"]): r["bits"] for r in found["full_attention"]}
    told = "it has {:.3f} bits at 1K and {:+.4f} ({:.4f}) more at 4K; on samples of 1K {:.3f} and {:+.4f} ({:.4f})"
    models = [(full[x, K], full[x, 4 * K]) for x in ("4k-full", "1k-full")]
    assert told.format(*(y for a, b in models for y in (np.mean(a), *paired(b, a)))) in words(page)
    assert all(r["commit"] in words(page) for r in found["rows"] + found["full_attention"])
