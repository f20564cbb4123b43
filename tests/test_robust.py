"""Mistakes get one clear line and exit status 2, and nothing on disk is lost."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.conftest import ROOT, TRANSFORMERS, VERSIONS, ids, run, tiny_flags


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps_taken(folder):
    return torch.load(folder / "last.pt", weights_only=True)["run"]["log"][-1]["step"]


def refused(version, *argv, says):
    """The program ends with status 2 and one line that says so; returns that line."""
    status, out, err = run(version, *argv)
    assert status == 2, (status, err)
    err = re.sub(r"^bpe_tokenizer.py: this text has .*\n", "", err)  # a note before the error
    assert err.count("\n") == 1 and err.startswith(f"{version.__name__}.py: error: "), err
    for word in [says] if isinstance(says, str) else says:
        assert word in err, err
    return err


# -- data files --


def data_file(tmp_path, content):
    path = tmp_path / ("table.csv" if content.startswith(b"table:") else "text.txt")
    path.write_bytes(content.removeprefix(b"table:"))
    return path


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "too little text"),
        (b"a", "too little text"),
        (b"abcdefgh", "too short"),
        (b"aaaa" * 500, "two different characters"),
        (b"all is well until here \xff and on" * 50, ["not UTF-8", "position 23"]),
        (b"a text with some words in it " * 3, ["too short", "--block-size 16"]),
        (b"table:", "too little text"),
        (b'table:question,answer\n"' + b"x" * 200_000, "not a valid .csv table"),
        (b"table:question,answer\n", "too little text"),
        (b"table:what,else\na,b\n", ["row 1", "question,answer"]),
        (b"table:Question,Answer\na,b\n", ["row 1", "question,answer"]),
        (b"table:question,answer\n" + b"who,me\n" * 5 + b"why,\n" + b"who,me\n" * 9, "row 6"),
        (b"table:question,answer\n" + b"who,me\n" * 5 + b"why\n" + b"who,me\n" * 9, "row 6"),
        (b"table:question,answer\n" + b"who,me\n" * 5 + b"why,so,what\n" + b"who,me\n" * 9, ["row 6", "in quotes"]),
    ],
)
@pytest.mark.parametrize("version", [v0_bigram, v2_bpe_rope], ids=ids)
def test_data_nothing_can_be_learned_from(version, content, says, tmp_path):
    path = data_file(tmp_path, content)
    refused(
        version,
        "--data",
        path,
        "--out",
        tmp_path / "out",
        *tiny_flags(version),
        says=[str(path), *([says] if isinstance(says, str) else says)],
    )
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(tmp_path):
    refused(v0_bigram, "--data", tmp_path / "none.txt", "--out", tmp_path / "out", says=["none.txt", "No such file"])
    refused(v0_bigram, "--data", tmp_path, "--out", tmp_path / "out", says=[str(tmp_path), "directory"])


def test_windows_files_are_welcome(tmp_path, text):
    for name, content in [
        ("unix.txt", text.encode()),
        ("windows.txt", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
    ]:
        (tmp_path / name).write_bytes(content)
    assert v0_bigram.read_texts(tmp_path / "unix.txt") == v0_bigram.read_texts(tmp_path / "windows.txt")


# -- flags --


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "-5"], "--steps"),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "1.5"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--block-size", "0"], "--block-size"),
        (["--block-size", "1000000"], ["too short", "--block-size 1000000"]),
        (["--n-layer", "0"], "--n-layer"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--dropout", "1"], "--dropout"),
        (["--dropout", "-0.1"], "--dropout"),
        (["--n-embd", "30", "--n-head", "4"], ["--n-embd 30", "--n-head 4"]),
        (["--n-embd", "6", "--n-head", "2"], ["--n-embd 6", "even"]),
        (["--vocab-size", "255"], "--vocab-size 255"),
        (["--vocab-size", "1"], "--vocab-size 1"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.1"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--temperature", "-0.5"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--width", "3"], "--width"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--resume", "--sample-only"], ["--resume", "--sample-only"]),
    ],
)
def test_flags_out_of_range(flags, says, tmp_path, small):
    refused(v2_bpe_rope, "--data", small, "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, small):
    refused(v0_bigram, "--data", small, "--out", tmp_path / "out", "--device", "cuda", says="--device cuda")


# -- checkpoints --


class Malice:
    def __reduce__(self):
        return (os.mkdir, (str(Malice.path),))


@pytest.mark.parametrize("content", ["missing", "truncated", "text", "empty", "pickle", "list", "zip", "weights"])
@pytest.mark.parametrize(
    "mode, name", [("--sample-only", "best.pt"), ("--resume", "last.pt"), ("--init-from", "best.pt")]
)
def test_checkpoints_that_are_none(content, mode, name, trained, tmp_path, small):
    """Also: a pickle with code inside is not run, and torch's own warnings do not add lines."""
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    path, Malice.path = folder / name, tmp_path / "code-was-run"
    if content == "missing":
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "text":
        path.write_text("a poem\n" * 100)
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Malice()))
    elif content == "list":
        torch.save([1, 2, 3], path)
    elif content == "zip":
        torch.save({"format": 1, "version": "v3_alibi", "config": {}, "tokenizer": {}, "model": Malice()}, path)
    elif content == "weights":
        torch.save({"format": 1, "version": "v3_alibi"}, path)
    before = snapshot(folder)
    flags = (
        ["--out", folder, mode] if mode != "--init-from" else ["--out", tmp_path / "new", mode, path, "--data", small]
    )
    refused(v3_alibi, *flags, says=str(path) if content != "weights" else "v3_alibi")
    assert snapshot(folder) == before and not Malice.path.exists() and not (tmp_path / "new").exists()


def test_a_malicious_checkpoint_in_a_new_process(tmp_path):
    """As a user would meet it: one line, and the code inside has not run."""
    Malice.path = tmp_path / "code-was-run"
    (tmp_path / "best.pt").write_bytes(pickle.dumps(Malice(), protocol=2))  # as old checkpoints are: torch warns of it
    command = [sys.executable, ROOT / "v1_transformer.py", "--out", tmp_path, "--sample-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not Malice.path.exists()


@pytest.mark.parametrize("mode", ["--resume", "--sample-only"])
def test_checkpoints_of_another_version_name_it_and_what_to_do(mode, trained):
    says = ["made by v2_bpe_rope", "run v2_bpe_rope.py", "--init-from"]
    refused(v3_alibi, "--out", trained[v2_bpe_rope], mode, says=says)
    refused(v0_bigram, "--out", trained[v3_alibi], mode, says="made by v3_alibi")


@pytest.mark.parametrize("version", [v0_bigram, v1_transformer], ids=ids)
def test_weights_that_do_not_fit_leak_no_message_of_python(version, trained, tmp_path, small):
    flags = ["--data", small, "--out", tmp_path / "new", "--init-from", trained[v3_alibi] / "best.pt"]
    line = refused(version, *flags, says=f"does not fit {version.__name__}")
    assert "__init__" not in line and "state_dict" not in line


def test_a_missing_checkpoint_says_to_train_first(tmp_path):
    for mode in ("--resume", "--sample-only", "--chat"):
        refused(v3_alibi, "--out", tmp_path, mode, says=["there is no checkpoint", str(tmp_path), "train first"])


@pytest.mark.parametrize(
    "damage",
    [
        {"config": {"n_layer": "x"}},
        {"config": {"color": 1}},
        {"config": 7},
        {"tokenizer": {}},
        {"tokenizer": 3},
        {"config": {"n_head": 0}},
        {"config": {"seed": -1}},
        {"config": {"eval_interval": 0}},
        {"config": {"steps": "many"}},
        {"config": {"batch_size": None}},
        {"model": {}},
        {"model": None},
    ],
)
def test_checkpoints_with_damaged_parts(damage, trained, tmp_path):
    for version in VERSIONS:
        checkpoint = torch.load(trained[version] / "best.pt", weights_only=True)
        for key, value in damage.items():
            checkpoint[key] = {**checkpoint[key], **value} if key == "config" and isinstance(value, dict) else value
        if damage in ({"config": {"n_layer": "x"}}, {"config": {"color": 1}}, {"config": {"n_head": 0}}) and version is v0_bigram:
            continue  # v0 has no such settings, and does not read those of others
        if damage == {"config": {"color": 1}}:
            continue
        torch.save(checkpoint, tmp_path / "best.pt")
        refused(version, "--out", tmp_path, "--sample-only", says=version.__name__)
        with pytest.raises(version.UserError):
            version.load(tmp_path / "best.pt")


# -- resume keeps the run's settings --


def test_resume_refuses_other_settings_and_another_text(trained, tmp_path, text):
    folder = trained[v2_bpe_rope]
    before = snapshot(folder)
    other = tmp_path / "other.txt"
    other.write_text(text[:50_000], encoding="utf-8")
    for flags, says in [(["--n-embd", 64], "--steps"), (["--data", other], ["other.txt", "--data"]), (["--dtype", "bfloat16"], "--steps"),
                        (["--learning-rate", 0.1], "--steps"), (["--steps", 20], "--steps 20")]:  # fmt: skip
        refused(v2_bpe_rope, "--out", folder, "--resume", *flags, says=says)
    assert snapshot(folder) == before


def test_resume_of_a_finished_run_writes_the_report_again(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    result = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    status, out, err = run(v3_alibi, "--out", folder, "--resume", "--steps", 30, "--max-new-tokens", 5)
    assert status == 0 and (folder / "result.json").read_bytes() == result


def stretched(moment):
    """A tensor of the right shape that has memory for one number only."""
    return torch.zeros((1,) * moment.dim()).expand(moment.shape)


FORGED_RUNS = {
    "none": lambda run: None,
    "a list": lambda run: [1],
    "no log": lambda run: run.pop("log"),
    "an empty log": lambda run: run.update(log=[]),
    "a row without a column": lambda run: run["log"][0].pop("seconds"),
    "a string for a number": lambda run: run["log"][-1].update(val_loss="3.5"),
    "a tensor for a number": lambda run: run["log"][-1].update(val_loss=torch.ones(())),
    "a step that is no whole number": lambda run: run["log"][-1].update(step=2.5),
    "a step that is nan": lambda run: run["log"][-1].update(step=float("nan")),
    "a negative step": lambda run: run["log"][-1].update(step=-5),
    "a step beyond --steps": lambda run: run["log"][-1].update(step=10**12),
    "no data": lambda run: run.pop("data"),
    "data that is a number": lambda run: run.update(data=5),
    "no digests": lambda run: run.pop("digests"),
    "other digests": lambda run: run.update(digests=["a", "b"]),
    "no dtype": lambda run: run.pop("dtype"),
    "no init_from": lambda run: run.pop("init_from"),
    "no optimizer": lambda run: run.pop("optimizer"),
    "moments of one weight missing": lambda run: run["optimizer"].pop(0),
    "a moment missing": lambda run: run["optimizer"][0].pop("exp_avg"),
    "a moment of another shape": lambda run: run["optimizer"][0].update(exp_avg=torch.ones(7, 3)),
    "a moment that is no tensor": lambda run: run["optimizer"][0].update(exp_avg_sq="x"),
    "a step count that is a vector": lambda run: run["optimizer"][0].update(step=torch.ones(3)),
}


@pytest.mark.parametrize("kind", FORGED_RUNS)
def test_a_forged_state_of_a_run_gets_one_line(kind, trained, tmp_path):
    checkpoint = torch.load(trained[v3_alibi] / "last.pt", weights_only=True)
    changed = FORGED_RUNS[kind](checkpoint["run"])
    if kind in ("none", "a list"):
        checkpoint["run"] = changed
    torch.save(checkpoint, tmp_path / "last.pt")
    before = snapshot(tmp_path)
    refused(v3_alibi, "--out", tmp_path, "--resume", "--steps", 40, says=["5" if "number" in kind and "data" in kind else str(tmp_path)])
    assert snapshot(tmp_path) == before


def test_moments_are_copied_out_of_a_checkpoint(trained, tmp_path):
    """A forged tensor can claim a shape that it has no memory for; an optimizer that writes into it would crash Python."""
    checkpoint = torch.load(trained[v3_alibi] / "last.pt", weights_only=True)
    for moments in checkpoint["run"]["optimizer"].values():
        moments["exp_avg"], moments["exp_avg_sq"] = stretched(moments["exp_avg"]), stretched(moments["exp_avg_sq"])
    model = v3_alibi.load(trained[v3_alibi] / "last.pt")[0]
    optimizer = v3_alibi.make_optimizer(model, checkpoint["run"]["optimizer"])
    for p, moments in optimizer.state.items():
        assert moments["exp_avg"].stride() == p.stride() and moments["exp_avg_sq"].stride() == p.stride()


# -- files --


def test_a_new_run_moves_the_old_one_into_a_folder_of_its_own(trained, tmp_path, small):
    """Three runs into one folder are all kept, and so is whatever else stands in it and beside it."""
    folder = tmp_path / "v0"
    shutil.copytree(trained[v0_bigram], folder)
    theirs = {"notes.txt": "mine", "previous-1/notes.txt": "also mine", "best.pt.tmp": "a name like ours"}
    for name, content in {**theirs, "../v0.previous/best.pt": "an old model"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    flags, kept = ["--data", small, "--out", folder, "--max-new-tokens", 5, *tiny_flags(v0_bigram, steps=2)], {}
    for number in (2, 3):
        names = ("best.pt", "last.pt", "log.csv", "result.json", "sample.txt")
        kept.update({folder / f"previous-{number}" / name: (folder / name).read_bytes() for name in names})
        status, out, err = run(v0_bigram, *flags)
        assert status == 0 and f"to {folder}/previous-{number}" in " ".join(out.split()).replace("/ ", "/"), out
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert all((folder / name).read_text(encoding="utf-8") == content for name, content in theirs.items())
    assert (tmp_path / "v0.previous/best.pt").read_text(encoding="utf-8") == "an old model"


def test_out_may_be_the_working_folder_with_files_of_the_user(tmp_path, small, monkeypatch):
    (tmp_path / "log.csv").write_text("day,weight\n", encoding="utf-8")
    (tmp_path / "thesis.txt").write_text("a year of work", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = ["--data", small, "--out", ".", "--max-new-tokens", 0, *tiny_flags(v0_bigram, steps=2)]
    assert run(v0_bigram, *flags)[0] == 0
    assert (tmp_path / "previous-1/log.csv").read_text(encoding="utf-8") == "day,weight\n"
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "a year of work"
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["log.csv"]


def test_a_run_can_start_from_a_checkpoint_in_its_own_folder(trained, tmp_path, small):
    """--init-from names a file that the new run moves aside; it is read before."""
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    old = (folder / "best.pt").read_bytes()
    flags = ["--data", small, "--out", folder, "--init-from", folder / "best.pt", "--steps", 2, "--max-new-tokens", 0]
    assert run(v3_alibi, *flags)[0] == 0
    assert (folder / "previous-1/best.pt").read_bytes() == old


def test_a_folder_that_cannot_be_written(trained, tmp_path, small):
    (tmp_path / "file").write_text("not a folder")
    refused(v0_bigram, "--data", small, "--out", tmp_path / "file" / "run", "--steps", 2, says="Not a directory")
    assert (tmp_path / "file").read_text() == "not a folder"


class Killed(BaseException):
    """Ends the program on the spot, as kill -9 does."""


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Killed()], ids=["full disk", "kill"])
def test_a_write_that_fails_leaves_whole_files(failure, trained, tmp_path, monkeypatch):
    """The first write of a resumed run fails in its midst; in the next attempt the second one does, and so on to the end.
    Each time all files are whole, and the run can go on."""
    folder, flags = tmp_path / "run", ["--resume", "--steps", 50, "--max-new-tokens", 5]
    write_bytes, attempts = type(folder).write_bytes, 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained[v0_bigram], folder)
        writes = 0

        def failing(path, content):
            nonlocal writes
            writes += 1
            if writes > attempts:
                write_bytes(path, bytes(content)[:100])
                raise failure
            return write_bytes(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "write_bytes", failing)
            if isinstance(failure, OSError):
                status, out, err = run(v0_bigram, "--out", folder, *flags)
                assert status == 0 or (status == 2 and "No space left" in err and err.count("\n") == 1)
            else:
                try:
                    status = run(v0_bigram, "--out", folder, *flags)[0]
                except Killed:
                    status = None
        for checkpoint in ("best.pt", "last.pt"):
            v0_bigram.load(folder / checkpoint)
        json.loads((folder / "result.json").read_bytes())
        rows = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
        assert len({row.count(",") for row in rows}) == 1
        assert isinstance(failure, Killed) or not list(folder.glob("*.tmp"))
        if status == 0:
            break
        assert run(v0_bigram, "--out", folder, *flags)[0] == 0
        attempts += 1
    assert attempts >= 7  # two evaluations, each of best.pt, log.csv and last.pt, then result.json and sample.txt


# -- numbers that run away --


@pytest.mark.parametrize("version", [v1_transformer, v3_alibi], ids=ids)
def test_divergence_is_noticed_and_the_last_good_checkpoint_stays(version, tmp_path, small, monkeypatch):
    """At step 25 a weight becomes infinite; at step 30, where a checkpoint is due, the run ends."""
    original, model = version.get_batch, []

    def poison(tokens, config, step):
        if step == 25:
            model[0].norm.weight.data[3] = float("inf")
        return original(tokens, config, step)

    class Spy(version.LanguageModel):
        def __init__(self, *args):
            super().__init__(*args)
            model.append(self)

    monkeypatch.setattr(version, "get_batch", poison)
    monkeypatch.setattr(version, "LanguageModel", Spy)
    flags = ["--data", small, "--out", tmp_path / "run", "--dtype", "float32", *tiny_flags(version, steps=50, eval_interval=10)]
    status, out, err = run(version, *flags)
    assert status == 1 and err.count("\n") == 1 and "not finite at step 30" in err and "--learning-rate" in err
    assert steps_taken(tmp_path / "run") == 20
    assert all(w.isfinite().all() for w in torch.load(tmp_path / "run/last.pt", weights_only=True)["model"].values())


def test_a_bug_shows_its_traceback(tmp_path, small, monkeypatch):
    monkeypatch.setattr(v0_bigram, "learning_rate", lambda step, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        v0_bigram.main(["--data", str(small), "--out", str(tmp_path / "run")])


# -- prompts --


def test_prompts_empty_long_and_unknown(trained):
    for version in VERSIONS:
        flags = ["--out", trained[version], "--sample-only", "--max-new-tokens", 5]
        status, out, err = run(version, *flags, "--prompt", "")
        assert status == 0 and "note" not in out
        status, out, err = run(version, *flags, "--prompt", "A long prompt. " * 20)
        assert status == 0 and "only the last 16" in out and out.count("A long prompt. ") == 20
        status, out, err = run(version, *flags, "--prompt", "é☃")
        assert status == 0 and ("does not know 2 characters" in out) == (version in (v0_bigram, v1_transformer))
        assert "does not know 1 character of" in run(version, *flags, "--prompt", "é")[1] or version in (v2_bpe_rope, v3_alibi)


def test_unknown_characters_of_the_validation_text_are_said(tmp_path, text):
    (tmp_path / "text.txt").write_text(text[:2700] + "#" * 10 + text[:290])
    for version in (v0_bigram, v2_bpe_rope):
        status, out, err = run(
            version,
            "--data",
            tmp_path / "text.txt",
            "--out",
            tmp_path / version.__name__,
            "--max-new-tokens",
            0,
            *tiny_flags(version, steps=2),
        )
        assert status == 0 and ("note: 10 characters" in out) == (version is v0_bigram)
