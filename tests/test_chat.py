"""The chat stage: rows of questions and answers are learned as marked text, and --chat keeps to the marks."""

import io

import pytest
import torch

import v0_bigram
import v1_transformer
import v2_bpe_rope
import v3_alibi
from tests.conftest import ROOT, VERSIONS, ids, run, tiny_flags


@pytest.fixture
def answering(monkeypatch):
    """Make a version's `generate` say a given text, whatever the model, and note the prompts it was given."""

    def say(version, answer, prompts):
        def generate(model, ids, max_new_tokens, *settings):
            tokenizer = version.load(say.checkpoint)[1]
            prompts.append(tokenizer.decode(ids))
            yield from tokenizer.encode(answer)[:max_new_tokens]

        monkeypatch.setattr(version, "generate", generate)

    return say


def typing(monkeypatch, lines):
    lines = iter(lines)

    def answer(prompt):
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


def test_one_question_is_answered_up_to_the_mark(trained, answering):
    answering.checkpoint, prompts = trained[v3_alibi] / "best.pt", []
    answering(v3_alibi, "I am well, <b>friend</b>.</bot>\n<user>And", prompts)
    status, out, err = run(v3_alibi, "--out", trained[v3_alibi], "--chat", "--prompt", "how are you doing?")
    assert (status, err) == (0, "") and out.startswith("note: the model reads only the last 16 ")
    assert out.splitlines()[1:] == ["bot: I am well, <b>friend</b>."]  # no hint how to type, and no more
    assert prompts == ["<user>how are you doing?</user>\n<bot>"]


@pytest.mark.parametrize("answer", ["", "a", "é☃ and more", "<", "</bo", "</bot", "so </bot"])
@pytest.mark.parametrize("mark", ["", "</bot>"])
def test_nothing_is_lost_or_shown_twice(answer, mark, trained, answering):
    """Also where the answer ends in what looks like half a mark."""
    answering.checkpoint = trained[v2_bpe_rope] / "best.pt"
    answering(v2_bpe_rope, answer + mark, [])
    status, out, err = run(v2_bpe_rope, "--out", trained[v2_bpe_rope], "--chat", "--prompt", "why?")
    assert status == 0 and out.endswith(f"bot: {answer}\n")


@pytest.mark.parametrize("last", [[""], []], ids=["empty line", "Ctrl-D"])
def test_a_talk_keeps_the_last_turns_that_fit_into_half_the_context(last, tmp_path, answering, monkeypatch, small):
    """The oldest are forgotten first. Nothing is written."""
    flags = tiny_flags(v3_alibi, block_size=128, steps=1)
    assert run(v3_alibi, "--data", small, "--out", tmp_path, "--max-new-tokens", 0, *flags)[0] == 0
    answering.checkpoint, prompts = tmp_path / "best.pt", []
    answering(v3_alibi, "yes</bot>", prompts)
    typing(monkeypatch, ["one", "two", "three"] + last)
    status, out, err = run(v3_alibi, "--out", tmp_path, "--chat")
    hint = "Type a question. An empty line or Ctrl-D ends the chat.\n"
    assert (status, err) == (0, "") and out == hint + "you: bot: yes\n" * 3 + "you: " + "\n" * (not last)
    turn = "<user>{}</user>\n<bot>"
    assert prompts[0] == turn.format("one")
    assert prompts[1] == turn.format("one") + "yes</bot>\n" + turn.format("two")
    tokenizer = v3_alibi.load(tmp_path / "best.pt")[1]
    longer = prompts[1] + "yes</bot>\n" + turn.format("three")
    assert len(tokenizer.encode(prompts[1])) <= 64 < len(tokenizer.encode(longer))
    assert prompts[2] == turn.format("two") + "yes</bot>\n" + turn.format("three")


@pytest.mark.parametrize("version", [v0_bigram, v1_transformer], ids=ids)
def test_v0_and_v1_say_that_they_cannot_chat(version, trained):
    status, out, err = run(version, "--out", trained[version], "--chat", "--prompt", "why?")
    assert status == 2 and err.count("\n") == 1 and f"{version.__name__} cannot chat" in err


@pytest.mark.parametrize("version", [v0_bigram, v1_transformer], ids=ids)
def test_v0_and_v1_can_chat_if_their_text_had_the_marks(version, tmp_path, answering):
    flags = ["--data", ROOT / "tests/data/conversation.csv", "--out", tmp_path, "--max-new-tokens", 0]
    assert run(version, *flags, *tiny_flags(version, steps=1))[0] == 0
    answering.checkpoint = tmp_path / "best.pt"
    answering(version, "so it is</bot>", [])
    status, out, err = run(version, "--out", tmp_path, "--chat", "--prompt", "why?")
    assert status == 0 and out.endswith("bot: so it is\n")


def test_a_question_longer_than_the_context_is_still_answered(trained, answering):
    answering.checkpoint, prompts = trained[v3_alibi] / "best.pt", []
    answering(v3_alibi, "yes</bot>", prompts)
    question = "why is it so? " * 20
    status, out, err = run(v3_alibi, "--out", trained[v3_alibi], "--chat", "--prompt", question)
    assert (status, err) == (0, "") and out.startswith("note: the model reads only the last 16 ")
    assert out.endswith("\nbot: yes\n") and prompts == [f"<user>{question}</user>\n<bot>"]


def test_a_character_of_several_tokens_is_shown_whole(trained, answering):
    """Each byte of these is a token of its own; a character of which some are missing is not shown."""
    answering.checkpoint = trained[v2_bpe_rope] / "best.pt"
    answering(v2_bpe_rope, "é☃𝄞</bot>", [])
    for tokens, shown in ((100, "é☃𝄞"), (6, "é☃"), (3, "é")):
        flags = ["--chat", "--prompt", "why?", "--max-new-tokens", tokens]
        status, out, err = run(v2_bpe_rope, "--out", trained[v2_bpe_rope], *flags)
        assert (status, err) == (0, "") and out.endswith(f"\nbot: {shown}\n")


def test_chat_writes_no_file(trained, answering, monkeypatch):
    before = {path: path.read_bytes() for path in trained[v2_bpe_rope].iterdir()}
    answering.checkpoint = trained[v2_bpe_rope] / "best.pt"
    answering(v2_bpe_rope, "yes</bot>", [])
    typing(monkeypatch, ["one"])
    assert run(v2_bpe_rope, "--out", trained[v2_bpe_rope], "--chat")[0] == 0
    assert {path: path.read_bytes() for path in trained[v2_bpe_rope].iterdir()} == before


def test_typed_bytes_that_are_not_utf8_are_a_question_too(trained, answering, monkeypatch):
    answering.checkpoint, prompts = trained[v2_bpe_rope] / "best.pt", []
    answering(v2_bpe_rope, "yes</bot>", prompts)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a caf\xe9?\n\n"), encoding="utf-8"))
    status, out, err = run(v2_bpe_rope, "--out", trained[v2_bpe_rope], "--chat")
    assert (status, err) == (0, "") and out.endswith("\nbot: yes\nyou: ")
    assert prompts == ["<user>a caf\ufffd?</user>\n<bot>"]


def test_ctrl_c_ends_a_chat_with_one_line(trained, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    status, out, err = run(v2_bpe_rope, "--out", trained[v2_bpe_rope], "--chat")
    assert (status, err) == (130, "") and out.endswith("ends the chat.\n\nstopped; nothing new was saved\n")


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_questions_and_answers_are_learned_with_the_base_models_tokenizer(version, trained, tmp_path):
    data = ROOT / "tests/data/conversation.csv"
    before = torch.load(trained[version] / "best.pt", weights_only=True)["tokenizer"]
    flags = ["--data", data, "--init-from", trained[version] / "best.pt", "--out", tmp_path / "chat"]
    status, out, err = run(version, *flags, "--steps", 10, "--max-new-tokens", 0)
    assert status == 0 and "\n      10 " in out, err
    assert torch.load(tmp_path / "chat/best.pt", weights_only=True)["tokenizer"] == before
    if version in (v2_bpe_rope, v3_alibi):
        flags = ["--out", tmp_path / "chat", "--chat", "--prompt", "who are you?", "--max-new-tokens", 9]
        assert run(version, *flags)[0] == 0

