"""Mistakes get one clear line and exit status 2, and nothing on disk is lost."""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.conftest import FILES, VERSIONS, ids, last_step, run, said, short_run, tiny_flags

def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


@pytest.mark.parametrize("version", [v0_bigram, v2_bpe_rope], ids=ids)
@pytest.mark.parametrize("content, says", [
    (b"", "too little text"), (b"a", "too little text"), (b"abcdefgh", "too short"),
    (b"aaaa" * 500, "two different characters"),
    (b"all is well until here \xff and on" * 50, ["not UTF-8", "position 23"]),
    (b"a text with some words in it " * 3, ["too short", "--block-size 16"]),
])
def test_data_nothing_can_be_learned_from(version, content, says, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    says = [str(path), *([says] if isinstance(says, str) else says)]
    refused(version, "--data", path, "--out", tmp_path / "out", *tiny_flags(version), says=says)
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(tmp_path):
    refused(v0_bigram, "--data", tmp_path / "none.txt", "--out", tmp_path / "out", says=["none.txt", "No such file"])
    refused(v0_bigram, "--data", tmp_path, "--out", tmp_path / "out", says=[str(tmp_path), "directory"])


def test_windows_files_are_welcome(tmp_path, text):
    for name, content in [("unix", text.encode()), ("windows", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())]:
        (tmp_path / name).write_bytes(content)
    assert v0_bigram.read_texts(tmp_path / "unix") == v0_bigram.read_texts(tmp_path / "windows")


HEADER, ROWS = b"question,answer\n", b"".join(b"who is %d,me %d\n" % (i, i) for i in range(20))


@pytest.mark.parametrize("content, says", {
    "empty": (b"", "too little text"), "only a header": (HEADER, "too little text"),
    "one row": (HEADER + b"who,me\n", "too little text"),
    "no header": (ROWS, ["row 1", "question,answer"]),
    "other columns": (b"what,else\na,b\n", ["row 1", "question,answer"]),
    "a missing column": (b"question\nwho\n", ["row 1", "question,answer"]),
    "an empty cell": (HEADER + ROWS + b"why,\n" + ROWS, ["row 21", "question,answer"]),
    "a missing cell": (HEADER + ROWS + b"why\n" + ROWS, ["row 21", "question,answer"]),
    # an answer with a comma and no quotes: to keep half of it would be wrong
    "too many cells": (HEADER + ROWS + b"why,yes, why not\n" + ROWS, ["row 21", "in quotes"]),
    "a quote never closed": (HEADER + ROWS + b'"why,me\n' + ROWS, "not a valid .csv table"),
    "a cell without end": (HEADER + b'"' + b"x" * 200_000, "not a valid .csv table"),
    "text behind a quote": (HEADER + ROWS + b'"why" not,me\n', "not a valid .csv table"),
    "semicolons": ((HEADER + ROWS).replace(b",", b";"), ["row 1", "question,answer"]),
    "not UTF-8": (HEADER + ROWS + b"why,\xe9\n", "not UTF-8"),
    "UTF-16": ((HEADER + ROWS).decode().encode("utf-16"), "not UTF-8"),
    # columns are found by their exact names; the line says which
    "capitals": (b"Question,Answer\n" + ROWS, ["row 1", "question,answer"]),
    "a space": (b"question, answer\n" + ROWS, ["row 1", "question,answer"]),
}.items(), ids=lambda item: item if isinstance(item, str) else "")
def test_tables_that_are_malformed(content, says, tmp_path):
    content, words = says
    (tmp_path / "table.CSV").write_bytes(content)  # the ending may be in capitals
    words = [words] if isinstance(words, str) else words
    argv = ["--data", tmp_path / "table.CSV", "--out", tmp_path / "out", *tiny_flags(v0_bigram, steps=1)]
    refused(v0_bigram, *argv, says=["table.CSV", *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + HEADER + ROWS, (HEADER + ROWS).replace(b"\n", b"\r\n"), (HEADER + ROWS).replace(b"\n", b"\n\n"),
    (HEADER + ROWS).rstrip(), b"id,question,answer\n" + re.sub(rb"(?m)^", b"7,", ROWS.rstrip()),
    re.sub(rb"([^\n,]+)", rb'"\1"', HEADER + ROWS),
], ids=["byte order mark", "Windows", "blank lines", "no last line end", "a third column", "quotes"])
def test_tables_that_mean_the_same(content, tmp_path):
    (tmp_path / "table.csv").write_bytes(content)
    rows = [f"<user>who is {i}</user>\n<bot>me {i}</bot>\n" for i in range(20)]
    assert v0_bigram.read_texts(tmp_path / "table.csv") == ("".join(rows[:18]), "".join(rows[18:]))


def test_cells_hold_any_text_in_quotes(tmp_path):
    """Commas, quotes, line ends; a NUL byte is a character as any other."""
    (tmp_path / "table.csv").write_bytes(HEADER + ROWS + b'"why, though","he said ""no""\r\nand\0left"\n')
    assert v0_bigram.read_texts(tmp_path / "table.csv")[1].endswith(
        '<user>why, though</user>\n<bot>he said "no"\nand\0left</bot>\n')


# -- flags --


@pytest.mark.parametrize("flags, says", [
    ("--steps 0", "--steps"), ("--steps -5", "--steps"), ("--steps many", ["--steps", "many"]),
    ("--steps 1.5", "--steps"),
    ("--steps 1000000001", "--steps 1000000001"), ("--batch-size 0", "--batch-size 0 is not between 1 and 1e+09"),
    ("--block-size 0", "--block-size"), ("--block-size 1000000", ["too short", "--block-size 1000000"]),
    ("--eval-interval 0", "--eval-interval"), ("--warmup-steps -1", "--warmup-steps"), ("--grad-clip 0", "--grad-clip"),
    ("--weight-decay -1", "--weight-decay"), ("--n-layer 0", "--n-layer"), ("--n-head 0", "--n-head"),
    ("--n-embd 0", "--n-embd"), ("--learning-rate nan", "--learning-rate"), ("--learning-rate -1", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate"), ("--dropout 1", "--dropout"), ("--dropout -0.1", "--dropout"),
    ("--n-embd 30 --n-head 4", ["--n-embd 30", "--n-head 4"]), ("--n-embd 6 --n-head 2", ["--n-embd 6", "even"]),
    ("--vocab-size 255", "--vocab-size 255"), ("--vocab-size 1", "--vocab-size 1"), ("--top-p 0", "--top-p"),
    ("--top-p 1.1", "--top-p"), ("--top-k -1", "--top-k"), ("--temperature -0.5", "--temperature"),
    ("--temperature nan", "--temperature"), ("--device abacus", ["--device", "abacus"]), ("--dtype float8", "--dtype"),
    ("--width 3", "--width"), ("--seed -1", "--seed"),
    ("--max-new-tokens -1", "--max-new-tokens"),
    ("--resume --sample-only", ["--resume", "--sample-only"]), ("--resume --init-from x", ["--resume", "--init-from"]),
    ("--chat --sample-only", ["--chat", "--sample-only"]),
])
def test_flags_out_of_range(flags, says, tmp_path, little):
    refused(v2_bpe_rope, "--data", little, "--out", tmp_path / "out", *flags.split(), says=says)
    assert not (tmp_path / "out").exists()


def test_the_ends_of_the_ranges_are_allowed(tmp_path, little):
    flags = "--warmup-steps 0 --weight-decay 0 --seed 0 --learning-rate 0 --grad-clip 1e-6 --top-k 0 --top-p 1e-6"
    flags += " --temperature 0 --max-new-tokens 0 --dropout 0.999"
    status, out, err = short_run(v1_transformer, little, tmp_path / "out", *flags.split(), batch_size=1, block_size=1)
    assert (status, err) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, little):
    refused(v0_bigram, "--data", little, "--out", tmp_path / "out", "--device", "cuda", says=["--device cuda", "cpu"])


# -- checkpoints --


class Malice:
    def __reduce__(self):
        return (os.mkdir, (str(Malice.path),))


@pytest.mark.parametrize("content", "missing folder truncated text empty pickle list zip weights".split())
@pytest.mark.parametrize("mode, name", [("--sample-only", "best.pt"), ("--chat", "best.pt"), ("--resume", "last.pt"),
                                        ("--init-from", "best.pt")])
def test_checkpoints_that_are_none(content, mode, name, trained, tmp_path, little, recwarn):
    """Also: a pickle with code inside is not run, and torch's own warnings do not add lines."""
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    path, Malice.path = folder / name, tmp_path / "code-was-run"
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "truncated":
        path.write_bytes(whole[:5000])
    elif content == "text":
        path.write_text("a poem\n" * 100, encoding="utf-8")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":  # as old checkpoints are: torch warns of it
        path.write_bytes(pickle.dumps(Malice(), protocol=2))
    elif content == "list":
        torch.save([1, 2, 3], path)
    elif content == "zip":
        torch.save({"version": "v3_alibi", "config": {}, "tokenizer": {}, "model": Malice()}, path)
    elif content == "weights":
        torch.save({"version": "v3_alibi"}, path)
    before = snapshot(folder)
    flags = ["--out", folder, mode] + ["--prompt", "why?"] * (mode == "--chat")
    if mode == "--init-from":
        flags = ["--out", tmp_path / "new", mode, path, "--data", little]
    absent = content in ("missing", "folder")
    says = f"there is no checkpoint {path}: train first, or check the path" if absent else f"{path} is damaged"
    refused(v3_alibi, *flags, says=says)
    assert snapshot(folder) == before and not Malice.path.exists() and not (tmp_path / "new").exists()
    assert not recwarn.list


@pytest.mark.parametrize("mode, name", [("--resume", "last.pt"), ("--sample-only", "best.pt"), ("--chat", "best.pt")])
def test_checkpoints_of_another_version_name_it_and_what_to_do(mode, name, trained):
    path = trained[v2_bpe_rope] / name
    says = f"{path} was made by v2_bpe_rope: run v2_bpe_rope.py, or use --init-from"
    refused(v3_alibi, "--out", trained[v2_bpe_rope], mode, says=says)


DAMAGE = [
    {"config": 7}, {"config": None}, {"config": {"seed": None}}, {"config": {"seed": -1}},
    {"config": {"eval_interval": 0}}, {"config": {"steps": "many"}}, {"config": {"steps": 0.5}},
    {"config": {"batch_size": -1}}, {"config": {"grad_clip": "x"}}, {"config": {"learning_rate": float("nan")}},
    {"config": {"block_size": torch.ones(2)}}, {"config": {"block_size": False}},
    {"tokenizer": {}}, {"tokenizer": 3}, {"model": {}}, {"model": None},
]


def damage_checkpoint(path, damage):
    checkpoint = torch.load(path, weights_only=True)
    for key, value in damage.items():
        checkpoint[key] = {**checkpoint[key], **value} if key == "config" and isinstance(value, dict) else value
    torch.save(checkpoint, path)


LAYERS = [{"config": {"n_layer": "x"}}, {"config": {"n_head": 0}}]  # settings that v0 does not have


@pytest.mark.parametrize("damage", [*DAMAGE, *LAYERS], ids=str)
@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_checkpoints_with_damaged_parts(version, damage, trained, tmp_path):
    """Also values of Config that the command line would not take."""
    if version is v0_bigram and any(damage is layers for layers in LAYERS):
        pytest.skip("v0 does not read this setting")
    shutil.copy(trained[version] / "best.pt", tmp_path)
    damage_checkpoint(tmp_path / "best.pt", damage)
    refused(version, "--out", tmp_path, "--sample-only", says=[str(tmp_path / "best.pt"), version.__name__])
    with pytest.raises(version.UserError):
        version.load(tmp_path / "best.pt")


@pytest.mark.parametrize("forged", [
    {"block_size": 1.5}, {"block_size": "16"}, {"batch_size": True}, {"warmup_steps": 2.5}, {"learning_rate": True},
    {"grad_clip": 1}, {"eval_interval": torch.ones(())},
], ids=str)
@pytest.mark.parametrize("version", [v0_bigram, v3_alibi], ids=ids)
def test_settings_of_a_checkpoint_become_plain_numbers_of_their_types(version, forged, trained, tmp_path):
    """Or are refused, but a value of another type goes no further than `load`."""
    shutil.copytree(trained[version], tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        damage_checkpoint(tmp_path / "run" / name, {"config": forged})
    try:
        config = version.load(tmp_path / "run/best.pt")[2]
    except version.UserError:
        config = None
    if config:
        assert all(type(getattr(config, f.name)) is f.type for f in version.Config.__dataclass_fields__.values())
    for mode in (["--sample-only"], ["--resume", "--steps", 31]):
        status, out, err = run(version, "--out", tmp_path / "run", *mode, "--max-new-tokens", 3, "--prompt", "ab")
        assert (status, err) == (0, "") if config else (status == 2 and err.count("\n") == 1)


@pytest.mark.parametrize("version", [v0_bigram, v1_transformer], ids=ids)
def test_weights_that_do_not_fit_leak_no_message_of_python(version, trained, tmp_path, little):
    flags = ["--data", little, "--out", tmp_path / "new", "--init-from", trained[v3_alibi] / "best.pt"]
    line = refused(version, *flags, says=f"does not fit {version.__name__}")
    assert "__init__" not in line and "state_dict" not in line


def test_every_message_about_a_checkpoint_names_what_to_do_next(trained, tmp_path, little):
    shutil.copytree(trained[v2_bpe_rope], tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    calls = [["--out", tmp_path / "none", "--sample-only"], ["--out", tmp_path / "none", "--resume"],
             ["--out", trained[v3_alibi], "--chat"], ["--out", tmp_path / "run", "--sample-only"],
             ["--out", tmp_path / "run", "--resume"], ["--out", trained[v2_bpe_rope], "--resume", "--steps", 20],
             ["--data", little, "--out", trained[v2_bpe_rope], "--resume"]]
    for call in calls:
        line = refused(v2_bpe_rope, *call, says=": ")
        assert re.search(r"(: |, or )(train|run|use|give|start|name|try|check) ", line), line


# -- resume keeps the run's settings, and takes no damaged run --


def test_resume_refuses_other_settings_and_another_text(trained, tmp_path, text):
    folder, other = trained[v2_bpe_rope], tmp_path / "other.txt"
    before = snapshot(folder)
    other.write_text(text[:50_000], encoding="utf-8")
    for setting in ("--n-embd 64", "--n-embd 32", "--dtype bfloat16", "--learning-rate 0.1 --steps 40"):
        refused(v2_bpe_rope, "--out", folder, "--resume", *setting.split(), says="only --steps")
    refused(v2_bpe_rope, "--out", folder, "--resume", "--data", other, says=[str(other), str(folder), "--data"])
    refused(v2_bpe_rope, "--out", folder, "--resume", "--steps", 20, says=["--steps 20", str(folder)])
    assert snapshot(folder) == before


def test_resume_finds_the_same_text_elsewhere(trained, tmp_path, small):
    shutil.copytree(trained[v0_bigram], tmp_path / "run")
    shutil.copy(small, tmp_path / "moved.txt")
    flags = ["--out", tmp_path / "run", "--resume", "--steps", 31, "--max-new-tokens", 0]
    status, out, err = run(v0_bigram, *flags, "--data", tmp_path / "moved.txt")
    assert status == 0 and "moved.txt, " in said(out) and last_step(tmp_path / "run") == 31


def test_resume_of_a_finished_run_writes_the_report_again(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[v3_alibi], folder)
    result = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    status, out, err = run(v3_alibi, "--out", folder, "--resume", "--steps", 30, "--max-new-tokens", 5)
    assert status == 0 and (folder / "result.json").read_bytes() == result


def part(name, value):
    return lambda run: run.__setitem__(name, value)


def row(name, value):
    return lambda run: run["log"][-1].__setitem__(name, value)


def moments(change):
    return lambda run: change(run["optimizer"])


FORGED = {
    "no log": lambda run: run.pop("log"), "log None": part("log", None), "log empty": part("log", []),
    "log of strings": part("log", ["a", "b"]), "log a number": part("log", 5),
    "row without a key": lambda run: run["log"][0].pop("seconds"),
    "row without a step": lambda run: run["log"][-1].pop("step"), "loss a tensor": row("val_loss", torch.ones(())),
    "step a string": row("step", "30"), "loss a string": row("val_loss", "4.0"), "loss None": row("val_loss", None),
    "loss True": row("val_loss", True), "step nan": row("step", float("nan")), "step negative": row("step", -1),
    "step beyond --steps": row("step", 41), "step huge": row("step", 10**30), "step 2.5": row("step", 2.5),
    "no optimizer": lambda run: run.pop("optimizer"), "optimizer None": part("optimizer", None),
    "optimizer a list": part("optimizer", []),
    "moments missing for a weight": moments(lambda state: state.pop(0)),
    "moments of an unknown weight": moments(lambda state: state.update({99: state[0]})),
    "moments missing one of two": moments(lambda state: state[0].pop("exp_avg_sq")),
    "moments of another shape": moments(lambda state: state[0].update(exp_avg=torch.ones(2, 2))),
    "moments a string": moments(lambda state: state[0].update(exp_avg="x")),
    "moments' step no number": moments(lambda state: state[0].update(step="x")),
    "moments' step a vector": moments(lambda state: state[0].update(step=torch.ones(3))),
    "no dtype": lambda run: run.pop("dtype"), "no data": lambda run: run.pop("data"), "data a number": part("data", 5),
    "data a list": part("data", ["a"]), "data a tensor": part("data", torch.ones(2)),
    "no digests": lambda run: run.pop("digests"), "digests None": part("digests", None),
    "digests wrong": part("digests", ["0", "1"]),
    "digests a tensor": part("digests", torch.ones(2)), "no init_from": lambda run: run.pop("init_from"),
}


@pytest.mark.parametrize("forgery", ["run missing", "run None", "run a list", "run a string", *FORGED])
def test_a_forged_or_damaged_state_of_a_run_is_refused(forgery, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[v2_bpe_rope], folder)
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    if forgery in FORGED:
        FORGED[forgery](checkpoint["run"])
    elif forgery == "run missing":
        del checkpoint["run"]
    else:
        checkpoint["run"] = {"run None": None, "run a list": [], "run a string": "run"}[forgery]
    torch.save(checkpoint, folder / "last.pt")
    before = snapshot(folder)
    refused(v2_bpe_rope, "--out", folder, "--resume", "--steps", 40, says="" if "data a" in forgery else str(folder))
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["dtype", "init_from"])
@pytest.mark.parametrize("value", ["float8", None, 5, [1], torch.ones(2)], ids=str)
def test_a_forged_note_of_a_run_does_no_harm(name, value, trained, tmp_path):
    """These two are only shown and written down: whatever they are, there is no traceback after hours of training."""
    shutil.copytree(trained[v0_bigram], tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    checkpoint["run"][name] = value
    torch.save(checkpoint, tmp_path / "run/last.pt")
    status, out, err = run(v0_bigram, "--out", tmp_path / "run", "--resume", "--steps", 31, "--max-new-tokens", 3)
    assert (status, err) == (0, "") or (status == 2 and err.count("\n") == 1)


def test_moments_are_copied_out_of_a_checkpoint(trained):
    """A forged tensor can claim a shape that it has no memory for; writing into it would crash Python."""
    state = torch.load(trained[v3_alibi] / "last.pt", weights_only=True)["run"]["optimizer"]
    for both in state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            both[name] = torch.zeros((1,) * both[name].dim()).expand(both[name].shape)
    optimizer = v3_alibi.make_optimizer(v3_alibi.load(trained[v3_alibi] / "last.pt")[0], state)
    for p, both in optimizer.state.items():
        assert both["exp_avg"].stride() == p.stride() and both["exp_avg_sq"].stride() == p.stride()


@pytest.mark.parametrize("damage", [d for d in DAMAGE if isinstance(d.get("config"), dict)], ids=str)
def test_resume_refuses_forged_settings(damage, trained, tmp_path):
    shutil.copytree(trained[v2_bpe_rope], tmp_path / "run")
    damage_checkpoint(tmp_path / "run/last.pt", damage)
    before = snapshot(tmp_path / "run")
    more = ["--steps", 40] if "steps" not in damage["config"] else []
    refused(v2_bpe_rope, "--out", tmp_path / "run", "--resume", *more, says=str(tmp_path / "run/last.pt"))
    assert snapshot(tmp_path / "run") == before


# -- a user's files, and old runs --


class Kill(BaseException):
    """Ends a run on the spot, as kill -9 does."""


def test_three_runs_into_one_folder_keep_all_three(tmp_path, little):
    out, kept = tmp_path / "run", []
    for number in range(3):
        status, shown, err = short_run(v0_bigram, little, out, seed=number)
        assert (status, err) == (0, "") and ("Moved the files" in shown) == (number > 0)
        assert number == 0 or f"previous run in {out} to {out}/previous-{number}." in said(shown)
        assert shown.count("\n> ") == 1 and "previous" not in shown[shown.index("Runs on this text"):]
        kept.append({name: (out / name).read_bytes() for name in FILES})
    assert snapshot(out / "previous-1") == kept[0] and snapshot(out / "previous-2") == kept[1]
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "previous-1", "previous-2"])
    seeds = [json.loads(run["result.json"])["seed"] for run in kept]
    assert seeds == [0, 1, 2]


def test_files_of_the_user_survive_any_number_of_runs(tmp_path, little, monkeypatch):
    """In a folder of theirs: notes, a folder and a file with names like ours, a log.csv, which is moved."""
    own = {"notes.txt": b"mine", "previous-1/poem.txt": b"mine", "previous-2": b"a file", "best.pt.tmp": b"mine",
           "best.pt.7.tmp": b"mine", "data/log.csv": b"mine", "runs.csv": b"mine"}
    for name, content in {**own, "log.csv": b"my own log"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        assert short_run(v0_bigram, little, ".", seed=number)[0] == 0
        assert run(v0_bigram, "--out", ".", "--sample-only", "--max-new-tokens", 2)[0] == 0
        assert run(v0_bigram, "--out", ".", "--resume", "--steps", 2, "--max-new-tokens", 2)[0] == 0
    now = snapshot(tmp_path)
    assert {name: now[name] for name in own} == own and now["previous-3/log.csv"] == b"my own log"
    ours = {f"{folder}{name}" for folder in ("", "previous-4/", "previous-5/") for name in FILES}
    assert now.keys() == own.keys() | ours | {"previous-3/log.csv"}


def test_no_run_touches_what_is_beside_its_folder(trained, tmp_path, little):
    shutil.copytree(trained[v0_bigram], tmp_path / "other")
    (tmp_path / "log.csv").write_bytes(b"mine")
    before = snapshot(tmp_path)
    for _ in range(2):
        assert short_run(v0_bigram, little, tmp_path / "deep" / "run")[0] == 0
    assert {name: content for name, content in snapshot(tmp_path).items() if not name.startswith("deep/")} == before


def test_a_link_is_moved_as_a_link(tmp_path, little):
    """What it points to is left alone, also where that is not there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.csv").write_bytes(b"mine")
    (tmp_path / "run/log.csv").symlink_to(tmp_path / "mine.csv")
    (tmp_path / "run/best.pt").symlink_to(tmp_path / "none.pt")
    assert short_run(v0_bigram, little, tmp_path / "run")[0] == 0
    old = tmp_path / "run/previous-1"
    assert (old / "log.csv").is_symlink() and (old / "best.pt").is_symlink() and not (tmp_path / "none.pt").exists()
    assert (tmp_path / "mine.csv").read_bytes() == b"mine" and not (tmp_path / "run/log.csv").is_symlink()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Kill()], ids=["full disk", "kill"])
def test_a_move_that_fails_loses_no_file_of_the_old_run(error, tmp_path, little, monkeypatch):
    """At each of the five: what is not moved stays, and the next run moves it, too."""
    assert short_run(v0_bigram, little, tmp_path / "old")[0] == 0
    old = snapshot(tmp_path / "old")
    for number in range(1, 6):
        folder, calls, rename = tmp_path / str(number), itertools.count(1), os.rename
        shutil.copytree(tmp_path / "old", folder)

        def failing(*args):
            if next(calls) == number:
                raise error
            rename(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", failing)
            with contextlib.suppress(Kill):
                status, out, err = short_run(v0_bigram, little, folder)
                assert status == 2 and err.count("\n") == 1 and "No space left" in err
        assert sorted(snapshot(folder).values()) == sorted(old.values())
        assert short_run(v0_bigram, little, folder)[0] == 0
        kept = [content for name, content in snapshot(folder).items() if name.startswith("previous-")]
        assert sorted(kept) == sorted(old.values())


def test_a_folder_that_cannot_be_written(tmp_path, little):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        refused(v0_bigram, "--data", little, "--out", out, "--steps", 2, says=str(tmp_path / "file"))
    assert snapshot(tmp_path) == {"file": b"not a folder"}


# -- writes that fail: a full disk, a kill, Ctrl-C, at each of them in turn --


def fail_at(patch, number, error):
    """Let the number-th write or move of a file fail, a write in its midst. A killed program does not tidy up."""
    calls = itertools.count(1)

    def failing(original):
        def method(path, argument):
            if next(calls) == number:
                if original.__name__ == "write_bytes":
                    original(path, bytes(argument)[:20])
                raise error
            return original(path, argument)

        return method

    for name in ("write_bytes", "replace"):
        patch.setattr(Path, name, failing(getattr(Path, name)))
    if isinstance(error, Kill):
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)


def check_whole(folder):
    """Each of the five files that is there can be read to its end."""
    there = {name: folder / name for name in FILES if (folder / name).exists()}
    for name in there.keys() & {"best.pt", "last.pt"}:
        v0_bigram.load(there[name])
    if "log.csv" in there:
        text = (folder / "log.csv").read_text(encoding="utf-8")
        assert text.endswith("\n") and {line.count(",") for line in text.splitlines()} == {7}
    if "result.json" in there:
        json.loads((folder / "result.json").read_bytes())
    return there


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Kill()], ids=["full disk", "kill"])
@pytest.mark.parametrize("resume", [False, True], ids=["new run", "resume"])
def test_a_write_that_fails_leaves_whole_files_and_a_run_that_goes_on(error, resume, tmp_path, little, monkeypatch):
    assert short_run(v0_bigram, little, tmp_path / "old", learning_rate=0.01)[0] == 0
    old = snapshot(tmp_path / "old")
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", folder)
        flags = ["--resume", "--steps", 2, "--max-new-tokens", 3]

        def start():
            return run(v0_bigram, "--out", folder, *flags) if resume else short_run(v0_bigram, little, folder)

        with monkeypatch.context() as patch:
            fail_at(patch, number, error)
            try:
                status, out, err = start()
            except Kill:
                status, err = 2, "\n"
        if status == 0:  # all writes got through
            break
        assert status == 2 and err.count("\n") == 1
        assert isinstance(error, Kill) or ("No space left" in err and not list(folder.rglob("*.tmp")))
        there = check_whole(folder)
        if resume:  # an old file or a new one, each of them
            assert there.keys() == set(FILES) and last_step(folder) in (1, 2)
        else:
            assert {name: content for name, content in snapshot(folder / "previous-1").items()} == old
        status, out, err = run(v0_bigram, "--out", folder, *flags) if "last.pt" in there else start()
        assert (status, err) == (0, "") and check_whole(folder).keys() == set(FILES)
    assert number == (1 + 2 * 5 if resume else 1 + 2 * 8)


def test_ctrl_c_at_any_write_names_the_step_that_is_saved(tmp_path, little, monkeypatch):
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            fail_at(patch, number, KeyboardInterrupt())
            status, out, err = short_run(v0_bigram, little, folder)
        if status == 0:
            break
        saved = (folder / "last.pt").exists()
        hint = f"--out {folder} --resume starts at step {last_step(folder)}" if saved else "nothing new was saved"
        assert (status, err, out[out.index("stopped;"):]) == (130, "", f"stopped; {hint}\n"), number
        assert check_whole(folder) is not None and not list(folder.glob("*.tmp"))
    assert number == 1 + 2 * 8


@pytest.mark.parametrize("function, saved", [
    ("read_texts", None), ("describe", None), ("make_optimizer", None), ("evaluate", None), ("get_batch", 0),
    ("report", 2), ("print_text", 2),
])
def test_ctrl_c_at_any_stage_ends_with_one_line(function, saved, tmp_path, little, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(v0_bigram, function, interrupt)
        status, out, err = short_run(v0_bigram, little, tmp_path / "run", steps=2)
    hint = "nothing new was saved" if saved is None else f"--out {tmp_path / 'run'} --resume starts at step {saved}"
    assert (status, err, out[out.index("stopped;"):]) == (130, "", f"stopped; {hint}\n")
    if saved is not None:
        status, out, err = run(v0_bigram, "--out", tmp_path / "run", "--resume", "--max-new-tokens", 0)
        assert (status, err) == (0, "") and last_step(tmp_path / "run") == 2


# -- numbers that run away, and bugs --


@pytest.mark.parametrize("version", [v1_transformer, v3_alibi], ids=ids)
def test_divergence_is_noticed_and_the_last_good_checkpoint_stays(version, tmp_path, little, monkeypatch):
    """At step 5 a weight becomes infinite; at step 6, the next evaluation, the run ends."""
    original = version.get_batch

    def poison(tokens, config, step):
        if step == 4:
            poison.model.norm.weight.data[3] = float("inf")
        return original(tokens, config, step)

    class Spy(version.LanguageModel):
        def __init__(self, *args):
            super().__init__(*args)
            poison.model = self

    monkeypatch.setattr(version, "get_batch", poison)
    monkeypatch.setattr(version, "LanguageModel", Spy)
    flags = ["--dtype", "float32"]
    status, out, err = short_run(version, little, tmp_path / "run", *flags, steps=9, eval_interval=3, n_layer=1)
    assert status == 1 and re.sub(r"^bpe_tokenizer.py: this .*\n", "", err) == (
        f"{version.__name__}.py: error: the loss is not finite at step 6: try a lower --learning-rate\n")
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert last_step(tmp_path / "run") == 3 and all(w.isfinite().all() for w in checkpoint["model"].values())
    assert "\n       3 " in out and "\n       6 " not in out
    assert (tmp_path / "run/log.csv").read_text(encoding="utf-8").count("\n") == 3


def test_a_bug_shows_its_traceback(tmp_path, little, monkeypatch):
    monkeypatch.setattr(v0_bigram, "learning_rate", lambda step, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        short_run(v0_bigram, little, tmp_path / "run")


# -- prompts and unknown characters --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_prompts_empty_long_and_unknown(version, trained, tmp_path):
    shutil.copytree(trained[version], tmp_path / "run")
    known = version in VERSIONS[2:]
    flags = ["--out", tmp_path / "run", "--sample-only", "--max-new-tokens", 5, "--prompt"]
    status, out, err = run(version, *flags, "")
    assert status == 0 and "note" not in out
    status, out, err = run(version, *flags, "A long prompt. " * 20)
    assert status == 0 and "reads only the last 16 of the prompt's" in said(out) and out.count("A long prompt. ") == 20
    assert known or "the prompt's 300 tokens" in said(out)
    for prompt, how_many in (("é☃", "2 characters"), ("é", "1 character")):
        status, out, err = run(version, *flags, prompt)
        assert status == 0 and (f"the model does not know {how_many} of the prompt" in out) != known


def test_unknown_characters_of_the_validation_text_are_said(tmp_path, text):
    (tmp_path / "text.txt").write_text(text[:2700] + "#" * 10 + text[:290], encoding="utf-8")
    for version in (v0_bigram, v2_bpe_rope):
        status, out, err = short_run(version, tmp_path / "text.txt", tmp_path / version.__name__)
        assert status == 0 and ("note: 10 characters of the validation text" in out) == (version is v0_bigram)
