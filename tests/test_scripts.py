"""The scripts as a user runs them, as programs of their own, and what README says of them."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, TRANSFORMERS, VERSIONS, ids, run, tiny_flags

MARKER = "# ---- the same in every version from here on ----\n"
FILES = [ROOT / f"{version.__name__}.py" for version in VERSIONS]


def program(script, *argv, folder=None, stdin=""):
    """Run a script in a new process: (exit status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=folder,
        input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_script_runs_from_start_to_sample(version, tmp_path, small):
    """Trains with a tiny budget, goes on with --resume, samples with --sample-only and --prompt: each a new process."""
    script, name = ROOT / f"{version.__name__}.py", version.__name__
    flags = tiny_flags(version, steps=20, eval_interval=10)
    status, out, err = program(script, "--data", small, "--max-new-tokens", 30, *flags, folder=tmp_path)
    assert (status, err) == (0, "")  # without a terminal there is no progress bar
    out_folder = tmp_path / "runs" / name  # the default
    assert sorted(p.name for p in out_folder.iterdir()) == [
        "best.pt",
        "last.pt",
        "log.csv",
        "result.json",
        "sample.txt",
    ]
    assert out.startswith(name) and "parameters: " in out and "budget: 20 steps" in out
    assert re.search(r"step 20: train loss \d\.\d+, val loss \d\.\d+, perplexity [\d.]+, bits per byte \d\.\d+", out)
    assert re.search(rf"^{name} .*\d$", out, re.MULTILINE)  # its line in the table
    assert out.endswith((out_folder / "sample.txt").read_text() + "\n")

    status, out, err = program(script, "--resume", "--steps", 30, "--max-new-tokens", 5, folder=tmp_path)
    assert (status, err) == (0, "") and "step 30:" in out and "step 20:" not in out
    assert json.loads((out_folder / "result.json").read_text())["steps"] == 30

    flags = ["--sample-only", "--prompt", "Thrale:", "--max-new-tokens", 20, "--temperature", 0.5, "--seed", 3]
    flags += ["--top-k", 5, "--top-p", 0.9]
    status, out, err = program(script, *flags, folder=tmp_path)
    assert (status, err) == (0, "") and out.startswith("Thrale:")
    assert (out_folder / "sample.txt").read_text() == out[:-1]


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_help_explains_every_flag(version):
    status, out, err = run(version, "--help")
    assert status == 0
    for field in version.Config.__dataclass_fields__.values():
        line = re.search(rf"--{field.name.replace('_', '-')} \w+\s+(.+(\n {{10,}}.+)*)", out)
        assert line and f"(default {field.default})" in " ".join(line[1].split()), field.name
    for flag in (
        "data out device dtype compile resume init-from sample-only prompt max-new-tokens temperature top-k "
        "top-p chat"
    ).split():
        assert f"--{flag}" in out


def test_weights_move_between_v2_and_v3_only(trained, tmp_path, small):
    """--init-from: v3 goes on from v2's weights; the weights of the others do not fit, and a sentence says so."""
    by_name = {version.__name__: (version, trained[version] / "best.pt") for version in VERSIONS}
    for name, (version, _) in by_name.items():
        for other, (_, checkpoint) in by_name.items():
            status, out, err = run(
                version,
                "--data",
                small,
                "--init-from",
                checkpoint,
                "--out",
                tmp_path / name / other,
                "--steps",
                1,
                "--max-new-tokens",
                0,
            )
            fits = name == other or {name, other} == {"v2_bpe_rope", "v3_alibi"}
            assert status == (0 if fits else 2), (name, other, err)
            if not fits:
                assert err.count("\n") == 1 and f"a checkpoint of {other}, does not fit {name}: " in err
                assert not (tmp_path / name / other).exists()


def test_a_finetuned_run_starts_where_the_other_ended(trained, tmp_path, small):
    v3 = VERSIONS[3]
    status, out, _ = run(
        v3,
        "--data",
        small,
        "--init-from",
        trained[v3] / "best.pt",
        "--out",
        tmp_path / "fine",
        "--steps",
        1,
        "--learning-rate",
        0,
        "--dtype",
        "float32",
        "--max-new-tokens",
        0,
    )
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (trained[v3], tmp_path / "fine"))
    assert status == 0 and after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)


def test_the_vocabulary_comes_with_the_tokenizer(trained, tmp_path, small):
    v3 = VERSIONS[3]
    flags = ["--data", small, "--init-from", trained[v3] / "best.pt", "--out", tmp_path / "fine", "--steps", 1]
    status, out, err = run(v3, *flags, "--vocab-size", 500)
    assert status == 2 and err.count("\n") == 1 and "its tokenizer has 300 tokens" in err
    assert run(v3, *flags, "--vocab-size", 300, "--max-new-tokens", 0)[0] == 0


def test_load_and_generate_from_python(trained):
    from v3_alibi import generate, load

    model, tokenizer, config = load(trained[VERSIONS[3]] / "best.pt")
    assert not model.training and config.block_size == 16
    new = list(generate(model, tokenizer.encode("Thrale:"), max_new_tokens=10, seed=1))
    assert len(new) == 10 and isinstance(tokenizer.decode(new), str)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_checkpoint_is_plain_data(version, trained):
    checkpoint = torch.load(trained[version] / "best.pt", weights_only=True)
    assert checkpoint["version"] == version.__name__ and checkpoint["config"]["n_layer"] == 2
    assert set(checkpoint) == {"format", "version", "config", "tokenizer", "model"}


# -- the texts of the files --


def test_the_shared_halves_are_the_same_text():
    halves = [path.read_text().split(MARKER) for path in FILES]
    assert all(len(parts) == 2 for parts in halves)
    assert len({lower for _, lower in halves}) == 1


def test_no_script_imports_another():
    for path in FILES:
        imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        assert not {other.stem for other in FILES} & set(imported)
        assert set(imported) <= {"numpy", "torch", "tqdm", "bpe_tokenizer"} | set(sys.stdlib_module_names)


def diff_size(old, new):
    """(added, removed) lines, as git counts them."""
    out = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", old, new], capture_output=True, text=True, cwd=ROOT
    ).stdout
    return tuple(map(int, out.split()[:2]))


def test_diffs_and_lines_stay_short():
    assert all(len(line) <= 120 for path in FILES for line in path.read_text().splitlines())
    assert sum(diff_size(FILES[1].name, FILES[2].name)) <= 95
    assert sum(diff_size(FILES[2].name, FILES[3].name)) <= 60
