"""What each idea contributes: v2 and v3 trained with parts replaced, every row for the same number of steps and with
the same learning rate.

    python -m tests.ablations                                    all tables: 1,000 steps, seeds 1 2 3
    python -m tests.ablations --tables vocabulary --steps 500    one table, shorter
    python -m tests.ablations --results FILE                     no training: the tables of a results file

The rows are the scripts' own programs: v2_bpe_rope, in which single classes and functions are replaced by those of
another version or by the few lines below. Runs that are already in OUT, made with the same flags by the same programs,
are not made again. What it does not know it passes on to the scripts (for example --device cpu). It prints Markdown and
writes all numbers of the tables to OUT/results.json.
"""

import argparse
import contextlib
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from unittest import mock

import v1_transformer as v1  # before torch, for which it makes a setting
import v2_bpe_rope as v2
import v3_alibi as v3

import numpy as np
import torch
import torch.nn as nn

from tests.compare import ROOT, chart, machine, markdown_table, mean_and_spread
from tests.scaffold_bpe import ScaffoldBPE, train_scaffold_bpe


WINDOWS = (1, 2, 4, 8, 16)  # lengths of the evaluation's windows, in trained contexts


# -- what replaces rotary positions in v2 --


def not_rotated(x, encoding):
    """Replaces v2.rotate: queries and keys stay as they are."""
    return x


class WithoutPositions(v2.LanguageModel):
    """Nothing tells the model where a token stands, except that attention sees earlier tokens only."""

    def positional_encoding(self, start, end):
        return None


class WithVectors(v2.LanguageModel):
    """Positions are vectors (T, C), added to those of the tokens before the first block."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0] + inputs[1], *inputs[1:]))


class LearnedPositions(WithVectors):
    """v1's positions: one learned vector for each place in the context."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        nn.init.normal_(self.position_embedding.weight, std=config.n_embd ** -0.5)

    def positional_encoding(self, start, end):
        if end > self.config.block_size:
            raise v2.UserError(f"{end} tokens are more than the {self.config.block_size} positions that were learned")
        return self.position_embedding.weight[start:end]


class SinusoidalPositions(WithVectors):
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017), as large as the tokens'
    vectors are at the start."""

    def positional_encoding(self, start, end):
        C, device = self.config.n_embd, self.token_embedding.weight.device
        angles = torch.outer(torch.arange(start, end), 10000.0 ** (-torch.arange(0, C, 2) / C)).to(device)
        return math.sqrt(2 / C) * torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def slopes_times(factor):
    """Makes v3's slopes, the penalties per token of distance, `factor` times the paper's."""

    def alibi_slopes(n_head, paper=v3.alibi_slopes):
        return [factor * slope for slope in paper(n_head)]

    alibi_slopes.__name__ = f"slopes_times_{factor}"
    return {"alibi_slopes": alibi_slopes}


# -- what replaces parts of the training --


def rows_at_random(tokens, config, step):
    """Replaces get_batch: rows start anywhere, each drawn on its own, as in nanoGPT. Some parts of the text are drawn
    more often than others."""
    rng = np.random.default_rng((config.seed, step))
    starts = torch.from_numpy(rng.integers(len(tokens) - config.block_size, size=config.batch_size)).to(tokens.device)
    rows = tokens[starts[:, None] + torch.arange(config.block_size + 1, device=tokens.device)].long()
    return rows[:, :-1], rows[:, 1:]


def half_a_cosine(step, config):
    """Replaces learning_rate: after the warm-up, it falls slowly, then faster, then slowly again, as in nanoGPT."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


NO_BPE = {"train_tokenizer": v1.train_tokenizer, "tokenizer_from_state": v1.tokenizer_from_state}
NO_ROPE = {"LanguageModel": LearnedPositions, "rotate": not_rotated}
NO_GELU = {"FeedForward": v1.FeedForward}
SCAFFOLD = {"train_tokenizer": train_scaffold_bpe, "tokenizer_from_state": ScaffoldBPE}


# {table: {row: (the program, what is replaced in it, further flags)}}
TABLES = {
    "ideas": {
        "learned positions, characters, ReLU: v1": (v2, NO_BPE | NO_ROPE | NO_GELU, []),
        "v1 + GELU": (v2, NO_BPE | NO_ROPE, []),
        "v1 + RoPE": (v2, NO_BPE | NO_GELU, []),
        "v1 + BPE": (v2, NO_ROPE | NO_GELU, []),
        "v2 without GELU": (v2, NO_GELU, []),
        "v2 without RoPE": (v2, NO_ROPE, []),
        "v2 without BPE": (v2, NO_BPE, []),
        "BPE, RoPE, GELU: v2": (v2, {}, []),
    },
    "vocabulary": {
        "256: bytes alone": (v2, {}, ["--vocab-size", "256"]),
        "512": (v2, {}, ["--vocab-size", "512"]),
        "1,024: v2": (v2, {}, []),
        "2,048": (v2, {}, ["--vocab-size", "2048"]),
        "4,096": (v2, {}, ["--vocab-size", "4096"]),
    },
    "scaffold": {
        "1,024: plain BPE, v2": (v2, {}, []),
        "1,024: Scaffold-BPE": (v2, SCAFFOLD, []),
        "4,096: plain BPE": (v2, {}, ["--vocab-size", "4096"]),
        "4,096: Scaffold-BPE": (v2, SCAFFOLD, ["--vocab-size", "4096"]),
    },
    "positions": {
        "none": (v2, {"LanguageModel": WithoutPositions, "rotate": not_rotated}, []),
        "sinusoidal": (v2, {"LanguageModel": SinusoidalPositions, "rotate": not_rotated}, []),
        "learned": (v2, NO_ROPE, []),
        "rotary: v2": (v2, {}, []),
        "ALiBi: v3": (v3, {}, []),
    },
    "slopes": {
        "a quarter of the paper's slopes": (v3, slopes_times(0.25), []),
        "the paper's: v3": (v3, {}, []),
        "twice": (v3, slopes_times(2), []),
        "four times": (v3, slopes_times(4), []),
        "eight times": (v3, slopes_times(8), []),
        "rotary positions: v2": (v2, {}, []),
    },
    "training": {
        "rows at random": (v2, {"get_batch": rows_at_random}, []),
        "half a cosine": (v2, {"learning_rate": half_a_cosine}, []),
        "every row once in an epoch, a straight line: v2": (v2, {}, []),
    },
}


def name_of(program, replaced, flags):
    """The folder of a run, the same for rows of several tables that are the same program: v2_bpe_rope_FeedForward."""
    parts = [getattr(new, "__name__", key) for key, new in sorted(replaced.items())]
    return "_".join([program.__name__, *parts, *(flag.strip("-") for flag in flags)])


@contextlib.contextmanager
def replaced_in(program, replaced):
    """Replace some of a program's classes and functions for a while."""
    with contextlib.ExitStack() as stack:
        for name, new in replaced.items():
            stack.enter_context(mock.patch.object(program, name, new))
        yield


def train(row, seed, args):
    """One run, if it is not there yet; returns its folder."""
    program, replaced, flags = row
    folder = args.out / f"{name_of(*row)}-{seed}"
    command = ["--data", str(args.data), "--steps", str(args.steps), "--seed", str(seed), "--out", str(folder)]
    command += ["--learning-rate", "3e-3", "--eval-interval", str(args.steps), "--max-new-tokens", "0"]
    command += [*args.flags, *flags]
    made_by = folder / "command.json"  # written when the run is complete
    made = [*command, *(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (program.__file__, __file__))]
    if made_by.exists() and json.loads(made_by.read_text(encoding="utf-8")) == made:
        return folder
    print(f"\n-- {' '.join(command)} --", file=sys.stderr, flush=True)
    with replaced_in(program, replaced), contextlib.redirect_stdout(sys.stderr):
        if status := program.main(command):
            sys.exit(status)
    made_by.write_text(json.dumps(made), encoding="utf-8")
    return folder


def longer_windows(row, folder, data):
    """{"1": bits per byte with windows of the trained context, "2": twice as long, ..., "16"}: the figure of the ALiBi
    paper. None where a model cannot read that far."""
    program, replaced, _ = row
    with replaced_in(program, replaced):
        model, tokenizer, config = program.load(folder / "best.pt")
        train_text, text = program.read_texts(data)
        tokens = np.concatenate((tokenizer.encode_to_array(train_text)[-1:], tokenizer.encode_to_array(text)))
        bits = {}
        for times in WINDOWS:
            try:
                loss = program.evaluate(model, torch.from_numpy(tokens), times * config.block_size)
            except v2.UserError:
                loss = None
            bits[str(times)] = loss and loss * (len(tokens) - 1) / len(text.encode()) / math.log(2)
        return bits


def read(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def table(title, rows):
    """One table; {row: [the result.json of each seed]}."""
    times = WINDOWS if title == "positions" else WINDOWS[:3]
    cells = {}
    for row, runs in rows.items():
        bits = [run.get("windows", run["context_bits_per_byte"]) for run in runs]
        cells[row] = [f"{runs[0]['parameters']:,}", f"{runs[0]['tokens_per_byte']:.3f}",
                      *(mean_and_spread([b[str(t)] for b in bits], 3) for t in times)]
    return markdown_table([title, "parameters", "tokens per byte", "bits per byte", "at 2x context",
                           *(f"at {t}x" for t in times[2:])], cells)


def chart_of_positions(rows):
    """Bits per byte against the length of the windows, as a Mermaid chart: each step on the axis doubles the length."""
    curves = {}
    for row, runs in rows.items():
        if runs[0]["windows"]["16"] is not None:
            bits = [statistics.mean(run["windows"][str(times)] for run in runs) for times in WINDOWS]
            curves[row] = list(zip(range(len(WINDOWS)), bits))
    return chart(curves, "doublings of the trained context", points=len(WINDOWS))


def budget(rows, machine):
    """What all rows of a table have in common, in words."""
    runs = next(iter(rows.values()))
    run = runs[0]
    return f"`{run['data']}`, {run['steps']:,} steps, {len(runs)} seeds, {run['dtype']}; {machine}."


def main(argv=None):
    parser = argparse.ArgumentParser(prog="ablations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which ones (default: all)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (default 1000)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="one run of each row for each of these")
    parser.add_argument("--data", type=Path, default=ROOT / "input.txt", help="text to learn (default input.txt)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="where the runs are written")
    parser.add_argument("--results", type=Path, metavar="FILE", help="train nothing, take this results.json")
    args, args.flags = parser.parse_known_args(argv)
    if args.results:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    else:
        results = {"machine": machine(), "tables": {}}
        for title in args.tables:
            folders = {row: [train(TABLES[title][row], seed, args) for seed in args.seeds] for row in TABLES[title]}
            rows = results["tables"][title] = {}
            for row, runs in folders.items():
                rows[row] = [read(folder) for folder in runs]
                for folder, result in zip(runs, rows[row]) if title == "positions" else ():
                    result["windows"] = longer_windows(TABLES[title][row], folder, args.data)
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    parts = [part for title, rows in results["tables"].items()
             for part in (table(title, rows), budget(rows, results["machine"]))]
    if positions := results["tables"].get("positions"):
        parts.append(chart_of_positions(positions))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
