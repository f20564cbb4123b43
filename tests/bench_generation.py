"""How quickly each version writes, with its cache and without.

    python -m tests.bench_generation

6 layers, 384 wide, context 256, random weights, 512 tokens from one token, best of three: tokens per second with the
cache of keys and values, without it, and with a full window of 256 tokens read again for each token, as programs
without a cache do.
"""

import time

import torch

import v1_transformer
import v2_bpe_rope
import v3_alibi


def quickest(work, rounds=3):
    """Seconds of the quickest of some rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@torch.no_grad()
def full_windows(model, count):
    window = torch.zeros(1, model.config.block_size, dtype=torch.long)
    for _ in range(count):
        new = model(window)[0][0, -1].argmax()
        window = torch.cat((window[:, 1:], new.view(1, 1)), dim=1)


def main():
    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    print("\n| version | with the cache | without | full windows | cache : full windows |\n|---|---:|---:|---:|---:|")
    for version in (v1_transformer, v2_bpe_rope, v3_alibi):
        torch.manual_seed(0)
        config = version.Config(n_layer=6, n_head=6, n_embd=384, block_size=256)
        model = version.LanguageModel(config, 1024).eval()
        cached = 512 / quickest(lambda: list(version.generate(model, [0], 512)))
        plain = 128 / quickest(lambda: list(version.generate(model, [0] * 200, 128, use_cache=False)), 1)
        full = 64 / quickest(lambda: full_windows(model, 64))
        print(f"| {version.__name__} | {cached:.0f} | {plain:.0f} | {full:.0f} | {cached / full:.1f} |")


if __name__ == "__main__":
    main()
