"""README tells the truth: its Python blocks run, its flags exist, its diff sizes and numbers are the real ones."""

import importlib.util
import json
import re
import shutil

import pytest

import v0_bigram
import v2_bpe_rope
from tests import ablations, compare
from tests.conftest import ROOT, VERSIONS
from tests.test_scripts import diff_size

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(1, len(BLOCKS) + 1))
def test_python_blocks_run(block, trained, tmp_path, monkeypatch, capsys):
    """Each on its own, beside tiny runs of all versions."""
    if "matplotlib" in block:
        if importlib.util.find_spec("matplotlib") is None:
            pytest.skip("needs matplotlib")
        monkeypatch.setenv("MPLBACKEND", "Agg")
    assert block.count("\n") <= 15
    for version in VERSIONS:
        shutil.copytree(trained[version], tmp_path / "runs" / version.__name__)
    shutil.copy(ROOT / "input.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out or list(tmp_path.glob("*.png"))


def test_diff_sizes_are_the_real_ones():
    quoted = re.findall(r"git diff --no-index (\w+\.py) (\w+\.py)`?\s*\((\d+) lines added, (\d+) removed\)", README)
    assert len(quoted) == 3
    for old, new, added, removed in quoted:
        assert diff_size(old, new) == (int(added), int(removed))


def results(name):
    return json.loads((ROOT / f"tests/data/results_{name}.json").read_text())


def test_results_are_those_of_the_results_files():
    """README's tables and charts are what tests.compare makes of tests/data/results_*.json."""
    theirs = results("tinyshakespeare")
    assert compare.markdown(results("input")) in README
    assert compare.table(theirs) in README
    assert compare.table(results("wikitext2")) in README
    nats = [run["val_loss"] * run["tokens_per_byte"] for run in theirs["runs"] if run["version"] == "v2_bpe_rope"]
    assert f"v2 comes to {compare.mean_and_spread(nats, 3)} on" in README


def test_ablations_are_those_of_the_results_file():
    """README has every table that tests.ablations makes, of tests/data/results_ablations.json, with all its rows."""
    kept = results("ablations")
    assert ablations.TABLES.keys() - kept["tables"].keys() == {"scaffold"}  # not measured yet
    assert all(list(rows) == list(ablations.TABLES[title]) for title, rows in kept["tables"].items())
    assert ablations.budget(kept) in README
    for title, rows in kept["tables"].items():
        assert ablations.table(title, rows) in README and {len(runs) for runs in rows.values()} == {3}


def test_figures_are_of_the_default_settings():
    """Whoever changes a default setting that these figures rest on has to measure them again."""
    for name in ("input", "tinyshakespeare", "wikitext2"):
        for run in results(name)["runs"]:
            version = next(v for v in VERSIONS if v.__name__ == run["version"])
            model = version.LanguageModel(version.Config(), run["vocab_size"])
            assert run["steps"] == version.Config.steps
            assert run["parameters"] == sum(p.numel() for p in model.parameters())


def test_flags_in_commands_exist():
    known = set(re.findall(r"--[a-z-]+", open(ROOT / "v2_bpe_rope.py").read()))
    known |= {"--" + name.replace("_", "-") for name in v2_bpe_rope.Config.__dataclass_fields__}
    known |= set(re.findall(r"--[a-z-]+", open(ROOT / "bpe_tokenizer.py").read() + open(ROOT / "tests/compare.py").read()))
    known |= {"--tables", "--rounds"}
    for line in re.findall(r"^    .*(?:v\d_\w+|bpe_tokenizer|tests\.\w+).*$", README, re.MULTILINE):
        command = line.split("#")[0]
        own = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--no-index"}
        assert set(re.findall(r"--[a-z_-]+", command)) <= known | own, line
