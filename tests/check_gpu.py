"""Check the four versions on a GPU and measure them there. Writes a Markdown table, each row passed or failed.

    python -m tests.check_gpu --data tinyshakespeare.txt --output tests/results/gpu.md    at most ten minutes
    python -m tests.check_gpu --quick                                                     about a minute

A row that raises has failed; the next one runs. The exit status is 1 if a row failed. Without a GPU nothing is checked.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import v0_bigram as v0  # before torch, for which it makes a setting
import v1_transformer as v1
import v2_bpe_rope as v2
import v3_alibi as v3

import torch

from tests.compare import ROOT, machine

# nanoGPT's config/train_shakespeare_char.py; its README gives a loss of 1.4697 after about 3 minutes on an A100
RECIPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2, "steps": 5000,
          "learning_rate": 1e-3, "weight_decay": 0.1, "eval_interval": 250}
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "vocab_size": 260, "steps": 10}
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "T4": 65, "4090": 165}  # TFLOP/s, bfloat16 (T4: float16)


def new_model(version, settings, random=False):
    """A model and its vocabulary's size. If random, its weights are large enough that every part of it matters."""
    config = version.Config(**{name: value for name, value in settings.items() if hasattr(version.Config, name)})
    torch.manual_seed(0)
    model = version.LanguageModel(config, vocab_size := getattr(config, "vocab_size", 65)).eval()
    for p in model.parameters() if random else ():
        torch.nn.init.normal_(p, 1.0 if p.dim() < 2 else 0.0, p.shape[-1] ** -0.5)
    return model, vocab_size


def train(setup, version, name, *flags, processes=1, **settings):
    """Run a version's program; returns its result and the validation losses of its evaluations."""
    settings = {} if flags else {"data": setup.text, **setup.sizes, **settings}
    settings = {k: v for k, v in settings.items() if k in ("data", "dtype") or hasattr(version.Config, k)}
    settings |= {"out": setup.folder / name, "device": setup.device.type, "max_new_tokens": 0}
    argv = [*flags, *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]
    if processes == 1:
        with redirect_stdout(sys.stderr):
            status = version.main(argv)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        status = subprocess.run([*command, version.__file__, *argv], stdout=2, timeout=200).returncode  # 2: stderr
    if status:
        raise RuntimeError(f"exit status {status}, with a message on stderr")
    rows = (settings["out"] / "log.csv").read_text(encoding="utf-8").splitlines()[1:]
    return json.loads((settings["out"] / "result.json").read_bytes()), [float(row.split(",")[2]) for row in rows]


@torch.inference_mode()
def logits(setup, version):
    """A row of the table: like all functions from here on, returns (passed, or None if it was left out; figures)."""
    model, vocab_size = new_model(version, setup.sizes, random=True)
    idx, errors = torch.randint(vocab_size, (8, model.config.block_size)), []
    expected = model(idx)[0]
    model.to(setup.device)
    for bfloat16 in (False, True):
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=bfloat16):
            difference = model(idx.to(setup.device))[0].float().cpu() - expected
        errors.append((difference.abs().max() / expected.abs().max()).item())
    figures = "largest difference from float32 on the CPU / largest logit: float32 {:.0e}, bfloat16 {:.0e}"
    return errors[0] < 1e-4 and errors[1] < 0.03, figures.format(*errors)  # one rounding to bfloat16: up to 0.002


def default_run(setup, version):
    """The loss may differ from that on the CPU as losses of different seeds do."""
    result, curve = train(setup, version, version.__name__)
    loss, figures = result["val_loss"], "{steps:,} steps, {train_seconds:.1f} s, {val_loss:.4f}".format(**result)
    runs = json.loads((ROOT / "tests/results/input.json").read_bytes())["runs"]
    if runs := [r for r in runs if r["version"] == version.__name__ and r["steps"] == result["steps"]]:
        seconds, cpu = (statistics.mean(r[key] for r in runs) for key in ("train_seconds", "val_loss"))
        return abs(loss - cpu) < 0.03, figures + f"; CPU: {seconds:.1f} s, {cpu:.4f}"
    return loss < curve[0], figures


def resume(setup, version):
    """With dropout, stop a run at its middle, resume it, and compare it with one that was not stopped."""
    half, rate = setup.short // 2, version.learning_rate
    settings = {"dropout": 0.1, "steps": 2 * half, "eval_interval": half}
    whole = train(setup, version, "whole", **settings)[1]
    stopping = mock.patch.object(version, "learning_rate", lambda *now: rate(*now) if now[0] <= half else sys.exit())
    with stopping, suppress(SystemExit):
        train(setup, version, "parts", **settings)
    parts = train(setup, version, "parts", "--resume")[1]
    figures = f"{2 * half} steps: val loss {whole[-1]:.6f}, stopped at {half} and resumed {parts[-1]:.6f}"
    return len(whole) == len(parts) and abs(whole[-1] - parts[-1]) < 0.01, figures


def greedy_generation(setup, version):
    model, count = new_model(version, setup.sizes, random=True)[0].to(setup.device), setup.short
    tokens = list(version.generate(model, [1], count, temperature=0))
    model.to("cpu" if version is v1 else setup.device)
    expected = list(version.generate(model, [1], count, temperature=0, use_cache=False))
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    return same == count, f"{same} of {count} tokens as {'on the CPU' if version is v1 else 'without the cache'}"


def training_step(setup, version, compiled=False):
    """At the sizes of nanoGPT's recipe: the first step, a later one, memory at the peak, floating-point speed."""
    torch.compiler.reset()  # frees what an earlier row has compiled
    model, vocab_size = new_model(version, setup.recipe)
    config, on, gpu = model.train().to(setup.device).config, setup.device.type, getattr(torch, setup.device.type)
    optimizer, trained = version.make_optimizer(model, {}), torch.compile(model) if compiled else model
    tokens = torch.randint(vocab_size, (100_000,), dtype=torch.int32, device=on)
    memory, seconds, steps = 0, [], 1 if on == "cpu" else 10
    for turn in range(5):  # the first step, then a warm-up and three times the same number of steps
        getattr(gpu, "reset_peak_memory_stats", int)()  # CUDA has it
        started = time.perf_counter()
        for step in range(steps if turn else 1):
            idx, targets = version.get_batch(tokens, config, step)
            with torch.autocast(on, torch.bfloat16, enabled=setup.dtype == "bfloat16"):
                loss = trained(idx, targets)[1]
            memory = gpu.current_allocated_memory() if on == "mps" else 0  # with all activations: mps keeps no maximum
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        gpu.synchronize()
        seconds.append(time.perf_counter() - started)
    memory, later = gpu.max_memory_allocated() if on == "cuda" else memory, statistics.median(seconds[2:]) / steps
    # PaLM (Chowdhery et al. 2022), appendix B. Positions are only looked up; the token embedding is also a layer.
    weights = sum(p.numel() for name, p in model.named_parameters() if "position" not in name)
    flops = 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size  # per token, forward and backward
    speed = flops * config.batch_size * config.block_size / later / 1e12
    peak = next((peak for word, peak in PEAKS.items() if word in setup.name.replace("-", " ").split()), None)
    return memory > 0 or on == "cpu", (
        f"{setup.dtype}: first {seconds[0]:.1f} s, later {1000 * later:.1f} ms, {memory / 2**20:,.0f} MiB, "
        f"{speed:.3g} TFLOP/s" + (f", {speed / peak:.1%} of the GPU's {peak}" if peak else ""))


def nanogpts_recipe(setup, version):
    if not setup.data:
        return None, "needs --data tinyshakespeare.txt"
    result, curve = train(setup, version, f"{version.__name__}-recipe", **{**setup.recipe, "data": setup.data})
    nats, full = result["val_loss"] * result["tokens_per_byte"], result["steps"] == RECIPE["steps"]
    figures = "{steps:,} steps, {train_seconds:.1f} s, ".format(**result) + f"{nats:.4f} nats per character"
    return nats < 1.55 if full else result["val_loss"] < curve[0], figures + "; nanoGPT: A100, 3 minutes, 1.4697" * full


def torchrun(setup, version):
    count = max(2, torch.cuda.device_count())
    settings = {"steps": setup.short, "eval_interval": setup.short // 2, "batch_size": 6 * count, "dtype": "float32"}
    one, several = (train(setup, version, f"by {n}", processes=n, **settings)[1] for n in (1, count))
    figures = f"{setup.short} steps: val loss {several[-1]:.5f} by {count} processes, {one[-1]:.5f} by one"
    return max(abs(a - b) for a, b in zip(one, several, strict=True)) < 5e-3, figures  # equal up to rounding


def main(argv=None):
    parser = argparse.ArgumentParser(prog="check_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="cpu: tiny sizes")
    parser.add_argument("--data", type=Path, metavar="FILE", help="tinyshakespeare.txt, for nanoGPT's recipe")
    parser.add_argument("--quick", action="store_true", help="200 steps of each run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table to this file, too")
    args = parser.parse_args(argv)
    device, dtype = v2.pick_device(argparse.Namespace(device=args.device, dtype="auto"))
    if args.device == "auto" and device.type == "cpu":
        return print("check_gpu: PyTorch finds no GPU here, so nothing was checked")
    tiny, name = device.type == "cpu", torch.cuda.get_device_name() if device.type == "cuda" else device.type
    sizes = TINY if tiny else {"steps": 200} if args.quick else {}
    rows = [("logits", logits, (v0, v1, v2, v3)), ("default run", default_run, (v0, v1, v2, v3)),
            ("resume", resume, (v2,)), ("greedy generation", greedy_generation, (v1, v2, v3)),
            ("training step", training_step, (v1, v2, v3)), ("nanoGPT's recipe", nanogpts_recipe, (v1, v2)),
            ("--compile", lambda *row: training_step(*row, compiled=True), (v2,) if args.quick else (v1, v2, v3)),
            ("torchrun", torchrun, (v2,))]
    print(*(lines := ["| check | version | result | figures |", "|---|---|---|---|"]), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        setup = argparse.Namespace(
            device=device, dtype=dtype, name=name, folder=Path(folder), data=args.data, short=20 if tiny else 100,
            text=args.data if tiny and args.data else ROOT / "input.txt", sizes=sizes, recipe={**RECIPE, **sizes})
        for check, function, versions in rows:
            for version in versions:
                try:
                    passed, figures = function(setup, version)
                except (Exception, SystemExit) as error:
                    passed, figures = False, f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
                result = {True: "passed", False: "failed", None: "left out"}[passed]
                lines.append(f"| {check} | {version.__name__} | {result} | {figures} |")
                print(lines[-1], flush=True)
    lines.append(f"\n{time.strftime('%Y-%m-%d')}, {name}, CUDA {torch.version.cuda}; {machine()}")
    print(lines[-1])
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any("| failed |" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
