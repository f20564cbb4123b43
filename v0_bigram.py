"""v0: a bigram table, the smallest language model that learns.

The next character is guessed from the last one alone. The whole model is one table: row i holds a score for every
character that may follow character i. Training turns the scores into what counting also gives: how often each character
follows each other one. All versions after this one keep everything below the line "the same in every version", and
improve on the guess.

    python v0_bigram.py --help    every setting and flag
    python v0_bigram.py           train on input.txt, write runs/v0_bigram, sample from it
"""
import argparse
import codecs
import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads soon sleep, else two runs at once crawl

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


@dataclass
class Config:
    """Every setting of a run; the comment beside a field is its --help text."""

    block_size: int = 64  # context length: how many tokens the model is trained to read at once
    batch_size: int = 12  # rows (of block_size tokens) in one step
    steps: int = 4000  # training steps
    learning_rate: float = 2e-2  # highest learning rate, reached after the warm-up
    warmup_steps: int = 100  # steps over which the learning rate rises to its highest
    weight_decay: float = 0.0  # how strongly AdamW pulls matrices towards zero
    grad_clip: float = 1.0  # longest gradient that a step takes whole; a longer one is cut to this length
    eval_interval: int = 500  # steps between two evaluations, each of which also saves the run
    seed: int = 1337  # the same seed gives the same run


class CharTokenizer:
    """One token per character of the training text, and one for all the others, so that no prompt breaks it."""

    def __init__(self, chars):
        self.chars = chars + "\ufffd"  # the unknown character is written as this sign
        self.ids = {c: i for i, c in enumerate(chars)}
        self.vocab_size = len(self.chars)

    def state(self):
        return {"chars": self.chars[:-1]}

    def encode(self, text):
        """The token ids of a text, a list: with the characters "abc", "cab?" -> [2, 0, 1, 3]."""
        return [self.ids.get(c, len(self.ids)) for c in text]

    def encode_to_array(self, text, progress=False):
        """The same as a numpy array of the smallest unsigned integer type that holds every id."""
        text_bar = tqdm(text, "tokenizing", delay=2, disable=not progress or None)  # None: only on a terminal
        ids = (self.ids.get(c, len(self.ids)) for c in text_bar)
        return np.fromiter(ids, np.min_scalar_type(self.vocab_size - 1), len(text))

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def decode_bytes(self, ids):  # what is printed; a BPE token (v2) can be a part of a character
        return self.decode(ids).encode()


def train_tokenizer(text, config):
    """A tokenizer fitted to the training text."""
    return CharTokenizer("".join(sorted(set(text))))


def tokenizer_from_state(state):
    """The tokenizer whose state() this is."""
    return CharTokenizer(state["chars"])


class LanguageModel(nn.Module):
    """A table of scores (V, V): row i, column j says how likely token j comes after token i."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.max_context = math.inf  # tokens it can read at once: all but the last are ignored anyway
        self.token_embedding = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.token_embedding.weight)  # at first every token is as likely as every other

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) of token ids -> logits (B, T, V), scores for each next token of which softmax makes probabilities,
        and the mean loss in nats if targets (B, T) are given. B rows, T tokens, V tokens in the vocabulary.

        cache is for the versions that remember what they have read; a table has nothing to remember.
        """
        logits = self.token_embedding(idx)  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# ---- the same in every version from here on ----

VERSION = Path(__file__).stem
FORMAT = 1  # of the checkpoint files
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: process RANK of WORLD
NO_BAR = True if RANK else None  # for tqdm; None means: no progress bar unless there is a terminal


class UserError(ValueError):
    """A user's mistake: main prints this one sentence, no traceback, and exits with status 2."""


def say(line):
    """Print a line above the progress bar; of several processes only the first one speaks."""
    if RANK == 0:
        tqdm.write(line)


# -- data: text, batches, and the loss over a whole text --

def read_texts(path):
    """The training text and the validation text of a file: its last tenth, by characters (.csv: by rows), validates.

    A row of a .csv becomes "<user>question</user>\\n<bot>answer</bot>\\n".
    """
    is_table = str(path).lower().endswith(".csv")
    try:
        text = Path(path).read_bytes().decode().removeprefix("\ufeff").replace("\r\n", "\n")
        rows = list(csv.DictReader(io.StringIO(text))) if is_table else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not UTF-8 text, or not a valid .csv table: {error}") from None
    for count, row in enumerate(rows, 1):
        if not row.get("question") or not row.get("answer"):
            raise UserError(f"{path}, row {count} below the line question,answer: a question or an answer is missing")
    if is_table:
        text = [f"<user>{row['question']}</user>\n<bot>{row['answer']}</bot>\n" for row in rows]
    cut = len(text) * 9 // 10
    train, validation = ("".join(part) if is_table else part for part in (text[:cut], text[cut:]))
    if not train or not validation or train.count(train[0]) == len(train):
        raise UserError(f"{path} has too little text: not two different characters to learn, or none to validate on")
    return train, validation


def unknown_characters(text, tokenizer):
    """How many characters of the text the tokenizer cannot give back."""
    return sum(text.count(c) for c in set(text) if tokenizer.decode(tokenizer.encode(c)) != c)


def set_seed(*numbers):
    """Make all randomness that follows depend on these numbers alone, such as the run's seed and the step."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def get_batch(tokens, config, step):
    """Inputs and (one token later) targets of one step, (B, T) each; of several processes, this one's share of rows."""
    set_seed(config.seed, step)
    windows = tokens.unfold(0, config.block_size + 1, 1)  # (N - T, T + 1): every window there is; a view, no copy
    starts = torch.randint(len(windows), (config.batch_size,))[RANK::WORLD]
    rows = windows[starts.to(tokens.device, non_blocking=tokens.is_cuda)].long()
    set_seed(config.seed, step, 1 + RANK)  # for dropout, which differs between processes
    return rows[:, :-1], rows[:, 1:]


@torch.inference_mode()
def evaluate(model, tokens, block_size, autocast=nullcontext):
    """Mean loss in nats of every token but the first, each predicted once, in consecutive windows of block_size."""
    model.eval()  # and the model stays so
    block_size = min(block_size, len(tokens) - 1)
    windows = tokens.unfold(0, block_size + 1, block_size)  # each begins with the last token of the one before
    rest = tokens[None, len(windows) * block_size:]  # a last, shorter window
    batches = [*windows.split(max(1, 4096 // block_size)), rest]
    total = 0.0
    for rows in tqdm(batches, "evaluating", delay=2, leave=False, disable=NO_BAR):
        if rows.shape[1] > 1:
            with autocast():
                _, loss = model(rows[:, :-1].long(), rows[:, 1:].long())
            total += loss.item() * rows[:, 1:].numel()
    return total / (len(tokens) - 1)


# -- files --

def write(path, content):
    """Put bytes into a file in one move: a kill at any moment leaves the old file or the new one, never half of it."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # a part of a file, if the disk is full


def save_checkpoint(path, model, tokenizer, **more):
    """Write all that load needs, and more, as plain data and tensors."""
    checkpoint = dict(format=FORMAT, version=VERSION, config=asdict(model.config), tokenizer=tokenizer.state(),
                      model=model.state_dict(), **more)
    torch.save(checkpoint, buffer := io.BytesIO())
    write(path, buffer.getbuffer())


def load(path, any_version=False, **settings):
    """(model in eval mode on the CPU, tokenizer, config) of a checkpoint file, some settings of its config replaced.

    Code that a stranger has hidden in the file is not run. UserError if the file is not a checkpoint that fits.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        form, version = checkpoint["format"], checkpoint["version"]
    except Exception:  # damaged bytes can make torch.load raise almost anything
        raise UserError(f"{path} is damaged, or not a checkpoint of this program") from None
    if form != FORMAT or version != VERSION and not any_version:
        raise UserError(f"{path} is a checkpoint of {version} in format {form}, this is {VERSION} with format {FORMAT}")
    try:
        config = Config(**{**checkpoint["config"], **settings})
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        if settings.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, leave --vocab-size out")
        model = LanguageModel(config, tokenizer.vocab_size)
        model.load_state_dict(checkpoint["model"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}, a checkpoint of {version}, does not fit {VERSION}: {reason}") from None
    return model.eval(), tokenizer, config


# -- generation --

def sample_token(logits, generator, temperature=1.0, top_k=0, top_p=1.0):
    """Draw a token id from the logits (V,) divided by temperature (0: take the likeliest), among the top_k likeliest
    (0: all) and among the fewest likeliest that have probability top_p together."""
    if temperature < 1e-6:  # 0, or so little that dividing by it would overflow
        return logits.argmax().item()
    logits, ids = (logits / temperature).sort(descending=True)
    probabilities = logits[:top_k or None].softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # the probability of all that come before
    return ids[torch.multinomial(probabilities[likelier < top_p], 1, generator=generator)].item()


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, use_cache=True):
    """Yield max_new_tokens token ids that go on after the list `ids` (not empty), one by one.

    The cache keeps each layer's keys and values (v1 on), so that only the newest token is computed. When the context
    (block_size) is full, its older half is forgotten and the newer half read again from position 0. Without the cache:
    the same, slowly.
    """
    with torch.inference_mode(False):  # a CPU multiplies single tokens sooner by weights that lie in memory by columns
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.t().contiguous().t()
    generator = torch.Generator().manual_seed(seed)
    device, limit = next(model.parameters()).device, model.config.block_size
    context, cache = list(ids)[-limit:], {}
    for _ in range(max_new_tokens):
        if len(context) > limit:
            context, cache = context[-max(1, limit // 2):], {}
        unread = context[cache.get("length", 0):]
        logits, _ = model(torch.tensor([unread], device=device), cache=cache if use_cache else None)
        context.append(sample_token(logits[0, -1].float().cpu(), generator, temperature, top_k, top_p))
        yield context[-1]


def write_text(model, tokenizer, prompt, args, title, end=""):
    """Print the title and what the model writes after the prompt, as it comes, up to the mark `end`; returns it."""
    ids = tokenizer.encode(prompt or "\n")
    if len(ids) > model.config.block_size:
        say(f"note: of the prompt's {len(ids)} tokens the model reads the last {model.config.block_size}")
    if unknown := unknown_characters(prompt, tokenizer):
        say(f"note: {unknown} characters of the prompt are unknown to this model")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # gives out a character when all its bytes are there
    print(title, end="", flush=True)
    text, shown = "", 0
    for new in generate(model, ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed):
        text += decoder.decode(tokenizer.decode_bytes([new]))
        if end and end in text:
            text = text[:text.index(end)]
            break
        sure = max(shown, len(text) - len(end))  # hold back what may be the beginning of the mark
        print(text[shown:sure], end="", flush=True)
        shown = sure
    print(text[shown:])
    return text


def chat(model, tokenizer, args):
    """Answer --prompt, or else each line that is typed, until an empty one or Ctrl-D."""
    if unknown_characters("<user></bot>", tokenizer):
        raise UserError(f"{VERSION} cannot chat: its tokenizer does not know the characters that mark who speaks")
    turns = []
    with suppress(EOFError):
        for question in [args.prompt] if args.prompt else iter(lambda: input("you: "), ""):
            turns.append(f"<user>{question}</user>\n<bot>")
            while len(turns) > 1 and len(tokenizer.encode("".join(turns))) > model.config.block_size // 2:
                del turns[0]  # the oldest turn no longer fits
            turns[-1] += write_text(model, tokenizer, "".join(turns), args, "bot: ", "</bot>") + "</bot>\n"


# -- a run --

def learning_rate(step, config):
    """Linear warm-up, then half a cosine down to zero: a function of the step alone."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def pick_device(args):
    """The torch.device of --device and the type of matrix products of --dtype; auto takes the best there is."""
    name = args.device
    if name == "auto":
        name = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    elif not getattr(torch, name).is_available():
        raise UserError(f"--device {name}: there is none here, or this build of PyTorch cannot use it")
    if name == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = name == "cpu" and any(there for k, there in torch.cpu.get_capabilities().items() if "bf16" in k)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if native else "float32"
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None), dtype


@contextmanager
def noted_signals():
    """A list that receives the number of a Ctrl-C or SIGTERM, so that no step is torn; a second one ends at once."""
    noted = []

    def note(signum, frame):
        noted.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) != signal.SIG_IGN:  # which train sets when this process is ending
                signal.signal(signum, handler)


def begin(args, given, dtype):
    """Read and check what a run needs; nothing is written yet. Returns (model, tokenizer, both texts, run).

    `run` is what --resume needs besides the model: what it learns from, and how far it has come.
    """
    last, run = Path(args.out, "last.pt"), {"step": 0, "seconds": 0.0, "log": [], "total": torch.zeros(())}
    if args.resume:
        model, tokenizer, config = load(last)
        run = torch.load(last, map_location="cpu", weights_only=True).get("run")  # load leaves it out
        if not run:
            raise UserError(f"{last} is not what --resume needs: it lacks the state of the run")
        for name, value in {**given, "dtype": run["dtype"] if args.dtype == "auto" else args.dtype}.items():
            own = {**asdict(config), **run}[name]
            if value != own and name != "steps":
                raise UserError(f"--{name.replace('_', '-')} {value} contradicts the run in {args.out}: it has {own}")
        config.steps = given.get("steps", config.steps)
        if config.steps < run["step"]:
            raise UserError(f"--steps {config.steps}: the run in {args.out} has already taken {run['step']}")
    path = args.data or run.get("data") or Path(__file__).with_name("input.txt")
    texts = read_texts(path)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    if run.get("digests", digests) != digests:
        raise UserError(f"--data {path} is not the text that the run in {args.out} learns from")
    if args.init_from:
        model, tokenizer, config = load(args.init_from, any_version=True, **given)
    elif not args.resume:
        config = Config(**given)
        tokenizer = train_tokenizer(texts[0], config)
        set_seed(config.seed)
        model = LanguageModel(config, tokenizer.vocab_size)
    if config.batch_size % WORLD:
        raise UserError(f"--batch-size {config.batch_size} cannot be shared out evenly among {WORLD} processes")
    return model, tokenizer, texts, {"dtype": dtype, **run, "data": str(path), "digests": digests}


def describe(model, tokens, validation, run, device):
    """Say what is about to be trained, on what, and for how long."""
    config, total = model.config, sum(p.numel() for p in model.parameters())
    counts = {part: sum(p.numel() for name, p in model.named_parameters() if part in name)
              for part in ("embedding", "attention", "feed_forward", "norm")}
    per_step = config.batch_size * config.block_size
    say(f"{VERSION} on {device.type} in {run['dtype']}" + (f", {WORLD} processes" if WORLD > 1 else ""))
    say(f"data: {run['data']}, {len(tokens):,} tokens to learn from, {len(validation) - 1:,} to validate on")
    say(f"parameters: {total:,} (" + ", ".join(f"{part} {count:,}" for part, count in counts.items() if count) + ")")
    say(f"memory: weights {4e-6 * total:.1f} MB, gradients {4e-6 * total:.1f}, optimizer {8e-6 * total:.1f}, "
        f"data {1e-6 * (tokens.nbytes + validation.nbytes):.1f}, besides the activations")
    say(f"budget: {config.steps:,} steps of {config.batch_size} x {config.block_size} tokens, "
        f"{config.steps * per_step / len(tokens):.1f} times the training text")


def train(args, given):
    """Train, write the run into args.out and report; returns the exit status."""
    (device, dtype), out = pick_device(args), Path(args.out).resolve()
    model, tokenizer, texts, run = begin(args, given, dtype)
    if WORLD > 1:
        dist.init_process_group()  # waits until all processes are here, and so have read what they start from
    config, log, step = model.config, run["log"], run["step"]
    tokens, validation = (torch.from_numpy(tokenizer.encode_to_array(text, progress=not RANK)) for text in texts)
    validation = torch.cat((tokens[-1:], validation))  # so that its first token, too, can be predicted
    if device.type != "cpu":  # GPUs cannot index tensors of unsigned 16-bit numbers
        tokens, validation = tokens.int().to(device), validation.int().to(device)
    if min(len(tokens), len(validation)) <= config.block_size:
        raise UserError(f"{run['data']} is too short for --block-size {config.block_size}: it has {len(tokens)} tokens "
                        f"to learn from and {len(validation) - 1} to validate on")
    describe(model, tokens, validation, run, device)
    if unknown := unknown_characters(texts[1], tokenizer):
        say(f"note: {unknown:,} characters to validate on are not known to the tokenizer; they count as one unknown "
            "character, which flatters the validation loss")

    model.to(device)
    optimizer = torch.optim.AdamW([  # weight decay is for matrices only
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.99), fused=True)
    if args.resume:
        optimizer.load_state_dict(run["optimizer"])
    elif RANK == 0 and (out / "last.pt").exists():
        previous = out.with_name(out.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
        say(f"the run that was in {args.out} is now in {previous}")
    out.mkdir(parents=True, exist_ok=True)  # if that is impossible, better to know it now
    learner = torch.compile(model) if args.compile else model
    if WORLD > 1:
        learner = nn.parallel.DistributedDataParallel(learner, forward_sync_buffers=False)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=run["dtype"] == "bfloat16")
    tokens_per_byte = (len(validation) - 1) / len(texts[1].encode())

    total, stop = run["total"].to(device), 0  # total: of the losses since the last evaluation
    clock = time.perf_counter() - run["seconds"]
    model.train()
    with noted_signals() as noted, tqdm(total=config.steps, initial=step, unit="step", disable=NO_BAR) as bar:
        while step < config.steps and not stop:
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            idx, targets = get_batch(tokens, config, step)
            with autocast():
                _, loss = learner(idx, targets)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() + 0 * norm  # a gradient that is not finite makes the total so, too
            step += 1
            bar.update()
            stop = torch.tensor(noted[0] if noted else 0)  # a tensor, for the processes to agree on
            if WORLD > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            at_evaluation = step % config.eval_interval == 0 or step == config.steps
            if step % 10 == 0 or at_evaluation or stop:  # only here does the loop wait for a GPU
                if WORLD > 1:
                    dist.all_reduce(total)
                    total /= WORLD  # the mean over the processes, now the same in all
                before = log[-1] if log else {"step": 0, "seconds": 0.0}
                seconds, count = time.perf_counter() - clock, step - before["step"]
                train_loss = total.item() / count
                speed = count * config.batch_size * config.block_size / (seconds - before["seconds"])
                bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                if not math.isfinite(train_loss):
                    bar.close()
                    sys.exit(f"{Path(__file__).name}: error: loss or gradient not finite at step {step}, learning rate "
                             f"{rate:.2g}: try a lower --learning-rate (what was saved before is in {args.out})")
            if at_evaluation:
                val_loss = evaluate(model, validation, config.block_size, autocast)
                model.train()
                log.append({"step": step, "train_loss": train_loss, "val_loss": val_loss,
                            "perplexity": math.exp(min(val_loss, 99)),  # exp(710) would overflow
                            "bits_per_byte": val_loss * tokens_per_byte / math.log(2), "learning_rate": rate,
                            "tokens_per_second": speed, "seconds": seconds})
                say("step {step:,}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {perplexity:.2f}, "
                    "bits per byte {bits_per_byte:.4f}, {tokens_per_second:,.0f} tokens/s".format(**log[-1]))
                if val_loss == min(row["val_loss"] for row in log):
                    save_checkpoint(out / "best.pt", model, tokenizer)
                lines = [log[0].keys(), *(row.values() for row in log)]
                write(out / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
                total.zero_()
            if at_evaluation or stop:
                run.update(step=step, seconds=seconds, total=total, optimizer=optimizer.state_dict())
                save_checkpoint(out / "last.pt", model, tokenizer, run=run)
                clock = time.perf_counter() - seconds  # evaluating and saving are not training
        if WORLD > 1:
            time.sleep(0.1)  # gloo's threads need Python's lock to end, and destroying the group holds it
            dist.destroy_process_group()
            if stop:  # this process's own signal may be late; it is ending already
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if stop:
        command = "python" if WORLD == 1 else f"torchrun --standalone --nproc_per_node={WORLD}"
        command += f" {shlex.quote(sys.argv[0])} --out {shlex.quote(args.out)} --resume --device {device.type}"
        say(f"stopped after step {step}; to go on: {command}")
        return 128 + int(stop)
    if RANK == 0:
        report(out, run, config, validation, tokens_per_byte, autocast, device)
    return 0


def report(out, run, config, validation, tokens_per_byte, autocast, device):
    """The end of a run: its best loss, the context test, result.json, and the table of the runs beside it."""
    model, tokenizer, _ = load(out / "best.pt")
    best, last = min(run["log"], key=lambda row: row["val_loss"]), run["log"][-1]
    say(f"best val loss {best['val_loss']:.4f} at step {best['step']:,}, last {last['val_loss']:.4f}")
    if last["val_loss"] > 1.01 * best["val_loss"] and last["train_loss"] < best["train_loss"]:
        say("The model overfitted: since its best step the validation loss has risen while the training loss fell. "
            "More text, fewer steps, dropout or a smaller model would help.")
    context = {1: best["bits_per_byte"], 2: None, 4: None}  # how well it reads further than it was trained to
    longest = min(model.max_context, len(validation) - 1)
    for times in (2, 4):
        length = times * config.block_size
        if length <= longest:
            loss = evaluate(model.to(device), validation, length, autocast)
            context[times] = loss * tokens_per_byte / math.log(2)
        else:
            say(f"no figure at {times}x the context, {length} tokens: only {longest} can be read at once here")
    result = {"version": VERSION, "data": Path(run["data"]).name, "validation_sha256": run["digests"][1],
              "parameters": sum(p.numel() for p in model.parameters()), "vocab_size": tokenizer.vocab_size,
              "tokens_per_byte": tokens_per_byte, "steps": config.steps, "best_step": best["step"],
              **{key: best[key] for key in ("val_loss", "perplexity", "bits_per_byte")},
              "context_bits_per_byte": context, "train_seconds": last["seconds"], "device": device.type,
              "dtype": run["dtype"], "seed": config.seed}
    write(out / "result.json", json.dumps(result, indent=2).encode())
    say(f"\n{'run':<20}{'parameters':>11}{'val loss':>10}{'bits per byte':>15}{'at 2x':>9}{'at 4x':>9}{'seconds':>9}")
    for path in sorted(out.parent.glob("*/result.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):  # it may be another program's
            r = json.loads(path.read_bytes())
            if r["validation_sha256"] == run["digests"][1] and not path.parent.name.endswith(".previous"):
                far = [f"{bits:.4f}" if bits else "-" for bits in r["context_bits_per_byte"].values()]
                say(f"{path.parent.name:<20}{r['parameters']:>11,}{r['val_loss']:>10.4f}{far[0]:>15}{far[1]:>9}"
                    f"{far[2]:>9}{r['train_seconds']:>9.0f}")


# -- command line --

def in_range(kind, low, high=1e9):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def parse_arguments(argv):
    """(flags, the settings among them). Every field of Config is a flag, and the comment beside it the flag's help."""
    parser = argparse.ArgumentParser(prog=Path(__file__).name, usage=argparse.SUPPRESS, description=__doc__,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default %(default)s)"
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    lowest, highest = {"seed": 0, "warmup_steps": 0, "grad_clip": 1e-6}, {"dropout": 0.999}
    for field in fields(Config):
        kind = in_range(field.type, lowest.get(field.name, 1 if field.type is int else 0), highest.get(field.name, 1e9))
        add("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, metavar="N",
            help=f"{comments.get(field.name, '')} (default {field.default})")
    add("--data", metavar="FILE", help="text to learn: UTF-8, or .csv with columns question,answer (default input.txt)")
    add("--out", default=f"runs/{VERSION}", metavar="DIR", help="where the run is written" + default)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes the best that is there")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto takes bfloat16 where the hardware multiplies it natively")
    add("--compile", action="store_true", help="use torch.compile")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    mode.add_argument("--init-from", metavar="FILE", help="start from a checkpoint's weights, tokenizer and settings")
    mode.add_argument("--sample-only", action="store_true", help="only sample from the best checkpoint in --out")
    mode.add_argument("--chat", action="store_true", help="talk to the best checkpoint in --out")
    add("--prompt", default="", metavar="TEXT", type=lambda text: text.encode(errors="replace").decode(),
        help="what the sample goes on from; with --chat, the one question to answer")
    add("--max-new-tokens", type=in_range(int, 0), default=400, metavar="N", help="tokens to sample" + default)
    add("--temperature", type=in_range(float, 0), default=0.8, metavar="X",
        help="below 1 likely tokens are drawn more often; 0: always the likeliest" + default)
    add("--top-k", type=in_range(int, 0), default=0, metavar="N",
        help="draw from the N likeliest tokens; 0: from all" + default)
    add("--top-p", type=in_range(float, 1e-6, 1), default=1.0, metavar="X",
        help="draw from the fewest tokens that have this probability together" + default)
    args = parser.parse_args(argv)
    return args, {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}


def main(argv=None):
    """Run the program; returns its exit status."""
    args, given = parse_arguments(argv)
    try:
        status = 0 if args.sample_only or args.chat else train(args, given)
        if status or RANK > 0:
            return status
        model, tokenizer, config = load(Path(args.out, "best.pt"))
        model.to(pick_device(args)[0])
        args.seed = given.get("seed", config.seed)
        if args.chat:
            chat(model, tokenizer, args)
        else:
            text = args.prompt + write_text(model, tokenizer, args.prompt, args, args.prompt)
            write(Path(args.out, "sample.txt"), text.encode())
    except (UserError, OSError) as error:
        reason = error if isinstance(error, UserError) else f"{error.filename or args.out}: {error.strerror}"
        if RANK == 0:
            print(f"{Path(__file__).name}: error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if sys.stdin:
        sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.exit(main())
