"""Figures of needles in README.md and docs/results.md are those of the files in bench/results."""

import json
from collections import defaultdict
from functools import partial

from test_figures import LENGTHS, RESULTS, K, M, accuracies, cells, in_page, needle_rows, percent, words

from hsa_tl.bench.contenders import MODELS
from hsa_tl.bench.lengths import RATES, rate
from hsa_tl.bench.paper import RUNS
from hsa_tl.bench.plot import interval
from hsa_tl.bench.plot_eval import NEEDLES
from hsa_tl.bench.ruler import paired
from hsa_tl.model import needles
from hsa_tl.model.recipe import load_recipe


def test_figures_of_needles():
    rows, fair = needle_rows(), defaultdict(list)
    for r in rows:
        if r["rates"] > 1:
            fair[r["model"], r["task"], r["length"]].append(r)
    assert {r["recipe"] for found in fair.values() for r in found} == {"needle-tiny"}

    def pooled(found):
        """As the tables have it: of all seeds' answers, and the seeds that lie outside the interval."""
        answers = sum(r["answers"] for r in found)
        accuracy, seeds = sum(r["accuracy"] * r["answers"] for r in found) / answers, [r["accuracy"] for r in found]
        ends = (*interval(round(accuracy * answers), answers), min(seeds), max(seeds))
        low, high, least, most = (round(100 * x) for x in ends)
        return rate(accuracy, answers) + (f"; {least} to {most}" if least < low or most > high else "")

    def share(model, task, T):
        """Of all seeds' answers those that are right, in percent."""
        return int(pooled(fair[model, task, T]).split()[0])

    def shown(model, task):
        """How many seeds, and their share at each length."""
        seeds = {r["seed"] for T in LENGTHS for r in fair.get((model, task, T), ())}
        return [len(seeds), *(pooled(fair[key]) if (key := (model, task, T)) in fair else "" for T in LENGTHS)]

    for model in {model for model, *_ in fair}:
        label = MODELS[model].label
        if model not in ("full-pi", "full-ntk", "full-nope") and "hsa-" not in model:  # worse than YaRN, log n and HSA
            in_page("README.md", cells(label, *shown(model, "s-niah")))
        for task, name in NEEDLES.items():
            if any(shown(model, task)):
                in_page("docs/results.md", cells(label, name, *shown(model, task)))
    text = words("README.md") + words("docs/results.md")
    every = [accuracies(rows, "needle-tiny", "hsa", "s-niah", T) for T in LENGTHS]
    assert {(len(found), min(found)) for found in every} == {(5, 1.0)} and "all five seeds of HSA" in text
    small = [r for r in rows if r["rates"] == 1]
    alone = [percent(accuracies(small, "needle-tiny", "swa", "s-niah", T)) for T in (256, M)]
    assert "of 0.36M parameters, five seeds, answers {} % at 256 tokens and {} % at 1M".format(*alone) in text
    (lr,) = {r["lr"] for r in fair["nsa", "s-niah", 256]}
    (window,) = {r["lr"] for r in fair["swa", "s-niah", 256]}
    assert lr == window == max(RATES) * load_recipe("needle-tiny").lr  # as the page says
    nope = [share("full-nope", task, 4 * K) for task in ("s-niah", "s-niah-keys", "s-niah-all")]
    rope = share("full-rope", "s-niah", 4 * K)
    assert f"answers {nope[0]} % of S-NIAH at 4K, 16 times its training length, and {rope} % with rotary" in text
    assert "made like a key {} %, in noise of all ids {}.".format(*nope[1:]) in text
    log = [share("full-nope-log", task, 4 * K) for task in NEEDLES if task != "mk-niah-3"]
    assert log[:3] == [100, 100, 100]
    assert "{} % in noise made like a key, {} in noise of all ids".format(*log[3:]) in text

    seen = [share(model, f"s-niah-{noise}", 4 * K) for noise in ("keys", "all") for model in ("full-yarn", "hsa")]
    assert "behind: {} % against {} and {} against {} at 4K".format(*seen) in text
    found = [(r["accuracy"], r["answers"]) for name in ("yarn", "pi") for r in fair[f"full-{name}", "s-niah", 32 * K]]
    assert found == [(1.0, 22), (0.75, 20)]  # in words there
    far, near = share("hsa", "s-niah-keys", M), share("full-rope", "mk-niah-3", 256)
    keys, nsa = (
        [round(100 * r["accuracy"]) for r in sorted(fair[key], key=lambda r: r["seed"])]
        for key in (("hsa", "s-niah-keys", M), ("nsa", "s-niah", 4 * K))
    )
    assert "falls to {} % by 1M ({}, {} and {} % by seed)".format(far, *keys) in text
    assert "finds {}, {}, {} and {} % of the needles at 4K by seed".format(*nsa) in text
    parts = [share(f"hsa-{part}", "s-niah", T) for part in ("one-softmax", "uniform") for T in (256, 4 * K)]
    told = (
        "in {} % at 256 tokens, of whose 16 chunks it reads 8, and in {} % at 4K; with uniform weights in {} and {} %."
    )
    assert told.format(*parts) in text
    assert {r["lr"] for r in fair["hsa-one-softmax", "s-niah", 256]} == {lr}
    assert f"full attention answers {near} %" in text
    assert {r["commit"] for r in rows if r["commit"] not in text} == set()


def test_figures_of_the_papers_table_1():
    rows, page = json.loads((RESULTS / "table-1-tiny.json").read_text()), "docs/results.md"
    at = {(r["model"], r["task"], r["length"]): rate(r["accuracy"], r["answers"]) for r in rows}
    for model, task in {key[:2] for key in at}:
        shown = (at[model, task, T] for T in (256, 512, K, 2 * K, 4 * K))
        in_page(page, cells(RUNS[model].label, NEEDLES[task].split(" (")[0], *shown))
    far = [at[model, "s-niah", 4 * K].split()[0] for model in ("nsa-rope", "nsa")]
    assert "with RoPE it finds {} % at 4K, without {}.".format(*far) in words(page)
    (wide,) = (
        r for r in needle_rows()
        if r["rates"] > 1 and (r["model"], r["seed"], r["task"], r["length"]) == ("nsa", 0, "s-niah", 4 * K)
    )  # fmt: skip
    assert f"seed 0 of NSA without positions has {100 * wide['accuracy']:.0f} % there" in words(page)
    assert {r["commit"] for r in rows} == {"ca924f633e37"} and "commit ca924f633e37" in words(page)


def test_figures_of_the_papers_table_2():
    rows, page = json.loads((RESULTS / "table-2-tiny.json").read_text()), "docs/results.md"
    bits = {(r["model"], r["length"]): r for r in rows if "bits" in r}
    asked = {(r["model"], r["length"]): r for r in rows if "accuracy" in r}
    for model in ("base", "copy", "short"):
        text = (bits[model, T] for T in (64, 128, 256))
        shown = [f"{r['bits_per_token']:.3f} ({r['standard_error']:.3f})" for r in text]
        found = (asked[model, T] for T in (64, 128, K, 16 * K))
        in_page(page, cells(RUNS[model].label, *shown, *(rate(r["accuracy"], r["answers"]) for r in found)))
    costs = [paired(bits[m, 256]["bits"], bits["base", 256]["bits"]) for m in ("copy", "short")]
    told = ["{:.3f} ({:.3f})".format(*x) for x in costs]
    assert f"text costs {told[0]} bits more after self-copy and {told[1]} after the short window" in words(page)
    about = {(r["commit"], r["trained_tokens"], r["trained_length"], r["finished"]) for r in rows}
    assert about == {("26789cb6984c", 10854400, 256, True)} and "commit 26789cb6984c" in words(page)


def test_figures_of_the_recipe():
    values = partial(accuracies, needle_rows())
    for recipe, model, name in (
        ("needle-hard", "hsa", "HSA, seeds 0 to 4"),
        ("needle-hard-short", "hsa", "HSA, shorter last stage, 256 chunks, seeds 0 to 4"),
        ("needle-hard-mass", "hsa", "HSA without overlap, seeds 0 to 4"),
        ("needle-hard-16", "hsa", "HSA without overlap, 16 chunks by score alone, seeds 0 to 4"),
        ("needle-hard-before", "hsa", "HSA before, seeds 0 to 4"),
        ("needle-hard-before", "full-rope", "full attention, RoPE, seed 0, before"),
    ):
        found = [values(recipe, model, "mk-niah-3", T) for T in LENGTHS]
        in_page("docs/results.md", cells(name, *(", ".join(f"{100 * x:.0f}" for x in v) for v in found)))
    page, recipes = words("docs/results.md"), ("needle-hard", "needle-hard-short", "needle-hard-mass")
    far = [20 * sum(values(recipe, "hsa", "mk-niah-3", M)) for recipe in recipes]  # percent, of five seeds
    assert "At 1M it is {:.0f} % in the mean, and was {:.0f} and {:.0f}.".format(*far) in page
    least, most = (
        [f([round(100 * x) for T in LENGTHS[1:] for x in values(recipe, "hsa", name, T)])
         for recipe in recipes for name in ("s-niah", "mq-niah")]
        for f in (min, max)
    )  # fmt: skip
    said = "in {} to {} % (S-NIAH) and {} to {} % (MQ-NIAH) from 4K to 1M"
    assert said.format(least[0], most[0], least[1], most[1]) in page
    assert f"shorter in {least[2]} to {most[2]} and {least[3]} to {most[3]} %" in page
    assert f"without overlap in {least[4]} to {most[4]} and {least[5]} to {most[5]} %. (These" in page


def test_figures_of_haystacks_of_needles_by_other_recipes():
    found, page = json.loads((RESULTS / "hard_haystack.json").read_text()), "docs/results.md"
    name = lambda r: (r["recipe"], r["seed"], r.get("topk", 8), r["task"], r["length"])  # noqa: E731
    right = {name(r): round(100 * r["accuracy"]) for r in found["rows"]}
    trained = {
        ("short-windows", 4, 8): "windows of 16 up to 128 tokens, then 256 tokens with 3 and 15 distractors",
        ("short-windows-47-long", 4, 8): "the same, and 950 steps with 47 distractors",
        ("no-norm-256", 4, 8): "windows of 16 first, then 47 distractors at once, landmarks without norm",
        ("to-1024", 1, 8): "windows of 16 first, then 1024 tokens with 11 distractors",
        ("to-1024-no-norm", 4, 8): "the same, landmarks without norm",
        ("muon-last-layer-too", 1, 8): "windows of 16 first, then 1024 tokens with 11 distractors, by Muon",
        ("muon-last-layer-too", 4, 8): "the same",
        ("muon-last-layer-too", 1, 16): "the same, read with 16 chunks instead of 8",
        ("muon-short-stages", 4, 16): "the same, AdamW for the last layer",
    }  # fmt: skip
    for run, name in trained.items():
        in_page(page, cells(name, run[1], *(right.get((*run, "mk-niah-3", n * K), "") for n in (4, 32, 256))))
    assert {x for k, x in right.items() if k[:3] in trained and k[3] != "mk-niah-3" and k[4] == 256 * K} == {100}
    text = words(page)
    assert all(r["commit"] in text for r in found["runs"])
    first, dims = ({(r["recipe"], r["seed"]): r for r in found[name]} for name in ("first", "dims"))
    adamw, muon = ("to-1024-no-norm", 4), [("muon-last-layer-too", seed) for seed in (4, 1)]
    whole = next(r for r in found["first"] if r.get("mass") == 1)
    assert f"in all of {whole['questions']} questions" in text and f"in {100 * whole['landmarks']:.0f} %" in text
    of = [dims[x]["landmarks_99"] for x in (adamw, *muon)]
    assert "lies in {} of 128 dimensions".format(*of) in text and "leaves {1} to {2} and".format(*of) in text
    assert "chunk first in {} to {} %".format(*(round(100 * first[x]["landmarks"]) for x in muon)) in text
    assert f"of the 96 keys' {dims['muon-few-chunks', 0]['embeddings']:.0f} count" in text
    wide = [("wide-embeddings", seed) for seed in range(5)]
    embeddings, landmarks = ([dims[x][name] for x in wide] for name in ("embeddings", "landmarks_99"))
    shown = embeddings, landmarks, [100 * first[x]["landmarks"] for x in wide]
    kept, landmarks, right_first = (f"{min(x):.0f} to {max(x):.0f}" for x in shown)
    assert f"at 0.4 they keep {kept};" in text and f"have {landmarks} dimensions and put" in text
    assert f"right chunk first in {right_first} %" in text
    losses = {(r["recipe"], r["seed"]): r["loss"] for r in found["runs"]}
    same = {f"{losses[x, 0][step]:.1f}" for x, step in (("wide-embeddings", "250"), ("muon-few-chunks", "450"))}
    assert len(same) == 1 and f"after 250 steps at 64 tokens where it was after 450 (a loss of {same.pop()})" in text
    assert f"({losses['muon-few-chunks', 0]['1100']:.1f} after 100 steps among 256 chunks)" in text
    worse = [right["wide-embeddings", 0, 64, "mk-niah-3", n * K] for n in (32, 256)]
    assert "makes it worse ({} % at 32K and {} % at 256K, seed 0)".format(*worse) in text
    read = [round(100 * first["wider-model", 0]["landmarks"]), dims["wider-model", 0]["landmarks_99"]]
    read += [right["wider-model", 0, 16, "mk-niah-3", n * K] for n in (32, 256, 1024)]
    assert "{} % at 32K, landmarks having {} dimensions, and answers {}, {} and {} %".format(*read) in text
    among = [round(100 * r[x]) for r in found["among"][::-1] for x in ("first", "of_16")]
    among_16 = "in {} % of 100 questions and among the 16 that are read in {} %; with 128, seed 1, in {} and {} %"
    assert among_16.format(*among) in text
    own = {(r["length"] // K, r["topk"], r["factor"]): round(100 * r["accuracy"]) for r in found["own_mass"]}
    own = [own[x] for x in ((256, 64, 1), (256, 64, 0), (K, 64, 4), (K, 64, 0), (K, 256, 4), (K, 256, 0))]
    more = "{} % instead of {} at 256K (factor 1), {} instead of {} at 1M (factor 4); 256 chunks: {} % instead of {} "
    assert more.format(*own) in text
    sharp = {r["sharper"]: round(100 * r["accuracy"]) for r in found["sharpness"] if r["topk"] == 16}
    assert f"does nothing ({sharp[1.5]} and {sharp[0.7]} % at 256K, where {sharp[1.0]} % are right" in text


def test_figures_of_borders():
    """Of values that begin a chunk: what the trained model makes of them, why, and what an overlap changes."""
    found, text = json.loads((RESULTS / "hard_haystack.json").read_text()), words("docs/results.md")
    loss = {(r["recipe"], r["seed"]): r["loss"] for r in found["runs"]}
    late = loss["mass-from-the-start", 0]["850"], loss["wide-embeddings", 0]["850"]
    assert "the loss is {:.1f} (seed 0) instead of {:.1f}.".format(*late) in text
    ends = loss["mass-at-the-end", 1]
    assert f"end at a loss of {ends['249']:.2f} where they begin at {ends['0']:.2f}." in text
    recall = {(r["recipe"], r["length"]): r for r in found["recall"]}
    of = [round(100 * recall["wide-embeddings", M]["among"][n]) for n in ("64", "256", "512")]
    assert "in {}, {} and {} % of 100 questions at 1M".format(*of) in text
    heaviest = recall["wide-embeddings", M]["heaviest"]
    assert heaviest.items() <= recall["wide-embeddings", M]["among"].items(), "wherever it is read"
    cost = [r[x] for x in ("softmax", "mass") for r in found["token_ms"]]
    assert "takes {:.1f} ms with 16 chunks and {:.1f} with 512, by mass {:.1f} and {:.1f} (seed 1".format(*cost) in text
    assert all(f"commit {r['commit']})" in text for r in found["token_ms"])
    borders = {r["recipe"]: r for r in found["borders"]}
    trained, mixed, overlap = (borders[x] for x in ("wide-embeddings", "conv-matrices", "overlap"))
    assert f"their loss is {trained['loss_first']:.2f}, of all others {trained['loss_elsewhere']:.3f}." in text
    (swapped,) = found["swapped"]
    assert f"from {swapped['as_is']:.1f} standard deviations above the others' to {swapped['z']['-1']:.1f}," in text
    assert all(abs(z - swapped["as_is"]) < 0.02 for at, z in swapped["z"].items() if at != "-1")
    assert f"{mixed['loss_first']:.3f}" == f"{mixed['loss_elsewhere']:.3f}"
    assert f"(a loss of {mixed['loss_first']:.3f} at 1024 tokens)" in text
    held = {recipe: {k: round(100 * x) for k, x in r["among"].items()} for (recipe, T), r in recall.items() if T == M}
    assert f"hold the right chunk in {held['conv-matrices']['256']} %" in text
    assert f"chunks instead in {held['conv-more-distractors']['256']} %" in text
    assert abs(overlap["z_first"] - overlap["z_elsewhere"]) < 0.05
    assert f"lies {overlap['z_first']:.1f} standard deviations above the others, as all" in text
    among = [held["overlap"][n] for n in ("64", "256", "512")]
    assert "among 64, 256 and 512 in {}, {} and {} %".format(*among) in text


def test_figures_of_keys_of_one_token():
    """What more of their answers in the last stage gives and takes, by 256 chunks, and what 512 give back."""
    found, text = json.loads((RESULTS / "hard_haystack.json").read_text()), words("docs/results.md")
    right = {(r["recipe"], r["seed"], r["task"], r["length"]): 100 * r["accuracy"] for r in found["rows"]}
    tasks = ("s-niah", "mq-niah", "mk-niah-3")
    more = [right["one-token-14", 1, task, M] for task in tasks]
    assert "seed 1 has {:.0f} % of S-NIAH and {:.1f} of MQ-NIAH at 1M, but {:.0f} of MK-NIAH 3".format(*more) in text
    tenth = [right["one-token-10", 1, task, M] for task in tasks] + [right["one-token-10", 3, "mk-niah-3", M]]
    assert "250 steps more {:.0f}, {:.0f} and {:.0f}, seed 3 {:.0f}.".format(*tenth) in text
    by_512 = accuracies(needle_rows(), "needle-hard", "hsa", "mk-niah-3", M)
    assert f"By 512 chunks these two are {100 * by_512[1]:.0f} and {100 * by_512[3]:.0f} %." in text
    for name, share in (("one-token-14", 14), ("one-token-10", 10)):
        last = found["recipes"][name]["stages"][-1]["data"]["tasks"]
        answers = [task.get("weight", 1) * task["queries"] for task in last]
        assert round(100 * answers[0] / sum(answers)) == share


def test_figures_of_needles_alike():
    """What the model with an overlap still confuses, and by which power it reads."""
    found, text = json.loads((RESULTS / "hard_haystack.json").read_text()), words("docs/results.md")
    first, *_, alike = found["alike"]
    wrong = first["wrong_by_shared"]
    said = "Still {:.0f} % are right there (seed 1). {} of the {} wrong values are of needles that share two"
    assert said.format(100 * first["accuracy"], wrong["2"], sum(wrong.values())) in text
    assert (
        f"as {alike['needles_that_share_2']:.0f} of {round(needles.task('mk-niah-3', M).count, -3):,} needles do"
        in text
    )
    right = {(r["recipe"], r["seed"], r["score"], r["mass"]): round(100 * r["accuracy"]) for r in found["readings"]}
    both, mass = (
        [right[(*run, x, 4)] for run in (("overlap-alike", 1), ("overlap", 1), ("overlap", 0))] for x in (4, 1)
    )
    assert f"make it {mass[0]} %." in text
    said = f"with 4 on both it is {both[0]} instead of {mass[0]} %, before these steps {both[1]} instead of {mass[1]}"
    assert f"{said}, and {both[2]} instead of {mass[2]} with seed 0." in text
