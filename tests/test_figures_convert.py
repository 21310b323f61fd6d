"""Figures of converted models in docs/convert.md are those of the files in bench/results."""

import json
import math

import numpy as np
from test_figures import RESULTS, ROOT, K, cells, in_page, words

from hsa_tl.bench.plot import interval

EIGHT = (0, 2, 4, 6, 8, 10, 14, 18)  # contexts that were asked for codes at 8K


def code(row: dict) -> str:
    return f"{row['right']} of {row['contexts']}"


def test_figures_of_a_converted_model():
    found = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("llm-*.json"))}
    files, page, told = list(found.values()), (ROOT / "docs/convert.md").read_text(), []
    fine = found["llm-2048.json"]
    heads = sum(map(len, fine["recall_by_head"]["mass"]))
    methods = {
        "source": "the source", "window": "window and sinks alone", "all": "all chunks",
        "mass": "16 chunks of 64 by mass", "mean": "16 chunks of 64 by mean key",
        "mean of 16": "64 chunks of 16 by mean key",
        "landmark of 16": f"64 chunks of 16 by landmarks, {len(fine['exact_heads'])} of {heads} heads by mass",
        "no positions": "the same with `--far-positions 0`",
    }  # fmt: skip
    at = {}
    for file in files:
        for row in file["rows"]:
            old = row["method"] == "landmark of 16" and not file.get("far_positions")
            key = "no positions" if old else row["method"], row["length"]
            assert key not in at and row["contexts"] == len(row["found"])
            at[key] = row
    lengths = (2 * K, 8 * K, 32 * K, 64 * K)
    for method, name in methods.items():
        rows, timed = [at.get((method, length)) for length in lengths], at.get((method, 4 * K))
        values = [f"{code(r)}, {r['perplexity']:.1f}" if r else "" for r in rows]
        if timed:
            values += [f"{1000 * timed['seconds'] / timed['tokens']:.1f} ms", f"{timed['token_ms']:.0f} ms"]
        in_page("docs/convert.md", cells(name, *values, *[""] * (6 - len(values))))
    for row in (row for (_, length), row in at.items() if length in lengths):
        low, high = (100 * x for x in interval(row["right"], row["contexts"]))
        told.append(f"{code(row)} is {low:.0f} to {high:.0f} %")
    source, longer = [at["source", T] for T in lengths[:2]], at["source", 16 * K]
    ours, before = ([at.get((name, T)) for T in lengths] for name in ("landmark of 16", "no positions"))
    costs = [100 * (x["perplexity"] / y["perplexity"] - 1) for x, y in zip(ours, source, strict=False)]
    lost = 100 * (at["window", 8 * K]["perplexity"] / source[1]["perplexity"] - 1)
    told += [
        f"perplexity {costs[0]:.1f} % higher) and finds as many codes",
        f"landmarks find all {ours[1]['right']} codes and the source {source[1]['right']}**; what it reads there costs "
        f"{costs[1]:.1f} % of perplexity, where window and sinks alone cost {lost:.0f} %",
        f"**At 32K landmarks find {code(before[2])} codes** without positions behind the window and {code(ours[2])} "
        f"with, **at 64K {code(before[3])}** and {code(ours[3])}",
        "of {:.1f} instead of {:.1f} at 32K and, each haystack counted once, {:.1f} instead of {:.1f} at 64K".format(
            ours[2]["perplexity"],
            before[2]["perplexity"],
            *(math.exp((np.mean(x[:3]) + np.mean(x[3:])) / 2) for x in (ours[3]["losses"], before[3]["losses"])),
        ),
        f"finds {code(longer)} codes and predicts text no more (perplexity {longer['perplexity']:.0f})",
        "{:.1f} % of the attention to all chunks by mass, {:.1f} % by landmarks alone and {:.1f} % by mean key".format(
            *(100 * fine["recall"][x] for x in ("mass", "landmark", "mean"))
        ),
        f"logits differ from the source's by {max(file['difference'] for file in files):.0e} at most",
    ]
    keys, landmark = 2 * 4 * 64 * heads, 4 * (64 + fine["anchors"]) * heads / 16  # bytes of a token, float32
    told.append(
        f"{keys / 1e3:.0f} KB a token in float32, and landmarks of chunks of 16 tokens {100 * landmark / keys:.0f} %"
    )
    assert ours[0]["right"] == source[0]["right"] and ours[1]["right"] == ours[1]["contexts"]
    asked = json.loads((RESULTS / "convert_ruler.json").read_text())["rows"]
    right = [
        f"{sum(r['accuracy'] * r['answers'] for r in asked if r['run'] == x):.0f} of "
        f"{sum(r['answers'] for r in asked if r['run'] == x)}"
        for x in ("source", "landmarks")
    ]
    told.append("the source generates {} answers right, landmarks {}; neither".format(*right))
    assert not any(row["accuracy"] for row in asked if row["depth"] == 0)
    files += asked
    size = json.loads((RESULTS / "convert_size.json").read_text())
    files += [size[part] | {"device": size["device"]} for part in ("convert", "load")]
    gb = (f"{x / 1e9:.1f} GB" for x in (size["bytes"], size["convert"]["memory"], size["load"]["memory"]))
    size_told = (
        "({{}} in {} files) take {} s and {{}} of memory beyond the mapped files, and `load` in bfloat16 takes {{}}"
    )
    told.append(size_told.format(size["files"], size["convert"]["seconds"]).format(*gb))
    sources = [word for found in files for word in (found["commit"], found["device"].split(",")[0])]
    assert sources and all(word in page for word in sources)
    assert not [x for x in told if x not in words("docs/convert.md")]


def test_figures_of_far_keys():
    found, page = json.loads((RESULTS / "convert_far.json").read_text()), "docs/convert.md"
    places, table, told = ((8192, 0), (8192, 1), (32768, 1), "codes"), {}, []
    biased, rows = ([row for row in found["rows"] if bool(row["chunk_bias"]) == x] for x in (True, False))
    for row in rows:
        codes, preference = "right" in row, f"{row['recency'] or 'none'}"
        text = f"{row['right']} of {row['contexts']}" if codes else f"{row['nats']:.3f}"
        if row["model"].startswith("windows"):
            told.append(f"Window and sinks alone have {text}")
        elif not codes or row["length"] == 8192:
            name = ("the source", "") if row["model"] == "source" else (f"{row['far_positions']}", preference)
            table.setdefault(name, {})["codes" if codes else (row["length"], row["piece"])] = text
    far = {
        row["recency"]: row["losses"]
        for row in rows
        if row["length"] == 32768 and "right" in row and row["far_positions"] == 0
    }
    pair = (math.exp(np.mean(far[recency])) for recency in (4, 0))
    told.append("at a perplexity of {:.2f} where it is {:.2f} without".format(*pair))
    two = (*far[8], *far[4][::2])
    told.append("has {:.3f} and {:.3f} nats a token at 32K, with 4 it has {:.3f} and {:.3f}".format(*two))
    best = [min(r["nats"] for r in biased if (r["length"], r.get("piece")) == place) for place in places[:2]]
    squeezed = [float(table["512", "4"][place]) for place in places[:2]]
    assert np.allclose(best, squeezed, rtol=0, atol=2e-3) and all(
        r["right"] < r["contexts"] for r in biased if "right" in r
    )
    asked = ", ".join(dict.fromkeys(code(r) for r in biased if "right" in r))
    told.append(
        "of {} kinds: text at 8K came to {:.3f} and {:.3f}".format(len({r["chunk_bias"] for r in biased}), *best)
    )
    told.append(f"each that was asked for codes lost some ({asked})")
    assert len(table) == 10 and len(told) == 5
    for name, row in table.items():
        in_page(page, cells(*name, *(row.get(place, "") for place in places)))
    source, squeezed = table["the source", ""], table["8192", "4"]
    more = [100 * math.expm1(float(squeezed[x]) - float(source[x])) for x in places[:2]]
    alike = sum(json.loads((RESULTS / "llm-8192.json").read_text())["rows"][1]["found"][i] for i in EIGHT)
    told.append(
        "a perplexity {:.1f} and {:.1f} % above the source's, and {} codes are found, of which the source finds {}"
    )
    told[-1] = told[-1].format(*more, squeezed["codes"], alike)
    cost = found["cost"]
    more = (100 * (x["512"] / x["0"] - 1) for x in (cost["positions"]["prefill"], cost["positions"]["token"]))
    told.append("{:.0f} % of the time of a prompt's token at 4K, {:.0f} % of a token's behind it".format(*more))
    pair = (cost["chunks"]["2048"][x] for x in ("recency", "none"))
    told.append("64 of 2048 chunks for a token of a layer in {:.0f} µs instead of {:.0f}".format(*pair))
    again = found["again"]
    nats = {(r["length"], r["selection"], r["chunks"]): r["nats"] for r in again["rows"] if r["recency"] != 0}
    landmark = [nats[65536, "landmark", n] for n in (16, 256, 1024)]
    shown = (nats[65536, "landmark", 64], nats[65536, "mass", 64], *landmark, nats[65536, None, 0])
    told.append(
        "have {:.3f} nats a token, by exact mass {:.3f}; with 16, 256 and 1024 chunks {:.3f}, {:.3f} and {:.3f}"
    )
    told[-1] = (told[-1] + ", by window and sinks alone {:.3f}.").format(*shown)
    shown = (nats[8192, "landmark", n] for n in (16, 64, 256))
    told.append("16, 64 and 256 have {:.3f}, {:.3f} and {:.3f}.".format(*shown))
    usual, *others = (np.array(row["nats"]) for row in again["masses"]["rows"])
    first, second = (others - usual).T
    text = "in {} ways, cost the first haystack {:.3f} to {:.3f} nats at 8K and gained the second {:.3f} at best"
    told.append(text.format(len(others), first.min(), first.max(), -second.min()))
    commits = {row["commit"] for row in (*found["rows"], cost, cost["positions"], again)}
    assert all(x in words(page) for x in (*told, *commits))
