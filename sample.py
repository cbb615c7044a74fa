"""
The trained model at work: write text, score a file, extract features.

    uv run sample.py --prompt "Once upon a time"              stream text as it is made
    uv run sample.py --input_file story.txt --num_samples 4   four continuations of a file, over one prefill
    uv run sample.py --score book.txt                         nats per token and bits per byte of a file
    uv run sample.py --encode book.txt --output book.npy      bottleneck features, one row a token

Text and results go to stdout, everything else to stderr. A prompt or file is a document: <|endoftext|> and its tokens.
State carries the past, so memory and time per token do not grow with the length of a file or of what is written.

B rows, T time, V vocabulary.
"""

import argparse
import codecs
import contextlib
import difflib
import itertools
import math
import os
import secrets
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from cpu import eager_cpu, product_type
from kernels import scan_step
from model import (
    GPT,
    FeedForward,
    FractalBlock,
    GPTConfig,
    MambaBlock,
    MultiHeadAttention,
    RMSNorm,
    is_plain,
    map_state,
    rotary_table,
    rotate,
    weight_of,
)
from prepare import DataError, Tokenizer, publish, temporary_file, text_chunks

CHECKPOINT_FORMAT = 1
NOT_FINITE = "what the model computes is not finite; use an earlier checkpoint, or --dtype float32"
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_samples", "stop",
            "seed")  # flags that --score and --encode have no use for
COMPILE_FROM = 2**20  # bytes of a file: to compile the scan for a CPU takes longer than to read less as it is


class SampleError(Exception):
    """Something a person can put right; its text is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_checkpoint(path: Path, mmap: bool = False) -> dict:
    """A checkpoint of train.py; with mmap, what is not read stays on the disk. Raises SampleError."""
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        newest = [p for p in folder.glob("*.pt") if p.is_file()]
        newest = sorted(newest, key=lambda p: p.stat().st_mtime, reverse=True)[:3]
        there = f"there are {', '.join(map(str, newest))} (newest first)" if newest else \
            f"{folder}/ holds no checkpoint; train a model first: uv run train.py"
        raise SampleError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; {there}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as e:
        raise SampleError(f"cannot read {path}: {e.strerror}") from None
    except Exception as e:  # what is damaged fails anywhere between zip, pickle and tensors
        raise SampleError(f"{path} is damaged or no checkpoint ({type(e).__name__}); name another, or train a model: "
                          "uv run train.py") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise SampleError(f"{path} is not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise SampleError(f"{path} has checkpoint format {checkpoint['format']}, this program reads "
                          f"{CHECKPOINT_FORMAT}; use the one it was trained with")
    return checkpoint


@contextlib.contextmanager
def fitting(checkpoint):
    """Within, a model is made of a checkpoint; where this code cannot, SampleError names the checkpoint."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise SampleError(f"{checkpoint} does not fit this model.py: {' '.join(str(e).split())[:300]}") from None


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises SampleError."""
    checkpoint = load_checkpoint(path, mmap=True)  # the optimizer's state stays on the disk
    with fitting(path):
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
#
# A decoder is one position of a mixer, a layer or the model: a function of x (B, C) that owns what it remembers. It is
# made from a state, which it leaves alone, and from the weights as they are then. An operation costs microseconds here,
# more than its arithmetic, so there are few: weights and views are bound once, memory is changed in place.


def product(weight, bias=None):
    """x (B, in) -> x weight^T + bias, in the type that products have here"""
    dtype = product_type(weight)
    weight = weight.to(dtype).t()
    if bias is None:
        return lambda x: torch.mm(x.to(dtype), weight)
    bias = bias.to(dtype)
    return lambda x: torch.addmm(bias, x.to(dtype), weight)


def bound(layer):
    """A linear layer as a product with its weight and bias; one with a forward of its own unchanged"""
    return product(layer.weight, layer.bias) if is_plain(layer) else layer


def normalisation(norm):
    """The norm, or None, itself; for RMSNorm on a CPU a function with its numbers bound, in half of the time"""
    if type(norm) is not RMSNorm or not eager_cpu(norm.weight):
        return norm
    weight, eps, C = norm.weight, torch.tensor(norm.eps, dtype=norm.weight.dtype), len(norm.weight)

    def step(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
        return torch.addcmul(eps, size, size, value=1 / C).rsqrt_().mul(x).mul_(weight)
    return step


def decode_attention(mixer, state):
    """Rotated keys, and values, lie in memory for two windows, each in the slot of its position. When that is full,
    the newest W-1 move to its beginning, and these keys are rotated back by as many positions."""
    past_k, past_v, valid = state  # (B, nh, W-1, hs) twice, (B, W-1)
    (B, nh, kept, hs), W, room = past_k.shape, mixer.window, 2 * mixer.window
    c_attn, c_proj = map(bound, (mixer.c_attn, mixer.c_proj))
    weight = mixer.c_attn.weight
    k, v = past_k.new_zeros(2, B, nh, room, hs, dtype=product_type(weight))
    cos, sin = rotary_table(room + 1, hs, weight.dtype, weight.device)
    q_norm, k_norm = map(normalisation, (mixer.q_norm, mixer.k_norm))
    k[:, :, :kept] = rotate(past_k, cos[:kept], sin[:kept]) if mixer.rope else past_k
    v[:, :, :kept] = past_v
    first, end = int((~valid.any(0)).cumprod(0).sum()), kept  # slots in use
    mask = torch.cat((valid, valid.new_ones(B, room - kept)), 1)[:, None, None]
    mask = None if valid[:, first:].all() else mask

    def step(x):
        nonlocal first, end, mask
        if end == room:
            turn = cos[W + 1], -sin[W + 1]
            k[:, :, :kept] = rotate(k[:, :, W + 1:], *turn) if mixer.rope else k[:, :, W + 1:]
            v[:, :, :kept] = v[:, :, W + 1:]
            first, end, mask = 0, kept, None
        q, new_k, new_v = c_attn(x).view(B, 3, nh, hs).unbind(1)
        if q_norm is not None:
            q, new_k = q_norm(q), k_norm(new_k)
        if mixer.rope:
            q, new_k = rotate(q, cos[end], sin[end]), rotate(new_k, cos[end], sin[end])
        k[:, :, end], v[:, :, end] = new_k, new_v
        end += 1
        seen = slice(max(first, end - W), end)
        y = F.scaled_dot_product_attention(q[:, :, None].to(v.dtype), k[:, :, seen], v[:, :, seen],
                                           None if mask is None else mask[..., seen])
        return c_proj(y.reshape(B, -1))
    return step


def decode_convolution(weight, bias, past):
    """x -> silu(bias + the causal convolution) for weight (W, ..) and past, the last W-1 inputs, (W-1, ..). Kept are
    not inputs but the next W outputs, each with as much of its sum as is known, which takes fewer operations."""
    W, wide = len(weight), torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide).flip(0), bias.to(wide)  # the last tap belongs to the output of now
    sums = weight.new_zeros(W, *torch.broadcast_shapes(weight.shape[1:], past.shape[1:])) + bias
    turns = itertools.cycle([(weight.roll(i, 0), sums[i]) for i in range(W)])

    def step(x):
        taps, now = next(turns)
        sums.addcmul_(taps, x)
        y = F.silu(now)
        now.copy_(bias)
        return y

    for x in past.to(wide):
        step(x)
    return step


def decode_mamba(mixer, state):
    conv, h = state  # (B, W-1, d_inner), (B, d_inner, N)
    in_proj, x_proj, out_proj = map(bound, (mixer.in_proj, mixer.x_proj, mixer.out_proj))
    dt_proj = product(weight_of(mixer.dt_proj))
    taps = mixer.conv1d.weight.permute(2, 1, 0)  # (W, 1, d_inner)
    convolution = decode_convolution(taps, mixer.conv1d.bias, conv.transpose(0, 1))
    A, h = (x.mT.clone(memory_format=torch.contiguous_format).mT for x in (-mixer.A_log.exp(), h))
    D, dt_bias, parts = mixer.D, mixer.dt_proj.bias, [mixer.dt_rank, mixer.d_state, mixer.d_state]

    def step(x):
        x, z = in_proj(x).chunk(2, 1)  # (B, d_inner) each
        x = convolution(x)
        dt, B, C = x_proj(x).split_with_sizes(parts, 1)
        return out_proj(scan_step(h, x, dt_proj(dt), A, B, C, D, z, dt_bias, True))
    return step


def decode_fractal(mixer, state):
    W_in, W_out = map(product, mixer.projections())
    packed, past = mixer.packed(), mixer.past(state)
    groups = [decode_fractal_group(weights, mixer.budget(len(weights[0])), past) for weights in packed]
    sizes = [conv.shape[1] for conv, *_ in packed]

    def step(x):
        z, gate = W_in(x).chunk(2, 1)  # (B, sum n H) each
        y = [group(z_g) for group, z_g in zip(groups, z.split(sizes, 1))]
        return W_out(torch.cat(y, 1) * F.silu(gate))
    return step


def decode_fractal_group(weights, budget, past):
    """The n modules of one depth: z (B, n H) -> n(f(z)) (B, n H), by a function for each application. past: the states
    of the applications, in evaluation order."""
    conv, M, p, inverse_H, eps = weights  # (C, n H, w), (C, n, H, H), (C - 1, n, 1), (n, 1) twice
    (depth, n, H, _), wide = M.shape, inverse_H.dtype
    low = depth + 1 - budget  # the level at which every recursion ends
    p, inverse_H, eps = p[..., None].to(wide), inverse_H[:, None], eps[:, None]

    def norm(z):  # (.., n, B, H)
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
        return z * torch.addcmul(eps, size.square_(), inverse_H).rsqrt_()

    def units(c):
        inputs, levels = next(past), slice(low - 1, c)
        L, B = c - low + 1, len(inputs)
        matrices = M[levels].flatten(0, 1).to(product_type(M))
        taps = conv[levels].view(L, n, 1, H, -1).movedim(-1, 0)
        convolution = decode_convolution(taps, taps.new_zeros(()), inputs.view(B, -1, L, n, H).permute(1, 2, 3, 0, 4))

        def step(z):
            v = torch.bmm(convolution(norm(z)).view(L * n, B, H).to(matrices.dtype), matrices)
            return norm(v.view(L, n, B, H)).unbind(0)
        return step

    def f(c):  # as _FractalGroup's run
        shallow, deep, share = units(c), [f(i - 1) for i in range(low + 1, c + 1)], p[low - 1:c - 1]

        def step(z):
            y, *others = shallow(z)
            for deeper, u, p_i in zip(deep, others, share):
                y = torch.lerp(u, deeper(y), p_i)
            return y
        return step

    whole = f(depth)
    return lambda z: norm(whole(z.unflatten(1, (n, H)).transpose(0, 1))).transpose(0, 1).flatten(1)


def decode_by_forward(mixer, state):
    """For a mixer that has no decoder of its own"""
    def step(x):
        nonlocal state
        y, state = mixer(x[:, None], state, None)
        return y[:, 0]
    return step


DECODERS = {MultiHeadAttention: decode_attention, MambaBlock: decode_mamba, FractalBlock: decode_fractal}


def decode_feed_forward(ffn):
    if type(ffn) is not FeedForward:
        return lambda x: ffn(x[:, None])[:, 0]
    up, down = map(bound, (ffn.c_fc, ffn.c_proj))
    return lambda x: down(ffn.activate(up(x)))


def decode_block(block, state):
    mixer = DECODERS.get(type(block.mixer), decode_by_forward)(block.mixer, state)
    resize = None if block.resize is None else bound(block.resize)
    norm_1, norm_2 = map(normalisation, (block.ln_1, block.ln_2))
    ffn = None if block.ffn is None else decode_feed_forward(block.ffn)

    def step(x, skip):
        x = x if resize is None else resize(x).to(x.dtype)
        x = x if skip is None else x + skip
        x = x + mixer(norm_1(x))
        return x if ffn is None else x + ffn(norm_2(x))
    return step


@torch.no_grad()
def decoder(model: GPT, state: dict):
    """A function of the next token (B, 1) that gives the logits after it (B, V), for the stream that has come to this
    state: the model's forward, token by token, in half of the time or less. For a model in eval mode; when its weights
    have changed, make another. The logits are inference tensors: clone them to change them in place."""
    blocks = [decode_block(block, s) for block, s in zip(model.h, state["layers"], strict=True)]
    embed, head, norm, n_layer = model.wte.forward, bound(model.lm_head), normalisation(model.ln_f), len(blocks)
    skips = {int(i): bound(layer) for i, layer in model.skip.items()}
    ngrams, pos = (map_state(torch.clone, state.get(key)) for key in ("ngrams", "pos"))

    @torch.inference_mode()
    def step(token):
        nonlocal ngrams
        x, outputs = embed(token[:, 0]), []
        if pos is not None:
            x = x + model.wpe(pos)
            pos.add_(1)
        if model.ngrams is not None:
            grams, ngrams = model.ngrams(token, ngrams, None)
            x = x + grams[:, 0]
        for i, block in enumerate(blocks):
            x = block(x, skips[i](outputs[n_layer - 1 - i]) if i in skips else None)
            outputs.append(x)
        return head(norm(x))
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def next_token(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """logits (B, V) -> (B, 1), a draw a row from softmax(logits / temperature) cut by top_k, then top_p, then min_p."""
    if temperature < 1e-6:  # logits divided by it could be infinite
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


def prefill(model: GPT, idx, state=None):
    """idx (B, T), any T, fed in blocks from a state on -> logits (B, V) after its last token, and the state there."""
    for block in idx.split(tokens_at_once(model), dim=1):
        logits, _, state = model(block, state=state, last_only=True)
    return logits[:, -1], state


@torch.no_grad()
def generate(model: GPT, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
             generator: torch.Generator | None = None, num_samples: int = 1, n_vocab: int | None = None) -> Iterator:
    """Continue idx (B, T) int64: yields max_new_tokens tensors (B * num_samples,), the samples of a row side by side.

    The prompt is fed once, then each token costs one step on the carried state; with learned positions a stream longer
    than block_size starts anew from its last block_size tokens at every step, as in nanoGPT.
    In this order: repetition_penalty (CTRL, arXiv 1909.05858: positive logits of tokens seen so far, prompt included,
    are divided by it, negative ones multiplied), temperature (0: the most likely token), top_k, top_p (nucleus, arXiv
    1904.09751, of what top_k left), min_p (arXiv 2407.01082: at least min_p times the highest probability). The most
    likely token always stays. Tokens from n_vocab on, the padding of a vocabulary, are never drawn. All draws come
    from `generator`, on the model's device: with one, the program's own random numbers stay as they are."""
    learned, block_size = model.config.position == "learned", model.config.block_size
    wide = torch.float32 if idx.device.type == "mps" else torch.float64  # MPS has no float64
    training = model.training
    model.eval()
    try:
        recent = idx[:, -block_size:] if learned else idx[:, :0]  # (B, up to block_size); not learned: (B, 0)
        logits, state = prefill(model, recent if learned else idx)
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, idx, True)  # (B, V)
        logits, state, recent, seen = map_state(
            lambda t: t.repeat_interleave(num_samples, 0), (logits, state, recent, seen))
        in_shares = any(hasattr(p, "full_tensor") for p in model.parameters())  # FSDP: whole within forward only
        step = None if in_shares else decoder(model, state)
        for i in range(max_new_tokens):
            row = logits.to(wide)  # (B, V)
            if not row.sum().isfinite():  # else a token past the last would be drawn
                raise SampleError(NOT_FINITE)
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
            elif step is None:
                logits, state = prefill(model, token, state)
            else:
                logits = step(token)
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
    """Summed nats of a file's tokens, each given all before it that the model can see, and the numbers of tokens and
    bytes; memory does not grow with the file. Bits per byte = nats / ln 2 / bytes."""
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
    if not math.isfinite(nats):
        raise SampleError(NOT_FINITE)
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
            if not np.isfinite(rows).all():
                raise SampleError(NOT_FINITE)
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
    add("--repetition_penalty", type=number(float, "from 0.01 to 100", lambda r: 0.01 <= r <= 100), default=1.0,
        metavar="R", help="above 1: tokens seen before become less likely (default: %(default)s, off)")
    add("--num_samples", type=number(int, "a whole number from 1 to 10000", lambda n: 1 <= n <= 10000), default=1,
        metavar="N", help="samples, made side by side (default: %(default)s)")
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
    if args.output is not None:
        read = [path for path in (args.encode, args.model_path) if path.exists()]
        if not args.output.parent.is_dir():
            parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
        if args.output.exists() and (not args.output.is_file() or any(args.output.samefile(path) for path in read)):
            parser.error(f"--output {args.output}: a file that is read here, or no file; give another name")
    given = [key for key in SAMPLING if getattr(args, key) != parser.get_default(key)]
    if given and (args.score is not None or args.encode is not None):
        parser.error(f"--{given[0]} is for text that is written; leave it out with --score and --encode")
    if args.stop == "":
        parser.error("--stop: an empty text; leave it out to go on to --max_new_tokens")
    if args.stop is not None and args.stop.encode(errors="replace").decode() != args.stop:
        parser.error("--stop: not valid UTF-8, as all text that is written is")
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
    try:
        for tokens in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p,
                               args.repetition_penalty, generator, args.num_samples, tokenizer.n_vocab):
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
    finally:  # after Ctrl-C as well
        for i, (stream, text) in enumerate(zip(streams, texts if n_tokens else [])):
            if args.num_samples > 1:
                print(f"--- sample {i + 1} of {args.num_samples}")
            print("".join(text) + stream.held, flush=True)
    speed = f" at {(n_tokens - args.num_samples) / seconds:,.0f} tokens/s" if n_tokens > args.num_samples else ""
    print(f"{idx.shape[1]:,} prompt tokens in {first - start:.2f} s; {n_tokens:,} new ones{speed}",
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
    print(f"{args.model_path}: step {checkpoint['step']:,}, lowest val_loss {checkpoint['best_val_loss']:.4f}, "
          f"{model.num_params():,} parameters, {tokenizer.name} tokens; {args.device}, {args.dtype}"
          + (f"; seed {args.seed}" if file is None else ""), file=sys.stderr)
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
            try:
                T, C = encode(model, tokenizer, args.encode, args.output)
            except OSError as error:  # of a temporary file, whose name tells nobody anything
                raise SampleError(f"--output {args.output} cannot be written: {error.strerror}") from None
            print(f"{args.output}: {T:,} x {C}, {T / (time.perf_counter() - start):,.0f} tokens/s", file=sys.stderr)
        else:
            write_samples(model, tokenizer, args)


def main(argv: list[str] | None = None):
    parser, args = parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no temporary file is left
    try:
        run(args)
    except (BrokenPipeError, KeyboardInterrupt) as end:  # what Python still holds for the reader goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(end, KeyboardInterrupt) else 0)
    except (SampleError, DataError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
