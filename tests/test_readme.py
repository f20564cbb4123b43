"""README tells the truth: its Python blocks run, its flags exist, its diff sizes and numbers are the real ones."""

import importlib.util
import json
import re
import shlex
import shutil

import pytest

import v2_bpe_rope
from tests import ablations, compare, to_transformers
from tests.conftest import ROOT, VERSIONS
from tests.test_scripts import diff_size

README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    if "transformers" in block:
        pytest.importorskip("transformers")
        to_transformers.main(["runs/v3_alibi", "hf/v3"])
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out or list(tmp_path.glob("*.png"))


def test_diff_sizes_are_the_real_ones():
    quoted = re.findall(r"git diff --no-index (\w+\.py) (\w+\.py)`?\s*\((\d+) lines added, (\d+) removed\)", README)
    assert len(quoted) == 3
    for old, new, added, removed in quoted:
        assert diff_size(old, new) == (int(added), int(removed))


def results(name):
    return json.loads((ROOT / f"tests/data/results_{name}.json").read_text(encoding="utf-8"))


def test_results_are_those_of_the_results_files():
    """README's tables and charts are what tests.compare makes of tests/data/results_*.json."""
    theirs = results("tinyshakespeare")
    assert compare.markdown(results("input")) in README
    assert compare.table(theirs) in README
    assert compare.table(results("wikitext2")) in README
    nats = [run["val_loss"] * run["tokens_per_byte"] for run in theirs["runs"] if run["version"] == "v2_bpe_rope"]
    assert f"v2 comes to {compare.mean_and_spread(nats, 3)} on" in README


def test_ablations_are_those_of_the_results_file():
    """README has every table of tests/data/results_ablations.json, with all the rows that tests.ablations makes. The table
    "scaffold" has not been measured yet."""
    kept = results("ablations")
    assert ablations.TABLES.keys() - kept["tables"].keys() == {"scaffold"}
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


SCRIPTS = {f"{version.__name__}.py": version for version in VERSIONS}
TOOLS = {"compare", "ablations", "bench_steps", "bench_generation", "bench_recipes", "bench_tokenizer", "to_transformers", "check_gpu"}


def commands():
    """Every command line in README, split as a shell does it: those of indented blocks and those between backticks."""
    lines = re.findall(r"^    (\S.*)$|`([^`\n]*(?:\n[^`\n]+)?)`", README, re.MULTILINE)
    for line in (block or inline.replace("\n", " ") for block, inline in lines):
        words = shlex.split(line, comments=True, posix=True) if re.match(r"(python|torchrun)\b", line) else []
        if words:
            yield words


def test_commands_of_the_scripts_are_understood_by_their_own_parsers():
    seen = set()
    for words in commands():
        script = next((word for word in words if word in SCRIPTS), None)
        if script and "--help" not in words:
            seen.add(script)
            SCRIPTS[script].parse_arguments(words[words.index(script) + 1:])
        tool = next((word.removeprefix("tests.") for word in words if word.startswith("tests.")), None)
        assert tool is None or tool in TOOLS, words
        for flag in re.findall(r"--[a-z-]+", " ".join(words)) if tool else []:
            text = (ROOT / f"tests/{tool}.py").read_text(encoding="utf-8")
            assert f'"{flag}"' in text or flag in v2_flags() | {"--help"}, words
    assert seen == {"v1_transformer.py", "v2_bpe_rope.py", "v3_alibi.py"}


def v2_flags():
    """Those that tests.compare and others pass on to the scripts."""
    return set(re.findall(r'"(--[a-z-]+)"', (ROOT / "v2_bpe_rope.py").read_text(encoding="utf-8"))) | {
        "--" + name.replace("_", "-") for name in v2_bpe_rope.Config.__dataclass_fields__}
