"""One page that shows the versions side by side: what changed, what it bought, and what each model sees.

    python -m tests.page                              the runs in runs/; writes runs/page.html, for any browser
    python -m tests.page runs/compare --data my.txt   the runs of another folder, on another text

The page is one file that needs no network. It is made from what a run leaves behind: result.json, log.csv, best.pt and
sample.txt. Of several runs of one version it shows the one in a folder of the version's name, or else the first.
Its picture in tests/results is made by this line (needs Chromium and Pillow):
    chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,4080 --screenshot=runs/p.png runs/page.html &&
    python -c "import PIL.Image as i; i.open('runs/p.png').quantize(96, 2).save('tests/results/page.png', optimize=1)"
"""
import argparse
import base64
import csv
import difflib
import hashlib
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from v0_bigram import UserError, read_texts  # the same in every version

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {  # the title of each version, and its idea
    "v0_bigram": ("v0 bigram", "A table of scores: the current character alone predicts the next one."),
    "v1_transformer": ("v1 transformer", "Attention collects information from all characters of a context."),
    "v2_bpe_rope": ("v2 BPE, RoPE", "Longer tokens, so that a context reaches further; rotary positions."),
    "v3_alibi": ("v3 ALiBi", "An attention bias in place of rotation, so that longer texts can be read."),
}


def read_run(folder):
    """Return what result.json, log.csv and sample.txt say of a run; None if it is fine-tuned, or of another program."""
    try:
        result = json.loads((folder / "result.json").read_bytes())
        if result.get("version") not in VERSIONS or result.get("init_from"):
            return None
        run = {key: float(result[key]) for key in ("parameters", "steps", "train_seconds")}
        run |= {key: str(result[key]) for key in ("version", "data", "validation_sha256", "device", "dtype", "seed")}
        run["bits"] = [x if x is None else float(x) for x in map(result["context_bits_per_byte"].get, "124")]
        rows = list(csv.DictReader((folder / "log.csv").read_text(encoding="utf-8").splitlines()))
        every = 1 + len(rows) // 500  # at most 500 points, without that of step 0
        run["log"] = [[float(row[x]) for x in ("step", "seconds", "bits_per_byte")] for row in rows[:0:-every][::-1]]
        assert run["log"], "log.csv has no row after step 0"
        json.dumps(run, allow_nan=False)  # all numbers are finite
    except Exception as error:  # a damaged file can raise almost anything
        raise UserError(f"result.json or log.csv in {folder} is damaged ({error!r:.200}): train again, or move it")
    sample = folder / "sample.txt"
    run["title"], run["idea"] = VERSIONS[run["version"]]
    run["sample"] = sample.read_text(encoding="utf-8", errors="replace")[:2000] if sample.is_file() else ""
    return run


def choose(folders):
    """Return one finished run of each version, {folder: run}, and notes on what is left out."""
    runs = {folder: run for folder in sorted(folders) if (run := read_run(folder))}
    chosen, notes = {}, []
    for version in VERSIONS:
        found = [folder for folder, run in runs.items() if run["version"] == version]
        if found:
            folder = min(found, key=lambda folder: folder.name != version)
            chosen[folder] = runs[folder]
        else:
            notes.append(f"{version} is left out: it has no finished run here.")
        if len(found) > 1:
            notes.append(f"{version} is the run {folder.name}, one of {len(found)}.")
    if not chosen:
        raise UserError("there is no finished run here: train a version first, or name the folder of the runs")
    if len({run["validation_sha256"] for run in chosen.values()}) > 1:
        raise UserError("the runs are of different texts (validation_sha256 differs), and cannot be compared")
    return chosen, notes


def find_passage(data, digest):
    """Return a passage from the middle of the validation text, of this SHA-256, and the text before it."""
    path = Path(data or ROOT / "input.txt")
    try:
        train_text, text = read_texts(path)
    except (ValueError, OSError) as error:
        raise UserError(f"the validation text is needed: name the file of the runs with --data ({error})") from None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise UserError(f"the runs were not measured on {path}: name the file of their text with --data")
    start = ("\n\n" + text).rfind("\n\n", 0, len(text) // 2 + 2)  # the paragraph in the middle; of a single one, 0
    passage = text[start:start + 500]
    return (passage.rsplit(" ", 1)[0] or passage), train_text + text[:start]


def marked(line, guide):
    """Mark the words that difflib's guide points at: ("ab cde f", "    ^") -> [[0, "ab "], [1, "cde"], [0, " f"]]."""
    words = re.finditer(r"\w+|\W", line)
    parts = itertools.groupby(words, key=lambda word: int(not guide[word.start():word.end()].isspace()))
    return [[changed, "".join(word[0] for word in part)] for changed, part in parts]


def diff(old, new):
    """Compare two versions line by line: rows of [sign, parts]."""
    files = [(ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines() for name in (old, new)]
    rows = []
    for line in difflib.ndiff(*files):  # "- old", "+ new", "  same"; below an old or new line perhaps "? ^^ guide"
        if line[0] == "?":
            text = rows[-1][1][0][1]
            rows[-1][1] = marked(text, line[2:].ljust(len(text)))
        else:
            rows.append([line[0], [[0, line[2:]]]])
    added, removed = ([sign for sign, _ in rows].count(sign) for sign in "+-")
    return {"from": old, "to": new, "added": added, "removed": removed, "rows": rows}


def token_of_each_character(tokenizer, ids, text):
    """Return the index of the token in which each character of the text begins."""
    if hasattr(tokenizer, "chars"):  # characters are the tokens
        return np.arange(len(text))
    sizes = [len(character.encode()) for character in text]  # in bytes: a BPE token may end inside a character
    ends = np.cumsum([len(tokenizer.decode_bytes([i])) for i in ids])
    return np.searchsorted(ends, np.cumsum(sizes) - sizes, side="right")


@torch.inference_mode()
def expectations(model, tokenizer, before, passage):
    """What a model expected at each token of the passage: [text, its surprise in bits, [[token, probability], ...]].
    Every token is predicted from the block_size tokens before it (up to a 64th fewer, if the context is long)."""
    block = model.config.block_size
    text = before[-8 * block - 200:] + passage
    ids, here = tokenizer.encode(text), len(text) - len(passage)
    token_of = token_of_each_character(tokenizer, ids, text)
    first, stride, logits = token_of[here], max(1, block // 64), []
    for start in range(first, len(ids), stride):
        end = min(start + stride, len(ids))
        window = torch.tensor([ids[max(0, end - 1 - block):end - 1]])
        logits.append(model(window)[0][0, start - end:])  # the predictions of tokens start to end - 1
    log_probabilities = torch.cat(logits).log_softmax(-1)
    if not log_probabilities.isfinite().all():
        raise ValueError("its predictions are not finite numbers")
    bits = -log_probabilities[range(len(ids) - first), ids[first:]].numpy() / np.log(2)
    top = log_probabilities.exp().topk(min(5, tokenizer.vocab_size))
    tokens = []
    for token, places in itertools.groupby(range(here, len(text)), key=token_of.__getitem__):
        places = list(places)  # of the characters that begin in this token
        after = token_of[places[-1] + 1] if places[-1] + 1 < len(text) else len(ids)
        surprise = float(bits[token - first:after - first].sum())
        most_likely = zip(top.indices[token - first].tolist(), top.values[token - first].tolist())
        tokens.append([text[places[0]:places[-1] + 1], round(surprise, 3),
                       [[tokenizer.decode([i]), round(p, 4)] for i, p in most_likely]])
    return tokens


@torch.inference_mode()
def attention(model, tokenizer, passage):
    """Where every head looks in the first tokens of the passage (64 at most): 8-bit weights and mean distances."""
    heads = model.config.n_layer * model.config.n_head
    ids = tokenizer.encode(passage)[:min(64, model.config.block_size, int(1000 / heads**0.5))]
    for block in model.blocks:
        block.attention.keep_weights = True
    model(torch.tensor([ids]))
    queries, keys = np.tril_indices(len(ids))
    weights = torch.cat([block.attention.weights for block in model.blocks]).numpy()[:, :, queries, keys]
    reach = (weights * (queries - keys)).sum(-1) / len(ids)  # (layers, heads)
    numbers = (np.sqrt(weights) * 255).round().astype(np.uint8)  # the root keeps small weights apart: 1/64 becomes 32
    return {"tokens": [tokenizer.decode([i]) for i in ids], "reach": reach.round(2).tolist(),
            "slopes": model.slopes.flatten().tolist() if hasattr(model, "slopes") else [],
            "weights": base64.b64encode(numbers.tobytes()).decode()}


def build(folders, data=None):
    """Return the page about the runs in these folders as HTML."""
    runs, notes = choose(folders)
    first = next(iter(runs.values()))
    passage, before = find_passage(data, first["validation_sha256"])
    versions = []
    for folder, run in runs.items():
        try:
            model, tokenizer, config = importlib.import_module(run["version"]).load(folder / "best.pt")
            run["surprise"] = expectations(model, tokenizer, before, passage)
            run["attention"] = attention(model, tokenizer, passage) if hasattr(model, "blocks") else None
            run["reads"] = config.block_size if hasattr(model, "blocks") else 1  # tokens
            versions.append(run)
        except (ValueError, OSError, RuntimeError) as error:  # the scripts' UserError is a ValueError
            notes.append(f"{run['version']} is left out: {error}.")
    if not versions:
        raise UserError(f"no checkpoint can be used: {' '.join(notes)}")
    device, dtype, seeds = (", ".join(sorted({run[x] for run in versions})) for x in ("device", "dtype", "seed"))
    about = f"Measured on the validation part of {first['data']}, from which no version has learned. "
    about += f"Trained on {device} in {dtype} with seed {seeds}. " + " ".join(notes)
    content = {"about": about, "versions": versions, "passage": passage}
    content["diffs"] = [diff(old, new) for old, new in itertools.pairwise(VERSIONS)]
    template = (ROOT / "tests/page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the browser runs no other script
    # JSON may hold any text: without "<" it cannot end the element it stands in.
    safe = json.dumps(content).replace("<", "\\u003c")
    return template.replace("SCRIPT_SHA256", digest).replace("PAGE_CONTENT", safe)


def write(folders, out, data=None):
    """Write the page about the runs in these folders to out/page.html."""
    (out / "page.html").write_text(build(folders, data), encoding="utf-8")
    print(f"page: {out / 'page.html'} shows the versions side by side; open it in a browser", file=sys.stderr)


def main(argv=None):
    """Run the program. A user's mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser("page", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder of the runs (default runs)")
    parser.add_argument("--data", metavar="FILE", help="the text of the runs (default input.txt)")
    args = parser.parse_args(argv)
    try:
        write([path.parent for path in args.folder.glob("*/result.json")], args.folder, args.data)
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
