"""The kernel report, `uv run kernels.py [--json FILE]`: on any machine, with or without a GPU.

1. Correctness: every implementation that can run here against the oracle in float64. Without a GPU the Triton kernels
   run in Triton's interpreter.
2. Every Triton kernel as a training step launches it at (b, l, d, n) = (8, 2048, 2048, 16), conv width 4, compiled for
   three GPU generations: the launch is recorded on meta tensors, compiled by the Triton wheel's ptxas and disassembled.
   An instruction counts as often as its loops run, every branch as taken, and is divided by the number of (b, l, d, n).
3. A lower bound on the time, from these counts and the published rates of one GPU of each generation. It knows nothing
   of latency or cache misses: no kernel can be faster, any may be slower.
4. With a GPU: measured times beside the bounds, and against mamba_ssm and causal_conv1d where they are installed, else
   against the sequential path of transformers.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest.mock import patch

import torch

import kernels

B, L, D, N, W = 8, 2048, 2048, 16, 4
BF16, F32 = torch.bfloat16, torch.float32
KERNELS = "selective_scan_fwd", "selective_scan_bwd", "causal_conv1d_fwd", "causal_conv1d_bwd"
# name, SMs, GHz, TB/s, float32 lanes a clock and SM (data sheets); 4 warp instructions, 16 special functions and
# 32 lanes of loads, stores and shuffles a clock and SM on all three
GPUS = {80: ("A100", 108, 1.41, 2.04, 64), 90: ("H100", 132, 1.755, 3.35, 128), 100: ("B200", 148, 1.85, 8.0, 128)}
CLASSES = {
    "float32": "FADD FMUL FFMA FMNMX FSEL FSETP FSET FADD2 FMUL2 FFMA2 FMNMX3 FCHK",
    "mufu": "MUFU",
    "shuffle": "SHFL",
    "memory": "LDG STG LDS STS LDSM STSM LDL STL LD ST",
    "barrier": "BAR WARPSYNC",
}
# How often each buffer travels between memory and the chip: reads and writes. What a program soon touches again (u and
# delta, which the backward reads twice, and `kept`, which each segment writes anew) should stay in the second cache;
# test_triton.py counts the requests. BC is a float32 copy of B and C that the launch makes, sums and dBC are summed
# after it.
TRAFFIC = {
    "selective_scan_fwd": "u:r delta:r z:r y:w saved:w A:r BC:wr reset:r last:wrw D:r bias:r",
    "selective_scan_bwd": "dy:r u:r delta:r z:r du:w ddelta:w dz:w saved:r A:r BC:wr reset:r dh:wrw sums:wr dBC:wr "
                          "kept:wr D:r bias:r",
    "causal_conv1d_fwd": "x:r y:w weight:r bias:r document:wr",
    "causal_conv1d_bwd": "dy:r x:r dx:w dweight:wr weight:r bias:r document:wr",
}


# ---------------------------------------------------------------- the launches

def _inputs(dtype, reset, device):
    """The arguments of one training step."""
    def rand(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device=device).normal_()

    xz, BC, u, delta, dy = (rand(B, L, size) for size in (2 * D, 2 * N, D, D, D))
    A, weight, skip, bias = (rand(*shape, dtype=F32) for shape in ((D, N), (D, W), (D,), (D,)))
    reset = (rand(B, L) > 3) if reset else None
    scan = u, delta, -A.abs(), BC[..., :N], BC[..., N:], skip, xz[..., D:], bias, True, None, reset
    conv = xz[..., :D], weight, bias, True, None, reset, 1
    return scan, conv, dy


def calls(dtype, reset, device):
    """{kernel: a function that launches it}"""
    scan, conv, dy = _inputs(dtype, reset, device)
    saved = torch.empty(math.ceil(L / kernels.SEGMENT), B, N, D, device=device)
    return {
        "selective_scan_fwd": lambda: kernels._scan_fwd_triton(*scan, True),
        "selective_scan_bwd": lambda: kernels._scan_bwd_triton(dy, None, *scan, saved),
        "causal_conv1d_fwd": lambda: kernels._conv_fwd_triton(*conv),
        "causal_conv1d_bwd": lambda: kernels._conv_bwd_triton(dy, None, *conv),
    }


def record(jitted, call):
    """(grid, {argument: value}) of the launch of the jitted function that the call would make."""
    recorded = []

    def run(*args, grid, warmup, **options):
        recorded.append((grid, dict(zip(jitted.arg_names, args)) | options))

    jitted.run = run
    try:
        call()
    finally:
        del jitted.run
    return recorded[0]


def launch(name, dtype, reset):
    """(the jitted function, its grid, {argument: value}) of the launch that a training step makes."""
    jitted = {"selective_scan_fwd": kernels._scan_fwd_kernel, "selective_scan_bwd": kernels._scan_bwd_kernel,
              "causal_conv1d_fwd": kernels._conv_fwd_kernel, "causal_conv1d_bwd": kernels._conv_bwd_kernel}[name]
    return jitted, *record(jitted, calls(dtype, reset, "meta")[name])


def compile_launch(jitted, arguments, sm):
    """What the launch's first call on a GPU of this generation would compile, with the same specialisation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(jitted.params):
        name, x = parameter.name, arguments[parameter.name]
        aligned, special = [["tt.divisibility", 16]], isinstance(x, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (special and x == 1):
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], attributes[i,] = "*" + short[x.dtype], aligned
        else:
            signature[name] = "i32" if abs(x) < 2**31 else "i64"
            if special and x % 16 == 0:
                attributes[i,] = aligned
    options = {k: v for k, v in arguments.items() if k not in jitted.arg_names}
    return triton.compile(ASTSource(jitted, signature, constants, attributes), GPUTarget("cuda", sm, 32), options)


# ---------------------------------------------------------------- the machine code

def disassemble(compiled):
    """(instructions, loops as pairs of first and last index, registers) of the compiled kernel."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        text, usage = (subprocess.run([os.path.join(tools, tool), option, f.name], capture_output=True, text=True,
                                      check=True).stdout
                       for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for i, instruction in enumerate(instructions):
        jump = re.match(r"BRA\b.*`\((\.L_\w+)\)", instruction)
        if jump and labels.get(jump[1], i) < i:
            loops.append((labels[jump[1]], i))
    return [re.split(r"[.\s]", x)[0] for x in instructions], sorted(loops), int(re.search(r"REG:(\d+)", usage)[1])


def trips(name, a):
    """How often each loop runs, in the order of the source, an outer loop before the ones in it."""
    if name == "selective_scan_fwd":
        return [L // (a["S"] * a["T"])]
    if name == "selective_scan_bwd":
        return [L // a["EVERY"], a["EVERY"] // a["PASS"], a["EVERY"] // (a["S"] * a["T"])]
    return [math.ceil((a["ROWS"] + (a["W"] - 1 if name == "causal_conv1d_bwd" else 0)) / a["T"])]


def traffic(name, arguments, dtype):
    """{buffer: {"bytes", "reads", "writes"}}"""
    buffers = {}
    for item in TRAFFIC[name].split():
        buffer, moves = item.split(":")
        x = arguments[buffer]
        if x is not None:
            size = x.numel() * x.element_size()
            buffers[buffer] = {"bytes": size, "reads": moves.count("r"), "writes": moves.count("w")}
    if "scan" in name:  # what the float32 copies are made from
        buffers["B, C as given"] = {"bytes": 2 * B * L * N * dtype.itemsize, "reads": 1, "writes": 0}
    if name == "selective_scan_bwd":
        buffers["dB, dC"] = {"bytes": 2 * B * L * N * 4, "reads": 2, "writes": 3}  # summed, put in order, cast
    return buffers


def row(name, sm, dtype, reset):
    """One line of the report."""
    jitted, grid, arguments = launch(name, dtype, reset)
    compiled = compile_launch(jitted, arguments, sm)
    instructions, loops, registers = disassemble(compiled)
    runs = trips(name, arguments)
    if len(loops) != len(runs) or any(b[0] < loops[0][0] or b[1] > loops[0][1] for b in loops):
        raise RuntimeError(f"{name} sm_{sm}: {len(runs)} loops in the source, but {loops} in the machine code")
    counts, spills = Counter(), 0
    for i, op in enumerate(instructions):
        inside = [n for (first, last), n in zip(loops, runs) if first <= i <= last]
        counts[op] += math.prod(inside)
        spills += len(inside) == min(2, len(loops)) and op in ("LDL", "STL")
    programs, warps = math.prod(grid), arguments["num_warps"]
    elements = B * L * D * (N if "scan" in name else 1)
    scale = programs * warps * 32 / elements
    kinds = {op: kind for kind, ops in CLASSES.items() for op in ops.split()}
    classes = Counter()
    for op, count in counts.items():
        classes[kinds.get(op, "other")] += count * scale
    buffers = traffic(name, arguments, dtype)
    moved = sum(x["bytes"] * (x["reads"] + x["writes"]) for x in buffers.values())
    streams = {"selective_scan_fwd": 4, "selective_scan_bwd": 7, "causal_conv1d_fwd": 2, "causal_conv1d_bwd": 3}[name]
    small = {"selective_scan_fwd": 2, "selective_scan_bwd": 4}.get(name, 0) * B * L * N  # B, C, dB, dC
    result = {
        "kernel": name, "sm": sm, "dtype": str(dtype).removeprefix("torch."), "d_state": N if "scan" in name else None,
        "reset": reset, "registers": registers, "hot_loop_spills": spills, "shared_bytes": compiled.metadata.shared,
        "instructions_per_element": sum(classes.values()), "mufu_per_element": classes["mufu"],
        "instructions_by_class": dict(classes), "atomics": sum(counts[op] for op in ("ATOM", "ATOMG", "ATOMS", "RED")),
        "bytes": moved, "bytes_minimum": (streams * B * L * D + small) * dtype.itemsize, "buffers": buffers,
        "programs": programs, "warps": programs * warps,
    }
    return result | bound(result, elements, warps)


def bound(r, elements, warps):
    """The modelled lower bound in milliseconds and its parts. A program of w warps takes min(w, 4) of an SM's 4
    schedulers; schedulers without a program are idle."""
    _, sms, ghz, tbs, lanes = GPUS[r["sm"]]
    slots = sms * 4 // min(warps, 4)
    idle = math.ceil(r["programs"] / slots) * slots / r["programs"]
    classes = r["instructions_by_class"]
    lsu = classes.get("memory", 0) + classes.get("shuffle", 0)
    ms = lambda count, rate: elements * count * idle / (sms * rate * ghz * 1e9) * 1e3  # noqa: E731
    parts = {"issue": ms(r["instructions_per_element"], 128), "mufu": ms(r["mufu_per_element"], 16),
             "float32": ms(classes.get("float32", 0), lanes), "load/store/shuffle": ms(lsu, 32),
             "bytes": r["bytes"] / tbs / 1e12 * 1e3}
    by = max(parts, key=parts.get)
    return {"bound_ms": parts[by], "bound_by": by, "bound_parts_ms": parts, "idle": idle}


# ---------------------------------------------------------------- correctness

def worst(ours, theirs):
    """The largest relative difference in the 2-norm; NaN if one is"""
    return float(torch.stack([(x.double() - y).norm() / y.norm() for x, y in zip(ours, theirs, strict=True)]).max())


def check(device, l):
    """{(operator, dtype): the largest relative error, in the 2-norm, of outputs and gradients against the oracle}"""
    errors = {}
    for dtype in (F32, BF16):
        torch.manual_seed(0)
        b, d, n = 2, 33, 3
        reset = (torch.rand(b, l) < 0.2).to(device)
        x, BC = (b, l, d), (b, l, n)
        shapes = {"selective_scan": [x, x, (d, n), BC, BC, (d,), x, (d,), (b, d, n)],
                  "causal_conv1d": [x, (d, W), (d,), (b, W - 1, d)]}
        for name, sizes in shapes.items():
            inputs = [torch.randn(size).to(device, dtype if size[0] == b else F32) for size in sizes]
            if name == "selective_scan":
                inputs[2].abs_().neg_()
            results, douts = [], None
            for function, cast in (name, lambda x: x), (name + "_oracle", torch.Tensor.double):
                xs = [cast(x).detach().requires_grad_() for x in inputs]
                options = (True, xs[8], reset, True) if name == "selective_scan" else ("silu", xs[3], reset, True)
                ys = getattr(kernels, function)(*xs[: 8 if name == "selective_scan" else 3], *options)
                douts = [(torch.randn(y.shape).to(y) if douts is None else douts[i]).to(y) for i, y in enumerate(ys)]
                results.append([y.detach() for y in (*ys, *torch.autograd.grad(ys, xs, douts))])
            errors[name, dtype] = worst(*results)
    return errors


def print_check(label, device, backend, l=19):
    with patch.dict(os.environ, KERNELS=backend):
        errors = check(device, l)
    for (name, dtype), error in errors.items():
        limit = 2e-6 if dtype == F32 else 6e-3
        verdict = "ok" if error < limit else f"WRONG, above {limit}"
        print(f"  {label:20} {name:15} {str(dtype)[6:]:9} {error:8.1e}  {verdict}", flush=True)


# ---------------------------------------------------------------- with a GPU

def milliseconds(call):
    """Median time of a call on the current GPU, its L2 cache cleared before each."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def against_mamba_ssm():
    """[(name, their time, ours, relative difference)] of the operators of mamba_ssm and causal_conv1d, where these are
    installed: bfloat16, each in the layout that it takes, ours (b, l, d), theirs (b, d, l)."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    (u, delta, A, B_, C_, skip, z, bias, *_), (x, weight, *_), dy = _inputs(BF16, False, torch.device("cuda"))

    def scan(u, delta, A, B_, C_, z):
        return kernels.selective_scan(u, delta, A, B_, C_, skip, z, bias, True)

    def their_scan(u, delta, A, B_, C_, z):
        return selective_scan_fn(u, delta, A, B_, C_, skip, z, bias, True)

    def conv(x, weight):
        return kernels.causal_conv1d(x, weight, bias, "silu")

    def their_conv(x, weight):
        return causal_conv1d_fn(x, weight, bias, activation="silu")

    rows = []
    for name, ours, theirs, inputs in (("selective_scan", scan, their_scan, (u, delta, A, B_, C_, z)),
                                       ("causal_conv1d", conv, their_conv, (x, weight))):
        calls, outputs = [], []
        for f, swap in (theirs, lambda t: t.transpose(1, 2).contiguous()), (ours, torch.Tensor.contiguous):
            xs = [(t if t.dim() == 2 else swap(t)).detach().requires_grad_() for t in inputs]
            y, dout = f(*xs), swap(dy)
            grads = partial(torch.autograd.grad, y, xs, dout, retain_graph=True)
            outputs.append([t.detach() if t.dim() == 2 or f is ours else swap(t.detach()) for t in (y, *grads())])
            calls.append((partial(f, *xs), grads))
        difference = worst(*outputs[::-1])
        for direction, their_call, our_call in zip(("forward", "backward"), *calls):
            rows.append((f"{name} {direction}", milliseconds(their_call), milliseconds(our_call), difference))
    return rows


def against_transformers(device, length, timer):
    """(their time, ours, relative difference) of one forward pass of a Mamba mixer, theirs by the sequential path."""
    from transformers.models.mamba import modeling_mamba as hf

    torch.manual_seed(0)
    mixer = hf.MambaMixer(hf.MambaConfig(hidden_size=D // 2, state_size=N, num_hidden_layers=1), 0).to(device)
    x = torch.randn(B, length, D // 2, device=device)

    def ours():
        u, z = mixer.in_proj(x).chunk(2, -1)
        u = kernels.causal_conv1d(u, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "silu")
        dt, B_, C_ = mixer.x_proj(u).split([mixer.time_step_rank, N, N], -1)
        dt = dt @ mixer.dt_proj.weight.t()
        A = -mixer.A_log.float().exp()
        return mixer.out_proj(kernels.selective_scan(u, dt, A, B_, C_, mixer.D, z, mixer.dt_proj.bias, True))

    sequential = getattr(mixer, "slow_forward", mixer)  # newer versions choose by what is installed
    with torch.no_grad():
        theirs = sequential(x)
        difference = float((ours() - theirs).norm() / theirs.norm())
        return timer(lambda: sequential(x)), timer(ours), difference


def print_gpu(rows):
    import triton

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    print(f"\nMeasured on {torch.cuda.get_device_name()}, sm_{major}{minor}, Triton {triton.__version__}, ms")
    for dtype in (BF16, F32):
        for reset in (False, True):
            for name, call in calls(dtype, reset, device).items():
                time = milliseconds(call)
                same = [r for r in rows if (r["kernel"], r["sm"], r["dtype"], r["reset"])
                        == (name, 10 * major + minor, str(dtype)[6:], reset)]
                beside = (f"bound {same[0]['bound_ms']:.3f} ({GPUS[same[0]['sm']][0]})" if same
                          else "no bound for this generation")
                print(f"  {name:20} {str(dtype)[6:]:9} reset {reset!s:5} {time:8.3f}   {beside}")
                for r in same:
                    r["measured_ms"] = time
    try:
        for name, theirs, ours, difference in against_mamba_ssm():
            print(f"  {name:24} bfloat16: mamba_ssm {theirs:.3f}, here {ours:.3f}, {ours / theirs:.2f} of its time, "
                  f"difference {difference:.0e}")
    except ImportError:
        with contextlib.suppress(ImportError):
            theirs, ours, difference = against_transformers(device, L, milliseconds)
            print(f"  Mamba mixer forward, float32: transformers' sequential path {theirs:.1f}, the same on these "
                  f"kernels {ours:.2f}, {theirs / ours:.0f} times faster, difference {difference:.0e}")


# ---------------------------------------------------------------- the report

def table(rows):
    print(f"\nCompiled for (b, l, d, n) = ({B}, {L}, {D}, {N}), conv width {W}. Counts are per (b, l, d, n), of the "
          "convolution per (b, l, d).\nA bound is not a time; it is of one")
    for sm, (name, sms, ghz, tbs, _) in GPUS.items():
        print(f"  {name} (sm_{sm}): {sms} SMs, {ghz} GHz, {tbs} TB/s")
    columns = {"kernel": 18, "sm": 3, "dtype": 8, "reset": 5, "regs": 4, "spills": 6, "shared": 6, "instr": 6,
               "float32": 7, "mufu": 5, "shuffle": 7, "memory": 6, "other": 6, "MB": 5, "/min": 5, "bound": 34}
    print("  " + " ".join(f"{name:>{width}}" for name, width in columns.items()))
    for r in rows:
        count = r["instructions_by_class"]
        cells = {"kernel": r["kernel"], "sm": r["sm"], "dtype": r["dtype"], "reset": "yes" if r["reset"] else "no",
                 "regs": r["registers"], "spills": r["hot_loop_spills"], "shared": r["shared_bytes"],
                 "instr": f"{r['instructions_per_element']:.2f}", "MB": f"{r['bytes'] / 1e6:.0f}",
                 "/min": f"{r['bytes'] / r['bytes_minimum']:.2f}",
                 "other": f"{count.get('other', 0) + count.get('barrier', 0):.2f}",
                 "bound": f">= {r['bound_ms']:.3f} ms, {r['bound_by']}, {r['idle']:.2f} idle"}
        cells |= {kind: f"{count.get(kind, 0):.2f}" for kind in ("float32", "mufu", "shuffle", "memory")}
        print("  " + " ".join(f"{cells[name]!s:>{width}}" for name, width in columns.items()))


def print_buffers(rows):
    print("\nMB by buffer, sm_90, bfloat16, no reset (times read + times written):")
    for r in rows:
        if (r["sm"], r["dtype"], r["reset"]) == (90, "bfloat16", False):
            parts = [f"{k} {x['bytes'] / 1e6:.3g} ({x['reads']}+{x['writes']})" for k, x in r["buffers"].items()]
            print(f"  {r['kernel']}: {', '.join(parts)}")


def main():
    parser = argparse.ArgumentParser(prog="kernels.py", description="The kernel report: correctness, counts, bounds.")
    parser.add_argument("--json", metavar="FILE", help="write the table to FILE as well")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.interpreted:
        kernels.SEGMENT = 16  # more than one segment, quickly
        return print_check("triton, interpreted", "cpu", "triton")
    if kernels.triton is not None and kernels.INTERPRET:
        sys.exit("error: TRITON_INTERPRET=1 keeps Triton from compiling; unset it, the report interprets by itself")
    tasks = [] if kernels.triton is None else [(name, sm, dtype, reset) for name in KERNELS for sm in GPUS
                                               for dtype in (BF16, F32) for reset in (False, True)]
    with ProcessPoolExecutor(os.process_cpu_count(), multiprocessing.get_context("fork" if tasks else None)) as pool:
        compiled = pool.map(row, *zip(*tasks))  # forks before this process uses CUDA or threads: they do not survive it
        print("Relative error against the oracle in float64, worst of outputs and gradients", flush=True)
        print_check("torch, cpu", "cpu", "torch")
        if tasks:
            environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            subprocess.run([sys.executable, __file__, "--interpreted"], env=environment, check=True)
            if torch.cuda.is_available():
                print_check("triton, cuda", "cuda", "triton", kernels.SEGMENT + 19)
        rows = list(compiled)
    if rows:
        table(rows)
        print_buffers(rows)
        if torch.cuda.is_available():
            print_gpu(rows)
    else:
        print("Triton is not installed here: nothing more to report")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"kernels": rows}, f, indent=1)


if __name__ == "__main__":
    main()
