"""tests.ablations: its models are what their rows say, and it trains them all."""

import json
import math
from unittest import mock

import pytest
import torch

import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests import ablations
from tests.conftest import result_of, run, tiny_config, tiny_flags, tiny_model


def variant(replaced, vocab_size=50, **settings):
    """A tiny model of v2 with some parts replaced."""
    with ablations.replaced_in(v2_bpe_rope, replaced):
        return tiny_model(v2_bpe_rope, vocab_size, **settings)


def logits_of(model, tokens, replaced):
    with ablations.replaced_in(v2_bpe_rope, replaced), torch.no_grad():
        return model(torch.tensor([tokens]))[0][0]


def test_v2_without_its_three_ideas_is_v1():
    """The same weights give the same scores; only what the rows are made of differs."""
    replaced = ablations.NO_ROPE | ablations.NO_GELU
    theirs, tokens = tiny_model(v1_transformer), list(range(16))
    ours = variant(replaced)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits_of(ours, tokens, replaced), theirs(torch.tensor([tokens]))[0][0])
    assert ablations.NO_BPE["train_tokenizer"]("cab", v2_bpe_rope.Config()).encode("abc") == [0, 1, 2]


def test_each_row_changes_what_it_says():
    """One part put back at a time gives another model each time, and all of them give v2."""
    tokens, seen = list(range(16)), []
    for replaced in (ablations.NO_ROPE | ablations.NO_GELU, ablations.NO_ROPE, ablations.NO_GELU, {}):
        seen.append(logits_of(variant(replaced), tokens, replaced))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(seen[-1], tiny_model(v2_bpe_rope)(torch.tensor([tokens]))[0][0])


def test_without_positions_the_order_of_earlier_tokens_is_lost():
    replaced = ablations.TABLES["positions"]["none"][1]
    model = variant(replaced, n_layer=1)
    scores = [logits_of(model, tokens, replaced)[-1] for tokens in ([1, 2, 3, 4], [3, 1, 2, 4])]
    torch.testing.assert_close(*scores)
    replaced = ablations.TABLES["positions"]["sinusoidal"][1]
    model = variant(replaced, n_layer=1)
    scores = [logits_of(model, tokens, replaced)[-1] for tokens in ([1, 2, 3, 4], [3, 1, 2, 4])]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_sinusoids_are_those_of_the_paper():
    """Vaswani et al. 2017: PE(t, 2i) = sin(t / 10000^(2i / C)), PE(t, 2i + 1) = cos(...), here scaled."""
    model = ablations.SinusoidalPositions(tiny_config(v2_bpe_rope), 50)
    vectors = model.positional_encoding(3, 9) / math.sqrt(2 / 32)
    for t in range(3, 9):
        for i in range(16):
            angle = t / 10000 ** (2 * i / 32)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(vectors[t - 3, 2 * i:2 * i + 2], expected, atol=1e-5, rtol=1e-5)
    assert model.positional_encoding(0, 1000).square().mean().sqrt().item() == pytest.approx(32 ** -0.5, rel=1e-3)


def test_slopes_are_multiples_of_the_papers():
    for row, factor in {"a quarter of the paper's slopes": 0.25, "twice": 2, "four times": 4, "eight times": 8}.items():
        program, replaced, _ = ablations.TABLES["slopes"][row]
        paper = tiny_model(program)
        with ablations.replaced_in(program, replaced):
            torch.testing.assert_close(tiny_model(program).slopes, factor * paper.slopes)
    torch.testing.assert_close(tiny_model(v3_alibi).slopes, paper.slopes)  # and afterwards all is as it was


def test_rows_at_random_start_anywhere_and_repeat():
    """Of 200 draws among 100 places, about 87 places are drawn, where an epoch of v2's has 6 or 7 rows."""
    tokens, config = torch.arange(116), tiny_config(v2_bpe_rope, batch_size=200)
    idx, targets = ablations.rows_at_random(tokens, config, 3)
    assert torch.equal(targets, idx + 1) and torch.equal(idx[:, 1:], idx[:, :-1] + 1) and idx.shape == (200, 16)
    assert 75 < len(set(idx[:, 0].tolist())) < 100
    assert torch.equal(idx, ablations.rows_at_random(tokens, config, 3)[0])
    assert not torch.equal(idx, ablations.rows_at_random(tokens, config, 4)[0])


def test_half_a_cosine_is_above_the_straight_line_first_and_below_it_later():
    config = tiny_config(v2_bpe_rope, steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [ablations.half_a_cosine(step, config) for step in range(110)]
    line = [v2_bpe_rope.learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx(line[:10]) and rates[60] == pytest.approx(0.5)
    assert rates[35] > line[35] + 0.09 and rates[85] < line[85] - 0.09 and 0 < rates[109] < 0.001


def test_it_trains_every_row_and_makes_the_tables(tmp_path, little, capsys):
    """With tiny models; a second call finds the runs of the first."""
    flags = ["--data", little, "--steps", 2, "--seeds", 7, "--out", tmp_path, *tiny_flags(v2_bpe_rope, block_size=8)]

    def call(*more):
        ablations.main([str(flag) for flag in (*flags, *more)])
        return capsys.readouterr()

    first = call()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = {title: list(rows) for title, rows in results["tables"].items()}
    assert rows == {title: list(rows) for title, rows in ablations.TABLES.items()}
    for title, rows in results["tables"].items():
        assert ablations.table(title, rows) in first.out
        assert all([run["seed"] for run in runs] == [7] for runs in rows.values())
    assert results["tables"]["vocabulary"]["256: bytes alone"][0]["tokens_per_byte"] == 1.0
    again = call("--tables", "positions")
    assert "--out" in first.err and "--out" not in again.err
    for made_by in tmp_path.glob("*/command.json"):  # as if another version of the scripts had made them
        made_by.write_text(made_by.read_text(encoding="utf-8").replace("0", "1"), encoding="utf-8")
    assert call("--tables", "slopes", "--seeds", 7).err.count("-- --data") == len(ablations.TABLES["slopes"])
    assert ablations.table("positions", results["tables"]["positions"]) in again.out


def test_a_row_is_the_program_itself(tmp_path, small):
    """The row of v2 has the losses of python v2_bpe_rope.py with the same flags, to the last digit."""
    flags = ["--data", small, "--out", tmp_path / "own", "--max-new-tokens", 0]
    flags += tiny_flags(v2_bpe_rope, steps=3, seed=5, eval_interval=3, learning_rate=3e-3)  # that of all rows
    status, _, err = run(v2_bpe_rope, *flags)
    assert status == 0, err
    args = mock.Mock(out=tmp_path, steps=3, data=small, flags=tiny_flags(v2_bpe_rope))
    folder = ablations.train(ablations.TABLES["ideas"]["BPE, RoPE, GELU: v2"], 5, args)
    assert result_of(folder)["val_loss"] == result_of(tmp_path / "own")["val_loss"]
