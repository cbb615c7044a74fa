"""The Triton kernels without a GPU: the kernels themselves in Triton's interpreter against the oracle in float64, what
they ask of memory, and the machine code they compile to.

TRITON_INTERPRET must be set before the kernels are imported, so this file runs itself in a second process (`main`)."""

import contextlib
import json
import os
import subprocess
import sys

import kernel_report
import pytest
import torch

import kernels

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")
FLOAT32 = 2e-6  # relative 2-norm

SCANS = {  # what differs from (b, l, d, n) = (1, 19, 33, 3), float32, everything switched on
    "everything": {},
    "reset": {"reset": True, "b": 2, "d": 5},
    "reset at the first and last position": {"reset": [0, 18], "d": 5},
    "reset of states that do not decay": {"reset": True, "b": 2, "d": 5, "still": True},
    "nothing optional": {"bare": True, "n": 2, "d": 5},
    "one position": {"l": 1, "d": 5},
    "whole blocks and channels": {"l": 16, "d": 64, "n": 4},
    "16 states": {"l": 35, "d": 35, "n": 16, "reset": True},
    "whole segments of 16 states": {"l": 32, "d": 32, "n": 16},
    "lanes without states": {"l": 9, "d": 3, "n": 20},
    "more states than a warp has lanes": {"l": 6, "d": 2, "n": 200},
    "bfloat16": {"dtype": "bfloat16", "reset": True},
    "float16": {"dtype": "float16", "d": 5},
}
CONVS = {  # what differs from (b, l, d, W) = (1, 19, 33, 4), float32, everything switched on
    "everything": {},
    "reset": {"reset": True, "b": 2, "d": 5},
    "shorter than the kernel": {"l": 2},
    "one tap": {"W": 1, "l": 3},
    "nothing optional": {"bare": True},
    "dilation": {"W": 3, "dilation": 3, "reset": True, "d": 5},
    "dilation beyond the length": {"dilation": 4, "l": 3, "d": 5},
    "two programs": {"l": 67, "d": 3, "reset": True},
    "wide": {"W": 6, "d": 5},
    "bfloat16": {"dtype": "bfloat16", "reset": True},
}


# ---------------------------------------------------------------- in the second process

def _error(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _reset(reset, b, l):
    if isinstance(reset, list):
        return torch.isin(torch.arange(l), torch.tensor(reset)).expand(b, l)
    return torch.rand(b, l) < 0.2 if reset else None


def _compare(function, oracle, inputs, names, oracle_cast=torch.Tensor.double):
    """Relative errors of the outputs and of the gradient of every input."""
    results, douts = [], None
    for f, cast in (function, lambda x: x), (oracle, oracle_cast):
        xs = [None if x is None else cast(x.detach()).requires_grad_() for x in inputs]
        ys = f(*xs)
        douts = [(torch.randn(y.shape).to(y) if douts is None else douts[i]).to(y) for i, y in enumerate(ys)]
        grads = iter(torch.autograd.grad(ys, [x for x in xs if x is not None], douts))
        results.append([*ys, *(None if x is None else next(grads) for x in xs)])
    return {name: _error(a, b) for name, a, b in zip(names, *results) if a is not None}


def _scan_inputs(b=1, l=19, d=33, n=3, dtype="float32", bare=False, still=False):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    xz = torch.randn(b, l, 2 * d).to(dtype)  # u and z are strided, as halves of a bigger linear's output
    u, delta, z = xz[..., :d], torch.randn(b, l, d).to(dtype), xz[..., d:]
    A, B, C = -4 * torch.rand(d, n) - 0.1, torch.randn(b, l, n).to(dtype), torch.randn(b, l, n).to(dtype)
    if still:
        A[:, 1], A[:, 2] = 0, 0.3
    if bare:
        return [u, delta.abs(), A, B, C, None, None, None, None]
    D, bias = torch.randn(d, 2).unbind(1)
    return [u, delta, A, B, C, D, z, bias, torch.randn(b, n, d).transpose(1, 2)]


def _scan(reset=False, bare=False, **sizes):
    inputs = _scan_inputs(bare=bare, **sizes)
    reset = _reset(reset, *inputs[0].shape[:2])
    call = lambda f: lambda *x: f(*x[:8], not bare, x[8], reset, True)  # noqa: E731
    names = "y", "last", "u", "delta", "A", "B", "C", "D", "z", "bias", "initial"
    return _compare(call(kernels.selective_scan), call(kernels.selective_scan_oracle), inputs, names)


def _conv_inputs(b=1, l=19, d=33, W=4, dilation=1, dtype="float32", bare=False):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    x, weight = torch.randn(b, l, 2 * d).to(dtype)[..., :d], torch.randn(d, W)
    bias, state = torch.randn(d, 2)[:, 0], torch.randn(b, (W - 1) * dilation, d).to(dtype)
    return [x, weight, *((None, None) if bare else (bias, state))]


def _conv(reset=False, bare=False, dilation=1, **sizes):
    inputs = _conv_inputs(bare=bare, dilation=dilation, **sizes)
    reset = _reset(reset, *inputs[0].shape[:2])
    call = lambda f: lambda *x: f(*x[:3], None if bare else "silu", x[3], reset, True, dilation)  # noqa: E731
    names = "y", "final", "x", "weight", "bias", "initial"
    return _compare(call(kernels.causal_conv1d), call(kernels.causal_conv1d_oracle), inputs, names)


def _chunks(function, inputs, sequences, state, cut):
    """The law: a row cut in two, with the state carried, is the whole row. In y, the state and every gradient."""
    def halves(*xs):
        first = [x[:, :cut] if i in sequences else x for i, x in enumerate(xs)]
        second = [x[:, cut:] if i in sequences else x for i, x in enumerate(xs)]
        y1, second[state] = function(*first)
        y2, last = function(*second)
        return torch.cat([y1, y2], 1), last

    names = ["y", "last", *(f"input {i}" for i in range(len(inputs)))]
    return _compare(halves, function, inputs, names, oracle_cast=lambda x: x)


def _steps():
    """One position at a time, in place on the caller's state, against the oracle."""
    u, delta, A, B, C, D, z, bias, state = inputs = _scan_inputs(b=2, l=4)
    reset = torch.tensor([[False, True, False, False], [False, False, False, True]])
    y, last = kernels.selective_scan_oracle(*(x.double() for x in inputs[:8]), True, state.double(), reset, True)
    step = kernels.selective_scan_step
    ys = [step(state, u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z[:, t], bias, True, reset[:, t]) for t in range(4)]
    errors = {"scan y": _error(torch.stack(ys, 1), y), "scan state": _error(state, last)}
    for dilation in (1, 3):
        x, weight, bias, state = inputs = _conv_inputs(b=2, l=4, dilation=dilation)
        y, last = kernels.causal_conv1d_oracle(*(x.double() for x in inputs[:3]), "silu", state.double(), reset, True,
                                               dilation)
        ys = [kernels.causal_conv1d_step(state, x[:, t], weight, bias, "silu", reset[:, t], dilation) for t in range(4)]
        errors |= {f"conv y {dilation}": _error(torch.stack(ys, 1), y), f"conv state {dilation}": _error(state, last)}
    return errors


@contextlib.contextmanager
def _requests():
    """Yields a function (tensor, "load" or "store") -> elements of its storage that kernels asked for so far."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    log, load, store = {"load": [], "store": []}, Builder.create_masked_load, Builder.create_masked_store

    def logged(kind, mask_at, method):
        def wrapper(self, ptrs, *args, **kwargs):
            log[kind].append(ptrs.data[args[mask_at].data.astype(bool)])
            return method(self, ptrs, *args, **kwargs)
        return wrapper

    def count(x, kind):
        start = x.untyped_storage().data_ptr()
        end = start + x.untyped_storage().nbytes()
        return sum(int(((start <= a) & (a < end)).sum()) for a in log[kind])

    Builder.create_masked_load, Builder.create_masked_store = logged("load", 0, load), logged("store", 1, store)
    try:
        yield count
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


def _shared():
    """How many of the tensors that the operators take and return share their storage with another one."""
    u, delta, A, B, C, D, z, bias, state = (x.contiguous() for x in _scan_inputs(l=18, d=5, n=2))
    x, weight, taps_bias, taps = (x.contiguous() for x in _conv_inputs(d=5))
    scan, conv = (u, delta, A, B, C, D, z, bias, True, state, None), (x, weight, taps_bias, True, taps, None, 1)
    shared = {}
    for name, op, args in (("scan_fwd", kernels.scan_fwd, (*scan, True)), ("conv_fwd", kernels.conv_fwd, conv),
                           ("scan_bwd", kernels.scan_bwd, (u, state, *scan, kernels.scan_fwd(*scan, True)[2])),
                           ("conv_bwd", kernels.conv_bwd, (x, taps, *conv))):
        tensors = [*op(*args), *{id(x): x for x in args if isinstance(x, torch.Tensor)}.values()]
        shared[name] = len(tensors) - len({x.untyped_storage().data_ptr() for x in tensors})
    return shared


def _small_default():
    """Errors where the types that tensors have without being told are small ones."""
    scan, conv = _scan_inputs(l=9, d=3), _conv_inputs(l=9, d=3)
    torch.set_default_dtype(torch.bfloat16)
    call = lambda f: lambda *x: f(*x[:8], True, x[8], None, True)  # noqa: E731
    names = "y", "last", "u", "delta", "A", "B", "C", "D", "z", "bias", "initial"
    errors = _compare(call(kernels.selective_scan), call(kernels.selective_scan_oracle), scan, names)
    call = lambda f: lambda *x: f(*x[:3], "silu", x[3], None, True)  # noqa: E731
    names = "conv y", "final", "x", "weight", "conv bias", "conv initial"
    errors |= _compare(call(kernels.causal_conv1d), call(kernels.causal_conv1d_oracle), conv, names)
    torch.set_default_dtype(torch.float32)
    return errors


def _strided():
    """How many outputs of the forward operators are not contiguous for inputs that lie in memory time first."""
    u, delta, A, B, C, D, z, bias, state = _scan_inputs(b=2, l=3, d=5)
    u, delta, z = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (u, delta, z))
    reset = _reset(True, 2, 3)
    outputs = [*kernels.scan_fwd(u, delta, A, B, C, D, z, bias, True, state, reset, True)]
    for mask in (None, reset):
        outputs += kernels.conv_fwd(u, torch.randn(5, 4), bias, True, None, mask, 1)
    return sum(not x.is_contiguous() for x in outputs)


def _traffic():
    """How often each (b, l, d) tensor is requested, in multiples of its size."""
    u, delta, A, B, C, D, z, bias, _ = (x.clone() for x in _scan_inputs(d=5, n=2))
    dy, weight = torch.randn_like(u), torch.randn(u.shape[2], 4)
    scan, conv, counts = (u, delta, A, B, C, D, z, bias, True, None, None), (u, weight, None, True, None, None, 1), {}
    saved = kernels._scan_fwd_triton(*scan, True)[2]
    for name, call, read in (
        ("scan forward", lambda: kernels._scan_fwd_triton(*scan, True), {"u": u, "delta": delta, "z": z}),
        ("scan backward", lambda: kernels._scan_bwd_triton(dy, None, *scan, saved),
         {"u": u, "delta": delta, "z": z, "dy": dy}),
        ("conv forward", lambda: kernels._conv_fwd_triton(*conv), {"x": u}),
        ("conv backward", lambda: kernels._conv_bwd_triton(dy, None, *conv), {"x": u, "dy": dy}),
    ):
        with _requests() as requests:
            written = [x for x in call() if x.shape == u.shape]
        counts |= {f"{name} reads {k}": requests(x, "load") / u.numel() for k, x in read.items()}
        counts |= {f"{name} writes output {i}": requests(x, "store") / u.numel() for i, x in enumerate(written)}
    return counts


def main():
    os.environ.pop("KERNELS", None)  # TRITON_INTERPRET is enough
    kernels.SEGMENT = 16  # so that few positions are several segments
    scan = lambda *x: kernels.selective_scan(*x[:8], True, x[8], None, True)  # noqa: E731
    conv = lambda *x: kernels.causal_conv1d(*x[:3], "silu", x[3], None, True, 2)  # noqa: E731
    report = {"path": kernels._backend(torch.empty(1)),
              "scan": {name: _scan(**case) for name, case in SCANS.items()},
              "conv": {name: _conv(**case) for name, case in CONVS.items()},
              "law": {"scan": _chunks(scan, _scan_inputs(d=5, n=2), (0, 1, 3, 4, 6), 8, 8),
                      "conv": _chunks(conv, _conv_inputs(d=5, dilation=2), (0,), 3, 5)},
              "steps": _steps(), "small default": _small_default(), "shared": _shared(), "strided": _strided(),
              "traffic": _traffic()}
    print(json.dumps(report))


# ---------------------------------------------------------------- what must hold

@pytest.fixture(scope="module")
def interpreted():
    """The report of `main` from a process in which the kernels run in Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _limit(dtype="float32", **case):
    return {"float32": FLOAT32, "bfloat16": 6e-3, "float16": 8e-4}[dtype]  # the small ones' own rounding


def _within(errors, limit):
    """NaN is not. The scan's last state is float32 whatever the inputs are."""
    far = {k: e for k, e in errors.items() if not e < (FLOAT32 if k == "last" else limit)}
    assert errors and not far, far


def test_the_interpreter_runs_triton_unasked(interpreted):
    assert interpreted["path"] == "triton"


@pytest.mark.parametrize("case", SCANS)
def test_scan_equals_oracle(interpreted, case):
    _within(interpreted["scan"][case], _limit(**SCANS[case]))


@pytest.mark.parametrize("case", CONVS)
def test_conv_equals_oracle(interpreted, case):
    _within(interpreted["conv"][case], _limit(**CONVS[case]))


@pytest.mark.parametrize("operator", ["scan", "conv"])
def test_chunks_with_carried_state_are_the_whole(interpreted, operator):
    _within(interpreted["law"][operator], FLOAT32)


def test_steps_equal_oracle(interpreted):
    _within(interpreted["steps"], FLOAT32)


def test_sums_are_float32_whatever_the_default_type_is(interpreted):
    _within(interpreted["small default"], FLOAT32)


def test_outputs_are_contiguous_as_their_fakes(interpreted):
    assert interpreted["strided"] == 0


def test_operators_return_tensors_of_their_own(interpreted):
    """What PyTorch demands of an operator, and its newer versions check."""
    assert len(interpreted["shared"]) == 4 and not any(interpreted["shared"].values()), interpreted["shared"]


def test_each_tensor_is_read_and_written_once(interpreted):
    """But for what the backward scan computes the states from, twice."""
    for name, times in interpreted["traffic"].items():
        assert times == (2 if name in ("scan backward reads u", "scan backward reads delta") else 1), (name, times)


@pytest.mark.parametrize("op, inputs", [
    (kernels.selective_scan, [torch.rand(1, 3, 2), torch.rand(1, 3, 2), -torch.rand(2, 1), *torch.rand(2, 1, 3, 1)]),
    (kernels.causal_conv1d, [torch.rand(1, 3, 2), torch.rand(2, 2)])])
def test_second_derivatives_and_float64_are_refused(monkeypatch, op, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(op(*inputs).square().sum(), inputs, create_graph=True)
    monkeypatch.setenv("KERNELS", "triton")
    monkeypatch.setattr(kernels, "INTERPRET", True)  # else what is missing is a GPU
    with pytest.raises(RuntimeError, match=f"{op.__name__}: no second derivatives"):
        torch.autograd.grad(sum(g.sum() for g in first), inputs)
    with pytest.raises(ValueError, match="float64 is not for the Triton kernels"):
        op(*(x.double() for x in inputs))


COMPILED = """
import torch, kernels
inputs = [torch.randn(1, 9, n, requires_grad=True) for n in (5, 5, 3, 3)]
scan = lambda u, delta, B, C: kernels.selective_scan(u, delta, -torch.ones(5, 3), B, C, delta_softplus=True)
torch.compile(scan, fullgraph=True)(*inputs).sum().backward()
"""


@pytest.mark.slow
def test_compiled_graphs_on_disk_are_of_one_path(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for forced, interpret in ("torch", "1"), ("", "1"), ("", "0"):  # torch, Triton, torch: finds what those before left
        path = {"KERNELS": forced, "TRITON_INTERPRET": interpret}
        done = subprocess.run([sys.executable, "-c", COMPILED], env=environment | path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_report_compares_like_with_like():
    """What the report times against transformers' mixer computes the same."""
    *_, difference = kernel_report.against_transformers("cpu", 5, lambda call: call())
    assert difference < 2e-6


def test_report_calls_a_nan_wrong(monkeypatch, capsys):
    *forward, conv_bwd = kernels.IMPLEMENTATIONS["torch"]
    bad = *forward, lambda *args: [x * torch.nan for x in conv_bwd(*args)]
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "torch", bad)
    kernel_report.print_check("torch, cpu", "cpu", "torch")
    wrong = ["WRONG" in line for line in capsys.readouterr().out.splitlines()]
    assert wrong == [False, True] * 2  # of the scan, of the convolution, in two types


def test_report_refuses_to_compile_what_is_interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernel_report.sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="unset it"):
        kernel_report.main()


@pytest.mark.parametrize("name", kernel_report.KERNELS)
@pytest.mark.parametrize("reset", [False, True])
def test_nothing_of_the_size_of_all_states(name, reset):
    arguments = kernel_report.launch(name, torch.bfloat16, reset)[2]
    sizes = {k: x.numel() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    b, l, d = kernel_report.B, kernel_report.L, kernel_report.D
    assert max(sizes.values()) <= b * l * d, sizes


# For an H100, without and with resets: instructions and special functions an element, bound in ms, bytes / least.
BUDGETS = {("selective_scan_fwd", False): (10.4, 1.25, 0.195, 1.1), ("selective_scan_bwd", False): (32, 2.5, 0.6, 1.85),
           ("selective_scan_fwd", True): (10.6, 1.25, 0.2, 1.1), ("selective_scan_bwd", True): (32, 2.5, 0.6, 1.85),
           ("causal_conv1d_fwd", True): (21.5, 2.1, 0.041, 1.05), ("causal_conv1d_bwd", True): (53, 2.2, 0.068, 1.15)}


@pytest.mark.parametrize("name, reset", [pytest.param(*key, marks=pytest.mark.slow if key[1] else ())
                                         for key in BUDGETS])
def test_budget(name, reset):
    instructions, mufu, milliseconds, ratio = BUDGETS[name, reset]
    r = kernel_report.row(name, 90, torch.bfloat16, reset)
    assert r["atomics"] == 0 and r["hot_loop_spills"] == 0
    assert r["instructions_per_element"] <= instructions and r["mufu_per_element"] <= mufu
    assert r["bound_ms"] <= milliseconds and r["bytes"] <= ratio * r["bytes_minimum"]


@pytest.mark.slow
@pytest.mark.parametrize("sm", kernel_report.GPUS)
def test_other_launches_compile(sm):
    """Ragged sizes, many states, nothing optional, and the steps: what the tables do not show."""
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    b, l, d, n, f = 2, 1001, 100, 64, torch.float32
    u, BC, A, weight, past = empty(b, l, d), empty(b, l, n), empty(d, n, dtype=f), empty(d, 4), empty(b, 9, d)
    scan, conv = (u, u, A, BC, BC, None, None, None, False, None, None), (u, weight, None, False, None, None, 3)
    state, saved, reset = empty(b, d, n, dtype=f), empty(8, b, n, d, dtype=f), empty(b, dtype=torch.bool)
    step = u[:, 0], u[:, 0], A, BC[:, 0], BC[:, 0], None, None, None, True, reset
    calls = {
        kernels._scan_fwd_kernel: lambda: kernels._scan_fwd_triton(*scan, True),
        kernels._scan_bwd_kernel: lambda: kernels._scan_bwd_triton(u, None, *scan, saved),
        kernels._conv_fwd_kernel: lambda: kernels._conv_fwd_triton(*conv),
        kernels._conv_bwd_kernel: lambda: kernels._conv_bwd_triton(u, past, *conv),
        kernels._scan_step_kernel: lambda: kernels._scan_step_triton(state, *step),
        kernels._conv_step_kernel: lambda: kernels._conv_step_triton(past, u[:, 0], weight, None, True, reset, 3),
    }
    for jitted, call in calls.items():
        _, arguments = kernel_report.record(jitted, call)
        instructions, _, registers = kernel_report.disassemble(kernel_report.compile_launch(jitted, arguments, sm))
        assert registers <= 255 and not {"ATOM", "ATOMG", "RED"} & set(instructions)


if __name__ == "__main__":
    main()
