"""What the tests share: the four versions, a small text, and tiny settings with which a run takes a second."""

import contextlib
import csv
import functools
import inspect
import io
import json
from pathlib import Path

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi

torch.set_num_threads(1)  # models as tiny as these gain nothing from more
inspect.getsource = functools.cache(inspect.getsource)  # main parses its whole file for the help texts, each time
ROOT = Path(__file__).resolve().parent.parent
VERSIONS = [v0_bigram, v1_transformer, v2_bpe_rope, v3_alibi]
TRANSFORMERS = VERSIONS[1:]
FILES = ["best.pt", "last.pt", "log.csv", "result.json", "sample.txt"]  # what a run leaves in its folder
TINY = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300}


def tiny_settings(version, settings):
    """The tiny settings and these, as far as the version has them."""
    fields = version.Config.__dataclass_fields__
    return {name: value for name, value in {**TINY, **settings}.items() if name in fields}


def tiny_config(version, **settings):
    """A Config with tiny settings."""
    return version.Config(**tiny_settings(version, settings))


def tiny_model(version, vocab_size=50, seed=0, **settings):
    """A tiny model with random weights, larger than at the start of training so that every part of it matters."""
    torch.manual_seed(seed)
    model = version.LanguageModel(tiny_config(version, **settings), vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() < 2 else 0.0, 0.3)
    return model


def tiny_flags(version, **settings):
    """The tiny settings as command line flags."""
    pairs = tiny_settings(version, settings).items()
    return [part for name, value in pairs for part in ("--" + name.replace("_", "-"), str(value))]


def run(version, *argv):
    """Call a version's main in this process: (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = version.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse, and a run that diverges, end this way
            status = stop.code
            if isinstance(status, str):
                err.write(status + "\n")
                status = 1
    return status, out.getvalue(), err.getvalue()


def short_run(version, data, out, *argv, **settings):
    """Start a run of a few steps: (exit status, stdout, stderr)."""
    settings = {"steps": 1, "eval_interval": 1, "block_size": 8, **settings}
    return run(version, "--data", data, "--out", out, "--max-new-tokens", 3, *tiny_flags(version, **settings), *argv)


def result_of(folder):
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def log_of(folder):
    """The rows of log.csv of a run, as text."""
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def last_step(folder):
    """The step from which --resume goes on."""
    return torch.load(folder / "last.pt", weights_only=True)["run"]["log"][-1]["step"]


def said(out):
    """What a program printed, without the line breaks at column 80."""
    return " ".join(out.split())


def ids(version):
    return version.__name__


def pytest_collection_modifyitems(items):
    """The processes that test_processes.py examines start before the first test, since they run beside the others."""
    items.sort(key=lambda item: item.name != "test_all_processes_start")


@pytest.fixture(scope="session")
def text():
    return (ROOT / "input.txt").read_text(encoding="utf-8")[:60_000]


@pytest.fixture(scope="session")
def small(tmp_path_factory, text):
    """A file with the first 60,000 characters of our corpus."""
    path = tmp_path_factory.mktemp("data") / "small.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def little(tmp_path_factory, text):
    """A file so short that a run of v0 takes a few hundredths of a second."""
    path = tmp_path_factory.mktemp("little") / "little.txt"
    path.write_text(text[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small):
    """A finished tiny run of every version: {version: its folder}."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {version: folder / version.__name__ for version in VERSIONS}
    for version, out_folder in runs.items():
        flags = ["--data", small, "--out", out_folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 20]
        status, out, err = run(version, *flags, *tiny_flags(version, steps=30, eval_interval=10))
        assert status == 0, err
    return runs
