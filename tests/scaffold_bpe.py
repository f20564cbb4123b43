"""Scaffold-BPE (Lian et al. 2024, https://arxiv.org/abs/2404.17808), Algorithms 1 (rules 1 to 3) and 2 (rule 4).

A token that is little more than a step to a longer one, such as "zona" to "Arizona", is not shown to the model:
1. The queue holds pairs of tokens. At its head is the pair that makes, or has made, the most frequent token of the text
   as merged so far; among equals the smaller pair.
2. The head is merged, and its token joins the vocabulary. If either of the two parts is now less frequent than the new
   head, and not a byte, it becomes a scaffold token: it leaves the vocabulary, and its own pair returns to the queue.
3. If that pair comes to the head, its token rejoins the vocabulary. Training ends when this has the size asked for.
4. A text is encoded with all merges. Then each scaffold token is replaced by its two parts, and so are they in turn.
"""
from collections import Counter

import numpy as np

from bpe_tokenizer import BPETokenizer, learn_merges, split_text


def train_scaffold_bpe(text, config):
    """A ScaffoldBPE of `config.vocab_size` tokens, or fewer if the text has no more pairs."""
    merges = learn_merges(Counter(chunk for chunks in split_text(text) for chunk in chunks), len(text.encode()))
    pairs = dict(enumerate(merges, 256))  # all of plain BPE: scaffold tokens decide how many are used, not which
    frequency = Counter(BPETokenizer.train(text, 256 + len(pairs)).encode(text))
    for token, pair in reversed(pairs.items()):
        for part in pair:
            frequency[part] += frequency[token]  # undoes the merge; in the end, how often each token is made
    scaffolds, head, following = set(), 256, 256  # `following`: the token that the next merge makes
    while following - len(scaffolds) < min(config.vocab_size, 256 + len(pairs)):
        if head in scaffolds:
            scaffolds.remove(head)
            parts = ()
        else:
            parts = pairs[head]
            following += 1
            for part in parts:
                frequency[part] -= frequency[head]
        queue = [token for token in (*scaffolds, following) if token in pairs]
        head = min(queue, key=lambda token: (-frequency[token], pairs[token]), default=None)
        scaffolds |= {part for part in parts if part > 255 and frequency[part] < frequency[head]}
    return ScaffoldBPE({"bpe": BPETokenizer.train(text, following).state(), "scaffolds": sorted(scaffolds)})


class ScaffoldBPE:
    """What the scripts use of a BPETokenizer. Its `state`: that of one with all merges, and the scaffold tokens."""

    def __init__(self, state):
        self._state, self._bpe = state, BPETokenizer.from_state(state["bpe"])
        self._tokens, self._ids = [], []  # the token of _bpe that each id stands for; the ids of each token of _bpe
        for token, pair in enumerate([()] * 256 + self._bpe.merges):
            if token in state["scaffolds"]:
                self._ids.append(self._ids[pair[0]] + self._ids[pair[1]])
            else:
                self._ids.append([len(self._tokens)])
                self._tokens.append(token)
        self.vocab_size = len(self._tokens)

    def state(self):
        return self._state

    def encode(self, text):
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text, progress=False):
        ids = [i for token in self._bpe.encode_to_array(text, progress=progress).tolist() for i in self._ids[token]]
        return np.array(ids, np.min_scalar_type(self.vocab_size - 1))

    def decode_bytes(self, ids):
        return self._bpe.decode_bytes([self._tokens[i] for i in ids])

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")
