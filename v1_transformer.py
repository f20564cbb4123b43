"""v1: a transformer that reads characters.

A bigram sees one character; a transformer, up to block_size of them. Each character becomes a vector (its embedding),
and a vector for its position is added. A stack of blocks then refines these vectors. In the attention layer of a block,
each position collects information from itself and the positions before it; in the feed-forward layer, it processes what
it has collected. The model is new since v0, and so are a learning rate and a weight decay that suit it. The
architecture is that of OPT (Zhang et al. 2022), without its biases.

    python v1_transformer.py           train on input.txt, write runs/v1_transformer, print a sample
    python v1_transformer.py --help    every setting and flag
"""
import argparse
import codecs
import csv
import ctypes
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads soon sleep, so two runs share a CPU well

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


@dataclass
class Config:
    """Every setting of a run; the comment beside a field is its --help text."""

    block_size: int = 64  # context length: the number of tokens the model is trained to read at once
    n_layer: int = 4  # number of blocks, each of attention and feed-forward
    n_head: int = 8  # attention heads in a block, each of n_embd / n_head channels
    n_embd: int = 128  # channels: the size of the vector of a token
    dropout: float = 0.0  # fraction of activations set to zero at random in training, to reduce overfitting
    batch_size: int = 12  # rows (of block_size tokens) in one step
    steps: int = 2600  # training steps
    learning_rate: float = 3e-3  # highest learning rate, reached at the end of the warm-up
    warmup_steps: int = 100  # steps over which the learning rate rises
    weight_decay: float = 0.5  # how strongly AdamW pulls weight matrices towards zero
    grad_clip: float = 1.0  # the gradient is clipped to this norm
    eval_interval: int = 500  # steps between evaluations, each of which also saves the run
    seed: int = 1337  # the same seed gives the same run


class CharTokenizer:
    """One token per character of the training text, and one more for every unknown character."""

    def __init__(self, chars):
        self.chars = chars + "\ufffd"  # the last token, unknown, decodes to the replacement character
        self.ids = {c: i for i, c in enumerate(chars)}
        self.vocab_size = len(self.chars)

    def state(self):
        return {"chars": self.chars[:-1]}

    def encode(self, text):
        """Return the token ids of a text as a list: with the characters "abc", "cab?" -> [2, 0, 1, 3]."""
        return [self.ids.get(c, len(self.ids)) for c in text]

    def encode_to_array(self, text, progress=False):
        """The same as a numpy array of the smallest unsigned integer type that holds every id."""
        characters = tqdm(text, "encoding", delay=2, disable=None if progress else True)  # None: only on a terminal
        ids = (self.ids.get(c, len(self.ids)) for c in characters)
        return np.fromiter(ids, np.min_scalar_type(self.vocab_size - 1), len(text))

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


def train_tokenizer(text, config):
    """Return a tokenizer for the characters of the training text."""
    return CharTokenizer("".join(sorted(set(text))))


def tokenizer_from_state(state):
    """Return the tokenizer whose state() this is."""
    return CharTokenizer(state["chars"])


class CausalSelfAttention(nn.Module):
    """Every position takes a weighted mean of the values of itself and all positions before it, in each of H heads.

    A query says what a position looks for, a key what it offers, a value what it passes on. The better a query matches
    a key, the larger the weight. A head is one such mean, on D = C / H channels; each can look for something else.
    Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"--n-embd {config.n_embd} cannot be divided among --n-head {config.n_head} heads")
        self.n_head, self.keep_weights = config.n_head, False  # if True, self.weights is kept for inspection
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # queries, keys, values of all heads in one
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape  # rows in the batch, tokens in a row, channels
        H, D = self.n_head, C // self.n_head  # heads, channels of a head
        q, k, v = self.qkv(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D): @ below acts on the last two, for each row and head
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)

        # Dot products of D numbers are about sqrt(D) in size, and large scores would make softmax pick one position.
        scores = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, T): row t scores every position for query t
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # True right of the diagonal
        scores = scores.masked_fill(later, -math.inf)  # weight 0 for later positions: they hold the answers
        weights = scores.softmax(dim=3)  # (B, H, T, T), every row sums to 1
        if self.keep_weights:
            self.weights = weights
        y = weights @ v  # (B, H, T, D)
        return self.projection(y.transpose(1, 2).reshape(B, T, C))  # join the heads, then mix their results


class FeedForward(nn.Module):
    """Two linear layers on each position alone, with a nonlinear function between, or they would act as one."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.projection(F.relu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to x.

    The sum (a residual connection) gives gradients a direct path to every layer, so that deep stacks can be trained.
    LayerNorm brings each vector to mean 0 and variance 1: a layer's inputs keep one scale, however much x has grown.
    """

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.feed_forward(self.norm_2(x)))


class LanguageModel(nn.Module):
    """Embeddings, a stack of blocks, and an output layer that scores the next token."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        # A standard deviation of 1 / sqrt(C) makes outputs about as large as inputs. As in GPT-2, projections start
        # smaller: N = 2 * n_layer of them add to x, and the sum of N independent outputs grows with sqrt(N). Dividing
        # by it makes the size of x before training independent of the depth.
        for name, weight in self.named_parameters():
            if name.endswith("projection.weight"):
                nn.init.normal_(weight, std=(2 * config.n_layer * config.n_embd) ** -0.5)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=config.n_embd ** -0.5)

    def forward(self, idx, targets=None, cache=None):
        """Return scores (logits) for the token after each position, idx (B, T) -> (B, T, V), and, if targets (B, T) are
        passed, the mean cross-entropy, -ln of the target's probability (in nats), else None. v2 uses `cache`."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise UserError(f"{T} tokens are more than the {self.config.block_size} that this model has positions for")
        positions = torch.arange(T, device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # Weight tying (Press and Wolf 2017): the output layer is the embedding table, so a token's logit is the dot
        # product of x and its embedding. Tokens used alike need similar vectors in both roles; it saves V * C weights.
        logits = F.linear(x, self.token_embedding.weight)  # (B, T, V)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # B * T
        return logits, loss


# ---- the same in every version from here on ----

VERSION = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: process RANK of WORLD
LOG_COLUMNS = "step train_loss val_loss perplexity bits_per_byte learning_rate tokens_per_second seconds".split()


class UserError(ValueError):
    """A user's mistake. main prints its message as one line, without a traceback, and exits with status 2."""


def say(line=""):
    """Print a line above the progress bar, wrapped to 80 columns. Of several processes only the first one prints."""
    if RANK == 0:
        tqdm.write(textwrap.fill(line, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def read_texts(path):
    """Return the training and the validation text of a file. The last tenth is for validation: of the characters, or of
    the rows of a .csv file, where each row becomes "<user>question</user>\\n<bot>answer</bot>\\n"."""
    is_table = str(path).lower().endswith(".csv")
    try:
        text = Path(path).read_bytes().decode().removeprefix("\ufeff").replace("\r\n", "\n")
        rows = list(csv.DictReader(io.StringIO(text), strict=True)) if is_table else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not UTF-8 text, or not a valid .csv table: {error}") from None
    for number, row in enumerate(rows, 1):
        if None in row or not row.get("question") or not row.get("answer"):  # None: more cells than columns
            raise UserError(f"{path}: row {number} below a first line question,answer needs one of each, in quotes")
    text = [f"<user>{row['question']}</user>\n<bot>{row['answer']}</bot>\n" for row in rows] if is_table else text
    cut = len(text) * 9 // 10
    train_text, validation_text = "".join(text[:cut]), "".join(text[cut:])
    if len(set(train_text)) < 2:
        raise UserError(f"{path} has too little text: training needs at least two different characters")
    return train_text, validation_text


def unknown_characters(text, tokenizer):
    """How many characters of the text the tokenizer cannot represent."""
    return sum(text.count(c) for c in set(text) if tokenizer.decode(tokenizer.encode(c)) != c)


@functools.lru_cache(maxsize=1)
def shuffled_starts(seed, epoch, end, block_size):
    """Return where the rows of an epoch start, in random order. Its rows are the text once, from a random offset on."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(np.arange(rng.integers(min(block_size, end)), end, block_size))


def get_batch(tokens, config, step):
    """Return inputs and targets, (B, T) each, that depend on (seed, step) alone: a resumed run draws the same ones."""
    B, T, end = config.batch_size, config.block_size, len(tokens) - config.block_size  # rows start before `end`
    epoch, i = divmod(step, max(1, end // (B * T)))  # batch i of the epoch; up to B rows are left over
    starts = shuffled_starts(config.seed, epoch, end, T).take(np.arange(B) + i * B, mode="wrap")  # too few rows: repeat
    starts = torch.from_numpy(starts[RANK::WORLD]).to(tokens.device, non_blocking=tokens.is_cuda)  # this process's rows
    if getattr(config, "dropout", 0) > 0:  # v0 has none. Dropout draws from torch's generator, differently per process
        torch.manual_seed(int(np.random.default_rng((config.seed, step)).integers(2**62)) + RANK)
    rows = tokens[starts[:, None] + torch.arange(T + 1, device=tokens.device)].long()  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]  # targets are the inputs shifted by one token


@torch.inference_mode()
def evaluate(model, tokens, block_size, autocast=nullcontext()):
    """Return the mean loss in nats per token. Every token but the first is predicted once, in windows of block_size."""
    model.eval()  # without dropout; the model stays in this mode
    windows = tokens.unfold(0, block_size + 1, block_size)  # each begins with the last token of the one before
    batches = [*windows.split(max(1, 4096 // block_size)), tokens[None, len(windows) * block_size:]]  # and the rest
    batches = [rows for rows in batches if rows.shape[1] > 1]  # about 4,096 tokens each; one token has no target
    with autocast:
        losses = [model(rows[:, :-1].long(), rows[:, 1:].long())[1] for rows in batches]
    return float(np.average(torch.stack(losses).tolist(), weights=[rows[:, 1:].numel() for rows in batches]))


def write(path, content):
    """Replace a file in one move, so that a kill or a full disk leaves the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, tokenizer, state=None):
    """Write all that `load` needs, and for last.pt the state of the run, as plain data and tensors."""
    torch.save({"version": VERSION, "config": asdict(model.config), "tokenizer": tokenizer.state(),
                "model": model.state_dict(), "run": state}, buffer := io.BytesIO())
    write(path, buffer.getbuffer())


def load(path, any_version=False, **settings):
    """Return (model in eval mode on the CPU, tokenizer, config) of a checkpoint, some settings of its config replaced.
    Raises UserError if it is damaged or does not fit. Unpickles plain data and tensors only (weights_only=True)."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: train first, or check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version, values = str(checkpoint["version"]), {**checkpoint["config"], **settings}
        if version == VERSION or any_version:
            config = Config(*(field.type(values[field.name]) for field in fields(Config)))
            check_ranges(asdict(config))
            tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
            model = LanguageModel(config, settings.get("vocab_size", tokenizer.vocab_size))
            model.load_state_dict(checkpoint["model"])
            return model.eval(), tokenizer, config
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise UserError(f"{path} is damaged, or does not fit {VERSION} and these settings: use another one") from error
    raise UserError(f"{path} was made by {version}: run {version}.py, or use --init-from")


def sample_token(logits, generator, temperature=1.0, top_k=0, top_p=1.0):
    """Draw a token id from softmax(logits / temperature), logits (V,). Temperature 0 takes the most likely token; top_k
    keeps the k most likely tokens only (0: all), top_p the fewest whose probabilities add up to top_p."""
    if temperature < 1e-6:  # 0, or so small that the division would overflow
        return logits.argmax().item()
    logits, ids = (logits / temperature).sort(descending=True)
    probabilities = logits[:top_k or None].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the probability of all more likely tokens together
    return ids[torch.multinomial(probabilities[before < top_p], 1, generator=generator)].item()


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, use_cache=True):
    """Yield max_new_tokens token ids, one by one, that continue the list `ids` (not empty). v2 and v3 read only what
    their cache lacks. A full context loses its older half, and the newer half is read again from position 0."""
    generator = torch.Generator().manual_seed(seed)
    device, limit = next(model.parameters()).device, model.config.block_size
    context, cache = list(ids)[-limit:], {}
    for _ in range(max_new_tokens):
        if len(context) > limit:
            context, cache = context[-max(1, limit // 2):], {}
        unread = torch.tensor([context[cache.get("length", 0):]], device=device)
        logits, _ = model(unread, cache=cache if use_cache else None)
        context.append(sample_token(logits[0, -1].float().cpu(), generator, temperature, top_k, top_p))
        yield context[-1]


def print_text(model, tokenizer, prompt, args, title, end=""):
    """Print the title and, as it is generated, the text after the prompt, up to the mark `end`. Returns that text."""
    ids = tokenizer.encode(prompt or "\n")
    if len(ids) > model.config.block_size:
        say(f"note: the model reads only the last {model.config.block_size} of the prompt's {len(ids)} tokens")
    if unknown := unknown_characters(prompt, tokenizer):
        say(f"note: the model does not know {unknown} character{'s' * (unknown > 1)} of the prompt")
    print(title, end="", flush=True)
    text, shown, decoder = "", 0, codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    for token in generate(model, ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed):
        text += decoder.decode(tokenizer.decode_bytes([token]))
        if end and end in text:
            text = text[:text.index(end)]
            break
        ready = max(shown, len(text) - len(end))  # the last characters may be the beginning of the mark
        print(text[shown:ready], end="", flush=True)
        shown = ready
    print(text[shown:])
    return text


def chat(model, tokenizer, args):
    """Answer --prompt, or each line that is typed, until an empty line or Ctrl-D."""
    if unknown_characters("<user></bot>", tokenizer):
        raise UserError(f"{VERSION} cannot chat: its tokenizer does not know < and >, which mark the turns")
    if not args.prompt:
        with suppress(ImportError, AttributeError):
            sys.stdin.reconfigure(errors="replace")  # typed bytes may not be UTF-8
            import readline  # noqa: F401 -- gives input() arrow keys and a history
        say("Type a question. An empty line or Ctrl-D ends the chat.")
    turns = []
    for question in [args.prompt] if args.prompt else iter(lambda: input("you: "), ""):
        turns.append(f"<user>{question}</user>\n<bot>")
        while len(turns) > 1 and len(tokenizer.encode("".join(turns))) > model.config.block_size // 2:
            del turns[0]  # the oldest turn no longer fits
        turns[-1] += print_text(model, tokenizer, "".join(turns), args, "bot: ", "</bot>") + "</bot>\n"


def learning_rate(step, config):
    """A straight line up from zero (warm-up), then one down to zero after the last step. Depends on the step alone."""
    peak = max(config.warmup_steps - 1, 0)
    return float(np.interp(step, [-1, peak, max(config.steps, peak + 1)], [0, config.learning_rate, 0]))


def pick_device(args):
    """Return the torch.device and the dtype's name; auto takes bfloat16 where an x86 CPU or a CUDA GPU supports it."""
    found = [n for n in ("cuda", "mps") if getattr(torch, n).is_available() and (n == "cuda" or WORLD == 1)] + ["cpu"]
    device = torch.device(found[0] if args.device == "auto" else args.device)
    if device.type not in found:
        raise UserError(f"--device {device}: PyTorch finds only {' and '.join(found)} here")
    native = device.type == "cpu" and any(torch.cpu.get_capabilities().get(x) for x in ("avx512_bf16", "amx_bf16"))
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device, args.dtype if args.dtype != "auto" else "bfloat16" if native else "float32"


def make_optimizer(model, state):
    """Return AdamW for the model's weights. `state` is empty, or holds the moments of a run to continue."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # the weights of LayerNorm: no weight decay
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": model.config.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.99), fused=True)
    for p, moments in zip(matrices + vectors, state.values(), strict=bool(state)):  # copies, since a file may be forged
        optimizer.state[p] = {key: torch.zeros_like(p).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p]["step"] = torch.tensor(float(moments["step"]), device=p.device)
    return optimizer


def prepare(args, settings):
    """Read and check all that a run needs, and write nothing. Returns it as one object."""
    device, dtype = pick_device(args)
    run = {"log": [], "step": 0, "dtype": dtype, "init_from": args.init_from or "", "optimizer": {}}
    if args.resume:
        if settings.keys() - {"steps"} or args.dtype != "auto":
            raise UserError("--resume keeps the settings of the run: of those, only --steps can be given with it")
        path = Path(args.out, "last.pt")
        model, tokenizer, config = load(path, **settings)
        try:
            run = torch.load(path, map_location="cpu", weights_only=True)["run"]
            assert all(type(row[name]) in (int, float) for row in run["log"] for name in LOG_COLUMNS)
            run["step"] = range(config.steps + 1).index(run["log"][-1]["step"])  # fails beyond --steps
            run.update({name: str(run[name]) for name in ("data", "dtype", "init_from")})
            make_optimizer(model, run["optimizer"])
        except Exception as error:  # as in load
            raise UserError(f"{path} is damaged, or beyond --steps {config.steps}: give more or start anew") from error
    data = args.data or run.get("data") or str(Path(__file__).with_name("input.txt"))
    texts = read_texts(data)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    if run.setdefault("digests", None if args.resume else digests) != digests:
        raise UserError(f"{data} is not the text of the run in {args.out}, {run['data']}: give that one with --data")
    if args.init_from:
        model, tokenizer, config = load(args.init_from, any_version=True, **settings)
    elif not args.resume:
        config = Config(**settings)
        tokenizer = train_tokenizer(texts[0], config)
        torch.manual_seed(config.seed)
        model = LanguageModel(config, tokenizer.vocab_size)
    if config.batch_size % WORLD:
        raise UserError(f"--batch-size {config.batch_size} cannot be divided evenly among {WORLD} processes")
    tokens, validation = (torch.from_numpy(tokenizer.encode_to_array(text, progress=not RANK)).int() for text in texts)
    tokens, validation = tokens.to(device), torch.cat((tokens[-1:], validation)).to(device)  # to predict all of it
    if (longest := min(len(tokens), len(validation)) - 1) < config.block_size:
        raise UserError(f"{data} is too short for --block-size {config.block_size}: it allows at most {longest}")
    if unknown := unknown_characters(texts[1], tokenizer):
        say(f"note: {unknown:,} characters of the validation text are unknown, so its loss will look too low")
    run.update(data=data, out=Path(args.out), model=model.train().to(device), config=model.config, tokenizer=tokenizer,
               tokens=tokens, validation=validation, tokens_per_byte=(len(validation) - 1) / len(texts[1].encode()),
               device=device, autocast=torch.autocast(device.type, torch.bfloat16, enabled=run["dtype"] == "bfloat16"))
    return argparse.Namespace(**run)


def describe(run):
    """Print what is going to be trained, on what, and for how long."""
    counts = {part: sum(p.numel() for name, p in run.model.named_parameters() if part in name)
              for part in ("embedding", "attention", "feed_forward", "norm")}
    total, config = sum(counts.values()), run.config
    reads = config.steps * config.batch_size * config.block_size / len(run.tokens)
    say(f"{VERSION} on {run.device.type} in {run.dtype}" + f", {WORLD} processes" * (WORLD > 1))
    say(f"data: {run.data}, {len(run.tokens):,} tokens for training, {len(run.validation) - 1:,} for validation")
    say(f"parameters: {total:,} (" + ", ".join(f"{part} {n:,}" for part, n in counts.items() if n) + f"), which take "
        f"{16e-6 * total:.1f} MB with gradients and optimizer; activations come on top")
    say(f"plan: {config.steps:,} steps of {config.batch_size} x {config.block_size} tokens, {reads:.1f} times the text"
        + ", often enough to learn it by heart; fewer --steps or more text may do better" * (reads > 15))


def set_aside(out):
    """Make the folder, and move the files of an older run in it, and nothing else, into a new folder previous-N."""
    out.mkdir(parents=True, exist_ok=True)
    folder = next(path for n in range(1, 10**9) if not (path := out / f"previous-{n}").exists())
    for name in ("best.pt", "last.pt", "log.csv", "result.json", "sample.txt"):
        if os.path.lexists(out / name):  # also a link to nothing
            os.renames(out / name, folder / name)  # makes the folder, too
    if folder.exists():
        say(f"Moved the files of the previous run in {out} to {folder}.")


def evaluate_and_save(run, optimizer, train_loss=math.nan, seconds=0.0):
    """Add a row to the log and save the run. train_loss and seconds are those of the training since the last row."""
    val_loss = evaluate(run.model, run.validation, run.config.block_size, run.autocast)
    run.model.train()
    if not math.isfinite(val_loss):
        sys.exit(RANK or f"{VERSION}.py: error: the loss is not finite at step {run.step}: try a lower --learning-rate")
    last = run.log[-1] if run.log else {"step": 0, "seconds": 0.0}
    speed = (run.step - last["step"]) * run.config.batch_size * run.config.block_size / max(seconds, 1e-9)
    values = [run.step, train_loss, val_loss, math.exp(min(val_loss, 99)), val_loss * run.tokens_per_byte / math.log(2),
              learning_rate(max(0, run.step - 1), run.config), speed, last["seconds"] + seconds]
    log = [*run.log, dict(zip(LOG_COLUMNS, values))]
    say("{step:8,}{train_loss:12.4f}{val_loss:10.4f}{perplexity:12.5g}{bits_per_byte:15.4f}{tokens_per_second:11,.0f}"
        .format(**log[-1]).replace("nan", "  -"))
    if RANK == 0:
        if val_loss == min(row["val_loss"] for row in log):
            save_checkpoint(run.out / "best.pt", run.model, run.tokenizer)
        lines = [LOG_COLUMNS, *(row.values() for row in log)]
        write(run.out / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        state = {name: getattr(run, name) for name in ("data", "digests", "dtype", "init_from")}
        state.update(log=log, optimizer=optimizer.state_dict()["state"])
        save_checkpoint(run.out / "last.pt", run.model, run.tokenizer, state)
    run.log = log  # only now: its last row is where --resume goes on


def train(run, args):
    """Train the model; evaluate and save it at the start and after every eval_interval steps."""
    with suppress(AttributeError, OSError, TypeError):  # with glibc: keep freed memory, since returning it costs time
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that every glibc accepts
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    model, config = run.model, run.config
    optimizer = make_optimizer(model, run.optimizer)
    trained = torch.compile(model) if args.compile else model
    if WORLD > 1:
        own_gpu = run.device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
        dist.init_process_group("nccl" if own_gpu else "gloo")
        trained = nn.parallel.DistributedDataParallel(trained, forward_sync_buffers=False)  # waits until all are here
    if RANK == 0 and not args.resume:  # only now, since --init-from may be one of the files to move
        set_aside(run.out)
    say(f"{'step':>8}{'train loss':>12}{'val loss':>10}{'perplexity':>12}{'bits per byte':>15}{'tokens/s':>11}")
    if not run.log:  # before training, the loss should be near ln V, that of V equally likely tokens
        evaluate_and_save(run, optimizer)
    total, started = torch.zeros((), device=run.device), time.perf_counter()
    bar = tqdm(range(run.step, config.steps), initial=run.step, total=config.steps, disable=RANK > 0 or None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        idx, targets = get_batch(run.tokens, config, step)
        with run.autocast:
            _, loss = trained(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        run.step = step + 1
        if run.step % 10 == 0:  # not at every step, since reading a number makes a GPU wait
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if run.step % config.eval_interval == 0 or run.step == config.steps:
            if WORLD > 1:
                dist.all_reduce(total)  # the sum over the processes
            train_loss = total.item() / WORLD / (run.step - run.log[-1]["step"])
            evaluate_and_save(run, optimizer, train_loss, time.perf_counter() - started)
            total, started = torch.zeros_like(total), time.perf_counter()
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        sys.exit()  # only the first process reports and samples
    report(run)


def report(run):
    """Print how the run ended, measure the model beyond its context, write result.json, and list comparable runs."""
    best, last = min(run.log, key=lambda row: row["val_loss"]), run.log[-1]
    say(f"best val loss {best['val_loss']:.4f} at step {best['step']:,}, last {last['val_loss']:.4f}")
    if last["step"] > best["step"] and last["train_loss"] < best["train_loss"]:
        say("The model overfits: since then only the training loss fell. Try more text, fewer --steps, --dropout 0.2")
    model, config = load(run.out / "best.pt")[0], run.config
    context = {"1": best["bits_per_byte"], "2": None, "4": None}  # bits per byte at 1, 2, 4 times the trained context
    with suppress(UserError):  # v1 cannot read more than block_size tokens
        for times in [n for n in (2, 4) if n * config.block_size < len(run.validation)]:
            loss = evaluate(model.to(run.device), run.validation, times * config.block_size, run.autocast)
            context[str(times)] = loss * run.tokens_per_byte / math.log(2)
    result = {
        "version": VERSION, "data": Path(run.data).name, "validation_sha256": run.digests[1], "config": asdict(config),
        "init_from": run.init_from, "parameters": sum(p.numel() for p in model.parameters()), "steps": run.step,
        "vocab_size": run.tokenizer.vocab_size, "tokens_per_byte": run.tokens_per_byte, "best_step": best["step"],
        **{key: best[key] for key in ("val_loss", "perplexity", "bits_per_byte")}, "context_bits_per_byte": context,
        "train_seconds": last["seconds"], "device": run.device.type, "dtype": run.dtype, "seed": config.seed}
    write(run.out / "result.json", json.dumps(result, indent=2).encode())
    say("Runs on this text (> this one, * fine-tuned or other --steps); bits per byte at 1x, 2x and 4x the context:")
    say(f"  {'run':<30}{'steps':>8}{'val loss':>9}{'1x':>7}{'2x':>7}{'4x':>7}{'seconds':>9}")
    for path in sorted(run.out.resolve().parent.glob("*/result.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it may be another program's
            r, name = json.loads(path.read_bytes()), path.parent.name
            name += f" ({r['version']})" * (r["version"] not in name)
            alike = r["steps"] == run.step and r["init_from"] == run.init_from
            mark = ">" if path.parent == run.out.resolve() else " " if alike else "*"
            bits = "".join(f"{x:7.3f}" if x else "      -" for x in r["context_bits_per_byte"].values())
            if r["validation_sha256"] == run.digests[1]:
                say(f"{mark} {name[:29]:<30}{r['steps']:>8,}{r['val_loss']:>9.4f}{bits}{r['train_seconds']:>9,.0f}")


def check_ranges(numbers):
    """Raise UserError if a number in this dict of settings and flags is out of range."""
    ranges = {"seed": (0, 1e9), "warmup_steps": (0, 1e9), "max_new_tokens": (0, 1e9), "top_k": (0, 1e9),
              "top_p": (1e-6, 1), "grad_clip": (1e-6, 1e9), "dropout": (0, 0.999)}
    for name, value in numbers.items():
        low, high = ranges.get(name, (1 if isinstance(value, int) else 0, 1e9))  # whole numbers: at least 1
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high:g}")


def parse_arguments(argv):
    """Return (flags, the settings among them). Every field of Config is a flag; the comment beside it is its help."""
    parser = argparse.ArgumentParser(f"{VERSION}.py", usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    add, default = parser.add_argument, " (default %(default)s)"
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        add("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS, metavar="N",
            help=f"{comments[field.name]} (default {field.default})".replace("%", "%%"))
    add("--data", metavar="FILE", help="UTF-8 text, or .csv with columns question,answer (default input.txt)")
    add("--out", metavar="DIR", default=f"runs/{VERSION}", help="folder of the run" + default)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best that is available")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where it is fast")
    add("--compile", action="store_true", help="use torch.compile")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run in --out from its last evaluation")
    mode.add_argument("--init-from", metavar="FILE", help="start from the weights and settings of this checkpoint")
    mode.add_argument("--sample-only", action="store_true", help="do not train: sample from best.pt in --out")
    mode.add_argument("--chat", action="store_true", help="do not train: talk to best.pt in --out")
    add("--prompt", type=lambda s: s.encode(errors="replace").decode(), default="", help="text to continue")
    add("--max-new-tokens", metavar="N", type=int, default=400, help="tokens to sample" + default)
    add("--temperature", metavar="X", type=float, default=0.8, help="0 takes the most likely token" + default)
    add("--top-k", metavar="N", type=int, default=0, help="sample among the N most likely tokens; 0: all" + default)
    add("--top-p", metavar="P", type=float, default=1.0, help="sample among the top tokens of probability P" + default)
    args = parser.parse_args(argv)
    check_ranges({name: value for name, value in vars(args).items() if type(value) in (int, float)})
    return args, {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}


def main(argv=None):
    """Run the program; returns its exit status."""
    run = argparse.Namespace(log=[])
    try:
        args, settings = parse_arguments(argv)
        if not args.sample_only and not args.chat:
            run = prepare(args, settings)
            describe(run)
            train(run, args)
        model, tokenizer, config = load(Path(args.out, "best.pt"))
        model.to(pick_device(args)[0])
        args.seed = settings.get("seed", config.seed)
        if args.chat:
            chat(model, tokenizer, args)
        else:
            say(f"Sample from {Path(args.out, 'best.pt')} with seed {args.seed} (another --seed gives another sample):")
            text = args.prompt + print_text(model, tokenizer, args.prompt, args, args.prompt)
            write(Path(args.out, "sample.txt"), text.encode())
    except KeyboardInterrupt:
        hint = f"--out {args.out} --resume starts at step {run.log[-1]['step']}" if run.log else "nothing new was saved"
        print("" if RANK else f"\nstopped; {hint}")
        return 130
    except EOFError:  # Ctrl-D in a chat
        print()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if RANK == 0:
            print(f"{VERSION}.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with suppress(AttributeError):  # a notebook's stdout has no reconfigure
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.exit(main())
