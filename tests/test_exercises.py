"""The page of exercises: its changes do what they say, its programs and commands run, its figures were measured."""

import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest
import torch

import v3_alibi
from tests import exercises
from tests.conftest import ROOT, VERSIONS, run, tiny_flags, tiny_model

PAGE = exercises.PAGE.read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "tests/results/exercises.json").read_text(encoding="utf-8"))
TEXTS = exercises.exercises(PAGE)
DIFFS = {exercises.apply_diff(diff)[0]: diff for diff in exercises.blocks("diff", PAGE)}
PROGRAMS = [(n, i) for n, text in TEXTS.items() for i in range(len(exercises.blocks("python", text)))]
SCRIPTS = {version.__name__: version for version in VERSIONS}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The changed scripts of the page, imported: {name: (module, the unchanged one)}."""
    folder, modules = tmp_path_factory.mktemp("changed"), {}
    for diff in DIFFS.values():
        name, script, text = exercises.apply_diff(diff)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where inspect looks for it
        spec.loader.exec_module(sys.modules[name])
        modules[name] = sys.modules[name], SCRIPTS[script]
    yield modules
    for name in modules:
        del sys.modules[name]


# -- changes --


def test_there_are_ten_exercises_from_five_minutes_to_an_afternoon():
    titles = [text.splitlines()[0] for text in TEXTS.values()][1:]
    times = [re.fullmatch(r"(\d+)\. .* \((?:(\d+) minutes|an afternoon)\)", title).groups() for title in titles]
    assert [int(number) for number, _ in times] == list(range(1, 11)) and times[0][1] == "5" and times[-1][1] is None
    minutes = [int(time) for _, time in times[:-1]]
    assert minutes == sorted(minutes)
    for text in list(TEXTS.values())[1:]:
        assert "**Predict:**" in text and text.count("<details>") == text.count("</details>") == 1


@pytest.mark.parametrize("name", DIFFS)
def test_a_changed_script_trains_and_comes_to_another_loss(name, changed, tmp_path, small):
    losses = []
    for i, module in enumerate(changed[name]):
        flags = ["--data", small, "--out", tmp_path / str(i), "--dtype", "float32", "--max-new-tokens", 0]
        status, _, err = run(module, *flags, *tiny_flags(module, steps=3, eval_interval=3))
        assert status == 0, err
        losses.append(json.loads((tmp_path / str(i) / "result.json").read_text())["val_loss"])
    assert losses[0] != losses[1]


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0][0]


def test_without_positions_order_is_lost_in_one_layer_and_length_is_free(changed):
    ours, theirs = (tiny_model(module, n_layer=1) for module in changed["no_positions"])
    torch.testing.assert_close(logits(ours, [1, 2, 3])[-1], logits(ours, [2, 1, 3])[-1])
    assert (logits(theirs, [1, 2, 3])[-1] - logits(theirs, [2, 1, 3])[-1]).abs().max() > 1e-3
    assert logits(ours, [1] * 40).shape[0] == 40
    with pytest.raises(ValueError):
        logits(theirs, [1] * 40)
    two = tiny_model(changed["no_positions"][0], n_layer=2)  # as the explanation says
    assert (logits(two, [1, 2, 3])[-1] - logits(two, [2, 1, 3])[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("base", (100, 1000000))
def test_the_base_of_rope(base, changed):
    model = tiny_model(changed[f"rope_{base}"][0])
    torch.testing.assert_close(model.frequencies, torch.tensor([base ** (-i / 8) for i in range(8)]))


def test_doubled_slopes(changed):
    ours, theirs = (tiny_model(module) for module in changed["slopes_doubled"])
    torch.testing.assert_close(ours.slopes, 2 * theirs.slopes)
    assert (logits(ours, [1, 2, 3]) - logits(theirs, [1, 2, 3])).abs().max() > 1e-3


def test_llama_is_swiglu_rmsnorm_and_an_output_layer(changed):
    model = tiny_model(changed["llama"][0])
    feed_forward, x = model.blocks[0].feed_forward, torch.randn(1, 3, 32)
    first, second = feed_forward.up.weight.chunk(2)
    assert first.shape == (85, 32)  # 8 / 3 of 32
    expected = torch.nn.functional.silu(x @ first.T) * (x @ second.T) @ feed_forward.projection.weight.T
    torch.testing.assert_close(feed_forward(x), expected)
    norms = [module for name, module in model.named_modules() if "norm" in name]
    assert len(norms) == 5 and all(isinstance(norm, torch.nn.RMSNorm) for norm in norms)
    before = logits(model, [1, 2])
    model.output_embedding.weight.data *= 2
    torch.testing.assert_close(logits(model, [1, 2]), 2 * before)


def test_a_change_needs_its_old_lines_once():
    head = "--- v1_transformer.py\n+++ mine.py\n"
    name, script, text = exercises.apply_diff(head + "-        x = self.norm(x)\n+        x = 2 * self.norm(x)\n")
    assert (name, script) == ("mine", "v1_transformer") and "\n        x = 2 * self.norm(x)\n" in text
    never, twice = "-        x = self.norm(y)\n+\n", "-    def forward(self, x):\n+\n"
    for bad in (never, twice, "-x = self.norm(x)\n+\n", "         x = self.norm(x)\n", "-import os\n"):
        with pytest.raises(ValueError):
            exercises.apply_diff(head + bad)


# -- programs and commands --


@pytest.mark.parametrize("number, i", PROGRAMS)
def test_programs_run(number, i, trained, small, tmp_path, monkeypatch, capsys):
    """Each on its own, beside tiny runs, on the beginning of input.txt; it prints the words that were recorded."""
    source = exercises.blocks("python", TEXTS[number])[i]
    assert source.count("\n") <= 15
    for version in VERSIONS:
        shutil.copytree(trained[version], tmp_path / "runs" / version.__name__)
    shutil.copy(small, tmp_path / "input.txt")
    monkeypatch.chdir(tmp_path)
    generate = v3_alibi.generate
    monkeypatch.setattr(v3_alibi, "generate", lambda m, ids, n, *args, **kwargs: generate(m, ids, 50, *args, **kwargs))
    exec(compile(source, f"exercise {number}", "exec"), {"__name__": "__main__"})
    theirs = RESULTS["exercises"][str(number)]["programs"][i]["output"].splitlines()
    ours = capsys.readouterr().out.splitlines()
    assert re.findall("[a-z]+", ours[0]) == re.findall("[a-z]+", theirs[0])
    assert len(ours) == len(theirs) - 2 * (number == 4)  # tiny models have two layers less


def commands(text):
    """Those in ```sh blocks and those between backticks that run a script."""
    return "".join(exercises.blocks("sh", text)).splitlines() + re.findall(r"`(python \w+\.py .*?)`", text)


def test_commands_are_understood_by_the_scripts_and_make_models_of_the_recorded_size(changed):
    modules = SCRIPTS | {name: module for name, (module, _) in changed.items()}
    seen = set()
    for number, text in TEXTS.items():
        for python, script, *flags in map(shlex.split, commands(text)):
            module = modules[script.removesuffix(".py")]
            args, settings = module.parse_arguments(flags)
            seen.add(script.removesuffix(".py"))
            assert python == "python"
            if not args.sample_only:
                assert settings["steps"] == 1000 and settings["seed"] == 1
                kept = RESULTS["exercises"][str(number)]["runs"].get(args.out.removeprefix("runs/"))
                model = module.LanguageModel(module.Config(**settings), getattr(module.Config, "vocab_size", 61))
                assert not kept or kept["parameters"] == sum(p.numel() for p in model.parameters())
    assert seen == modules.keys()


# -- figures --


def test_what_was_measured_is_what_the_page_says_to_do():
    """Whoever edits a change, a command or a program has to measure that exercise again."""
    assert RESULTS["machine"] in PAGE and RESULTS["exercises"].keys() == {str(number) for number in TEXTS}
    for number, text in TEXTS.items():
        kept = RESULTS["exercises"][str(number)]
        assert kept["diffs"] == exercises.blocks("diff", text)
        assert [program["source"] for program in kept["programs"]] == exercises.blocks("python", text)
        lines = [line for line in "".join(exercises.blocks("sh", text)).splitlines() if "--sample-only" not in line]
        assert [made["command"] for made in kept["runs"].values()] == lines


def test_tables_and_outputs_are_those_of_the_results_file():
    assert exercises.fill(PAGE, RESULTS) == PAGE
    spoiled = json.loads(json.dumps(RESULTS))
    spoiled["exercises"]["5"]["runs"]["no_positions"]["bits"]["4"] += 0.01
    assert exercises.fill(PAGE, spoiled) != PAGE


@pytest.mark.parametrize("number", list(TEXTS)[1:])
def test_figures_in_the_explanations_were_measured(number):
    """Every decimal number, as far as it is written out, is one of the tables and outputs."""
    details = TEXTS[number].split("<details>")[1]
    measured, explanation = details.split("<!-- end -->")
    known = [float(x) for x in re.findall(r"\d+\.\d+", measured + exercises.measured("0", RESULTS))]
    quoted = re.findall(r"\d+\.\d+", explanation)
    for figure in quoted:
        digits = len(figure.split(".")[1])
        assert any(abs(x - float(figure)) <= 0.5001 * 10**-digits for x in known), figure
    assert quoted and len(explanation.split()) > 25
