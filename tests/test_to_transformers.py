"""tests.to_transformers: OPT, GPT-NeoX and MPT of Hugging Face transformers compute what v1, v2 and v3 compute."""

import os
import pickle
import sys

import pytest
import torch

import v0_bigram
import v1_transformer
import v3_alibi
from tests import to_transformers
from tests.conftest import TRANSFORMERS, ids, tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TEXTS = ["Good morrow, my lord!", "", " two  spaces \n\n\tand a tab\r\n", "caf\u00e9, e\u0301, \u4f60 \U0001f600",
         "\ufffd<unknown> <|end|> </s>", "don't we'll do n't . , ! 1234\u00bd ...\x00\x1c\u00a0"]
SIXTEEN = "Enter the king a"  # as many characters as the context of a tiny model has tokens


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(hf, trained, tmp_path_factory):
    """The tiny runs as folders of transformers: {version: folder}."""
    folders = {version: tmp_path_factory.mktemp("hf") / "new" / version.__name__ for version in TRANSFORMERS}
    for version, folder in folders.items():
        to_transformers.main([str(trained[version]), str(folder)])
    return folders


@torch.inference_mode()
def largest_difference(ours, theirs, length):
    idx = torch.randint(ours.token_embedding.num_embeddings, (3, length), generator=torch.Generator().manual_seed(1))
    return (ours(idx)[0] - theirs(idx).logits).abs().max().item()


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_the_logits_are_the_same_for_any_number_of_heads(hf, version, n_head):
    """Heads that are no power of two included: MPT takes its ALiBi slopes from the next power in another way."""
    model = tiny_model(version, n_embd=48, n_head=n_head, dropout=0.5)
    theirs = to_transformers.convert_model(hf, model, to_transformers.SCRIPTS.index(version.__name__))
    assert largest_difference(model, theirs, 16) < 1e-4


@pytest.mark.parametrize("n_head", [2, 3])
@pytest.mark.parametrize("version", TRANSFORMERS[1:], ids=ids)
def test_the_logits_are_the_same_beyond_the_trained_context(hf, version, n_head):
    model = tiny_model(version, n_embd=48, n_head=n_head)
    theirs = to_transformers.convert_model(hf, model, to_transformers.SCRIPTS.index(version.__name__))
    assert largest_difference(model, theirs, 128) < 1e-4


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_a_trained_run_opens_with_the_same_logits(hf, version, trained, exported):
    model, _, config = version.load(trained[version] / "best.pt")
    theirs = hf.AutoModelForCausalLM.from_pretrained(exported[version])
    assert largest_difference(model, theirs, config.block_size) < 1e-4
    assert theirs.dtype == torch.float32 and theirs.num_parameters() >= sum(p.numel() for p in model.parameters())
    tokens = [getattr(settings, f"{name}_token_id") for name in ("bos", "eos", "pad")
              for settings in (theirs.config, theirs.generation_config)]
    assert tokens == [None] * 6  # so that nothing ends a text early
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_the_pipeline_writes_the_same_greedy_text(hf, version, trained, exported):
    model, tokenizer, config = version.load(trained[version] / "best.pt")
    pipe = hf.pipeline("text-generation", str(exported[version]), device="cpu")
    for prompt in ["Go", "my lord", "\n"]:
        start = tokenizer.encode(prompt)
        new = list(version.generate(model, start, config.block_size - len(start), temperature=0))
        [result] = pipe(prompt, do_sample=False, max_length=config.block_size, max_new_tokens=None)
        assert result["generated_text"] == tokenizer.decode(start + new)
        theirs = pipe.model.generate(torch.tensor([start]), do_sample=False, max_length=config.block_size)
        assert theirs.tolist() == [start + new]


def test_v1_writes_no_further_than_its_positions_unless_asked(hf, exported):
    pipe = hf.pipeline("text-generation", str(exported[v1_transformer]), device="cpu")
    assert len(pipe("Go")[0]["generated_text"]) == 16
    with pytest.raises(ValueError, match="max_length"):
        pipe(SIXTEEN)


@pytest.mark.parametrize("version", TRANSFORMERS, ids=ids)
def test_token_ids_and_decoded_text_are_the_same(hf, version, trained, exported, text):
    _, tokenizer, _ = version.load(trained[version] / "best.pt")
    theirs = hf.AutoTokenizer.from_pretrained(exported[version])
    assert len(theirs) == theirs.vocab_size == tokenizer.vocab_size
    for sample in [*TEXTS, text[:5000]]:
        encoded = tokenizer.encode(sample)
        assert theirs(sample)["input_ids"] == encoded
        assert theirs.decode(encoded) == theirs.decode(encoded, skip_special_tokens=True) == tokenizer.decode(encoded)
    if isinstance(tokenizer.state(), str):
        assert (exported[version] / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.state()


def test_a_character_of_the_text_that_looks_like_the_unknown_one_keeps_its_id(hf, tmp_path):
    tokenizer = v1_transformer.train_tokenizer("<unk>\ufffd own \u00e9\n", None)
    to_transformers.write_tokenizer(hf, tokenizer, tmp_path, longest=16)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    for sample in ["\ufffd?\ufffd", "<unknown>", "\u00e9 e\u0301\n"]:
        assert theirs(sample)["input_ids"] == tokenizer.encode(sample)
        assert theirs.decode(tokenizer.encode(sample)) == tokenizer.decode(tokenizer.encode(sample))


def test_a_script_that_computes_something_else_is_refused(hf, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(v3_alibi.FeedForward, "forward", lambda self, x: self.projection(self.up(x).relu()))
    assert "no longer computes what MPT does" in refusal(capsys, trained[v3_alibi], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def refusal(capsys, *argv):
    """The one line on stderr with which a user's mistake ends, exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        to_transformers.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("to_transformers: error: ")
    return err


def test_what_is_no_run_of_a_transformer_gets_one_line(trained, tmp_path, capsys):
    assert "no checkpoint" in refusal(capsys, tmp_path, tmp_path / "new")
    assert "no checkpoint" in refusal(capsys, tmp_path / "missing.pt", tmp_path / "new")
    assert "only a table" in refusal(capsys, trained[v0_bigram], tmp_path / "new")
    assert "required" in refusal(capsys, tmp_path)
    for content in [b"", b"text", pickle.dumps({"version": "v1_transformer"})]:
        (tmp_path / "best.pt").write_bytes(content)
        assert "not a checkpoint" in refusal(capsys, tmp_path, tmp_path / "new")
    for content in [{"version": ["v1_transformer"]}, {"version": "os"}, {"version": "v3_alibi"}, [1]]:
        torch.save(content, tmp_path / "best.pt")
        refusal(capsys, tmp_path / "best.pt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").mkdir, ()

    torch.save({"version": "v3_alibi", "model": Trap()}, tmp_path / "best.pt")
    assert "not a checkpoint" in refusal(capsys, tmp_path, tmp_path / "new")
    assert not (tmp_path / "sprung").exists()


def test_files_of_others_stay_as_they_are(hf, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert "not empty" in refusal(capsys, trained[v3_alibi], tmp_path)
    assert "another folder" in refusal(capsys, trained[v3_alibi], tmp_path / "file")
    assert "another folder" in refusal(capsys, trained[v3_alibi], tmp_path / "file" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_without_transformers_the_line_says_how_to_install_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install" in refusal(capsys, trained[v3_alibi], tmp_path / "new")
