"""Byte-level byte pair encoding (BPE): text to token ids and back without loss, with a vocabulary learned from text.

BPE (Gage 1994; for words Sennrich et al. 2016; for bytes Radford et al. 2019) starts from the 256 bytes, which can
spell any text. It replaces the pair of neighboring tokens that occurs most often by a new token, and repeats this until
the vocabulary is large enough. This is the whole algorithm:

>>> def replace(ids, pair, token):
...     result = []
...     for item in ids:
...         result.append(item)
...         if tuple(result[-2:]) == pair:
...             result[-2:] = [token]
...     return result
>>> replace([1, 2, 3, 1, 2], (1, 2), 256)
[256, 3, 256]
>>> def naive_train(chunks, how_many):
...     chunks, merges = [list(chunk.encode()) for chunk in chunks], []
...     for rank in range(how_many):
...         counts = Counter(pair for ids in chunks for pair in zip(ids, ids[1:]))
...         pair = min(counts, key=lambda pair: (-counts[pair], pair))  # the most frequent; of equals, the smallest
...         chunks = [replace(ids, pair, 256 + rank) for ids in chunks]
...         merges.append(pair)
...     return merges
>>> naive_train(["low", " lower", " lowest"], 3)  # "l" + "o" is 256, "lo" + "w" is 257, " " + "low" is 258
[(108, 111), (256, 119), (32, 257)]

Tokens 0-255 are the bytes, merge number r (its rank, from 0) makes token 256 + r, and special tokens such as <|end|>
come last. GPT-2's pattern splits a text into chunks: words with the space before them, numbers, punctuation and white
space. No token crosses a chunk's border. The same replacements in the same order encode " lows" as [258, 115].

The naive code counts all pairs again for each merge, which takes minutes for 1,000 merges of a megabyte. Below,
`learn_merges` finds the same merges in a tenth of a second: it stores equal chunks once, with their count, and after a
`merge` it corrects only the counts of the pairs beside it. `ChunkEncoder` keeps the ids of the chunks that it has
encoded, because a text repeats its words.

    python bpe_tokenizer.py input.txt --vocab-size 500 --output bpe.json  learn, and write a tokenizer.json
    python bpe_tokenizer.py --load bpe.json --encode "some text"          show tokens; without --encode, the vocabulary
"""
import argparse
import heapq
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from operator import index
from pathlib import Path

import numpy as np
from tqdm import tqdm

CACHED_CHUNKS = 1 << 16  # an English book has some ten thousand different chunks
END = -1                 # in a list of ids: the end of a chunk, or a token that was merged into the one before it

# GPT-2's '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ for ASCII text. Words come first and
# are ` x+|x+` instead of ` ?x+`, because most chunks are words and `re` finds them faster in this way.
PATTERN = re.compile(r" [A-Za-z]+|[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[^\sA-Za-z0-9]+| ?[0-9]+|\s+(?!\S)|\s+", re.ASCII)
# A text is split window by window, so that the chunks of a large text are never all in memory. A window has 16,384
# characters and goes on to the next place where a chunk must end: after a word or number, or before a space.
WINDOW = re.compile(r"(?s).{16384,}?(?:[^\W_](?=[\W_])|\S(?= ))|.+")


class TokenizerError(ValueError):
    """A text, file or argument cannot be used; the message says why in one line."""


def require(condition, message):
    if not condition:
        raise TokenizerError(message)


def ascii_kind(c):
    """An ASCII character of the same kind as the character c: a letter, a number, white space or another one."""
    return c if c.isascii() else "a" if c.isalpha() else "1" if c.isalnum() else "\t" if c.isspace() else "!"


def split_text(text, special_tokens=(), progress=None):
    """Yield the text as lists of chunks, one list for each window, and between them special tokens as strings.

    split_text("I'm 20<|end|>Hi", ["<|end|>"]) -> ["I", "'m", " 20"], "<|end|>", ["Hi"]
    `progress` is the title of a bar, shown once the work has taken a second, and only on a terminal (disable=None)."""
    longest_first = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", text) if special_tokens else [text]
    with tqdm(total=len(text), desc=progress, unit="ch", unit_scale=True, delay=1, disable=not progress or None) as bar:
        for i, part in enumerate(parts):
            if i % 2:  # at odd places re.split puts what the (group) matched
                yield part
                continue
            for match in WINDOW.finditer(part):
                window = match[0]
                if window.isascii():
                    yield PATTERN.findall(window)
                else:
                    kinds = window.translate({ord(c): ascii_kind(c) for c in set(window)})
                    yield [window[chunk.start():chunk.end()] for chunk in PATTERN.finditer(kinds)]
                bar.update(len(window))


def merge(pair, token, places, ids, before, after):
    """Replace `pair` by `token` at those of `places` where it still stands; yield how the pairs beside it change.

    The tokens are a linked list: before[p] and after[p] are the places of the neighbors of place p. Deleting from it
    changes two numbers; deleting from a Python list moves all items that follow. With ids = [7, 1, 2, 8, END],
    merge((1, 2), 9, [1], ...) leaves [7, 9, END, 8, END], after[1] = 3 and before[3] = 1, and yields
    (place, old pair, new pair): (0, (7, 1), (7, 9)) and (1, (2, 8), (9, 8))."""
    left, right = pair
    for place in places:  # from left to right, so that aaa becomes (aa)a
        partner = after[place]
        if ids[place] != left or ids[partner] != right:
            continue  # another merge has taken one of them
        previous, following = before[place], after[partner]
        ids[place], ids[partner] = token, END
        after[place], before[following] = following, place
        if ids[previous] != END:  # at the very beginning, previous is -1, which is the last place: END as well
            yield previous, (ids[previous], left), (ids[previous], token)
        if ids[following] != END:
            yield place, (right, ids[following]), (token, ids[following])


def learn_merges(chunk_counts, how_many):
    """Learn up to `how_many` merges from {chunk: how often it occurs}; return [(left id, right id), ...] by rank.

    A heap finds the most frequent pair without looking at all pairs. A count in the heap cannot be changed, so it may
    be out of date; it is then too high, because pairs of older tokens only become rarer. A pair that is popped with an
    old count is pushed again with its true count, and the first pair with a true count is the most frequent one."""
    ids, weights = [], []  # all distinct chunks in one list; for each place, how often its chunk occurs
    for chunk, count in chunk_counts.items():
        ids += [*chunk.encode(), END]
        weights += [count] * (len(ids) - len(weights))
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # at first, places p - 1 and p + 1
    counts, places = defaultdict(int), defaultdict(list)
    for place, pair in enumerate(zip(ids, ids[1:])):
        if END not in pair:
            counts[pair] += weights[place]
            places[pair].append(place)
    heap = [(-count, pair) for pair, count in counts.items()]  # its smallest item: most frequent, then smallest pair
    heapq.heapify(heap)
    merges = []
    while len(merges) < how_many and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
        elif count < 0:  # otherwise the pair no longer occurs
            changes = list(merge(pair, 256 + len(merges), places.pop(pair), ids, before, after))
            merges.append(pair)
            for place, old, new in changes:
                counts[old] -= weights[place]
                counts[new] += weights[place]
                places[new].append(place)
            for new in {new for _, _, new in changes}:
                heapq.heappush(heap, (-counts[new], new))
    return merges


class ChunkEncoder(dict):
    """A cache {chunk: its ids, packed as bytes because these join fast}. A chunk is encoded when it is first needed."""

    def __init__(self, ids, merges, packed_ids):
        self.ids, self.merges, self.packed_ids = ids, merges, packed_ids  # ids: the bytes', then the merges'
        self.rank_of = {pair: rank for rank, pair in enumerate(merges)}

    def __missing__(self, chunk):  # called by self[chunk] if the chunk is not there
        rank_of, places = self.rank_of, defaultdict(list)  # places: by rank, where that merge is possible
        ids = [self.ids[byte] for byte in chunk.encode()] + [END]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        for place, pair in enumerate(zip(ids, ids[1:])):
            if pair in rank_of:
                places[rank_of[pair]].append(place)
        while places:
            rank = min(places)  # done once, because the pairs that it makes have its new token, and so a higher rank
            for place, _, new in merge(self.merges[rank], self.ids[256 + rank], places.pop(rank), ids, before, after):
                if new in rank_of:
                    places[rank_of[new]].append(place)
        packed = b"".join([self.packed_ids[token] for token in ids if token != END])
        if len(self) < CACHED_CHUNKS and len(chunk) <= 100:  # longer chunks hardly repeat
            self[chunk] = packed
        return packed


# A tokenizer.json spells each byte of a token as one visible character, as GPT-2 did: printable bytes as themselves,
# the others as U+0100 and on. A space is "Ġ", and " the" is "Ġthe".
OTHERS = itertools.count(0x100)
BYTE_OF = {chr(byte if chr(byte).isprintable() and byte != 0x20 else next(OTHERS)): byte for byte in range(256)}


def tokenizer_json(merges, special_tokens):
    """The text of a tokenizer.json, the file of Hugging Face's `tokenizers`."""
    spelled = list(BYTE_OF)
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0", "pre_tokenizer": byte_level, "decoder": byte_level,
        "added_tokens": [{"id": len(spelled) + i, "content": text, **flags} for i, text in enumerate(special_tokens)],
        "model": {"type": "BPE", "vocab": {text: token for token, text in enumerate([*spelled, *special_tokens])},
                  "merges": [f"{spelled[left]} {spelled[right]}" for left, right in merges]},
    }, ensure_ascii=False)


def check_section(name, section, types, known):
    """Refuse a section of a tokenizer.json that has another type, or switches on a setting that is not `known`."""
    require(isinstance(section, dict) and section.get("type") in types, f"unsupported {name} {section!r:.60}")
    for key, value in section.items():
        require(key in known.split() or not value, f"unsupported {name} with {key} {value!r:.60}")


class BPETokenizer:
    """Made by `train`, `load` or `from_state`. Its `vocab_size` counts all tokens; `merges` is a list of
    (left id, right id) by rank; `special_tokens` is {text: id}."""

    def __init__(self, state, merges, special_tokens, bytes_of):
        """`bytes_of` is {id: bytes}, of the 256 bytes, then of the merges by rank, then of all other tokens."""
        self.vocab_size, self.merges, self.special_tokens = len(bytes_of), merges, special_tokens
        self._state, self._bytes_of, self._ids = state, bytes_of, list(bytes_of)[:256 + len(merges)]
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self._packed_ids = [token.tobytes() for token in np.arange(self.vocab_size, dtype=self._dtype)]
        self._chunks = ChunkEncoder(self._ids, merges, self._packed_ids)

    @classmethod
    def train(cls, text, vocab_size, *, special_tokens=(), allowed_chars=None, sample_size=None, progress=False):
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, the special tokens, and merges for the rest.
        allowed_chars: learn only from chunks of these characters (name the space, too); any text can still be encoded.
        sample_size: learn only from so many characters at the beginning. progress: show a bar on a terminal.
        A text with few pairs gives a smaller vocabulary. Raises TokenizerError for a wrong size or special token."""
        cls.from_state(tokenizer_json([], special_tokens))  # refuses wrong ones before the long work
        how_many = vocab_size - 256 - len(special_tokens)
        require(how_many >= 0, f"a vocabulary of {vocab_size} has no room for 256 bytes and the special tokens")
        require(sample_size is None or sample_size > 0, f"a sample of {sample_size} characters is empty")
        parts = split_text(text[:sample_size], special_tokens, "counting chunks" if progress else None)
        chunk_counts = Counter(itertools.chain.from_iterable(part for part in parts if isinstance(part, list)))
        if allowed_chars is not None:
            chunk_counts = {chunk: count for chunk, count in chunk_counts.items() if set(chunk) <= set(allowed_chars)}
        merges = learn_merges(chunk_counts, how_many)
        if len(merges) < how_many:
            print(f"bpe_tokenizer.py: this text has {len(merges)} merges to learn, not {how_many}", file=sys.stderr)
        return cls.from_state(tokenizer_json(merges, special_tokens))

    def encode(self, text, allowed_special=(), disallowed_special="all"):
        """Text to a list of ids. The choices are "all" or a collection, as in tiktoken: a special token becomes its id
        if allowed, else raises TokenizerError if disallowed, else is text. Lone surrogates raise UnicodeEncodeError."""
        return self.encode_to_array(text, allowed_special, disallowed_special).tolist()

    def encode_to_array(self, text, allowed_special=(), disallowed_special="all", progress=False):
        """As `encode`, to a numpy array of the smallest unsigned type, without a list of all ids on the way."""
        special = self.special_tokens.keys()
        allowed = special if allowed_special == "all" else special & allowed_special
        for token in special - allowed if disallowed_special == "all" else disallowed_special:
            require(token not in text, f"the special token {token!r} is in the text, but not in allowed_special")
        packed = bytearray()  # not bytes, so that the array can be written to, as torch.from_numpy expects
        for part in split_text(text, allowed, "encoding" if progress else None):
            if isinstance(part, list):
                packed += b"".join(map(self._chunks.__getitem__, part))
            else:
                packed += self._packed_ids[self.special_tokens[part]]
        return np.frombuffer(packed, self._dtype)

    def decode_bytes(self, ids):
        """Ids (integers of Python, numpy or torch) to bytes. Raises TokenizerError for an unknown id."""
        try:
            return b"".join([self._bytes_of[index(token)] for token in ids])
        except KeyError as error:
            raise TokenizerError(f"there is no token {error}: ids go from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids):
        """Ids to text. Bytes that are not UTF-8, such as half a character, become U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(ids).decode(errors="replace")

    def mergeable_ranks(self):
        """{bytes: id} of the bytes and merges, as `tiktoken.Encoding` takes it."""
        require(self._ids[256:] == sorted(self._ids[256:]), "tiktoken needs ids that rise with the ranks of the merges")
        return {self._bytes_of[token]: token for token in self._ids}

    def state(self):
        """The whole tokenizer as one string, the text of a tokenizer.json."""
        return self._state

    def save(self, path):
        """Write a tokenizer.json. If this raises OSError or TokenizerError, what was there before is still there."""
        require(Path(path).is_file() or not Path(path).exists(), f"{path}: not a file that can be replaced")
        path = os.path.realpath(path)  # a link stays a link
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self._state, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json. Raises OSError if it cannot be read, TokenizerError if it cannot be used."""
        try:
            return cls.from_state(Path(path).read_bytes().decode())
        except ValueError as error:
            raise TokenizerError(f"{path}: {error}") from None

    @classmethod
    def from_state(cls, state):
        """The tokenizer with this `state()`. Raises TokenizerError if it is damaged or not BPE as in GPT-2."""
        require(isinstance(state, str), "the state of a tokenizer is a string")
        try:
            file = json.loads(state)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"not JSON: {error}") from None
        check_section("content", file, [None], "version added_tokens pre_tokenizer post_processor decoder model")
        model, split, added = file.get("model"), file.get("pre_tokenizer"), file.get("added_tokens") or []
        check_section("model", model, ["BPE", None], "type vocab merges unk_token fuse_unk")
        for name in "pre_tokenizer", "post_processor", "decoder":  # the last two can be missing
            check_section(name, file.get(name) or split, ["ByteLevel"], "type trim_offsets use_regex add_prefix_space")
        require(split.get("use_regex", True) and not split.get("add_prefix_space"), f"unsupported {split!r:.99}")
        vocab, rules = model.get("vocab"), model.get("merges")
        require(isinstance(vocab, dict) and isinstance(rules, list) and isinstance(added, list)
                and all(type(token) is int for token in vocab.values()), "wrong type of vocab, merges or added_tokens")
        require(vocab.keys() >= BYTE_OF.keys(), "some of the 256 bytes have no token")
        merges, special_tokens, bytes_of = [], {}, {vocab[symbol]: bytes([byte]) for symbol, byte in BYTE_OF.items()}
        for rule in rules:
            pair = rule.split(" ") if isinstance(rule, str) else rule  # "Ġ t" in older files, ["Ġ", "t"] in newer
            require(isinstance(pair, list) and list(map(type, pair)) == [str, str], f"merge {rule!r:.60} is not a pair")
            left, right, token = [vocab.get(part) for part in (*pair, "".join(pair))]
            require(left in bytes_of and right in bytes_of and token not in bytes_of and token is not None,
                    f"merge {rule!r:.60} does not make a new token of two older ones")
            merges.append((left, right))
            bytes_of[token] = bytes_of[left] + bytes_of[right]
        for entry in added:
            check_section("added token", entry, [None], "id content special normalized")
            text, token = entry.get("content"), entry.get("id")
            require(text and isinstance(text, str) and type(token) is int and token not in bytes_of
                    and vocab.setdefault(text, token) == token,
                    f"special token {text!r:.60} is empty, has no id, or shares its id or spelling with another token")
            special_tokens[text], bytes_of[token] = token, text.encode()
        for text, token in vocab.items():
            if token not in bytes_of:  # no merge makes it: it can be decoded, but is never encoded
                is_spelled = BYTE_OF.keys() >= set(text)
                bytes_of[token] = bytes(BYTE_OF[c] for c in text) if is_spelled else text.encode()
        require(sorted(bytes_of) == list(range(len(vocab))), f"{len(vocab)} tokens, but their ids are not 0, 1, 2, ...")
        return cls(state, merges, special_tokens, bytes_of)


def main(argv=None):
    """The command line. A user's mistake ends the program with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="bpe_tokenizer.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("file", nargs="?", help="UTF-8 text to learn from")
    parser.add_argument("--vocab-size", type=int, default=1024, help="bytes + merges + special tokens (%(default)s)")
    parser.add_argument("--special-token", action="append", default=[], help="such as <|end|>; can be repeated")
    parser.add_argument("--load", help="tokenizer.json to use, instead of learning one")
    parser.add_argument("--output", help="tokenizer.json to write")
    parser.add_argument("--encode", help="text to show as tokens")
    args = parser.parse_args(argv)
    file = args.load or args.file  # the one that an error is about
    try:
        if args.load:
            tokenizer = BPETokenizer.load(file)
        else:
            require(file and os.path.realpath(file) != os.path.realpath(args.output or ""),
                    "name a text to learn from (not --output), or use --load")
            text = Path(file).read_bytes().decode()
            tokenizer = BPETokenizer.train(text, args.vocab_size, special_tokens=args.special_token, progress=True)
            tokens = tokenizer.encode_to_array(text, "all", progress=True)
            print(f"{len(text.encode()):,} bytes are {len(tokens):,} tokens")
        if args.output:
            file = args.output
            tokenizer.save(file)
        if args.encode is None:
            learned = [tokenizer.decode([token]) for token in tokenizer._ids[256:]]
            print(f"vocabulary of {tokenizer.vocab_size:,} tokens: 256 bytes, {len(learned):,} merges")
            print("special tokens:", *(tokenizer.special_tokens or ["none"]))
            print("first merges:", *map(repr, learned[:9]))
            print("longest merges:", *map(repr, sorted(learned, key=len, reverse=True)[:4]))
        for token in tokenizer.encode(args.encode or "", allowed_special="all"):
            print(f"{token:6}  {tokenizer.decode([token])!r:16} {tokenizer.decode_bytes([token]).hex(' ')}")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{file}: {getattr(error, 'strerror', error)}")  # a UnicodeDecodeError has no strerror
    except (TokenizerError, UnicodeEncodeError) as error:
        parser.error(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
