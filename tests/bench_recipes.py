"""nanoGPT's recipe for a CPU, beside v1 with its sizes and steps and v2 with its default settings: whole programs, one
after the other.

    python -m tests.bench_recipes --data tinyshakespeare.txt --save tests/results/recipes.json
    python -m tests.bench_recipes --results tests/results/recipes.json         no training: the tables of a results file

nanoGPT's README trains a character model of 4 layers, 4 heads, 128 channels, context 64, batch 12, without dropout, for
2,000 steps on a CPU, and reports 1.88 nats per character (https://github.com/karpathy/nanoGPT). Its code is not used
here: we wrote a program that does what its training step does. That is float32, GELU, an optimizer that is not fused, a
batch put together row by row from a file, a loss that is read and printed at every step, and every 250 steps an estimate
on 20 random batches each of the training and the validation text, and a checkpoint when the estimate has improved. The
learning rate is 1e-3, the weight decay 0.1. v1 and v2 do all of that in their own way.

The final losses are those of the best checkpoint on the whole validation text. Those on the way are exact for v1 and v2,
and the program's own estimates for nanoGPT's recipe. Seconds count from the start of the process, imports included.
"""

import argparse
import json
import math
import os
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

from tests.compare import ROOT, chart, machine

RECIPE = "--n-layer 4 --n-head 4 --n-embd 128 --block-size 64 --batch-size 12 --steps 2000 --dropout 0".split()


def prepare(data, folder):
    """nanoGPT does this once, beforehand: the tokens of both texts as files. Returns the vocabulary's size."""
    texts = v1.read_texts(data)
    tokenizer = v1.train_tokenizer(texts[0], None)
    for name, text in zip(("train", "validation"), texts):
        tokenizer.encode_to_array(text).astype(np.uint16).tofile(folder / name)
    return tokenizer.vocab_size


def new_model(vocab_size):
    """v1's model with v2's GELU and GPT-2's initialization, a standard deviation of 0.02 at every width."""
    with mock.patch.object(v1, "FeedForward", v2.FeedForward):
        model = v1.LanguageModel(v1.Config(n_layer=4, n_head=4, n_embd=128, block_size=64), vocab_size).train()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= 0.02 * math.sqrt(128)  # from 1 / sqrt(128)
    return model


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
            print("estimate", step, *losses, flush=True)
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


NANOGPT, V1, V2 = "nanoGPT's recipe", "v1, the same sizes and steps", "v2, default settings"
FLAGS = {V1: ["v1_transformer.py", *RECIPE], V2: ["v2_bpe_rope.py"]}


def run(name, data, seed):
    """Run one program. Return its seconds, its final loss and [(seconds, loss), ...] on the way, in nats per character."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vocab_size = prepare(data, folder)
        command = ["-m", "tests.bench_recipes", "--nanogpt", folder, vocab_size, seed]
        if name in FLAGS:
            command = [*FLAGS[name], "--data", data.resolve(), "--out", folder / "run", "--seed", seed, "--device", "cpu"]
        started, evaluations = time.perf_counter(), {}
        with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
            for line in process.stdout:
                if line.startswith("best val loss"):  # the table of evaluations is complete; a sample may look like it
                    process.stdout.read()
                    break
                words = line.replace("estimate", "").replace(",", "").split()
                if line.startswith("estimate") or (name in FLAGS and len(words) == 6 and words[0].isdigit()):
                    evaluations[int(words[0])] = time.perf_counter() - started, float(words[2])
        seconds = time.perf_counter() - started
        if process.returncode:
            sys.exit(f"bench_recipes: error: {name} did not finish; its message is above")
        if name not in FLAGS:
            return {"seconds": seconds, "loss": exact_loss(folder, vocab_size), "curve": list(evaluations.values())}
        result = json.loads((folder / "run/result.json").read_text(encoding="utf-8"))
        nats = result["tokens_per_byte"]  # this text is ASCII: a byte is a character
        return {"seconds": seconds, "loss": result["val_loss"] * nats, "config": result["config"],
                "curve": [(at, loss * nats) for at, loss in evaluations.values()]}


def passes(run, loss):
    """The seconds at which a run's loss is first found to be at most `loss`; None where it never is."""
    return next((at for at, found in run["curve"] if found <= loss), None)


def table(results):
    """The medians over the rounds. Ratios and passing times compare runs of one round, which ran one after the other."""
    lines = [f"| program | seconds | ratio to nanoGPT's recipe | nats per character | seconds until it passes nanoGPT's |",
             "|---|---:|---:|---:|---:|"]
    theirs = results["runs"][NANOGPT]
    for name, runs in results["runs"].items():
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, theirs))
        until = [passes(a, b["loss"]) for a, b in zip(runs, theirs)]
        until = "–" if name == NANOGPT or None in until else f"{statistics.median(until):.0f}"
        losses = [run["loss"] for run in runs]
        lines.append(f"| {name} | {statistics.median(run['seconds'] for run in runs):.0f} | {ratio:.2f} | "
                     f"{statistics.mean(losses):.4f} | {until} |")
    rounds = len(theirs)
    how = f"{rounds} rounds: medians of seconds and ratios, means of losses" if rounds > 1 else "1 round"
    return "\n".join(lines) + f"\n\n{results['machine']}; {how}."


def curves(results):
    """{program: its curve from the second evaluation on, averaged over the rounds}."""
    return {name: [tuple(map(statistics.mean, zip(*points))) for points in list(zip(*(run["curve"] for run in runs)))[1:]]
            for name, runs in results["runs"].items()}


def markdown(results):
    return table(results) + "\n\n" + chart(curves(results), "seconds", "nats per character")


def main():
    parser = argparse.ArgumentParser(prog="bench_recipes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="tinyshakespeare.txt, the text of nanoGPT's figure")
    parser.add_argument("--rounds", type=int, default=3, help="how often each of the programs runs (default 3)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--results", type=Path, metavar="FILE", help="train nothing, take this results file")
    parser.add_argument("--nanogpt", nargs=3, help=argparse.SUPPRESS)  # folder, size of the vocabulary, seed
    args = parser.parse_args()
    if args.nanogpt:
        return nanogpt(Path(args.nanogpt[0]), *map(int, args.nanogpt[1:]))
    if args.results:
        return print(markdown(json.loads(args.results.read_text(encoding="utf-8"))))
    if not args.data:
        parser.error("--data or --results is needed")
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "runs": {name: [] for name in (NANOGPT, *FLAGS)}}
    for seed in range(1, args.rounds + 1):
        for name, runs in results["runs"].items():
            runs.append(run(name, args.data, seed))
            print(f"{name}: {runs[-1]['seconds']:.1f} s, {runs[-1]['loss']:.4f}", file=sys.stderr, flush=True)
    if args.save:
        args.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
