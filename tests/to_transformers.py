"""Write a trained model as a folder that Hugging Face transformers opens (pip install "transformers>=5"): v1 as OPT
(Zhang et al. 2022, https://arxiv.org/abs/2205.01068), v2 as GPT-NeoX (Black et al. 2022,
https://arxiv.org/abs/2204.06745), v3 as MPT (MosaicML 2023, https://www.databricks.com/blog/mpt-7b).
Example: python -m tests.to_transformers runs/v3_alibi hf/v3
"""
import argparse
import importlib
import warnings
from pathlib import Path

import torch

PARSER = argparse.ArgumentParser("to_transformers", argparse.SUPPRESS, __doc__)
PARSER.add_argument("run", type=Path, help="folder of a run, whose best.pt is taken, or a checkpoint file")
PARSER.add_argument("folder", type=Path, help="folder to write, new or empty")

# What each weight is called. N is the number of the block. Their names begin with the prefix, and all end in ".weight".
SCRIPTS, ARCHITECTURES, PREFIXES, *NAMES = [line.split() for line in """
script                           v1_transformer                v2_bpe_rope                        v3_alibi
architecture                     OPT                           GPT-NeoX                           MPT
prefix                           model.decoder.                gpt_neox.                          transformer.
token_embedding                  embed_tokens                  embed_in                           wte
position_embedding               embed_positions               -                                  -
blocks.N.norm_1                  layers.N.self_attn_layer_norm layers.N.input_layernorm           blocks.N.norm_1
blocks.N.attention.qkv           layers.N.self_attn.qkv_proj   layers.N.attention.query_key_value blocks.N.attn.Wqkv
blocks.N.attention.projection    layers.N.self_attn.out_proj   layers.N.attention.dense           blocks.N.attn.out_proj
blocks.N.norm_2                  layers.N.final_layer_norm     layers.N.post_attention_layernorm  blocks.N.norm_2
blocks.N.feed_forward.up         layers.N.fc1                  layers.N.mlp.dense_h_to_4h         blocks.N.ffn.up_proj
blocks.N.feed_forward.projection layers.N.fc2                  layers.N.mlp.dense_4h_to_h         blocks.N.ffn.down_proj
norm                             final_layer_norm              final_layer_norm                   norm_f
""".strip().splitlines()]


def convert_weights(model, column):
    """Our weights under the names of a column of the table, in the layout that goes with them."""
    theirs = {"lm_head.weight": model.token_embedding.weight}
    for row in NAMES:
        for n in range(model.config.n_layer if row[column] != "-" else 0):
            weight = model.get_parameter(row[0].replace("N", str(n)) + ".weight")
            name = PREFIXES[column] + row[column].replace("N", str(n)) + ".weight"
            if "embed_positions" in name:
                weight = torch.cat((torch.zeros(2, weight.shape[1]), weight))  # their position 0 is row 2
            if "query_key_value" in name:  # in a head of D channels they rotate i with i + D/2, we 2i with 2i + 1
                q, k, v = weight.view(3, model.config.n_head, -1, weight.shape[1])  # (H, D, C) each
                q, k = (torch.cat((x[:, 0::2], x[:, 1::2]), dim=1) for x in (q, k))
                weight = torch.stack((q, k, v), dim=1).view(weight.shape)  # head by head, (H, 3, D, C)
            names = [name.replace("qkv", letter) for letter in "qkv"] if "qkv_proj" in name else [name]
            theirs |= zip(names, weight.chunk(len(names)))
    return theirs


def convert_model(hf, model, column):
    """The model of transformers (the module `hf`) that computes what ours does."""
    config, (V, C) = model.config, model.token_embedding.weight.shape
    shared = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": config.n_layer, "tie_word_embeddings": True,
              "num_attention_heads": config.n_head, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if ARCHITECTURES[column] == "OPT":
        theirs = hf.OPTForCausalLM(hf.OPTConfig(
            **shared, word_embed_proj_dim=C, ffn_dim=4 * C, activation_function="relu", enable_bias=False,
            do_layer_norm_before=True, max_position_embeddings=config.block_size, dropout=config.dropout))
        theirs.generation_config = hf.GenerationConfig(max_length=config.block_size)  # there is no position beyond
    elif ARCHITECTURES[column] == "GPT-NeoX":
        theirs = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
            **shared, intermediate_size=4 * C, hidden_act="gelu", attention_bias=False, use_parallel_residual=False,
            rotary_pct=1.0, max_position_embeddings=config.block_size, hidden_dropout=config.dropout))
    else:  # MPT wants a longest context, which ALiBi does not have
        theirs = hf.MptForCausalLM(hf.MptConfig(**shared, attn_config={"alibi": True}, learned_pos_emb=False,
                                                max_seq_len=max(8192, config.block_size), use_cache=True))
    biases = {name: torch.zeros_like(bias) for name, bias in theirs.state_dict().items() if name.endswith(".bias")}
    theirs.load_state_dict(convert_weights(model, column) | biases)  # strict: every name of theirs, and no other
    return theirs.eval()


def write_tokenizer(hf, tokenizer, folder, longest):
    """Write tokenizer.json, which gives the same ids as ours, and what else AutoTokenizer reads."""
    from tokenizers import Tokenizer, decoders, models
    text = tokenizer.state()  # of a BPETokenizer the tokenizer.json itself
    if not isinstance(text, str):  # characters are BPE without merges; no character is called <unknown>
        vocab = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size - 1)}
        vocab["<unknown>"] = len(vocab)
        characters = Tokenizer(models.BPE(vocab, [], unk_token="<unknown>"))
        characters.decoder = decoders.Replace("<unknown>", "\ufffd")
        text = characters.to_str()
    hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), model_max_length=longest,
                               clean_up_tokenization_spaces=False).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")  # as it is: save_pretrained adds to it


def read(path):
    """(column of the table, model, tokenizer) of a run's folder or a checkpoint file; no code in it is run."""
    file = path / "best.pt" if path.is_dir() else path
    if not file.is_file():
        PARSER.error(f"there is no checkpoint {file}; name the folder of a run, or a .pt file")
    try:
        with warnings.catch_warnings(action="ignore"):
            version = torch.load(file, map_location="cpu", weights_only=True)["version"]
    except Exception:  # damaged bytes can make torch.load raise almost anything
        PARSER.error(f"{file} is damaged, or not a checkpoint of this project; name the folder of a run")
    if version not in SCRIPTS[1:]:
        PARSER.error(f"{file} is of {version}; only {', '.join(SCRIPTS[1:])} can be exported (v0 is only a table)")
    try:
        return SCRIPTS.index(version), *importlib.import_module(version).load(file)[:2]
    except ValueError as error:  # the script's UserError
        PARSER.error(error)


def main(argv=None):
    args = PARSER.parse_args(argv)
    column, model, tokenizer = read(args.run)
    try:
        import safetensors, transformers as hf
        theirs = convert_model(hf, model, column)
        idx = torch.randint(tokenizer.vocab_size, (1, min(256, model.config.block_size)))
        difference = (model(idx)[0] - theirs(idx).logits).abs().max().item()
        if not difference < 1e-2:
            PARSER.error(f"{SCRIPTS[column]}.py no longer computes what {ARCHITECTURES[column]} does: undo its changes")
        args.folder.mkdir(parents=True, exist_ok=True)
        if any(args.folder.iterdir()):
            PARSER.error(f"{args.folder} is not empty, and nothing in it is overwritten; name a new folder")
        theirs.save_pretrained(args.folder)
        write_tokenizer(hf, tokenizer, args.folder, getattr(theirs.config, "max_seq_len", model.config.block_size))
    except ImportError as error:
        PARSER.error(f'{error}; pip install "transformers>=5"')
    except (OSError, safetensors.SafetensorError) as error:
        PARSER.error(f"{args.folder} cannot be written: {error}; name another folder")
    print(f"{args.folder}: {SCRIPTS[column]} as {ARCHITECTURES[column]}, logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
