"""The two operators against their alternatives on a CPU: `uv run tests/bench_kernels.py [--quick] [--json FILE]`.

Everything is in a call: softplus(delta + bias), scan, D u, silu(z) gate, the initial state in, the last state out; for
the convolution bias, silu and both states. float32, all in one run, so that ratios hold on any machine:
  F, F+B   ms of a forward pass without gradients, and of one with the gradients of all inputs: medians of repeats, the
           candidates taking turns. A repeat is as many calls as fit into 0.1 s. The first call counts only where
           it takes above 15 s; a candidate gets 30 s.
  x        the same divided by the time of the compiled form
  MB       peak extra memory, outputs and gradients included: VmHWM after the call less VmRSS before it, in a fresh
           process for each line, warm, whose malloc gives freed memory back at once; not for calls above 30 s
  error    largest relative error, in the 2-norm, of outputs and gradients against the oracle in float64; above 2^24
           state elements on 2 rows of the batch and 64 channels
  least    bytes: each pass reads its inputs and writes its outputs once, at the rate of a 256 MB copy.
           exp: torch.exp at its rate in cache, n + 2 a position and channel (decays, softplus, gate) and as many again
           in the backward pass. The compiled form has powers of its own and may be faster.
mamba.py: mambapy's pscan, the initial state folded into the first step. transformers: the sequential scan of its Mamba,
which takes no initial state. oracle: kernels.selective_scan_oracle.
"""

import argparse
import gc
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import timeit
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernel_report import worst
from machine import cpu, resident

import kernels

SIZES = {  # (b, l, d, n), of the convolution (b, l, d, W); --quick takes the first two
    "selective_scan": [(16, 64, 256, 16), (8, 128, 512, 16), (4, 1024, 512, 16), (1, 4096, 1024, 16)],
    "causal_conv1d": [(8, 128, 256, 4), (4, 1024, 1024, 4)],
}
LIMIT = 120  # seconds: a call that would take longer is not made
COLUMNS = {"F ms": ".2f", "F x": ".2f", "F+B ms": ".2f", "F+B x": ".2f", "F MB": ".0f", "F+B MB": ".0f", "error": ".1e"}

os.environ["KERNELS"] = "torch"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it regrets that mamba_ssm is missing
kernels.COMPILE_FROM = 0
warnings.filterwarnings("error", "kernels: no native code")  # else the plain form would pass for the compiled one


# ---------------------------------------------------------------- the candidates

def ours(function, compiled):
    def call(**inputs):
        kernels.COMPILE = compiled  # read by the backward pass as well, which follows at once
        return function(**inputs)
    return call


def mamba_py(u, delta, A, B, C, D, z, delta_bias, initial_state):
    from mambapy.pscan import pscan

    dt = F.softplus(delta + delta_bias)
    a, x = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]  # (b, l, d, n)
    x[:, 0].addcmul_(a[:, 0], initial_state)
    h = pscan(a, x)
    y = (h @ C[..., None])[..., 0] + D * u
    return y * F.silu(z), h[:, -1]


def transformers(u, delta, A, B, C, D, z, delta_bias):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    y, h = mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True)
    return y.transpose(1, 2), h


def torch_conv1d(x, weight, bias, initial_state):
    rows = torch.cat([initial_state, x], 1)  # (b, W-1 + l, d)
    y = F.conv1d(rows.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    return F.silu(y), rows[:, x.shape[1] :]


OPTIONS = {"selective_scan": {"delta_softplus": True, "return_last_state": True},
           "causal_conv1d": {"activation": "silu", "return_final_state": True}}
OURS = {op: partial(getattr(kernels, op), **options) for op, options in OPTIONS.items()}
ORACLES = {op: partial(getattr(kernels, op + "_oracle"), **options) for op, options in OPTIONS.items()}
CANDIDATES = {op: {"compiled": ours(f, True), "eager": ours(f, False)} for op, f in OURS.items()}
CANDIDATES["selective_scan"] |= {"oracle": ORACLES["selective_scan"], "mamba.py": mamba_py,
                                 "transformers": transformers}
CANDIDATES["causal_conv1d"] |= {"F.conv1d": torch_conv1d}


# ---------------------------------------------------------------- one call

def arguments(op, name, size):
    """({argument: tensor}, the gradients of the two outputs), like those of a block at initialisation."""
    torch.manual_seed(0)
    b, l, d, n = size
    randn = torch.randn
    if op == "selective_scan":
        dt = 10 ** (-3 + 2 * torch.rand(d))  # 0.001 .. 0.1
        inputs = {"u": randn(b, l, d), "delta": 0.3 * randn(b, l, d),
                  "A": -torch.arange(1, n + 1) * (1 + 0.1 * randn(d, n)), "B": randn(b, l, n), "C": randn(b, l, n),
                  "D": randn(d), "z": randn(b, l, d), "delta_bias": dt.expm1().log(), "initial_state": randn(b, d, n)}
    else:
        inputs = {"x": randn(b, l, d), "weight": randn(d, n), "bias": randn(d), "initial_state": randn(b, n - 1, d)}
    douts = randn(b, l, d), randn(inputs["initial_state"].shape)
    if name == "transformers":
        del inputs["initial_state"]
    return {k: x.requires_grad_() for k, x in inputs.items()}, douts


@torch.no_grad()
def forward(call, inputs, douts):
    return call(**inputs)


def forward_backward(call, inputs, douts):
    ys = call(**inputs)
    return *(y.detach() for y in ys), *torch.autograd.grad(ys, list(inputs.values()), douts)


PASSES = {"F": forward, "F+B": forward_backward}


def warm(op, name, n):
    """Load libraries and native code."""
    forward_backward(CANDIDATES[op][name], *arguments(op, name, (2, 16, 32, n)))


def seconds(call, count=1):
    gc.collect()
    return timeit.timeit(call, number=count) / count  # with the collector off


def medians(calls, repeats):
    """{key: median seconds of a call}"""
    first = {key: seconds(call) for key, call in calls.items()}
    times = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            if 2 * first[key] + sum(times[key]) <= 30:
                times[key].append(seconds(call, 1 + int(0.1 / first[key])))
    return {key: statistics.median(ts or [first[key]]) for key, ts in times.items()}


def error(op, name, size):
    b, l, d, n = size
    inputs, douts = arguments(op, name, size if math.prod(size) <= 2**24 else (min(b, 2), l, min(d, 64), n))
    exact = {k: x.detach().double().requires_grad_() for k, x in inputs.items()}
    expected = forward_backward(ORACLES[op], exact, [dy.double() for dy in douts])
    results = forward_backward(CANDIDATES[op][name], inputs, douts)
    return worst(results, expected)


# ---------------------------------------------------------------- in processes of their own

def processes(count):
    """A pool in which every task gets a new process."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def peaks(op, name, size, passes):
    """Peak extra memory in MB of each pass."""
    warm(op, name, size[3])
    given, peak = (CANDIDATES[op][name], *arguments(op, name, size)), {}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    for key in passes:  # F first: F+B needs at least as much
        PASSES[key](*given)
        peak[f"{key} MB"] = resident("VmHWM") - before
    return peak


def compile_times():
    """{operator: seconds that the first calls take longer than the next, and what another shape costs}"""
    times = {"import": seconds(partial(importlib.import_module, "torch._inductor.compile_fx"))}
    for op, candidates in CANDIDATES.items():
        b, l, d, n = size = SIZES[op][0]
        calls = [partial(f, candidates["compiled"], *arguments(op, "compiled", size)) for f in PASSES.values()]
        first, later = ([seconds(call) for call in calls] for _ in range(2))
        compiled = kernels._compiled.cache_info().misses
        other = arguments(op, "compiled", (b + 3, 2 * l + 3, d + 40, n))
        other = [seconds(partial(forward_backward, candidates["compiled"], *other)) for _ in range(2)]
        times[op] = {"forward": first[0] - later[0], "backward": first[1] - later[1], "other shape": other,
                     "compiled for it": kernels._compiled.cache_info().misses - compiled}
    return times


# ---------------------------------------------------------------- the machine

def rates():
    """Bytes a second of a copy, read and written; torch.exp a second, of one thread in cache times the threads. The
    best of many runs, as bounds should be."""
    def best(call, repeat):
        return min(timeit.repeat(call, repeat=repeat, number=1))

    source, target = torch.ones(2**26), torch.empty(2**26)
    x, y = source[: 2**14], target[: 2**14]
    copy, threads = best(lambda: target.copy_(source), 9), torch.get_num_threads()
    torch.set_num_threads(1)
    exp = best(lambda: torch.exp(x, out=y), 2000)
    torch.set_num_threads(threads)
    return {"copy": 2 * source.nbytes / copy, "exp": threads * x.numel() / exp}


def least(op, size, rate):
    """The rows of the bounds."""
    inputs, douts = arguments(op, "", size)
    read, written = (sum(x.nbytes for x in xs) for xs in (inputs.values(), douts))
    bounds = {"least, bytes": [x / rate["copy"] for x in (read + written, 3 * read + 2 * written)]}
    if op == "selective_scan":
        b, l, d, n = size
        bounds["least, torch.exp"] = [passes * b * l * d * (n + 2) / rate["exp"] for passes in (1, 2)]
    return [{"name": name, "F ms": f * 1e3, "F+B ms": fb * 1e3} for name, (f, fb) in bounds.items()]


# ---------------------------------------------------------------- the tables

def measure(op, size, repeats, rate, quadratic):
    """The rows of one table. quadratic: seconds of transformers' F+B per unit of work, kept from size to size."""
    b, l, d, n = size
    work = b * d * n * l * l  # each of its steps x[:, :, t] has a gradient as long as x
    expected, names, rows = quadratic.get("seconds", 0) * work, [], least(op, size, rate)
    for name in CANDIDATES[op]:
        try:
            warm(op, name, n)
            names.append(name)
        except ImportError as reason:
            rows.append({"name": name, "note": f"left out, `uv sync` brings it ({reason})"})
    calls = {(name, key): partial(f, CANDIDATES[op][name], *arguments(op, name, size))
             for name in names for key, f in PASSES.items()
             if (name, key) != ("transformers", "F+B") or expected < LIMIT}
    times = medians(calls, repeats)
    if ("transformers", "F+B") in times:
        quadratic["seconds"] = times["transformers", "F+B"] / work
    with processes(2) as pool:
        memory = {name: pool.submit(peaks, op, name, size, [key for key in PASSES if times.get((name, key), 31) <= 30])
                  for name in names}
    for name in names:
        row = {"name": name} | {f"{key} ms": times[name, key] * 1e3 for key in PASSES if (name, key) in times}
        if "F+B ms" in row:
            row["error"] = error(op, name, size)
        else:
            row["note"] = f"F+B is O(l^2), not run: about {expected:.0f} s"
        rows.append(row | memory[name].result())
    compiled = next(row for row in rows if row["name"] == "compiled")
    for row in rows:
        row |= {f"{key} x": row[f"{key} ms"] / compiled[f"{key} ms"] for key in PASSES if f"{key} ms" in row}
    return rows


def print_table(op, size, rows):
    print(f"\n{op:20}" + "".join(f"{column:>10}" for column in COLUMNS))
    print(f"  (b, l, d, {'n' if op == 'selective_scan' else 'W'}) = {size}")
    for row in rows:
        cells = [format(row[column], form) if column in row else "-" for column, form in COLUMNS.items()]
        line = f"  {row['name']:18}" + "".join(f"{cell:>10}" for cell in cells)
        print(f"{line}  {row.get('note', '')}".rstrip(), flush=True)


def print_compile(state, times):
    print(f"  {state}, after {times['import']:.1f} to import torch._inductor", flush=True)
    for op in CANDIDATES:
        t, (first, again) = times[op], times[op]["other shape"]
        print(f"    {op:14}  forward {t['forward']:5.1f}, backward {t['backward']:5.1f}; another batch, length and "
              f"width: {t['compiled for it']} compiled, first call {first:.3f}, second {again:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Scan and convolution against their alternatives on a CPU.")
    parser.add_argument("--quick", action="store_true", help="two sizes, 3 repeats: about 5 minutes instead of 15")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one a core")
    args = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("bench_kernels: peak memory is read from /proc: run it on Linux")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the other processes
    load, rate = os.getloadavg()[0], rates()
    report = {"cpu": cpu(), "cores": os.cpu_count(), "load": load, "threads": args.threads, "torch": torch.__version__,
              "rates": rate, "compile": {}}
    print(f"{report['cpu']}, {os.cpu_count()} cores, load {load:.1f}; torch {torch.__version__}, "
          f"threads {args.threads}; copy {rate['copy'] / 1e9:.1f} GB/s, torch.exp {rate['exp'] / 1e9:.2f} G/s")
    print("\nCompile time, s: a first call less the next", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for state in ("empty cache", "warm cache"):
            try:
                with processes(1) as pool:
                    report["compile"][state] = pool.submit(compile_times).result()
            except UserWarning as warning:
                sys.exit(f"bench_kernels: nothing to compare, install a C++ compiler such as g++ ({warning})")
            print_compile(state, report["compile"][state])
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # read by peaks' processes
        for op, sizes in SIZES.items():
            report[op], quadratic = [], {}
            for size in sizes[:2] if args.quick else sizes:
                rows = measure(op, size, 3 if args.quick else 7, rate, quadratic)
                print_table(op, size, rows)
                report[op].append({"size": size, "rows": rows})
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
