"""What `hsa-tl convert` makes of a real model: the source's logits, and passkeys and perplexity without training.

    make llm                                # SmolLM2-135M-Instruct, 2K, 8 contexts
    python -m hsa_tl.bench.llm FILE.gguf --length 32768 --contexts 20 --haystacks 2 --out FOLDER

A context is English documentation (pydoc_data.topics) with a code of five digits at its depth and the question behind
it. Contexts of one haystack differ from the code on, and a model reads what differs; a run that was cut goes on behind
the last one. right: contexts in which every digit is the likeliest token after those before it. perplexity: of the 256
tokens before the question, which are the same ones at every length. seconds, token_ms: CPU time of what was read, and
of a token behind the last context; neighbours change it less than they do a clock's.
"""

import argparse
import json
import math
import pydoc_data.topics
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
ANCHORS = 64
OPTIONS = {"window": 512, "sinks": 4, "chunk_size": 64, "topk": 16, "far_positions": 512, "recency": 128}
FINE = {"chunk_size": 16, "topk": 64, "recency": 512}  # as many tokens
METHODS = {  # None: the source
    "source": None,
    "window": {"topk": 0},
    "all": {"topk": "all"},
    "mass": {"selection": "mass"},
    "mean": {"selection": "mean"},
    "mean of 16": FINE | {"selection": "mean"},
    "landmark of 16": FINE | {"selection": "landmark"},
}
JUDGED = 256  # tokens before the question
LONGEST = 1 << 16  # tokens of a context
SEGMENT = 4096  # tokens read at once


class Context(NamedTuple):
    tokens: list[int]
    asked: int  # tokens of question and answer, the last ones
    digits: int  # tokens of the answer


def make_contexts(tokenizer, length: int, number: int, haystacks: int) -> list[Context]:
    """Of `length` tokens with question and answer, the code at `number` depths, the deepest of each haystack first.
    ValueError: they are too long for the text or too short for what they hold, or fewer than haystacks."""
    if not 1 <= haystacks <= number:
        raise ValueError(f"haystacks must lie in [1, {number}], got {haystacks}")
    topics = pydoc_data.topics.topics
    text, rng, made = tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))), random.Random(7), []
    longest = min(LONGEST, len(text))
    ends = [rng.randrange(longest, len(text) + 1) for _ in range(haystacks)]
    question = tokenizer.encode("\n\nThe secret code of the lantern is ")
    for n in range(number):
        code = tokenizer.encode(digits := str(rng.randrange(10000, 99999)))
        needle = tokenizer.encode(f"\n\nThe secret code of the lantern is {digits}. Remember it.\n\n")
        body, end = length - len(needle) - len(question) - len(code), ends[n % haystacks]
        deepest = body - JUDGED - OPTIONS["window"] - OPTIONS["chunk_size"]  # behind which a window would hold the code
        if not (length <= longest and deepest > 0):
            least = length - deepest + 1
            raise ValueError(f"length must lie in [{least}, {longest}], got {length}")
        haystack, cut = text[end - body : end], int((n + 0.5) / number * deepest)
        tokens = [*haystack[:cut], *needle, *haystack[cut:], *question, *code]
        made.append((n % haystacks, -cut, Context(tokens, len(question) + len(code), len(code))))
    return [context for *_, context in sorted(made)]


@dataclass
class Reader:
    """Reads contexts one after the other, of each what follows the tokens that it shares with the one before.

    forward: logits [keep, V] of the last `keep` >= 1 tokens of ids [1, T], given a cache. take_back: of a cache the
    last so many tokens.
    """

    forward: Callable[[torch.Tensor, Any, int], torch.Tensor]
    cache: Any
    take_back: Callable[[Any, int], None]
    tokens: Sequence[int] = ()  # that the cache holds
    count: int = 0  # of tokens that were read

    def read(self, tokens: list[int], keep: int) -> torch.Tensor:
        """Logits [keep, V] of the last `keep` tokens."""
        T, logits = len(tokens), []
        differ = (i for i, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b)
        shared = min(next(differ, len(self.tokens)), T - keep)
        if shared < len(self.tokens):
            self.take_back(self.cache, len(self.tokens) - shared)
        for a in range(shared, T, SEGMENT):
            part = tokens[a : a + SEGMENT]
            kept = max(0, min(len(part), a + len(part) - T + keep))
            logits.append(self.forward(torch.tensor([part]), self.cache, max(1, kept))[:kept])
        self.tokens, self.count = tokens, self.count + T - shared
        return torch.cat(logits)


def reader_of_source(model) -> Reader:
    """Of a model of transformers."""
    from transformers import DynamicCache

    def forward(ids, cache, keep):
        return model(ids, past_key_values=cache, logits_to_keep=keep).logits[0]

    return Reader(forward, DynamicCache(), lambda cache, n: cache.crop(-n))


def reader_of_run(model, length: int) -> Reader:
    """Of a model of ours, for contexts of `length` tokens."""

    def forward(ids, cache, keep):
        return model(ids, cache=cache, logits_to_keep=keep).logits[0]

    cache = model.new_cache(1, undo=length, capacity=length)
    return Reader(forward, cache, lambda cache, n: cache.crop(cache.lengths[0] - n))


@torch.no_grad()
def ask(reader: Reader, contexts: list[Context], before: dict | None = None) -> Iterator[dict]:
    """After each context that `before`, a row of this, does not hold: those that are right, losses and perplexity,
    tokens that were read and the CPU seconds that took."""
    row = before or {"tokens": 0, "seconds": 0.0, "losses": [], "found": []}
    for tokens, asked, digits in contexts[len(row["found"]) :]:
        start, count = time.process_time(), reader.count
        found = reader.read(tokens, JUDGED + asked + 1)[:-1].float()  # that of the last token tells nothing
        target = torch.tensor(tokens[-JUDGED - asked :])
        loss = round(F.cross_entropy(found[:JUDGED], target[:JUDGED]).item(), 5)
        right = found[-digits:].argmax(-1).tolist() == tokens[-digits:]
        losses, found = [*row["losses"], loss], [*row["found"], right]
        row = {
            "right": sum(found), "contexts": len(found), "perplexity": math.exp(sum(losses) / len(losses)),
            "tokens": row["tokens"] + reader.count - count,
            "seconds": round(row["seconds"] + time.process_time() - start, 2), "losses": losses, "found": found,
        }  # fmt: skip
        yield row


@torch.no_grad()
def token_time(reader: Reader, number: int = 32) -> float:
    """CPU milliseconds of one token behind those that the cache holds: the median of so many, which are taken back."""
    times = []
    for token in reader.tokens[:number]:
        start = time.process_time()
        reader.forward(torch.tensor([[token]]), reader.cache, 1)
        times.append(1000 * (time.process_time() - start))
    reader.take_back(reader.cache, len(times))
    return round(statistics.median(times), 2)


def read_found(path: Path, about: dict) -> dict:
    """What a file holds of the same model, contexts, device, versions and commit; a file of others counts as none."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if same_source(found, about) else {"rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--haystacks", type=int, help="by default each context has its own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/llm"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    import transformers

    haystacks = given.contexts if given.haystacks is None else given.haystacks
    about = {"source": given.source.name, "contexts": given.contexts, "haystacks": haystacks, **origin("cpu")}
    about["versions"] += f", transformers {transformers.__version__}"
    path = given.out / f"llm-{given.length}.json"
    found = read_found(path, about) | about
    rows = {row["method"]: row for row in found["rows"]}
    methods = [name for name in given.methods if name not in rows or rows[name]["contexts"] < given.contexts]
    options = {"gguf_file": given.source.name} if given.source.suffix == ".gguf" else {}
    where = given.source.parent if options else given.source
    source = transformers.AutoModelForCausalLM.from_pretrained(where, **options, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = convert(given.source, run, **OPTIONS)
        model = load(run)
    contexts = make_contexts(model.tokenizer, given.length, given.contexts, haystacks)
    with torch.no_grad():
        ids = torch.tensor([contexts[0].tokens[:256]])  # which the window covers
        difference = (source(ids).logits - model(ids).logits).abs().max().item()
    print(f"largest difference of logits at 256 tokens: {difference:.1e}, at most {ATOL}", flush=True)
    if not difference <= ATOL:
        raise SystemExit(1)
    found |= OPTIONS | {"difference": difference}
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
            reader = reader_of_source(source)
        else:
            reconfigure(model, replace(config, **METHODS[name]))
            reader = reader_of_run(model, given.length)
        for row in ask(reader, contexts, rows.get(name)):
            rows[name] = {"method": name, "length": given.length} | row
            if row["contexts"] == given.contexts:
                rows[name]["token_ms"] = token_time(reader)
            write_atomic(path, json.dumps(found | {"rows": list(rows.values())}, indent=1) + "\n")
        right, n = row["right"], row["contexts"]
        low, high = (100 * x for x in interval(right, n))
        told = f"{right} of {n} right ({low:.0f} to {high:.0f} %), perplexity {row['perplexity']:.2f}"
        speed = f"{1000 * row['seconds'] / row['tokens']:.1f} ms of CPU time a token, {rows[name]['token_ms']} alone"
        print(f"{name}: {told}, {speed}", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
