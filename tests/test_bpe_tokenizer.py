"""The tokenizer against a slow and obvious one, against the Rust libraries where they are installed, and under fire."""

import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bpe_tokenizer  # noqa: E402
from bpe_tokenizer import BPETokenizer, TokenizerError, split_text  # noqa: E402

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VARIED = [
    "",
    "\n",
    "hello world",
    "I'll say we've 'tis they're I'LL it's x'sy ''s",
    "  two  spaces\t\ttabs \r\n\r\n end  ",
    "x=1+22;y[3]={'a':0.5e-7}//!!?",
    "naïve café, Ünïcödé; ½ and Ⅷ and x² and ٣ and 五",
    "東京タワーは高い。こんにちは！",
    "مرحبا بالعالم שלום",
    "😀 👩‍👩‍👧 🏳️‍🌈 👍🏽 e\u0301",
    "\x00\x1c\x1d\x1e\x1f\x7f\x85\xa0\u2028\u3000\ufeff",
    "_snake_case __init__ a_1",
    "aaaaaaaaaaaaaaaa",
]


# ---- the slow and obvious tokenizer ----

WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


def kind(character):
    """L, N, S (white space) or O (all others), as GPT-2's pattern sees a character."""
    category = unicodedata.category(character)[0]
    return "S" if character in WHITE_SPACE else category if category in "LN" else "O"


def slow_split(text):
    """GPT-2's pattern in plain words, one character after the other."""
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
            end -= 1  # the last white space of a run goes to what follows
        chunks.append(text[start:end])
        start = end
    return chunks


def slow_replace(ids, pair, token):
    replaced = []
    for i in ids:
        replaced.append(i)
        if tuple(replaced[-2:]) == pair:
            replaced[-2:] = [token]
    return replaced


def slow_merges(text, how_many):
    """Count every pair of the whole text anew for every merge."""
    chunks, merges = [list(chunk.encode()) for chunk in slow_split(text)], []
    while len(merges) < how_many:
        counts = Counter(pair for ids in chunks for pair in zip(ids, ids[1:]))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        chunks = [slow_replace(ids, pair, 256 + len(merges)) for ids in chunks]
        merges.append(pair)
    return merges


def slow_encode(text, merges):
    ids = []
    for chunk in slow_split(text):
        chunk = list(chunk.encode())
        for rank, pair in enumerate(merges):
            chunk = slow_replace(chunk, pair, 256 + rank)
        ids += chunk
    return ids


# ---- material ----


@pytest.fixture(scope="module")
def corpus():
    return (ROOT / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return BPETokenizer.train(corpus, 1024, special_tokens=["<|end|>", "<|endoftext|>"])


def random_text(rng, length):
    """Letters, signs and white space of all planes, joined emoji, control characters, runs of one character."""
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


def small_json(**changes):
    """A tokenizer.json such as others write: ids of bytes not in the order of bytes, a special token in the middle."""
    symbols = bpe_tokenizer.BYTE_SYMBOLS
    pieces = [*sorted(symbols), "Ġt", "<|end|>", "he", "Ġthe", "ou"]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 257, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": True, "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["o", "u"]],
        },
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        section = content
        for parent in parents:
            section = section[int(parent) if parent.isdigit() else parent]
        section[name] = value
    return content


# ---- splitting ----


def split(text):
    return list(itertools.chain.from_iterable(split_text(text)))


def test_every_character_is_of_the_kind_that_unicode_says():
    """A character of kind L, N or O makes one chunk with a known character of its kind and two with any other."""
    pattern = bpe_tokenizer.unicode_pattern()
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        known = {"L": "a", "N": "1", "O": "!", "S": "\t"}
        own = known.pop(kind(character))
        assert pattern.fullmatch(own + character), hex(code)
        assert [len(pattern.match(other + character)[0]) for other in known.values()] == [1, 1, 1], hex(code)


def test_ascii_pattern_agrees_with_unicode_pattern():
    texts = ["".join(characters) for characters in itertools.product("a1!_' \n\x1c", repeat=5)]
    texts += [before + chr(code) + after for code in range(128) for before in "a1!'" for after in ["", " ", "a"]]
    for text in texts:
        assert bpe_tokenizer.ASCII_PATTERN.findall(text) == bpe_tokenizer.unicode_pattern().findall(text)


def test_split_agrees_with_slow_split(corpus):
    rng = random.Random(1)
    for text in [*VARIED, *(random_text(rng, rng.randrange(30)) for _ in range(2000)), corpus[:50_000]]:
        assert split(text) == slow_split(text)


def test_split_agrees_with_regex_package(corpus):
    regex = pytest.importorskip("regex")
    pattern = regex.compile(GPT2_PATTERN)
    assigned = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    assert len(assigned) > 200_000
    for text in [*VARIED, corpus, *(f"a{c}1{c} {c}!{c} a  {c}" for c in assigned)]:
        assert split(text) == pattern.findall(text), [hex(ord(c)) for c in set(text[:20])]


def test_windows_do_not_change_the_split(monkeypatch, corpus):
    rng = random.Random(2)
    texts = [*VARIED, corpus[:5000], *(random_text(rng, 40) for _ in range(500))]
    whole = [split(text) for text in texts]
    for size in 1, 2, 5:
        pattern = bpe_tokenizer.WINDOW.pattern.replace("16384", str(size))
        monkeypatch.setattr(bpe_tokenizer, "WINDOW", bpe_tokenizer.re.compile(pattern))
        assert len(list(split_text(corpus[:5000]))) > 5000 // (size + 20)
        assert [split(text) for text in texts] == whole


# ---- learning ----


def test_merges_agree_with_slow_trainer_on_small_texts():
    rng = random.Random(3)
    alphabets = ["a", "ab", "aab ", "abc \n", "aé", "😀a ", "the cat's hat ", "01 .,"]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for alphabet in alphabets for _ in range(60)]
    for text in [*texts, *("a" * length for length in range(40)), *VARIED]:
        assert BPETokenizer.train(text, 256 + 25).merges == slow_merges(text, 25), text


def test_merges_agree_with_slow_trainer_on_a_slice(corpus):
    assert BPETokenizer.train(corpus[:15_000], 256 + 150).merges == slow_merges(corpus[:15_000], 150)


def test_ties_go_to_the_smaller_pair():
    """In "dc" and " ba" every pair stands once: first the smallest one, space + b; then d + c before " b" + a."""
    assert BPETokenizer.train("dc ba", 258).merges == [(32, 98), (100, 99)]


def test_worked_examples_of_the_docstrings():
    end = bpe_tokenizer.END
    assert list(split_text("I'm 20<|end|>Hi", ["<|end|>"])) == [["I", "'m", " 20"], "<|end|>", ["Hi"]]
    ids, before, after = [7, 1, 2, 8, end], [-1, 0, 1, 2, 3], [1, 2, 3, 4, 5]
    changes = list(bpe_tokenizer.merge((1, 2), 9, [1], ids, before, after))
    assert ids == [7, 9, end, 8, end] and after[1] == 3
    assert changes == [(0, (7, 1), (7, 9)), (1, (2, 8), (9, 8))]
    counts = {"low": 1, " lower": 1, " lowest": 1}
    assert bpe_tokenizer.learn_merges(counts, 2) == [(108, 111), (256, 119)]
    assert BPETokenizer.train("low lower lowest", 258).encode("low lower") == [257, 32, 257, 101, 114]


def test_training_is_deterministic(corpus):
    program = "import sys; from bpe_tokenizer import *; print(BPETokenizer.train(sys.stdin.read(), 500).merges)"
    outputs = {
        subprocess.run([sys.executable, "-c", program], input=corpus[:50_000], text=True, capture_output=True, check=True,
                       cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in "12"
    }
    assert outputs == {f"{BPETokenizer.train(corpus[:50_000], 500).merges}\n"}


def test_vocab_size_counts_everything(corpus):
    trained = BPETokenizer.train(corpus[:20_000], 300, special_tokens=["<|a|>", "<|b|>"])
    assert trained.vocab_size == 300 and len(trained.merges) == 42
    assert trained.special_tokens == {"<|a|>": 298, "<|b|>": 299}
    assert BPETokenizer.train("", 256).vocab_size == 256


def test_too_many_merges_end_early_and_say_so(capsys):
    trained = BPETokenizer.train("abab", 1000)
    assert trained.merges == [(97, 98), (256, 256)] and trained.vocab_size == 258
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "2 merges" in captured.err and "744" in captured.err


def test_sample_size(corpus):
    sampled = BPETokenizer.train(corpus, 400, sample_size=30_000)
    assert sampled.merges == BPETokenizer.train(corpus[:30_000], 400).merges
    assert sampled.merges != BPETokenizer.train(corpus, 400).merges


def test_allowed_chars():
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"vocab_size": 255}, "vocabulary of 255"),
        ({"vocab_size": 257, "special_tokens": ["<a>", "<b>"]}, "no room"),
        ({"vocab_size": 300, "special_tokens": ["<a>", "<a>"]}, "special token '<a>'"),
        ({"vocab_size": 300, "special_tokens": ["a"]}, "special token 'a'"),
        ({"vocab_size": 300, "special_tokens": [""]}, "special token ''"),
        ({"vocab_size": 300, "special_tokens": [7]}, "special token 7"),
        ({"vocab_size": 300, "special_tokens": "<a>"}, "special token '<'"),
        ({"vocab_size": 300, "special_tokens": ["é"]}, "special token 'é'"),  # how a tokenizer.json spells byte 0xE9
        ({"vocab_size": 300, "special_tokens": ["a\ud800"]}, "surrogates"),
        ({"vocab_size": 300, "sample_size": 0}, "sample of 0"),
        ({"vocab_size": 300, "sample_size": -5}, "sample of -5"),
    ],
)
def test_wrong_training_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        BPETokenizer.train("some text", **arguments)


# ---- encoding and decoding ----


def test_encoding_agrees_with_slow_encoder(tokenizer, corpus):
    rng = random.Random(4)
    for text in [*VARIED, corpus[-3000:], *("".join(rng.choices("aehstou ", k=40)) for _ in range(50))]:
        assert tokenizer.encode(text) == slow_encode(text, tokenizer.merges)


def test_round_trip_under_fire(tokenizer, corpus):
    rng = random.Random(5)
    texts = [random_text(rng, rng.randrange(12)) for _ in range(10_000)]
    assert "" in texts and max(map(len, texts)) > 100
    learned_from_them = BPETokenizer.train("".join(texts[:2000]), 700)
    for trained in BPETokenizer.train("", 256), BPETokenizer.train(corpus, 300), tokenizer, learned_from_them:
        for text in texts:
            assert trained.decode(trained.encode(text)) == text


def test_decoding_of_broken_utf8(tokenizer):
    ids = list("é😀!".encode())[1:]
    assert tokenizer.decode(ids) == bytes(ids).decode(errors="replace") == "\ufffd😀!"
    assert tokenizer.decode_bytes(ids) == bytes(ids)


@pytest.mark.parametrize("unknown", [-1, 1024, 10**30, np.int64(-7)])
def test_unknown_ids_are_named(tokenizer, unknown):
    for decode in tokenizer.decode, tokenizer.decode_bytes, lambda ids: list(tokenizer.decode_stream(ids)):
        with pytest.raises(ValueError, match=rf"no token {int(unknown)}\b"):
            decode([65, unknown])


def test_ids_of_numpy_and_torch(tokenizer):
    text = "Hello, world"
    assert tokenizer.decode(tokenizer.encode_to_array(text)) == text
    assert tokenizer.decode(list(tokenizer.encode_to_array(text))) == text
    torch = pytest.importorskip("torch")
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text))) == text
    assert tokenizer.decode(torch.from_numpy(tokenizer.encode_to_array(text))) == text


def test_stream_shows_characters_when_they_are_whole(tokenizer):
    ids = tokenizer.encode("é😀 the")
    assert list(tokenizer.decode_stream(iter(ids))) == ["é", "😀", " the"]
    assert list(tokenizer.decode_stream(ids[:3])) == ["é", "\ufffd"]
    rng = random.Random(6)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_stream_takes_one_id_at_a_time(tokenizer):
    taken = []
    stream = tokenizer.decode_stream(taken.append(token) or token for token in tokenizer.encode("one two"))
    next(stream)
    assert len(taken) == 1


def test_lone_surrogates_are_refused(tokenizer):
    for text in "\ud800", "ok \udfff ok":
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode(text)
        with pytest.raises(ValueError, match="surrogates not allowed"):
            BPETokenizer.train(text, 300)


def test_arrays_have_the_smallest_type():
    text = "some text é"
    for merges, dtype in (0, np.uint8), (1, np.uint16):
        array = BPETokenizer.train(text, 256 + merges).encode_to_array(text)
        assert array.dtype == dtype and array.flags.writeable
    many = [(i, j) for i in range(256) for j in range(256)]
    for size, dtype in (65536, np.uint16), (65537, np.uint32):
        large = BPETokenizer.from_state(bpe_tokenizer.tokenizer_json(many[: size - 256], []))
        array = large.encode_to_array(text)
        assert large.vocab_size == size and array.dtype == dtype
        assert large.decode(array) == text and array.tolist() == large.encode(text)


def test_array_equals_list(tokenizer, corpus):
    for text in [*VARIED, corpus[:100_000], "a<|end|>b"]:
        array = tokenizer.encode_to_array(text, allowed_special="all")
        assert array.dtype == np.uint16 and array.ndim == 1
        assert array.tolist() == tokenizer.encode(text, allowed_special="all")


def test_special_tokens_in_text(tokenizer):
    text, end = "a<|end|>b", tokenizer.special_tokens["<|end|>"]
    plain = tokenizer.encode("a") + tokenizer.encode("<|end|>", disallowed_special=()) + tokenizer.encode("b")
    assert end == 1022 and len(plain) > 3
    for encode in tokenizer.encode, lambda *a, **k: tokenizer.encode_to_array(*a, **k).tolist():
        with pytest.raises(ValueError, match=r"'<\|end\|>'"):
            encode(text)
        with pytest.raises(ValueError, match=r"'<\|end\|>'"):
            encode(text, allowed_special={"<|endoftext|>"})
        with pytest.raises(ValueError, match=r"'<\|end\|>'"):
            encode(text, disallowed_special=["<|end|>"])
        assert encode(text, disallowed_special=()) == tokenizer.encode("a<", disallowed_special=()) + plain[2:]
        assert encode(text, disallowed_special={"<|endoftext|>"}) == encode(text, disallowed_special=())
        assert encode(text, allowed_special="all") == [97, end, 98]
        assert encode(text, allowed_special={"<|end|>"}) == [97, end, 98]
        assert encode(text + "<|endoftext|>", allowed_special={"<|end|>"}, disallowed_special=())[:3] == [97, end, 98]
    assert tokenizer.decode([97, end, 98]) == text


def test_the_longest_special_token_wins():
    trained = BPETokenizer.train("", 259, special_tokens=["<|", "<|end|>", "|>x"])
    assert trained.encode("<|end|>x<|", allowed_special="all") == [257, 120, 256]


def test_cache_is_bounded(tokenizer, monkeypatch, corpus):
    monkeypatch.setattr(bpe_tokenizer, "CACHED_CHUNKS", 50)
    fresh = BPETokenizer.from_state(tokenizer.state())
    sizes = []
    for start in range(0, 20_000, 500):
        text = corpus[start : start + 500]
        assert fresh.encode(text) == tokenizer.encode(text)
        sizes.append(len(fresh._chunks))
    assert 25 < max(sizes) <= 50
    fresh.encode("z" * 5000)
    assert max(map(len, fresh._chunks)) <= 100


def test_no_bar_outside_a_terminal(tokenizer, monkeypatch, capsys, corpus):
    """Shown only if asked for, only on a terminal (disable=None) and only after a second (delay=1)."""
    seen = []
    real = bpe_tokenizer.tqdm
    monkeypatch.setattr(bpe_tokenizer, "tqdm", lambda **settings: seen.append(settings) or real(**settings))
    for progress in True, False:
        tokenizer.encode_to_array(corpus[:1000], progress=progress)
        BPETokenizer.train(corpus[:1000], 260, progress=progress)
    assert [settings["disable"] for settings in seen] == [None, None, True, True]
    assert all(settings["delay"] == 1 and settings["total"] == 1000 for settings in seen)
    assert capsys.readouterr() == ("", "")


HEAVY = """
import os, random, re, time
from bpe_tokenizer import BPETokenizer
def peak():  # MB; ru_maxrss would count the process that started this one, too
    if not os.path.exists("/proc/self/status"):
        return 0
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1000
text = open("input.txt").read()
tokenizer = BPETokenizer.train(text, 4096)
runs = BPETokenizer.train("a" * 5000, 256 + 12)
letters, equal = "".join(random.Random(7).choices("etaoinshrdlu", k=1_000_000)), "a" * 1_000_000
before, start = peak(), time.perf_counter()
array = tokenizer.encode_to_array(letters)
assert array.max() > 1000 and tokenizer.decode(array) == letters
assert runs.decode(runs.encode_to_array(equal)) == equal and len(runs.encode_to_array(equal)) < 1000
assert time.perf_counter() - start < 60, "this should take 2 seconds, and would take hours if it were quadratic"
print(peak() - before)
"""


def test_chunks_of_a_million_letters():
    done = subprocess.run([sys.executable, "-c", HEAVY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200


def test_memory_of_encoding_a_large_text(tokenizer, corpus):
    import tracemalloc

    text = corpus * 3
    tokenizer.encode_to_array(corpus)  # the chunks are seen once
    tracemalloc.start()
    try:
        array = tokenizer.encode_to_array(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(array) > len(text) / 3
    assert peak < array.nbytes + 3_000_000  # a list of the ids would have 8 bytes each, and the ids as much again


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
    assert content["pre_tokenizer"]["type"] == content["decoder"]["type"] == "ByteLevel"
    vocab = content["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(1024)) and vocab["Ġ"] == 32 and vocab["Ċ"] == 10 and vocab["Ġt"] == 256
    assert content["model"]["merges"][0] == "Ġ t"
    assert [(token["content"], token["id"]) for token in content["added_tokens"]] == [
        ("<|end|>", 1022), ("<|endoftext|>", 1023)
    ]


def test_ids_of_another_order(tmp_path):
    """As in GPT-2's own file, a byte's id is not the byte."""
    path = tmp_path / "other.json"
    path.write_text(json.dumps(small_json()), encoding="utf-8")
    loaded, vocab = BPETokenizer.load(path), small_json()["model"]["vocab"]
    pieces = ["Ġthe", "Ġ", "s", "ou", "Ġt", "he", "n", "<|end|>", "Ã", "©"]
    text = " the sou then<|end|>é"
    ids = [vocab[piece] for piece in ["Ġthe", "Ġ", "s", "ou", "Ġthe", "n", "<|end|>", "Ã", "©"]]
    assert set(pieces) <= set(vocab) and vocab["Ġ"] != 32
    assert loaded.encode(text, allowed_special="all") == ids
    assert loaded.decode(ids) == text
    assert loaded.merges == [(vocab[a], vocab[b]) for a, b in small_json()["model"]["merges"]]
    assert loaded.vocab_size == 261 and loaded.special_tokens == {"<|end|>": 257}
    ranks = loaded.mergeable_ranks()
    assert ranks[b" the"] == 259 and ranks[b" "] == vocab["Ġ"] and len(ranks) == 260
    loaded.save(path)
    assert BPETokenizer.load(path).encode(text, allowed_special="all") == ids


def test_older_files(tmp_path):
    """Merges as one text each, no type of the model, no use_regex: all of this is in GPT-2's own file."""
    content = small_json(model__merges=["Ġ t", "h e", "Ġt he", "o u"])
    for name in "type", "byte_fallback", "ignore_merges":
        del content["model"][name]
    for name in "pre_tokenizer", "post_processor", "decoder":
        del content[name]["use_regex"]
    old, new = (BPETokenizer.from_state(json.dumps(c)) for c in (content, small_json()))
    assert old.merges == new.merges and old.encode(" the sou") == new.encode(" the sou")


def entry(**changes):
    return {**small_json()["added_tokens"][0], **changes}


def vocab(**changes):
    changed = {**small_json()["model"]["vocab"], **changes}
    return {piece: id for piece, id in changed.items() if id != "removed"}


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
    ("add_prefix_space True", small_json(pre_tokenizer__add_prefix_space=True)),
    ("use_regex", small_json(pre_tokenizer__use_regex=False)),
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
    ("special token '<new>' has no id", small_json(added_tokens=[entry(content="<new>", id=None)])),
    ("special token '<new>' has no id", small_json(added_tokens=[entry(content="<new>", id=True)])),
    ("special token '<new>' .* shares", small_json(added_tokens=[entry(content="<new>", id=258)])),
    ("special token 'he' .* shares", small_json(added_tokens=[entry(content="he", id=258)])),
    ("special token 'a': under two bytes", small_json(added_tokens=[entry(content="a", id=261)])),
    ("special token None", small_json(added_tokens=[entry(content=None)])),
    ("surrogates", small_json(added_tokens=[entry(content="<\ud800>", id=261)])),
    # vocab and merges
    ("wrong type", small_json(model__vocab=["a", "b"])),
    ("wrong type", small_json(model__vocab=vocab(he="258"))),
    ("wrong type", small_json(model__vocab=vocab(he=True))),
    ("wrong type", small_json(model__vocab=vocab(he=258.0))),
    ("wrong type", small_json(model__merges={})),
    ("wrong type", small_json(added_tokens={"a": 1})),
    ("256 bytes", small_json(model__vocab=vocab(a="removed"))),
    ("gaps", small_json(model__vocab=vocab(ou=270))),
    ("gaps", small_json(model__vocab=vocab(ou=-1))),
    (r"merge \['o', 'u'\]", small_json(model__vocab=vocab(ou=3))),
    ("no merge makes", small_json(model__vocab=vocab(xyz=261))),
    (r"merge \['q', 'zz'\]", small_json(model__merges=[["q", "zz"]])),
    (r"merge \['h', 'e'\]", small_json(model__vocab=vocab(he="removed", zz=258))),
    (r"merge \['Ġt', 'he'\]", small_json(model__merges=[["Ġt", "he"], ["Ġ", "t"], ["h", "e"], ["o", "u"]])),
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
    text = json.dumps(content)
    (tmp_path / "damaged.json").write_text(text, encoding="utf-8")
    for make, source in (BPETokenizer.load, tmp_path / "damaged.json"), (BPETokenizer.from_state, text):
        with pytest.raises(ValueError, match=words) as raised:
            make(source)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not JSON"),
        (b"\x80\x04\x95pickle", "not JSON"),
        (b"\xff\xfe\x00\x00", "not JSON"),
        (json.dumps(small_json()).encode()[:-100], "not JSON"),
        (b'{"model": ' + b"9" * 5000 + b"}", "not JSON|unsupported model"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (json.dumps(small_json()).encode() + b" " * 16_000_000, "16 MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[:8]}",
)
def test_hostile_files_are_refused(content, words, tmp_path):
    (tmp_path / "hostile.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as raised:
        BPETokenizer.load(tmp_path / "hostile.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


@pytest.mark.parametrize("state", [None, 5, b"{}", {"model": {}}, "", "{}", "[]", "x" * 16_000_001])
def test_damaged_states_are_refused(state):
    with pytest.raises(TokenizerError):
        BPETokenizer.from_state(state)


def test_random_damage_gives_an_error_or_a_whole_tokenizer():
    rng = random.Random(8)
    good = json.dumps(small_json())
    accepted = 0
    for _ in range(1500):
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
    assert accepted < 500


def test_ranks_that_tiktoken_could_not_use():
    content = small_json(model__merges=[["o", "u"], ["Ġ", "t"], ["h", "e"], ["Ġt", "he"]])
    with pytest.raises(ValueError, match="tiktoken"):
        BPETokenizer.from_state(json.dumps(content)).mergeable_ranks()


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


def test_rustbpe_learns_the_same(tokenizer, corpus):
    rustbpe = pytest.importorskip("rustbpe")
    for text, vocab_size in (corpus, 1022), (corpus[:100_000], 3000), ("\n".join(VARIED), 400):
        theirs = rustbpe.Tokenizer()
        theirs.train_from_iterator([text], vocab_size, pattern=GPT2_PATTERN)
        ours = BPETokenizer.train(text, vocab_size)
        assert {bytes(token): rank for token, rank in theirs.get_mergeable_ranks()} == ours.mergeable_ranks()


def test_tiktoken_encodes_the_same(tokenizer, corpus):
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=tokenizer.mergeable_ranks(), special_tokens=tokenizer.special_tokens
    )
    rng = random.Random(9)
    texts = [*VARIED, corpus, *(random_text(rng, rng.randrange(15)) for _ in range(500))]
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text)
    pieces = ["<|end|>", "<|endoftext|>", "<|end", "|>", " ", "the", "\n"]
    choices = [set(), "all", {"<|end|>"}, {"<|endoftext|>"}]
    for text in ("".join(rng.choices(pieces, k=4)) for _ in range(100)):
        for allowed, disallowed in itertools.product(choices, choices):
            results = []
            for encode in tokenizer.encode, theirs.encode:
                try:
                    results.append(encode(text, allowed_special=allowed, disallowed_special=disallowed))
                except ValueError:
                    results.append("refused")
            assert results[0] == results[1], (text, allowed, disallowed)


def test_tokenizers_reads_our_file(tokenizer, corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path / "ours.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
    rng = random.Random(10)
    pieces = ["<|end|>", "<|endoftext|>", "<|end", "|>", " ", "the", "\n", "é", "  "]
    texts = [*VARIED, corpus, *(random_text(rng, rng.randrange(15)) for _ in range(500))]
    texts += ["".join(rng.choices(pieces, k=6)) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    assert theirs.token_to_id("<|end|>") == tokenizer.special_tokens["<|end|>"]


def test_we_read_the_file_of_tokenizers(corpus):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<unk>", "<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    theirs.train_from_iterator([corpus], trainer)
    ours = BPETokenizer.from_state(theirs.to_str())
    assert ours.special_tokens == {"<unk>": 0, "<|end|>": 1}
    rng = random.Random(11)
    texts = [*VARIED, corpus, "a<|end|>b", *(random_text(rng, rng.randrange(15)) for _ in range(500))]
    for text in texts:
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    # The merges it learns are ours; only ties differ in their order, for its ids number the bytes in another way.
    learned = {tuple(ours.decode_bytes([token]) for token in pair) for pair in ours.merges}
    own = BPETokenizer.train(corpus, 1022)
    assert learned == {tuple(own.decode_bytes([token]) for token in pair) for pair in own.merges}


def test_tokenizers_reads_the_small_file_as_we_do():
    tokenizers = pytest.importorskip("tokenizers")
    theirs, ours = (read(json.dumps(small_json())) for read in (tokenizers.Tokenizer.from_str, BPETokenizer.from_state))
    for text in [*VARIED, " the sou then<|end|>é"]:
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


# ---- the command line ----


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, ROOT / "bpe_tokenizer.py", *map(str, arguments)], capture_output=True, text=True,
        encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **options,
    )


def test_command_line(tmp_path, corpus):
    (tmp_path / "text.txt").write_text(corpus[:50_000], encoding="utf-8")
    output = tmp_path / "bpe.json"
    done = command(tmp_path / "text.txt", "--vocab-size", 500, "--output", output, "--special-token", "<|end|>",
                   "--special-token", "<|user|>", "--sample-size", 40_000, "--allowed-chars", "abcdefghijklmnopqrstuvwxyz ")
    assert done.returncode == 0 and done.stderr == ""
    assert "vocabulary of 500 tokens" in done.stdout and "bytes per token" in done.stdout and "' the'" in done.stdout
    loaded = BPETokenizer.load(output)
    letters = "abcdefghijklmnopqrstuvwxyz "
    same = BPETokenizer.train(corpus[:40_000], 500, special_tokens=["<|end|>", "<|user|>"], allowed_chars=letters)
    assert loaded.merges == same.merges and loaded.special_tokens == {"<|end|>": 498, "<|user|>": 499}
    done = command("--load", output, "--encode", "the é<|end|>")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [int(row[0]) for row in rows] == loaded.encode("the é<|end|>", allowed_special="all")
    assert "".join(row[-1] for row in rows[-3:]) == "c3a93e" and rows[-1][1] == "'<|end|>'"
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name a text"),
        (["missing.txt"], "missing.txt"),
        (["text.txt", "--vocab-size", 100], "vocabulary of 100"),
        (["text.txt", "--vocab-size", "many"], "--vocab-size"),
        (["text.txt", "--sample-size", 0], "sample of 0"),
        (["text.txt", "--special-token", "x"], "special token 'x'"),
        (["text.txt", "--vocab-size", 260, "--output", "missing/bpe.json"], "missing"),
        (["text.txt", "--output", "text.txt"], "not --output"),
        (["text.txt", "--wrong-flag"], "--wrong-flag"),
        (["latin1.txt"], "utf-8"),
        (["--load", "missing.json"], "missing.json"),
        (["--load", "text.txt", "--encode", "a"], "not JSON"),
        (["text.txt", "--vocab-size", 260, "--encode", "a\udcff"], "surrogates"),
    ],
)
def test_command_line_errors(arguments, words, tmp_path):
    (tmp_path / "text.txt").write_text("some text to learn from", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("bpe_tokenizer.py: error: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin1.txt", "text.txt"]
    assert (tmp_path / "text.txt").read_text(encoding="utf-8") == "some text to learn from"


def test_a_bug_shows_its_traceback(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    monkeypatch.setattr(bpe_tokenizer, "learn_merges", lambda *a: [][0])
    with pytest.raises(IndexError):
        bpe_tokenizer.main([str(tmp_path / "text.txt")])


def test_the_file_keeps_its_budget():
    lines = (ROOT / "bpe_tokenizer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 380 and max(map(len, lines)) <= 120
