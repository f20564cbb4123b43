"""Make tests/data/golden_tokenizer.json: what `regex`, `tiktoken` and `tokenizers` give for a few hundred texts.

    python -m pip install regex tiktoken tokenizers
    python -m tests.make_golden

The tests compare our tokenizer with this file, so that they need none of these packages. Make it again when input.txt
changes, or to add texts.
"""

import itertools
import json
import random
from importlib.metadata import version
from unicodedata import ucd_3_2_0

import regex
import tiktoken
import tokenizers

from bpe_tokenizer import BPETokenizer
from tests.test_bpe_tokenizer import (GPT2_PATTERN, ROOT, SPECIAL_TOKENS, VARIED, WHITE_SPACE, encode_or_refuse,
                                      random_text)

CONTRACTIONS = ["I'm", "he's", "we'll", "they've", "you're", "I'd", "don't", "DON'T", "it'sn't", "'s's", " 's", "''re",
                "9'll", "é's", "'", "' s", "!'t", "o'clock", "rock 'n' roll", "’s", "x'v", "x'vex", "x'lx"]
WHITE = ["a b", " a", "a ", "  a", "a  b", "a   b  ", "\n\n a", "a \n", " \n ", "\t\ta", "\r\n\r\nx", "1  2", "!  !",
         " \u3000 a", "a\xa0 b"]
NUMBERS = ["½", "Ⅷ", "x²", "٣٤", "五", "〇", "①②", "𝟙", "1½", "½a", " ½", "3.14", "1,000,000", "0x1F", "1e-9", "二千", "८०"]
MARKS = ["e\u0301", "\u0301", " \u0301e", "नमस्ते", "สวัสดี", "한국어", "ﷺ", "ǅ",
         "ʰ", "ª", "_a_", "a\u200db", "a\u00adb", "🇩🇪", "👍🏽!", "🏳️‍🌈"]


def texts(corpus):
    """Texts of all kinds, of characters whose kind is the same in every version of Unicode since 13."""
    rng = random.Random(0)
    yield from VARIED + CONTRACTIONS + WHITE + NUMBERS + MARKS
    for c in sorted(WHITE_SPACE | {chr(code) for code in [*range(32), 0x7F, 0x180E, 0x200B, 0x2060, 0xFEFF]}):
        yield f"a{c}b {c}1{c}{c} x{c} "
    for _ in range(150):
        text = random_text(rng, rng.randrange(2, 16))
        yield "".join(c for c in text if ucd_3_2_0.category(c) != "Cn" or "\U0001f300" <= c <= "\U0001f64f")
    for line in rng.sample(corpus.splitlines(keepends=True), 50):
        yield line


def main():
    corpus = (ROOT / "input.txt").read_text(encoding="utf-8")
    ours = BPETokenizer.train(corpus, 1024, special_tokens=SPECIAL_TOKENS)
    split = regex.compile(GPT2_PATTERN).findall
    first = tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ours.mergeable_ranks(),
                              special_tokens=ours.special_tokens)
    second = tokenizers.Tokenizer.from_str(ours.state())
    cases = [{"chunks": split(text), "ids": first.encode(text)} for text in texts(corpus)]
    assert all(second.encode("".join(case["chunks"])).ids == case["ids"] for case in cases)

    rng, special = random.Random(1), []
    pieces, choices = [*SPECIAL_TOKENS, "<|end", "|>", " ", "the"], [[], "all", ["<|end|>"], ["<|endoftext|>"]]
    for allowed, disallowed in itertools.product(choices, choices):
        for text in ("".join(rng.choices(pieces, k=4)) for _ in range(5)):
            sets = [choice if choice == "all" else set(choice) for choice in (allowed, disallowed)]
            special.append({"text": text, "allowed": allowed, "disallowed": disallowed,
                            "ids": encode_or_refuse(first.encode, text, *sets)})

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([corpus], tokenizers.trainers.BpeTrainer(
        vocab_size=ours.vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False))
    merges = json.loads(theirs.to_str())["model"]["merges"]

    made_with = {package: version(package) for package in ("regex", "tiktoken", "tokenizers")}
    sections = {"made_with": [made_with], "texts": cases, "special": special, "merges": merges}
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
             for name, rows in sections.items()]
    path = ROOT / "tests/data/golden_tokenizer.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    print(f"{path}: {len(cases)} texts, {len(special)} with special tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
