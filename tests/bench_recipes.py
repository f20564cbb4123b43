"""nanoGPT's recipe for a CPU, beside v1 with its sizes and steps and v2 as it is: whole programs, one after the other.

    python -m tests.bench_recipes --data tinyshakespeare.txt

nanoGPT's README trains a character model of 4 layers, 4 heads, 128 channels, context 64, batch 12, without dropout, for
2,000 steps on a CPU, and comes to 1.88 nats per character (https://github.com/karpathy/nanoGPT). What such a step does
there is done here by code of our own: float32, GELU, an optimizer that is not fused, the batch put together row by row
from a file, the loss read and printed at every step, and every 250 steps an estimate on 20 random batches each of training
and validation text, and a checkpoint when it has improved. Its learning rate is 1e-3, its weight decay 0.1. v1 and v2 keep
their own ways in all of that. The losses are those of the best checkpoint on the whole validation text.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import v1_transformer as v1
import v2_bpe_rope as v2

import numpy as np
import torch
import torch.nn as nn

from tests.compare import ROOT, machine

RECIPE = "--n-layer 4 --n-head 4 --n-embd 128 --block-size 64 --batch-size 12 --steps 2000 --dropout 0".split()


def prepare(data, folder):
    """nanoGPT does this once, beforehand: the tokens of both texts as files. Returns the vocabulary's size."""
    texts = v1.read_texts(data)
    tokenizer = v1.train_tokenizer(texts[0], None)
    for name, text in zip(("train", "validation"), texts):
        tokenizer.encode_to_array(text).astype(np.uint16).tofile(folder / name)
    return tokenizer.vocab_size


def new_model(vocab_size):
    """v1's model with v2's GELU."""
    with mock.patch.object(v1, "FeedForward", v2.FeedForward):
        return v1.LanguageModel(v1.Config(n_layer=4, n_head=4, n_embd=128, block_size=64), vocab_size).train()


def nanogpt(folder, vocab_size, seed):
    """The training program."""
    torch.manual_seed(seed)
    model = new_model(vocab_size)
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))

    def batch(name):
        tokens = np.memmap(folder / name, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - 64, (12,))
        return tuple(torch.stack([torch.from_numpy(tokens[i + shift:i + shift + 64].astype(np.int64)) for i in starts])
                     for shift in (0, 1))

    @torch.no_grad()
    def estimate():
        model.eval()
        losses = [statistics.mean(model(*batch(name))[1].item() for _ in range(20)) for name in ("train", "validation")]
        model.train()
        return losses

    best, (idx, targets) = math.inf, batch("train")
    for step in range(2001):
        progress = max(0.0, (step - 100) / 1900)
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 9e-4 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step % 250 == 0:
            losses = estimate()
            print("estimate", step, *losses)
            if step and losses[1] < best:
                best = losses[1]
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "best.pt")
        _, loss = model(idx, targets)
        idx, targets = batch("train")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(step, loss.item())


def exact_loss(folder, vocab_size):
    """Of the best checkpoint, on the whole validation text."""
    model = new_model(vocab_size)
    model.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
    tokens = [torch.from_numpy(np.fromfile(folder / name, np.uint16)) for name in ("train", "validation")]
    return v1.evaluate(model, torch.cat((tokens[0][-1:], tokens[1])), 64)


def main():
    parser = argparse.ArgumentParser(prog="bench_recipes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare.txt, which nanoGPT's figure is for")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each of the programs runs (default 3)")
    parser.add_argument("--nanogpt", nargs=3, help=argparse.SUPPRESS)  # folder, size of the vocabulary, seed
    args = parser.parse_args()
    if args.nanogpt:
        return nanogpt(Path(args.nanogpt[0]), *map(int, args.nanogpt[1:]))
    own = ["--max-new-tokens", "0", "--device", "cpu", "--data", str(args.data.resolve())]
    programs = {"nanoGPT's recipe": ["-m", "tests.bench_recipes", "--data", "-", "--nanogpt"],
                "v1, the same sizes and steps": [str(ROOT / "v1_transformer.py"), *RECIPE, *own],
                "v2 as it is": [str(ROOT / "v2_bpe_rope.py"), *own]}
    seconds, losses = {name: [] for name in programs}, {name: [] for name in programs}
    for seed in range(1, args.rounds + 1):
        for name, command in programs.items():
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                vocab_size = prepare(args.data, folder)
                is_ours = "nanoGPT" not in name
                rest = ["--out", folder / "run", "--seed", seed] if is_ours else [folder, vocab_size, seed]
                started = time.perf_counter()
                subprocess.run([sys.executable, *command, *map(str, rest)], cwd=ROOT, stdout=subprocess.PIPE, check=True)
                seconds[name].append(time.perf_counter() - started)
                if is_ours:
                    result = json.loads((folder / "run/result.json").read_text())
                    losses[name].append(result["val_loss"] * result["tokens_per_byte"])
                else:
                    losses[name].append(exact_loss(folder, vocab_size))
                print(f"{name}: {seconds[name][-1]:.1f} s, {losses[name][-1]:.4f}", file=sys.stderr, flush=True)
    print(f"{machine()}; median of {args.rounds} rounds\n")
    print("| program | seconds | beside nanoGPT's recipe | nats per character |\n|---|---:|---:|---:|")
    for name in programs:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["nanoGPT's recipe"]))
        print(f"| {name} | {statistics.median(seconds[name]):.0f} | {ratio:.2f} | {statistics.median(losses[name]):.4f} |")


if __name__ == "__main__":
    main()
