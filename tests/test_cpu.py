"""What cpu.py does in place of model.py's own lines, against float64: the same numbers, and every gradient."""

import copy
import math
import warnings

import pytest
import torch
from test_model import V, close, make

import kernels
from cpu import NativeAttention, NativeStreamNorm, NativeUnits
from model import GPT, FeedForward, GPTConfig, RMSNorm, add_norm, attend, map_state
from sample import decoder


def two_blocks(mixer, x, dy, bfloat16, reset=None):
    """Outputs of two blocks, the state carried from one to the other and a boundary in the second; the last state; and
    the gradients of a loss on all of them."""
    inputs, T = x.to(next(mixer.parameters()).dtype).requires_grad_(), x.shape[1] // 2
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y1, state = mixer(inputs[:, :T], None, None)
        other_strides = map_state(lambda t: t.detach().mT.contiguous().mT, state)
        y2, state = mixer(inputs[:, T:], other_strides, reset)
    state = [s for s in state if s.is_floating_point()]
    loss = (torch.cat((y1, y2), 1).double() * dy).sum() + sum(s.double().square().sum() for s in state)
    learned = [p for p in mixer.parameters() if p.numel()]
    return [y1, y2, *state, *torch.autograd.grad(loss, [inputs, *learned])]


@pytest.mark.parametrize("bias", [False, True])
def test_products_by_onednn_are_those_of_float64(monkeypatch, bias):
    """Errors are at most twice those of PyTorch's own products; both on any CPU, whichever is faster."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=128, block_size=256, n_embd=[64, 64, 64, 128], bias=bias, fractal_level_drop=0,
                          fractal_drop=0, attention_type=["standard", "mamba", "fractal", "standard"]))
    idx, conv2d, convolutions = torch.randint(128, (8, 257)), torch.nn.functional.conv2d, []
    monkeypatch.setattr(kernels, "COMPILE", False)
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: convolutions.append(args) or conv2d(*args))

    def run(model, by_onednn):
        monkeypatch.setattr("cpu.onednn_is_faster", lambda: by_onednn)
        _, loss, _ = model(idx[:, :-1], idx[:, 1:])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    with warnings.catch_warnings(action="ignore"):
        plain, ours, true = run(model, False), run(model, True), run(copy.deepcopy(model).double(), True)
    assert len(convolutions) == 17  # of run(model, True), of large weights
    for a, b, c in zip(plain, ours, true):
        assert (b - c).norm() <= 2 * (a - c).norm() + 1e-6 * c.norm()


def test_rms_norm_is_its_formula():
    norm = RMSNorm(7, 1e-3).double()
    x = torch.randn(2, 5, 7, dtype=torch.double, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    close(norm(x), expected, 1e-12)
    with torch.no_grad():
        close(norm(x), expected, 1e-12)
    dy = torch.randn_like(x).transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(torch.autograd.grad(norm(x), (x, norm.weight), dy),
                    torch.autograd.grad(expected, (x, norm.weight), dy)):
        close(a, b, 1e-12)
    assert norm(torch.zeros(1, 7)).abs().max() == 0
    with warnings.catch_warnings(action="error"):
        half = norm.float()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), norm.double()(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("C", [48, 40])  # the latter fills no vectors
def test_a_sum_and_its_norm_are_their_formula(monkeypatch, two_threads, dtype, tolerance, C):
    """By native code: both outputs, with gradients through both, one or none of the two."""
    monkeypatch.setattr(kernels, "COMPILE", True)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    applied, apply = [], NativeStreamNorm.apply
    monkeypatch.setattr(NativeStreamNorm, "apply", lambda *args: applied.append(args) or apply(*args))
    norm = RMSNorm(C, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x, y = torch.randn(9, 3, C).transpose(0, 1).requires_grad_(), torch.randn(3, 9, C).to(dtype).requires_grad_()
    dsum, dn = torch.randn(3, 9, C), torch.randn(9, 3, C).to(dtype).transpose(0, 1)

    def formula(x, y):
        total = x.double() + y.double()
        return total, total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = add_norm(norm, x, y)
        _, alone = add_norm(norm, x)
        with torch.no_grad():
            assert torch.equal(add_norm(norm, x)[1], alone)
    assert len(applied) == (3 if C == 48 else 0) and got[0].dtype == torch.float32
    expected, inputs = formula(x, y), (x, y, norm.weight)
    alone_too = formula(x, torch.zeros(()))[1]
    pairs = [*zip(got, expected), (alone, alone_too), *zip(*(
        torch.autograd.grad((n.double() * dn).sum(), (x, norm.weight)) for n in (alone, alone_too)))]
    for some in (0, 1), (0,), (1,):
        grads = [torch.autograd.grad(sum((outs[i].double() * (dsum, dn)[i]).sum() for i in some), inputs,
                                     retain_graph=True, allow_unused=True, materialize_grads=True)
                 for outs in (got, expected)]
        pairs += zip(*grads)
    for actual, reference in pairs:
        assert (actual.double() - reference).norm() <= tolerance * reference.norm()


@torch.no_grad()
def test_norms_of_ones_own_are_called(monkeypatch):
    """Of any class: one without a weight, and one derived from ours, which native code and decoders know."""
    class Shifted(RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(kernels, "COMPILE", True)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    model, idx = GPT(GPTConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=1)).eval(), torch.randint(V, (2, 9))
    x = torch.randn(2, 9, 32)
    for norm in (torch.nn.Tanh(), Shifted(32, 1e-5)):
        model.ln_f = model.h[0].ln_1 = model.h[0].ln_2 = norm
        assert torch.equal(add_norm(norm, x)[1], norm(x))
        close(decoder(model, model(idx[:, :8])[2])(idx[:, 8:]), model(idx)[0][:, 8], 1e-5)
    mixer = model.h[0].mixer
    mixer.q_norm = mixer.k_norm = Shifted(32, 1e-5)
    close(mixer(x, None, None)[0], copy.deepcopy(mixer).double()(x.double(), None, None)[0], 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("T, S", [(8, 8), (8, 13), (130, 150), (520, 520)])
def test_attention_agrees_with_softmax_in_float64(T, S, dtype, tolerance):
    """Its own products in bfloat16, in short blocks and with gradients, else the fused kernel; the causal triangle, and
    a mask a row that shows a query one key at least."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=gen).to(dtype).requires_grad_() for n in (T, S, S))
    seen = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    if S > T:
        seen = torch.rand(2, 1, T, S, generator=gen) < 0.5
        seen[..., -1] = True
    mask = None if S == T else seen
    y = attend(q, k, v, mask, 0.0)
    with torch.no_grad():
        evaluated = attend(q, k, v, mask, 0.0)
    scores = (q.double() @ k.double().transpose(2, 3) / 4).masked_fill(~seen, -math.inf)
    expected = scores.softmax(-1) @ v.double()
    dy = torch.randn(y.shape, generator=gen).to(dtype)
    pairs = zip((evaluated, y, *torch.autograd.grad(y, (q, k, v), dy)),
                (expected, expected, *torch.autograd.grad(expected, (q, k, v), dy.double())))
    for actual, reference in pairs:
        assert (actual.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("keys", [{}, dict(qk_norm=True), dict(position="learned"), dict(window=20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_attention_is_softmax_in_float64(monkeypatch, two_threads, dtype, keys):
    """Two blocks with the state carried, of lengths that fill no vector, a document starting in one: outputs and every
    gradient. In bfloat16 native code rounds no further from float64 than torch's operations."""
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    exact = make("standard", n_embd=96, n_head=3, **{"window": 12} | keys).h[0].mixer
    rounded, T = copy.deepcopy(exact).to(torch.float32), 9
    x, dy = (torch.randn(3, 2 * T, 96) for _ in range(2))
    reset = torch.zeros(3, T, dtype=torch.bool)
    reset[1, 4] = True
    runs, applied, apply = [], [], NativeAttention.apply
    monkeypatch.setattr(NativeAttention, "apply", lambda *args: applied.append(args) or apply(*args))
    for mixer, native in ((exact, False), (rounded, False), (rounded, True)):
        monkeypatch.setattr(kernels, "COMPILE", native)
        runs.append(two_blocks(mixer, x, dy, dtype == torch.bfloat16 and mixer is rounded, reset))
        assert len(applied) == 2 * native
    for real, plain, native in zip(*runs):
        error, other = (((r.double() - real).norm() / real.norm()).item() for r in (native, plain))
        assert error <= (2e-6 if dtype == torch.float32 else 1.2 * other + 1e-3)


def test_dropout_of_attention_has_the_gradients_of_the_weights_it_kept():
    q, k = (torch.randn(2, 3, 8, 8).bfloat16().requires_grad_() for _ in range(2))
    v = torch.eye(8).bfloat16().expand(2, 3, 8, 8).contiguous().requires_grad_()  # y: the weights kept
    y = attend(q, k, v, None, 0.25)
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    weights = (q.double() @ k.double().transpose(2, 3) / math.sqrt(8)).masked_fill(hidden, -math.inf).softmax(-1)
    kept = y.detach() != 0
    assert 0.6 < kept[..., ~hidden].float().mean() < 0.9
    expected = weights * kept / 0.75 @ v.double()
    dy = torch.randn(y.shape).bfloat16()
    pairs = zip((y, *torch.autograd.grad(y, (q, k, v), dy)),
                (expected, *torch.autograd.grad(expected, (q, k, v), dy.double())))
    for actual, reference in pairs:
        assert (actual.double() - reference).norm() <= 0.01 * reference.norm()


@pytest.mark.parametrize("dtype, kernel, T", [(torch.float32, 4, 21), (torch.float32, 1, 9), (torch.bfloat16, 4, 16)])
def test_native_units_are_the_definition(monkeypatch, two_threads, dtype, kernel, T):
    """By native code as by torch's operations: outputs, states carried over and every gradient, through a state's end,
    too. In bfloat16 both round, and no further from float64 than one another."""
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    exact = make("fractal", n_embd=48, fractal_dims=[[40, 24, 32, 56]] * 2, fractal_depths=[[3, 1, 3, 2]] * 2,
                 fractal_count=4, fractal_kernel=kernel, fractal_drop=0.0, fractal_level_drop=0.0).h[0].mixer
    block = copy.deepcopy(exact).to(torch.float32)
    x, dy = (torch.randn(3, 2 * T, 48) for _ in range(2))
    runs, applied, apply = [], [], NativeUnits.apply
    monkeypatch.setattr(NativeUnits, "apply", lambda *args: applied.append(args) or apply(*args))
    for mixer, native in ((exact, False), (block, False), (block, True)):
        monkeypatch.setattr(kernels, "COMPILE", native)
        runs.append(two_blocks(mixer, x, dy, dtype == torch.bfloat16 and mixer is block))
        assert bool(applied) == native
    for real, plain, native in zip(*runs):
        error, other = (((r.double() - real).norm() / (real.norm() + 1e-9)).item() for r in (native, plain))
        assert error <= (1e-5 if dtype == torch.float32 else 1.2 * other + 1e-3)


@pytest.mark.parametrize("kind, keys", [("standard", dict(n_head=1, window=8)),
                                        ("fractal", dict(fractal_drop=0.0, fractal_level_drop=0.0))])
def test_native_code_leaves_states_with_gradients_alone(monkeypatch, kind, keys):
    """What one block does to the next is differentiated by torch's operations, where native code has no formula."""
    monkeypatch.setattr(kernels, "COMPILE", True)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    exact, grads = make(kind, n_embd=32, **keys).h[0].mixer, []
    for mixer in (exact, copy.deepcopy(exact).to(torch.float32)):
        x = torch.linspace(-1, 1, 2 * 16 * 32, dtype=next(mixer.parameters()).dtype).view(2, 16, 32).sin()
        _, state = mixer(x.requires_grad_()[:, :8], None, None)
        y, _ = mixer(x[:, 8:], state, None)
        grads += torch.autograd.grad(y.square().sum(), x)
    close(grads[1].double(), grads[0], 1e-5)
    assert grads[0][:, 5:8].abs().min() > 0


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_squared_relu_keeps_one_tensor_of_its_width(monkeypatch, two_threads, dtype, tolerance, native):
    monkeypatch.setattr(kernels, "COMPILE", native)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    ffn = FeedForward(GPTConfig(vocab_size=V, n_embd=8), 0).to(torch.promote_types(dtype, torch.float32))
    w, v = ffn.c_fc.weight, ffn.c_proj.weight
    x, kept = torch.randn(5, 7, 8, dtype=w.dtype, requires_grad=True), {}
    dy = torch.randn(5, 7, 8).to(dtype)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = ffn(x)
        with torch.no_grad():
            evaluated = ffn(x)
    assert sum(t.numel() == 5 * 7 * 32 for t in kept.values()) == 1
    expected = torch.relu(x.double() @ w.double().T).square() @ v.double().T
    pairs = zip((evaluated, y, *torch.autograd.grad(y, (x, w, v), dy)),
                (expected, expected, *torch.autograd.grad(expected, (x, w, v), dy.double())))
    for actual, reference in pairs:
        assert (actual - reference).norm() <= tolerance * reference.norm()
