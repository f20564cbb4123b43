"""Do the exercises of tests/results/exercises.md as the page says, and fill in what was measured.

    python -m tests.exercises --save tests/results/exercises.json          all of them: ten minutes
    python -m tests.exercises --save tests/results/exercises.json 0 5 6    the training before all others, and two

They are done in the folder OUT, which gets copies of the scripts: every ```diff block makes a changed copy, every ```sh
line that trains is run, unless OUT has that run, and then every ```python block. The results are added to those in the
file of --save and written into the page between `<!-- measured N -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.compare import ROOT, VERSIONS, machine

PAGE = ROOT / "tests/results/exercises.md"


def blocks(kind, text):
    """The contents of the fenced blocks of a kind: "diff", "sh" or "python"."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def exercises(page):
    """{number: text}; 0 is the part before the first exercise."""
    return dict(enumerate(re.split(r"^## (?=\d)", page, flags=re.MULTILINE)))


def apply_diff(diff):
    """Return the name of the changed copy, the script's name and the changed text. A `-` line after a `+` line begins
    the next change. Raises ValueError where old lines do not occur exactly once."""
    script, name = re.match(r"--- (\w+)\.py\n\+\+\+ (\w+)\.py\n", diff).groups()
    body = diff.split("\n", 2)[2]
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", body, re.MULTILINE)
    if "".join(old + new for old, new in changes) != body:
        raise ValueError(f"not pairs of old and new lines:\n{diff}")
    text = "\n" + (ROOT / f"{script}.py").read_text(encoding="utf-8")
    for change in changes:
        old, new = ("\n" + re.sub("^[-+]", "", lines, flags=re.MULTILINE) for lines in change)
        if text.count(old) != 1:
            raise ValueError(f"{script}.py has these lines {text.count(old)} times:{old}")
        text = text.replace(old, new)
    return name, script, text[1:]


def train(line, out):
    """Run a command, if that was not done yet. Returns the run's name and what is kept of its result."""
    _, script, *flags = shlex.split(line)
    folder = out / (flags[flags.index("--out") + 1] if "--out" in flags else f"runs/{script[:-3]}")
    made_by, made = folder / "made_by.txt", line + "\n" + (out / script).read_text(encoding="utf-8")
    if not made_by.exists() or made_by.read_text(encoding="utf-8") != made:
        status = subprocess.run([sys.executable, script, *flags, "--max-new-tokens", "0"], cwd=out).returncode
        if status not in (0, 1):  # 1: the loss is no longer finite
            sys.exit(f"exercises: error: {script} did not finish; its message is above")
        made_by.write_text(made, encoding="utf-8")
    kept = {"command": line, "parameters": 0, "bits": dict.fromkeys("124")}
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        kept.update(parameters=result["parameters"], bits=result["context_bits_per_byte"])
    return folder.name, kept


def do(text, out):
    """Do one exercise; returns {"diffs", "runs", "programs"}."""
    for diff in blocks("diff", text):
        name, _, changed = apply_diff(diff)
        (out / f"{name}.py").write_text(changed, encoding="utf-8")
    lines = "".join(blocks("sh", text)).splitlines()
    runs = dict(train(line, out) for line in lines if "--sample-only" not in line)
    programs = []
    for source in blocks("python", text):
        (out / "try.py").write_text(source, encoding="utf-8")
        done = subprocess.run([sys.executable, "try.py"], cwd=out, stdout=subprocess.PIPE, check=True, text=True)
        programs.append({"source": source, "output": done.stdout})
    return {"diffs": blocks("diff", text), "runs": runs, "programs": programs}


def measured(number, results):
    """What the page shows of an exercise: its runs below those of the unchanged scripts, and its programs' output."""
    done, parts = results["exercises"][number], []
    if done["runs"]:
        scripts = re.findall(r"(?:--- |python )(\w+)", "".join(done["diffs"]) + str(done["runs"]))
        rows = {name: run for name, run in results["exercises"]["0"]["runs"].items() if name in scripts} | done["runs"]
        lines = ["| run | parameters | bits per byte | at 2x context | at 4x |", "|---|---:|---:|---:|---:|"]
        for name, run in rows.items():
            bits = [f"{x:.3f}" if x else "–" for x in run["bits"].values()]
            lines.append(f"| {name} | " + " | ".join([f"{run['parameters']:,}", *bits]) + " |")
        parts = ["\n".join(lines)]
    return "\n\n".join(parts + [f"```text\n{program['output']}```" for program in done["programs"]])


def fill(page, results):
    """The page with what was measured in its places."""
    for number in results["exercises"]:
        begin, end = f"<!-- measured {number} -->\n", "\n<!-- end -->"
        content = f"{begin}\n{measured(number, results)}\n{end}"
        page = re.sub(f"{begin}.*?{end[1:]}", lambda _: content, page, flags=re.DOTALL)
    return page


def main():
    parser = argparse.ArgumentParser(prog="exercises", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which ones (default: all), 0 before the others")
    parser.add_argument("--out", type=Path, default=Path("runs/exercises"), help="where they are done")
    parser.add_argument("--save", type=Path, metavar="FILE", required=True, help="the results file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (*(f"{version}.py" for version in VERSIONS), "bpe_tokenizer.py", "input.txt"):
        shutil.copy(ROOT / name, args.out)
    results = json.loads(args.save.read_text(encoding="utf-8")) if args.save.exists() else {"exercises": {}}
    texts = exercises(PAGE.read_text(encoding="utf-8"))
    for number in args.numbers or texts:
        results["machine"], results["exercises"][str(number)] = machine(), do(texts[number], args.out)
        args.save.write_text(json.dumps(results, indent=1), encoding="utf-8")
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(measured(str(number), results))


if __name__ == "__main__":
    main()
