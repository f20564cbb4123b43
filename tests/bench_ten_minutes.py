"""How far ten minutes on a laptop go: a larger v2 with a longer context, and a chat model made from it.

    python -m tests.bench_ten_minutes input chat --save tests/results/ten_minutes.json
    python -m tests.bench_ten_minutes tinyshakespeare --data tinyshakespeare.txt --save tests/results/ten_minutes.json
    python -m tests.bench_ten_minutes --results tests/results/ten_minutes.json          no training: the page of a results file

Runs the commands below as they stand and adds what they print to the results file. "chat" continues from the run of
"input" and then asks the questions of tests/data/questions.json, each on its own, at temperature 0. Whether an answer
fits its question is for a person to judge, who sets "fits" in the results file.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from tests import augment
from tests.compare import ROOT, machine, markdown_table

LARGER = "--n-layer 6 --n-head 6 --n-embd 192 --block-size 128 --dropout 0.2 --steps 3800"
COMMANDS = {
    "tinyshakespeare": f"v2_bpe_rope.py --data tinyshakespeare.txt --out runs/ten_shakespeare {LARGER}",
    "input": f"v2_bpe_rope.py --out runs/ten_minutes {LARGER}",
    "chat": "v2_bpe_rope.py --data runs/augmented.csv --init-from runs/ten_minutes/best.pt --out runs/ten_chat "
            "--steps 2000 --eval-interval 2000 --learning-rate 2e-3 --dropout 0 --weight-decay 0.1",
}
AUGMENT = ["tests/data/conversation.csv", "runs/augmented.csv"]  # what tests.augment is given before that
QUESTIONS = json.loads((ROOT / "tests/data/questions.json").read_text(encoding="utf-8"))


def execute(command, data=None):
    """Run a command here, with the project's scripts and files. Returns what it printed and its seconds, imports included."""
    files = {"v2_bpe_rope.py": str(ROOT / "v2_bpe_rope.py"), "tinyshakespeare.txt": str(data)}
    words = [files.get(word, word) for word in command.split()]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(f"bench_ten_minutes: error: {command.split()[0]} did not finish; its message is above")
    return done.stdout, time.perf_counter() - started


def ask(question):
    """The answer of the chat model, on its own: no earlier turns."""
    command = [sys.executable, str(ROOT / "v2_bpe_rope.py"), "--out", "runs/ten_chat", "--chat", "--temperature", "0"]
    done = subprocess.run([*command, "--prompt", question], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return done.stdout.strip().removeprefix("bot:").strip()


def measure(name, data):
    """{"seconds", "result", "sample"}, and "answers" for the chat model."""
    if name == "chat":
        augment.main([str(ROOT / AUGMENT[0]), AUGMENT[1]])
    _, seconds = execute(COMMANDS[name], data)
    folder = Path(COMMANDS[name].split("--out ")[1].split()[0])
    found = {"machine": machine(), "seconds": seconds, "sample": (folder / "sample.txt").read_text(encoding="utf-8"),
             "result": json.loads((folder / "result.json").read_text(encoding="utf-8"))}
    if name == "chat":
        found["answers"] = [{"kind": kind, "question": question, "answer": ask(question), "fits": None}
                            for kind, questions in QUESTIONS.items() for question in questions]
    return found


def table(results):
    """What the commands came to."""
    rows = {}
    for name, found in results.items():
        result = found["result"]
        nats = result["bits_per_byte"] * math.log(2)
        rows[name] = [f"{result['parameters']:,}", f"{result['bits_per_byte']:.4f}", f"{nats:.4f}", f"{found['seconds']:.0f}"]
    columns = ["command", "parameters", "bits per byte", "nats per byte", "seconds"]
    machines = {}
    for name, found in results.items():
        machines.setdefault(found["machine"], []).append(name)
    return markdown_table(columns, rows) + "\n\n" + "; ".join(f"{', '.join(n)}: {on}" for on, n in machines.items()) + "."


def answers(results):
    """All questions and answers, and the judgement of a person."""
    fits = {True: "yes", False: "no", None: "?"}
    rows = {one["question"]: [one["kind"], one["answer"].replace("|", "\\|").replace("\n", " "), fits[one["fits"]]]
            for one in results["chat"]["answers"]}
    return markdown_table(["question", "taken", "answer", "fits"], rows, align=":--")


def sample(results, name, lines=16):
    """The beginning of what a model wrote, as an indented block."""
    lines = results[name]["sample"].splitlines()[:lines]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def markdown(results):
    """All of it."""
    parts = [table(results), *(sample(results, name) for name in ("tinyshakespeare", "input") if name in results)]
    return "\n\n".join(parts + ([answers(results)] if "chat" in results else []))


def main():
    parser = argparse.ArgumentParser(prog="bench_ten_minutes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to run, in this order: {', '.join(COMMANDS)}")
    parser.add_argument("--data", type=Path, help="where tinyshakespeare.txt is")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the numbers to this file")
    parser.add_argument("--results", type=Path, metavar="FILE", help="train nothing, take this results file")
    args = parser.parse_args()
    file = args.results or args.save
    results = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    if not args.names and not results:
        parser.error("give the name of a command, or a results file")
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        if name not in COMMANDS:
            parser.error(f"{name} is not one of {', '.join(COMMANDS)}")
        if name == "tinyshakespeare" and not args.data:
            parser.error("tinyshakespeare needs --data: where tinyshakespeare.txt is")
    for name in args.names:
        results[name] = measure(name, args.data)
        if args.save:
            args.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
