"""Data augmentation for a chat model: each question 19 more times, without some of its frequent words.

    python -m tests.augment tests/data/conversation.csv runs/augmented.csv

A small model learns a few hundred questions by heart, each by its exact words, and does not recognize them in other
words. Frequent words ("what", "is", "tell") say least about the answer, so the copies lose most of them: a word that
makes up a fraction f of all words in the questions is kept with probability sqrt(0.003 / f), at most 1. word2vec treats
frequent words like this (Mikolov et al. 2013, https://arxiv.org/abs/1310.4546); leaving words out at random is one of
the augmentations of Wei and Zou 2019 (https://arxiv.org/abs/1901.11196).

The rows are shuffled, so that copies of a row are not neighbors. The last tenth of the rows, which the scripts use for
validation, is the last tenth of the new file.
"""

import argparse
import collections
import csv
import math
import random
from pathlib import Path

from v2_bpe_rope import UserError, read_texts

COPIES, THRESHOLD = 19, 0.003


def plain(word):
    """A word without capitals and punctuation."""
    return word.lower().strip("?.,!'")


def kept_with(questions):
    """{word: the probability with which a copy keeps it}"""
    count = collections.Counter(plain(word) for question in questions for word in question.split())
    return {word: min(1.0, math.sqrt(THRESHOLD * count.total() / n)) for word, n in count.items()}


def augment(rows, seed=0):
    """[(question, answer), ...] to COPIES + 1 times as many. A question that would lose all its words stays as it is."""
    rng, cut, augmented = random.Random(seed), len(rows) * 9 // 10, []
    kept = kept_with([question for question, _ in rows])
    for part in (rows[:cut], rows[cut:]):
        for copy in range(COPIES + 1):
            for question, answer in rng.sample(part, len(part)):
                words = [word for word in question.split() if copy == 0 or rng.random() < kept[plain(word)]]
                augmented.append((" ".join(words) or question, answer))
    return augmented


def main(argv=None):
    parser = argparse.ArgumentParser(prog="augment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .csv file with the columns question,answer")
    parser.add_argument("target", type=Path, help="where the new .csv file is written")
    args = parser.parse_args(argv)
    if args.source.suffix.lower() != ".csv" or args.target.suffix.lower() != ".csv":
        parser.error("both files need names that end in .csv, by which the scripts know questions and answers")
    if args.target.exists() and args.target.samefile(args.source):
        parser.error("the target is the source, which would be lost")
    try:
        read_texts(args.source)  # checks the file as the scripts do
        with open(args.source, encoding="utf-8-sig", newline="") as file:
            rows = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
        augmented = augment(rows)
        args.target.parent.mkdir(parents=True, exist_ok=True)
        with open(args.target, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *augmented])
    except (UserError, OSError) as error:
        parser.error(str(error))
    print(f"{args.target}: {len(augmented):,} rows from {len(rows):,}")


if __name__ == "__main__":
    main()
