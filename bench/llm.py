"""What `hsa-tl convert` makes of a real model: the source's logits, and passkeys and perplexity without training.

    make llm                                # SmolLM2-135M-Instruct, 2K, 8 contexts
    python -m hsa_tl.bench.llm FILE.gguf --length 8192 --contexts 3 --out FOLDER

A context is English documentation (pydoc_data.topics) with a code of five digits at its depth and the question behind
it. right: contexts in which every digit is the likeliest token after those before it. perplexity: of the 256 tokens
before the question.
"""

import argparse
import json
import math
import pydoc_data.topics
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hsa_tl.bench.plot import interval
from hsa_tl.bench.record import origin, same_source
from hsa_tl.files import write_atomic
from hsa_tl.model import load
from hsa_tl.model.convert import convert
from hsa_tl.model.landmarks import find_landmarks
from hsa_tl.model.train import reconfigure
from hsa_tl.text import read_corpus

ATOL = 1e-4
WINDOW, SINKS, CHUNK_SIZE, TOPK, ANCHORS = 512, 4, 64, 16, 64
FINE = {"chunk_size": 16, "topk": 64}  # as many tokens
METHODS = {  # None: the source
    "source": None,
    "window": {"topk": 0},
    "all": {"topk": "all"},
    "mass": {"selection": "mass"},
    "mean": {"selection": "mean"},
    "mean of 16": FINE | {"selection": "mean"},
    "landmark of 16": FINE | {"selection": "landmark"},
}
LAST = 301  # tokens before the code's end whose logits are asked for, at least


class Context(NamedTuple):
    tokens: list[int]
    digits: int  # tokens of the answer, the last ones


def make_contexts(tokenizer, length: int, number: int) -> list[Context]:
    """Of `length` tokens with the answer, the code at `number` depths."""
    topics = pydoc_data.topics.topics
    text, rng, made = tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))), random.Random(7), []
    for n in range(number):
        code = tokenizer.encode(digits := str(rng.randrange(10000, 99999)))
        needle = tokenizer.encode(f"\n\nThe secret code of the lantern is {digits}. Remember it.\n\n")
        question = tokenizer.encode("\n\nThe secret code of the lantern is ")
        body = length - len(needle) - len(question) - len(code)
        start, cut = rng.randrange(len(text) - body), int((n + 0.5) / number * (body - WINDOW - CHUNK_SIZE))
        haystack = text[start : start + body]
        made.append(Context([*haystack[:cut], *needle, *haystack[cut:], *question, *code], len(code)))
    return made


@torch.no_grad()
def ask(logits, contexts: list[Context]) -> dict:
    """logits: [last, V] of tokens [1, T]. The contexts that are right, losses and perplexity, and seconds a context."""
    right, losses, start = 0, [], time.perf_counter()
    for tokens, digits in contexts:
        x = torch.tensor([tokens])
        found = logits(x, LAST + digits)[:-1].float()  # that of the last token tells nothing
        target = x[0, -len(found) :]
        right += bool((found[-digits:].argmax(-1) == target[-digits:]).all())
        losses.append(round(F.cross_entropy(found[:256], target[:256]).item(), 5))
    n = len(contexts)
    seconds, perplexity = round((time.perf_counter() - start) / n, 2), math.exp(sum(losses) / n)
    return {"right": right, "contexts": n, "perplexity": perplexity, "seconds": seconds, "losses": losses}


def read_found(path: Path, about: dict) -> dict:
    """What a file holds of the same model, contexts, device, versions and commit; a file of others counts as none."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if same_source(found, about) else {"rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/llm"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    import transformers

    about = {"source": given.source.name, "contexts": given.contexts, **origin("cpu")}
    about["versions"] += f", transformers {transformers.__version__}"
    path = given.out / f"llm-{given.length}.json"
    found = read_found(path, about) | about
    methods = [name for name in given.methods if name not in [row["method"] for row in found["rows"]]]
    options = {"gguf_file": given.source.name} if given.source.suffix == ".gguf" else {}
    where = given.source.parent if options else given.source
    source = transformers.AutoModelForCausalLM.from_pretrained(where, **options, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = convert(given.source, run, window=WINDOW, sinks=SINKS, chunk_size=CHUNK_SIZE, topk=TOPK)
        model = load(run)
    contexts = make_contexts(model.tokenizer, given.length, given.contexts)
    with torch.no_grad():
        ids = torch.tensor([contexts[0].tokens[:256]])  # which the window covers
        difference = (source(ids).logits - model(ids).logits).abs().max().item()
    print(f"largest difference of logits at 256 tokens: {difference:.1e}, at most {ATOL}", flush=True)
    if not difference <= ATOL:
        raise SystemExit(1)
    found |= {"window": WINDOW, "sinks": SINKS, "chunk_size": CHUNK_SIZE, "topk": TOPK, "difference": difference}
    if "landmark of 16" in methods:
        tokens = model.tokenizer.encode(read_corpus(None, 8 * 3 * 4096).data)  # Python's sources; contexts are others
        *pieces, judge = (tokens[i * len(tokens) // 3 :][:4096] for i in range(3))
        reconfigure(model, replace(config, **FINE))
        recalls = find_landmarks(model, pieces, [judge], anchors=ANCHORS)
        config = replace(config, anchors=ANCHORS, exact_heads=model.config.exact_heads)
        shares = {name: sum(map(sum, layers)) / sum(map(len, layers)) for name, layers in recalls.items()}
        found |= {"anchors": ANCHORS, "exact_heads": config.exact_heads, "recall": shares, "recall_by_head": recalls}
        told = ", ".join(f"{100 * share:.1f} % by {name}" for name, share in shares.items())
        print(f"attention to all chunks of 16 that 64 hold: {told}; exact: {config.exact_heads}", flush=True)
    for name in methods:
        if METHODS[name] is None:
            logits = lambda x, keep: source(x, logits_to_keep=keep).logits[0]  # noqa: E731
        else:
            reconfigure(model, replace(config, **METHODS[name]))
            logits = lambda x, keep: model(x, logits_to_keep=keep).logits[0]  # noqa: E731
        row = {"method": name, "length": given.length, **ask(logits, contexts)}
        found["rows"].append(row)
        write_atomic(path, json.dumps(found, indent=1) + "\n")
        right, n = row["right"], row["contexts"]
        low, high = (100 * x for x in interval(right, n))
        told = f"{right} of {n} right ({low:.0f} to {high:.0f} %), perplexity {row['perplexity']:.2f}"
        print(f"{name}: {told}, {row['seconds']:.1f} s a context", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
