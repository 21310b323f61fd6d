"""Trains a model of 0.6M parameters to find needles within 256 tokens, and asks it far beyond.

    python examples/train_needles.py [--out out/needles] [--steps 250] [--lengths 256 4096 65536]

The recipe `needle-tiny` has three stages, of 64, 128 and 256 tokens; --steps shortens each. The run is resumable: a
second call goes on from the newest checkpoint, or only asks if it is finished. Minutes on a CPU.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from hsa_tl.model.evaluate import accuracy, answers_right, needle_samples
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.recipe import load_recipe
from hsa_tl.model.train import Step, train

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out/needles"), help="folder of checkpoints and log.jsonl")
parser.add_argument("--steps", type=int, default=250, help="of each stage, at most")
parser.add_argument("--batch", type=int, help="samples of a step, by default the recipe's")
parser.add_argument("--lengths", type=int, nargs="+", default=[256, 4096, 65536], help="contexts to ask at")
parser.add_argument("--samples", type=int, default=20, help="contexts of each length")
args = parser.parse_args()

recipe = load_recipe("needle-tiny")
stages = tuple(replace(s, steps=min(s.steps, args.steps), batch=args.batch or s.batch) for s in recipe.stages)
recipe = replace(recipe, stages=stages)


def tell(step: Step) -> None:
    if step.step % 50 == 0 or step.step + 1 == recipe.steps:
        length = recipe.stages[step.stage].length
        print(f"step {step.step + 1} of {recipe.steps}, {length} tokens: loss {step.loss:.3f}", flush=True)


model = train(recipe, args.out, on_step=tell)
reader = LongReader(model)  # memory linear in the context; contexts that differ little are read by their differences
for length in args.lengths:
    found = accuracy(partial(answers_right, reader), needle_samples("s-niah", length, args.samples))
    share = f"{found.right} of {found.answers} answers right"
    read = model.config.topk * model.config.chunk_size
    print(f"{length} tokens, {length / stages[-1].length:g} times the training length: {share}, {read} tokens read")
print(f"the run is in {args.out}; `hsa-tl eval ruler --run {args.out}` asks it by depth")
