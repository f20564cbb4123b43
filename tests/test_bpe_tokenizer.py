"""The tokenizer against the naive one of its docstring, against what other libraries gave, and against bad input.

tests/data/golden_tokenizer.json holds what `regex`, `tiktoken` and `tokenizers` give (see tests/make_golden.py). The
tests below "where they are installed" compare with the libraries themselves, on many more texts."""

import doctest
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import bpe_tokenizer
from bpe_tokenizer import BPETokenizer, TokenizerError, split_text

ROOT = Path(__file__).resolve().parent.parent
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPECIAL_TOKENS = ["<|end|>", "<|endoftext|>"]
VARIED = [
    "", "\n", "hello world", "I'll say we've 'tis they're I'LL it's x'sy ''s", "  two  spaces\t\ttabs \r\n\r\n end  ",
    "x=1+22;y[3]={'a':0.5e-7}//!!?", "naïve café, Ünïcödé; ½ and Ⅷ and x² and ٣ and 五", "東京タワーは高い。こんにちは！",
    "مرحبا بالعالم שלום", "😀 👩‍👩‍👧 🏳️‍🌈 👍🏽 e\u0301",
    "\x00\x1c\x1d\x1e\x1f\x7f\x85\xa0\u2028\u3000\ufeff", "_snake_case __init__ a_1", "aaaaaaaaaaaaaaaa",
]


# ---- the naive tokenizer ----

WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


def kind(character):
    """L (letter), N (number), S (white space) or O (other), as GPT-2's pattern sees a character."""
    category = unicodedata.category(character)[0]
    return "S" if character in WHITE_SPACE else category if category in "LN" else "O"


def naive_split(text):
    """GPT-2's pattern in plain code, one character after the other."""
    chunks, start = [], 0
    while start < len(text):
        contraction = next((c for c in ("'s", "'d", "'m", "'t", "'ll", "'ve", "'re") if text.startswith(c, start)), "")
        first = start + (text[start] == " " and start + 1 < len(text) and kind(text[start + 1]) != "S")
        end = first
        while end < len(text) and kind(text[end]) == kind(text[first]):
            end += 1
        if contraction:
            end = start + len(contraction)
        elif kind(text[first]) == "S" and end < len(text) and end - start > 1:
            end -= 1  # the last white space goes to what follows
        chunks.append(text[start:end])
        start = end
    return chunks


# The code in the module's docstring is the reference for all merges: its functions, after the doctest has run.
DOCTEST = doctest.DocTestParser().get_doctest(bpe_tokenizer.__doc__, dict(vars(bpe_tokenizer)), "docstring", None, None)
DOCTEST_RESULT = doctest.DocTestRunner().run(DOCTEST, clear_globs=False)
replace, naive_train = DOCTEST.globs["replace"], DOCTEST.globs["naive_train"]


def naive_encode(text, merges):
    ids = []
    for chunk in naive_split(text):
        chunk_ids = list(chunk.encode())
        for rank, pair in enumerate(merges):
            chunk_ids = replace(chunk_ids, pair, 256 + rank)
        ids += chunk_ids
    return ids


# ---- material ----


@pytest.fixture(scope="module")
def corpus():
    return (ROOT / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return BPETokenizer.train(corpus, 1024, special_tokens=SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def golden():
    return json.loads((ROOT / "tests/data/golden_tokenizer.json").read_text(encoding="utf-8"))


def random_text(rng, length):
    """Letters, punctuation and white space of all planes, joined emoji, control characters, runs of one character."""
    sources = [
        lambda: rng.choice("abc xyz'\n"),
        lambda: chr(rng.randrange(128)),
        lambda: chr(rng.choice([0x300, 0x1C, 0x85, 0xAD, 0x200B, 0x200D, 0x202E, 0xFEFF, 0xFFFD, 0xFFFF, 0x10FFFF])),
        lambda: chr(rng.choice([*range(0x80, 0x2FF), *range(0x1F300, 0x1F6FF, 7), *range(0x4E00, 0x9FFF, 99)])),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: "\u200d".join(rng.choices("👩👧🧑🚀🏳️", k=rng.randrange(2, 5))),
        lambda: rng.choice("a \n.9é界😀") * rng.randrange(2, 40),
    ]
    return "".join(rng.choice(sources)() for _ in range(length))


def small_json(extra=(), **changes):
    """A tokenizer.json such as others write: the ids of bytes are not the bytes, a special token is in the middle.

    `extra` are tokens that no merge makes; model__dropout=0.1 changes the setting "dropout" in the section "model"."""
    tokens = [*sorted(bpe_tokenizer.BYTE_OF), "Ġt", "<|end|>", "he", "Ġthe", "ou", *extra]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": 257, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": True, "special": True}],
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": {**byte_level, "trim_offsets": False}, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["o", "u"]]},
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        section = content
        for parent in parents:
            section = section[int(parent) if parent.isdigit() else parent]
        section[name] = value
    return content


def from_content(content):
    return BPETokenizer.from_state(json.dumps(content))


def lines_run(function, *arguments):
    """How many lines of bpe_tokenizer.py run in a call: its work, measured without a clock."""
    count, before = 0, sys.gettrace()

    def count_line(frame, event, _):
        nonlocal count
        count += event == "line"
        return count_line

    sys.settrace(lambda frame, event, _: count_line if frame.f_code.co_filename == bpe_tokenizer.__file__ else None)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


# ---- splitting ----


def split(text):
    return list(itertools.chain.from_iterable(split_text(text)))


def test_every_character_is_of_the_kind_that_unicode_says():
    example = {"L": "a", "N": "1", "S": "\t", "O": "!"}
    for c in map(chr, range(sys.maxunicode + 1)):
        assert bpe_tokenizer.ascii_kind(c) == (c if c < "\x80" else example[kind(c)]), hex(ord(c))


def test_split_agrees_with_naive_split(corpus):
    rng = random.Random(1)
    ascii_texts = ["".join(characters) for characters in itertools.product("ae1!'s \n\x1c", repeat=4)]
    for text in [*VARIED, *ascii_texts, *(random_text(rng, rng.randrange(30)) for _ in range(1000)), corpus[:30_000]]:
        assert split(text) == naive_split(text)


def test_split_agrees_with_the_golden_chunks(golden):
    for case in golden["texts"]:
        assert split("".join(case["chunks"])) == case["chunks"]


def test_windows_do_not_change_the_split(monkeypatch, corpus):
    rng = random.Random(2)
    texts = [*VARIED, corpus[:3000], *(random_text(rng, 40) for _ in range(200))]
    whole = [split(text) for text in texts]
    for size in 1, 2, 5:
        pattern = bpe_tokenizer.WINDOW.pattern.replace("16384", str(size))
        monkeypatch.setattr(bpe_tokenizer, "WINDOW", re.compile(pattern))
        assert len(list(split_text(corpus[:3000]))) > 3000 // (size + 20)
        assert [split(text) for text in texts] == whole


def test_a_window_is_hardly_longer_than_it_must_be(corpus):
    windows = [len("".join(chunks)) for chunks in split_text(corpus)]
    assert len(windows) > 50 and min(windows[:-1]) >= 16_384 and max(windows) < 16_484
    assert split("a" * 50_000) == ["a" * 50_000]


# ---- learning ----


def test_the_docstring_is_right():
    assert DOCTEST_RESULT.attempted == 4 and DOCTEST_RESULT.failed == 0


def test_worked_examples_of_the_other_docstrings():
    end = bpe_tokenizer.END
    assert list(split_text("I'm 20<|end|>Hi", ["<|end|>"])) == [["I", "'m", " 20"], "<|end|>", ["Hi"]]
    ids, before, after = [7, 1, 2, 8, end], [-1, 0, 1, 2, 3], [1, 2, 3, 4, 5]
    changes = list(bpe_tokenizer.merge((1, 2), 9, [1], ids, before, after))
    assert ids == [7, 9, end, 8, end] and after[1] == 3 and before[3] == 1
    assert changes == [(0, (7, 1), (7, 9)), (1, (2, 8), (9, 8))]
    merges = [(108, 111), (256, 119), (32, 257)]
    assert bpe_tokenizer.learn_merges({"low": 1, " lower": 1, " lowest": 1}, 3) == merges
    assert BPETokenizer.train("low lower lowest", 259).encode(" lows") == naive_encode(" lows", merges) == [258, 115]


def test_merges_agree_with_naive_train_on_small_texts():
    rng = random.Random(3)
    alphabets = ["a", "ab", "aab ", "abc \n", "aé", "😀a ", "the cat's hat ", "01 .,"]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for alphabet in alphabets for _ in range(30)]
    for text in [*texts, *("a" * length for length in range(40)), *VARIED]:
        merges, chunks = BPETokenizer.train(text, 256 + 25).merges, naive_split(text)
        assert merges == naive_train(chunks, len(merges)), text
        if len(merges) < 25:  # it stopped early because there is nothing left to merge
            assert all(len(naive_encode(chunk, merges)) == 1 for chunk in chunks)


def test_merges_agree_with_naive_train_on_real_text(corpus):
    assert BPETokenizer.train(corpus[:8000], 256 + 100).merges == naive_train(naive_split(corpus[:8000]), 100)


def test_merges_agree_with_those_of_tokenizers(golden, tokenizer):
    """It breaks ties in another order, because its ids number the bytes in another way: so the sets are compared."""
    symbols = list(bpe_tokenizer.BYTE_OF)
    spelled = {tuple("".join(symbols[byte] for byte in tokenizer.decode_bytes([token])) for token in pair)
               for pair in tokenizer.merges}
    assert spelled == set(map(tuple, golden["merges"]))


def test_ties_go_to_the_smaller_pair():
    """In "dc" and " ba" every pair stands once: first the smallest one, space + b; then d + c before " b" + a."""
    assert BPETokenizer.train("dc ba", 258).merges == [(32, 98), (100, 99)]


def test_training_is_the_same_in_every_process(corpus):
    """Python's sets of strings have another order in each process. None of this order may reach the merges."""
    program = "import sys; from bpe_tokenizer import *; print(BPETokenizer.train(sys.stdin.read(), 500).merges)"
    outputs = set()
    for seed in "12":
        done = subprocess.run([sys.executable, "-c", program], input=corpus[:30_000], capture_output=True, check=True,
                              encoding="utf-8", cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})
        outputs.add(done.stdout)
    assert outputs == {f"{BPETokenizer.train(corpus[:30_000], 500).merges}\n"}


def test_vocab_size_counts_everything(corpus):
    trained = BPETokenizer.train(corpus[:20_000], 300, special_tokens=["<|a|>", "<|b|>"])
    assert trained.vocab_size == 300 and len(trained.merges) == 42
    assert trained.special_tokens == {"<|a|>": 298, "<|b|>": 299}
    assert BPETokenizer.train("", 256).vocab_size == 256
    assert BPETokenizer.train("", 258, special_tokens=("<a>", "<b>")).vocab_size == 258


def test_too_many_merges_end_early_and_say_so(capsys):
    trained = BPETokenizer.train("abab", 258)
    assert trained.merges == [(97, 98), (256, 256)] and capsys.readouterr() == ("", "")
    assert BPETokenizer.train("abab", 1000).merges == trained.merges
    assert capsys.readouterr() == ("", "bpe_tokenizer.py: this text has 2 merges to learn, not 744\n")


def test_a_sample_is_the_beginning_of_the_text(corpus):
    sampled = BPETokenizer.train(corpus, 400, sample_size=30_000)
    assert sampled.merges == BPETokenizer.train(corpus[:30_000], 400).merges
    assert BPETokenizer.train("ab" * 9, 300, sample_size=1).merges == []


def test_only_chunks_of_allowed_characters_are_learned_from():
    text = "the theme, thé 123 the\n" * 9
    merges = BPETokenizer.train(text, 300, allowed_chars="ehmt").merges  # without the space: "the" at line starts only
    assert merges == BPETokenizer.train("the\n" * 9, 300, allowed_chars="ehmt").merges == [(104, 101), (116, 256)]
    trained = BPETokenizer.train(text, 300, allowed_chars="ehmt ")
    learned = {trained.decode([token]) for token in range(256, trained.vocab_size)}
    assert " theme" in learned and set("".join(learned)) == set("ehmt ")
    assert trained.decode(trained.encode(text)) == text
    assert BPETokenizer.train(text, 300, allowed_chars="").merges == []


def test_special_tokens_are_never_learned_from():
    text = "ab<|ab|>" * 50
    trained = BPETokenizer.train(text, 300, special_tokens=["<|ab|>"])
    assert trained.merges == [(97, 98)]
    assert trained.encode(text, allowed_special="all") == [256, 257] * 50


@pytest.mark.parametrize("arguments, words", [
    ({"vocab_size": 255}, "vocabulary of 255"),
    ({"vocab_size": 257, "special_tokens": ["<a>", "<b>"]}, "no room"),
    ({"vocab_size": 300, "special_tokens": ["<a>", "<a>"]}, "special token '<a>'"),
    ({"vocab_size": 300, "special_tokens": ["a"]}, "special token 'a'"),
    ({"vocab_size": 300, "special_tokens": [""]}, "special token ''"),
    ({"vocab_size": 300, "special_tokens": [7]}, "special token 7"),
    ({"vocab_size": 300, "special_tokens": "<a>"}, "special token '<'"),
    ({"vocab_size": 300, "special_tokens": ["é"]}, "special token 'é'"),  # how a tokenizer.json spells byte 0xE9
    ({"vocab_size": 300, "special_tokens": ["a\ud800"]}, "surrogate"),
    ({"vocab_size": 300, "sample_size": 0}, "sample of 0"),
    ({"vocab_size": 300, "sample_size": -5}, "sample of -5"),
])
def test_wrong_training_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        BPETokenizer.train("some text", **arguments)


# ---- encoding and decoding ----


def test_encoding_agrees_with_naive_encode(tokenizer, corpus):
    rng = random.Random(4)
    for text in [*VARIED, corpus[-2000:], *("".join(rng.choices("aehstou ", k=40)) for _ in range(30))]:
        assert tokenizer.encode(text) == naive_encode(text, tokenizer.merges)


def test_encoding_agrees_with_the_golden_ids(tokenizer, golden):
    for case in golden["texts"]:
        text = "".join(case["chunks"])
        assert tokenizer.encode(text) == case["ids"] and tokenizer.decode(case["ids"]) == text


def test_special_tokens_agree_with_the_golden_ids(tokenizer, golden):
    assert {case["ids"] is None for case in golden["special"]} == {True, False}
    for case in golden["special"]:
        if case["ids"] is None:
            with pytest.raises(TokenizerError, match=r"special token '<\|end"):
                tokenizer.encode(case["text"], case["allowed"], case["disallowed"])
        else:
            assert tokenizer.encode(case["text"], case["allowed"], case["disallowed"]) == case["ids"]


def test_round_trip_of_any_text(tokenizer, corpus):
    rng = random.Random(5)
    texts = [random_text(rng, rng.randrange(12)) for _ in range(2000)]
    assert "" in texts and max(map(len, texts)) > 100
    learned_from_them = BPETokenizer.train("".join(texts[:1000]), 700)
    for trained in BPETokenizer.train("", 256), tokenizer, learned_from_them:
        for text in texts:
            assert trained.decode(trained.encode(text)) == text


def test_broken_utf8_is_decoded_as_far_as_possible(tokenizer):
    ids = list("é😀!".encode())[1:]
    assert tokenizer.decode(ids) == bytes(ids).decode(errors="replace") == "\ufffd😀!"
    assert tokenizer.decode_bytes(ids) == bytes(ids)
    assert tokenizer.decode([]) == "" and tokenizer.decode_bytes([]) == b""


@pytest.mark.parametrize("unknown", [-1, 1024, 10**30, np.int64(-7)])
def test_unknown_ids_are_named(tokenizer, unknown):
    for decode in tokenizer.decode, tokenizer.decode_bytes:
        with pytest.raises(TokenizerError, match=rf"no token {int(unknown)}\b.* from 0 to 1023"):
            decode([65, unknown])


@pytest.mark.parametrize("wrong", [65.0, float("nan"), "A", None, np.float32(65), [65]])
def test_what_is_no_integer_is_no_id(tokenizer, wrong):
    with pytest.raises(TypeError):
        tokenizer.decode([65, wrong])


def test_ids_can_come_from_numpy_and_torch(tokenizer):
    text = "Hello, world"
    assert tokenizer.decode(tokenizer.encode_to_array(text)) == text
    assert tokenizer.decode(list(tokenizer.encode_to_array(text))) == text
    torch = pytest.importorskip("torch")
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text))) == text
    assert tokenizer.decode(torch.from_numpy(tokenizer.encode_to_array(text))) == text


def test_lone_surrogates_are_refused(tokenizer):
    for text in "\ud800", "ok \udfff ok":
        with pytest.raises(ValueError, match="surrogate"):
            tokenizer.encode(text)
        with pytest.raises(ValueError, match="surrogate"):
            BPETokenizer.train(text, 300)


def test_arrays_have_the_smallest_type():
    text = "some text é"
    for merges, dtype in (0, np.uint8), (1, np.uint16):
        array = BPETokenizer.train(text, 256 + merges).encode_to_array(text)
        assert array.dtype == dtype and array.flags.writeable
    for size, dtype in (65536, np.uint16), (65537, np.uint32):
        large = BPETokenizer("", [], {"<|end|>": size - 1}, {i: bytes([i % 256]) for i in range(size)})
        array = large.encode_to_array(text + "<|end|>", allowed_special="all")
        assert array.dtype == dtype and array.tolist() == [*text.encode(), size - 1]


def test_an_array_equals_the_list(tokenizer, corpus):
    for text in [*VARIED, corpus[:50_000], "a<|end|>b"]:
        array = tokenizer.encode_to_array(text, allowed_special="all")
        assert array.dtype == np.uint16 and array.ndim == 1
        assert array.tolist() == tokenizer.encode(text, allowed_special="all")


def test_special_tokens_in_text(tokenizer):
    text, end = "a<|end|>b", tokenizer.special_tokens["<|end|>"]
    plain = tokenizer.encode(text, disallowed_special=())
    assert end == 1022 and end not in plain and tokenizer.decode(plain) == text
    for encode in tokenizer.encode, lambda *a, **k: tokenizer.encode_to_array(*a, **k).tolist():
        for refusing in {}, {"allowed_special": {"<|endoftext|>"}}, {"disallowed_special": ["<|end|>"]}:
            with pytest.raises(TokenizerError, match=r"'<\|end\|>'"):
                encode(text, **refusing)
        assert encode(text, disallowed_special={"<|endoftext|>"}) == plain
        assert encode(text, allowed_special="all") == encode(text, allowed_special={"<|end|>"}) == [97, end, 98]
        assert encode(text + "<|endoftext|>", allowed_special={"<|end|>"}, disallowed_special=())[:3] == [97, end, 98]
    assert tokenizer.decode([97, end, 98]) == text


def test_the_longest_special_token_wins():
    trained = BPETokenizer.train("", 259, special_tokens=["<|", "<|end|>", "|>x"])
    assert trained.encode("<|end|>x<|", allowed_special="all") == [257, 120, 256]


def test_a_special_token_can_be_one_byte():
    trained = BPETokenizer.train("a\nb", 300, special_tokens=["\n", " "])
    assert trained.encode("a\nb \n", allowed_special="all") == [97, 256, 98, 257, 256] and trained.merges == []
    assert trained.decode([97, 256, 98]) == trained.decode([97, 10, 98]) == "a\nb"


def test_the_cache_is_bounded(tokenizer, monkeypatch, corpus):
    monkeypatch.setattr(bpe_tokenizer, "CACHED_CHUNKS", 50)
    fresh = BPETokenizer.from_state(tokenizer.state())
    assert fresh.encode(corpus[:20_000]) == fresh.encode(corpus[:20_000]) == tokenizer.encode(corpus[:20_000])
    assert len(fresh._chunks) == 50
    fresh = BPETokenizer.from_state(tokenizer.state())
    fresh.encode(f"{'x' * 99} {'y' * 99} {'z' * 100}")  # long chunks hardly repeat: they are not kept
    assert list(fresh._chunks) == ["x" * 99, " " + "y" * 99]


def test_no_chunk_is_encoded_twice(tokenizer, corpus):
    fresh = BPETokenizer.from_state(tokenizer.state())
    first, second = (lines_run(fresh.encode, corpus[:5000]) for _ in range(2))
    assert second < 50 < first / 100


def test_a_bar_is_only_shown_where_it_is_asked_for(tokenizer, monkeypatch, capsys, corpus):
    """And only on a terminal (disable=None), and only after a second (delay=1)."""
    seen, updates = [], []

    class Bar(bpe_tokenizer.tqdm):
        def __init__(self, **settings):
            seen.append(settings)
            super().__init__(**settings)

        def update(self, n):
            updates.append(n)

    monkeypatch.setattr(bpe_tokenizer, "tqdm", Bar)
    for choice in {}, {"progress": True}:
        tokenizer.encode_to_array(corpus[:40_000], **choice)
        BPETokenizer.train(corpus[:40_000], 260, **choice)
    assert [settings["disable"] for settings in seen] == [True, True, None, None]
    assert [settings["desc"] for settings in seen] == [None, None, "encoding", "counting chunks"]
    assert all(settings["delay"] == 1 and settings["total"] == 40_000 and settings["unit_scale"] for settings in seen)
    assert sum(updates) == 4 * 40_000 and len(updates) == 4 * 3
    assert capsys.readouterr() == ("", "")
    bpe_tokenizer.main([str(ROOT / "tests/data/conversation.csv"), "--vocab-size", "257"])
    assert [settings["disable"] for settings in seen[4:6]] == [None, None] and capsys.readouterr().err == ""


def test_work_grows_in_proportion_to_the_length_of_a_chunk(tokenizer):
    """A linked list and a list of places do a fixed amount of work for each merge. Whatever searched the chunk again
    for each merge would take thousands of steps for each of 10,000 letters, and hours for a chunk of a million."""
    letters = "".join(random.Random(7).choices("etaoinshrdlu", k=10_000))
    runs = BPETokenizer.train("a" * 5000, 256 + 12)
    for encoder, text, limit in (tokenizer, letters, 40), (runs, "a" * 10_000, 40):
        assert lines_run(encoder.encode, text) < limit * len(text)
    assert runs.decode(runs.encode("a" * 10_000)) == "a" * 10_000 and len(runs.encode("a" * 10_000)) < 10
    few, many = (lines_run(bpe_tokenizer.learn_merges, {letters: 1}, merges) for merges in (200, 400))
    assert few < 40 * len(letters) and many < 1.5 * few  # later merges are of rarer pairs


def test_memory_for_encoding_is_little_more_than_the_array(tokenizer, corpus):
    text = corpus[:500_000]
    tokenizer.encode_to_array(text)  # fills the cache
    tracemalloc.start()
    try:
        array = tokenizer.encode_to_array(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(array) > len(text) / 3
    assert peak < array.nbytes + 1_500_000  # a list of the ids alone would take 1.5 MB, one of the chunks 10 MB


# ---- files ----


def test_state_is_plain_data(tokenizer, tmp_path):
    again = BPETokenizer.from_state(tokenizer.state())
    assert again.merges == tokenizer.merges and again.special_tokens == tokenizer.special_tokens
    assert again.vocab_size == 1024 and again.state() == tokenizer.state()
    torch = pytest.importorskip("torch")
    torch.save({"tokenizer": tokenizer.state()}, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["tokenizer"]
    assert BPETokenizer.from_state(state).merges == tokenizer.merges


def test_save_and_load(tokenizer, tmp_path, corpus):
    tokenizer.save(tmp_path / "a.json")
    tokenizer.save(str(tmp_path / "b.json"))
    loaded = BPETokenizer.load(tmp_path / "a.json")
    assert loaded.merges == tokenizer.merges and loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode(corpus[:20_000]) == tokenizer.encode(corpus[:20_000])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_the_file_says_what_others_need(tokenizer):
    content = json.loads(tokenizer.state())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    assert content["pre_tokenizer"] == content["decoder"] == byte_level and content["version"] == "1.0"
    vocab = content["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(1024)) and vocab["Ġ"] == 32 and vocab["Ċ"] == 10 and vocab["Ġt"] == 256
    assert content["model"]["merges"][0] == "Ġ t" and content["model"]["type"] == "BPE"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    assert content["added_tokens"] == [{"id": 1022, "content": "<|end|>", **flags},
                                       {"id": 1023, "content": "<|endoftext|>", **flags}]


def test_ids_of_another_order(tmp_path):
    """As in GPT-2's file, a byte's id is not the byte."""
    path, content = tmp_path / "other.json", small_json()
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded, vocab = BPETokenizer.load(path), content["model"]["vocab"]
    text = " the sou then<|end|>é"
    ids = [vocab[token] for token in ["Ġthe", "Ġ", "s", "ou", "Ġthe", "n", "<|end|>", "Ã", "©"]]
    assert vocab["Ġ"] != 32
    assert loaded.encode(text, allowed_special="all") == ids and loaded.decode(ids) == text
    assert loaded.merges == [(vocab[a], vocab[b]) for a, b in content["model"]["merges"]]
    assert loaded.vocab_size == 261 and loaded.special_tokens == {"<|end|>": 257}
    ranks = loaded.mergeable_ranks()
    assert ranks[b" the"] == 259 and ranks[b" "] == vocab["Ġ"] and len(ranks) == 260 and 257 not in ranks.values()
    loaded.save(path)
    assert BPETokenizer.load(path).encode(text, allowed_special="all") == ids


def test_older_files():
    """Each merge one text, no type of the model, no use_regex: all of this is in GPT-2's file."""
    content = small_json(model__merges=["Ġ t", "h e", "Ġt he", "o u"])
    for name in "type", "byte_fallback", "ignore_merges":
        del content["model"][name]
    for name in "pre_tokenizer", "post_processor", "decoder":
        del content[name]["use_regex"]
    old, new = from_content(content), from_content(small_json())
    assert old.merges == new.merges and old.encode(" the sou") == new.encode(" the sou")
    assert from_content(small_json(post_processor=None, decoder=None, added_tokens=None)).special_tokens == {}


# Tokens that no merge makes, and their bytes: those that they spell if all characters are byte symbols, else UTF-8.
EXTRA = {"<|endoftext|>": b"<|endoftext|>", "Ġéx": b" \xe9x", "Ã©": "é".encode(), "日本": "日本".encode(),
         "Ġ日": "Ġ日".encode(), "a b": b"a b", "": b""}


def test_tokens_that_no_merge_makes_are_decoded_but_never_encoded():
    """GPT-2's vocabulary, saved by ByteLevelBPETokenizer, has <|endoftext|> in this way: it is no added token there."""
    plain, loaded = from_content(small_json()), from_content(small_json(extra=EXTRA))
    assert loaded.vocab_size == 261 + len(EXTRA) and loaded.special_tokens == {"<|end|>": 257}
    assert [loaded.decode_bytes([token]) for token in range(261, loaded.vocab_size)] == list(EXTRA.values())
    for text in [*VARIED, *EXTRA, "the<|endoftext|>end a b Ġ日本"]:
        assert loaded.encode(text) == plain.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.mergeable_ranks() == plain.mergeable_ranks()
    again = BPETokenizer.from_state(loaded.state())
    assert again.vocab_size == loaded.vocab_size and again.decode([261, 264]) == "<|endoftext|>日本"


def entry(**changes):
    return {**small_json()["added_tokens"][0], **changes}


def vocab(**changes):
    changed = {**small_json()["model"]["vocab"], **changes}
    return {token: i for token, i in changed.items() if i != "removed"}


SPECIAL = r"special token '<\|end\|>'"
DAMAGED = [
    # settings that ask for more than we do, or for something else
    ("normalizer", small_json(normalizer={"type": "NFC"})),
    ("truncation", small_json(truncation={"max_length": 5})),
    ("padding", small_json(padding={"strategy": "BatchLongest"})),
    ("future", small_json(future="setting")),
    ("pre_tokenizer None", small_json(pre_tokenizer=None)),
    ("pre_tokenizer {}", small_json(pre_tokenizer={})),
    ("Whitespace", small_json(pre_tokenizer={"type": "Whitespace"})),
    ("Sequence", small_json(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]})),
    ("pre_tokenizer with trimming", small_json(pre_tokenizer__trimming=True)),
    ("unsupported .*'add_prefix_space': True", small_json(pre_tokenizer__add_prefix_space=True)),
    ("unsupported .*'use_regex': False", small_json(pre_tokenizer__use_regex=False)),
    ("post_processor", small_json(post_processor={"type": "TemplateProcessing", "single": []})),
    ("decoder", small_json(decoder={"type": "WordPiece"})),
    ("model None", small_json(model=None)),
    ("model 7", small_json(model=7)),
    ("Unigram", small_json(model={"type": "Unigram", "vocab": []})),
    ("dropout 0.1", small_json(model__dropout=0.1)),
    ("dropout nan", small_json(model__dropout=float("nan"))),
    ("continuing_subword_prefix '##'", small_json(model__continuing_subword_prefix="##")),
    ("end_of_word_suffix '</w>'", small_json(model__end_of_word_suffix="</w>")),
    ("ignore_merges True", small_json(model__ignore_merges=True)),
    ("byte_fallback True", small_json(model__byte_fallback=True)),
    ("lstrip True", small_json(added_tokens__0__lstrip=True)),
    ("rstrip True", small_json(added_tokens__0__rstrip=True)),
    ("single_word True", small_json(added_tokens__0__single_word=True)),
    # special tokens
    ("added token 'x'", small_json(added_tokens=["x"])),
    (SPECIAL, small_json(added_tokens=[entry(id=5)])),
    (SPECIAL, small_json(added_tokens=[entry(), entry()])),
    ("special token '<new>' .* has no id", small_json(added_tokens=[entry(content="<new>", id=None)])),
    ("special token '<new>' .* has no id", small_json(added_tokens=[entry(content="<new>", id=True)])),
    ("special token '<new>' .* shares", small_json(added_tokens=[entry(content="<new>", id=258)])),
    ("special token '<new>'", small_json(added_tokens=[entry(), entry(content="<new>", id=261.0)])),
    ("special token 'he' .* shares", small_json(added_tokens=[entry(content="he", id=258)])),
    ("special token 'a' .* shares", small_json(added_tokens=[entry(content="a", id=261)])),
    ("special token '' is empty", small_json(added_tokens=[entry(content="", id=261)])),
    ("special token None", small_json(added_tokens=[entry(content=None)])),
    ("special token 5", small_json(added_tokens=[entry(content=5)])),
    ("surrogate", small_json(added_tokens=[entry(content="<\ud800>", id=261)])),
    # vocab and merges
    ("wrong type", small_json(model__vocab=["a", "b"])),
    ("wrong type", small_json(model__vocab=vocab(he="258"))),
    ("wrong type", small_json(model__vocab=vocab(he=True))),
    ("wrong type", small_json(model__vocab=vocab(he=258.0))),
    ("wrong type", small_json(model__merges={})),
    ("wrong type", small_json(added_tokens={"a": 1})),
    ("256 bytes", small_json(model__vocab=vocab(a="removed"))),
    ("261 tokens, but", small_json(model__vocab=vocab(ou=270))),
    ("261 tokens, but", small_json(model__vocab=vocab(ou=-1))),
    ("261 tokens, but", small_json(model__vocab=vocab(ou=10**4000))),
    ("262 tokens, but", small_json(model__vocab=vocab(xyz=262))),
    ("262 tokens, but", small_json(model__vocab=vocab(xyz=258))),
    ("surrogate", small_json(model__vocab={**vocab(), "<\ud800>": 261})),
    (r"merge \['o', 'u'\]", small_json(model__vocab=vocab(ou=3))),
    (r"merge \['q', 'zz'\]", small_json(model__merges=[["q", "zz"]])),
    (r"merge \['h', 'e'\]", small_json(model__vocab=vocab(he="removed", zz=258))),
    (r"merge \['Ġt', 'he'\]", small_json(model__merges=[["Ġt", "he"], ["Ġ", "t"], ["h", "e"], ["o", "u"]])),
    (r"merge \['Ġ', 'the'\]", small_json(extra=["the"], model__merges=[["Ġ", "t"], ["h", "e"], ["Ġ", "the"]])),
    (r"merge \['the', 'n'\]", small_json(extra=["the", "then"], model__merges=[["Ġ", "t"], ["the", "n"]])),
    (r"merge \['o', 'u'\]", small_json(model__merges=[*small_json()["model"]["merges"], ["o", "u"]])),
    (r"merge \['o', 'u', 'r'\]", small_json(model__merges=[["o", "u", "r"]])),
    ("merge 'o  u'", small_json(model__merges=["o  u"])),
    ("merge 'ou'", small_json(model__merges=["ou"])),
    ("merge 5", small_json(model__merges=[5])),
    (r"merge \[\[\], {}\]", small_json(model__merges=[[[], {}]])),
    # not even that
    (r"content \[\]", []),
    ("content None", None),
    ("content 'text'", "text"),
]


@pytest.mark.parametrize("words, content", DAMAGED, ids=[f"{i}-{words}" for i, (words, _) in enumerate(DAMAGED)])
def test_damaged_and_foreign_files_are_refused_by_name(words, content, tmp_path):
    path, text = tmp_path / "damaged.json", json.dumps(content)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        BPETokenizer.from_state(text)
    with pytest.raises(TokenizerError, match=words) as raised:
        BPETokenizer.load(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 200


@pytest.mark.parametrize("content, words", [
    (b"", "not JSON"),
    (b"\x80\x04\x95pickle", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-8"),
    (json.dumps(small_json()).encode()[:-100], "not JSON"),
    (b'{"model": ' + b"9" * 5000 + b"}", "not JSON|unsupported model"),
    (b"[" * 100_000, "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
], ids=lambda value: value if isinstance(value, str) else f"{value[:8]}")
def test_files_of_something_else_are_refused(content, words, tmp_path):
    path = tmp_path / "else.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as raised:
        BPETokenizer.load(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 200


@pytest.mark.parametrize("state", [None, 5, b"{}", {"model": {}}, "", "{}", "[]"])
def test_damaged_states_are_refused(state):
    with pytest.raises(TokenizerError):
        BPETokenizer.from_state(state)


def test_random_damage_gives_an_error_or_a_whole_tokenizer():
    rng = random.Random(8)
    good = json.dumps(small_json(extra=["<|more|>"]))
    accepted = 0
    for _ in range(1000):
        text = list(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(text))
            text[place : place + rng.randrange(3)] = rng.choice(['"', "0", "1", "{", "]", ",", "null", "Ġ", "t", ""])
        try:
            loaded = BPETokenizer.from_state("".join(text))
        except ValueError:
            continue
        accepted += 1
        assert loaded.decode(loaded.encode("all of the sound é")) == "all of the sound é"
        assert len(loaded.decode(range(loaded.vocab_size))) > 256
    assert accepted < 350


def test_ranks_that_tiktoken_could_not_use():
    content = small_json(model__merges=[["o", "u"], ["Ġ", "t"], ["h", "e"], ["Ġt", "he"]])
    with pytest.raises(TokenizerError, match="tiktoken"):
        from_content(content).mergeable_ranks()


def test_saving_through_a_link_keeps_the_link(tokenizer, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    tokenizer.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and BPETokenizer.load(tmp_path / "there.json").vocab_size == 1024
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_plain_file_is_never_replaced(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path, tmp_path / "pipe":
        with pytest.raises(TokenizerError, match="not a file that can be replaced"):
            tokenizer.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_failed_save_keeps_the_old_file(tokenizer, tmp_path, monkeypatch, method):
    path = tmp_path / "a.json"
    BPETokenizer.train("abab", 257).save(path)
    old = path.read_bytes()

    def fail(self, *args, **kwargs):
        if method == "write_text":
            self.write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(bpe_tokenizer.Path, method, fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---- the other libraries, where they are installed ----


def test_regex_splits_the_same(corpus):
    pattern = pytest.importorskip("regex").compile(GPT2_PATTERN)
    assigned = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    text = "\n".join([*VARIED, corpus, *(f"a{c}1{c} {c}!{c} a  {c}" for c in assigned[::3])])
    assert next((pair for pair in zip(split(text), pattern.findall(text)) if pair[0] != pair[1]), None) is None


def test_rustbpe_learns_the_same(corpus):
    rustbpe = pytest.importorskip("rustbpe")
    for text, vocab_size in (corpus[:300_000], 1022), (corpus[:50_000], 3000), ("\n".join(VARIED), 400):
        theirs = rustbpe.Tokenizer()
        theirs.train_from_iterator([text], vocab_size, pattern=GPT2_PATTERN)
        ours = BPETokenizer.train(text, vocab_size)
        assert {bytes(token): rank for token, rank in theirs.get_mergeable_ranks()} == ours.mergeable_ranks()


def encode_or_refuse(encode, text, allowed, disallowed):
    """The ids, or None if a special token is disallowed: what tiktoken and we do in the same way."""
    try:
        return encode(text, allowed_special=allowed, disallowed_special=disallowed)
    except ValueError:
        return None


def test_tiktoken_encodes_the_same(tokenizer, corpus):
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=tokenizer.mergeable_ranks(),
                               special_tokens=tokenizer.special_tokens)
    rng = random.Random(9)
    for text in [*VARIED, corpus, *(random_text(rng, rng.randrange(15)) for _ in range(300))]:
        assert tokenizer.encode(text) == theirs.encode(text)
    pieces, choices = [*SPECIAL_TOKENS, "<|end", "|>", " ", "the", "\n"], [set(), "all", {"<|end|>"}, {"<|endoftext|>"}]
    for text in ("".join(rng.choices(pieces, k=4)) for _ in range(50)):
        for choice in itertools.product(choices, choices):
            assert encode_or_refuse(tokenizer.encode, text, *choice) == encode_or_refuse(theirs.encode, text, *choice)


def test_tokenizers_reads_our_file(tokenizer, corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path / "ours.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
    rng = random.Random(10)
    pieces = [*SPECIAL_TOKENS, "<|end", "|>", " ", "the", "\n", "é", "  "]
    texts = [*VARIED, corpus[:200_000], *(random_text(rng, rng.randrange(15)) for _ in range(300))]
    for text in [*texts, *("".join(rng.choices(pieces, k=6)) for _ in range(100))]:
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids and theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    assert theirs.token_to_id("<|end|>") == tokenizer.special_tokens["<|end|>"]


def test_we_read_the_file_of_tokenizers(corpus):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<|end|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([corpus[:200_000]], trainer)
    ours = BPETokenizer.from_state(theirs.to_str())
    assert ours.special_tokens == {"<unk>": 0, "<|end|>": 1}
    rng = random.Random(11)
    for text in [*VARIED, corpus[:200_000], "a<|end|>b", *(random_text(rng, rng.randrange(15)) for _ in range(300))]:
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


def test_tokenizers_reads_the_small_file_as_we_do():
    tokenizers = pytest.importorskip("tokenizers")
    for extra in (), EXTRA:
        content = small_json(extra=extra)
        theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(content)), from_content(content)
        for text in [*VARIED, *EXTRA, " the sou then<|end|>é"]:
            assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
        for token in range(ours.vocab_size):
            assert ours.decode([token]) == theirs.decode([token], skip_special_tokens=False)


def test_we_read_what_byte_level_bpe_tokenizer_saves(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    content = small_json(extra=EXTRA)["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = "\n".join(map(" ".join, content["merges"]))
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe"))
    theirs.save(str(tmp_path / "saved.json"))
    ours = BPETokenizer.load(tmp_path / "saved.json")
    assert ours.special_tokens == {} and ours.vocab_size == theirs.get_vocab_size()
    for text in [*VARIED, *EXTRA, " the sou then<|endoftext|>é"]:
        assert ours.encode(text) == theirs.encode(text).ids
    for token in range(ours.vocab_size):
        assert ours.decode([token]) == theirs.decode([token], skip_special_tokens=False)


# ---- the command line ----


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A function that runs the command line in a folder with a few files: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text to learn from", encoding="utf-8")
    Path("latin1.txt").write_bytes("a café".encode("latin-1"))
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")

    def run(*arguments):
        status = 0
        try:
            bpe_tokenizer.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_the_command_line_learns_and_shows(command, corpus):
    text = "low lower lowest<|end|>" * 9 + "new newer"
    Path("low.txt").write_text(text, encoding="utf-8")
    learned = command("low.txt", "--vocab-size", 263, "--output", "bpe.json", "--special-token", "<|end|>",
                      "--special-token", "<|user|>")
    loaded = BPETokenizer.load("bpe.json")
    assert loaded.merges == BPETokenizer.train(text, 263, special_tokens=["<|end|>", "<|user|>"]).merges
    assert loaded.special_tokens == {"<|end|>": 261, "<|user|>": 262}
    summary = command("--load", "bpe.json")
    assert summary == (0, "vocabulary of 263 tokens: 256 bytes, 5 merges\nspecial tokens: <|end|> <|user|>\n"
                          "first merges: 'lo' 'low' ' low' ' lowe' 'st'\n"
                          "longest merges: ' lowe' ' low' 'low' 'lo'\n", "")
    assert learned == (0, f"216 bytes are {len(loaded.encode(text, 'all'))} tokens\n" + summary[1], "")
    status, out, err = command("--load", "bpe.json", "--encode", "low é<|end|>")
    rows = [line.split() for line in out.splitlines()]
    assert [int(row[0]) for row in rows] == loaded.encode("low é<|end|>", allowed_special="all")
    assert "".join(row[-1] for row in rows[-3:]) == "c3a93e" and rows[-1][1] == "'<|end|>'" and (status, err) == (0, "")
    assert command("text.txt", "--vocab-size", 256, "--encode", "a")[1].splitlines()[-1].split() == ["97", "'a'", "61"]


def test_the_summary_names_the_tokens_of_a_foreign_file(command):
    Path("small.json").write_text(json.dumps(small_json(added_tokens=[])), encoding="utf-8")
    status, out, err = command("--load", "small.json")
    assert "special tokens: none\nfirst merges: ' t' 'he' ' the' 'ou'\nlongest merges: ' the' ' t' 'he' 'ou'\n" in out


@pytest.mark.parametrize("arguments, message", [
    ([], "name a text to learn from (not --output), or use --load"),
    (["missing.txt"], "missing.txt: No such file or directory"),
    (["folder"], "folder: Is a directory"),
    (["loop"], "loop: Too many levels of symbolic links"),
    (["latin1.txt"], "latin1.txt: 'utf-8' codec can't decode byte 0xe9 in position 5: unexpected end of data"),
    (["text.txt", "--vocab-size", 100], "a vocabulary of 100 has no room for 256 bytes and the special tokens"),
    (["text.txt", "--vocab-size", "many"], "argument --vocab-size: invalid int value: 'many'"),
    (["text.txt", "--special-token", "x"],
     "special token 'x' is empty, has no id, or shares its id or spelling with another token"),
    (["text.txt", "--vocab-size", 260, "--output", "missing/bpe.json"], "missing/bpe.json: No such file or directory"),
    (["text.txt", "--vocab-size", 260, "--output", "text.txt/bpe.json"], "text.txt/bpe.json: Not a directory"),
    (["text.txt", "--vocab-size", 260, "--output", "folder"], "folder: not a file that can be replaced"),
    (["text.txt", "--output", "folder/../text.txt"], "name a text to learn from (not --output), or use --load"),
    (["text.txt", "--wrong-flag"], "unrecognized arguments: --wrong-flag"),
    (["text.txt", "--vocab", "300"], "unrecognized arguments: --vocab 300"),
    (["--load", "missing.json"], "missing.json: No such file or directory"),
    (["--load", "text.txt"], "text.txt: not JSON: Expecting value: line 1 column 1 (char 0)"),
    (["--load", "latin1.txt"],
     "latin1.txt: 'utf-8' codec can't decode byte 0xe9 in position 5: unexpected end of data"),
    (["text.txt", "--vocab-size", 260, "--encode", "a\udcff"],
     "'utf-8' codec can't encode character '\\udcff' in position 0: surrogates not allowed"),
])
def test_a_mistake_on_the_command_line_gets_one_line(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, err) == (2, f"bpe_tokenizer.py: error: {message}\n")
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "latin1.txt", "loop", "text.txt"]
    assert Path("text.txt").read_text(encoding="utf-8") == "some text to learn from"
    assert not list(Path("folder").iterdir())


def test_the_program_runs_on_a_terminal_without_unicode(tmp_path):
    (tmp_path / "text.txt").write_text("é é é", encoding="utf-8")
    command = [sys.executable, ROOT / "bpe_tokenizer.py", "text.txt", "--vocab-size", "258"]
    done = subprocess.run(command, encoding="ascii", cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "" and "first merges: '?' ' ?'\n" in done.stdout


def test_a_bug_shows_its_traceback(monkeypatch, command):
    monkeypatch.setattr(bpe_tokenizer, "learn_merges", lambda *a: [][0])
    with pytest.raises(IndexError):
        command("text.txt")


def test_the_file_keeps_its_budget():
    lines = (ROOT / "bpe_tokenizer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 380 and max(map(len, lines)) <= 120
