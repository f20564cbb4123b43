"""Train all versions under one budget and compare them, in Markdown.

    python -m tests.compare                                      all versions with their default settings, one seed
    python -m tests.compare --seeds 1 2 3 --steps 2000           three seeds each, shorter
    python -m tests.compare --data my.txt --plot curves.png      another text, and the loss curves as a picture
    python -m tests.compare --from-runs runs                     no training: compare the runs that are there

What it does not know it passes on to the scripts (for example --batch-size 24). It prints the comparison table (mean
and standard deviation over the seeds), the size of the diffs between neighbors, and the loss curves as charts that
GitHub draws; the curves also go to OUT/curves.csv, all numbers to OUT/results.json, from which --results makes the same
Markdown again, and OUT/page.html shows what changed and what each model sees (see tests/page.py).
"""

import argparse
import csv
import difflib
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["v0_bigram", "v1_transformer", "v2_bpe_rope", "v3_alibi"]
COLORS = {"v0_bigram": ("gray", "#888888"), "v1_transformer": ("red", "#d62728"), "v2_bpe_rope": ("blue", "#1f77b4"),
          "v3_alibi": ("green", "#2ca02c")}
CURVE_COLUMNS = ["version", "seed", "step", "seconds", "bits_per_byte"]


def train(versions, seeds, out, flags):
    """Run every version with every seed, one after the other; each shows its own progress. Returns their folders."""
    for seed in seeds:
        for version in versions:
            command = [sys.executable, str(ROOT / f"{version}.py"), "--seed", str(seed), *flags]
            print(f"\n-- {version}, seed {seed} --", file=sys.stderr, flush=True)
            command += ["--out", str(out / f"{version}-{seed}")]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                sys.exit(f"compare: error: {version} did not finish; its message is above")
    return [out / f"{version}-{seed}" for version in versions for seed in seeds]


def settings(steps, data, flags):
    """The flags of every run. Short runs are evaluated ten times, unless --eval-interval is among the flags."""
    known = ["--steps", str(steps)] * (steps is not None) + ["--data", data] * (data is not None)
    if steps is not None and steps < 5000 and not any(flag.startswith("--eval-interval") for flag in flags):
        known += ["--eval-interval", str(max(1, steps // 10))]
    return known + flags


def collect(folders):
    """The results of the runs in these folders, measured on one text: {"machine", "runs", "curves"}."""
    runs, curves = [], []
    for folder in sorted(folders):
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            for row in csv.DictReader((folder / "log.csv").read_text(encoding="utf-8").splitlines()):
                numbers = [int(row["step"]), float(row["seconds"]), float(row["bits_per_byte"])]
                curves.append([result["version"], result["seed"], *numbers])
            config = {**result["config"], "seed": 0}
            runs.append({**result, "settings": json.dumps([result["version"], result["init_from"], config])})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"compare: error: {folder} does not hold a run of these scripts ({error!r:.200})")
    if len({run.pop("settings") for run in runs}) > len({run["version"] for run in runs}):
        sys.exit("compare: error: runs of one version differ in more than their seed: put them into different folders")
    if len({run["validation_sha256"] for run in runs}) > 1:
        sys.exit("compare: error: the runs were measured on different texts")
    if not runs:
        sys.exit("compare: error: there is no finished run")
    return {"machine": machine(), "runs": runs, "curves": curves}


def machine():
    """What ran this, in words."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # Linux, where platform does not know it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__.split('+')[0]}"


# -- Markdown --


def mean_and_spread(numbers, digits):
    """[1.5, 1.7] -> "1.60 ± 0.14"; a number that is missing somewhere -> "–"."""
    if None in numbers:
        return "–"
    mean = f"{statistics.mean(numbers):,.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def markdown_table(columns, rows, align="---:"):
    """The names of all columns, then {first cell: the other cells}."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + f"{align}|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()])


def table(results):
    """The comparison, one line for each version."""
    rows = {}
    for version in VERSIONS:
        runs = [run for run in results["runs"] if run["version"] == version]
        if not runs:
            continue
        rows[version] = [
            f"{runs[0]['parameters']:,}",
            mean_and_spread([run["val_loss"] for run in runs], 4),
            mean_and_spread([run["bits_per_byte"] for run in runs], 4),
            mean_and_spread([run["context_bits_per_byte"]["2"] for run in runs], 4),
            mean_and_spread([run["context_bits_per_byte"]["4"] for run in runs], 4),
            mean_and_spread([run["train_seconds"] for run in runs], 0),
        ]
    columns = ["version", "parameters", "val loss", "bits per byte", "at 2x context", "at 4x", "seconds"]
    run = results["runs"][0]
    seeds = len({run["seed"] for run in results["runs"]})
    return (f"{markdown_table(columns, rows)}\n\n`{run['data']}`, {run['steps']:,} steps, {seeds} "
            f"seed{'s' * (seeds > 1)}, {run['dtype']}; {results['machine']}.")


def diff_size(old, new):
    """Lines added and removed from one script to another. (A test holds the numbers to those of git.)"""
    files = [(ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines() for name in (old, new)]
    signs = [line[0] for line in difflib.ndiff(*files)]
    return signs.count("+"), signs.count("-")


def diffs():
    """How many lines change from each version to the next."""
    sizes = {old: [new, *map(str, diff_size(old, new))] for old, new in zip(VERSIONS, VERSIONS[1:])}
    return markdown_table(["from", "to", "added", "removed"], sizes)


def mean_curves(results, x):
    """{version: [(x, bits per byte), ...]}, the mean over the seeds at each evaluation but that of step 0, which would
    flatten the rest; x: "step" or "seconds"."""
    curves = {}
    for version in VERSIONS:
        by_step = {}
        for row in results["curves"]:
            row = dict(zip(CURVE_COLUMNS, row))
            if row["version"] == version and row["step"] > 0:
                by_step.setdefault(row["step"], []).append((row[x], row["bits_per_byte"]))
        if by_step:
            curves[version] = [tuple(map(statistics.mean, zip(*points))) for _, points in sorted(by_step.items())]
    return curves


def chart(curves, x, y="bits per byte", points=11):
    """A Mermaid chart of named curves at evenly spaced places, which is what Mermaid can draw."""
    end = max(curve[-1][0] for curve in curves.values())
    start = max(curve[0][0] for curve in curves.values())
    places = [start + (end - start) * i / (points - 1) for i in range(points)]
    lines = [heights(curve, places) for curve in curves.values()]
    low, high = min(map(min, lines)), max(map(max, lines))
    colors = [COLORS[name] for name in curves] if curves.keys() <= COLORS.keys() else list(COLORS.values())
    palette = {"xyChart": {"plotColorPalette": ", ".join(code for _, code in colors)}}
    return "\n".join([
        "```mermaid",
        f"%%{{init: {json.dumps({'themeVariables': palette})}}}%%",
        "xychart-beta",
        f'    x-axis "{x}" {start:.0f} --> {end:.0f}',
        f'    y-axis "{y}" {low - 0.05:.2f} --> {high + 0.05:.2f}',
        *("    line [" + ", ".join(f"{height:.3f}" for height in line) + "]" for line in lines),
        "```",
        "Lines: " + "; ".join(f"{name}: {color}" for name, (color, _) in zip(curves, colors)) + ".",
    ])


def heights(curve, places):
    """The curve's values at these places, between its points on straight lines; past its end it stays level."""
    found = []
    for place in places:
        after = next((i for i, (at, _) in enumerate(curve) if at >= place), len(curve) - 1)
        (x1, y1), (x2, y2) = curve[max(0, after - 1)], curve[after]
        share = min(1.0, (place - x1) / (x2 - x1)) if x2 > x1 else 0.0
        found.append(y1 + (y2 - y1) * share)
    return found


def markdown(results):
    """All of it; a pure function of the results, so that a test can hold README to it."""
    parts = [table(results)]
    if len({run["version"] for run in results["runs"]}) > 1:
        transformers = {k: v for k, v in mean_curves(results, "seconds").items() if k != "v0_bigram"}
        if transformers:
            parts += ["Bits per byte against seconds of training (v0 is done before these begin):"]
            parts += [chart(transformers, "seconds")]
        parts += ["Bits per byte against steps:", chart(mean_curves(results, "step"), "step")]
    return "\n\n".join(parts)


def plot(results, path):
    """The same curves as a picture."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("compare: no picture without matplotlib; pip install matplotlib", file=sys.stderr)
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, x in zip(axes, ("step", "seconds")):
        for version, curve in mean_curves(results, x).items():
            axis.plot(*zip(*curve), color=COLORS[version][1], label=version, marker=".")
        axis.set_xlabel(x if x == "step" else "seconds of training")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte of the validation text")
    axes[1].legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=VERSIONS, help="which ones (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="one run of each version for each of these")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the scripts' own)")
    parser.add_argument("--data", help="text to learn (default: input.txt)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where the runs are written")
    parser.add_argument("--from-runs", type=Path, metavar="DIR", help="train nothing, take the runs in this folder")
    parser.add_argument("--results", type=Path, metavar="FILE", help="train nothing, take this results.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves with matplotlib")
    args, flags = parser.parse_known_args(argv)
    if args.results:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        print(markdown(results) + "\n\n" + diffs())
    else:
        if args.from_runs:
            folders = [path.parent for path in args.from_runs.glob("*/result.json")]
        else:  # only the runs asked for: older ones may be in the same folder
            folders = train(args.versions, args.seeds, args.out, settings(args.steps, args.data, flags))
        folder = args.from_runs or args.out
        results = collect(folders)
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([CURVE_COLUMNS, *results["curves"]])
        print(markdown(results) + "\n\n" + diffs())
        from tests import page  # only here: it needs torch, which takes seconds to import

        try:
            page.write(folders, folder, args.data)
        except (page.UserError, OSError) as error:  # the numbers are there all the same
            print(f"compare: no page: {error}", file=sys.stderr)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
