"""How fast each version generates text, with the cache of keys and values and without.

    python -m tests.bench_generation --save tests/results/generation.json

6 layers, 384 wide, context 256, vocabulary 65, random weights, float32, 512 tokens from a single one. Tokens per second
"as it is": v2 and v3 with their cache, v1 without, all dropping half of the context when it is full; and as nanoGPT's
sampler, which for each token reads the last 256 tokens again ("full windows": only the part of that in which the context
is full). The versions and the ways take turns; each figure is the median of its rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import v1_transformer  # before torch, for which it makes a setting
import v2_bpe_rope
import v3_alibi

import torch

from tests.compare import machine, markdown_table

ROUNDS, TOKENS = 3, 512


@torch.inference_mode()
def without_a_cache(model, ids, count):
    """Greedy generation that reads the last block_size tokens again for each new one."""
    ids = list(ids)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids[-model.config.block_size:]]))
        ids.append(logits[0, -1].argmax().item())


def measure():
    """{"machine", "speed": {version: {way: tokens per second}}}"""
    ways = {
        "as it is": lambda version, model: list(version.generate(model, [0], TOKENS, temperature=0)),
        "as nanoGPT's sampler": lambda version, model: without_a_cache(model, [0], TOKENS),
        "full windows": lambda version, model: without_a_cache(model, [0] * 256, TOKENS // 4),
    }
    models, seconds = {}, {}
    for version in (v1_transformer, v2_bpe_rope, v3_alibi):
        torch.manual_seed(0)
        config = version.Config(n_layer=6, n_head=6, n_embd=384, block_size=256)
        models[version] = version.LanguageModel(config, 65).eval()
    for _ in range(ROUNDS):
        for version, model in models.items():
            for name, sample in ways.items():
                started = time.perf_counter()
                sample(version, model)
                scale = 4 if name == "full windows" else 1
                seconds.setdefault((version, name), []).append(scale * (time.perf_counter() - started))
    return {"machine": machine(), "speed": {
        version.__name__: {name: TOKENS / statistics.median(seconds[version, name]) for name in ways} for version in models}}


def markdown(results):
    """The table; a pure function of the results."""
    rows = {}
    for version, speed in results["speed"].items():
        ours, *others = speed.values()
        rows[version] = [f"{x:.0f}" for x in speed.values()] + [f"{ours / other:.1f}" for other in others]
    columns = ["tokens per second", *speed, "as it is : nanoGPT's sampler", "as it is : full windows"]
    return markdown_table(columns, rows) + f"\n\n{results['machine']}, float32."


def main():
    parser = argparse.ArgumentParser(prog="bench_generation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    results = measure()
    if args.save:
        args.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
