"""Whole training steps, decoding and memory against what a user would take instead, on a CPU:
`uv run tests/bench_steps.py [--quick] [--threads N] [--json FILE]`.

All in one run, the candidates taking turns, medians of repeats, so that ratios hold on any machine. A step is forward,
backward, clipping and AdamW on random bytes, vocabulary 256, float32, without a state from the step before; every
candidate has its model's own defaults, and AdamW as its own training program has it on a CPU, fused here alone.
Where the CPU multiplies bfloat16, ours and nanoGPT run once more, under autocast; layers: as train.py --compile layers;
learned positions: nanoGPT's in place of rotary ones; products: the matrix products of our step and nothing else.
The process keeps freed memory for all of them, as train.py does.
  tokens/s   of a training step
  ms/token   of decoding at batch 1 from a prompt of 16 tokens, the most likely token each time, 100 tokens a turn; the
             first and the last tenth of the tokens show whether it stays constant
  MB         peak extra memory of two training steps, optimizer state included: VmHWM less VmRSS before the model is
             made, in a fresh process
nanoGPT: its model rebuilt from its published configuration (github.com/karpathy/nanoGPT). mamba.py: mambapy's Mamba
with an embedding and a head. transformers: its GPT-2 and Mamba, the latter by its sequential path.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from machine import cpu, multiplies_bfloat16, resident

import kernels
from model import GPT, GPTConfig
from sample import decoder
from train import compile_layers, keep_freed_memory, quiet_compiler

V = 256
MAMBA = {"C": 256, "layers": 4}
PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "convolution", "convolution_backward")]
EXAMPLE = [256, 256, 192, 128, 128, 192, 256, 256]  # an hourglass of two Mamba and six attention layers


# ---------------------------------------------------------------- the models: idx (B, T) -> logits (B, T, V)

class NanoGPT(nn.Module):
    """Learned positions, pre-LayerNorm blocks without biases, 4 C of GELU, tied head."""

    def __init__(self, C, layers, heads, block_size, vocab=V):
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(vocab, C), nn.Embedding(block_size, C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "ln_1": nn.LayerNorm(C, bias=False), "qkv": nn.Linear(C, 3 * C, bias=False),
            "proj": nn.Linear(C, C, bias=False), "ln_2": nn.LayerNorm(C, bias=False),
            "up": nn.Linear(C, 4 * C, bias=False), "down": nn.Linear(4 * C, C, bias=False)}) for _ in range(layers))
        self.ln_f = nn.LayerNorm(C, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx):
        B, T = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(T))
        for block in self.blocks:
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2)
                       for t in block["qkv"](block["ln_1"](x)).chunk(3, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["proj"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + block["down"](F.gelu(block["up"](block["ln_2"](x))))
        return F.linear(self.ln_f(x), self.wte.weight)


class MambaPy(nn.Module):
    def __init__(self, C, layers):
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        self.wte, self.head = nn.Embedding(V, C), nn.Linear(C, V, bias=False)
        self.mamba = Mamba(MambaConfig(d_model=C, n_layers=layers))
        self.ln_f = RMSNorm(C)

    def forward(self, idx):
        return self.head(self.ln_f(self.mamba(self.wte(idx))))

    def step(self, token, caches):
        x, caches = self.mamba.step(self.wte(token), caches)
        return self.head(self.ln_f(x)), caches


def hf_mamba(C, layers):
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=C, num_hidden_layers=layers, state_size=16))


def hf_gpt2(C, layers, block_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=C, n_layer=layers, n_head=4, n_positions=block_size,
                                      bos_token_id=0, eos_token_id=None))


def ours(C, layers, kind, block_size, compiled=False, **keys):
    model = GPT(GPTConfig(vocab_size=V, n_embd=C, n_layer=layers, attention_type=kind, block_size=block_size, **keys))
    if compiled:
        compile_layers(model)
    return model


# ---------------------------------------------------------------- training steps

def train_step(model, optimizer, idx, targets, bfloat16):
    optimizer.zero_grad(set_to_none=True)  # first, as both training programs do
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        if isinstance(model, GPT):
            _, loss, _ = model(idx, targets)
        else:
            out = model(idx)
            logits = out.logits if hasattr(out, "logits") else out
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def steps(make, B, T, vocab=V, bfloat16=False):
    """A call that takes one training step."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=isinstance(model, GPT) or None)
    idx = torch.randint(vocab, (B, T + 1))
    return partial(train_step, model, optimizer, idx[:, :-1], idx[:, 1:].contiguous(), bfloat16)


class Products(TorchDispatchMode):
    """The matrix products of what runs within, in the order and the layouts it makes them. Called: the same products,
    of random numbers, which lie as far apart in memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.operands = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in PRODUCTS:
            self.calls.append((op, [self.operand(x) if isinstance(x, torch.Tensor) else x for x in args]))
        return op(*args, **(kwargs or {}))

    def operand(self, x):
        key = x.data_ptr(), x.shape, x.stride(), x.dtype
        if key not in self.operands:
            self.operands[key] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).normal_()
        return self.operands[key]

    def __call__(self):
        for op, args in self.calls:
            op(*args)


def products(call):
    """A call that makes the matrix products of a training step"""
    with Products() as made:
        call()
    return made


TRAINING = {
    "pure Mamba, 4 x 256, 16 x 128": (16, 128, {
        "ours": partial(ours, **MAMBA, kind="mamba", block_size=128, ffn_mult=0),
        "mamba.py": partial(MambaPy, **MAMBA), "transformers": partial(hf_mamba, **MAMBA),
        "nanoGPT": partial(NanoGPT, **MAMBA, heads=4, block_size=128)}),
    "pure Mamba, 4 x 256, 2 x 1024": (2, 1024, {
        "ours": partial(ours, **MAMBA, kind="mamba", block_size=1024, ffn_mult=0),
        "mamba.py": partial(MambaPy, **MAMBA), "nanoGPT": partial(NanoGPT, **MAMBA, heads=4, block_size=1024)}),
    "attention, 8 x 256, 64 x 128": (64, 128, {
        "ours": partial(ours, 256, 8, "standard", 128, n_head=8),
        "ours, learned positions": partial(ours, 256, 8, "standard", 128, n_head=8, position="learned"),
        "nanoGPT": partial(NanoGPT, 256, 8, 8, 128)}),
}


def training(repeats):
    rows = []
    for label, (B, T, makers) in TRAINING.items():
        compiled = {f"{name}, layers": partial(make, compiled=True) for name, make in makers.items() if "ours" in name}
        makers = makers | compiled
        calls = {name: steps(make, B, T) for name, make in makers.items()}
        if multiplies_bfloat16():
            calls |= {f"{name}, bfloat16": steps(makers[name], B, T, bfloat16=True)
                      for name in makers if "ours" in name or name == "nanoGPT"}
        for call in calls.values():
            with quiet_compiler():
                call()  # loads and compiles
        calls |= {f"{name}, products": products(calls[name]) for name in ("ours", "ours, bfloat16") if name in calls}
        times = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                if name == "transformers" and times[name]:
                    continue  # its backward is O(T^2): once is enough
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(ts) for name, ts in times.items()}
        print(f"\n{label:42}{'ms':>10}{'tokens/s':>11}{'/ ours':>8}")
        for name, s in median.items():
            print(f"  {name:40}{s * 1e3:10.0f}{B * T / s:11,.0f}{s / median['ours']:8.2f}", flush=True)
            rows.append({"step": label, "name": name, "ms": s * 1e3, "tokens_per_second": B * T / s})
    return rows


# ---------------------------------------------------------------- decoding

@torch.inference_mode()
def decode(name, tokens):
    """Yields the seconds of each token."""
    torch.manual_seed(0)
    idx = torch.randint(V, (1, 16))
    if name == "mamba.py":
        model = MambaPy(**MAMBA).eval()
        caches = [(None, torch.zeros(1, 512, 3)) for _ in range(MAMBA["layers"])]
        for token in idx[0]:
            logits, caches = model.step(token[None], caches)
    elif name.startswith("transformers"):
        model = (hf_gpt2(**MAMBA, block_size=tokens + 16) if "GPT-2" in name else hf_mamba(**MAMBA)).eval()
        out = model(idx, use_cache=True)
        logits = out.logits[:, -1]
    elif name == "nanoGPT":
        model = NanoGPT(**MAMBA, heads=4, block_size=256).eval()
        logits = model(idx)[:, -1]
    else:
        kind = "mamba" if "Mamba" in name else "standard"
        keys = {"ffn_mult": 0} if kind == "mamba" else {}
        model = ours(**MAMBA, kind=kind, block_size=256, **keys).eval()
        logits, _, state = model(idx, last_only=True)
        step = decoder(model, state)
    for _ in range(tokens):
        start = time.perf_counter()
        token = logits.reshape(1, -1).argmax(-1, keepdim=True)
        if name == "mamba.py":
            logits, caches = model.step(token[0], caches)
        elif name.startswith("transformers"):
            cache = "past_key_values" if "GPT-2" in name else "cache_params"
            out = model(token, **{cache: out[cache]}, use_cache=True)
            logits = out.logits[:, -1]
        elif name == "nanoGPT":  # keeps no keys and values
            idx = torch.cat((idx, token), dim=1)[:, -256:]
            logits = model(idx)[:, -1]
        else:
            logits = step(token)
        yield time.perf_counter() - start


def decoding(tokens):
    names = ["ours, Mamba", "ours, attention over 256", "mamba.py", "transformers Mamba", "transformers GPT-2",
             "nanoGPT"]
    title = f"decoding {tokens} tokens, 4 x 256"
    print(f"\n{title:42}{'ms/token':>10}{'first 10 %':>12}{'last 10 %':>12}{'/ ours':>8}")
    rows, tenth, times = [], tokens // 10, {name: [] for name in names}
    going = {name: decode(name, tokens) for name in names}
    for _ in range(0, tokens, 100):
        for name, seconds in going.items():
            times[name] += itertools.islice(seconds, 100)
    for name, seconds in times.items():
        ms = [1e3 * statistics.median(part) for part in (seconds, seconds[:tenth], seconds[-tenth:])]
        rows.append({"decoding": name, "ms": ms[0], "first": ms[1], "last": ms[2]})
        print(f"  {name:40}{ms[0]:10.2f}{ms[1]:12.2f}{ms[2]:12.2f}{ms[0] / rows[0]['ms']:8.2f}", flush=True)
    return rows


# ---------------------------------------------------------------- memory

def peak(name):
    """Peak extra MB of two steps of 64 x 128 GPT-2 tokens, and MB of the process with torch loaded before them."""
    vocab, before = 50257, resident("VmRSS")
    if name == "nanoGPT":
        make = partial(NanoGPT, 256, 8, 8, 128, vocab)
    else:
        make = partial(lambda: GPT(GPTConfig(vocab_size=vocab, n_embd=EXAMPLE, block_size=128, attention_type=[
            "mamba", "standard", "standard", "mamba", "standard", "standard", "standard", "standard"])))
    call = steps(make, 64, 128, vocab)
    call()
    call()
    return resident("VmHWM") - before, before


def memory():
    print(f"\n{'two steps of 64 x 128 GPT-2 tokens':42}{'MB':>10}{'process':>12}")
    rows = []
    for name in ("ours, an hourglass of 8 layers", "nanoGPT"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            extra, before = pool.submit(peak, name).result()
        rows.append({"memory": name, "MB": extra, "process MB": extra + before})
        print(f"  {name:40}{extra:10,.0f}{extra + before:12,.0f}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description="Training steps, decoding and memory against alternatives on a CPU.")
    parser.add_argument("--quick", action="store_true", help="3 repeats, 500 tokens, no memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one a core")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    kernels.COMPILE = True
    print(f"{cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, threads "
          f"{args.threads}")
    keep_freed_memory()
    rows = training(3 if args.quick else 9) + decoding(500 if args.quick else 2000)
    if not args.quick and Path("/proc/self/status").exists():
        rows += memory()
    if args.json:
        Path(args.json).write_text(json.dumps({"cpu": cpu(), "threads": args.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
