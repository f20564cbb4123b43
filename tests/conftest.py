"""What the tests share: the four versions, a small text, and tiny settings with which a run takes a second."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi

torch.set_num_threads(1)  # models as tiny as these gain nothing from more
ROOT = Path(__file__).resolve().parent.parent
VERSIONS = [v0_bigram, v1_transformer, v2_bpe_rope, v3_alibi]
TRANSFORMERS = VERSIONS[1:]
TINY = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300}


def tiny_config(version, **settings):
    """A Config with tiny settings, those of them that the version has."""
    fields = version.Config.__dataclass_fields__
    return version.Config(**{k: v for k, v in {**TINY, **settings}.items() if k in fields})


def tiny_model(version, vocab_size=50, seed=0, **settings):
    """A tiny model with random weights, larger than at the start of training so that every part of it matters."""
    torch.manual_seed(seed)
    model = version.LanguageModel(tiny_config(version, **settings), vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() < 2 else 0.0, 0.3)
    return model


def tiny_flags(version, **settings):
    """The same settings as command line flags."""
    fields = version.Config.__dataclass_fields__
    pairs = [(k, v) for k, v in {**TINY, **settings}.items() if k in fields]
    return [part for k, v in pairs for part in ("--" + k.replace("_", "-"), str(v))]


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


def ids(version):
    return version.__name__


@pytest.fixture(scope="session")
def text():
    return (ROOT / "input.txt").read_text()[:60_000]


@pytest.fixture(scope="session")
def small(tmp_path_factory, text):
    """A file with the first 60,000 characters of our corpus."""
    path = tmp_path_factory.mktemp("data") / "small.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small):
    """A finished tiny run of every version: {version: its folder}."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for version in VERSIONS:
        runs[version] = folder / version.__name__
        status, out, err = run(
            version,
            "--data",
            small,
            "--out",
            runs[version],
            "--dtype",
            "float32",
            "--steps",
            30,
            "--eval-interval",
            10,
            "--max-new-tokens",
            20,
            *tiny_flags(version),
        )
        assert status == 0, err
    return runs
