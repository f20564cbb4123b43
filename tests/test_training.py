"""Numbers that are true: exact evaluation, losses that fall, samples from the right distribution, exact resume."""

import argparse
import math
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.conftest import (ROOT, TRANSFORMERS, VERSIONS, ids, log_of, result_of, run, said, short_run, tiny_config,
                            tiny_flags, tiny_model)

CLOCKS = {"tokens_per_second", "seconds"}


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


# -- data --


def test_the_last_tenth_of_the_characters_validates(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc\r\ndéfghijklmnopqrst".encode())  # with a byte order mark and a Windows line end
    whole = "abc\ndéfghijklmnopqrst"  # 21 characters
    assert v0_bigram.read_texts(path) == (whole[:18], whole[18:])


def test_the_last_tenth_of_the_rows_validates(tmp_path):
    path = tmp_path / "table.CSV"
    table = "answer,question\n" + "".join(f'"a, {i}",q{i}\n' for i in range(10))
    path.write_text(table, encoding="utf-8")
    train, validation = v0_bigram.read_texts(path)
    assert validation == "<user>q9</user>\n<bot>a, 9</bot>\n"
    assert train.startswith("<user>q0</user>\n<bot>a, 0</bot>\n<user>q1") and train.count("</bot>\n") == 9


@pytest.mark.parametrize("version", [v2_bpe_rope, v3_alibi], ids=ids)
def test_a_bpe_vocabulary_has_at_least_the_256_bytes(version):
    assert version.train_tokenizer("abc abc", tiny_config(version, vocab_size=256)).vocab_size == 256
    with pytest.raises(version.UserError, match="--vocab-size 255 is too small"):
        version.train_tokenizer("abc abc", tiny_config(version, vocab_size=255))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_batches_are_windows_of_the_text_and_targets_come_one_later(dtype):
    tokens, config = torch.arange(200).to(dtype), tiny_config(v0_bigram, batch_size=8)
    idx, targets = v0_bigram.get_batch(tokens, config, step=3)
    assert idx.shape == targets.shape == (8, 16) and idx.dtype == torch.long
    assert torch.equal(targets, idx + 1) and torch.equal(idx[:, 1:], idx[:, :-1] + 1)
    assert len(set(idx[:, 0].tolist())) == 8 and idx.max() < 200
    assert torch.equal(idx, v0_bigram.get_batch(tokens, config, step=3)[0])
    assert not torch.equal(idx, v0_bigram.get_batch(tokens, config, step=4)[0])
    only, two = torch.arange(17).to(dtype), torch.arange(18).to(dtype)  # a row can start at one and at two places
    assert torch.equal(v0_bigram.get_batch(only, config, 0)[1], torch.arange(1, 17).expand(8, 16))
    assert {v0_bigram.get_batch(two, config, step)[0][7, 0].item() for step in range(16)} == {0, 1}


@pytest.mark.parametrize("length", [2001, 2016, 130, 81])
def test_an_epoch_draws_no_row_twice_and_leaves_out_at_most_one_batch(length):
    """Rows of 16 tokens follow each other without a gap or an overlap, beginning at an offset of less than 16. The next
    epoch has another offset and another order."""
    tokens, config, epochs = torch.arange(length), tiny_config(v0_bigram, batch_size=4, seed=3), []
    steps = (length - 16) // (4 * 16)  # in an epoch
    for first in (0, steps):
        batches = [v0_bigram.get_batch(tokens, config, step)[0][:, 0] for step in range(first, first + steps)]
        epochs.append(torch.cat(batches))
        assert len(set(epochs[-1].tolist())) == 4 * steps and len(set((epochs[-1] % 16).tolist())) == 1
        assert not torch.equal(epochs[-1], epochs[-1].sort()[0])
    assert epochs[0][0] % 16 != epochs[1][0] % 16 and not torch.equal(epochs[0] // 16, epochs[1] // 16)


def test_a_row_starts_wherever_it_fits():
    tokens, config = torch.arange(33), tiny_config(v0_bigram, batch_size=2)
    starts = [v0_bigram.get_batch(tokens, config, step)[0][:, 0] for step in range(300)]
    assert set(torch.cat(starts).tolist()) == set(range(17))


def test_a_batch_larger_than_the_text_repeats_all_its_rows():
    starts = v0_bigram.get_batch(torch.arange(80), tiny_config(v0_bigram, batch_size=9), 0)[0][:, 0].tolist()
    assert sorted(map(starts.count, set(starts))) == [2, 2, 2, 3]


def test_a_batch_depends_on_the_seed_and_the_step():
    """On both, each for itself: the batches of seed 1 are not those of seed 2 one step later."""
    tokens = torch.arange(150)  # two steps in an epoch
    starts = {tuple(v0_bigram.get_batch(tokens, tiny_config(v0_bigram, seed=seed), step)[0][:, 0].tolist())
              for seed in range(4) for step in range(4)}
    assert len(starts) == 16


def test_processes_share_out_the_rows_that_one_would_draw(monkeypatch):
    tokens, config = torch.arange(500), tiny_config(v0_bigram, batch_size=6)
    whole, whole_targets = v0_bigram.get_batch(tokens, config, 7)
    monkeypatch.setattr(v0_bigram, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(v0_bigram, "RANK", rank)
        idx, targets = v0_bigram.get_batch(tokens, config, 7)
        assert torch.equal(whole[rank::2], idx) and torch.equal(whole_targets[rank::2], targets)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_dropout_depends_on_the_seed_the_step_and_the_process(version, monkeypatch):
    """As batches do, so that a resumed run drops what a run without a stop does; but processes drop differently."""
    tokens = torch.arange(500)

    def drawn(seed=1, step=7, rank=0):
        monkeypatch.setattr(version, "RANK", rank)
        version.get_batch(tokens, tiny_config(version, seed=seed, dropout=0.1), step)
        return tuple(torch.rand(4).tolist())

    monkeypatch.setattr(version, "WORLD", 2)
    assert drawn() == drawn()
    assert len({drawn(), drawn(seed=2), drawn(step=8), drawn(rank=1)}) == 4


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_without_dropout_a_batch_leaves_torchs_generator_alone(version, monkeypatch):
    tokens = torch.arange(500)
    without = version.get_batch(tokens, tiny_config(version), 7)
    with_dropout = version.get_batch(tokens, tiny_config(version, dropout=0.1), 7)
    assert torch.equal(without[0], with_dropout[0])  # the rows are the same

    def manual_seed(number):
        raise AssertionError("torch.manual_seed was called")

    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    version.get_batch(tokens, tiny_config(version), 7)
    if version in TRANSFORMERS:
        with pytest.raises(AssertionError, match="was called"):
            version.get_batch(tokens, tiny_config(version, dropout=0.1), 7)


# -- evaluation --


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("count", [16, 17, 31, 32, 95])
def test_evaluation_is_the_mean_over_single_tokens(version, count):
    """Every token but the first is predicted exactly once, from what its window of 16 holds before it."""
    model, tokens = tiny_model(version, dropout=0.5), torch.randint(50, (count + 1,))
    total = 0.0
    for target in range(1, count + 1):
        start = (target - 1) // 16 * 16
        logits = model(tokens[None, start:target])[0][0, -1].double()
        total -= logits.log_softmax(-1)[tokens[target]].item()
    assert version.evaluate(model, tokens, 16) == pytest.approx(total / count, rel=1e-5)
    assert version.evaluate(model.train(), tokens.to(torch.uint8), 16) == version.evaluate(model, tokens, 16)
    assert not any(module.training for module in model.modules())  # without dropout, and it stays so


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
@pytest.mark.parametrize("windows, rest", [(256, 0), (259, 0), (259, 5), (600, 1)])
def test_evaluation_of_long_texts_weighs_every_token_equally(version, windows, rest):
    """Windows are read in batches of 256 here; the last batch and the last window are smaller than the others."""
    model, tokens = tiny_model(version), torch.randint(50, (16 * windows + rest + 1,)).to(torch.uint16)
    losses, n = [], 16 * windows
    parts = [tokens[:n].view(-1, 16), tokens[1:n + 1].view(-1, 16)], [tokens[None, n:-1], tokens[None, n + 1:]]
    for idx, targets in parts if rest else parts[:1]:
        probabilities = model(idx.long())[0].double().log_softmax(-1)
        losses.append(-probabilities.gather(-1, targets.long().unsqueeze(-1)).flatten())
    assert version.evaluate(model, tokens, 16) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_evaluation_reads_about_4096_tokens_at_a_time():
    """All at once, the logits of a large text would not fit into memory."""
    model, shapes = tiny_model(v0_bigram), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    v0_bigram.evaluate(model, torch.zeros(10_000, dtype=torch.uint8), 16)
    assert shapes == [(256, 16), (256, 16), (112, 16), (1, 15)]
    v0_bigram.evaluate(model, torch.zeros(10_001, dtype=torch.uint8), 5000)  # longer than that: one row at a time
    assert shapes[4:] == [(1, 5000), (1, 5000)]


def test_evaluation_uses_the_autocast_it_is_passed():
    model, tokens = tiny_model(v3_alibi), torch.randint(50, (100,))
    exact = v3_alibi.evaluate(model, tokens, 16)
    rounded = v3_alibi.evaluate(model, tokens, 16, torch.autocast("cpu", torch.bfloat16))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_bits_per_byte_is_what_it_says(trained, text, version):
    """The probability that the model gives to the validation text, in bits, for each of its UTF-8 bytes."""
    model, tokenizer, config = version.load(trained[version] / "best.pt")
    assert not model.training and next(model.parameters()).device.type == "cpu"
    train, validation = text[:54_000], text[54_000:]
    tokens = tokenizer.encode(train)[-1:] + tokenizer.encode(validation)
    result = result_of(trained[version])
    for times in (1, 2, 4):  # contexts of 1, 2 and 4 times the trained length
        if version is v1_transformer and times > 1:
            assert result["context_bits_per_byte"][str(times)] is None
            continue
        bits, block_size = 0.0, times * config.block_size
        for start in range(0, len(tokens) - 1, block_size):
            window = torch.tensor(tokens[start:start + block_size + 1])
            probabilities = model(window[None, :-1])[0][0].double().softmax(-1)
            bits -= probabilities[torch.arange(len(window) - 1), window[1:]].log2().sum().item()
        assert result["context_bits_per_byte"][str(times)] == pytest.approx(bits / 6000, rel=1e-5)
    assert result["tokens_per_byte"] == pytest.approx((len(tokens) - 1) / 6000)
    assert result["bits_per_byte"] == result["context_bits_per_byte"]["1"]
    assert result["perplexity"] == pytest.approx(math.exp(result["val_loss"]))


@pytest.mark.parametrize("block_size, measured", [(75, "124"), (76, "12"), (150, "12"), (151, "1")])
def test_a_context_longer_than_the_validation_text_is_not_measured(block_size, measured, tmp_path, little):
    """It has 300 characters, and the last one before them is read, too."""
    assert short_run(v0_bigram, little, tmp_path, block_size=block_size)[0] == 0
    context = result_of(tmp_path)["context_bits_per_byte"]
    assert [times for times, bits in context.items() if bits is not None] == list(measured)


def test_a_byte_is_a_byte_of_utf8(tmp_path):
    """Not a character: é is one character, two bytes, and for v0 one token."""
    (tmp_path / "text.txt").write_text("né à " * 200, encoding="utf-8")
    flags = tiny_flags(v0_bigram, steps=2)
    status, _, err = run(v0_bigram, "--data", tmp_path / "text.txt", "--out", tmp_path, "--max-new-tokens", 0, *flags)
    assert status == 0 and err == ""
    assert result_of(tmp_path)["tokens_per_byte"] == pytest.approx(5 / 7)


def test_versions_are_measured_on_the_same_bytes(trained):
    results = [result_of(trained[version]) for version in VERSIONS]
    assert len({r["validation_sha256"] for r in results}) == 1
    assert [r["version"] for r in results] == [v.__name__ for v in VERSIONS]
    far = [[r["context_bits_per_byte"][k] for k in "24"] for r in results]
    assert far[1] == [None, None] and None not in far[0] + far[2] + far[3]
    assert far[0] == pytest.approx([results[0]["bits_per_byte"]] * 2, rel=1e-6)  # a bigram gains nothing by context


# -- learning --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_few_dozen_steps_lower_the_loss(trained, version):
    rows, result = log_of(trained[version]), result_of(trained[version])
    columns = "step,train_loss,val_loss,perplexity,bits_per_byte,learning_rate,tokens_per_second,seconds"
    assert list(rows[0]) == columns.split(",")
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30]
    losses = [float(row["val_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert float(rows[-1]["train_loss"]) < float(rows[1]["train_loss"])
    for row in rows:
        loss = float(row["val_loss"])
        assert float(row["perplexity"]) == pytest.approx(math.exp(loss))
        assert float(row["bits_per_byte"]) == pytest.approx(loss * result["tokens_per_byte"] / math.log(2))


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_evaluation_before_training_finds_all_tokens_about_equally_likely(trained, version):
    """A loss of ln V, or ln V + 1/2 where logits are random with variance 1. A loss far from it before the first step is
    the first sign of a wrong model."""
    row, V = log_of(trained[version])[0], result_of(trained[version])["vocab_size"]
    assert row["step"] == "0" and row["train_loss"] == "nan"
    assert float(row["tokens_per_second"]) == float(row["seconds"]) == 0
    assert float(row["val_loss"]) == pytest.approx(math.log(V) + (version is not v0_bigram) / 2, abs=1e-5 if version is v0_bigram else 0.5)


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_training_is_the_loop_of_the_textbooks(version, tmp_path, small):
    """Weights and logged numbers of a run against the same few steps written with plain PyTorch calls: AdamW with
    weight decay for matrices only, the learning rate of each step, the clipped gradient, dropout at every step."""
    settings = {"steps": 7, "eval_interval": 3, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 3,
                "dropout": 0.1, "weight_decay": 0.7, "grad_clip": 0.2, "seed": 5}
    flags = ["--data", small, "--out", tmp_path, "--dtype", "float32", "--max-new-tokens", 0]
    status, _, err = run(version, *flags, *tiny_flags(version, **settings))
    assert status == 0, err
    model, tokenizer, config = version.load(tmp_path / "last.pt")
    assert asdict(config) == asdict(tiny_config(version, **settings)) == result_of(tmp_path)["config"]

    tokens = torch.from_numpy(tokenizer.encode_to_array(version.read_texts(small)[0]))
    torch.manual_seed(5)
    expected = version.LanguageModel(config, tokenizer.vocab_size)
    norms = [p for name, p in expected.named_parameters() if "norm" in name]
    matrices = [p for name, p in expected.named_parameters() if "norm" not in name]
    groups = [{"params": matrices, "weight_decay": 0.7}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    losses, clipped = [], 0
    rates = [0.02 * share for share in (1 / 3, 2 / 3, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5)]
    for step, rate in enumerate(rates):
        idx, targets = version.get_batch(tokens, config, step)
        loss = expected(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_(expected.parameters(), 0.2) > 0.2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    assert version is v0_bigram or clipped  # else it would not matter whether the gradient is clipped
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4, msg=lambda message: f"{name}: {message}")

    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == ["0", "3", "6", "7"]
    train_losses = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [float(row["train_loss"]) for row in rows[1:]] == pytest.approx(train_losses, rel=1e-4)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([rates[step] for step in (0, 2, 5, 6)])


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_model_can_learn_one_batch_by_heart(version):
    torch.manual_seed(0)
    model = version.LanguageModel(tiny_config(version), 50)
    idx, targets = torch.randint(50, (4, 16)), torch.randint(50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0, fused=True)
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
    assert rates[9:] == pytest.approx([(100 - s) / 91 for s in range(9, 100)])
    for steps in (1, 5, 9, 10):
        short = tiny_config(v0_bigram, steps=steps, warmup_steps=10, learning_rate=1.0)
        assert [v0_bigram.learning_rate(s, short) for s in range(steps)] == pytest.approx([(s + 1) / 10 for s in range(steps)])
    assert v0_bigram.learning_rate(0, tiny_config(v0_bigram, warmup_steps=0, learning_rate=1.0)) == 1.0


def test_each_version_learns_more_than_the_one_before(tmp_path, small):
    """Bits per byte after the same few steps: a bigram, characters with attention, BPE tokens with RoPE or ALiBi."""
    bits = {}
    for version in VERSIONS:
        settings = {"n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 400, "batch_size": 16, "warmup_steps": 10,
                    "steps": 150, "eval_interval": 150, "learning_rate": 0.05 if version is v0_bigram else 0.005}
        flags = ["--data", small, "--out", tmp_path / version.__name__, "--dtype", "float32", "--max-new-tokens", 0]
        status, _, err = run(version, *flags, *tiny_flags(version, **settings))
        assert status == 0, err
        bits[version] = result_of(tmp_path / version.__name__)["bits_per_byte"]
    assert bits[v0_bigram] > bits[v1_transformer] > max(bits[v2_bpe_rope], bits[v3_alibi]), bits


def test_the_bigram_table_learns_what_counting_gives(tmp_path):
    """v0 against the best a bigram can do: counted pairs of characters, each 0.1 times more. With larger batches and a
    higher learning rate 600 steps are enough; these change how fast the table is learned, not what it can hold."""
    flags = ["--steps", 600, "--batch-size", 48, "--learning-rate", 0.1, "--max-new-tokens", 0]
    status, _, err = run(v0_bigram, "--out", tmp_path, *flags)
    assert status == 0, err
    train, validation = v0_bigram.read_texts(ROOT / "input.txt")
    pairs, singles = Counter(zip(train, train[1:])), Counter(train[:-1])
    kinds, text = len(set(train)), train[-1] + validation
    bits = -sum(n * math.log2((pairs[a, b] + 0.1) / (singles[a] + 0.1 * kinds))
                for (a, b), n in Counter(zip(text, text[1:])).items())
    assert 0.999 * bits / len(validation) < result_of(tmp_path)["bits_per_byte"] < 1.01 * bits / len(validation)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_run_in_bfloat16_ends_near_one_in_float32(version, trained, tmp_path, small):
    flags = ["--data", small, "--out", tmp_path, "--dtype", "bfloat16", "--max-new-tokens", 0]
    flags += tiny_flags(version, steps=30, eval_interval=10)  # as in the finished runs
    status, out, err = run(version, *flags)
    assert status == 0 and "in bfloat16" in out, err
    exact, rounded = result_of(trained[version]), result_of(tmp_path)
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)
    for before, after in zip(log_of(trained[version])[1:], log_of(tmp_path)[1:]):
        assert before["train_loss"] != after["train_loss"] and before["val_loss"] != after["val_loss"]
    assert all(weight.dtype == torch.float32 for weight in checkpoint(tmp_path)["model"].values())


# -- which device and which number format --


@pytest.mark.parametrize("capabilities, expected", [({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
                                                    ({"amx_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")])
def test_a_cpu_computes_in_bfloat16_where_that_is_native(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for device in ("auto", "cpu"):
        chosen = v0_bigram.pick_device(argparse.Namespace(device=device, dtype="auto"))
        assert chosen == (torch.device("cpu"), expected)
    for dtype in ("float32", "bfloat16"):
        assert v0_bigram.pick_device(argparse.Namespace(device="auto", dtype=dtype))[1] == dtype
    for device in ("cuda", "mps"):
        with pytest.raises(v0_bigram.UserError, match=f"--device {device}: PyTorch finds only cpu here"):
            v0_bigram.pick_device(argparse.Namespace(device=device, dtype="auto"))


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_comes_first_and_each_process_takes_its_own(native, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not native})
    expected = []
    for local_rank, index in ((None, 0), ("0", 0), ("1", 1), ("2", 0)):
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        expected.append(torch.device("cuda", index))
        result = v0_bigram.pick_device(argparse.Namespace(device="auto", dtype="auto"))
        assert result == (expected[-1], "bfloat16" if native else "float32")
    assert chosen == expected
    assert v0_bigram.pick_device(argparse.Namespace(device="mps", dtype="auto")) == (torch.device("mps"), "float32")


def test_tokens_are_int32_on_the_device(tmp_path, little, monkeypatch):
    """A GPU cannot index unsigned 16-bit numbers, and 64-bit ones would take twice the memory. The device "meta", which
    computes nothing, stands for a GPU."""
    flags = ["--data", str(little), "--out", str(tmp_path), *tiny_flags(v2_bpe_rope)]
    prepared = v2_bpe_rope.prepare(*v2_bpe_rope.parse_arguments(flags))
    assert prepared.tokens.dtype == prepared.validation.dtype == torch.int32
    monkeypatch.setattr(v2_bpe_rope, "pick_device", lambda args: (torch.device("meta"), "float32"))
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: None)
    prepared = v2_bpe_rope.prepare(*v2_bpe_rope.parse_arguments(flags))
    tensors = [prepared.tokens, prepared.validation]
    assert all((x.dtype, x.device.type) == (torch.int32, "meta") for x in tensors)
    assert all(p.device.type == "meta" for p in prepared.model.parameters()) and prepared.model.training


# -- sampling, against its definition --

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])  # by size: 1, 3, 4, 2, 0


@pytest.mark.parametrize("settings, kept", [
    ({}, {0, 1, 2, 3, 4}),
    ({"temperature": 0.5}, {0, 1, 2, 3, 4}),
    ({"temperature": 2.0}, {0, 1, 2, 3, 4}),
    ({"top_k": 1}, {1}),
    ({"top_k": 3}, {1, 3, 4}),
    ({"top_k": 9}, {0, 1, 2, 3, 4}),
    ({"top_p": 0.6}, {1, 3}),
    ({"top_p": 0.7}, {1, 3, 4}),
    ({"top_p": 1e-6}, {1}),
    ({"top_k": 4, "top_p": 0.6}, {1, 3}),
    ({"temperature": 0.7, "top_k": 4, "top_p": 0.9}, {1, 3, 4}),
])
def test_samples_have_the_distribution_they_should(settings, kept):
    """A chi-square test on 2,000 draws: 99.99% of the time a right sampler stays below the bound."""
    generator, draws = torch.Generator().manual_seed(1), 2_000
    drawn = [v0_bigram.sample_token(PROBABILITIES.log(), generator, **settings) for _ in range(draws)]
    counts, exponent = np.bincount(drawn, minlength=5), 1 / settings.get("temperature", 1.0)
    expected = np.array([p**exponent if i in kept else 0.0 for i, p in enumerate(PROBABILITIES.tolist())])
    expected *= draws / expected.sum()
    assert set(np.flatnonzero(counts)) == kept
    some = expected > 0
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < 23.5


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_temperature_zero_takes_the_most_likely_token(temperature):
    assert {v0_bigram.sample_token(PROBABILITIES.log(), None, temperature) for _ in range(20)} == {1}


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_same_seed_generates_the_same_text(version):
    model = tiny_model(version)
    one, same, other = (list(version.generate(model, [1, 2], 40, seed=seed)) for seed in (5, 5, 6))
    assert one == same != other


def test_generation_samples_as_it_is_told():
    """With the settings that sample_token takes, on the logits of the last position."""
    model = tiny_model(v0_bigram)
    for settings in ({"temperature": 0.0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.8}):
        generator, token, expected = torch.Generator().manual_seed(0), 7, []
        for _ in range(30):
            token = v0_bigram.sample_token(model.token_embedding.weight[token].detach(), generator, **settings)
            expected.append(token)
        assert list(v0_bigram.generate(model, [3, 7], 30, **settings)) == expected


# -- the best checkpoint and the last one --


def test_best_is_the_lowest_validation_loss_and_last_is_the_last(tmp_path, small, monkeypatch):
    losses, weights = [4.0, 3.0, 2.0, 2.5, 2.2], []

    def evaluate(model, tokens, block_size, autocast):
        weights.append(model.token_embedding.weight.detach().clone())
        return losses[len(weights) - 1] if len(weights) <= 5 else 2.1  # afterwards: longer contexts, in the report

    monkeypatch.setattr(v0_bigram, "evaluate", evaluate)
    flags = tiny_flags(v0_bigram, steps=8, eval_interval=2)
    status, out, err = run(v0_bigram, "--data", small, "--out", tmp_path, "--max-new-tokens", 0, *flags)
    assert status == 0, err
    assert torch.equal(checkpoint(tmp_path, "best.pt")["model"]["token_embedding.weight"], weights[2])
    assert torch.equal(checkpoint(tmp_path)["model"]["token_embedding.weight"], weights[4])
    result = result_of(tmp_path)
    assert (result["best_step"], result["steps"], result["val_loss"]) == (4, 8, 2.0)
    assert "best val loss 2.0000 at step 4, last 2.2000" in out and "overfits" in out
    assert [float(row["val_loss"]) for row in log_of(tmp_path)] == losses
    assert all(torch.equal(after, weights[2]) for after in weights[5:]) and len(weights) == 7


# -- stopping and going on --


class Kill(BaseException):
    """Ends the program at once, as kill -9 does."""


def end_at(monkeypatch, version, *ends):
    """Raise each of these (step, exception) once, when the batch of that step is drawn."""
    original, ends = version.get_batch, list(ends)

    def get_batch(tokens, config, step):
        if ends and step == ends[0][0]:
            raise ends.pop(0)[1]
        return original(tokens, config, step)

    monkeypatch.setattr(version, "get_batch", get_batch)


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_resumed_run_is_the_run_that_never_stopped(version, tmp_path, little, monkeypatch):
    """Stopped by Ctrl-C before the first evaluation of a trained model and between two, and killed: in the end weights,
    moments, log and sample are the same to the bit. The 13 steps are more than two epochs."""
    sampling, whole, parts = ["--max-new-tokens", 30], tmp_path / "whole", tmp_path / "parts"
    flags = ["--data", little, "--dtype", "float32", *sampling]
    flags += tiny_flags(version, steps=13, eval_interval=4, warmup_steps=3, dropout=0.1, batch_size=32)
    assert run(version, *flags, "--out", whole)[0] == 0

    end_at(monkeypatch, version, (2, KeyboardInterrupt), (7, KeyboardInterrupt), (12, Kill))
    status, out, err = run(version, *flags, "--out", parts)
    assert (status, err) == (130, "") and said(out).endswith(f"stopped; --out {parts} --resume starts at step 0")
    assert checkpoint(parts)["run"]["log"][-1]["step"] == 0
    status, out, err = run(version, "--out", parts, "--resume", *sampling)
    assert (status, err) == (130, "") and said(out).endswith(f"stopped; --out {parts} --resume starts at step 4")
    assert checkpoint(parts)["run"]["log"][-1]["step"] == 4
    with pytest.raises(Kill):
        run(version, "--out", parts, "--resume", *sampling)
    assert checkpoint(parts)["run"]["log"][-1]["step"] == 12
    status, out, err = run(version, "--out", parts, "--resume", *sampling)
    assert status == 0, err

    for name in ("last.pt", "best.pt"):
        a, b = checkpoint(whole, name)["model"], checkpoint(parts, name)["model"]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (checkpoint(folder)["run"]["optimizer"] for folder in (whole, parts))
    assert a.keys() == b.keys() and len(a) == len(checkpoint(whole)["model"])
    assert all(torch.equal(a[key][name], b[key][name]) for key in a for name in ("step", "exp_avg", "exp_avg_sq"))
    logs = [[{name: x for name, x in row.items() if name not in CLOCKS} for row in log_of(folder)]
            for folder in (whole, parts)]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == ["0", "4", "8", "12", "13"]
    assert (whole / "sample.txt").read_bytes() == (parts / "sample.txt").read_bytes() != b""
    results = [{**result_of(folder), "train_seconds": None} for folder in (whole, parts)]
    assert results[0] == results[1]


def test_more_steps_continue_a_finished_run(trained, tmp_path, small, monkeypatch):
    """--resume --steps: the weights and moments are those at the end, the learning rate that of the new plan."""
    version, batches = v3_alibi, []
    flags = ["--data", small, "--dtype", "float32", "--out", tmp_path, "--max-new-tokens", 0]
    assert run(version, *flags, *tiny_flags(version, steps=3, eval_interval=2, warmup_steps=1))[0] == 0
    original = version.get_batch
    monkeypatch.setattr(version, "get_batch", lambda *args: batches.append(args[2]) or original(*args))
    status, out, err = run(version, "--out", tmp_path, "--resume", "--steps", 7, "--max-new-tokens", 0)
    assert status == 0 and batches == [3, 4, 5, 6], err
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == ["0", "2", "3", "4", "6", "7"]
    config = version.load(tmp_path / "last.pt")[2]
    assert config.steps == 7 and float(rows[-1]["learning_rate"]) == version.learning_rate(6, config)
    assert {moments["step"].item() for moments in checkpoint(tmp_path)["run"]["optimizer"].values()} == {7}


# -- speed that is true --


def test_seconds_and_tokens_per_second_are_those_of_training_only(tmp_path, small, monkeypatch):
    """By a clock on which each step takes half a second, each evaluation 100 and each file 1000. Evaluating and saving
    do not count, and neither do the steps that were lost when the run was stopped."""
    now = [0.0]
    monkeypatch.setattr(v0_bigram, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(name, seconds):
        original = getattr(v0_bigram, name)

        def function(*args, **settings):
            now[0] += seconds
            return original(*args, **settings)

        monkeypatch.setattr(v0_bigram, name, function)

    for name, seconds in (("get_batch", 0.5), ("evaluate", 100), ("write", 1000), ("prepare", 10_000)):
        takes(name, seconds)
    end_at(monkeypatch, v0_bigram, (18, KeyboardInterrupt))
    flags = tiny_flags(v0_bigram, steps=25, eval_interval=10, batch_size=3)
    assert run(v0_bigram, "--data", small, "--out", tmp_path, "--max-new-tokens", 0, *flags)[0] == 130
    assert run(v0_bigram, "--resume", "--out", tmp_path, "--max-new-tokens", 0)[0] == 0
    rows = log_of(tmp_path)
    assert [float(row["seconds"]) for row in rows] == [0, 5, 10, 12.5] and result_of(tmp_path)["train_seconds"] == 12.5
    assert [float(row["tokens_per_second"]) for row in rows] == [0] + [3 * 16 / 0.5] * 3


def test_the_loop_reads_a_number_only_at_every_tenth_step(tmp_path, small, monkeypatch):
    """Reading a number makes a GPU wait until it has computed it, so that the next step starts late."""
    original, item, step, read_at = v0_bigram.get_batch, torch.Tensor.item, [None], set()

    def get_batch(tokens, config, number):
        step[0] = number
        return original(tokens, config, number)

    monkeypatch.setattr(v0_bigram, "get_batch", get_batch)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read_at.add(step[0]) or item(tensor))
    flags = ["--data", small, "--out", tmp_path, "--max-new-tokens", 0]
    assert run(v0_bigram, *flags, *tiny_flags(v0_bigram, steps=25, eval_interval=25))[0] == 0
    assert read_at - {None} == {9, 19, 24}  # 24: the evaluation
