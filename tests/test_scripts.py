"""What a run shows and writes, how one run starts from another, and what the four files have in common."""

import ast
import contextlib
import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.compare import diff_size
from tests.conftest import FILES, ROOT, VERSIONS, ids, log_of, result_of, run, said, short_run, tiny_flags

MARKER = "# ---- the same in every version from here on ----\n"
SCRIPTS = [ROOT / f"{version.__name__}.py" for version in VERSIONS]


def new_run(*args, **settings):
    """A run of a few steps, which must succeed: what it prints."""
    status, out, err = short_run(*args, **settings)
    assert status == 0, err
    return out


# -- what a run prints --


def on_a_terminal(version, *argv):
    """Call main where stdout and stderr are a terminal of 80 columns: (exit status, what it got)."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))  # not on Windows
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    got = []

    def read():
        with contextlib.suppress(OSError):  # which is how a terminal tells that it was closed
            while part := os.read(ours, 4096):
                got.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as terminal:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            status = version.main([str(a) for a in argv])
    reader.join()
    os.close(ours)
    return status, b"".join(got).decode()


@pytest.mark.parametrize("version", [v0_bigram, v3_alibi], ids=ids)
def test_a_terminal_shows_a_progress_bar_and_nothing_wider_than_it(version, tmp_path, little, monkeypatch):
    """With the loss in it. (A pipe gets none: see test_processes.)"""

    class Bar(version.tqdm):  # drawn at every step, where the real one waits a tenth of a second
        def __init__(self, *args, **settings):
            super().__init__(*args, mininterval=0, **settings)

    monkeypatch.setattr(version, "tqdm", Bar)
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(version, steps=40, eval_interval=20, block_size=8)
    status, shown = on_a_terminal(version, "--data", little, *flags, "--max-new-tokens", 5)
    lines = [re.sub(r"\x1b\[\w+", "", line) for line in re.split(r"[\r\n]+", shown[:shown.index("Sample from")])]
    assert status == 0 and all(len(line) <= 80 for line in lines if str(little) not in line)
    bars = "\n".join(line for line in lines if "/40 [" in line)
    assert "| 0/40 [" in bars and re.search(r" 52%\|.*\| 21/40 \[.*, loss \d\.\d{3}\]", bars), bars
    assert re.search(r"100%\|.*\| 40/40 \[.*, loss \d\.\d{3}\]", bars), bars
    status, shown = on_a_terminal(version, "--resume", "--steps", 60, "--max-new-tokens", 0)
    assert status == 0 and "| 40/60 [" in shown and "| 60/60 [" in shown and "| 0/60" not in shown


def test_the_bar_shows_the_loss_of_every_tenth_step(tmp_path, little, monkeypatch):
    shown, bar = [], v0_bigram.tqdm

    class Spy(bar):
        def set_postfix_str(self, text, refresh):
            shown.append(text)

    monkeypatch.setattr(v0_bigram, "tqdm", Spy)
    out = new_run(v0_bigram, little, tmp_path / "run", steps=25, learning_rate=0.5)
    losses = [float(row["train_loss"]) for row in log_of(tmp_path / "run")]  # here of one step each
    assert shown == [f"loss {losses[10]:.3f}", f"loss {losses[20]:.3f}"] and "loss 3" not in out


def test_no_line_of_a_run_is_wider_than_80_columns(tmp_path, little, monkeypatch):
    """With large numbers, a long name of a folder, and notes; paths and samples are the user's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(little, "t.txt")
    name = "a-folder-with-a-name-far-longer-than-the-table-has-room-for"
    flags = ["--data", "t.txt", "--max-new-tokens", 0]
    big = tiny_flags(v2_bpe_rope, steps=1, block_size=100, n_embd=256, n_head=8, n_layer=1, batch_size=2)
    outs = [run(v2_bpe_rope, *flags, *big, "--out", name, "--prompt", "word " * 90)[1],
            run(v2_bpe_rope, *flags, *big, "--out", name)[1],  # the second one also says where the first one went
            run(v2_bpe_rope, "--resume", "--steps", 1, "--out", name)[1],
            run(v0_bigram, *flags, *tiny_flags(v0_bigram, steps=1500, eval_interval=500), "--out", "v0")[1]]
    for out in outs:
        shown = out[:out.index("sample):")]
        assert "best val loss" in shown and max(map(len, shown.splitlines())) <= 80, shown
    assert "note: the model reads only the last 100" in outs[0] and "previous-1." in outs[1]
    table = outs[1][outs[1].index("Runs on"):].splitlines()
    assert table[3].startswith("> a-folder-with-a-name-far-long ") and len(table[2]) == len(table[3])


def test_the_plan_says_how_many_times_the_text_is_read(tmp_path, little):
    """2700 characters are for training, and 16 x 27 = 432 are read at a step."""
    for steps, times in ((1, "0.2"), (25, "4.0"), (93, "14.9"), (94, "15.0"), (95, "15.2"), (250, "40.0")):
        settings = {"block_size": 27, "batch_size": 16, "steps": steps, "eval_interval": 500}
        out = new_run(v0_bigram, little, tmp_path / str(steps), **settings)
        out = said(out)
        assert f"plan: {steps} steps of 16 x 27 tokens, {times} times the text" in out
        assert ("learn it by heart" in out) == (steps >= 94)  # more than 15 times
    assert f"data: {little}, 2,700 tokens for training, 300 for validation" in out


def test_the_parameters_are_counted_by_kind(trained, tmp_path):
    """The kinds add up to the whole, and 16 bytes a parameter are for weights, gradients and two moments."""
    for version in VERSIONS:
        shutil.copytree(trained[version], tmp_path / version.__name__)
        out = run(version, "--out", tmp_path / version.__name__, "--resume", "--max-new-tokens", 0)[1]
        line = re.search(r"parameters: ([\d,]+) \((.*?)\), which take ([\d.]+) MB", said(out))
        model = version.load(trained[version] / "best.pt")[0]
        total = sum(p.numel() for p in model.parameters())
        assert int(line[1].replace(",", "")) == total == result_of(trained[version])["parameters"]
        kinds = re.findall(r"(\w+) ([\d,]+)", line[2])
        assert sum(int(n.replace(",", "")) for _, n in kinds) == total and float(line[3]) == round(16e-6 * total, 1)
        names = ["embedding"] if version is v0_bigram else ["embedding", "attention", "feed_forward", "norm"]
        assert [kind for kind, _ in kinds] == names


# -- how it ended --


@pytest.mark.parametrize("train, val, overfits", [
    ([3, 2, 1], [3, 2, 2.5], True), ([3, 2, 2.1], [3, 2, 2.5], False), ([3, 2, 1], [3, 2, 1.5], False),
    ([3, 2, 2], [3, 2, 2.5], False), ([3, 2, 2.5], [2, 2.1, 2.2], True), ([3, 2, 1], [3, 2, 2], True),
])
def test_overfitting_means_that_only_the_training_loss_still_falls(train, val, overfits, trained, tmp_path):
    shutil.copytree(trained[v0_bigram], tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    for row, train_loss, val_loss in zip(checkpoint["run"]["log"][1:], train, val):
        row.update(train_loss=float(train_loss), val_loss=float(val_loss))
    torch.save(checkpoint, tmp_path / "run/last.pt")
    status, out, err = run(v0_bigram, "--out", tmp_path / "run", "--resume", "--max-new-tokens", 0)
    assert (status, err) == (0, "") and ("The model overfits" in out) == overfits


def test_result_json_says_all_about_a_run(trained, small):
    for version in VERSIONS:
        found, (model, tokenizer, config) = result_of(trained[version]), version.load(trained[version] / "best.pt")
        rows = [line.split(",") for line in (trained[version] / "log.csv").read_text(encoding="utf-8").splitlines()]
        assert rows[0][:5] == ["step", "train_loss", "val_loss", "perplexity", "bits_per_byte"]
        assert rows[0][5:] == ["learning_rate", "tokens_per_second", "seconds"]
        assert [row[0] for row in rows[1:]] == ["0", "10", "20", "30"] and rows[1][1] == "nan"
        keys = "version data validation_sha256 config init_from parameters steps vocab_size tokens_per_byte best_step"
        keys += " val_loss perplexity bits_per_byte context_bits_per_byte train_seconds device dtype seed"
        assert list(found) == keys.split()
        assert found["version"] == version.__name__ and found["data"] == small.name and found["init_from"] == ""
        assert found["config"] == vars(config) == {**found["config"], "steps": 30, "eval_interval": 10, "seed": 1337}
        assert (found["steps"], found["seed"], found["vocab_size"]) == (30, 1337, tokenizer.vocab_size)
        assert (found["device"], found["dtype"], found["train_seconds"]) == ("cpu", "float32", float(rows[-1][7]))


def table(out):
    """The lines of the table of runs, by the name of the run: (mark, the rest)."""
    out = out[out.index("  run  "):out.index("\nSample from")]
    return {line[2:31].strip(): (line[0], line[32:].split()) for line in out.splitlines()[1:]}


def test_the_table_of_runs_marks_what_cannot_be_compared(tmp_path, text, little):
    (tmp_path / "other.txt").write_text(text[1000:4000], encoding="utf-8")
    new_run(v0_bigram, little, tmp_path / "runs/v0_bigram-a", steps=2)
    new_run(v0_bigram, little, tmp_path / "runs/longer", steps=3)
    new_run(v0_bigram, little, tmp_path / "runs/tuned", "--init-from", tmp_path / "runs/longer/best.pt", steps=2)
    new_run(v1_transformer, little, tmp_path / "runs/attention", steps=2)
    new_run(v0_bigram, tmp_path / "other.txt", tmp_path / "runs/other-text", steps=2)
    (tmp_path / "runs/empty").mkdir()
    found = result_of(tmp_path / "runs/longer")
    damaged = [b"", b"{", b"\xff", b"[]", b"7", b"null", b"{}", json.dumps({**found, "version": 5}).encode()]
    for key in ("steps", "val_loss", "train_seconds", "context_bits_per_byte", "version"):
        damaged += [json.dumps({k: v for k, v in found.items() if k != key}).encode()]
        damaged += [json.dumps({**found, key: value}).encode() for value in (None, [1], {"1": "x"})]
    for number, content in enumerate(damaged):
        (tmp_path / f"runs/damaged-{number:02}").mkdir()
        (tmp_path / f"runs/damaged-{number:02}/result.json").write_bytes(content)

    rows = table(new_run(v0_bigram, little, tmp_path / "runs/this", steps=2))
    assert {name: mark for name, (mark, _) in rows.items()} == {
        "this (v0_bigram)": ">", "v0_bigram-a": " ", "longer (v0_bigram)": "*", "tuned (v0_bigram)": "*",
        "attention (v1_transformer)": " "}
    assert list(rows) == sorted(rows)
    found = result_of(tmp_path / "runs/attention")
    numbers = f"2 {found['val_loss']:.4f} {found['bits_per_byte']:.3f} - - {found['train_seconds']:.0f}"
    assert rows["attention (v1_transformer)"][1] == numbers.split()
    context = result_of(tmp_path / "runs/longer")["context_bits_per_byte"]
    assert rows["longer (v0_bigram)"][1][2:5] == [f"{context[times]:.3f}" for times in "124"]
    # a run that was fine-tuned in the same way is comparable, and from its folder, --out . names the run as well
    flags = ["--init-from", tmp_path / "runs/longer/best.pt"]
    rows = table(new_run(v0_bigram, little, tmp_path / "runs/tuned-2", *flags, steps=2))
    assert [rows[f"{name} (v0_bigram)"][0] for name in ("tuned-2", "tuned", "this")] == [">", " ", "*"]
    with contextlib.chdir(tmp_path / "runs/this"):
        assert table(new_run(v0_bigram, little, ".", steps=2))["this (v0_bigram)"][0] == ">"


# -- help --


def test_help_takes_a_comment_with_a_percent_sign(monkeypatch):
    source = inspect.getsource(v2_bpe_rope.Config).replace("training steps", "100% of all %(steps)s, %d and %")
    monkeypatch.setattr(v2_bpe_rope.inspect, "getsource", lambda config: source)
    status, out, err = run(v2_bpe_rope, "--help")
    assert (status, err) == (0, "")
    assert "--steps N 100% of all %(steps)s, %d and % (default 2600)" in said(out)


# -- one run starts from another --


def test_weights_move_between_v2_and_v3_only(trained, tmp_path, small):
    """--init-from: v3 goes on from v2's weights; the weights of the others do not fit, and a sentence says so."""
    for version in VERSIONS:
        for other in VERSIONS:
            out = tmp_path / version.__name__ / other.__name__
            flags = ["--init-from", trained[other] / "best.pt", "--steps", 1, "--max-new-tokens", 0]
            status, _, err = run(version, "--data", small, "--out", out, *flags)
            fits = version is other or {version, other} == {v2_bpe_rope, v3_alibi}
            assert status == (0 if fits else 2), (version, other, err)
            if not fits:
                says = f"{trained[other]}/best.pt is damaged, or does not fit {version.__name__} and"
                assert err.count("\n") == 1 and says in err and not out.exists()


def test_a_finetuned_run_starts_where_the_other_ended(trained, tmp_path, small):
    """Its settings, its tokenizer and its weights; what it started from is noted, also over a resume."""
    path = trained[v3_alibi] / "best.pt"
    flags = ["--data", small, "--out", tmp_path / "fine", "--dtype", "float32", "--max-new-tokens", 0]
    status, out, err = run(v3_alibi, *flags, "--init-from", path, "--steps", 1, "--learning-rate", 0)
    before, after = result_of(trained[v3_alibi]), result_of(tmp_path / "fine")
    assert (status, err) == (0, "") and after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    assert after["init_from"] == str(path) and after["tokens_per_byte"] == before["tokens_per_byte"]
    assert after["config"] == {**before["config"], "steps": 1, "learning_rate": 0.0}
    assert run(v3_alibi, "--out", tmp_path / "fine", "--resume", "--steps", 2, "--max-new-tokens", 0)[0] == 0
    assert result_of(tmp_path / "fine")["init_from"] == str(path)


def test_a_run_is_finetuned_from_a_file_in_its_own_folder_twice(trained, tmp_path, small):
    """The old run is moved aside, but only after it was read."""
    folder, starts = tmp_path / "run", []
    shutil.copytree(trained[v2_bpe_rope], folder)
    for number in (1, 2):
        old, best = {name: (folder / name).read_bytes() for name in FILES}, result_of(folder)["val_loss"]
        flags = ["--init-from", folder / "best.pt", "--steps", 5, "--dtype", "float32", "--max-new-tokens", 0]
        status, out, err = run(v2_bpe_rope, "--data", small, "--out", folder, *flags)
        moved = {path.name: path.read_bytes() for path in (folder / f"previous-{number}").iterdir()}
        assert (status, err) == (0, "") and moved == old
        first = (folder / "log.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
        assert float(first[2]) == pytest.approx(best, rel=1e-6)
        starts.append(float(first[2]))
    assert starts[1] < starts[0]


def test_a_run_refused_moves_nothing(trained, tmp_path, small):
    shutil.copytree(trained[v2_bpe_rope], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    best = tmp_path / "run/best.pt"
    for flags in (["--init-from", tmp_path / "none.pt"], ["--init-from", tmp_path / "run/log.csv"],
                  ["--init-from", best, "--n-embd", 64], ["--block-size", 100_000], ["--n-head", 3]):
        assert run(v2_bpe_rope, "--data", small, "--out", tmp_path / "run", *flags, "--steps", 1)[0] == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_vocabulary_comes_with_the_tokenizer(trained, tmp_path, small):
    flags = ["--data", small, "--init-from", trained[v3_alibi] / "best.pt", "--out", tmp_path / "fine", "--steps", 1]
    flags += ["--max-new-tokens", 0]
    assert run(v3_alibi, *flags, "--vocab-size", 300)[0] == 0
    status, out, err = run(v3_alibi, *flags, "--vocab-size", 500)  # it has 300 tokens; more cannot be learned now
    assert status == 2 and err.count("\n") == 1


def test_load_and_generate_from_python(trained):
    from v3_alibi import generate, load

    model, tokenizer, config = load(trained[v3_alibi] / "best.pt")
    assert not model.training and config.block_size == 16 and next(model.parameters()).device.type == "cpu"
    new = list(generate(model, tokenizer.encode("Thrale:"), max_new_tokens=10, seed=1))
    assert len(new) == 10 and isinstance(tokenizer.decode(new), str)


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_checkpoint_is_plain_data(version, trained):
    best, last = (torch.load(trained[version] / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert best["version"] == version.__name__ and best["config"] == vars(version.load(trained[version] / "best.pt")[2])
    assert set(best) == set(last) == {"version", "config", "tokenizer", "model", "run"} and best["run"] is None
    assert last["run"].keys() == {"log", "data", "digests", "dtype", "init_from", "optimizer"}
    assert len(last["run"]["optimizer"]) == len(list(version.load(trained[version] / "last.pt")[0].parameters()))


def test_sampling_does_not_change_a_run(trained, tmp_path):
    """--sample-only replaces sample.txt and nothing else; the seed of the run is the default, and --seed another."""
    shutil.copytree(trained[v2_bpe_rope], tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    flags = ["--out", tmp_path / "run", "--sample-only", "--max-new-tokens", 20]
    assert run(v2_bpe_rope, *flags)[0] == 0  # as when it was trained
    assert {name: (tmp_path / "run" / name).read_bytes() for name in FILES} == before
    status, out, err = run(v2_bpe_rope, *flags, "--seed", 7)
    assert (status, err) == (0, "") and "with seed 7 " in out
    after = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    assert [name for name in FILES if after[name] != before[name]] == ["sample.txt"]
    model, tokenizer, _ = v2_bpe_rope.load(tmp_path / "run/best.pt")
    tokens = v2_bpe_rope.generate(model, tokenizer.encode("\n"), 20, temperature=0.8, seed=7)
    assert after["sample.txt"] == tokenizer.decode(list(tokens)).encode()


# -- the texts of the files --


def test_the_shared_halves_are_the_same_text():
    halves = [path.read_text(encoding="utf-8").split(MARKER) for path in SCRIPTS]
    assert all(len(parts) == 2 for parts in halves) and len({lower for _, lower in halves}) == 1


def test_no_script_imports_another():
    for path in SCRIPTS:
        imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not {other.stem for other in SCRIPTS} & set(imported)
        assert set(imported) <= {"numpy", "torch", "tqdm", "bpe_tokenizer"} | set(sys.stdlib_module_names)


def test_files_functions_and_diffs_stay_short():
    assert sum(diff_size("v1_transformer", "v2_bpe_rope")) <= 125
    assert sum(diff_size("v2_bpe_rope", "v3_alibi")) <= 60
    for path, limit in zip(SCRIPTS, (565, 700, 700, 650)):
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 120
        assert text.count("\n") <= limit and (MARKER + text.split(MARKER)[1]).count("\n") <= 450
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60
