"""tests.compare: trains, collects, and makes one Markdown of the numbers."""

import json
import subprocess
import sys

import pytest

from tests import compare
from tests.conftest import ROOT, VERSIONS
from tests.test_scripts import diff_size


def test_it_trains_and_prints_the_table(tmp_path, small):
    """Two versions, two seeds, as a program; then the same Markdown from its results file."""
    command = [sys.executable, "-m", "tests.compare", "--versions", "v0_bigram", "v2_bpe_rope", "--seeds", "1", "2"]
    command += ["--data", str(small), "--steps", "20", "--out", str(tmp_path / "runs"), "--block-size", "16"]
    command += ["--eval-interval", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "-- v2_bpe_rope, seed 2 --" in done.stderr and "\n      20 " in done.stderr
    results = json.loads((tmp_path / "runs/results.json").read_text())
    assert len(results["runs"]) == 4 and done.stdout.startswith(compare.markdown(results))
    rows = (tmp_path / "runs/curves.csv").read_text().splitlines()
    assert rows[0] == "version,seed,step,seconds,bits_per_byte" and len(rows) == 1 + 4 * 3
    again = [sys.executable, "-m", "tests.compare", "--results", str(tmp_path / "runs/results.json")]
    assert subprocess.run(again, capture_output=True, text=True, cwd=ROOT).stdout == done.stdout
    picture = tmp_path / "curves.png"
    drawn = subprocess.run([*again, "--plot", str(picture)], capture_output=True, text=True, cwd=ROOT)
    assert drawn.returncode == 0 and (picture.exists() or "pip install matplotlib" in drawn.stderr)


def test_the_table_of_existing_runs(trained, monkeypatch, capsys):
    folder = trained[VERSIONS[0]].parent
    monkeypatch.setattr(sys, "argv", ["compare", "--from-runs", str(folder)])
    compare.main()
    out = capsys.readouterr().out
    for version in VERSIONS:
        bits = json.loads((trained[version] / "result.json").read_text())["bits_per_byte"]
        assert f"| {version.__name__} |" in out and f"{bits:.4f}" in out
    added, removed = diff_size("v1_transformer.py", "v2_bpe_rope.py")
    assert f"| v1_transformer | v2_bpe_rope | {added} | {removed} |" in out and out.count("xychart-beta") == 2


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        compare.collect(tmp_path)


@pytest.mark.parametrize(
    "numbers, digits, expected",
    [([1.5, 1.7], 2, "1.60 ± 0.14"), ([2.0], 3, "2.000"), ([1.0, None], 2, "–"), ([1234.5, 1234.5], 0, "1,234 ± 0")],
)
def test_means_and_spreads(numbers, digits, expected):
    assert compare.mean_and_spread(numbers, digits) == expected


def test_a_chart_has_evenly_spaced_points_of_each_curve():
    curves = {"v2_bpe_rope": [(0, 4.0), (10, 2.0)], "v3_alibi": [(0, 3.0), (5, 1.0)]}
    text = compare.chart(curves, "step", points=5)
    assert "line [4.000, 3.500, 3.000, 2.500, 2.000]" in text
    assert "line [3.000, 2.000, 1.000, 1.000, 1.000]" in text  # a curve that has ended stays level
