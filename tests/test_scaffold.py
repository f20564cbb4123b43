"""tests.scaffold_bpe: it does what a naive program of the paper's rules does, and a row of tests.ablations trains."""

import json
import random
from collections import Counter
from unittest import mock

import pytest

import v2_bpe_rope
from bpe_tokenizer import BPETokenizer, split_text
from tests import ablations
from tests.conftest import result_of, tiny_flags
from tests.scaffold_bpe import ScaffoldBPE, train_scaffold_bpe


def train(text, vocab_size):
    return train_scaffold_bpe(text, v2_bpe_rope.Config(vocab_size=vocab_size))


def scaffolds_of(tokenizer):
    """The scaffold tokens as bytes."""
    bpe = BPETokenizer.from_state(tokenizer.state()["bpe"])
    return [bpe.decode_bytes([token]) for token in tokenizer.state()["scaffolds"]]


def merged_tokens(tokenizer):
    """The vocabulary without the bytes, as bytes."""
    return [tokenizer.decode_bytes([i]) for i in range(256, tokenizer.vocab_size)]


def naive_merge(tokens, pair):
    merged, i = [], 0
    while i < len(tokens):
        found = tuple(tokens[i:i + 2]) == pair
        merged.append(b"".join(pair) if found else tokens[i])
        i += 2 if found else 1
    return merged


def naive_train(text, how_many):
    """Algorithm 1 of Lian et al. 2024, with everything counted again at each step; a token is its bytes.
    Returns {token: the pair it is made of} in the order of merging, and the set of scaffold tokens."""
    chunks = [[bytes([byte]) for byte in chunk.encode()] for part in split_text(text) for chunk in part]
    made_of, scaffolds = {}, set()

    def head():
        """The pair at the head of the queue, or None, and its frequency."""
        ids = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *made_of])}

        def smaller_first(pair):
            return -ids[pair[0]], -ids[pair[1]]

        pairs = Counter(pair for chunk in chunks for pair in zip(chunk, chunk[1:]))
        queue = {made_of[token]: sum(chunk.count(token) for chunk in chunks) for token in scaffolds}
        if pairs:  # of these plain BPE's next; in aaa, the pair (a, a) is there twice, but is merged once
            pair = max(pairs, key=lambda pair: (pairs[pair], smaller_first(pair)))
            queue[pair] = sum(len(chunk) - len(naive_merge(chunk, pair)) for chunk in chunks)
        return max(queue.items(), key=lambda entry: (entry[1], smaller_first(entry[0])), default=(None, 0))

    while len(made_of) - len(scaffolds) < how_many and (pair := head()[0]):
        token = b"".join(pair)
        if token in scaffolds:
            scaffolds.remove(token)
            continue
        assert token not in made_of  # BPE makes each token of one pair only
        made_of[token] = pair
        chunks = [naive_merge(chunk, pair) for chunk in chunks]
        limit = head()[1]
        scaffolds |= {part for part in pair if part in made_of and sum(chunk.count(part) for chunk in chunks) < limit}
    return made_of, scaffolds


def naive_encode(text, made_of, scaffolds):
    """Algorithm 2: all merges by rank, then scaffold tokens are taken apart until none is left."""
    tokens = []
    for part in split_text(text):
        for chunk in part:
            merged = [bytes([byte]) for byte in chunk.encode()]
            for pair in made_of.values():
                merged = naive_merge(merged, pair)
            tokens += merged
    while scaffolds & set(tokens):
        tokens = [part for token in tokens for part in (made_of[token] if token in scaffolds else (token,))]
    return tokens


def random_text(seed):
    """A few different words of a few letters, some of them often; seeds differ in how many there are of each."""
    draw = random.Random(seed)
    alphabet = "abcdefgh"[:draw.randint(1, 8)] + draw.choice(["", "é", "-", "'"])
    words = ["".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 12))]
    return " ".join(draw.choices(words, k=draw.randint(1, 60)))


@pytest.mark.parametrize("seed", range(80))
def test_it_does_what_the_naive_program_does(seed):
    text, unseen = random_text(seed), random_text(1000 + seed)
    for how_many in (1, 3, 8, 20, 1000):
        made_of, scaffolds = naive_train(text, how_many)
        tokenizer = train(text, 256 + how_many)
        assert merged_tokens(tokenizer) == [token for token in made_of if token not in scaffolds]
        assert scaffolds_of(tokenizer) == [token for token in made_of if token in scaffolds]
        for some in (text, unseen):
            expected = naive_encode(some, made_of, scaffolds)
            assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(some)] == expected


WORDS = "\n".join(["abc"] * 5 + ["ab"] + ["de"] * 3 + ["fg"] * 2)


def test_a_worked_example():
    """ab is made 6 times, then abc of 5 of these. The one ab left is rarer than d+e (3): a scaffold token."""
    for how_many, vocabulary, scaffolds in [
        (1, [b"ab"], []),
        (2, [b"abc", b"de"], [b"ab"]),
        (3, [b"abc", b"de", b"fg"], [b"ab"]),
        (4, [b"ab", b"abc", b"de", b"fg"], []),  # the queue is empty but for ab
    ]:
        tokenizer = train(WORDS, 256 + how_many)
        assert merged_tokens(tokenizer) == vocabulary and scaffolds_of(tokenizer) == scaffolds
    tokenizer = train(WORDS, 258)
    assert tokenizer.encode("abcab") == [256, ord("a"), ord("b")] and tokenizer.encode("de") == [257]


def test_the_vocabulary_has_the_size_of_plain_bpe_and_no_rare_token(text):
    """In the text that it was learned from no token is less frequent than the next one would be."""
    for vocab_size in (256, 300, 1024):
        tokenizer = train(text, vocab_size)
        assert tokenizer.vocab_size == BPETokenizer.train(text, vocab_size).vocab_size == vocab_size
        assert set(merged_tokens(tokenizer)).isdisjoint(scaffolds_of(tokenizer))
        assert bool(scaffolds_of(tokenizer)) == (vocab_size > 256)
        longer = BPETokenizer.train(text, vocab_size + len(scaffolds_of(tokenizer)) + 1)
        limit, counts = longer.encode(text).count(longer.vocab_size - 1), Counter(tokenizer.encode(text))
        assert all(counts[i] >= limit for i in range(256, vocab_size))


def test_no_scaffold_token_is_ever_encoded(text):
    tokenizer = train(text, 1024)
    scaffolds = scaffolds_of(tokenizer)
    assert len(scaffolds) > 20
    encoded = {tokenizer.decode_bytes([i]) for some in [text, *map(bytes.decode, scaffolds)]
               for i in tokenizer.encode(some)}
    assert encoded.isdisjoint(scaffolds)


def test_any_text_comes_back(text):
    tokenizer, draw = train(text, 400), random.Random(1)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for some in ["", "\0", text, *("".join(draw.choices(characters, k=50)) for _ in range(200))]:
        array = tokenizer.encode_to_array(some)
        assert tokenizer.decode(array) == some == tokenizer.decode_bytes(tokenizer.encode(some)).decode()
        assert array.dtype == "uint16" and array.tolist() == tokenizer.encode(some)
    assert train("", 300).encode("é") == list("é".encode()) and train("", 300).encode_to_array("é").dtype == "uint8"


def test_its_state_is_plain_data_and_gives_the_same_tokenizer(text):
    tokenizer = train(text, 500)
    again = ScaffoldBPE(json.loads(json.dumps(tokenizer.state())))
    assert again.state() == tokenizer.state() and again.vocab_size == 500
    assert again.encode(text) == tokenizer.encode(text)


def test_a_row_trains_and_its_checkpoint_loads(tmp_path, small, text):
    program, replaced, flags = ablations.TABLES["scaffold"]["1,024: Scaffold-BPE"]
    args = mock.Mock(out=tmp_path, steps=3, data=small, flags=tiny_flags(v2_bpe_rope))
    folder = ablations.train((program, replaced, flags), 5, args)
    assert result_of(folder)["vocab_size"] == 300
    with ablations.replaced_in(program, replaced):
        model, tokenizer, _ = program.load(folder / "best.pt")
    training_text, _ = program.read_texts(small)
    assert tokenizer.state() == train(training_text, 300).state() and len(model.token_embedding.weight) == 300


def test_rows_share_a_folder_only_if_they_are_the_same_program():
    folders = [ablations.name_of(*row) for row in ablations.TABLES["scaffold"].values()]
    others = {ablations.name_of(*row) for title, rows in ablations.TABLES.items() if title != "scaffold"
              for row in rows.values()}
    assert len(set(folders)) == 4 and {folders[0], folders[2]} <= others and others.isdisjoint([folders[1], folders[3]])
