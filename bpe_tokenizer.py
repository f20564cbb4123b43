"""A byte-level BPE tokenizer: text to a list of small integers and back, exactly, learned from a text.

Byte pair encoding (Gage 1994; for translation Sennrich et al. 2016; on bytes Radford et al. 2019, GPT-2) is one idea.
Start with the text's UTF-8 bytes: 256 tokens that can spell anything. Find the pair of tokens that most often stand
side by side, make it one new token, and go on until the vocabulary is as large as you want:

    low lower lowest    bytes:                             l o w _ l o w e r _ l o w e s t
                        l+o was seen 3 times, as was o+w:  lo w _ lo w e r _ lo w e s t
                        lo+w was seen 3 times:             low _ low e r _ low e s t        and so on

1. GPT-2's pattern first splits a text into chunks: a word with the space before it, a number, a run of signs or of
   white space. No token crosses the border of a chunk.
2. Tokens 0-255 are the bytes, the merge of rank r (0 is learned first) makes token 256 + r, and special tokens such
   as <|end|> come last. They are never split, and nothing is learned from them.
3. The most frequent pair is merged next; among equals the smaller one, by left id, then by right id.
4. A chunk is encoded by replaying the merges by rank, each of them from left to right.

The naive program counts all pairs of the text, replaces one, and counts all again: a minute for 300 merges of a
megabyte. This one finds the same merges in a tenth of a second because it does nothing twice: equal chunks are counted
once, and pair counts are kept up to date instead of recounted. Nor is a chunk encoded twice: its tokens are kept.

    python bpe_tokenizer.py input.txt --vocab-size 500 --output bpe.json      learn, and write a tokenizer.json
    python bpe_tokenizer.py --load bpe.json --encode "some text"              show the pieces and their ids
"""
import argparse
import codecs
import functools
import heapq
import itertools
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from reprlib import repr as short  # repr, cut to less than a line

import numpy as np
from tqdm import tqdm

MAX_FILE_SIZE = 16_000_000  # characters; a tokenizer.json of 50,000 tokens has 2 to 4 million
CACHED_CHUNKS = 1 << 16     # so many chunks are remembered; a book in English has some ten thousand
END = -1                    # in a list of ids: the end of a chunk, or an id merged into the one before it


class TokenizerError(ValueError):
    """What the user gave cannot be used; the message says why in one sentence."""


def require(condition, complaint):
    if not condition:
        raise TokenizerError(complaint)


def split_pattern(letter, number, other, space):
    r"""GPT-2's '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ from four character classes,
    each character in one of them. (` ?x+` is written ` x+|x+` here, where `re` sees sooner that it does not match.)"""
    words = "|".join(f" {kind}+|{kind}+" for kind in (letter, other, number))
    return re.compile(rf"'(?:[sdmt]|ll|ve|re)|{words}|{space}+(?={space}|\Z)|{space}+")


ASCII_PATTERN = split_pattern("[A-Za-z]", "[0-9]", r"[^A-Za-z0-9 \t-\r]", r"[ \t-\r]")
# What is split at a time: 16,384 characters and on to where any chunk ends: behind a word or number, or before a space.
WINDOW = re.compile(r"(?s).{16384,}?(?:[^\W_](?=[\W_])|\S(?= ))|.+")


@functools.cache
def unicode_pattern():
    r"""The pattern for text that is not ASCII; it takes three times as long. `re` lacks Unicode's \p{L} and \p{N}, its
    letters and numbers: \w is both and "_", \d the decimal digits only, and \s has four control characters too many.
    The other numbers, 80 ranges such as ½ or Ⅷ, are found as what is in \w, but no letter, digit or "_"."""
    all_characters = np.arange(sys.maxunicode + 1, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    runs = [run for run in re.findall(r"[^\W\d_]+", all_characters) if not run.isalpha()]  # not just letters
    groups = [list(group) for run in runs for is_letter, group in itertools.groupby(run, str.isalpha) if not is_letter]
    numbers = "".join(f"{group[0]}-{group[-1]}" for group in groups)
    return split_pattern(rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", r"(?:[^\w\s]|[_\x1c-\x1f])", r"[^\S\x1c-\x1f]")


def split_text(text, special_tokens=(), progress=None):
    """Yield the text as lists of chunks, one list for each window, and between them special tokens as strings.

    split_text("I'm 20<|end|>Hi", ["<|end|>"]) -> ["I", "'m", " 20"], "<|end|>", ["Hi"]
    `progress` is the title of a bar, shown on a terminal once the work has taken a second."""
    longest_first = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", text) if special_tokens else [text]
    with tqdm(total=len(text), desc=progress, unit="char", unit_scale=True, delay=1,
              disable=None if progress else True) as bar:  # None: no bar where there is no terminal
        for i, part in enumerate(parts):
            if i % 2:  # at odd places re.split puts what the (group) matched
                yield part
                continue
            for match in WINDOW.finditer(part):
                yield (ASCII_PATTERN if match[0].isascii() else unicode_pattern()).findall(match[0])
                bar.update(len(match[0]))


def merge(pair, token, places, ids, before, after):
    """Replace `pair` by `token` at those of `places` where it still stands; yield what this does to its neighbours.

    before[p] and after[p] are the places of the neighbours of place p: a linked list, from which it is quick to cut.
    With ids = [7, 1, 2, 8, END], merge((1, 2), 9, [1], ...) leaves [7, 9, END, 8, END] with after[1] = 3, and yields
    (place, old pair, new pair): (0, (7, 1), (7, 9)) and (1, (2, 8), (9, 8))."""
    left, right = pair
    for place in places:  # from left to right, since all were found in one such pass: aaa becomes (aa)a
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
    """Learn up to `how_many` merges from {chunk: how often it occurs}; return [(left, right), ...] by rank.

    learn_merges({"low": 1, " lower": 1, " lowest": 1}, 2) -> [(108, 111), (256, 119)], which are l+o and lo+w
    What the naive program counts again for every merge is kept here and changed only beside the merge: how often
    each pair occurs, and where. A heap hands out the most frequent pair. Its counts can be out of date, but only too
    high, since the pairs of old tokens just get rarer; such a pair is put back with its true count."""
    ids, weights = [], []  # all distinct chunks in a row; for each place, how often its chunk occurs
    for chunk, count in chunk_counts.items():
        chunk = [*chunk.encode(), END]
        ids += chunk
        weights += [count] * len(chunk)
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    counts, places = defaultdict(int), defaultdict(list)
    for place, pair in enumerate(zip(ids, ids[1:])):
        if END not in pair:
            counts[pair] += weights[place]
            places[pair].append(place)
    heap = [(-count, pair) for pair, count in counts.items()]  # its smallest: most frequent, then smaller ids
    heapq.heapify(heap)
    merges = []
    while len(merges) < how_many and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
        elif count < 0:
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
    """{chunk: its tokens, as the bytes of an array of ids}; filled as chunks are asked for, emptied when it is full.

    The naive way to encode a chunk searches it for the pair of lowest rank, merges that one and searches again: days
    for a million characters. Here `places` says where each merge can be done, and it is done at all of them at once;
    it cannot come up again, since its token is part of later merges only."""

    def __init__(self, ids, merges, packed_ids):
        self.ids, self.merges, self.packed_ids = ids, merges, packed_ids  # ids[n] is the id of token n of rule 2
        self.rank_of = {pair: rank for rank, pair in enumerate(merges)}

    def __missing__(self, chunk):
        rank_of, places = self.rank_of, defaultdict(list)
        ids = [self.ids[byte] for byte in chunk.encode()] + [END]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        for place, pair in enumerate(zip(ids, ids[1:])):
            if pair in rank_of:
                places[rank_of[pair]].append(place)
        while places:
            rank = min(places)
            for place, _, new in merge(self.merges[rank], self.ids[256 + rank], places.pop(rank), ids, before, after):
                if new in rank_of:
                    places[rank_of[new]].append(place)
        packed = b"".join([self.packed_ids[token] for token in ids if token != END])
        if len(self) >= CACHED_CHUNKS:
            self.clear()
        if len(chunk) <= 100:  # a longer one hardly comes twice
            self[chunk] = packed
        return packed


# A tokenizer.json spells each byte of a token as one visible character, as GPT-2 did: printable bytes as themselves,
# the others as U+0100 and on. A space is "Ġ", and " the" is "Ġthe".
OTHERS = itertools.count(0x100)
BYTE_SYMBOLS = [chr(byte if chr(byte).isprintable() and byte != 0x20 else next(OTHERS)) for byte in range(256)]


def tokenizer_json(merges, special_tokens):
    """The text of a tokenizer.json, the file of Hugging Face's `tokenizers`, with ids by rule 2."""
    spelled = BYTE_SYMBOLS.copy()
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
    """Refuse a section of a tokenizer.json that has another type, or switches on more than what is `known`."""
    unsupported = f"tokenizer.json: unsupported {name}"
    require(isinstance(section, dict) and section.get("type") in types, f"{unsupported} {short(section)}")
    for key, value in section.items():
        require(key in known.split() or not value, f"{unsupported} with {key} {short(value)}")


class BPETokenizer:
    """Made by `train`, `load` or `from_state`. It has a `vocab_size`, which counts bytes, merges and special tokens,
    the list of `merges`, (left id, right id) by rank, and `special_tokens`, {text: id}."""

    def __init__(self, state):
        """`state` is the text of a tokenizer.json, perhaps a stranger's: whatever is damaged in it, or is more than
        byte-level BPE with GPT-2's split, raises a TokenizerError that names it."""
        require(isinstance(state, str) and len(state) <= MAX_FILE_SIZE, "tokenizer.json: not text of up to 16 MB")
        try:
            file = json.loads(state)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"tokenizer.json: not JSON: {error}") from None
        check_section("content", file, [None], "version added_tokens pre_tokenizer post_processor decoder model")
        model, split, added = file.get("model"), file.get("pre_tokenizer"), file.get("added_tokens") or []
        check_section("model", model, ["BPE", None], "type vocab merges unk_token fuse_unk")
        check_section("pre_tokenizer", split, ["ByteLevel"], "type trim_offsets use_regex")
        require(split.get("use_regex", True), "tokenizer.json: unsupported pre_tokenizer without use_regex")
        for name in "post_processor", "decoder":
            check_section(name, file.get(name) or split, ["ByteLevel"], "type trim_offsets use_regex add_prefix_space")
        vocab, rules = model.get("vocab"), model.get("merges")
        require(isinstance(vocab, dict) and isinstance(rules, list) and isinstance(added, list)
                and all(type(token) is int for token in vocab.values()), "tokenizer.json: wrong type of vocab or lists")
        require(vocab.keys() >= set(BYTE_SYMBOLS), "tokenizer.json: some of the 256 bytes have no token")
        self.merges, self.special_tokens = [], {}
        self._bytes_of = made = {vocab[symbol]: bytes([byte]) for byte, symbol in enumerate(BYTE_SYMBOLS)}
        for rule in rules:
            pair = rule.split(" ") if isinstance(rule, str) else rule
            is_pair = isinstance(pair, list) and list(map(type, pair)) == [str, str]
            left, right, token = [vocab.get(text) for text in (*pair, "".join(pair))] if is_pair else [None] * 3
            require(left in made and right in made and token not in made and token is not None,
                    f"tokenizer.json: merge {short(rule)} does not make a new token of two older ones")
            self.merges.append((left, right))
            made[token] = made[left] + made[right]
        for entry in added:
            check_section("added token", entry, [None], "id content special normalized")
            text, token = entry.get("content"), entry.get("id")
            require(isinstance(text, str) and len(text.encode()) > 1, f"special token {short(text)}: under two bytes")
            require(type(token) is int and token not in made and vocab.setdefault(text, token) == token,
                    f"special token {short(text)} has no id, or shares its id or its spelling with another token")
            self.special_tokens[text] = token
            made[token] = text.encode()
        require(sorted(made) == list(range(len(vocab))), "tokenizer.json: ids with gaps, or tokens that no merge makes")
        self.vocab_size, self._state, self._ids = len(vocab), state, list(made)
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self._packed_ids = [token.tobytes() for token in np.arange(self.vocab_size, dtype=self._dtype)]
        self._chunks = ChunkEncoder(self._ids, self.merges, self._packed_ids)

    @classmethod
    def from_state(cls, state):
        """The tokenizer whose `state()` this is."""
        return cls(state)

    @classmethod
    def train(cls, text, vocab_size, *, special_tokens=(), allowed_chars=None, sample_size=None, progress=False):
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, the special tokens, and merges for the rest.
        `allowed_chars`: learn only from chunks made of these characters (name the space too); all other text is
        still encoded, as bytes. `sample_size`: learn from so many characters at the beginning."""
        cls(tokenizer_json([], special_tokens))  # refuses wrong ones before the long work
        how_many = vocab_size - 256 - len(special_tokens)
        require(how_many >= 0, f"a vocabulary of {vocab_size} has no room for 256 bytes and the special tokens")
        require(sample_size is None or sample_size > 0, f"a sample of {sample_size} characters teaches nothing")
        parts = split_text(text[:sample_size], special_tokens, "counting chunks" if progress else None)
        chunk_counts = Counter(itertools.chain.from_iterable(part for part in parts if isinstance(part, list)))
        if allowed_chars is not None:
            chunk_counts = {chunk: count for chunk, count in chunk_counts.items() if set(chunk) <= set(allowed_chars)}
        merges = learn_merges(chunk_counts, how_many)
        if len(merges) < how_many:
            print(f"bpe_tokenizer.py: this text has {len(merges)} merges to learn, not {how_many}", file=sys.stderr)
        return cls(tokenizer_json(merges, special_tokens))

    def encode(self, text, allowed_special=(), disallowed_special="all"):
        """Text to a list of ids. Both choices are "all" or a collection, and mean what they do in tiktoken: a special
        token in the text becomes its id if allowed, else a TokenizerError if disallowed, else it is plain text."""
        return self.encode_to_array(text, allowed_special, disallowed_special).tolist()

    def encode_to_array(self, text, allowed_special=(), disallowed_special="all", progress=False):
        """As `encode`, to a numpy array of the smallest unsigned type. There is never a list of all ids."""
        special = self.special_tokens.keys()
        allowed = special if allowed_special == "all" else special & allowed_special
        for token in special - allowed if disallowed_special == "all" else disallowed_special:
            require(token not in text, f"the text holds the special token {token!r}, but allowed_special does not")
        packed = bytearray()
        for part in split_text(text, allowed, "encoding" if progress else None):
            if isinstance(part, list):
                packed += b"".join(map(self._chunks.__getitem__, part))
            else:
                packed += self._packed_ids[self.special_tokens[part]]
        return np.frombuffer(packed, self._dtype)

    def decode_bytes(self, ids):
        """Ids to the very bytes that were encoded. An unknown id raises a TokenizerError that names it."""
        try:
            return b"".join([self._bytes_of[int(token)] for token in ids])  # int() for those of numpy and torch
        except KeyError as error:
            raise TokenizerError(f"there is no token {error}: ids go from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids):
        """Ids to text. Broken UTF-8, such as half a character, becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids):
        """Yield the text of ids as they come in, each character as soon as its last byte is there."""
        yield from codecs.iterdecode((self.decode_bytes([token]) for token in ids), "utf-8", errors="replace")

    def mergeable_ranks(self):
        """{bytes of a token: its id}, special tokens left out, as `tiktoken.Encoding` takes it."""
        ids = self._ids[: 256 + len(self.merges)]
        require(ids[256:] == sorted(ids[256:]), "tiktoken needs ids that rise with the ranks of the merges")
        return {self._bytes_of[token]: token for token in ids}

    def state(self):
        """All of the tokenizer as one string, the text of a tokenizer.json."""
        return self._state

    def save(self, path):
        """Write a tokenizer.json. If that fails, a file that was there before is still the old one."""
        temporary = Path(f"{path}.{time.time_ns()}.tmp")
        try:
            temporary.write_text(self._state, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, ours or another's."""
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return cls(file.read(MAX_FILE_SIZE + 1))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Learn a byte-level BPE tokenizer from a text, or look at one.")
    parser.add_argument("file", nargs="?", help="UTF-8 text to learn from")
    parser.add_argument("--vocab-size", type=int, default=1024, help="bytes + merges + special tokens (%(default)s)")
    parser.add_argument("--special-token", action="append", default=[], help="such as <|end|>; can be repeated")
    parser.add_argument("--allowed-chars", help="learn only from chunks of these characters (name the space too)")
    parser.add_argument("--sample-size", type=int, help="learn from so many characters at the beginning")
    parser.add_argument("--load", help="tokenizer.json to use, in the place of learning one")
    parser.add_argument("--output", help="tokenizer.json to write")
    parser.add_argument("--encode", default="", help="text to show as ids and pieces")
    parser.error = lambda message: parser.exit(2, f"bpe_tokenizer.py: error: {' '.join(str(message).split())}\n")
    args = parser.parse_args(argv)
    try:
        if args.load:
            tokenizer = BPETokenizer.load(args.load)
        else:
            require(args.file and args.file != args.output, "name a text to learn from (not --output), or use --load")
            text = Path(args.file).read_bytes().decode()
            start = time.perf_counter()
            tokenizer = BPETokenizer.train(text, args.vocab_size, special_tokens=args.special_token, progress=True,
                                           allowed_chars=args.allowed_chars, sample_size=args.sample_size)
            print(f"vocabulary of {tokenizer.vocab_size} tokens, learned in {time.perf_counter() - start:.2f} s")
            if args.output:
                tokenizer.save(args.output)
            size, count = len(text.encode()), len(tokenizer.encode_to_array(text, "all", progress=True))
            print(f"{size:,} bytes are {count:,} tokens, {size / max(count, 1):.2f} bytes per token")
            learned = [repr(tokenizer.decode([token])) for token in range(256, 256 + len(tokenizer.merges))]
            print("first:", *learned[:16], "\nlongest:", *sorted(learned, key=len, reverse=True)[:16])
        for token in tokenizer.encode(args.encode, allowed_special="all"):
            print(f"{token:6}  {tokenizer.decode([token])!r:16} {tokenizer.decode_bytes([token]).hex(' ')}")
    except (TokenizerError, OSError, UnicodeError) as error:
        parser.error(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
