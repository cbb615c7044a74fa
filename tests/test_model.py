"""The laws of DESIGN: whole == chunked == token by token, a row with resets == its documents alone, no future leaks;
and the reference models of transformers, weights mapped one to one."""

import contextlib
import itertools
import math
import random
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.utils import parametrize

import sample
from model import (
    GPT,
    GPTConfig,
    NGramEmbedding,
    cross_entropy,
    feed_forward_width,
    map_state,
    replace_some,
    rotary_table,
    rotate,
)
from sample import decoder

V = 23
MIXERS = {
    "standard": dict(attention_type=["standard"] * 2, n_embd=16, n_head=2, window=5),
    "mamba": dict(attention_type=["mamba"] * 2, n_embd=12, d_state=3),
    "fractal": dict(attention_type=["fractal"] * 2, n_embd=12, fractal_dim_range=[8, 24], fractal_count=3),
    "hybrid": dict(attention_type=["mamba", "fractal", "standard", "mamba"], n_embd=[16, 12, 8, 16], n_head=2, window=4,
                   fractal_dim_range=[8, 16], fractal_count=2, d_state=2, skip_connections=True),
    "n-grams": dict(attention_type=["standard", "fractal"], n_embd=[16, 8], n_head=2, window=5, qk_norm=True,
                    fractal_dim_range=[8, 16], fractal_count=2, ngram_orders=[4, 2], ngram_rows=50),
}


def make(kind="hybrid", seed=0, **kw):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, block_size=8, **(MIXERS[kind] | kw))).double()
    with torch.no_grad():  # away from the near-identity initialisation, where errors would hide
        for name, p in model.named_parameters():
            if "A_log" not in name:
                p += 0.1 * torch.randn_like(p)
    return model


def close(a, b, tol=1e-9):
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max().item())


def run_chunks(model, idx, sizes, reset=None, state=None, seed=None):
    logits, t = [], 0
    for n in sizes:
        if seed is not None:
            torch.manual_seed(seed)  # a call's probabilistic draws depend on the batch alone: make them equal
        out, _, state = model(idx[:, t:t + n], state=state, reset=None if reset is None else reset[:, t:t + n])
        logits.append(out)
        t += n
    return torch.cat(logits, 1), state


def tensors(state):
    found = []
    map_state(found.append, state)
    return found


def close_states(model, a, b):
    assert all(a[key].equal(b[key]) for key in a if key != "layers")
    for block, x, y in zip(model.h, a["layers"], b["layers"]):
        if block.kind == "standard":  # slots that are not valid hold anything
            assert x[2].equal(y[2])
            x, y = ([t * s[2][:, None, :, None] for t in s[:2]] for s in (x, y))
        for t, u in zip(x, y):
            close(t, u)


def grads_of(model, logits, state):
    """Gradients of a loss on every logit and on every floating tensor of the returned state."""
    gen = torch.Generator().manual_seed(5)
    terms = [(logits * torch.randn(logits.shape, generator=gen, dtype=logits.dtype)).sum()]
    for layer, block in zip(state["layers"], model.h):
        for t in layer:
            if t.is_floating_point() and t.requires_grad:
                if block.kind == "standard":  # slots that are not valid hold anything
                    t = t * layer[2][:, None, :, None]
                terms.append((t * torch.randn(t.shape, generator=gen, dtype=t.dtype)).sum())
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(sum(terms), trained, allow_unused=True)


@st.composite
def rows(draw):
    T = draw(st.integers(1, 10))
    sizes, left = [], T
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    resets = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, T - 1)), max_size=4))
    return T, sizes, resets


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=4, deadline=None)
@given(case=rows(), explicit=st.booleans(), seed=st.integers(0, 3))
def test_whole_equals_chunks_equals_steps(kind, training, case, explicit, seed):
    T, sizes, resets = case
    model = make(kind, seed).train(training)
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
    reset = torch.zeros(2, T, dtype=torch.bool)
    for row, t in resets:
        reset[row, t] = True
    draws = 7 if training else None
    whole, state = run_chunks(model, idx, [T], reset, seed=draws)
    reference = grads_of(model, whole, state)
    for split in (sizes, [1] * T):
        start = model.initial_state(2) if explicit else None
        logits, last = run_chunks(model, idx, split, reset, state=start, seed=draws)
        close(logits, whole)
        for a, b in zip(grads_of(model, logits, last), reference):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)
        if not training:
            close_states(model, last, state)


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("keys", [
    {}, dict(position="learned", window=8), dict(window=1, d_conv=1, fractal_kernel=1, qk_norm=True),
    dict(norm="layernorm", bias=True, activation="gelu_tanh", tie_weights=False)],
    ids=["rope", "learned", "short", "GPT-2's"])
def test_decoders_continue_the_stream(kind, keys):
    """From any state, of rows that came there through other resets, past the attention's window and its turning back;
    and the state stays as it is."""
    model = make(kind, **keys).eval()
    T = 8 if model.wpe is not None else 33
    gen = torch.Generator().manual_seed(1)
    idx, reset = torch.randint(V, (3, T), generator=gen), torch.zeros(3, T, dtype=torch.bool)
    for cut in (1, 2, 7):
        for resets in (False, True):
            reset[[0, 1, 2], [0, cut - 1, cut // 2]] = resets
            whole = model(idx, reset=reset)[0]
            state = model(idx[:, :cut], reset=reset[:, :cut])[2]
            before = map_state(torch.clone, state)
            step = decoder(model, state)
            for t in range(cut, T):
                close(step(idx[:, t:t + 1]), whole[:, t])
            assert all(a.equal(b) for a, b in zip(tensors(before), tensors(state), strict=True))
        reset.zero_()


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("whole", [False, True], ids=["products", "everything"])
def test_decoders_round_as_forward_does(kind, whole):
    model = make(kind).float().eval()
    idx = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))
    exact = model(idx)[0]
    if whole:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        rounded, state = run_chunks(model, idx, [5])
        step = decoder(model, state)
        logits = torch.stack([step(idx[:, t:t + 1]) for t in range(5, 20)], 1)
        rounded = model(idx)[0][:, 5:]
    assert logits.dtype == rounded.dtype == torch.bfloat16
    error, usual = ((x - exact[:, 5:]).norm() / exact[:, 5:].norm() for x in (logits.float(), rounded.float()))
    assert 0 < error < 1.5 * usual < 0.05


@torch.no_grad()
def test_a_mixer_without_a_decoder_goes_by_its_forward(monkeypatch):
    monkeypatch.setattr(sample, "DECODERS", {})
    model, idx = make("hybrid").eval(), torch.randint(V, (2, 12))
    step = decoder(model, model(idx[:, :3])[2])
    close(torch.stack([step(idx[:, t:t + 1]) for t in range(3, 12)], 1), model(idx)[0][:, 3:])
    with pytest.raises(ValueError, match="shorter"):
        decoder(model, model.encode(idx)[1])  # of some of the layers


@torch.no_grad()
def test_layers_derived_from_ours_are_decoded_by_their_forward():
    def halved(layer):
        def forward(self, x, *past):
            y = ours.forward(self, x, *past)
            return y / 2 if len(past) == 0 else (y[0] / 2, y[1])
        ours = type(layer)
        layer.__class__ = type("Halved", (ours,), {"forward": forward})

    for kind in MIXERS:
        model, idx = make(kind).eval(), torch.randint(V, (2, 12))
        for block in model.h:
            halved(block.mixer)
            halved(block.ffn)
        step = decoder(model, model(idx[:, :3])[2])
        close(torch.stack([step(idx[:, t:t + 1]) for t in range(3, 12)], 1), model(idx)[0][:, 3:])


@torch.no_grad()
def test_a_linear_that_does_more_is_called_or_refused():
    """Where its weight alone would be read it is refused; what changes the weight itself is seen everywhere."""
    model, idx = make("hybrid").eval(), torch.randint(V, (2, 8))
    double, called = torch.nn.Module(), 0
    double.forward = lambda weight: 2 * weight
    for linear in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        ours, loss = type(linear), None
        linear.__class__ = type("Adapted", (ours,), {"forward": lambda self, x, ours=ours: 2 * ours.forward(self, x)})
        with contextlib.suppress(TypeError):
            loss = model(idx, idx)[1]
        with contextlib.nullcontext() if loss is not None or linear is model.lm_head else pytest.raises(
                TypeError, match="Adapted in place of Linear"):
            step, called = decoder(model, model.initial_state(2)), called + 1
            close(torch.stack([step(idx[:, t:t + 1]) for t in range(8)], 1), model(idx)[0])
        linear.__class__ = ours
        parametrize.register_parametrization(linear, "weight", double)
        logits, expected, _ = model(idx, idx, return_logits=True)
        close(expected if loss is None else loss, expected)
        close(decoder(model, model(idx[:, :7])[2])(idx[:, 7:]), logits[:, 7])
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert called > 8
    model.wte.__class__ = type("Scaled", (torch.nn.Embedding,), {"forward": lambda self, idx: 3 * self.weight[idx]})
    close(decoder(model, model(idx[:, :7])[2])(idx[:, 7:]), model(idx)[0][:, 7])


@pytest.mark.parametrize("kind", MIXERS)
def test_row_with_resets_equals_its_documents(kind):
    model = make(kind).eval()
    idx = torch.randint(V, (1, 17), generator=torch.Generator().manual_seed(1))
    cuts = [0, 1, 6, 7, 17]
    reset = torch.zeros(1, 17, dtype=torch.bool)
    reset[0, cuts[:-1]] = True
    dirty = map_state(lambda t: torch.ones_like(t), model.initial_state(1))
    whole, _, state = model(idx, state=dirty, reset=reset)
    parameters, dy, grads = [p for p in model.parameters() if p.numel()], torch.randn(whole.shape).double(), []
    for a, b in itertools.pairwise(cuts):
        alone, _, last = model(idx[:, a:b])
        close(whole[:, a:b], alone)
        grads.append(torch.autograd.grad(alone, parameters, dy[:, a:b]))
    for ours, *parts in zip(torch.autograd.grad(whole, parameters, dy), *grads):
        close(ours, sum(parts))
    more = torch.randint(V, (1, 5), generator=torch.Generator().manual_seed(2))
    close(model(more, state=state)[0], model(more, state=last)[0])


@pytest.mark.parametrize("kind", MIXERS)
def test_nothing_before_a_reset_stays_in_the_state(kind):
    model = make(kind).eval()
    idx = torch.randint(V, (1, 9), generator=torch.Generator().manual_seed(3))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 7] = True
    x = model.wte(idx).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: x)
    _, state = model.trunk(idx, reset=reset)
    for block, layer in zip(model.h, state["layers"]):
        if block.kind == "standard":
            k, v, valid = layer
            assert valid[0].tolist() == [False] * (valid.shape[1] - 2) + [True] * 2
            layer = [t[:, :, valid[0]] for t in (k, v)]
        for t in layer:
            grad, = torch.autograd.grad(t.sum(), x, retain_graph=True)
            assert grad[0, :7].abs().max() == 0 and grad[0, 7:].abs().max() > 0


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_no_future_leaks(kind, position):
    model = make(kind, position=position, window=8).train()
    idx = torch.randint(V, (1, 8), generator=torch.Generator().manual_seed(1))
    x = model.wte(idx).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: x)
    logits = model(idx)[0]
    for t in range(8):
        grad, = torch.autograd.grad(logits[0, t].sum(), x, retain_graph=True)
        assert (grad[0, t + 1:] == 0).all()
        assert grad[0, t].abs().max() > 0


def test_learned_positions_hold_the_law_up_to_block_size_and_restart_at_resets():
    model = make("hybrid", position="learned", window=8).eval()
    idx = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = reset[1, 7] = True
    whole, state = run_chunks(model, idx, [8], reset)
    assert state["pos"].tolist() == [5, 1]
    for sizes in ([3, 1, 4], [1] * 8):
        logits, last = run_chunks(model, idx, sizes, reset, state=model.initial_state(2))
        close(logits, whole)
        assert last["pos"].tolist() == [5, 1]
    close(whole[:1, 3:], model(idx[:1, 3:])[0])
    fresh = model.next_block(state)
    assert fresh["pos"].tolist() == [0, 0] and not fresh["layers"][2][2].any()
    assert fresh["layers"][0][1].equal(state["layers"][0][1])
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 9, dtype=torch.long))


# -- fractal

def fractal_by_definition(block, x, levels=None):
    """One module at a time, straight from DESIGN's equations; x (T, d), evaluation."""
    def n(z):
        return z / (z.square().mean(-1, keepdim=True) + block.eps).sqrt()

    def unit(module, z, c):
        w = module.conv[c - 1]
        z, H = n(z), z.shape[1]
        padded = torch.cat((z.new_zeros(w.shape[1] - 1, H), z))
        conv = sum(w[:, i] * padded[i:i + len(z)] for i in range(w.shape[1]))
        return n(torch.nn.functional.silu(conv) @ module.M[c - 1].weight.T)

    def f(module, z, c, m):
        if c == 1 or m == 1:
            return unit(module, z, c)
        p = torch.sigmoid(module.a[c - 2])
        return p * f(module, f(module, z, c - 1, m - 1), c - 1, m - 1) + (1 - p) * unit(module, z, c)

    S = sum(block.dims)
    projected = x @ block.W_in.weight.T
    z, g = projected[:, :S].split(block.dims, dim=1), projected[:, S:]
    outs = [n(f(m, zk, C, min(C, levels or C))) for m, zk, C in zip(block.fractals, z, block.depths)]
    return (torch.cat(outs, 1) * torch.nn.functional.silu(g)) @ block.W_out.weight.T


@pytest.mark.parametrize("levels", [None, 1, 2, 3])
def test_fractal_block_is_its_definition(levels):
    model = make("fractal", fractal_depth_range=[1, 4], fractal_count=5).eval()
    model.set_fractal_levels(levels)
    for block in model.h:
        mixer = block.mixer
        assert len(set(mixer.depths)) > 1 and len(set(mixer.dims)) > 1
        x = torch.randn(11, 12, dtype=torch.double)
        y, state = mixer(x[None], None, None)
        close(y[0], fractal_by_definition(mixer, x, levels), 1e-12)
        dims = {C: [H for c, H in zip(mixer.depths, mixer.dims) if c == C] for C in mixer.depths}
        padded = {C: len(group) * -(-max(group) // 16) * 16 for C, group in dims.items()}
        inputs = sum((2 ** min(C, levels or C) - 1) * width for C, width in padded.items())
        assert sum(s.shape[-1] for s in state) == inputs  # one for each application


def test_fractal_draws_come_from_their_own_seed():
    config = GPTConfig(attention_type=["fractal", "mamba", "fractal"], n_embd=32, fractal_seed=5, fractal_count=3,
                       fractal_depth_range=[1, 4], fractal_dim_range=[10, 50])
    for layer in (0, 2):
        rng = random.Random(5 * 1000003 + layer)
        drawn = [(rng.randint(1, 4), 8 * rng.randint(2, 6)) for _ in range(3)]
        assert list(zip(config.fractal_depths[layer], config.fractal_dims[layer])) == drawn
    assert config.fractal_depths[1] == []
    kept = GPTConfig(**(config.model_dump() | {"fractal_seed": 99}))
    assert (kept.fractal_depths, kept.fractal_dims) == (config.fractal_depths, config.fractal_dims)


def test_fractal_join_keeps_the_mean_and_draws_per_row():
    model = make("fractal", fractal_depth_range=[2, 2], fractal_count=1, fractal_drop=0.4, fractal_level_drop=0.0)
    mixer, shares = model.h[0].mixer, []
    x = torch.randn(1, 1, 12, dtype=torch.double).expand(20000, 1, 12)
    torch.manual_seed(0)
    with torch.no_grad():
        mixer.fractals[0].a.fill_(1.5)
        drawn = mixer.train()(x, None, None)[0]
        for a in (1.5, 99, -99):  # the mean, deep alone, shallow alone
            mixer.fractals[0].a.fill_(a)
            expected = mixer.eval()(x[:1], None, None)[0]
            shares.append(((drawn - expected).abs().amax((1, 2)) < 1e-12).double().mean().item())
    p = 1 / (1 + math.exp(-1.5))
    assert sum(shares) == pytest.approx(1) and shares == pytest.approx([0.6, 0.4 * p, 0.4 * (1 - p)], abs=0.015)


def test_fractal_levels_are_fixed_for_the_life_of_a_state():
    model = make("fractal", fractal_depth_range=[3, 3]).eval()
    _, _, state = model(torch.zeros(1, 4, dtype=torch.long))
    for levels in (1, 2):
        model.set_fractal_levels(levels)
        with pytest.raises(ValueError, match="fractal_levels"):
            model(torch.zeros(1, 4, dtype=torch.long), state=state)
        with pytest.raises(ValueError, match="fractal_levels"):
            decoder(model, state)(torch.zeros(1, 1, dtype=torch.long))


def test_level_drop_trains_every_truncation():
    """With the cut drawn as m = 1 in every module and row, training computes what levels = 1 evaluates."""
    model = make("fractal", fractal_depth_range=[3, 3], fractal_drop=0.0, fractal_level_drop=0.999999)
    idx = torch.randint(V, (64, 6), generator=torch.Generator().manual_seed(0))
    truncated = {}
    for m in (1, 2, 3):
        model.eval().set_fractal_levels(m)
        truncated[m] = model.h[0].mixer(model.wte(idx), None, None)[0]
    model.train().set_fractal_levels(None)
    mixed = torch.cat([model.h[0].mixer(model.wte(idx), None, None)[0] for _ in range(3)])
    matches = [((mixed - truncated[m].repeat(3, 1, 1)).abs().amax((1, 2)) < 1e-9).sum().item() for m in (1, 2, 3)]
    # three modules cut alike: each (1/3)^3 of 192 rows
    assert all(1 <= n <= 25 for n in matches)


# -- shapes and accounting

def test_encode_gives_the_residual_stream_after_the_bottleneck():
    model = make("hybrid", n_embd=[16, 8, 8, 16], attention_type="mamba").eval()
    idx = torch.randint(V, (2, 7))
    seen = []
    model.h[2].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    model(idx)
    features, state = model.encode(idx)
    assert features.shape == (2, 7, 8) and model.bottleneck == 2
    close(features, seen[0], 0)
    a, state = model.encode(idx[:, :3])
    b, _ = model.encode(idx[:, 3:], state=state)
    close(torch.cat((a, b), 1), features)


def test_bottleneck_is_the_first_run_of_minimum_width():
    for widths, where in (([8, 4, 4, 8, 4], 2), ([4, 8], 0), ([8, 8], 1), ([8, 6, 4], 2)):
        assert GPT(GPTConfig(vocab_size=5, n_embd=widths, attention_type="mamba")).bottleneck == where


@torch.no_grad()
def test_skip_connections_start_at_zero_and_pair_mirrors():
    """Each adds its mirror's output to its layer's input, in forward and in a decoder."""
    model = GPT(GPTConfig(vocab_size=5, n_embd=[12, 12, 12, 8, 12, 20], attention_type="mamba", norm="layernorm",
                          skip_connections=True)).double().eval()
    assert set(model.skip) == {"4"}
    assert all(m.weight.abs().max() == 0 for m in model.skip.values())
    idx, outputs, inputs = torch.randint(5, (2, 1)), [], []
    for block in model.h:
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0]))
    model.h[4].ln_1.register_forward_hook(lambda _, args, out: inputs.append(args[0].view(2, 12)))
    torch.nn.init.normal_(model.skip["4"].weight)
    model(idx)
    decoder(model, model.initial_state(2))(idx)
    expected = outputs[3] @ model.h[4].resize.weight.T + outputs[1] @ model.skip["4"].weight.T
    for x in inputs:
        close(x, expected[:, 0])
    assert len(inputs) == 2


def test_flops_agree_with_pytorchs_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for kind in MIXERS:
        model = make(kind, window=8, fractal_depth_range=[2, 2], fractal_dim_range=[16, 16],
                     skip_connections=True).eval()
        state = model.initial_state(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, 1, dtype=torch.long), state=state)
        rest = 0  # taps are not matrix products, nor are Mamba's decay and input
        for block in model.h:
            mixer = block.mixer
            if block.kind == "fractal":
                rest += 2 * sum((2 ** C - 1) * 4 * H for C, H in zip(mixer.depths, mixer.dims))
            elif block.kind == "mamba":
                rest += 2 * mixer.d_inner * (4 + 2 * mixer.d_state)
        assert counter.get_total_flops() == sum(model.flops_per_token()) - rest


@pytest.mark.parametrize("kind", MIXERS)
def test_layer_table_counts_every_parameter_once(kind):
    model = make(kind)
    table = model.layer_table().splitlines()
    numbers = [int(line.split()[-3 if i < len(table) - 2 else -2].replace(",", "")) for i, line in enumerate(table)
               if i > 0]
    assert sum(numbers[:-1]) == numbers[-1] == sum(p.numel() for p in model.parameters())
    for dtype in (torch.bfloat16, torch.float64):
        sizes = [int(line.split()[-1].replace(",", "")) for line in model.layer_table(dtype).splitlines()[1:-2]]
        assert sizes == [sum(t.nbytes for t in state) for state in model.initial_state(1, dtype)["layers"]]
    assert [i for i, line in enumerate(table[1:]) if "(bottleneck)" in line] == [model.bottleneck]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [8, 37], ids=["chunks", "whole"])
def test_cross_entropy_is_its_definition_in_float64(monkeypatch, dtype, tolerance, rows):
    """In chunks of 8 of the 37 rows or all at once; bfloat16 is autocast's, of float32."""
    gen, wide = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr(sys.modules["model"], "logits_at_once", lambda x: rows * 50)
    exact = [torch.randn(n, 9, generator=gen, dtype=torch.double, requires_grad=True) for n in (37, 50)]
    inputs = [t.detach().to(wide).requires_grad_() for t in exact]
    targets = torch.randint(-1, 50, (37,), generator=gen)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = cross_entropy(*inputs, targets)
        assert cross_entropy(*inputs, torch.full((37,), -1)).item() == 0
        with torch.no_grad():
            close(cross_entropy(*inputs, targets), loss, 1e-6)
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=-1)
    pairs = zip((loss, *torch.autograd.grad(loss, inputs)), (expected, *torch.autograd.grad(expected, exact)))
    for actual, reference in pairs:
        assert actual.dtype == wide and (actual.double() - reference).norm() <= tolerance * reference.norm()


def test_a_compiler_leaves_the_chunks_of_the_loss_alone(monkeypatch):
    """Unrolled, all of them would be in memory at once."""
    monkeypatch.setattr(sys.modules["model"], "logits_at_once", lambda x: 4 * V)
    model, idx, graphs = make("hybrid").eval(), torch.randint(V, (2, 8)), []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    (_, loss, _), (_, expected, _) = compiled(idx, idx), model(idx, idx)
    parameters = [p for p in model.parameters() if p.numel()]
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for a, b in zip((loss, *ours), (expected, *theirs)):
        close(a, b)
    parts = [part for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    assert parts and not any("log_softmax" in str(node.target) for part in parts for node in part.graph.nodes)


def test_forward_interface():
    model = make("hybrid").eval()
    idx = torch.randint(V, (2, 6))
    logits, loss, state = model(idx)
    assert logits.shape == (2, 6, V) and loss is None
    assert model(idx, last_only=True)[0].shape == (2, 1, V)
    none, loss, _ = model(idx, idx)
    assert none is None and loss.shape == ()
    both, again, _ = model(idx, idx, return_logits=True)
    assert both.shape == (2, 6, V) and again == loss
    initial = model.initial_state(2)
    assert [(t.shape, t.dtype) for t in tensors(initial)] == [(t.shape, t.dtype) for t in tensors(state)]
    close(model(idx, state=initial)[0], logits, 1e-12)


def test_nothing_of_a_fake_pass_is_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode
    for kind in ("standard", "mamba", "fractal"):
        model, idx = make(kind).eval(), torch.zeros(1, 11, dtype=torch.long)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(idx)
        assert type(model(idx)[0]) is torch.Tensor


@given(st.integers(1, 4096), st.integers(1, 1024))
@example(240, 176)  # 240 / 176 * 176 is 239.99..
def test_a_feed_forward_width_given_as_a_ratio_comes_out(hidden, C):
    assert feed_forward_width(hidden / C, C) == hidden


def test_training_goes_on_after_inference():
    """What is kept between calls must not be an inference tensor, which autograd refuses."""
    model = make("hybrid")
    idx = torch.randint(V, (1, 37))  # a length, and so a table of rotations, of its own
    with torch.inference_mode():
        decoder(model, model(idx)[2])(idx[:, :1])
    _, loss, _ = model(idx, idx)
    loss.backward()


def test_compiled_model_is_one_graph_with_equal_gradients():
    model = make("hybrid").eval()
    idx = torch.randint(V, (2, 8))
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[0, 3] = True
    state = model.initial_state(2)
    loss = model(idx, idx, state=state, reset=reset)[1]
    reference = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss2 = compiled(idx, idx, state=state, reset=reset)[1]
    close(loss2, loss)
    for a, b in zip(torch.autograd.grad(loss2, list(model.parameters()), allow_unused=True), reference):
        if b is not None:
            close(a, b)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("T", [3, 8])
def test_a_state_keeps_its_form(kind, T):
    """Shapes, strides and dtypes of one block and the next, or a compiled model would be compiled again for it."""
    for dtype, weights in (torch.float64, torch.float64), (torch.bfloat16, torch.float32):
        model = make(kind).to(weights)
        first = model.initial_state(2, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            second = model.next_block(model(torch.randint(V, (2, T)), state=first)[2])
        forms = [[(t.shape, t.stride(), t.dtype) for t in tensors(state)] for state in (first, second)]
        assert forms[0] == forms[1]


@pytest.mark.parametrize("kind", MIXERS)
def test_gradients_lie_in_memory_as_their_parameters_do(kind):
    """Else DDP warns of each, and copies it."""
    joins = dict(fractal_depths=[[2, 2], [3, 3]], fractal_dims=[[8, 16], [8, 8]])  # of several modules in a group
    model, idx = make(kind, **(joins if kind == "fractal" else {})), torch.randint(V, (2, 8))
    model(idx, idx)[1].backward()
    strides = {name: (p.grad.stride(), p.stride()) for name, p in model.named_parameters() if p.numel()}
    assert {name: pair for name, pair in strides.items() if pair[0] != pair[1]} == {}


NOISE = dict(dropout=0.2, token_noise=0.2, ngram_dropout=0.3, fractal_drop=0.3, fractal_level_drop=0.3)
LEARNED = dict(position="learned", window=8, norm="layernorm", bias=True, activation="gelu_tanh")


@pytest.mark.parametrize("kind, keys", [*((kind, NOISE) for kind in MIXERS), ("hybrid", LEARNED)])
def test_a_model_on_another_device_equals_the_cpu(away, kind, keys):
    """The loss and the gradients of two blocks, the state carried, features, and what it writes; all of it is there."""
    idx, boundaries = torch.randint(V, (3, 17)), torch.rand(3, 16) < 0.2
    ways = {"temperature": 0.0}, dict(top_k=9, top_p=0.9, min_p=0.01, num_samples=2, repetition_penalty=1.3)

    def outcome(device):
        model, x, reset = make(kind, **keys).to(device), idx.to(device), boundaries.to(device)
        torch.manual_seed(1)
        state, total = model.initial_state(3), 0.0
        for t in slice(0, 8), slice(8, 16):
            _, loss, state = model(x[:, t], x[:, t.start + 1 : t.stop + 1], state=state, reset=reset[:, t])
            state, total = model.next_block(state), total + loss
        grads = torch.autograd.grad(total, [p for p in model.parameters() if p.numel()], allow_unused=True)
        numbers = [total, *(g for g in grads if g is not None), model.eval().encode(x[:, :8])[0]]
        draws = [torch.Generator(device).manual_seed(2) for _ in ways]
        written = [torch.stack([*sample.generate(model, x, 12, generator=g, **way)]) for g, way in zip(draws, ways)]
        assert {t.device for t in (*model.parameters(), *tensors(state), *numbers, *written)} == {device}
        return [x.detach().cpu() for x in numbers], [x.tolist() for x in written]

    (here, written), (there, written_there) = outcome(idx.device), outcome(away)
    for a, b in zip(there, here, strict=True):
        close(a, b)
    assert written_there == written


def test_autocast_leaves_the_residual_stream_in_float32(monkeypatch):
    import model as module
    dtypes, attend = [], module.attend
    monkeypatch.setattr(module, "attend", lambda q, k, v, *rest: dtypes.append((q.dtype, k.dtype, v.dtype)) or
                        attend(q, k, v, *rest))
    model = make("hybrid").float()
    streams = []
    for block in model.h:
        block.register_forward_hook(lambda m, args, out: streams.extend((args[0].dtype, out[0].dtype)))
    idx = torch.randint(V, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx, state=model.initial_state(2))[1]
    loss.backward()
    assert set(streams) == {torch.float32} and len(streams) == 2 * len(model.h)
    assert dtypes == [(torch.bfloat16,) * 3]  # where the products are fast


@pytest.mark.parametrize("shape", [(5, 4, 512, 64), (3, 2, 7, 6), (2, 1, 0, 4)])  # in three pieces, in one, empty
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-7), (torch.bfloat16, 0.003)])
def test_rotary_positions_are_products_of_complex_numbers(shape, dtype, tolerance):
    S, hs = shape[2:]
    x, dy = (torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = rotate(x, *rotary_table(S, hs, torch.float64 if dtype == torch.float64 else torch.float32, x.device))
    angle = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
    a, b = x.double().chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((z.real, z.imag), -1)
    pairs = (y, expected), (torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy.double())[0])
    for actual, reference in pairs:
        assert actual.dtype == dtype and (actual.double() - reference).norm() <= tolerance * reference.norm()


def test_ngram_rows_are_a_function_of_the_documents_last_n_tokens():
    """With as good as no collisions, two positions share a row exactly where they share their last n tokens."""
    orders, rows = [2, 3, 5], 2**40
    ngrams = NGramEmbedding(GPTConfig(n_embd=2, ngram_orders=[5, 2, 3, 2], ngram_rows=8))
    ngrams.rows, found = rows, []
    ngrams.table.forward = lambda index, **_: found.append(index) or torch.zeros(len(index))
    gen = torch.Generator().manual_seed(0)
    idx, reset = torch.randint(3, (4, 300), generator=gen), torch.rand(4, 300, generator=gen) < 0.1
    ngrams(idx, None, reset)
    index = found[0].view(4, 300, 3)
    for i, n in enumerate(orders):
        row_of = {}
        for b, t in itertools.product(range(4), range(300)):
            start = max([0] + [s for s in range(t + 1) if reset[b, s]])
            gram = tuple(idx[b, max(start, t - n + 1):t + 1].tolist())
            row = index[b, t, i].item()
            assert i * rows <= row < (i + 1) * rows and row_of.setdefault(gram, row) == row
        assert len(set(row_of.values())) == len(row_of)


@torch.no_grad()
def test_ngram_dropout_leaves_rows_out_and_keeps_the_mean():
    ngrams = NGramEmbedding(GPTConfig(n_embd=4, ngram_orders=[2, 3], ngram_rows=50, ngram_dropout=0.3)).eval()
    torch.nn.init.normal_(ngrams.table.weight)
    idx = torch.randint(20, (1, 9))
    whole, _ = ngrams(idx, None, None)
    trigrams = ngrams.table.weight[50:].clone()
    ngrams.table.weight[50:] = 0
    bigram, _ = ngrams(idx, None, None)
    ngrams.table.weight[50:] = trigrams
    draws, _ = ngrams.train()(idx.expand(20000, 9), None, None)
    shares = torch.stack([((draws - part / 0.7).abs().amax(-1) < 1e-5).float().mean()
                          for part in (whole, bigram, whole - bigram, 0 * whole)])
    torch.testing.assert_close(shares, torch.tensor([0.49, 0.21, 0.21, 0.09]), atol=0.01, rtol=0)
    torch.testing.assert_close(draws.mean(0, keepdim=True), whole, atol=0.06, rtol=0)


def test_token_noise_replaces_by_the_texts_own_tokens():
    idx = torch.cat((torch.full((64, 300), 7), torch.full((64, 100), 9)), dim=1)
    noisy = replace_some(idx, 0.2)
    assert noisy.shape == idx.shape and noisy.unique().tolist() == [7, 9]
    for token, others in ((7, 0.25), (9, 0.75)):  # what a token replaces by itself goes unseen
        assert (noisy[idx == token] != token).float().mean().item() == pytest.approx(0.2 * others, rel=0.15)

    model = GPT(GPTConfig(vocab_size=30, n_embd=16, n_layer=2, block_size=16, token_noise=0.5))
    plain = GPT(GPTConfig(vocab_size=30, n_embd=16, n_layer=2, block_size=16))
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(30, (4, 16))
    assert not torch.equal(model.train()(idx)[0], plain.train()(idx)[0])
    assert torch.equal(model.eval()(idx)[0], plain.eval()(idx)[0])


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_eps_is_that_of_every_norm(norm):
    model = make("n-grams", norm=norm, norm_eps=0.25)
    assert {module.eps for module in model.modules() if hasattr(module, "eps")} == {0.25}


@pytest.mark.parametrize("activation, f", [
    ("relu2", lambda x: x * x * (x > 0)), ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("gelu_tanh", lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))])
def test_feed_forward_is_its_formula(activation, f):
    model, x = make(n_embd=8, activation=activation, bias=True), torch.randn(3, 5, 8, dtype=torch.double)
    ffn = model.h[0].ffn
    close(ffn(x), f(x @ ffn.c_fc.weight.T + ffn.c_fc.bias) @ ffn.c_proj.weight.T + ffn.c_proj.bias, 1e-12)


@pytest.mark.parametrize("keys, words", [
    (dict(n_embd=[8, 8], attention_type=["mamba"] * 3), ("n_embd", "2", "attention_type", "3")),
    (dict(n_embd=[8, 8], n_layer=3), ("n_embd", "n_layer")),
    (dict(n_embd=10, n_head=4), ("n_head", "10")),
    (dict(n_embd=[8, 16], attention_type="mamba", tie_weights=True), ("tie_weights", "16")),
    (dict(fractal_depth_range=[1, 6]), ("fractal_depth_range", "(2^C - 1)(H^2 + w H)")),
    (dict(fractal_depth_range=[3, 2]), ("fractal_depth_range", "empty")),
    (dict(fractal_dim_range=[9, 15]), ("fractal_dim_range", "multiple of 8")),
    (dict(n_embd=[]), ("n_embd", "empty")),
    (dict(position="learned", window=3), ("window", "block_size")),
    (dict(n_embd=6, n_head=2), ("n_head", "3 wide", "even")),
    (dict(ffn_mult=0.001), ("ffn_mult", "1 / width")),
    (dict(fractal_depths=[[]] * 4), ("fractal_depths", "together with fractal_dims")),
    (dict(fractal_depths=[[1], []], fractal_dims=[[8], [8]], n_layer=2), ("fractal_depths", "one list a layer (2)")),
    (dict(fractal_depths=[[6]], fractal_dims=[[8]], n_layer=1), ("fractal_depths", "less than or equal to 5")),
    (dict(fractal_depths=[[]], fractal_dims=[[]], n_layer=1, attention_type="fractal"), ("layer 0 has no module",)),
])
def test_config_refuses(keys, words):
    with pytest.raises(ValidationError) as error:
        GPTConfig(**keys)
    assert all(word in str(error.value) for word in words)


# -- the reference models

def assert_equal_logits(theirs, folder):
    """Of all tokens at once and of one after the other. Returns our model, the tokens and the logits."""
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "A_log" not in name:
                p += 0.1 * torch.randn_like(p)
    theirs.eval().save_pretrained(folder)
    ours, idx = GPT.from_pretrained(folder).eval(), torch.randint(91, (2, 32))
    with torch.no_grad():
        expected = theirs(idx, use_cache=False).logits
        stepped, _ = run_chunks(ours, idx, [1] * 32, state=ours.initial_state(2))
        for logits in (ours(idx)[0], stepped):
            close(logits, expected, 1e-5)
    return ours, idx, expected


def test_gpt2_logits_equal_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=91, n_positions=32, n_embd=24, n_layer=3, n_head=3))
    _, idx, expected = assert_equal_logits(theirs, tmp_path)
    cut = GPT.from_pretrained(tmp_path, block_size=8, dropout=0.1)
    assert cut.config.block_size == 8 and cut.config.dropout == 0.1
    close(cut.eval()(idx[:, :8])[0], expected[:, :8], 1e-5)
    with pytest.raises(ValueError, match=r"block_size: 33, but .* has 32 positions"):
        GPT.from_pretrained(tmp_path, block_size=33)


def test_other_models_are_refused(tmp_path):
    from transformers import GPT2Config, LlamaConfig, MambaConfig
    unusual = [GPT2Config(**keys) for keys in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
                                               {"add_cross_attention": True})]
    for config in (LlamaConfig(), *unusual, MambaConfig(hidden_size=64, intermediate_size=96)):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"a {config.model_type} model; GPT-2 and Mamba-1"):
            GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_logits_equal_transformers(tmp_path, tied):
    from transformers import MambaConfig, MambaForCausalLM
    torch.manual_seed(0)
    theirs = MambaForCausalLM(MambaConfig(vocab_size=91, hidden_size=24, state_size=5, num_hidden_layers=3,
                                          residual_in_fp32=False, tie_word_embeddings=tied))
    ours, _, _ = assert_equal_logits(theirs, tmp_path)
    assert ours.config.tie_weights == tied and (ours.lm_head.weight is ours.wte.weight) == tied


def test_dropout_of_embedding_and_branches():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=9, n_embd=64, n_layer=1, dropout=0.25)).train()
    block, seen = model.h[0], []
    block.mixer.forward = lambda x, state, reset: (torch.ones_like(x), state)
    block.ffn.forward = torch.ones_like
    block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out[0] - args[0])))
    idx = torch.randint(9, (8, 100))
    model(idx)
    x, added = seen
    kept = x != 0
    torch.testing.assert_close(x[kept], model.wte(idx)[kept] / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    for value, share in ((0, 1 / 16), (4 / 3, 6 / 16), (8 / 3, 9 / 16)):  # of two branches none, one or both
        assert ((added - value).abs() < 1e-4).float().mean().item() == pytest.approx(share, abs=0.02)


def test_attention_drops_weights_in_training_alone():
    mixer, x = make("standard", dropout=0.5).h[0].mixer, torch.randn(2, 5, 16).double()
    for training in (True, False):
        mixer.train(training)
        first, second = (mixer(x, None, None)[0] for _ in range(2))
        assert torch.equal(first, second) != training


def test_initial_weights_are_those_of_the_table():
    keys = dict(vocab_size=999, n_embd=[256, 128, 128], attention_type=["mamba", "fractal", "standard"],
                fractal_dim_range=[64, 64], fractal_depth_range=[2, 2], ngram_orders=[2])
    torch.manual_seed(0)
    model = GPT(GPTConfig(**keys))
    mamba, fractal, attention = (block.mixer for block in model.h)
    small = 0.02 / math.sqrt(6)
    for weight, std in ((model.wte.weight, 0.02), (model.lm_head.weight, 0.02), (attention.c_attn.weight, 0.02),
                        (attention.c_proj.weight, small), (model.h[0].ffn.c_proj.weight, small),
                        (fractal.W_out.weight, small),
                        (model.h[1].resize.weight, 1 / 16), (fractal.W_in.weight, 128**-0.5),
                        (fractal.fractals[0].M[1].weight, math.sqrt(2.8 / 64)),
                        (torch.cat([c for m in fractal.fractals for c in m.conv]), 0.5),
                        (mamba.out_proj.weight, 512**-0.5 / 3), (mamba.dt_proj.weight, 16**-0.5 / math.sqrt(3))):
        assert weight.std().item() == pytest.approx(std, rel=0.06)
    dt = torch.nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.00099 < dt.min() < 0.002 and 0.05 < dt.max() < 0.101
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert mamba.D.eq(1).all() and not any(m.a.any() for m in fractal.fractals)
    still = GPT(GPTConfig(**keys | dict(zero_init=True, n_embd=128)))
    still.h[0].mixer.out_proj = torch.nn.Linear(256, 128)  # as a mixer of one's own may have it
    still.init_weights()
    idx = torch.randint(999, (2, 9))
    assert torch.equal(still.trunk(idx)[0], still.wte(idx)) and still.lm_head.weight is still.wte.weight


def test_a_model_made_without_memory_is_its_weights():
    """Nothing that it computes with stands outside the state dict."""
    kinds = ["mamba", "fractal", "standard"]
    keys = dict(vocab_size=40, n_embd=16, n_head=1, attention_type=kinds, ngram_orders=[2, 3])
    model, idx = GPT(GPTConfig(**keys)).eval(), torch.randint(40, (2, 9))
    torch.nn.init.normal_(model.ngrams.table.weight)
    with torch.device("meta"):
        other = GPT(GPTConfig(**keys)).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(idx)[0], model(idx)[0])
    assert torch.equal(model(idx.int())[0], model(idx)[0])  # hashes have 64 bits whatever the tokens have
