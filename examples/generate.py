"""Generates with a cache: prompts of different lengths at once, and a second question without reading again.

    python examples/generate.py [--run needle-tiny] [--tokens 20000]

--run is the name of weights that ship with the package, or the folder of a training run, such as the one that
examples/train_needles.py leaves. The prompts are haystacks of noise with needles `MARK key value`, and questions
`ASK key`; the model was trained on 256 tokens at most and is to generate the value.
"""

import argparse
import time

import torch

from hsa_tl.model import load
from hsa_tl.model.needles import task

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--run", default="needle-tiny")
parser.add_argument("--tokens", type=int, default=20000, help="of the longest prompt")
args = parser.parse_args()
model = load(args.run)

# 1. Prompts of different lengths in one call: a list in, a list out.
samples = [task("s-niah", n).sample(seed=1, index=n) for n in (256, args.tokens // 4, args.tokens)]
prompts = [torch.tensor(s.tokens[: s.answers[0, 0]].tolist()) for s in samples]
right = 0
for sample, prompt, text in zip(samples, prompts, model.generate(prompts, max_new_tokens=1), strict=True):
    value, want = int(text[-1]), int(sample.tokens[sample.answers[0, 0]])
    right += value == want
    print(f"{len(prompt)} tokens: generated {value}, the needle says {want}")
print(f"{right} of {len(samples)} right")

# 2. A cache holds what was read: the second question costs its own tokens only.
sample = task("mq-niah", args.tokens).sample(seed=1, index=0)
tokens, (first, second) = torch.tensor(sample.tokens.tolist()), sample.answers[:, 0].tolist()
cache = model.new_cache(1, capacity=args.tokens)
begin, right = time.perf_counter(), 0
for a, prompt in ((first, tokens[:first]), (second, tokens[first + 1 : second])):  # its own answer it reads by itself
    value = model.generate([prompt], max_new_tokens=1, cache=cache)[0][-1]
    right += bool(value == tokens[a])
    print(f"{len(prompt)} new tokens, {cache.lengths[0]} in the cache: {1000 * (time.perf_counter() - begin):.0f} ms")
    begin = time.perf_counter()
print(f"{right} of 2 right; the cache holds {cache.memory.longest} chunks")

# 3. Sampling is reproducible by its seed, and stream() yields each token as soon as it is known.
options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 0}
streamed = [int(token[0]) for token in model.stream(prompts[:1], **options)]
same = streamed == model.generate(prompts[:1], **options)[0][-8:].tolist()
print(f"sampled {streamed}; the same again with the same seed: {same}")
