"""Numbers that are true: exact evaluation, losses that fall, samples from the right distribution, exact resume."""

import csv
import json
import math
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests import bench_steps
from tests.conftest import ROOT, TRANSFORMERS, VERSIONS, ids, run, tiny_config, tiny_flags, tiny_model

# -- data --


def test_the_last_tenth_of_the_characters_validates(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc\r\ndéfghijklmnopqrst".encode())  # with a byte order mark and a Windows line end
    whole = "abc\ndéfghijklmnopqrst"  # 21 characters
    assert v0_bigram.read_texts(path) == (whole[:18], whole[18:])


def test_the_last_tenth_of_the_rows_validates(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("answer,question\n" + "".join(f'"a, {i}",q{i}\n' for i in range(10)))
    train, validation = v0_bigram.read_texts(path)
    assert validation == "<user>q9</user>\n<bot>a, 9</bot>\n"
    assert train.startswith("<user>q0</user>\n<bot>a, 0</bot>\n<user>q1") and train.count("</bot>\n") == 9


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_batches_are_windows_of_the_text_and_targets_come_one_later(dtype):
    tokens = torch.arange(200).to(dtype)
    config = tiny_config(v0_bigram, batch_size=64)
    idx, targets = v0_bigram.get_batch(tokens, config, step=3)
    assert idx.shape == targets.shape == (64, 16) and idx.dtype == torch.long
    assert torch.equal(targets, idx + 1) and torch.equal(idx[:, 1:], idx[:, :-1] + 1)
    assert len(set(idx[:, 0].tolist())) > 32 and idx.max() < 200
    again, _ = v0_bigram.get_batch(tokens, config, step=3)
    other, _ = v0_bigram.get_batch(tokens, config, step=4)
    assert torch.equal(idx, again) and not torch.equal(idx, other)
    short = torch.arange(17).to(dtype)  # a single window is there to draw
    assert torch.equal(v0_bigram.get_batch(short, config, 0)[1][5], torch.arange(1, 17))


def test_processes_share_out_the_rows_that_one_would_draw(monkeypatch):
    tokens, config = torch.arange(500), tiny_config(v0_bigram, batch_size=6)
    whole, _ = v0_bigram.get_batch(tokens, config, 7)
    monkeypatch.setattr(v0_bigram, "WORLD", 2)
    first = v0_bigram.get_batch(tokens, config, 7)[0]
    random_of_first = torch.rand(4)
    monkeypatch.setattr(v0_bigram, "RANK", 1)
    second = v0_bigram.get_batch(tokens, config, 7)[0]
    assert torch.equal(whole[0::2], first) and torch.equal(whole[1::2], second)
    assert not torch.equal(random_of_first, torch.rand(4))  # their dropout differs


# -- evaluation --


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 95])
def test_evaluation_is_the_sum_over_single_tokens(version, count):
    """Every token but the first is predicted exactly once, from what its window of 16 holds before it."""
    model, tokens = tiny_model(version, dropout=0.5), torch.randint(50, (count + 1,))
    total = 0.0
    for target in range(1, count + 1):
        start = (target - 1) // 16 * 16
        logits = model(tokens[None, start:target])[0][0, -1].double()
        total -= logits.log_softmax(-1)[tokens[target]].item()
    assert version.evaluate(model, tokens, 16) == pytest.approx(total / count, rel=1e-5)
    assert version.evaluate(model, tokens, 16) == version.evaluate(model, tokens, 16)


@torch.no_grad()
@pytest.mark.parametrize("version", [v0_bigram, v2_bpe_rope], ids=ids)
def test_bits_per_byte_is_what_it_says(trained, text, version):
    """The probability that the model gives to the validation text, in bits, for each of its UTF-8 bytes."""
    model, tokenizer, config = version.load(trained[version] / "best.pt")
    train, validation = text[:54_000], text[54_000:]
    tokens = tokenizer.encode(train)[-1:] + tokenizer.encode(validation)
    bits = 0.0
    for start in range(0, len(tokens) - 1, config.block_size):
        window = tokens[start : start + config.block_size + 1]
        probabilities = model(torch.tensor([window[:-1]]))[0][0].double().softmax(-1)
        bits -= sum(math.log2(probabilities[t, token]) for t, token in enumerate(window[1:]))
    result = json.loads((trained[version] / "result.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(bits / 6000, rel=1e-5)
    assert result["tokens_per_byte"] == pytest.approx((len(tokens) - 1) / 6000)
    assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["context_bits_per_byte"]["1"] == result["bits_per_byte"]


def test_versions_are_measured_on_the_same_bytes(trained):
    results = [json.loads((trained[version] / "result.json").read_text()) for version in VERSIONS]
    assert len({r["validation_sha256"] for r in results}) == 1
    assert [r["version"] for r in results] == [v.__name__ for v in VERSIONS]
    far = [[r["context_bits_per_byte"][k] for k in "24"] for r in results]
    assert far[1] == [None, None] and None not in far[0] + far[2] + far[3]
    assert far[0] == pytest.approx([results[0]["bits_per_byte"]] * 2, rel=1e-6)  # a bigram gains nothing by context


# -- learning --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_few_dozen_steps_lower_the_loss(trained, version):
    rows = list(csv.DictReader((trained[version] / "log.csv").open()))
    assert list(
        rows[0]
    ) == "step,train_loss,val_loss,perplexity,bits_per_byte,learning_rate,tokens_per_second,seconds".split(",")
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_model_can_learn_one_batch_by_heart(version):
    torch.manual_seed(0)
    model = version.LanguageModel(tiny_config(version), 50)
    idx, targets = torch.randint(50, (4, 16)), torch.randint(50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = tiny_config(v0_bigram, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [v0_bigram.learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    short = tiny_config(v0_bigram, steps=5, warmup_steps=10, learning_rate=1.0)
    assert v0_bigram.learning_rate(4, short) == 0.5


def test_the_same_small_budget_gives_the_expected_order(tmp_path, text):
    """Bits per byte: a bigram, characters with attention, BPE tokens with RoPE or ALiBi, one better than the other."""
    path = tmp_path / "text.txt"
    path.write_text(text)
    bits = {}
    for version in VERSIONS:
        flags = tiny_flags(
            version,
            n_layer=2,
            n_embd=64,
            n_head=4,
            block_size=32,
            steps=250,
            eval_interval=125,
            vocab_size=512,
            learning_rate=0.02 if version is v0_bigram else 0.004,
        )
        status, _, err = run(
            version, "--data", path, "--out", tmp_path / version.__name__, "--max-new-tokens", 0, *flags
        )
        assert status == 0, err
        bits[version] = json.loads((tmp_path / version.__name__ / "result.json").read_text())["bits_per_byte"]
    assert bits[v0_bigram] > bits[v1_transformer] > max(bits[v2_bpe_rope], bits[v3_alibi])


def test_the_bigram_table_learns_what_counting_gives(tmp_path):
    """v0 with its default settings against the best a bigram can do: counted pairs of characters, each 0.1 times more."""
    status, out, err = run(v0_bigram, "--out", tmp_path / "v0", "--max-new-tokens", 0)
    assert status == 0, err
    train, validation = v0_bigram.read_texts(ROOT / "input.txt")
    pairs, singles = Counter(zip(train, train[1:])), Counter(train[:-1])
    kinds, text = len(set(train)), train[-1] + validation
    bits = -sum(math.log2((pairs[a, b] + 0.1) / (singles[a] + 0.1 * kinds)) for a, b in zip(text, text[1:]))
    result = json.loads((tmp_path / "v0/result.json").read_text())
    assert result["bits_per_byte"] < 1.01 * bits / len(validation)


# -- sampling, against its definition --

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])  # by size: 1, 3, 4, 2, 0


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0.5}, {0, 1, 2, 3, 4}),
        ({"temperature": 2.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.7}, {1, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_k": 4, "top_p": 0.6}, {1, 3}),
        ({"temperature": 0.7, "top_k": 4, "top_p": 0.9}, {1, 3, 4}),
    ],
)
def test_samples_have_the_distribution_they_should(settings, kept):
    """A chi-square test on 10,000 draws: 99.99% of the time a right sampler stays below the bound."""
    generator, draws = torch.Generator().manual_seed(1), 10_000
    drawn = [v0_bigram.sample_token(PROBABILITIES.log(), generator, **settings) for _ in range(draws)]
    counts = np.bincount(drawn, minlength=5)
    expected = np.array(
        [
            p ** (1 / settings.get("temperature", 1.0)) if i in kept else 0.0
            for i, p in enumerate(PROBABILITIES.tolist())
        ]
    )
    expected *= draws / expected.sum()
    assert set(np.flatnonzero(counts)) == kept
    some = expected > 0
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 23.5


def test_temperature_zero_takes_the_likeliest():
    assert {v0_bigram.sample_token(PROBABILITIES.log(), None, temperature=0) for _ in range(20)} == {1}


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_same_seed_writes_the_same_text(version):
    model = tiny_model(version)
    one, same, other = (list(version.generate(model, [1, 2], 40, seed=seed)) for seed in (5, 5, 6))
    assert one == same != other


# -- stopping and going on --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_resumed_run_is_the_run_that_never_stopped(version, tmp_path, small, monkeypatch):
    """Stopped by Ctrl-C between two evaluations and at one, and killed: in the end weights, optimizer, log and sample
    are the same to the bit."""
    sampling = ["--max-new-tokens", 30]
    flags = ["--data", small, "--dtype", "float32", *sampling]
    flags += tiny_flags(version, steps=30, eval_interval=10, dropout=0.1)
    assert run(version, *flags, "--out", tmp_path / "whole")[0] == 0

    class Kill(BaseException):
        """Ends the program on the spot, as kill -9 does: nothing is saved."""

    original, ends = version.get_batch, [(7, None), (20, None), (26, Kill)]

    def end_here(tokens, config, step):
        if ends and step == ends[0][0] - 1:
            if ends.pop(0)[1]:
                raise Kill
            version.signal.raise_signal(version.signal.SIGINT)
        return original(tokens, config, step)

    monkeypatch.setattr(version, "get_batch", end_here)
    out_folder = tmp_path / "parts"
    status, out, _ = run(version, *flags, "--out", out_folder)
    assert status == 130 and "stopped after step 7" in out and f"--out {out_folder} --resume" in out
    status, out, _ = run(version, "--out", out_folder, "--resume", *sampling)
    assert status == 130 and "stopped after step 20" in out
    with pytest.raises(Kill):
        run(version, "--out", out_folder, "--resume", *sampling)
    status, out, err = run(version, "--out", out_folder, "--resume", *sampling)
    assert status == 0, err

    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert a["run"]["step"] == b["run"]["step"] == 30
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for key, state in a["run"]["optimizer"]["state"].items():
        assert all(torch.equal(v, b["run"]["optimizer"]["state"][key][k]) for k, v in state.items())
    clocks = {"tokens_per_second", "seconds"}
    logs = [
        [
            {k: v for k, v in row.items() if k not in clocks}
            for row in csv.DictReader((tmp_path / name / "log.csv").open())
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert (tmp_path / "whole/sample.txt").read_bytes() == (tmp_path / "parts/sample.txt").read_bytes()


# -- speed that is true --


def test_tokens_per_second_agree_with_a_stopwatch(tmp_path, small, monkeypatch):
    """Measured beside the program, from the start of one step to that of another; evaluations and saving do not count."""
    starts, ends = [], []

    def noting(times, function, pause=0.0):
        def noted(*args, **more):
            times.append(time.perf_counter())
            time.sleep(pause)
            return function(*args, **more)

        return noted

    for name, times, pause in (("learning_rate", starts, 0), ("evaluate", ends, 0.3), ("save_checkpoint", [], 0.3)):
        monkeypatch.setattr(v2_bpe_rope, name, noting(times, getattr(v2_bpe_rope, name), pause))
    flags = ["--data", small, "--out", tmp_path, "--steps", 100, "--eval-interval", 50, "--max-new-tokens", 0]
    status, _, err = run(v2_bpe_rope, *flags, *tiny_flags(v2_bpe_rope, block_size=128, n_embd=64))
    assert status == 0, err
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    stopwatch = [ends[0] - starts[0], ends[1] - starts[50]]
    for row, seconds in zip(rows, stopwatch):
        assert float(row["tokens_per_second"]) == pytest.approx(50 * 12 * 128 / seconds, rel=0.05)
    assert float(rows[1]["seconds"]) == pytest.approx(sum(stopwatch), rel=0.05)


@pytest.mark.parametrize("version, limit", list(zip(VERSIONS, (3, 3, 4, 4))), ids=[v.__name__ for v in VERSIONS])
def test_the_first_step_comes_soon(version, limit):
    """The whole program with its default settings, PyTorch's own import included; the best of a few, as others may be
    busy, and on a machine where that import alone takes more than 2 seconds, so much longer."""
    for _ in range(4):
        seconds = bench_steps.step_starts(version, 1)[1]
        if seconds < limit:
            return
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert seconds < limit * (time.perf_counter() - started) / 2
