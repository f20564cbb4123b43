"""How long a training step takes on this machine, and what each choice in it is worth.

    python -m tests.bench_steps --save tests/results/steps.json

Models with the default settings train on input.txt. All variants take turns, a few steps each, and each figure is
the median of what a variant's step took, so that whatever else the machine does slows all of them alike. Writes Markdown.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import v0_bigram as v0  # before torch, for which it makes a setting
import v1_transformer as v1
import v2_bpe_rope as v2
import v3_alibi as v3

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.compare import ROOT, machine, markdown_table

AS_IT_IS = "v2_bpe_rope as it is"
ROUNDS, STEPS = 25, 8  # each variant takes ROUNDS turns of STEPS steps, of which the first is not counted


def one_by_one(tokens, config, step):
    """A batch of rows at random places, cut out and put together one by one, as in nanoGPT."""
    random = np.random.default_rng((config.seed, step))
    starts = random.integers(len(tokens) - config.block_size, size=config.batch_size).tolist()
    rows = [tokens[start:start + config.block_size + 1].long() for start in starts]
    return torch.stack([row[:-1] for row in rows]), torch.stack([row[1:] for row in rows])


class Steps:
    """One variant of the training loop: call it for the seconds that one step takes."""

    def __init__(self, version, tokens, vocab_size, bfloat16=False, fused=True, batch=None, attention=None, wait=False,
                 keep=True):
        self.keep, self.count = keep, 0
        self.tokens, self.batch, self.wait = tokens, batch or version.get_batch, wait
        self.attention = attention or version.CausalSelfAttention.forward
        torch.manual_seed(0)
        self.version, self.model = version, version.LanguageModel(version.Config(), vocab_size).train()
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
        groups = [{"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": 0.5},
                  {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused)
        self.total = torch.zeros(())

    def __call__(self):
        started = time.perf_counter()
        with mock.patch.object(self.version.CausalSelfAttention, "forward", self.attention):
            idx, targets = self.batch(self.tokens, self.model.config, self.count)
            with self.autocast:
                _, loss = self.model(idx, targets)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.detach()
        if self.wait:
            self.total.item()
        self.count += 1
        return time.perf_counter() - started


def keep_freed_memory(keep):
    """With glibc: as the scripts set it for training, or as glibc has it (an M_MMAP_THRESHOLD of 128 KiB)."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25 if keep else 2**17), mallopt(-1, 2**31 - 1 if keep else 2**17)


def take_turns(variants):
    """{name: median milliseconds of a step}."""
    seconds = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, steps in variants.items():
            keep_freed_memory(steps.keep)
            seconds[name] += [steps() for _ in range(STEPS)][1:]
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def attention_in_bfloat16(self, x, encoding, cache=None):
    """v2's attention without its change to float32: in whatever precision autocast has, bfloat16."""
    B, T, C = x.shape
    q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
    q, k = v2.rotate(q, encoding), v2.rotate(k, encoding)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.projection(y.transpose(1, 2).reshape(B, T, C))


def attention_written_out(self, x, encoding, cache=None):
    """v2's attention in v1's plain lines."""
    B, T, C = x.shape
    q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
    scores = v2.rotate(q, encoding) @ v2.rotate(k, encoding).transpose(2, 3) / math.sqrt(C // self.n_head)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    y = scores.masked_fill(later, -math.inf).softmax(dim=3) @ v
    return self.projection(y.transpose(1, 2).reshape(B, T, C))


@contextmanager
def training_beside(**environment):
    """Another program of this kind, training with its default settings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "v2_bpe_rope.py"), "--out", str(Path(folder, "run")), "--device", "cpu"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        try:
            while not process.stdout.readline().startswith("    step"):  # the last line before it trains
                assert process.poll() is None, "the training beside did not start"
            time.sleep(1)
            yield
        finally:
            process.kill()
            process.wait()


def step_starts(version, steps, **environment):
    """Seconds from the start of a whole training program to the beginning of its steps 0, 1, ..., `steps`."""
    code = f"""if True:
        import json, os, sys, time
        import {version.__name__} as version
        original, times = version.get_batch, []
        def get_batch(tokens, config, step):
            times.append(time.time())
            if step == {steps}:
                print(json.dumps(times), flush=True)
                os._exit(0)
            return original(tokens, config, step)
        version.get_batch = get_batch
        version.main(sys.argv[1:])"""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, "-c", code, "--out", str(Path(folder, "run")), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return [at - started for at in json.loads(done.stdout.splitlines()[-1])]


def measure():
    """All figures: {"machine", "steps", "alone" and "beside" in milliseconds, "evaluating", "saving", "starts" in seconds}."""
    train_text, validation_text = v2.read_texts(ROOT / "input.txt")
    tokenizers = {v1: v1.train_tokenizer(train_text, v1.Config()), v2: v2.train_tokenizer(train_text, v2.Config())}
    tokenizers[v3] = tokenizers[v2]
    tokens = {v: torch.from_numpy(tokenizer.encode_to_array(train_text)) for v, tokenizer in tokenizers.items()}
    native = v2.pick_device(argparse.Namespace(device="cpu", dtype="auto"))[1] == "bfloat16"

    def variant(version=v2, bfloat16=native, **change):
        return Steps(version, tokens[version], tokenizers[version].vocab_size, bfloat16, **change)

    as_it_is = variant()
    results = {"machine": machine()}
    results["steps"] = take_turns({
        AS_IT_IS: as_it_is,
        f"matrix products in {'float32' if native else 'bfloat16'}": variant(bfloat16=not native),
        "attention in bfloat16, too": variant(bfloat16=True, attention=attention_in_bfloat16),
        "attention written out, as in v1": variant(attention=attention_written_out),
        "freed memory given back to the system": variant(keep=False),
        "the optimizer without `fused=True`": variant(fused=False),
        "the batch put together row by row": variant(batch=one_by_one),
        "the loss read at every step": variant(wait=True),
        "v1_transformer as it is": variant(v1),
        "v3_alibi as it is": variant(v3),
        "v3_alibi, freed memory given back": variant(v3, keep=False),
    })
    validation = torch.from_numpy(tokenizers[v2].encode_to_array(validation_text))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            started = time.perf_counter()
            v2.evaluate(as_it_is.model, validation, v2.Config.block_size, as_it_is.autocast)
            evaluated = time.perf_counter()
            for name, state in (("best.pt", None), ("last.pt", {"optimizer": as_it_is.optimizer.state_dict()["state"]})):
                v2.save_checkpoint(Path(folder, name), as_it_is.model, tokenizers[v2], state)
            seconds.append((evaluated - started, time.perf_counter() - evaluated))
    results["evaluating"], results["saving"] = map(statistics.median, zip(*seconds))
    results["beside"] = {}
    for name, count in ((AS_IT_IS, "3000"), ("threads that spin as long as libgomp has it", "300000")):
        with training_beside(GOMP_SPINCOUNT=count):
            starts = step_starts(v2, 15, GOMP_SPINCOUNT=count)
        results["beside"][name] = 1000 * statistics.median(b - a for a, b in zip(starts[5:], starts[6:]))
    results["starts"] = {version.__name__: statistics.median(step_starts(version, 1)[1] for _ in range(5))
                         for version in (v0, v1, v2, v3)}
    return results


def markdown(results):
    """All tables; a pure function of the results."""
    steps = results["steps"]
    between = v2.Config.eval_interval * steps[AS_IT_IS] / 1000
    return "\n\n".join([
        results["machine"] + ".",
        markdown_table(["training step", "milliseconds", "ratio to v2"],
                       {name: [f"{ms:.1f}", f"{ms / steps[AS_IT_IS]:.2f}"] for name, ms in steps.items()}),
        f"An evaluation of v2_bpe_rope takes {results['evaluating']:.2f} s and saving {results['saving']:.2f} s, after "
        f"every {between:.1f} s of training: {results['evaluating'] / between:.1%} and {results['saving'] / between:.1%}.",
        markdown_table(["two trainings at once on this machine", "milliseconds a step"],
                       {name: [f"{ms:.0f}"] for name, ms in results["beside"].items()}),
        markdown_table(["whole program", "seconds from its start to the end of its first step"],
                       {name: [f"{seconds:.2f}"] for name, seconds in results["starts"].items()}),
    ])


def main():
    parser = argparse.ArgumentParser(prog="bench_steps", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    results = measure()
    if args.save:
        args.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
