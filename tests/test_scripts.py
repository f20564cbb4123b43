"""The scripts as a user runs them, as programs of their own, and what README says of them."""

import ast
import json
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, TRANSFORMERS, VERSIONS, ids, run, tiny_flags

MARKER = "# ---- the same in every version from here on ----\n"
FILES = [ROOT / f"{version.__name__}.py" for version in VERSIONS]


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_percent_sign_in_a_comment_of_config_is_only_a_sign(version, monkeypatch):
    """argparse takes it for a format."""
    getsource = version.inspect.getsource
    text = lambda cls: getsource(cls).replace("training steps", "100% of the training steps")  # noqa: E731
    monkeypatch.setattr(version.inspect, "getsource", text)
    status, out, err = run(version, "--help")
    assert status == 0 and "100% of the training steps (default 4000)" in " ".join(out.split())


def test_weights_move_between_v2_and_v3_only(trained, tmp_path, small):
    """--init-from: v3 goes on from v2's weights; the weights of the others do not fit, and a sentence says so."""
    by_name = {version.__name__: (version, trained[version] / "best.pt") for version in VERSIONS}
    for name, (version, _) in by_name.items():
        for other, (_, checkpoint) in by_name.items():
            status, out, err = run(version, "--data", small, "--init-from", checkpoint, "--out", tmp_path / name / other, "--steps", 1, "--max-new-tokens", 0)
            fits = name == other or {name, other} == {"v2_bpe_rope", "v3_alibi"}
            assert status == (0 if fits else 2), (name, other, err)
            if not fits:
                assert err.count("\n") == 1 and f"does not fit {name} and these settings" in err
                assert not (tmp_path / name / other).exists()


def test_a_finetuned_run_starts_where_the_other_ended(trained, tmp_path, small):
    v3 = VERSIONS[3]
    status, out, _ = run(v3, "--data", small, "--init-from", trained[v3] / "best.pt", "--out", tmp_path / "fine", "--steps", 1, "--learning-rate", 0, "--dtype", "float32", "--max-new-tokens", 0)
    before, after = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (trained[v3], tmp_path / "fine"))
    assert status == 0 and after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)


def test_the_vocabulary_comes_with_the_tokenizer(trained, tmp_path, small):
    v3 = VERSIONS[3]
    flags = ["--data", small, "--init-from", trained[v3] / "best.pt", "--out", tmp_path / "fine", "--steps", 1]
    status, out, err = run(v3, *flags, "--vocab-size", 500)
    assert status == 2 and err.count("\n") == 1 and "these settings" in err
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
    assert set(checkpoint) == {"version", "config", "tokenizer", "model", "run"} and checkpoint["run"] is None


# -- the texts of the files --


def test_the_shared_halves_are_the_same_text():
    halves = [path.read_text(encoding="utf-8").split(MARKER) for path in FILES]
    assert all(len(parts) == 2 for parts in halves)
    assert len({lower for _, lower in halves}) == 1


def test_no_script_imports_another():
    for path in FILES:
        imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not {other.stem for other in FILES} & set(imported)
        assert set(imported) <= {"numpy", "torch", "tqdm", "bpe_tokenizer"} | set(sys.stdlib_module_names)


def diff_size(old, new):
    """(added, removed) lines, as git counts them."""
    out = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", old, new], capture_output=True, text=True, cwd=ROOT
    ).stdout
    return tuple(map(int, out.split()[:2]))


def test_diffs_and_lines_stay_short():
    assert all(len(line) <= 120 for path in FILES for line in path.read_text(encoding="utf-8").splitlines())
    assert sum(diff_size(FILES[1].name, FILES[2].name)) <= 125
    assert sum(diff_size(FILES[2].name, FILES[3].name)) <= 60
    for path, limit in zip(FILES, (565, 700, 700, 650)):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= limit and (MARKER + text.split(MARKER)[1]).count("\n") <= 450
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60
