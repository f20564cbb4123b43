"""tests.augment: copies of questions without some of their frequent words."""

import collections

import pytest

from tests import augment
from v2_bpe_rope import read_texts

ROWS = [(f"what is the thing{i}?", f"answer {i}") for i in range(500)]


def test_every_row_stays_and_its_copies_lose_words_but_no_rare_one():
    augmented = augment.augment(ROWS)
    assert collections.Counter(answer for _, answer in augmented) == {answer: augment.COPIES + 1 for _, answer in ROWS}
    assert set(ROWS) <= set(augmented)
    answer_of = {answer: question.split() for question, answer in ROWS}
    for question, answer in augmented:
        words = iter(answer_of[answer])
        assert all(word in words for word in question.split())  # the same words in the same order, perhaps fewer
        assert answer_of[answer][-1] in question


def test_a_word_is_kept_with_the_probability_that_its_frequency_gives():
    """word2vec's rule: the square root of the threshold over the frequency, which is a quarter for "what" here."""
    kept = augment.kept_with(question for question, _ in ROWS)
    assert kept["what"] == pytest.approx((augment.THRESHOLD / 0.25) ** 0.5) and kept["thing7"] == 1.0
    copies = augment.augment(ROWS)
    share = sum("what" in question for question, _ in copies) / len(copies)
    assert share == pytest.approx((1 + augment.COPIES * kept["what"]) / (augment.COPIES + 1), abs=0.02)


def test_a_question_of_frequent_words_alone_is_never_empty():
    assert all(question for question, _ in augment.augment([("what is", "x")] * 300))


def test_rows_for_validation_stay_out_of_training(tmp_path, capsys):
    source, target = tmp_path / "source.csv", tmp_path / "new" / "target.csv"
    source.write_text("question,answer\n" + "".join(f"{q},{a}.\n" for q, a in ROWS), encoding="utf-8")
    augment.main([str(source), str(target)])
    assert "10,000 rows from 500" in capsys.readouterr().out
    train, validation = read_texts(target)
    assert all(f"<bot>answer {i}.</bot>" in (train if i < 450 else validation) for i in range(500))
    assert not any(f"<bot>answer {i}.</bot>" in train for i in range(450, 500))


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", "question,answer\na,b\n", ".csv"),
    ("a.csv", "question,answer\na\n", "row 1"),
    ("a.csv", None, "No such file"),
])
def test_bad_input_is_one_line(name, content, says, tmp_path, capsys):
    if content:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        augment.main([str(tmp_path / name), str(tmp_path / "new.csv")])
    assert stop.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "new.csv").exists()


def test_the_source_is_not_overwritten(tmp_path, capsys):
    source = tmp_path / "a.csv"
    source.write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        augment.main([str(source), str(source)])
    assert "would be lost" in capsys.readouterr().err and source.read_text(encoding="utf-8").endswith("a,b\n")
