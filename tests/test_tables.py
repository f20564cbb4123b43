"""tests.tables, and the figures that the measuring programs derive from their numbers."""

import pytest

from tests import ablations, bench_recipes, bench_ten_minutes, compare, tables


def test_a_table_is_replaced_and_the_rest_of_the_page_stays(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "answer", lambda: "| 42 |")
    page = "Before.\n\n<!-- answer -->\n\n| 41 |\n\n<!-- end -->\n\nAfter. <!-- a remark -->\n"
    filled = "Before.\n\n<!-- answer -->\n\n| 42 |\n\n<!-- end -->\n\nAfter. <!-- a remark -->\n"
    assert tables.fill_in(page) == filled == tables.fill_in(filled)


def test_a_table_that_nothing_makes_is_an_error():
    with pytest.raises(KeyError, match="unheard of"):
        tables.fill_in("<!-- unheard of -->\n\n<!-- end -->\n")


def test_a_run_passes_a_loss_at_its_first_evaluation_that_is_as_low():
    run = {"curve": [(1.0, 4.0), (2.0, 1.9), (3.0, 1.8), (4.0, 1.85)]}
    assert bench_recipes.passes(run, 1.9) == 2.0 and bench_recipes.passes(run, 1.85) == 3.0
    assert bench_recipes.passes(run, 1.0) is None


def test_recipes_are_compared_within_their_rounds():
    """The machine was twice as slow in the second round: the ratio is the same in both."""
    def runs(seconds, loss):
        return [{"seconds": factor * seconds, "loss": loss, "curve": [(0, 5), (factor * 3, loss)]} for factor in (1, 2)]

    results = {"machine": "M", "runs": {bench_recipes.NANOGPT: runs(10, 2.0), bench_recipes.V2: runs(5, 1.5)}}
    assert f"| {bench_recipes.V2} | 8 | 0.50 | 1.5000 | 4 |" in bench_recipes.table(results)
    assert bench_recipes.curves(results)[bench_recipes.V2] == [(4.5, 1.5)]  # without the evaluation before training


def test_a_chart_has_evenly_spaced_points_of_each_curve():
    curves = {"v2_bpe_rope": [(0, 4.0), (10, 2.0)], "v3_alibi": [(0, 3.0), (5, 1.0)]}
    text = compare.chart(curves, "step", points=5)
    assert "line [4.000, 3.500, 3.000, 2.500, 2.000]" in text
    assert "line [3.000, 2.000, 1.000, 1.000, 1.000]" in text  # a curve that has ended stays level
    assert text.endswith("Lines: v2_bpe_rope: blue; v3_alibi: green.")


def test_the_chart_of_positions_leaves_out_what_cannot_read_further():
    def runs(*bits):
        return [{"windows": dict(zip(("1", "2", "4", "8", "16"), bits))}]

    text = ablations.chart_of_positions({"learned": runs(2, None, None, None, None), "ALiBi": runs(2, 1.9, 1.8, 1.8, 1.8)})
    assert "line [2.000, 1.900, 1.800, 1.800, 1.800]" in text and text.count("    line") == 1


def test_an_answer_shows_whether_a_person_found_it_fitting():
    answers = [{"kind": "reworded", "question": "q", "answer": "a", "fits": fits} for fits in (True, None)]
    answers[1]["question"] = "r"
    text = bench_ten_minutes.answers({"chat": {"answers": answers}})
    assert "| q | reworded | a | yes |" in text and "| r | reworded | a | ? |" in text
