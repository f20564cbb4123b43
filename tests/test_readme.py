"""README and the page of results tell the truth: their Python blocks run, their commands exist, and their numbers are
those of the results files."""

import argparse
import dataclasses
import importlib
import re
import shlex
import shutil
import sys

import pytest

import v2_bpe_rope
from tests import ablations, bench_ten_minutes, tables, to_transformers
from tests.conftest import ROOT, VERSIONS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(1, len(BLOCKS) + 1))
def test_python_blocks_run(block, trained, tmp_path, monkeypatch, capsys):
    """Each on its own, beside tiny runs of all versions."""
    assert block.count("\n") <= 15
    for version in VERSIONS:
        shutil.copytree(trained[version], tmp_path / "runs" / version.__name__)
    shutil.copy(ROOT / "input.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    if "transformers" in block:
        pytest.importorskip("transformers")
        to_transformers.main(["runs/v3_alibi", "hf/v3"])
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", tables.PAGES, ids=["README.md", "tests/results/README.md"])
def test_tables_are_made_from_the_results_files(page):
    """Whoever measures again runs `python -m tests.tables`; whoever edits a table by hand is told here."""
    text = page.read_text(encoding="utf-8")
    assert tables.fill_in(text) == text and text.count("<!-- end -->") >= 2


def test_readme_can_be_read_in_one_sitting():
    assert README.count("\n") <= 300 and len(README.split()) <= 2900


def test_every_results_file_has_its_table_on_the_page():
    names = re.findall(r"^<!-- ([a-z0-9 ]+) -->$", PAGES, re.M)
    assert set(names) - {"end"} == set(tables.TABLES)
    files = {path.stem for path in tables.RESULTS.glob("*.json")} - {"exercises"}
    source = (ROOT / "tests/tables.py").read_text(encoding="utf-8")
    assert files == set(re.findall(r'read\("(\w+)"\)', source))


def test_ablations_have_all_their_rows():
    kept = tables.read("ablations")["tables"]
    assert {title: list(rows) for title, rows in kept.items()} == {
        title: list(rows) for title, rows in ablations.TABLES.items()}


def test_all_rows_of_the_ablations_had_the_budget_that_the_page_states():
    budgets = {(run["steps"], run["config"]["learning_rate"])
               for rows in tables.read("ablations")["tables"].values() for runs in rows.values() for run in runs}
    assert budgets == {(1000, 3e-3)} and "1,000 steps" in PAGES and "learning rate of 3e-3" in " ".join(PAGES.split())


def test_the_ten_minutes_in_readme_are_those_that_were_measured():
    results = tables.read("ten_minutes")
    assert all(f"    python {bench_ten_minutes.COMMANDS[name]}\n" in README for name in ("input", "chat"))
    assert f"    python -m tests.augment {' '.join(bench_ten_minutes.AUGMENT)}\n" in README
    words = " ".join(README.split())
    assert f"reaches {results['input']['result']['bits_per_byte']:.2f} bits per byte" in words
    fits = {kind: sum(one["fits"] for one in results["chat"]["answers"] if one["kind"] == kind)
            for kind in bench_ten_minutes.QUESTIONS}
    assert (f"Of ten questions from its training data, {fits['from the file']} got an answer that fits; of ten rewordings "
            f"of other questions, {fits['reworded']}") in words


def test_figures_are_of_the_default_settings():
    """Whoever changes a default setting has to measure again."""
    for run in tables.read("input")["runs"] + tables.read("recipes")["runs"]["v2, default settings"]:
        version = next(v for v in VERSIONS if v.__name__ == run.get("version", "v2_bpe_rope"))
        defaults = dataclasses.asdict(version.Config()) | {"seed": run["config"]["seed"]}
        assert run["config"] == defaults


SCRIPTS = {f"{version.__name__}.py": version for version in VERSIONS}
TOOLS = {"compare", "ablations", "bench_steps", "bench_generation", "bench_recipes", "bench_tokenizer",
         "bench_ten_minutes", "augment", "page", "tables", "to_transformers", "check_gpu"}


def commands():
    """Every command line in both pages, split as a shell does it: those of indented blocks and those between backticks."""
    lines = re.findall(r"^    (\S.*)$|`([^`\n]*(?:\n[^`\n]+)?)`", PAGES, re.MULTILINE)
    for line in (block or inline.replace("\n", " ") for block, inline in lines):
        words = shlex.split(line, comments=True, posix=True) if re.match(r"(python|torchrun)\b", line) else []
        if words:
            yield words


class Parsed(Exception):
    """What a tool's parser made of its command line, in place of what the tool does then."""


@pytest.fixture
def only_parsed(monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None):
        raise Parsed(*parse(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)


def test_commands_of_the_scripts_are_understood_by_their_own_parsers():
    seen = set()
    for words in commands():
        script = next((word for word in words if word in SCRIPTS), None)
        if script and "--help" not in words:
            seen.add(script)
            SCRIPTS[script].parse_arguments(words[words.index(script) + 1:])
    assert seen == set(SCRIPTS)


def test_commands_of_the_tools_are_understood_by_their_own_parsers(only_parsed, monkeypatch):
    """Flags that a tool does not know are passed on to the scripts, by two of them."""
    seen = set()
    for words in commands():
        tool = next((word.removeprefix("tests.") for word in words if word.startswith("tests.")), None)
        if not tool or tool == "tables":  # which has no flags
            continue
        seen.add(tool)
        monkeypatch.setattr(sys, "argv", words[words.index(f"tests.{tool}"):])
        with pytest.raises(Parsed) as stop:
            importlib.import_module(f"tests.{tool}").main()
        if unknown := stop.value.args[1]:
            assert tool in ("compare", "ablations")
            with pytest.raises(Parsed) as stop:
                v2_bpe_rope.parse_arguments(unknown)
            assert not stop.value.args[1]
    assert seen == TOOLS - {"tables"}
