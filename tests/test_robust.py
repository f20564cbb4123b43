"""Mistakes get one clear line and exit status 2, and nothing on disk is lost."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

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
    return torch.load(folder / "last.pt", weights_only=True)["run"]["step"]


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
        (b"aaaa" * 500, "not two different characters"),
        (b"all is well until here \xff and on" * 50, ["not UTF-8", "position 23"]),
        (b"a text with some words in it " * 3, ["too short", "--block-size 16"]),
        (b"table:", "too little text"),
        (b'table:question,answer\n"' + b"x" * 200_000, "not a valid .csv table"),
        (b"table:what,else\na,b\n", ["row 1", "question,answer"]),
        (b"table:question,answer\n" + b"who,me\n" * 5 + b"why,\n" + b"who,me\n" * 9, ["row 6", "missing"]),
        (b"table:question,answer\n" + b"who,me\n" * 5 + b"why\n" + b"who,me\n" * 9, ["row 6", "missing"]),
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
def test_checkpoints_of_another_version_or_format(mode, trained, tmp_path):
    refused(v3_alibi, "--out", trained[v2_bpe_rope], mode, says=["v2_bpe_rope", "this is v3_alibi"])
    shutil.copytree(trained[v3_alibi], tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        checkpoint = torch.load(tmp_path / "run" / name, weights_only=True)
        torch.save({**checkpoint, "format": 99}, tmp_path / "run" / name)
    refused(v3_alibi, "--out", tmp_path / "run", mode, says="format 99")


@pytest.mark.parametrize(
    "damage",
    [
        {"config": {"n_layer": "x"}},
        {"config": {"color": 1}},
        {"config": 7},
        {"tokenizer": {}},
        {"tokenizer": 3},
        {"config": {"n_head": 0}},
        {"model": {}},
        {"model": None},
    ],
)
def test_checkpoints_with_damaged_parts(damage, trained, tmp_path):
    for version in VERSIONS:
        checkpoint = torch.load(trained[version] / "best.pt", weights_only=True)
        for key, value in damage.items():
            checkpoint[key] = {**checkpoint[key], **value} if key == "config" and isinstance(value, dict) else value
        torch.save(checkpoint, tmp_path / "best.pt")
        refused(version, "--out", tmp_path, "--sample-only", says=version.__name__)
        with pytest.raises(version.UserError):
            version.load(tmp_path / "best.pt")


# -- resume keeps the run's settings --


def test_resume_refuses_other_settings_and_another_text(trained, tmp_path, text):
    folder = trained[v2_bpe_rope]
    before = snapshot(folder)
    other = tmp_path / "other.txt"
    other.write_text(text[:50_000])
    for flags, says in [
        (["--n-embd", 64], "--n-embd"),
        (["--data", other], "--data"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--learning-rate", 0.1], "--learning-rate"),
        (["--steps", 20], "--steps 20"),
    ]:
        refused(v2_bpe_rope, "--out", folder, "--resume", *flags, says=[says, str(folder)])
    assert snapshot(folder) == before


def test_resume_of_a_finished_run_writes_the_report_again(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    result = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    status, out, err = run(v3_alibi, "--out", folder, "--resume", "--n-embd", 32, "--steps", 30, "--max-new-tokens", 5)
    assert status == 0 and (folder / "result.json").read_bytes() == result


# -- files --


def test_a_fresh_run_moves_the_old_one_aside(trained, tmp_path, small):
    folder = tmp_path / "v0"
    shutil.copytree(trained[v0_bigram], folder)
    flags = ["--data", small, "--out", folder, "--max-new-tokens", 0, *tiny_flags(v0_bigram, steps=2)]
    for round in (1, 2):
        old = (folder / "last.pt").read_bytes()
        status, out, err = run(v0_bigram, *flags)
        assert status == 0 and "v0.previous" in out.split("step 2:")[0]
        assert (tmp_path / "v0.previous/last.pt").read_bytes() == old
        assert "v0.previous" not in out.split("step 2:")[1]  # not in the table


def test_a_folder_that_cannot_be_written(trained, tmp_path, small):
    (tmp_path / "file").write_text("not a folder")
    refused(v0_bigram, "--data", small, "--out", tmp_path / "file" / "run", "--steps", 2, says="Not a directory")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "log.csv"])
def test_a_full_disk_keeps_what_was_there(name, trained, tmp_path, monkeypatch):
    """The write of one file fails in its midst; the run as it was stands and can be resumed."""
    folder = tmp_path / "run"
    shutil.copytree(trained[v0_bigram], folder)
    before = snapshot(folder)
    write_bytes = type(folder).write_bytes

    def full(path, content):
        if path.name.startswith(name):
            write_bytes(path, bytes(content)[:100])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "write_bytes", full)
        refused(v0_bigram, "--out", folder, "--resume", "--steps", 40, says="No space left on device")
    assert snapshot(folder)[(folder / name).relative_to(folder)] == before[(folder / name).relative_to(folder)]
    assert not list(folder.glob("*.tmp"))
    for checkpoint in ("best.pt", "last.pt"):
        v0_bigram.load(folder / checkpoint)
    assert run(v0_bigram, "--out", folder, "--resume", "--steps", 40, "--max-new-tokens", 0)[0] == 0


def start(version, *argv):
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{version.__name__}.py"), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path, small):
    """kill -9 at random moments of a run that saves every other step: each time all files can be read, and the run goes on."""
    folder, chance = tmp_path / "run", random.Random(1)
    flags = tiny_flags(v0_bigram, steps=1_000_000, eval_interval=2)
    process = start(v0_bigram, "--data", small, "--out", folder, *flags)
    steps = []
    for attempt in range(4):
        deadline = time.time() + 60
        while (
            not (folder / "last.pt").exists()
            or len(steps)
            and steps[-1] == steps_taken(folder)
        ):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(chance.random() / 2)
        process.kill()
        process.communicate()
        steps.append(steps_taken(folder))
        v0_bigram.load(folder / "best.pt")
        rows = (folder / "log.csv").read_text().splitlines()
        assert len({row.count(",") for row in rows}) == 1 and (folder / "log.csv").read_text().endswith("\n")
        if attempt < 3:
            process = start(v0_bigram, "--out", folder, "--resume")
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_run_politely(number, status, tmp_path, small):
    folder = tmp_path / "a run"
    process = start(
        v1_transformer, "--data", small, "--out", folder, *tiny_flags(v1_transformer, steps=100_000, eval_interval=20)
    )
    while "step 20:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status and err == ""
    assert f"--out '{folder}' --resume" in out
    assert steps_taken(folder) >= 20


def test_a_second_ctrl_c_ends_at_once(tmp_path, small):
    """With steps of several seconds the first one waits for the end of a step."""
    flags = tiny_flags(v1_transformer, n_embd=1024, n_layer=12, n_head=4, block_size=256, batch_size=64)
    process = start(v1_transformer, "--data", small, "--out", tmp_path / "run", *flags)
    while "budget:" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=3) == -signal.SIGINT
    process.communicate()


# -- numbers that run away --


@pytest.mark.parametrize("version", [v1_transformer, v3_alibi], ids=ids)
def test_divergence_is_noticed_and_the_last_good_checkpoint_stays(version, tmp_path, small, monkeypatch):
    """At step 25 a weight becomes infinite; by step 30, where a checkpoint is due, the run has ended."""
    original = version.get_batch

    def poison(tokens, config, step):
        if step == 25:
            poison.model.norm.weight.data[3] = float("inf")
        return original(tokens, config, step)

    class Spy(version.LanguageModel):
        def __init__(self, *args):
            super().__init__(*args)
            poison.model = self

    monkeypatch.setattr(version, "get_batch", poison)
    monkeypatch.setattr(version, "LanguageModel", Spy)
    status, out, err = run(
        version,
        "--data",
        small,
        "--out",
        tmp_path / "run",
        "--dtype",
        "float32",
        *tiny_flags(version, steps=50, eval_interval=10),
    )
    assert status == 1 and err.count("\n") == 1 and "not finite at step 30" in err and "learning rate" in err
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert checkpoint["run"]["step"] == 20 and all(w.isfinite().all() for w in checkpoint["model"].values())
    assert "step 20:" in out and "step 30:" not in out


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
        assert status == 0 and "reads the last 16" in out and out.count("A long prompt. ") == 20
        status, out, err = run(version, *flags, "--prompt", "é☃")
        assert status == 0 and ("2 characters of the prompt are unknown" in out) == (
            version in (v0_bigram, v1_transformer)
        )


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


# -- the same numbers again, and several processes --


def test_another_process_gets_the_same_numbers(tmp_path, small):
    flags = [
        "--data",
        small,
        "--dtype",
        "float32",
        "--max-new-tokens",
        20,
        *tiny_flags(v3_alibi, steps=20, dropout=0.1),
    ]
    assert run(v3_alibi, *flags, "--out", tmp_path / "here")[0] == 0
    process = start(v3_alibi, *flags, "--out", tmp_path / "there")
    process.communicate(timeout=60)
    here, there = (torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert (tmp_path / "here/sample.txt").read_bytes() == (tmp_path / "there/sample.txt").read_bytes()


PROBE = """
import os, sys, torch
sys.path.insert(0, {root!r})
import v2_bpe_rope as version
sys.argv[0] = version.__file__
models = []
class Spy(version.LanguageModel):
    def __init__(self, *args):
        super().__init__(*args)
        models.append(self)
version.LanguageModel = Spy
status = version.main()
torch.save(models[0].state_dict(), os.path.join({folder!r}, os.environ["RANK"] + ".weights"))
sys.exit(status)
"""


def torchrun(tmp_path, *argv):
    """v2 in two processes, each of which leaves its weights in tmp_path at the end."""
    (tmp_path / "probe.py").write_text(PROBE.format(root=str(ROOT), folder=str(tmp_path)))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(tmp_path / "probe.py"),
            *map(str, argv),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


def equal_weights(tmp_path):
    one, two = (torch.load(tmp_path / f"{rank}.weights", weights_only=True) for rank in (0, 1))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_follow_the_loss_of_one(tmp_path, small):
    flags = [
        "--data",
        small,
        "--dtype",
        "float32",
        "--max-new-tokens",
        5,
        *tiny_flags(v2_bpe_rope, steps=20, eval_interval=5),
    ]
    assert run(v2_bpe_rope, *flags, "--out", tmp_path / "one")[0] == 0
    process = torchrun(tmp_path, *flags, "--out", tmp_path / "two")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.count("step 20:") == 1 and "2 processes" in out and equal_weights(tmp_path)
    one, two = (
        [float(line.split(",")[1]) for line in (tmp_path / name / "log.csv").read_text().splitlines()[1:]]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, abs=1e-5)


def processes_of(folder):
    """The ids of all processes whose command line names this folder."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_two_processes_stop_together_and_go_on(tmp_path, small):
    flags = tiny_flags(v2_bpe_rope, steps=100_000, eval_interval=20)
    process = torchrun(tmp_path, "--data", small, "--out", tmp_path / "run", *flags)
    while "step 20:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "torchrun --standalone --nproc_per_node=2" in out and "--resume" in out
    assert processes_of(tmp_path) == [] and equal_weights(tmp_path)
    step = steps_taken(tmp_path / "run")
    process = torchrun(tmp_path, "--out", tmp_path / "run", "--resume", "--steps", 100_000)
    while "step" not in (line := process.stdout.readline()) or "budget" in line:
        assert process.poll() is None
    assert int(line.split()[1].strip(":").replace(",", "")) > step
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert processes_of(tmp_path) == []


def test_rows_that_cannot_be_shared_out(tmp_path, small):
    process = torchrun(tmp_path, "--data", small, "--out", tmp_path / "run", *tiny_flags(v2_bpe_rope, batch_size=3))
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("error: --batch-size 3 cannot be shared out evenly") == 1
