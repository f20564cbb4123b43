"""The scripts as programs of their own: from start to sample, stopped with Ctrl-C, and as several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import v0_bigram
import v2_bpe_rope
from tests.conftest import FILES, ROOT, VERSIONS, ids, last_step, log_of, result_of, run, tiny_flags

# What each of two processes runs: main, five times with other arguments, the last time exactly as the script does.
PROBE = """
import json, os, sys
import torch
sys.path.insert(0, {root!r})
import v2_bpe_rope as version

dist, models, masks = version.dist, [], []
init, evaluate = dist.init_process_group, version.evaluate
store, rank, world = next(dist.rendezvous("env://"))

class Spy(version.LanguageModel):
    def __init__(self, *args):
        super().__init__(*args)
        models.append(self)
        self.dropout.register_forward_hook(self.note)

    def note(self, dropout, inputs, output):
        if dropout.p > 0 and dropout.training:
            masks.append(output == 0)

def call(number):
    models.clear()
    if number < 4:  # each process group but the last one needs a place of its own for its addresses
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
statuses += [call(2), call(3), call(4)]
torch.save(masks, f"{{rank}}.masks")
with open(f"{{rank}}.json", "w", encoding="utf-8") as file:
    json.dump(statuses, file)
"""


def columns(folder, *names):
    """The rows of log.csv, of these columns, as numbers."""
    return [[float(row[name]) for name in names] for row in log_of(folder)]


def script_flags(version):
    flags = tiny_flags(version, steps=20, eval_interval=10, dropout=0.1)
    return ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 30, *flags]


@pytest.fixture(scope="session")
def launching(tmp_path_factory, small):
    """All new processes of this file, started together: their folder, and {name: process}."""
    folder, processes = tmp_path_factory.mktemp("processes"), {}

    def start(name, *argv, **environment):
        """With one thread each, and outputs in files, so that none of them waits for us."""
        command = [sys.executable, *map(str, argv)]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **environment}
        with open(folder / f"{name}.out", "wb") as out, open(folder / f"{name}.err", "wb") as err:
            processes[name] = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=environment)

    # What two processes do. Before: one process makes ten steps of a run; one process and two go on from there.
    flags = ["--data", small, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 5]
    flags += tiny_flags(v2_bpe_rope, steps=10, eval_interval=5)
    assert run(v2_bpe_rope, *flags, "--out", folder / "one")[0] == 0
    shutil.copytree(folder / "one", folder / "one-then-two")
    calls = [
        [*flags, "--out", folder / "three-rows", "--batch-size", 3],
        [*flags, "--out", folder / "not-finite"],
        ["--out", folder / "one-then-two", "--resume", "--steps", 20, "--max-new-tokens", 5],
        [*flags, "--out", folder / "dropout", "--dropout", 0.25, "--steps", 2],
        [*flags, "--out", folder / "two"],
    ]
    probe = PROBE.format(root=str(ROOT), calls=[[str(part) for part in call] for call in calls])
    (folder / "probe.py").write_text(probe, encoding="utf-8")
    start("torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "probe.py")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as it is where tests run in the background
    stop_flags = ["--data", small, "--out", "stopped run", *tiny_flags(v2_bpe_rope, steps=1_000_000, eval_interval=10)]
    start("ctrl-c", "-u", ROOT / "v2_bpe_rope.py", *stop_flags)
    for version in VERSIONS:  # one of them where a terminal knows ASCII only
        coding = "ascii" if version is v2_bpe_rope else "utf-8"
        argv = [ROOT / f"{version.__name__}.py", "--data", small, *script_flags(version)]
        start(version.__name__, *argv, PYTHONIOENCODING=coding)

    def press_ctrl_c():
        shown = folder / "ctrl-c.out"
        while b"\n      20 " not in shown.read_bytes() and processes["ctrl-c"].poll() is None:
            time.sleep(0.1)
        processes["ctrl-c"].send_signal(signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    yield folder, processes
    for process in processes.values():  # none is left after an error; torchrun ends its own on SIGTERM
        process.terminate()


@pytest.fixture(scope="session")
def launched(launching):
    """When they have ended: {name: (exit status, stdout, stderr)} and their folder."""
    folder, processes = launching
    results = {"folder": folder}
    for name, process in processes.items():
        status = process.wait(timeout=300)
        results[name] = status, *((folder / f"{name}.{end}").read_bytes().decode() for end in ("out", "err"))
    return SimpleNamespace(**results)


def test_all_processes_start(launching):
    """Before all other tests, which run meanwhile (see conftest.py): starting takes a process some seconds."""
    assert len(launching[1]) == 6


# -- one process --


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_script_runs_from_start_to_sample(version, launched, tmp_path, monkeypatch):
    """Trains, then goes on with --resume, then samples: the first in a new process, with the default --out."""
    name, folder = version.__name__, launched.folder / "runs" / version.__name__
    status, out, err = getattr(launched, name)
    assert (status, err) == (0, "") and "it/s" not in out  # in a pipe there is no progress bar
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
    assert result_of(tmp_path / "runs" / name)["steps"] == 30

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
def test_help_explains_every_flag_in_80_columns(version, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(version, "--help")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    introduction = out[:out.index("\n\noptions:\n")]
    assert introduction.split() == version.__doc__.split("\n\n")[0].split()
    entries = dict(re.findall(r"^  (?:-h, )?--([\w-]+)(.*(?:\n {10,}.+)*)", out, re.MULTILINE))
    fields = version.Config.__dataclass_fields__.values()
    more = "help data out device dtype compile resume init-from sample-only chat prompt max-new-tokens temperature "
    more = (more + "top-k top-p").split()
    assert list(entries) == ["help"] + [field.name.replace("_", "-") for field in fields] + more[1:]
    entries = {name: " ".join(entry.split()) for name, entry in entries.items()}
    for field in fields:
        assert re.fullmatch(rf"N .{{10,}} \(default {field.default}\)", entries[field.name.replace("_", "-")]), field
    defaults = {"data": "input.txt", "out": f"runs/{version.__name__}", "max-new-tokens": 400, "temperature": 0.8}
    for name, default in {**defaults, "top-k": 0, "top-p": 1.0}.items():
        assert f"(default {default})" in entries[name]
    assert all(len(entry.split()) > 1 for entry in entries.values())  # none is without words
    assert all("auto: " in entries[name] for name in ("device", "dtype"))


def test_ctrl_c_ends_a_run_with_one_line_that_says_how_to_go_on(launched):
    """The step that the line names is saved. (Just after a step is saved, it may still name the one before, 10 earlier:
    test_robust.py holds it to the right one at every write.)"""
    status, out, err = getattr(launched, "ctrl-c")
    folder = launched.folder / "stopped run"
    line = re.fullmatch(r"stopped; --out stopped run --resume starts at step (\d+)\n", out[out.index("stopped;"):])
    assert (status, err) == (130, "") and last_step(folder) - int(line[1]) in (0, 10)
    assert sorted(p.name for p in folder.iterdir()) == FILES[:3] and last_step(folder) >= 10


# -- several processes --


def test_two_processes_end_cleanly_with_one_set_of_messages(launched):
    status, out, err = launched.torchrun
    statuses = [json.loads((launched.folder / f"{rank}.json").read_bytes()) for rank in (0, 1)]
    assert status == 0 and statuses == [[2, 1, 0, 0, 0]] * 2, (status, statuses, err)
    # two of the five calls are refused, each by one line of one process; nothing warns
    assert re.sub(r"^(bpe_tokenizer.py: this text |.*NOTE: Redirects are).*\n", "", err, flags=re.MULTILINE) == (
        "v2_bpe_rope.py: error: --batch-size 3 cannot be divided evenly among 2 processes\n"
        "v2_bpe_rope.py: error: the loss is not finite at step 0: try a lower --learning-rate\n"), err
    assert not (launched.folder / "three-rows").exists() and not list((launched.folder / "not-finite").iterdir())
    whole = out[out.rindex("v2_bpe_rope on cpu in float32, 2 processes"):]
    rows = "\n    step  train loss", "\n       0 ", "\n       5 ", "\n      10 "
    for part in ("data: ", "plan: ", *rows, "best val loss", "\n> two ", "Sample from "):
        assert whole.count(part) == 1, part
    assert whole.endswith((launched.folder / "two/sample.txt").read_bytes().decode() + "\n")
    assert sorted(p.name for p in (launched.folder / "two").iterdir()) == FILES


def same_weights(folder, number):
    one, two = (torch.load(folder / f"{number}.{rank}.weights", weights_only=True) for rank in (0, 1))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_follow_the_losses_of_one(launched):
    one, two = (columns(launched.folder / name, "step", "train_loss", "val_loss") for name in ("one", "two"))
    assert sum(one[1:], []) == pytest.approx(sum(two[1:], []), abs=1e-5) and one[0][2] == two[0][2]
    assert same_weights(launched.folder, 4)
    result = result_of(launched.folder / "two")
    assert result["steps"] == 10 and result["config"]["batch_size"] == 12


def test_each_process_drops_other_activations_and_all_keep_the_same_weights(launched):
    """The same mask for all would drop the same places of different rows: less random than in one process."""
    one, two = (torch.load(launched.folder / f"{rank}.masks", weights_only=True) for rank in (0, 1))
    assert len(one) == len(two) == 2  # steps
    masks = [*one, *two]
    assert all(0.2 < mask.float().mean() < 0.3 for mask in masks)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert same_weights(launched.folder, 3)


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
