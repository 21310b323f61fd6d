"""Figures of converted models in docs/convert.md are those of the files in bench/results."""

import json
import math

import numpy as np
from test_figures import RESULTS, ROOT, K, cells, in_page, words

from hsa_tl.bench.plot import interval


def test_figures_of_a_converted_model():
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("llm-*.json"))]
    page, methods = (ROOT / "docs/convert.md").read_text(), {
        "source": "the source", "window": "window and sinks alone", "all": "all chunks",
        "mass": "16 chunks of 64 by mass", "mean": "16 chunks of 64 by mean key",
        "mean of 16": "64 chunks of 16 by mean key",
    }  # fmt: skip
    fine = next(found for found in files if "anchors" in found)
    heads = sum(map(len, fine["recall_by_head"]["mass"]))
    methods["landmark of 16"] = f"64 chunks of 16 by landmarks, {len(fine['exact_heads'])} of {heads} heads by mass"
    methods["squeezed"] = "the same, with 512 positions behind the window"
    for found in files:
        for row in found["rows"]:
            row["method"] = "squeezed" if found.get("far_positions") == 512 else row["method"]
    assert all(f"{100 * share:.1f} %" in page for share in fine["recall"].values())
    at = {(row["method"], row["length"], row["contexts"]): row for found in files for row in found["rows"]}
    columns = sorted({key[1:] for key in at})
    for method, name in methods.items():
        rows = [at.get((method, *column)) for column in columns]
        values = [f"{r['right']} of {r['contexts']}, {r['perplexity']:.1f}" if r else "" for r in rows]
        in_page("docs/convert.md", cells(name, *values))
    for right in {row["right"] for (*_, contexts), row in at.items() if contexts == 20}:
        low, high = (100 * x for x in interval(right, 20))
        assert f"{low:.0f} to {high:.0f} %" in words("docs/convert.md")
    source, landmark = (at[method, 8 * K, 20] for method in ("source", "squeezed"))
    told = "landmarks find all {} codes and the source {}**; what it reads there costs {:.1f} % of perplexity"
    cost = 100 * (landmark["perplexity"] / source["perplexity"] - 1)
    assert told.format(landmark["right"], source["right"], cost) in words("docs/convert.md")
    ours = [(key, row) for key, row in sorted(at.items()) if key[0] in ("landmark of 16", "squeezed")]
    at_32k, at_64k = ([row for (_, length, _), row in ours if length == T] for T in (32 * K, 64 * K))
    far = [f"{row['right']} of {row['contexts']}" for row in (*at_32k, *at_64k)]
    told = "**At 32K landmarks find {} codes** without positions behind the window and {} with, **at 64K {}** and {}"
    assert told.format(*far) in words("docs/convert.md"), far
    pairs = [row["perplexity"] for row in at_32k[::-1]]
    pairs += [math.exp((np.mean(x[:3]) + np.mean(x[3:])) / 2) for x in (row["losses"] for row in at_64k[::-1])]
    told = "of {:.1f} instead of {:.1f} at 32K and, each haystack counted once, {:.1f} instead of {:.1f} at 64K"
    assert told.format(*pairs) in words("docs/convert.md"), pairs
    seconds = (f"{at[(method, *columns[0])]['seconds']:.1f} s" for method in ("source", "window", "mass"))
    told = "takes the source {} on one thread of a busy machine, a run {} (window alone) to {}"
    assert told.format(*seconds) in words("docs/convert.md")
    size = json.loads((RESULTS / "convert_size.json").read_text())
    files += [size[part] | {"device": size["device"]} for part in ("convert", "load")]
    gb = (f"{x / 1e9:.1f} GB" for x in (size["bytes"], size["convert"]["memory"], size["load"]["memory"]))
    told = "({{}} in {} files) take {} s and {{}} of memory beyond the mapped files, and `load` in bfloat16 takes {{}}"
    assert told.format(size["files"], size["convert"]["seconds"]).format(*gb) in words("docs/convert.md")
    sources = [word for found in files for word in (found["commit"], found["device"].split(",")[0])]
    assert sources and all(word in page for word in sources)


def test_figures_of_far_keys():
    found, page = json.loads((RESULTS / "convert_far.json").read_text()), "docs/convert.md"
    places, table, told = ((8192, 0), (8192, 1), (32768, 1), "codes"), {}, []
    for row in found["rows"]:
        codes, preference = "right" in row, f"{row['recency'] or 'none'}"
        text = f"{row['right']} of {row['contexts']}" if codes else f"{row['nats']:.3f}"
        if row["model"].startswith("windows"):
            told.append(f"Window and sinks alone have {text}")
        elif not codes or row["length"] == 8192:
            name = (f"{row['chunk_bias'] or row['far_positions']}", preference)
            name = ("the source", "") if row["model"] == "source" else name
            table.setdefault(name, {})["codes" if codes else (row["length"], row["piece"])] = text
    far = {
        row["recency"]: row["losses"]
        for row in found["rows"]
        if row["length"] == 32768 and "right" in row and row["far_positions"] == 0
    }
    pair = (math.exp(np.mean(far[recency])) for recency in (4, 0))
    told.append("at a perplexity of {:.2f} where it is {:.2f} without".format(*pair))
    two = (*far[8], *far[4][::2])
    told.append("has {:.3f} and {:.3f} nats a token at 32K, with 4 it has {:.3f} and {:.3f}".format(*two))
    assert len(table) == 20 and len(told) == 3
    for name, row in table.items():
        in_page(page, cells(*name, *(row.get(place, "") for place in places)))
    source, squeezed = table["the source", ""], table["8192", "4"]
    more = [100 * math.expm1(float(squeezed[x]) - float(source[x])) for x in places[:2]]
    told.append("a perplexity {:.1f} and {:.1f} % above the source's".format(*more))
    cost = found["cost"]
    times = (cost["positions"][x][n] for x in ("prefill", "token") for n in ("512", "0"))
    told.append("in {:.1f} ms of CPU time instead of {:.1f}, and gives one in {:.0f} instead of {:.0f}".format(*times))
    pair = (cost["chunks"]["2048"][x] for x in ("recency", "none"))
    told.append("64 of 2048 chunks for a token of a layer in {:.0f} µs instead of {:.0f}".format(*pair))
    commits = {row["commit"] for row in (*found["rows"], cost, cost["positions"])}
    assert all(x in words(page) for x in (*told, *commits))
