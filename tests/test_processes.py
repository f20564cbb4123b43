"""The scripts as programs of their own: from start to sample, stopped with Ctrl-C, and as several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import v0_bigram
import v2_bpe_rope
from tests.conftest import ROOT, VERSIONS, ids, run, tiny_flags

FILES = ["best.pt", "last.pt", "log.csv", "result.json", "sample.txt"]

# Starts every script with --help, in one new process, since importing torch is the longest part of that.
HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("exit status", end.code)
"""

# What each of two processes runs: main, four times with other arguments, the last time exactly as the script does.
PROBE = """
import json, os, sys
import torch
sys.path.insert(0, {root!r})
import v2_bpe_rope as version

dist, models, init, evaluate = version.dist, [], version.dist.init_process_group, version.evaluate
store, rank, world = next(dist.rendezvous("env://"))

class Spy(version.LanguageModel):
    def __init__(self, *args):
        super().__init__(*args)
        models.append(self)

def call(number):
    models.clear()
    if number < 3:  # each process group but the last one needs a place of its own for its addresses
        own = dist.PrefixStore(str(number), store)
        dist.init_process_group = lambda backend: init(backend, store=own, rank=rank, world_size=world)
    else:
        dist.init_process_group = init
    try:
        status = version.main({calls!r}[number])
    except SystemExit as end:  # all but the first process leave train this way
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    if number > 1:
        torch.save(models[0].state_dict(), f"{{number}}.{{rank}}.weights")
    if dist.is_initialized():
        dist.destroy_process_group()
    return status

version.LanguageModel = Spy
statuses = [call(0)]
version.evaluate = lambda *args: float("nan")
statuses.append(call(1))
version.evaluate = evaluate
statuses += [call(2), call(3)]
with open(f"{{rank}}.json", "w", encoding="utf-8") as file:
    json.dump(statuses, file)
"""


def columns(folder, *names):
    """The rows of log.csv, of these columns, as numbers."""
    header, *rows = [line.split(",") for line in (folder / "log.csv").read_text(encoding="utf-8").splitlines()]
    return [[float(row[header.index(name)]) for name in names] for row in rows]


def last_step(folder):
    return torch.load(folder / "last.pt", weights_only=True)["run"]["log"][-1]["step"]


def script_flags(version):
    return ["--dtype", "float32", "--max-new-tokens", 30, *tiny_flags(version, steps=20, eval_interval=10, dropout=0.1)]


@pytest.fixture(scope="session")
def launched(tmp_path_factory, small):
    """All new processes of this file, started together: {name: (exit status, stdout, stderr)} and their folder."""
    folder, processes, results = tmp_path_factory.mktemp("processes"), {}, {}

    def start(name, *argv, **environment):
        """With one thread each, and outputs in files, so that none of them waits for us."""
        command = [sys.executable, *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", **environment}
        with open(folder / f"{name}.out", "wb") as out, open(folder / f"{name}.err", "wb") as err:
            cwd = ROOT if name == "help" else folder
            processes[name] = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd, env=environment)

    # What two processes do. Before: one process makes ten steps of a run; one process and two go on from there.
    flags = ["--data", small, "--dtype", "float32", "--max-new-tokens", 5]
    flags += tiny_flags(v2_bpe_rope, steps=10, eval_interval=5)
    assert run(v2_bpe_rope, *flags, "--out", folder / "one")[0] == 0
    shutil.copytree(folder / "one", folder / "one-then-two")
    calls = [
        [*flags, "--out", folder / "three-rows", "--batch-size", 3],
        [*flags, "--out", folder / "not-finite"],
        ["--out", folder / "one-then-two", "--resume", "--steps", 20, "--max-new-tokens", 5],
        [*flags, "--out", folder / "two"],
    ]
    probe = PROBE.format(root=str(ROOT), calls=[[str(part) for part in call] for call in calls])
    (folder / "probe.py").write_text(probe, encoding="utf-8")
    start("torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "probe.py")
    stop_flags = ["--data", small, "--out", "stopped run", *tiny_flags(v2_bpe_rope, steps=1_000_000, eval_interval=10)]
    start("ctrl-c", "-u", ROOT / "v2_bpe_rope.py", *stop_flags)
    for version in VERSIONS:  # one of them where a terminal knows ASCII only
        coding = "ascii" if version is v2_bpe_rope else "utf-8"
        argv = [ROOT / f"{version.__name__}.py", "--data", small, *script_flags(version)]
        start(version.__name__, *argv, PYTHONIOENCODING=coding)
    start("help", "-c", HELP, *(f"{version.__name__}.py" for version in VERSIONS))

    try:
        with open(folder / "ctrl-c.out", encoding="utf-8") as out:
            shown = ""
            while "\n      20 " not in shown:
                assert processes["ctrl-c"].poll() is None, (folder / "ctrl-c.err").read_text(encoding="utf-8")
                shown += out.read()
        processes["ctrl-c"].send_signal(signal.SIGINT)
        for name, process in processes.items():
            status = process.wait(timeout=100)
            outputs = [(folder / f"{name}.{end}").read_bytes().decode() for end in ("out", "err")]
            results[name] = (status, *outputs)
    finally:
        for process in processes.values():  # none is left after an error; torchrun ends its own on SIGTERM
            process.terminate()
    return SimpleNamespace(folder=folder, **results)


# -- one process --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_script_runs_from_start_to_sample(version, launched, tmp_path, monkeypatch):
    """Trains, then goes on with --resume, then samples: the first in a new process, with the default --out."""
    name, folder = version.__name__, launched.folder / "runs" / version.__name__
    status, out, err = getattr(launched, name)
    assert (status, err) == (0, "")  # without a terminal there is no progress bar
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert out.startswith(f"{name} on ") and "parameters: " in out and "plan: 20 steps of 12 x 16 tokens" in out
    table = r"\n    step  train loss  val loss  perplexity  bits per byte   tokens/s\n"
    table += r" {7}0           -    \d\.\d{4} +[\d.]+ +\d\.\d{4} +0\n"
    table += r"(      [12]0      \d\.\d{4}    \d\.\d{4} +[\d.]+ +\d\.\d{4} +[\d,]+\n){2}best val loss "
    assert re.search(table, out), out
    assert re.search(rf"^> {name} +20 ", out, re.MULTILINE)  # its line in the table
    line = f"\nSample from runs/{name}/best.pt with seed 1337 (another --seed gives another sample):\n"
    introduction, sample = re.split(re.sub(r"([().])", r"\\\1", line).replace(" ", r"\s+"), out)  # folded or not
    coding = "ascii" if version is v2_bpe_rope else "utf-8"
    text = (folder / "sample.txt").read_bytes().decode()
    assert sample == text.encode(coding, "replace").decode(coding) + "\n"
    assert all(len(line) <= 80 for line in introduction.splitlines())

    shutil.copytree(launched.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(version, "--resume", "--steps", 30, "--max-new-tokens", 5)
    assert (status, err) == (0, "") and "\n      30 " in out and "\n      20 " not in out
    assert json.loads((tmp_path / f"runs/{name}/result.json").read_bytes())["steps"] == 30

    flags = ["--sample-only", "--prompt", "Thrale:", "--max-new-tokens", 20, "--temperature", 0.5, "--seed", 3]
    status, out, err = run(version, *flags, "--top-k", 5, "--top-p", 0.9)
    assert (status, err) == (0, "") and out.startswith(f"Sample from runs/{name}/best.pt with seed 3 (another")
    assert out.split("sample):\n")[1] == (tmp_path / f"runs/{name}/sample.txt").read_bytes().decode() + "\n"
    assert out.split("sample):\n")[1].startswith("Thrale:")


def test_another_process_gets_the_same_numbers(launched, tmp_path, small):
    """Also: the settings of an untouched Config are the flags' defaults."""
    for version in VERSIONS[2:]:
        assert run(version, "--data", small, "--out", tmp_path / version.__name__, *script_flags(version))[0] == 0
        here, there = tmp_path / version.__name__, launched.folder / "runs" / version.__name__
        one, two = (torch.load(folder / "best.pt", weights_only=True)["model"] for folder in (here, there))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert (here / "sample.txt").read_bytes() == (there / "sample.txt").read_bytes()


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_help_explains_every_flag_in_80_columns(version, launched):
    status, out, err = launched.help
    out = out.split("exit status 0\n")[VERSIONS.index(version)]
    assert (status, err) == (0, "") and out.startswith(version.__name__[:2] + ": ")
    entries = dict(re.findall(r"^  (?:-h, )?--([\w-]+)(.*(?:\n {10,}.+)*)", out, re.MULTILINE))
    fields = version.Config.__dataclass_fields__.values()
    more = "help data out device dtype compile resume init-from sample-only chat prompt max-new-tokens temperature "
    more = (more + "top-k top-p").split()
    assert list(entries) == ["help"] + [field.name.replace("_", "-") for field in fields] + more[1:]
    entries = {name: " ".join(entry.split()) for name, entry in entries.items()}
    for field in fields:
        assert re.fullmatch(rf"N .{{10,}} \(default {field.default}\)", entries[field.name.replace("_", "-")]), field
    for name, default in {"data": "input.txt", "out": f"runs/{version.__name__}", "max-new-tokens": 400,
                          "temperature": 0.8, "top-k": 0, "top-p": 1.0}.items():  # fmt: skip
        assert f"(default {default})" in entries[name]
    assert all(len(entry.split()) > 1 for entry in entries.values())  # none is without words
    assert all("auto: " in entries[name] for name in ("device", "dtype"))
    options = out[out.index("\noptions:\n"):].splitlines()
    assert max(map(len, options)) <= 80


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_the_introduction_of_help_fits_80_columns_too(version, launched):
    out = launched.help[1].split("exit status 0\n")[VERSIONS.index(version)]
    assert " ".join(out.split("options:")[0].split()) == " ".join(version.__doc__.split("\n\n")[0].split())
    assert max(map(len, out[:out.index("\noptions:\n")].splitlines())) <= 80


def test_ctrl_c_ends_a_run_with_one_line_that_says_how_to_go_on(launched):
    """No matter where it comes: the step that the line names is the one that is saved."""
    status, out, err = getattr(launched, "ctrl-c")
    folder = launched.folder / "stopped run"
    line = out[out.index("stopped;"):]
    assert (status, err) == (130, "")
    assert line == f"stopped; --out stopped run --resume starts at step {last_step(folder)}\n"
    assert sorted(p.name for p in folder.iterdir()) == FILES[:3] and last_step(folder) >= 10


# -- several processes --


def test_two_processes_end_cleanly_with_one_set_of_messages(launched):
    status, out, err = launched.torchrun
    statuses = [json.loads((launched.folder / f"{rank}.json").read_bytes()) for rank in (0, 1)]
    assert status == 0 and statuses == [[2, 1, 0, 0]] * 2, (status, statuses, err)
    # two of the four calls are refused, each by one line of one process; nothing warns
    assert re.sub(r"^bpe_tokenizer.py: this text .*\n", "", err, flags=re.MULTILINE) == (
        "v2_bpe_rope.py: error: --batch-size 3 cannot be divided evenly among 2 processes\n"
        "v2_bpe_rope.py: error: the loss is not finite at step 0: try a lower --learning-rate\n"), err  # fmt: skip
    assert not (launched.folder / "three-rows").exists() and not list((launched.folder / "not-finite").iterdir())
    whole = out[out.rindex("v2_bpe_rope on cpu in float32, 2 processes"):]
    for part in ("data: ", "plan: ", "    step  train loss", "\n       0 ", "\n       5 ", "\n      10 ", "best val loss",
                 "\n> two ", "Sample from "):  # fmt: skip
        assert whole.count(part) == 1, part
    assert whole.endswith((launched.folder / "two/sample.txt").read_bytes().decode() + "\n")
    assert sorted(p.name for p in (launched.folder / "two").iterdir()) == FILES


def same_weights(folder, number):
    one, two = (torch.load(folder / f"{number}.{rank}.weights", weights_only=True) for rank in (0, 1))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_follow_the_losses_of_one(launched):
    one, two = (columns(launched.folder / name, "step", "train_loss", "val_loss") for name in ("one", "two"))
    assert sum(one[1:], []) == pytest.approx(sum(two[1:], []), abs=1e-5) and one[0][2] == two[0][2]
    assert same_weights(launched.folder, 3)
    result = json.loads((launched.folder / "two/result.json").read_bytes())
    assert result["steps"] == 10 and result["config"]["batch_size"] == 12


def test_a_run_goes_on_with_another_number_of_processes(launched, tmp_path):
    """Ten steps of one and ten of two processes, and the reverse, against twenty of one."""
    for name in ("one", "two"):
        shutil.copytree(launched.folder / name, tmp_path / name)
        flags = ["--resume", "--steps", 20, "--max-new-tokens", 0]
        assert run(v2_bpe_rope, "--out", tmp_path / name, *flags)[0] == 0
    folders = tmp_path / "one", launched.folder / "one-then-two", tmp_path / "two"
    losses = [sum(columns(folder, "step", "train_loss", "val_loss")[1:], []) for folder in folders]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5) and same_weights(launched.folder, 2)


class Enough(Exception):
    """What we wanted to see has happened."""


@pytest.mark.parametrize("processes, gpus, backend", [(2, 2, "nccl"), (2, 8, "nccl"), (4, 2, "gloo"), (2, 0, "gloo")])
def test_several_processes_talk_over_nccl_where_each_has_a_gpu(processes, gpus, backend, monkeypatch):
    """Two processes cannot share a GPU over NCCL, so with fewer GPUs they use gloo."""
    names, device = [], torch.device("cuda" if gpus else "cpu")
    monkeypatch.setattr(v0_bigram, "WORLD", processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    def init(name):
        names.append(name)
        raise Enough

    monkeypatch.setattr(v0_bigram.dist, "init_process_group", init)
    model = v0_bigram.LanguageModel(v0_bigram.Config(), 10)
    with pytest.raises(Enough):
        state = SimpleNamespace(model=model, config=model.config, optimizer={}, device=device)
        v0_bigram.train(state, SimpleNamespace(compile=False))
    assert names == [backend]


def test_processes_exchange_tensors_of_the_training_device(monkeypatch):
    """NCCL can do no other. "meta", a device of PyTorch's that computes nothing, stands for a GPU."""
    seen, device = [], torch.device("meta")
    model = v0_bigram.LanguageModel(v0_bigram.Config(steps=3), 10).to(device)

    def all_reduce(tensor):
        seen.append(tensor.device)
        raise Enough

    def wrap(module, **settings):
        seen.append(next(module.parameters()).device)
        return module

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(v0_bigram, "WORLD", 2)
    monkeypatch.setattr(v0_bigram, "RANK", 1)
    monkeypatch.setattr(v0_bigram, "make_optimizer", lambda model, state: torch.optim.SGD(model.parameters()))
    monkeypatch.setattr(v0_bigram.dist, "init_process_group", lambda name: None)
    monkeypatch.setattr(v0_bigram.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(v0_bigram.nn.parallel, "DistributedDataParallel", wrap)
    state = dict(model=model, config=model.config, optimizer={}, device=device, step=0, log=[{"step": 0}])
    state.update(tokens=torch.empty(500, dtype=torch.int, device=device), autocast=v0_bigram.nullcontext())
    with pytest.raises(Enough):
        v0_bigram.train(SimpleNamespace(**state), SimpleNamespace(compile=False, resume=True))
    assert seen == [device, device]
