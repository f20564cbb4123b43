"""Fill the tables and charts of README.md and tests/results/README.md in from the results files.

    python -m tests.tables

A table stands between two comments, for example `<!-- input -->` and `<!-- end -->`. What is between them is replaced by
what the function of that name below makes of the files in tests/results. A test checks that nothing is out of date.
"""

import json
import re
import statistics

from tests import ablations, bench_generation, bench_recipes, bench_steps, bench_ten_minutes, bench_tokenizer, compare
from tests.compare import ROOT, VERSIONS, markdown_table

RESULTS = ROOT / "tests/results"
PAGES = [ROOT / "README.md", RESULTS / "README.md"]
IDEAS = {
    "v0_bigram": ("a table of next-character scores", "bigram model"),
    "v1_transformer": ("attention over the last 64 characters", "OPT, without biases"),
    "v2_bpe_rope": ("BPE tokens, RoPE, GELU", "GPT-NeoX, without biases"),
    "v3_alibi": ("ALiBi in place of RoPE", "MPT"),
}


def read(name):
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def ladder():
    """The versions: each with its idea, what it comes to on input.txt, and the command that shows what is new."""
    rows, before = {}, None
    for version in VERSIONS:
        runs = [run for run in read("input")["runs"] if run["version"] == version]
        change = "–"
        if before:
            added, removed = compare.diff_size(before, version)
            change = f"{added} added, {removed} removed: `git diff --no-index {before}.py {version}.py`"
        idea, family = IDEAS[version]
        bits = statistics.mean(run["bits_per_byte"] for run in runs)
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        rows[f"`{version}.py`"] = [idea, f"{bits:.2f}", f"{seconds:.0f}", change, family]
        before = version
    return markdown_table(["version", "idea", "bits per byte", "seconds", "lines changed", "architecture"], rows, ":--")


def loss_against(x):
    """The curves of the versions on input.txt; x: "step" or "seconds"."""
    curves = compare.mean_curves(read("input"), x)
    return compare.chart({name: curve for name, curve in curves.items() if x == "step" or name != "v0_bigram"}, x)


def ablation(title):
    results = read("ablations")
    rows = results["tables"][title]
    return ablations.table(title, rows) + "\n\n" + ablations.budget(rows, results["machine"])


TABLES = {
    "ladder": ladder,
    "loss against seconds": lambda: loss_against("seconds"),
    "loss against steps": lambda: loss_against("step"),
    "input": lambda: compare.table(read("input")),
    "ideas": lambda: ablation("ideas"),
    "vocabulary": lambda: ablation("vocabulary"),
    "scaffold": lambda: ablation("scaffold"),
    "positions": lambda: ablation("positions"),
    "positions chart": lambda: ablations.chart_of_positions(read("ablations")["tables"]["positions"]),
    "slopes": lambda: ablation("slopes"),
    "training": lambda: ablation("training"),
    "recipes": lambda: bench_recipes.markdown(read("recipes")),
    "steps": lambda: bench_steps.markdown(read("steps")),
    "generation": lambda: bench_generation.markdown(read("generation")),
    "tokenizer": lambda: bench_tokenizer.markdown(read("tokenizer")),
    "ten minutes": lambda: bench_ten_minutes.table(read("ten_minutes")),
    "ten minutes input": lambda: bench_ten_minutes.sample(read("ten_minutes"), "input"),
    "ten minutes shakespeare": lambda: bench_ten_minutes.sample(read("ten_minutes"), "tinyshakespeare"),
    "answers": lambda: bench_ten_minutes.answers(read("ten_minutes")),
}


def fill_in(page):
    """The text of a page with all its tables made again."""
    def made(match):
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill_in(path.read_text(encoding="utf-8")), encoding="utf-8")
