"""
The trained model at work: write text, score a file, extract features.

    uv run sample.py --prompt "Once upon a time"              stream text as it is made
    uv run sample.py --input_file story.txt --num_samples 4   four continuations of a file, over one prefill
    uv run sample.py --score book.txt                         nats per token and bits per byte of a file
    uv run sample.py --encode book.txt --output book.npy      bottleneck features, one row a token

Text and results go to stdout, everything else to stderr. A prompt or file is a document: <|endoftext|> and its tokens.
State carries the past, so memory and time per token do not grow with the length of anything.

B rows, T time, V vocabulary.
"""

import argparse
import codecs
import contextlib
import difflib
import logging
import math
import os
import secrets
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import kernels
from model import GPT, GPTConfig, map_state
from prepare import DataError, Tokenizer, publish, temporary_file, text_chunks

CHECKPOINT_FORMAT = 1
COMPILE_FROM = 2**20  # bytes of a file: to compile the scan for a CPU takes longer than to read less as it is
COMPILE_STEP_FROM = 10_000  # new tokens: to compile decoding for a CPU takes longer than to write fewer as it is


class SampleError(Exception):
    """Something a person can put right; its text is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_checkpoint(path: Path, mmap: bool = False) -> dict:
    """A checkpoint of train.py; with mmap, what is not read stays on the disk. Raises SampleError."""
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        newest = sorted(folder.glob("*.pt"), key=lambda p: p.stat().st_mtime, reverse=True)[:3]
        there = f"there are {', '.join(map(str, newest))} (newest first)" if newest else \
            f"{folder}/ holds no checkpoint; train a model first: uv run train.py"
        raise SampleError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; {there}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # what is damaged fails anywhere between zip, pickle and tensors
        raise SampleError(f"{path} is damaged or no checkpoint ({type(e).__name__}); name another, or train a model: "
                          "uv run train.py") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise SampleError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise SampleError(f"{path} has checkpoint format {checkpoint['format']}, this program reads "
                          f"{CHECKPOINT_FORMAT}; use the one it was trained with")
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises SampleError."""
    checkpoint = load_checkpoint(path, mmap=True)  # the optimizer's state stays on the disk
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise SampleError(f"{path} does not fit this model.py: {' '.join(str(e).split())[:300]}") from None
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def next_token(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """logits (B, V) -> (B, 1), a draw a row from softmax(logits / temperature) cut by top_k, then top_p, then min_p."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    V, index = logits.shape[-1], None
    top_k, top_p = min(top_k or V, V), top_p or 1.0
    logits = logits / temperature
    if top_k < V or top_p < 1:
        logits, index = logits.topk(top_k)  # (B, k), highest first
    p = logits.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the tokens before this one reach top_p without it
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    # One uniform number a row, looked up in the distribution function: no host sync, and V - 1 draws fewer than a
    # Gumbel race. A token of probability 0 does not raise the function, so it is never found.
    cdf = p.cumsum(-1)
    u = torch.rand(len(p), 1, dtype=p.dtype, device=p.device, generator=generator)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return token if index is None else index.gather(-1, token)


def tokens_at_once(model: GPT) -> int:
    """Tokens to feed in one call: any split gives the same numbers, but a learned table ends at block_size."""
    return model.config.block_size if model.config.position == "learned" else max(model.config.block_size, 512)


def prefill(model: GPT, idx):
    """idx (B, T), any T, fed in blocks -> logits (B, 1, V) after its last token, and the state there."""
    state = None
    for block in idx.split(tokens_at_once(model), dim=1):
        logits, _, state = model(block, state=state, last_only=True)
    return logits, state


@contextlib.contextmanager
def quiet_compiler():
    """Within, PyTorch keeps to itself what it has to say of its own machinery."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def compiled_step(model: GPT, token, state):
    """model as native code for decoding with a state like this one; model itself, and a warning, where that fails."""
    step = torch.compile(model, dynamic=False, fullgraph=True)
    try:
        with quiet_compiler():
            step(token, state=state)
    except Exception as error:  # whatever a compiler can do wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"warning: decoding could not be compiled, it goes on more slowly ({reason})", file=sys.stderr)
        return model
    return step


@torch.no_grad()
def generate(model: GPT, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
             generator: torch.Generator | None = None, num_samples: int = 1, n_vocab: int | None = None,
             compile_step: bool = False) -> Iterator:
    """
    Continue idx (B, T) int64: yields max_new_tokens tensors (B * num_samples,), the samples of a row side by side.

    The prompt is fed once, in blocks, and all its samples start from that state; then each token costs one step on the
    carried state. A stream with learned positions that is longer than block_size starts anew from its last block_size
    tokens at every step, as in nanoGPT, since the table goes no further.

    In this order: repetition_penalty (CTRL, arXiv 1909.05858: positive logits of tokens seen so far, prompt included,
    are divided by it, negative ones multiplied), temperature (0: the most likely token), top_k, top_p (nucleus, arXiv
    1904.09751, of what top_k left), min_p (arXiv 2407.01082: at least min_p times the highest probability). The most
    likely token always stays. Tokens from n_vocab on, the padding of a vocabulary, are never drawn. All draws come
    from `generator`, on the model's device, so that the program's own random numbers stay as they are. compile_step
    has torch.compile make native code of a step, which takes seconds and rounds in another order.
    """
    learned, block_size = model.config.position == "learned", model.config.block_size
    wide = torch.float32 if idx.device.type == "mps" else torch.float64  # MPS has no float64
    training = model.training
    model.eval()
    try:
        recent = idx[:, -block_size:] if learned else idx[:, :0]
        logits, state = prefill(model, recent if learned else idx)
        seen = torch.zeros_like(logits[:, -1], dtype=torch.bool).scatter_(1, idx, True)  # (B, V)
        if not logits.isfinite().all():
            raise SampleError("the model's logits are not finite; use an earlier checkpoint")
        logits, state, recent, seen = map_state(
            lambda t: t.repeat_interleave(num_samples, 0), (logits, state, recent, seen))
        step = model
        for i in range(max_new_tokens):
            row = logits[:, -1].to(wide)  # (B, V)
            if repetition_penalty != 1:
                row = torch.where(seen, torch.where(row > 0, row / repetition_penalty, row * repetition_penalty), row)
            token = next_token(row[:, :n_vocab], temperature, top_k, top_p, min_p, generator)  # (B, 1)
            yield token[:, 0]
            if i + 1 == max_new_tokens:
                return
            if repetition_penalty != 1:
                seen.scatter_(1, token, True)
            full = recent.shape[1] == block_size
            if learned:
                recent = torch.cat((recent[:, full:], token), dim=1)
            if full:
                logits, state = prefill(model, recent)
            else:
                with torch.inference_mode():  # a tenth less time than no_grad; what is yielded stays a usual tensor
                    logits, _, state = step(token, state=state)
                    if compile_step and i == 0:  # the state has a step's strides from here on
                        step = compiled_step(model, token, state)
    finally:
        model.train(training)


class TextStream:
    """Tokens in, text out as soon as it is sure: whole characters, and no part of what may become the stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # may be the beginning of the stop text; belongs to the text if no more tokens come
        self.done = False  # <|endoftext|> or the stop text has come

    def push(self, token: int) -> str:
        self.done = token == self.tokenizer.eot
        text, keep = self.held + self.decoder.decode(self.tokenizer.decode_bytes([token]), final=self.done), 0
        if self.stop and (at := text.find(self.stop)) >= 0:
            text, self.done = text[:at], True
        elif self.stop and not self.done:
            keep = max(n for n in range(len(self.stop)) if text.endswith(self.stop[:n]))
        cut = len(text) - keep
        self.held = text[cut:]
        return text[:cut]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def document_blocks(path: Path, tokenizer: Tokenizer, T: int, ahead: int = 0) -> Iterator[np.ndarray]:
    """The document <|endoftext|> + file in blocks of T tokens, the last one shorter, each with `ahead` of the next."""
    held = np.array([tokenizer.eot], dtype=tokenizer.dtype)
    for piece in text_chunks(path, tokenizer):
        held = np.concatenate((held, tokenizer.encode(piece)))
        full = (len(held) - ahead) // T * T
        for i in range(0, full, T):
            yield held[i:i + T + ahead]
        held = held[full:]
    if len(held) > ahead:
        yield held


def progress_bar(path: Path):
    size = path.stat().st_size if path.is_file() else None  # a pipe has none
    return tqdm(total=size, unit="B", unit_scale=True, leave=False, delay=1)


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, path: Path) -> tuple[float, int, int]:
    """Summed nats of a file's tokens, each given all before it, and the numbers of tokens and bytes; memory does not
    grow with the file. Bits per byte = nats / ln 2 / bytes."""
    device, state = model.wte.weight.device, None
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with progress_bar(path) as bar:
        for ids in document_blocks(path, tokenizer, tokens_at_once(model), ahead=1):
            idx = torch.from_numpy(ids.astype(np.int64)).to(device)[None]  # (1, T + 1)
            _, loss, state = model(idx[:, :-1], idx[:, 1:], state=state)
            state = model.next_block(state)
            nats += loss.item() * (len(ids) - 1)
            n_tokens += len(ids) - 1
            new_bytes = int(tokenizer.token_bytes[ids[1:]].sum())
            n_bytes += new_bytes
            bar.update(new_bytes)
    return nats, n_tokens, n_bytes


@torch.no_grad()
def encode(model: GPT, tokenizer: Tokenizer, path: Path, output: Path) -> tuple[int, int]:
    """Write the bottleneck features of a file's tokens, (T, min width) float32, as .npy; row t has seen tokens 0 .. t.
    The file appears under its name only when it is whole. Returns its shape."""
    device, state = model.wte.weight.device, None
    T, C = 0, model.config.n_embd[model.bottleneck]

    def write_header(f, T):
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (T, C)})

    with temporary_file(output.parent) as f, progress_bar(path) as bar:
        write_header(f, 0)
        for i, ids in enumerate(document_blocks(path, tokenizer, tokens_at_once(model))):
            features, state = model.encode(torch.from_numpy(ids.astype(np.int64)).to(device)[None], state=state)
            state = model.next_block(state)
            rows = features[0, 1 if i == 0 else 0:].float().cpu().numpy()  # without <|endoftext|>, no token of the file
            f.write(rows.astype("<f4").tobytes())
            T += len(rows)
            bar.update(int(tokenizer.token_bytes[ids].sum()))
        write_header(f, T)  # numpy pads the header, so that the number of rows can grow in place
        publish(f, output)
    return T, C


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def number(kind, allowed: str, test):
    """An argparse type: a number of a kind that passes the test."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if test(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be {allowed}")
    return parse


def parse_args(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    count = number(int, "a whole number of at least 1", lambda n: n >= 1)
    parser = Parser(prog="sample.py", usage="uv run sample.py [--KEY VALUE ...]", allow_abbrev=False,
                    description="Write text with a trained model, score a file with it, or extract features.")
    add = parser.add_argument
    add("--model_path", type=Path, default=Path("checkpoints/best_model.pt"), help="checkpoint (default: %(default)s)")
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    job.add_argument("--input_file", type=Path, metavar="FILE", help="continue this file instead")
    job.add_argument("--score", type=Path, metavar="FILE", help="print nats/token and bits/byte of a file, any length")
    job.add_argument("--encode", type=Path, metavar="FILE", help="write the bottleneck features of a file to --output")
    add("--output", type=Path, metavar="F.npy", help="where --encode writes: float32, (tokens, smallest width)")
    add("--max_new_tokens", type=count, default=500, metavar="N", help="tokens of a sample (default: %(default)s)")
    add("--temperature", type=number(float, "0 or more", lambda t: 0 <= t < math.inf), default=0.8, metavar="T",
        help="below 1: more likely tokens; 0: always the most likely one (default: %(default)s)")
    add("--top_k", type=count, metavar="K", help="draw from the K most likely tokens")
    add("--top_p", type=number(float, "above 0 and at most 1", lambda p: 0 < p <= 1), metavar="P",
        help="draw from the fewest tokens that hold this probability")
    add("--min_p", type=number(float, "from 0 to 1", lambda p: 0 <= p <= 1), metavar="P",
        help="draw from tokens at least P times as likely as the likeliest")
    add("--repetition_penalty", type=number(float, "above 0", lambda r: 0 < r < math.inf), default=1.0, metavar="R",
        help="above 1: tokens seen before become less likely (default: %(default)s, off)")
    add("--num_samples", type=count, default=1, metavar="N", help="samples, made side by side (default: %(default)s)")
    add("--stop", metavar="TEXT", help="end a sample before this text")
    add("--seed", type=number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63), metavar="N",
        help="makes samples repeatable (default: a new one each time, shown)")
    add("--fractal_levels", type=count, metavar="M", help="cut fractal modules to M levels: faster, less exact")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the matrix products; auto: bfloat16 on CUDA, else float32 (default: %(default)s)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{key}" for key in vars(args)], n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; the nearest is {near[0]}" if near else "; see --help"))
    if (args.encode is None) != (args.output is None):
        parser.error("--encode FILE and --output F.npy go together")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    if args.stop == "":
        parser.error("--stop: an empty text; leave it out to go on to --max_new_tokens")
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    return parser, args


def choose_device(name: str) -> torch.device:
    """auto: the first of CUDA, MPS and CPU that is there. Raises SampleError."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name != "auto" and name not in available:
        raise SampleError(f"--device {name}: not on this machine; use --device auto or --device cpu")
    return torch.device(available[0] if name == "auto" else name)


def write_samples(model: GPT, tokenizer: Tokenizer, args):
    """Generate and print: one sample as it is made, several one after the other at the end."""
    prompt = args.prompt.encode("utf-8", "surrogateescape")  # the very bytes of the command line
    pieces = [prompt] if args.input_file is None else text_chunks(args.input_file, tokenizer)
    prompt = np.concatenate([[tokenizer.eot], *map(tokenizer.encode, pieces)]).astype(np.int64)
    idx = torch.from_numpy(prompt).to(args.device)[None]  # (1, T)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    streams = [TextStream(tokenizer, args.stop) for _ in range(args.num_samples)]
    texts = [[] for _ in streams]
    n_tokens, start, first = 0, time.perf_counter(), None
    carries_on = model.config.position != "learned"  # that table's end turns each step into a prefill
    compile_step = args.device.type == "cpu" and carries_on and args.max_new_tokens >= COMPILE_STEP_FROM
    if compile_step:
        print("decoding is compiled first, in some 20 seconds, 5 from its cache", file=sys.stderr)
    pressed = []

    def interrupt(*_):  # an exception here could fall into what checks compiled code before a call, and be lost
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the token

    for i, tokens in enumerate(generate(
            model, idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p,
            args.repetition_penalty, generator, args.num_samples, tokenizer.n_vocab, compile_step)):
        if compile_step and i == 1:  # compiled by now
            signal.signal(signal.SIGINT, interrupt)
        if pressed:
            raise KeyboardInterrupt
        for stream, text, token in zip(streams, texts, tokens.tolist()):
            if not stream.done:
                text.append(stream.push(token))
                n_tokens += 1
        first = first or time.perf_counter()
        if args.num_samples == 1:
            print(texts[0].pop(), end="", flush=True)
        if all(stream.done for stream in streams):
            break
    seconds = time.perf_counter() - first
    for i, (stream, text) in enumerate(zip(streams, texts)):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        print("".join(text) + stream.held, flush=True)
    speed = f" at {(n_tokens - args.num_samples) / seconds:,.0f} tokens/s" if n_tokens > args.num_samples else ""
    print(f"seed {args.seed}; {idx.shape[1]:,} prompt tokens in {first - start:.2f} s; {n_tokens:,} new ones{speed}",
          file=sys.stderr)


def run(args):
    args.device = choose_device(args.device)
    model, checkpoint = load_model(args.model_path, args.device)
    tokenizer = Tokenizer(checkpoint["tokenizer"])
    if args.fractal_levels is not None:
        if "fractal" not in model.config.attention_type:
            raise SampleError(f"--fractal_levels {args.fractal_levels}: the model of {args.model_path} is not fractal")
        model.set_fractal_levels(args.fractal_levels)
    if args.dtype == "auto":
        fast = args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
    file = args.score or args.encode
    kernels.COMPILE = file is not None and file.is_file() and file.stat().st_size >= COMPILE_FROM
    print(f"{args.model_path}: step {checkpoint['step']:,}, val_loss {checkpoint['best_val_loss']:.4f}, "
          f"{model.num_params():,} parameters, {tokenizer.name} tokens; {args.device}, {args.dtype}", file=sys.stderr)
    start = time.perf_counter()
    with torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        if args.score is not None:
            nats, n_tokens, n_bytes = score(model, tokenizer, args.score)
            if n_tokens == 0:
                raise SampleError(f"--score {args.score}: the file is empty")
            print(f"nats/token {nats / n_tokens:.6f}", f"bits/byte  {nats / math.log(2) / n_bytes:.6f}",
                  f"bytes      {n_bytes}", f"tokens     {n_tokens}",
                  f"tokens/s   {n_tokens / (time.perf_counter() - start):.0f}", sep="\n", flush=True)
        elif args.encode is not None:
            T, C = encode(model, tokenizer, args.encode, args.output)
            print(f"{args.output}: {T:,} x {C}, {T / (time.perf_counter() - start):,.0f} tokens/s", file=sys.stderr)
        else:
            write_samples(model, tokenizer, args)


def main(argv: list[str] | None = None):
    parser, args = parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        run(args)
    except (BrokenPipeError, KeyboardInterrupt) as end:  # what Python still holds for the reader goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(end, KeyboardInterrupt) else 0)
    except (SampleError, DataError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
