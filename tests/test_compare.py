"""tests.compare: trains, collects, and makes one Markdown of the numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compare
from tests.conftest import VERSIONS, result_of, run


@pytest.fixture
def scripts_in_process(monkeypatch):
    """compare starts each script as a process of its own; here its main is called, which saves the import of PyTorch."""
    by_name = {f"{version.__name__}.py": version for version in VERSIONS}
    start = subprocess.run

    def run_here(command, **options):
        script = by_name.get(Path(command[1]).name)
        if not script or command[0] != sys.executable:
            return start(command, **options)
        status, out, err = run(script, *command[2:])
        sys.stderr.write(out + err)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run_here)


def test_it_trains_and_prints_the_table(tmp_path, small, scripts_in_process, capsys):
    """Two versions, two seeds, beside an older run; then the same Markdown from the results file."""
    (tmp_path / "runs/v3_alibi-1").mkdir(parents=True)
    (tmp_path / "runs/v3_alibi-1/result.json").write_text("an older run", encoding="utf-8")
    flags = ["--versions", "v0_bigram", "v2_bpe_rope", "--seeds", "1", "2", "--data", str(small), "--steps", "20"]
    flags += ["--out", str(tmp_path / "runs"), "--block-size", "16", "--eval-interval", "10", "--max-new-tokens", "9"]
    compare.main(flags)
    out, err = capsys.readouterr()
    assert "-- v2_bpe_rope, seed 2 --" in err and "\n      20 " in err
    assert "page.html shows the versions" in err and (tmp_path / "runs/page.html").exists()
    results = json.loads((tmp_path / "runs/results.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 4 and out.startswith(compare.markdown(results))
    rows = (tmp_path / "runs/curves.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "version,seed,step,seconds,bits_per_byte" and len(rows) == 1 + 4 * 3
    picture = tmp_path / "curves.png"
    compare.main(["--results", str(tmp_path / "runs/results.json"), "--plot", str(picture)])
    again = capsys.readouterr()
    assert again.out == out and (picture.exists() or "pip install matplotlib" in again.err)


def test_a_script_that_fails_ends_the_comparison(tmp_path, scripts_in_process, capsys):
    with pytest.raises(SystemExit, match="v0_bigram did not finish; its message is above"):
        compare.main(["--data", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "runs")])
    assert "missing.txt" in capsys.readouterr().err


def test_the_table_of_existing_runs(trained, tmp_path, capsys):
    shutil.copytree(trained[VERSIONS[0]].parent, tmp_path, dirs_exist_ok=True)
    compare.main(["--from-runs", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "no page: the runs were not measured on" in err  # they are of another text than input.txt
    for version in VERSIONS:
        assert f"| {version.__name__} |" in out and f"{result_of(trained[version])['bits_per_byte']:.4f}" in out
    added, removed = compare.diff_size("v1_transformer", "v2_bpe_rope")
    assert f"| v1_transformer | v2_bpe_rope | {added} | {removed} |" in out and out.count("xychart-beta") == 2


def test_runs_of_one_version_with_other_settings_are_not_averaged(trained, tmp_path):
    folder = trained[VERSIONS[0]]
    for name, changes in (("a", {"seed": 1}), ("b", {"seed": 2}), ("c", {"learning_rate": 1.0})):
        shutil.copytree(folder, tmp_path / name)
        result = result_of(folder)
        result["config"].update(changes)
        (tmp_path / name / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert len(compare.collect([tmp_path / "a", tmp_path / "b"])["runs"]) == 2
    with pytest.raises(SystemExit, match="differ in more than their seed"):
        compare.collect([tmp_path / "a", tmp_path / "c"])


@pytest.mark.parametrize("content", ["[1]", "{", '{"version": "v0_bigram"}'])
def test_a_damaged_run_is_one_line(content, trained, tmp_path):
    shutil.copytree(trained[VERSIONS[0]], tmp_path / "run")
    (tmp_path / "run/result.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="does not hold a run of these scripts"):
        compare.collect([tmp_path / "run"])


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        compare.collect(tmp_path.glob("*"))


def test_short_runs_are_evaluated_ten_times_and_default_runs_as_the_scripts_say():
    assert compare.settings(200, None, []) == ["--steps", "200", "--eval-interval", "20"]
    assert compare.settings(5, "a.txt", [])[-2:] == ["--eval-interval", "1"]
    for steps, flags in ((None, []), (5000, []), (200, ["--eval-interval=7"]), (200, ["--eval-interval", "7"])):
        assert compare.settings(steps, None, flags)[2 * (steps is not None):] == flags


@pytest.mark.parametrize(
    "numbers, digits, expected",
    [([1.5, 1.7], 2, "1.60 ± 0.14"), ([2.0], 3, "2.000"), ([1.0, None], 2, "–"), ([1234.5, 1234.5], 0, "1,234 ± 0")],
)
def test_means_and_spreads(numbers, digits, expected):
    assert compare.mean_and_spread(numbers, digits) == expected


