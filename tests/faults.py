"""Do the tests notice faults? Puts small ones at random into copies of the program and runs the tests on each.

    python -m tests.faults --number 20 --seed 1    20 faults, some minutes on two cores

A fault is a comparison or an operator turned into another one, a number plus one, a condition negated, or a statement
dropped; those of the shared half go into all four scripts. It prints a Markdown list that says which test noticed each.
Tests that count lines or compare the files' texts are left out: what a program does should give a fault away. A fault
that gets through is either harmless, or a test is missing.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["v0_bigram.py", "v1_transformer.py", "v2_bpe_rope.py", "v3_alibi.py"]
MARKER = b"# ---- the same in every version from here on ----\n"
OTHERS = {
    "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="],
    "is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"], "+": ["-"], "-": ["+"], "*": ["/"],
    "/": ["*"], "//": ["*"], "%": ["//"], "**": ["*"], "@": ["*"], "|": ["&"], "&": ["|"],
}
ORDER = {  # the test files that notice a fault soonest come first; if none does, test_processes.py has its turn
    "shared": ["training", "robust", "chat", "scripts", "models", "check_gpu", "ablations"],
    "upper": ["models", "training", "check_gpu", "ablations", "robust", "chat", "scripts"],
    "bpe_tokenizer.py": ["bpe_tokenizer", "training", "robust", "scripts", "chat", "scaffold"],
}
ABOUT_TEXTS = "same_text or imports_another or stay_short or keeps_its_budget"  # parts of the names of tests left out
MESSAGES = ("say", "print", "add", "UserError", "TokenizerError")


def faults_of(source):
    """Operators, numbers, conditions and statements of a Python source, each a list of (start, end, replacement), except
    those in messages, help texts and the defaults of Config, which tests of README hold to what was measured."""
    starts, operators, numbers, conditions, statements = [0], [], [], [], []
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def visit(node):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, (ast.JoinedStr, ast.AnnAssign)) or getattr(function, "id", "") in MESSAGES:
            return
        if isinstance(node, ast.BinOp) or (isinstance(node, ast.Compare) and len(node.ops) == 1):
            left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.left, node.comparators[0])
            start, end = span(left)[1], span(right)[0]
            operator = re.search(rb"[^\s()]+(?: not| in)?", source[start:end])  # what stands between the two
            for other in OTHERS.get(operator[0].decode(), []):
                operators.append((start + operator.start(), start + operator.end(), other))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            numbers.append((*span(node), repr(node.value + 1)))
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            start, end = span(node.test)
            conditions.append((start, end, f"(not ({source[start:end].decode()}))"))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Expr)):
            if not re.match(rb"(say|print|add|r?\")", source[span(node)[0]:]):  # a message or a docstring
                statements.append((*span(node), "pass"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return operators, numbers, conditions, statements


def draw(part, rng):
    """One fault at random: (where it is, what it changes, {file: new content})."""
    name = {"shared": SCRIPTS[0], "upper": rng.choice(SCRIPTS)}.get(part, part)
    source = (ROOT / name).read_bytes()
    border = source.find(MARKER) if name != part else len(source)
    kinds = [[fault for fault in faults if (fault[0] > border) == (part == "shared")] for faults in faults_of(source)]
    start, end, new = rng.choice(rng.choice(kinds))  # of each kind equally many
    where = f"{name}, line {source[:start].count(10) + 1}" + " (shared half)" * (part == "shared")
    contents = {}
    for other in SCRIPTS if part == "shared" else [name]:
        theirs = (ROOT / other).read_bytes()
        shift = theirs.index(MARKER) - border if part == "shared" else 0
        contents[other] = theirs[:start + shift] + new.encode() + theirs[end + shift:]
    return where, f"`{' '.join(source[start:end].decode().split())[:60]}` -> `{new[:60]}`", contents


def noticed_by(part, contents, timeout):
    """Run the tests on a copy with these files changed: the first test that fails, or what else happens, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-k", f"not ({ABOUT_TEXTS})"]
        for names in (ORDER[part], ["processes"]):
            tests = subprocess.Popen([*command, *(f"tests/test_{name}.py" for name in names)], cwd=folder,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                                     errors="replace", start_new_session=True)
            try:
                out = tests.communicate(timeout=timeout)[0]
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGTERM)  # torchrun then ends its workers, which are in groups of their own
                time.sleep(5)
                with suppress(ProcessLookupError):
                    os.killpg(tests.pid, signal.SIGKILL)
                tests.wait()
                return f"no end after {timeout} seconds"
            if tests.returncode:
                first = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", out, re.MULTILINE)
                return first[1] if first else f"exit status {tests.returncode}"
    return ""


def main():
    parser = argparse.ArgumentParser(prog="faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20, help="how many faults (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other faults")
    parser.add_argument("--timeout", type=int, default=200, help="seconds until tests are stopped (default 200)")
    args = parser.parse_args()
    if failed := next(filter(None, (noticed_by(part, {}, args.timeout) for part in ORDER)), ""):
        sys.exit(f"faults: error: {failed} fails without any fault")
    rng = random.Random(args.seed)
    parts = [list(ORDER)[i % 3] for i in range(args.number)]
    faults = [draw(part, rng) for part in parts]
    with ThreadPoolExecutor(2) as pool:  # two at a time
        tests = pool.map(lambda part, fault: noticed_by(part, fault[2], args.timeout), parts, faults)
        for (where, change, _), test in zip(faults, tests):
            print(f"- {where}: {change}: {test or '**not noticed**'}", flush=True)


if __name__ == "__main__":
    main()
