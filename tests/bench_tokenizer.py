"""The tokenizer beside the Rust libraries, in one run on one core: Markdown tables.

    python -m pip install tokenizers tiktoken rustbpe
    python -m tests.bench_tokenizer --save tests/results/tokenizer.json

Every figure is the best of the same number of runs, taken in turns so that a busy machine is unfair to all of them
alike. All libraries get the same call: a text in, a Python list of ids out, special tokens not looked for.
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # tokenizers and rustbpe would use all cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bpe_tokenizer import BPETokenizer
from tests.compare import ROOT, machine, markdown_table

with suppress(ImportError):  # needed to measure, not for the tables of a results file
    import rustbpe
    import tiktoken
    import tokenizers

RUNS = 7
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# In a process of its own (on Linux): seconds, and the peak of memory above what it has after its imports, in bytes.
GROWTH = """
import re, sys, time
from bpe_tokenizer import BPETokenizer
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
what, copies, runs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = open(sys.argv[4]).read()
before = peak()
text = open("input.txt", encoding="utf-8").read() * copies
times = []
for _ in range(runs):
    tokenizer = BPETokenizer.from_state(state)
    start = time.perf_counter()
    BPETokenizer.train(text, 1024) if what == "train" else tokenizer.encode_to_array(text)
    times.append(time.perf_counter() - start)
print(min(times), peak() - before)
"""


def in_turns(jobs):
    """{name: (prepare, work)} to {name: the least seconds that work(prepare()) took}."""
    best = {}
    for _ in range(RUNS):
        for name, (prepare, work) in jobs.items():
            prepared = prepare()
            start = time.perf_counter()
            work(prepared)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return best


def train_tokenizers(text, vocab_size):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train_rustbpe(text, vocab_size):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text], vocab_size, pattern=GPT2_PATTERN)
    return tokenizer


def growth(what, copies, state_file):
    command = [sys.executable, "-c", GROWTH, what, str(copies), str(RUNS if copies == 1 else 3), str(state_file)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return map(float, output.split())


def measure():
    """{"megabytes", "training" and "encoding" in seconds, "growth": {what: [time ratio, memory ratio]}}"""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    megabytes = len(text.encode()) / 1e6
    ours = BPETokenizer.train(text, 1024)
    theirs = tokenizers.Tokenizer.from_str(ours.state())
    tik = tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ours.mergeable_ranks(), special_tokens={})
    rust = train_rustbpe(text, 1024)
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids == tik.encode_ordinary(text) == rust.encode(text)

    def nothing():
        return None

    results = {"machine": machine(), "megabytes": megabytes, "growth": {}}
    results["training"] = in_turns({
        "ours": (nothing, lambda _: BPETokenizer.train(text, 1024)),
        "ours 4096": (nothing, lambda _: BPETokenizer.train(text, 4096)),
        "tokenizers": (nothing, lambda _: train_tokenizers(text, 1024)),
        "rustbpe": (nothing, lambda _: train_rustbpe(text, 1024)),
    })
    results["encoding"] = in_turns({
        "first": (lambda: BPETokenizer.from_state(ours.state()), lambda fresh: fresh.encode(text)),
        "ours": (nothing, lambda _: ours.encode(text)),
        "array": (nothing, lambda _: ours.encode_to_array(text)),
        "tokenizers": (nothing, lambda _: theirs.encode(text)),
        "tiktoken": (nothing, lambda _: tik.encode_ordinary(text)),
        "rustbpe": (nothing, lambda _: rust.encode(text)),
    })
    with tempfile.TemporaryDirectory() as folder:
        state_file = Path(folder, "bpe.json")
        ours.save(state_file)
        for what in ("train", "encode"):
            (one, _), (ten, memory) = growth(what, 1, state_file), growth(what, 10, state_file)
            results["growth"][what] = [ten / one, memory / (10e6 * megabytes)]
    return results


def markdown(results):
    """All tables; a pure function of the results."""
    training, growth = results["training"], results["growth"]
    speed = {name: results["megabytes"] / seconds for name, seconds in results["encoding"].items()}
    rows = {"`bpe_tokenizer.py`": [f"{training['ours']:.3f} s", f"{speed['first']:.1f} MB/s", f"{speed['ours']:.1f} MB/s"]}
    for name in ("tokenizers", "tiktoken", "rustbpe"):
        seconds = f"{training[name]:.3f} s" if name in training else "–"
        rows[name] = [seconds, f"{speed[name]:.1f} MB/s", f"{speed[name]:.1f} MB/s"]
    ratios = {
        "training: time over that of tokenizers": training["ours"] / training["tokenizers"],
        "training: time over that of rustbpe": training["ours"] / training["rustbpe"],
        "training: vocabulary 4096 over 1024": training["ours 4096"] / training["ours"],
        "encoding, first call: speed over tokenizers": speed["first"] / speed["tokenizers"],
        "encoding, chunks seen: speed over tiktoken": speed["ours"] / speed["tiktoken"],
        "encoding to an array, chunks seen: speed over tiktoken": speed["array"] / speed["tiktoken"],
        "training: ten copies of the text, time over one": growth["train"][0],
        "training: ten copies, peak memory over their size": growth["train"][1],
        "encoding to an array: ten copies of the text, time over one": growth["encode"][0],
        "encoding to an array: ten copies, peak memory over their size": growth["encode"][1],
    }
    return "\n\n".join([
        markdown_table(["", "training", "encoding, first call", "encoding, chunks seen before"], rows),
        markdown_table(["ratio", ""], {name: [f"{ratio:.2f}"] for name, ratio in ratios.items()}),
        f"`input.txt` ({results['megabytes']:.2f} MB), vocabulary 1024, one core, best of {RUNS} runs; {results['machine']}.",
    ])


def main():
    parser = argparse.ArgumentParser(prog="bench_tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    if missing := {"rustbpe", "tiktoken", "tokenizers"} - globals().keys():
        sys.exit(f"bench_tokenizer: error: not installed: {', '.join(sorted(missing))}; python -m pip install tokenizers "
                 "tiktoken rustbpe")
    results = measure()
    if args.save:
        args.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
