"""The plain-torch path of kernels.py against its float64 oracle, the laws of state and reset, and what autograd and
torch.compile see of it. The Triton kernels have a file of their own."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cpu
import kernels
from kernels import (
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_oracle,
    causal_conv1d_step,
    causal_conv1d_update,
    conv_bwd,
    conv_fwd,
    scan_bwd,
    scan_fwd,
    selective_scan,
    selective_scan_fn,
    selective_scan_oracle,
    selective_scan_step,
    selective_state_update,
)

ALONG_TIME = ("u", "delta", "B", "C", "z")
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def torch_path(monkeypatch):
    monkeypatch.delenv("KERNELS", raising=False)


def scan_inputs(b, l, d, n, absent=(), dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    x = dict(u=rand(b, l, d), delta=rand(b, l, d) - 2, A=-rand(d, n).exp(), B=rand(b, l, n), C=rand(b, l, n), D=rand(d),
             z=rand(b, l, d), delta_bias=0.1 * rand(d), initial_state=rand(b, d, n))
    wide = torch.promote_types(dtype, torch.float32)  # parameters and state stay float32, as under autocast
    return {k: None if k in absent else v.to(dtype if k in ALONG_TIME else wide).requires_grad_() for k, v in x.items()}


def conv_inputs(b, l, d, W, dilation=1, absent=(), dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = dict(x=(b, l, d), weight=(d, W), bias=(d,), initial_state=(b, (W - 1) * dilation, d))
    return {k: None if k in absent else torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
            for k, s in x.items()}


def resets(b, l, at, seed=0):
    reset = torch.zeros(b, l, dtype=torch.bool)
    for row, t in at:
        if t < l:
            reset[row % b, t] = True
    return reset


def grads(outputs, inputs, seed=9):
    gen = torch.Generator().manual_seed(seed)
    loss = sum((y.double() * torch.randn(y.shape, generator=gen, dtype=torch.float64)).sum() for y in outputs)
    wanted = [x for x in inputs.values() if x is not None]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found)]


def error(a, b):
    """relative norm of the difference"""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item() if b.norm() > 0 else a.norm().item()


def assert_near(ours, theirs, tolerance):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        assert error(a, b) <= tolerance, (i, error(a, b))


def assert_as_near_as_the_oracle(function, oracle, inputs, options):
    """Values and gradients against the float64 oracle: values as near as their own dtype holds them, gradients as y's,
    which dy has as well; where few numbers cancel, what counts is the error that the definition itself makes in this
    dtype, and, of a few, what inputs off by its rounding make."""
    exact, same = double(inputs), {k: None if v is None else v.detach().requires_grad_() for k, v in inputs.items()}
    results = []
    for f, x in ((function, inputs), (oracle, same), (oracle, double(inputs, rounded=True)), (oracle, exact)):
        outputs = f(**x, **options)
        results.append([*outputs, *grads(outputs, x)])
    near = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
    for i, (a, b, off, c) in enumerate(zip(*results, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype
        tolerance = near[a.dtype if i < len(outputs) else results[0][0].dtype]
        allowed = max(tolerance, 3 * error(b, c))
        if c.numel() < 8:  # near by luck, or the next number of the dtype, on the other side, is the nearer one
            allowed = max(tolerance, torch.finfo(a.dtype).eps, 20 * error(b, c), 20 * error(off, c))
        assert error(a, c) <= allowed, (i, error(a, c), allowed)


def double(inputs, rounded=False):
    """inputs in float64, each off by as much as its own type rounds where asked for"""
    def wide(x):
        noise = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) - 0.5
        return (x.double() * (1 + rounded * torch.finfo(x.dtype).eps * noise)).requires_grad_()

    return {k: None if v is None else wide(v.detach()) for k, v in inputs.items()}


# -- the definition itself, against the closed form of one channel

def test_oracle_is_the_recurrence():
    u, dt, B, C = torch.tensor([[1., 2., 3.]]), torch.tensor([[.5, .25, 1.]]), torch.tensor([2., 1., .5]), torch.ones(3)
    A = -0.7
    h, expected = 0.0, []
    for t in range(3):
        h = torch.exp(dt[0, t] * A) * h + dt[0, t] * B[t] * u[0, t]
        expected.append(h * C[t] + 0.3 * u[0, t])
    y, last = selective_scan_oracle(u[..., None].double(), dt[..., None].double(), torch.tensor([[A]]).double(),
                                    B[None, :, None].double(), C[None, :, None].double(), torch.tensor([.3]).double(),
                                    return_last_state=True)
    torch.testing.assert_close(y[0, :, 0], torch.stack(expected).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(last[0, 0, 0], h.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("W, dilation", [(1, 1), (4, 1), (3, 2)])
def test_conv_oracle_is_pytorchs_convolution(W, dilation):
    x = conv_inputs(2, 9, 3, W, dilation)
    padded = torch.cat((x["initial_state"], x["x"]), 1).transpose(1, 2)
    expected = F.conv1d(padded, x["weight"][:, None], x["bias"], groups=3, dilation=dilation).transpose(1, 2)
    y, final = causal_conv1d_oracle(**x, return_final_state=True, dilation=dilation)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, padded.transpose(1, 2)[:, 9:])


# -- the fast path against the oracle

SIZES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 15, 16, 17, 33, 50]), st.integers(1, 9), st.integers(1, 6))
AT = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=25, deadline=None)
@given(size=SIZES, at=AT, softplus=st.booleans(), dtype=DTYPES,
       absent=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])), seed=st.integers(0, 99))
def test_scan_equals_oracle(size, at, softplus, dtype, absent, seed):
    b, l = size[:2]
    x = scan_inputs(*size, absent, dtype, seed)
    if not softplus:
        x["delta"] = x["delta"].detach().abs().requires_grad_()
    options = dict(delta_softplus=softplus, reset=resets(b, l, at), return_last_state=True)
    assert_as_near_as_the_oracle(selective_scan, selective_scan_oracle, x, options)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), l=st.integers(1, 12), d=st.integers(1, 6), W=st.integers(1, 5), dilation=st.integers(1, 3),
       at=AT, silu=st.booleans(), absent=st.sets(st.sampled_from(["bias", "initial_state"])),
       dtype=DTYPES, seed=st.integers(0, 99))
def test_conv_equals_oracle(b, l, d, W, dilation, at, silu, absent, dtype, seed):
    x = conv_inputs(b, l, d, W, dilation, absent, dtype, seed)
    options = dict(activation="silu" if silu else None, reset=resets(b, l, [(r, t % 12) for r, t in at]),
                   return_final_state=True, dilation=dilation)
    assert_as_near_as_the_oracle(causal_conv1d, causal_conv1d_oracle, x, options)


@pytest.mark.parametrize("absent", [(), ("z",), ("D", "delta_bias", "initial_state")])
def test_plain_scan_changes_nothing_that_it_is_given(monkeypatch, absent):
    """Its products are in place, but in tensors of its own: what comes in may be another operator's as well."""
    monkeypatch.setattr(kernels, "COMPILE", False)
    x = {k: None if v is None else v.detach() for k, v in scan_inputs(2, 19, 32, 4, absent, torch.float32).items()}
    tensors = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    args = *tensors, True, x["initial_state"], None
    y, last, saved = kernels.run_scan_fwd(*args, True)
    given = [v for v in (torch.randn_like(y), torch.randn_like(last), *args, saved) if isinstance(v, torch.Tensor)]
    before = [v.clone() for v in given]
    kernels.run_scan_bwd(*given[:2], *args, saved)
    kernels.run_scan_fwd(*args, True)
    assert all(map(torch.equal, given, before))


def test_autocast_does_not_reach_into_the_plain_scan(monkeypatch):
    """Nor into its backward pass: its products of matrices stay as exact as what comes in."""
    monkeypatch.setattr(kernels, "COMPILE", False)

    def values():
        x = scan_inputs(2, 19, 32, 4, dtype=torch.float32)
        y, last = selective_scan(**x, delta_softplus=True, return_last_state=True)
        return [y, last, *grads((y, last), x)]

    exact = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, values(), exact))


def test_large_sizes_cross_tiles_and_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILE", False)
    monkeypatch.setattr(kernels, "TILE", 1024)
    assert len(kernels._tiles(3, 11, 300)) == 3 * 4  # rows and channels are cut
    x = scan_inputs(3, 70, 300, 11, dtype=torch.float32)
    exact = double(x)
    options = dict(delta_softplus=True, reset=resets(3, 70, [(0, 0), (0, 69), (1, 16), (1, 17), (2, 31)]),
                   return_last_state=True)
    ours, theirs = selective_scan(**x, **options), selective_scan_oracle(**exact, **options)
    assert_near(ours, theirs, 2e-6)
    assert_near(grads(ours, x), grads(theirs, exact), 2e-6)


def test_strides_are_honoured():
    gen = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 9, 30, generator=gen)
    u, delta, z, B, C = wide.split([8, 8, 8, 3, 3], dim=-1)
    args = dict(A=-torch.rand(3, 8, generator=gen).t(), D=torch.randn(16, generator=gen)[::2])
    y = selective_scan(u, delta, args["A"], B, C, args["D"], z, delta_softplus=True)
    packed = selective_scan(*(t.contiguous() for t in (u, delta, args["A"], B, C, args["D"], z)), delta_softplus=True)
    assert error(y, packed) < 1e-6
    weight = torch.randn(4, 8, generator=gen).t()
    assert error(causal_conv1d(u, weight), causal_conv1d(u.contiguous(), weight.contiguous())) < 1e-6


def test_softplus_is_accurate_where_steps_are_small():
    """delta near -16 gives steps near 1e-7, which exp(x) + 1 would lose."""
    raw = torch.linspace(-30, 30, 61)[None, :, None]
    one = torch.ones_like(raw)
    args = (torch.tensor([[-1e-9]]), one, one)
    y = selective_scan(one, raw, *args, delta_softplus=True, reset=torch.ones(1, 61, dtype=torch.bool))
    torch.testing.assert_close(y[0, :, 0].double(), F.softplus(raw[0, :, 0].double()), rtol=3e-7, atol=0)
    for t in (0, 14, 30, 60):
        state = torch.zeros(1, 1, 1)
        step = selective_scan_step(state, one[:, t], raw[:, t], *(a if a.dim() == 2 else a[:, t] for a in args),
                                   delta_softplus=True)
        torch.testing.assert_close(step.double(), F.softplus(raw[:, t].double()), rtol=3e-7, atol=0)


# -- native code made by Inductor

@pytest.fixture
def native(monkeypatch, two_threads):
    monkeypatch.setattr(kernels, "COMPILE", True)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    assert scan_bwd_code(torch.float32) and scan_bwd_code(torch.bfloat16), "needs a C++ compiler: g++ or clang"
    return kernels._compiled.cache_info().misses


def scan_bwd_code(dtype):
    return kernels._native(kernels.CHUNK_BWD, torch.device("cpu"), dtype, 2**30, 16, softplus=True, gated=True)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(b=st.integers(1, 3), l=st.sampled_from([1, 7, 8, 9, 16, 24, 37]), d=st.sampled_from([1, 5, 8, 13, 48]), at=AT,
       dtype=DTYPES, seed=st.integers(0, 99),
       absent=st.sets(st.sampled_from(["D", "delta_bias", "initial_state", "bias"])))
@example(b=1, l=24, d=64, at=[(0, 9)], dtype=torch.float32, seed=1, absent=set())  # one row: threads share its channels
@example(b=1, l=24, d=64, at=[(0, 9)], dtype=torch.bfloat16, seed=1, absent=set())
def test_native_code_equals_oracle(native, b, l, d, at, dtype, seed, absent):
    """One compilation for any batch, length and width; chunks that are short or hold a boundary run as plain torch."""
    assert kernels._groups(1, 64) == 2
    x = scan_inputs(b, l, d, 16, absent, dtype, seed)
    x["z"] = torch.cat((x["u"], x["z"]), -1).detach()[..., d:].requires_grad_()  # a half, as in_proj gives it
    options = dict(delta_softplus=True, reset=resets(b, l, at), return_last_state=True)
    assert_as_near_as_the_oracle(selective_scan, selective_scan_oracle, x, options)
    with torch.no_grad():  # keeps no states
        unsaved = selective_scan(**x, **options)
    assert all(map(torch.equal, unsaved, selective_scan(**x, **options)))
    x = conv_inputs(b, l, d, 4, 1, absent, dtype, seed)
    options = dict(activation="silu", reset=resets(b, l, at), return_final_state=True)
    assert_as_near_as_the_oracle(causal_conv1d, causal_conv1d_oracle, x, options)
    assert kernels._compiled.cache_info().misses - native <= 2 + 2 * 2  # in two types: scan forward, convolution


def test_chunks_after_the_first_go_straight_to_the_kernel(native, monkeypatch):
    """As long as Inductor's wrappers do nothing else that a chunk needs: those that do are called for each."""
    wrapper, made = scan_bwd_code(torch.float32).__func__.__globals__, []
    empty = wrapper["empty_strided_cpu"]
    monkeypatch.setitem(wrapper, "empty_strided_cpu", lambda *args: made.append(args[0]) or empty(*args))
    counts = []
    for chunks in (1, 4):
        y = selective_scan(**scan_inputs(2, chunks * kernels.CHUNK, 16, 16, (), torch.float32), delta_softplus=True)
        y.sum().backward()
        counts.append(len(made))
        made.clear()
    assert 0 < counts[0] == counts[1]

    class Wrapper:
        def call(self, args):
            made.append(sum(args))

    repeated = kernels._repeated(Wrapper().call)
    repeated((1, 2)), repeated((3, 4))
    assert made == [3, 7]


@pytest.mark.parametrize("name", ["z", "delta"])
def test_native_code_holds_far_from_zero(native, name):
    """Its powers of 2 work on a float's bits, which end at 2^127: gates and steps of any size, and their gradients."""
    x = scan_inputs(2, 16, 16, 16, (), torch.float32)
    x[name] = torch.linspace(-300, 300, 2 * 16 * 16).view(2, 16, 16).requires_grad_()
    options = dict(delta_softplus=True, return_last_state=True)
    assert_as_near_as_the_oracle(selective_scan, selective_scan_oracle, x, options)


def test_native_code_hides_nothing(native):
    x = scan_inputs(1, 16, 16, 16, (), torch.float32)
    for name in SCAN[:8]:
        bad = {k: v.detach().clone() for k, v in x.items()}
        bad[name].flatten()[-1] = torch.nan
        y, oracle = (f(**bad, delta_softplus=True) for f in (selective_scan, selective_scan_oracle))
        assert y.isnan().any() and torch.equal(y.isnan(), oracle.isnan()), name
    x = {k: v.detach() for k, v in x.items()}
    for grows in (x | {"A": 100 * x["A"].abs(), "delta_softplus": True}, x | {"delta": -300 * x["delta"].abs()},
                  x | {"delta": x["delta"].abs(), "delta_bias": torch.full((16,), -300.0)}):
        y, oracle = (f(**grows) for f in (selective_scan, selective_scan_oracle))
        assert not oracle.isfinite().all() and torch.equal(y.isfinite(), oracle.isfinite())


@pytest.mark.slow
def test_native_code_of_another_form(native):
    """No gate, no softplus, few states, no activation: each is a compilation of its own."""
    x = scan_inputs(2, 19, 10, 3, ("z",), torch.float32)
    x["delta"] = x["delta"].detach().abs().requires_grad_()
    options = dict(reset=resets(2, 19, [(1, 9)]), return_last_state=True)
    assert_as_near_as_the_oracle(selective_scan, selective_scan_oracle, x, options)
    for l in (2, 19):  # the state is longer, or shorter
        x = conv_inputs(2, l, 10, 4, dtype=torch.float32)
        assert_as_near_as_the_oracle(causal_conv1d, causal_conv1d_oracle, x, dict(return_final_state=True))


@pytest.mark.parametrize("kernel", [kernels.CHUNK_FWD, kernels.CHUNK_BWD, *kernels.TAPS, *cpu.NORM,
                                    *cpu.STREAM_NORM, *cpu.ADD_NORM, *cpu.HEAD_NORM,
                                    *cpu.GATED_NORM, *cpu.SQUARE, *cpu.SOFTMAX, *cpu.ROTATE,
                                    *cpu.WEIGH_ROWS])
def test_examples_have_no_number_twice(kernel):
    """Batch, length, width, number of states, and distances between rows that are free: the native code would take two
    equal ones for the same number for ever."""
    states = "T" in kernel[1]
    for n in range(2, 257 if states else 13):
        numbers = {}
        for i, form in enumerate(kernel[1].split()):
            x, shape = kernels._example(form, n, i), form.strip("~'")
            numbers |= {"b" if letter in "rs" else letter: size for letter, size in zip(shape, x.shape)
                        if letter not in "Ttnv"}
            free, key = (x.dim() - 2, i) if form.endswith("'") else (0, shape)
            if states and key == shape:
                free = 2 if shape[1:2] in ("T", "t") or len(shape) == 4 else 1 if shape[0] in "rs" else 0
            numbers |= {(key, dim): x.stride(dim) for dim in range(free)}
            assert x.stride(-1) == 1 and (shape[-1] != "v" or x.stride(-2) == kernels.VECTOR)
            assert x.dtype == (torch.bfloat16 if form.startswith("~") else torch.float32)
            assert list(x.stride()) == sorted(x.stride(), reverse=True)
        fixed = {n, kernels.CHUNK, kernels.VECTOR}
        assert len(set(numbers.values()) - fixed) == len(numbers), (n, numbers)


def test_native_code_is_vectors_throughout(tmp_path, monkeypatch):
    """No loop over the lanes of a vector: the operators for bits once were such loops, ten times as slow where the
    compiler prefers vectors of 256 bits."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert kernels._compiled.__wrapped__(*kernels.TAPS[0], 4, silu=True)
    code = "".join(path.read_text() for path in tmp_path.rglob("*.cpp"))
    assert "at::vec::cast<int32_t, float>" in code and "tmpbuf" not in code


def test_native_code_is_made_once_a_machine(tmp_path, monkeypatch):
    """The next process imports what was kept, a damaged file is made again."""
    def run():
        z, inverse, eps = torch.randn(2, 3, 10, 1, 16), torch.rand(3), torch.rand(3)
        y, expected, r = torch.empty_like(z), torch.empty_like(z), torch.empty(2, 3, 10)
        function, letters = cpu.NORM[0]
        with torch.device("meta"):  # what others set for their own tensors
            code = compiled(function, letters.replace("~", ""), 0)
        code([z, inverse, eps, y, r])
        function(z, inverse, eps, expected, r)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled, make, made = kernels._compiled.__wrapped__, kernels._inductor_code, []
    monkeypatch.setattr(kernels, "_inductor_code", lambda *args: made.append(args) or make(*args))
    run()
    run()
    assert len(made) == 1
    (kept,) = tmp_path.glob("hybrid/*.py")
    assert "cpp_fused" in kept.read_text()
    kept.write_text(kept.read_text()[:1000])
    run()
    run()
    assert len(made) == 2 and len(list((tmp_path / "hybrid").glob("*.*"))) == 1


def test_native_code_is_made_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Inductor's settings and rules are those of the process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    make, at_work, most = kernels._inductor_code, [], []

    def watched(*args):
        at_work.append(args)
        most.append(len(at_work))
        time.sleep(0.5)  # enough for the other to begin, if nothing holds it
        code = make(*args)
        at_work.remove(args)
        return code

    monkeypatch.setattr(kernels, "_inductor_code", watched)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda kernel: kernels._compiled.__wrapped__(*kernel, 0), cpu.SQUARE))
    assert most == [1, 1]


@pytest.mark.slow
def test_native_code_inside_a_compiled_graph(native):
    x = scan_inputs(2, 24, 8, 16, dtype=torch.float32)
    f = lambda x: selective_scan(**x, delta_softplus=True, return_last_state=True)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_near(grads(compiled(x), x), grads(f(x), x), 1e-6)


def test_without_a_compiler_the_plain_form_runs():
    def broken(x):
        raise RuntimeError("no compiler")

    from torch._inductor.lowering import lowerings
    usual = dict(lowerings)
    with pytest.warns(UserWarning, match="slower plain form runs .RuntimeError: no compiler"):
        assert kernels._compiled(broken, "cv", 1) is None
    assert lowerings == usual  # other people's code is not compiled with our polynomials


def test_that_there_is_no_compiler_is_said_once_and_before_a_function_is_traced():
    def traced(x):
        raise AssertionError("it was traced")

    from torch._inductor import config
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.warns(UserWarning) as said:
        assert [kernels._compiled(traced, "cv", n) for n in (1, 2)] == [None, None]
    assert len(said) == 1 and "no-such-compiler" in str(said[0].message)


# -- exact derivatives

def test_scan_gradcheck():
    x = scan_inputs(2, 5, 2, 2)
    reset = resets(2, 5, [(0, 0), (1, 3)])
    f = lambda *args: selective_scan(*args[:8], True, args[8], reset, True)  # noqa: E731
    assert torch.autograd.gradcheck(f, tuple(x.values()))
    x = tuple(v for v in scan_inputs(1, 3, 2, 1).values())
    f = lambda *args: selective_scan(*args[:8], True, args[8], reset[1:, 2:], True)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("W, dilation", [(1, 1), (3, 1), (2, 2)])
def test_conv_gradcheck(W, dilation):
    x = tuple(conv_inputs(2, 4, 2, W, dilation).values())
    reset = resets(2, 4, [(0, 0), (1, 2)])
    f = lambda *args: causal_conv1d(args[0], args[1], args[2], "silu", args[3], reset, True, dilation)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    f = lambda *args: causal_conv1d(*args, return_final_state=True, dilation=dilation)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, x[:2])


# -- state and reset

@settings(max_examples=20, deadline=None)
@given(cut=st.lists(st.integers(1, 19), max_size=3, unique=True), at=AT, seed=st.integers(0, 9))
def test_whole_equals_chunks_equals_steps(cut, at, seed):
    l = 20
    reset = resets(2, l, at)
    scan, conv = scan_inputs(2, l, 3, 2, seed=seed), conv_inputs(2, l, 3, 4, seed=seed)
    whole = [selective_scan(**scan, delta_softplus=True, reset=reset, return_last_state=True),
             causal_conv1d(**conv, activation="silu", reset=reset, return_final_state=True)]
    reference = [grads(whole[0], scan), grads(whole[1], conv)]
    bounds = [0, *sorted(cut), l]
    for edges in (bounds, range(l + 1)):
        ys, h, zs, taps = [], scan["initial_state"], [], conv["initial_state"]
        for i, j in itertools.pairwise(edges):
            part = {k: v[:, i:j] if k in ALONG_TIME else v for k, v in scan.items()}
            y, h = selective_scan(**(part | {"initial_state": h}), delta_softplus=True, reset=reset[:, i:j],
                                  return_last_state=True)
            ys.append(y)
            y, taps = causal_conv1d(conv["x"][:, i:j], conv["weight"], conv["bias"], "silu", taps, reset[:, i:j], True)
            zs.append(y)
        for (y, state), expected, inputs, exact in (((torch.cat(ys, 1), h), whole[0], scan, reference[0]),
                                                    ((torch.cat(zs, 1), taps), whole[1], conv, reference[1])):
            assert_near((y, state), expected, 1e-9)
            assert_near(grads((y, state), inputs), exact, 1e-9)
    with torch.no_grad():  # in place
        h, taps = scan["initial_state"].clone(), conv["initial_state"].clone()
        for t in range(l):
            s = {k: v[:, t] if k in ALONG_TIME else v for k, v in scan.items() if k != "initial_state"}
            y = selective_scan_step(h, **s, delta_softplus=True, reset=reset[:, t])
            assert error(y, whole[0][0][:, t]) < 1e-9
            y = causal_conv1d_step(taps, conv["x"][:, t], conv["weight"], conv["bias"], "silu", reset[:, t])
            assert error(y, whole[1][0][:, t]) < 1e-9
    assert error(h, whole[0][1]) < 1e-9 and error(taps, whole[1][1]) < 1e-9


@settings(max_examples=30, deadline=None)
@given(dtypes=st.lists(DTYPES, min_size=6, max_size=6))
def test_steps_are_as_exact_as_what_they_are_given(dtypes):
    """Of whatever types: the sums are in float32, and only what is kept or returned is rounded."""
    x = {k: v.detach() for k, v in scan_inputs(2, 1, 5, 3, dtype=torch.float32).items()}
    state = x.pop("initial_state").to(dtypes[0])
    x |= {k: x[k].to(dtype) for k, dtype in zip(("u", "delta", "B", "C", "z"), dtypes[1:])}
    exact = {k: v.double() for k, v in x.items()}
    y, last = selective_scan_oracle(**exact, initial_state=state.double(), delta_softplus=True, return_last_state=True)
    step = selective_scan_step(state, **{k: v[:, 0] if k in ALONG_TIME else v for k, v in x.items()},
                               delta_softplus=True)
    assert (step.dtype, state.dtype) == (x["u"].dtype, dtypes[0])
    for got, expected in ((step, y[:, 0]), (state, last)):
        assert error(got.double(), expected) < 4 * torch.finfo(got.dtype).eps


def test_steps_keep_no_graph():
    weight, state = torch.ones(3, 4, requires_grad=True), torch.zeros(2, 3, 3)
    assert not causal_conv1d_step(state, torch.ones(2, 3), weight).requires_grad and not state.requires_grad
    state, x, A, B = torch.zeros(2, 3, 4), torch.ones(2, 3), -torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    assert not selective_scan_step(state, x, x, A.detach().requires_grad_(), B, B).requires_grad
    assert not state.requires_grad and (state == 1).all()


def test_a_reset_shuts_out_even_an_infinite_past():
    x = scan_inputs(1, 6, 2, 2, dtype=torch.float32)
    dirty = x | {"initial_state": torch.full((1, 2, 2), torch.inf, requires_grad=True)}
    reset = resets(1, 6, [(0, 0)])
    clean = selective_scan(**(x | {"initial_state": None}), delta_softplus=True)
    y = selective_scan(**dirty, delta_softplus=True, reset=reset)
    assert torch.equal(y, clean)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(dirty.values())))
    reset[0, 3] = True
    y = selective_scan(**x, delta_softplus=True, reset=reset)
    dy = torch.ones(1, 6, 2).index_fill(1, torch.tensor(4), torch.inf)
    for name, g in zip(x, torch.autograd.grad(y, list(x.values()), dy)):  # nor do gradients reach what was before
        assert name not in ALONG_TIME or (g[:, :3].isfinite().all() and not g.isfinite().all())
    reset[0, 3] = False
    conv = [x["u"], torch.ones(2, 4, requires_grad=True), torch.full((1, 3, 2), torch.nan, requires_grad=True)]
    y, final = causal_conv1d(*conv[:2], initial_state=conv[2], reset=reset, return_final_state=True)
    assert y.isfinite().all() and final.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + final.sum(), conv))


# -- what torch.library and torch.compile see

def op_arguments(absent=()):
    x = scan_inputs(2, 7, 3, 2, absent, torch.float32)
    reset = resets(2, 7, [(0, 2)])
    forward = (*(x[k] for k in SCAN[:8]), True, x["initial_state"], reset, True)
    with torch.no_grad():
        y, last, saved = scan_fwd(*forward)
    backward = (torch.randn_like(y), torch.randn_like(last), *forward[:-1], saved)
    c = conv_inputs(2, 7, 3, 4, 1, absent, torch.float32)
    conv = (c["x"], c["weight"], c["bias"], True, c["initial_state"], reset, 1)
    with torch.no_grad():
        y, final = conv_fwd(*conv)
    return [(scan_fwd, forward), (scan_bwd, backward), (conv_fwd, conv),
            (conv_bwd, (torch.randn_like(y), torch.randn_like(final), *conv))]


@pytest.mark.parametrize("absent", [
    pytest.param((), id="all"),
    pytest.param(("D", "z", "delta_bias", "initial_state", "bias"), id="bare", marks=pytest.mark.slow)])
def test_opcheck(absent):
    for op, args in op_arguments(absent):
        result = torch.library.opcheck(op, args)
        assert set(result.values()) == {"SUCCESS"}


def test_fakes_have_the_real_strides_of_what_lies_time_first():
    """opcheck compares those of what is contiguous."""
    for op, args in op_arguments():
        args = [a.detach().transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, torch.Tensor) and a.dim() == 3
                else a for a in args]
        meta = [a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        with torch.no_grad():
            real, fake = op(*args), op(*meta)
        for a, b in zip(real, fake):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_fakes_on_a_gpu_that_need_not_be_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op, args in op_arguments():
        real = op(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
        with FakeTensorMode():
            fake = op(*(torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
                        if isinstance(a, torch.Tensor) else a for a in args))
        if op is scan_fwd and "triton" in kernels.IMPLEMENTATIONS:  # keeps states alone, every SEGMENT positions
            real = *real[:2], real[2].new_empty(1, 2 * 3 * 2)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride(), "cuda") == (b.shape, b.dtype, b.stride(), b.device.type)


def test_compiled_fullgraph_has_equal_gradients():
    def f(x, c, reset):
        y, h = selective_scan(**x, delta_softplus=True, reset=reset, return_last_state=True)
        v, taps = causal_conv1d(**c, activation="silu", reset=reset, return_final_state=True)
        return y, h, v, taps

    x, c = scan_inputs(2, 9, 3, 2), conv_inputs(2, 9, 3, 4)
    reset = resets(2, 9, [(1, 4)])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    both = {**x, **{f"conv_{k}": v for k, v in c.items()}}
    assert_near(grads(compiled(x, c, reset), both), grads(f(x, c, reset), both), 1e-12)


def test_the_environment_forces_a_path(monkeypatch):
    x = scan_inputs(1, 4, 2, 2)
    calls = []
    monkeypatch.setattr(kernels, "selective_scan_oracle", lambda *a: calls.append(a) or (a[0], a[0]))
    monkeypatch.setenv("KERNELS", "oracle")
    selective_scan(**x)
    assert len(calls) == 1
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(ValueError, match="torch, triton or oracle"):
        selective_scan(**x)
    monkeypatch.setenv("KERNELS", "triton")
    with pytest.raises(RuntimeError, match="KERNELS=triton"):
        selective_scan(**x)


def test_shapes_are_checked():
    x = scan_inputs(2, 4, 3, 2)
    with pytest.raises(ValueError, match=r"selective_scan: B has shape \(2, 3, 2\), expected .* = \(2, 4, 2\)"):
        selective_scan(**(x | {"B": x["B"][:, :3]}))
    with pytest.raises(ValueError, match="causal_conv1d: initial_state"):
        causal_conv1d(x["u"], torch.ones(3, 4), initial_state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x["u"], torch.ones(3, 4), activation="gelu")
    for name, other, said in (("u", torch.int64, "a float"), ("A", torch.complex64, "a float")):
        with pytest.raises(TypeError, match=f"selective_scan: {name} is {other}, expected {said}"):
            selective_scan(**(x | {name: x[name].to(other)}))
    for mask in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 4)):
        with pytest.raises(TypeError, match=r"selective_scan: reset is torch\.\w+, expected bool"):
            selective_scan(**x, reset=mask)
        with pytest.raises(TypeError, match="causal_conv1d: reset"):
            causal_conv1d(x["u"], torch.ones(3, 4), reset=mask)


def test_nothing_is_broadcast_or_cut_to_fit_in_steps_and_wrappers():
    r = torch.randn
    step = dict(state=r(2, 4, 3), u=r(2, 4), delta=r(2, 4), A=-torch.ones(4, 3), B=r(2, 3), C=r(2, 3))
    update = dict(state=r(2, 2, 4, 3), x=r(2, 2, 4), dt=r(2, 2, 4), A=-torch.ones(2, 4, 3), B=r(2, 2, 3), C=r(2, 2, 3))
    conv = dict(state=r(1, 3, 4), x=r(1, 4), weight=r(4, 4))
    ring = dict(x=r(2, 4), conv_state=r(2, 4, 3), weight=r(4, 4), cache_seqlens=torch.zeros(2, dtype=torch.int32))
    scan = dict(u=r(2, 4, 5), delta=r(2, 4, 5), A=-torch.ones(4, 3), B=r(2, 3, 5), C=r(2, 3, 5))
    for function, right, wrong in (
            (selective_scan_step, step, dict(delta=r(2, 1), A=-torch.ones(1, 3), B=r(2, 1), D=r(1), z=r(1, 4))),
            (causal_conv1d_step, conv, dict(weight=r(4, 1), x=r(1, 1), bias=r(1))),
            (causal_conv1d_update, ring, dict(conv_state=r(2, 4, 1), x=r(1, 4), weight=r(3, 4))),
            (selective_scan_fn, scan, dict(delta=r(2, 8, 5), A=-torch.ones(7, 3), D=r(9), z=r(2, 5, 5))),
            (selective_state_update, update, dict(dt=r(2, 4, 2), z=r(2, 2, 5), D=r(3, 4), A=-torch.ones(3, 4, 3),
                                                  C=r(2, 3, 3), dt_bias=r(4, 2), x=r(2, 4, 2)))):
        function(**right)
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=r"has shape .*, expected \("):
                function(**right | {name: value})


# -- the drop-in signatures, against einsum forms written from the packages' documentation

def scan_by_einsum(u, delta, A, B, C, D, z, bias, groups):
    """(b, d, l) layout; B and C (b, groups, n, l)"""
    dt = F.softplus(delta + bias[:, None])
    repeat = u.shape[1] // groups
    B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)  # (b, d, n, l)
    h, ys = torch.zeros(u.shape[0], u.shape[1], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", dt[..., t], A))
        h = decay * h + torch.einsum("bd,bdn->bdn", (dt * u)[..., t], B[..., t])
        ys.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    return (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z), h


@pytest.mark.parametrize("form", ["variable", "groups", "constant"])
def test_selective_scan_fn(form):
    gen = torch.Generator().manual_seed(0)
    b, d, l, n, groups = 2, 4, 7, 3, {"variable": 1, "groups": 2, "constant": 4}[form]
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    u, delta, z, A, D, bias = rand(b, d, l), rand(b, d, l), rand(b, d, l), -rand(d, n).exp(), rand(d), rand(d)
    B, C = {"variable": lambda: (rand(b, n, l), rand(b, n, l)), "groups": lambda: (rand(b, 2, n, l), rand(b, 2, n, l)),
            "constant": lambda: (rand(d, n), rand(d, n))}[form]()
    full = {"variable": lambda m: m[:, None], "groups": lambda m: m,
            "constant": lambda m: m[None, :, :, None].expand(b, d, n, l)}[form]
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, return_last_state=True)
    expected = scan_by_einsum(u, delta, A, full(B), full(C), D, z, bias, groups)
    assert_near((y, last), expected, 1e-12)
    with pytest.raises(TypeError, match=r"A is torch\.complex128; it must be real"):
        selective_scan_fn(u, delta, A.to(torch.complex128), B, C)


def test_gradients_of_what_groups_share_are_summed_exactly():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen).bfloat16()  # noqa: E731
    u, delta, A, B, C = rand(2, 256, 16), rand(2, 256, 16), -rand(256, 4).exp(), rand(256, 4), rand(2, 4, 16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        x = [t.to(dtype).requires_grad_() for t in (u, delta, A, B, C)]
        grads.append(torch.autograd.grad(selective_scan_fn(*x, delta_softplus=True).double().sum(), x[-1])[0].double())
    assert (grads[0] - grads[1]).norm() < 4e-3 * grads[1].norm()


def test_causal_conv1d_fn_with_seq_idx():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 12, generator=gen, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, generator=gen).double(), torch.randn(3, generator=gen).double()
    seq_idx = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3], dtype=torch.int32)
    y = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    for part in (slice(0, 5), slice(5, 9)):
        expected = F.silu(F.conv1d(F.pad(x[..., part], (3, 0)), weight[:, None], bias, groups=3))
        torch.testing.assert_close(y[..., part], expected)
    assert (y[..., 9:] == 0).all()


def test_updates_continue_what_the_sequence_forms_leave():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    x, weight, bias = rand(2, 3, 9), rand(3, 4), rand(3)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    _, state = causal_conv1d_fn(x[..., :5], weight, bias, return_final_states=True, activation="silu")
    rest = causal_conv1d_fn(x[..., 5:], weight, bias, initial_states=state, activation="silu")
    torch.testing.assert_close(rest, whole[..., 5:])
    state = state.contiguous()
    for t in range(5, 9):
        torch.testing.assert_close(causal_conv1d_update(x[..., t], state, weight, bias, "silu"), whole[..., t])
    u, delta, z, A = rand(2, 3, 9), rand(2, 3, 9), rand(2, 3, 9), -rand(3, 2).exp()
    B, C, D, dt_bias = rand(2, 2, 9), rand(2, 2, 9), rand(3), rand(3)
    whole = selective_scan_fn(u, delta, A, B, C, D, z, dt_bias, True)
    _, h = selective_scan_fn(u[..., :5], delta[..., :5], A, B[..., :5], C[..., :5], D, z[..., :5], dt_bias, True, True)
    h = h.contiguous()
    for t in range(5, 9):
        y = selective_state_update(h, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], dt_bias, True)
        torch.testing.assert_close(y, whole[..., t])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("l, k", [(None, 3), (None, 6), (2, 3), (2, 6), (7, 3), (7, 6)])
def test_conv_updates_against_lists_of_past_inputs(l, k, ring):
    """One position (b, d) or l of them; conv_state as long as W-1 or longer, shifted or a ring."""
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    weight, bias, state, seen = rand(2, 4), rand(2), rand(3, 2, k), torch.tensor([0, 4, 11], dtype=torch.int32)

    def oldest_first(row):  # in a ring the oldest is where the next one goes
        return state[row].roll(-int(seen[row]) if ring else 0, 1)

    past = [list(oldest_first(row).unbind(1)) for row in range(3)]
    for _ in range(3):
        x = rand(3, 2, *([l] if l else []))
        y = causal_conv1d_update(x, state, weight, bias, "silu", seen if ring else None)
        assert y.shape == x.shape
        seen += l or 1
        for row in range(3):
            for x_t, y_t in zip(x[row].view(2, -1).unbind(1), y[row].view(2, -1).unbind(1)):
                past[row].append(x_t)
                expected = F.silu(bias + sum(weight[:, w] * past[row][w - 4] for w in range(4)))
                torch.testing.assert_close(y_t, expected)
            assert torch.equal(oldest_first(row), torch.stack(past[row][-k:], 1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_state_update_of_heads_by_einsum(groups):
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    state, x, dt, z = rand(2, 4, 3, 5), rand(2, 4, 3), rand(2, 4, 3), rand(2, 4, 3)
    A, B, C, D, bias = -rand(4, 3, 5).exp(), rand(2, groups, 5), rand(2, groups, 5), rand(4, 3), rand(4, 3)
    step, (B_h, C_h) = F.softplus(dt + bias), (m.repeat_interleave(4 // groups, 1) for m in (B, C))
    h = torch.exp(step[..., None] * A) * state + torch.einsum("bhd,bhn->bhdn", step * x, B_h)
    y = (torch.einsum("bhdn,bhn->bhd", h, C_h) + D * x) * F.silu(z)
    assert_near((selective_state_update(state, x, dt, A, B, C, D, z, bias, True), state), (y, h), 1e-12)


def test_updates_skip_the_padding_of_a_batch_and_keep_no_graph():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    index, live = torch.tensor([2, -1, 0], dtype=torch.int32), [0, 2]
    x, dt, A, B, C, weight = rand(3, 4), rand(3, 4), -rand(4, 2).exp(), rand(3, 2), rand(3, 2), rand(4, 4)
    x[1] = float("nan")  # padding may hold anything
    conv, ssm = rand(5, 4, 3), rand(5, 4, 2)
    conv_rows, ssm_rows = conv[[2, 0]], ssm[[2, 0]]
    conv_expected, ssm_expected = conv.clone(), ssm.clone()
    expected = (causal_conv1d_update(x[live], conv_rows, weight),
                selective_state_update(ssm_rows, x[live], dt[live], A, B[live], C[live]))
    conv_expected[[2, 0]], ssm_expected[[2, 0]] = conv_rows, ssm_rows
    A.requires_grad_(), weight.requires_grad_()
    ys = (causal_conv1d_update(x, conv, weight, conv_state_indices=index),
          selective_state_update(ssm, x, dt, A, B, C, state_batch_indices=index))
    for y, y_live in zip(ys, expected, strict=True):
        assert (y[1] == 0).all()
        torch.testing.assert_close(y[live], y_live)
    assert torch.equal(conv, conv_expected) and torch.equal(ssm, ssm_expected)
    assert not conv.requires_grad and not ssm.requires_grad
    with pytest.raises(ValueError, match="2 groups of B and C"):
        selective_state_update(rand(1, 3, 4, 2), rand(1, 3, 4), rand(1, 3, 4), -rand(3, 4, 2).exp(), rand(1, 2, 2),
                               rand(1, 2, 2))


def test_the_conv_wrappers_write_only_what_upstream_writes():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    x, weight, out = rand(2, 3, 9), rand(3, 4), torch.zeros(2, 3, 3)
    causal_conv1d_fn(x, weight, final_states_out=out)
    assert (out == 0).all()
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, x[..., -3:])
