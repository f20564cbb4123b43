"""tests.check_gpu on the CPU; and, for a GPU that is not there, devices and types of all that the models compute."""

import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import v3_alibi
from tests import check_gpu
from tests.conftest import TRANSFORMERS, VERSIONS, ids


def test_every_row_runs_on_the_cpu(tmp_path, small, monkeypatch, capsys):
    """Except torchrun, which test_processes runs; and --compile does not wait for a compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(check_gpu, "torchrun", lambda setup, version: 1 / 0)
    table = tmp_path / "gpu.md"
    assert check_gpu.main(["--device", "cpu", "--data", str(small), "--output", str(table)]) == 1
    lines = table.read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[-3] == "| torchrun | v2_bpe_rope | failed | ZeroDivisionError: division by zero |"
    rows = [line.split(" | ") for line in lines[2:-3]]
    assert len(rows) == 20 and [row for row in rows if row[2] != "passed"] == []
    assert "torch 2." in lines[-1] and "CUDA" in lines[-1]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert not check_gpu.main([]) and capsys.readouterr().out.count("\n") == 1


class Record(TorchDispatchMode):
    """Keeps (operation, type, device) of every tensor that is computed."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)]
        self.seen = getattr(self, "seen", []) + [(str(operation), t.dtype, t.device.type) for t in tensors]
        return result


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_a_training_step_stays_on_its_device(version):
    """On the device "meta", which only follows shapes: a tensor made without `device=` would be on the CPU."""
    with torch.device("meta"):
        model, idx = version.LanguageModel(version.Config(), 1024), torch.zeros(2, 64, dtype=torch.long)
    with Record() as record:
        model(idx, idx)[1].backward()
    assert {device for _, _, device in record.seen} == {"meta"}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_what_a_cuda_gpu_computes_in_bfloat16(version, monkeypatch):
    """Fake tensors that say they are on a GPU: autocast takes bfloat16 for matrix products, not for LayerNorm."""
    with torch.device("meta"):
        model = version.LanguageModel(version.Config(), 1024)
    with FakeTensorMode(), torch.no_grad(), Record() as record:
        named = [*model.named_parameters(), *model.named_buffers()]
        weights = {name: torch.empty(x.shape, device="cuda") for name, x in named}
        idx, bias = torch.zeros(2, 64, dtype=torch.long, device="cuda"), torch.empty(1, 8, 64, 64, device="cuda")
        if version is v3_alibi:  # PyTorch without CUDA cannot index in it
            monkeypatch.setattr(model, "positional_encoding", lambda start, end: bias)
        record.seen = []
        torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses where there is no GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            loss = torch.func.functional_call(model, weights, (idx, idx))[1]
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    products = [dtype for name, dtype, _ in record.seen if name.startswith("aten.mm.")]
    assert len(products) == 4 * 4 + 1 and set(products) == {torch.bfloat16} and loss.dtype == torch.float32
    assert {device for _, _, device in record.seen} == {"cuda"}
    assert {dtype for name, dtype, _ in record.seen if "layer_norm" in name} == {torch.float32}
