"""The two operators under a Mamba block, on any machine: the selective scan and the causal depthwise convolution.

    selective_scan,  selective_scan_step      h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,   y_t = C_t h_t + D u_t
    causal_conv1d,   causal_conv1d_step       y_t = bias + sum_w weight_w x_(t - (W-1-w) dilation)

State goes in and comes out, with exact gradients through both ends, and `reset` starts a new document inside a row.
Each operator has four forms, in this order: its definition (*_oracle, a loop over time: read it first), plain torch
(*_plain), native code for CPUs (*_torch, which run the plain form where there is none) and Triton kernels (*_triton).
The device picks one; `KERNELS=torch|triton|oracle` in the environment forces one. Then come what autograd and
torch.compile see, the public functions, and wrappers with mamba_ssm's and causal_conv1d's signatures and (B, D, L).

Letters, in shapes and in code:
    b  batch         l  time (t one position, T positions of a chunk)      d  channel
    n  state index   w  taps of the convolution                            h  the state, (b, d, n)
"(2a)" and the like are equations of the Mamba paper, Gu and Dao 2023, arXiv 2312.00752.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels outside Linux: the torch path does everything
    triton = None

CHUNK = 8  # positions between two saved states; the backward pass recomputes the states in between
TILE = 65536  # (b, n, d) elements that the plain scan takes at once: temporaries stay in cache, calls are few
COMPILE = True  # whether a call on a CPU may compile native code
COMPILE_FROM = 2**21  # state elements (b l d n) that it must have for that
CONV_WORK = 64  # state elements that one element of a convolution counts for
VECTOR = 16  # channels that native code takes side by side


def _state_dtype(u):
    return torch.float64 if u.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- the definition

def selective_scan_oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          initial_state=None, reset=None, return_last_state=False):
    """The selective scan by its definition, one position after the other: `selective_scan` must equal it."""
    f = _state_dtype(u)
    dt = delta.to(f) if delta_bias is None else delta.to(f) + delta_bias.to(f)  # (b, l, d)
    dt = F.softplus(dt) if delta_softplus else dt
    A, B, C, u_f = A.to(f), B.to(f), C.to(f), u.to(f)
    b, _, d, n = *u.shape, A.shape[1]
    h = u_f.new_zeros(b, d, n) if initial_state is None else initial_state.to(f)
    ys = []
    # unbind, not x[:, t]: the gradient of every x[:, t] would be a zero tensor as long as x
    for t, (dt_t, u_t, B_t, C_t) in enumerate(zip(*(x.unbind(1) for x in (dt, u_f, B, C)))):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        dA = torch.exp(dt_t[:, :, None] * A)  # (b, d, n)  (4), zero-order hold
        dBu = (dt_t * u_t)[:, :, None] * B_t[:, None, :]  # (b, d, n)  (4) to first order in dt, as Mamba does
        h = dA * h + dBu  # (2a)
        ys.append((h * C_t[:, None, :]).sum(-1))  # (b, d)  (2b)
    y = torch.stack(ys, 1)
    y = y if D is None else y + D.to(f) * u_f
    y = y if z is None else y * F.silu(z.to(f))
    return (y.to(u.dtype), h) if return_last_state else y.to(u.dtype)


def causal_conv1d_oracle(x, weight, bias=None, activation=None, initial_state=None, reset=None,
                         return_final_state=False, dilation=1):
    """The causal depthwise convolution by its definition: `causal_conv1d` must equal it."""
    f = _state_dtype(x)
    (b, l, d), W = x.shape, weight.shape[1]
    span = (W - 1) * dilation
    state = x.new_zeros(b, span, d) if initial_state is None else initial_state.to(x.dtype)
    reset = torch.zeros(b, l, dtype=torch.bool, device=x.device) if reset is None else reset
    rows = [*state.unbind(1), *x.unbind(1)]  # span + l rows (b, d)
    document = [*[reset.new_zeros(b, 1, dtype=torch.long)] * span, *reset.cumsum(1)[..., None].unbind(1)]  # (b, 1)
    ys = []
    for t in range(l):
        y = torch.zeros(b, d, dtype=f, device=x.device) if bias is None else bias.to(f).expand(b, d)
        for w, weight_w in enumerate(weight.to(f).unbind(1)):
            s = t + w * dilation  # the row that tap w sees from position t
            same = document[s] == document[span + t]
            y = y + weight_w * rows[s].to(f).masked_fill(~same, 0)
        ys.append(F.silu(y) if activation else y)
    y = torch.stack(ys, 1).to(x.dtype)
    tail = [rows[s].masked_fill(document[s] != document[-1], 0) for s in range(l, l + span)]
    final = torch.stack(tail, 1) if tail else state + x[:, :0]  # (b, 0, d)
    return (y, final) if return_final_state else y


# ---------------------------------------------------------------- plain torch: the scan
#
# The state is kept as (b, n, d), channels innermost, so that every product runs along contiguous channels. Time goes in
# chunks of T positions; a chunk's decays and states, (b, T, n, d) for one tile of batch and channels, are the only
# tensors with both l and n in their shape. b comes first, as threads share its rows: what one wrote, it reads again.

def _tiles(b, n, d):
    """Slices of the batch and of the channels that cut (b, n, d) into tiles of about TILE elements."""
    step_d = min(d, max(64, TILE // n))
    step_b = max(1, TILE // (n * step_d))
    return [(slice(i, i + step_b), slice(j, j + step_d)) for i in range(0, b, step_b) for j in range(0, d, step_d)]


def _step_sizes(delta, delta_bias, delta_softplus, f):
    dt = delta.to(f).contiguous()
    dt = dt if delta_bias is None else dt + delta_bias.to(f)
    return F.softplus(dt) if delta_softplus else dt


def _states(dt, v, A2, B, reset, h, a, x):
    """Fill a with the decays and x with the states after each position, both (b, T, n, d), from the state h before.

    v is dt u, A2 is A log2(e). Returns the last state."""
    torch.mul(dt[:, :, None], A2, out=a).exp2_()  # (4); exp2 costs half of exp on a CPU
    torch.mul(v[:, :, None], B[..., None], out=x)
    boundary = reset is not None and reset.any()
    if boundary:
        a.masked_fill_(reset[:, :, None, None], 0)
    for t, (a_t, x_t) in enumerate(zip(a.unbind(1), x.unbind(1))):
        h = h.masked_fill(reset[:, t, None, None], 0) if boundary else h  # 0 * inf would be nan
        h = x_t.addcmul_(a_t, h)  # (2a)
    return h


def _bmm(a, b):
    """a b; without `out` autocast would round them"""
    return torch.bmm(a, b, out=a.new_empty(*a.shape[:2], b.shape[2]))


def _sum_n(weight, x):
    """sum_n weight (b, T, n) x (b, T, n, d) -> (b, T, d)"""
    return _bmm(weight.flatten(0, 1)[:, None], x.flatten(0, 1)).view(*x.shape[:2], -1)


def _sum_d(weight, x):
    """sum_d weight (b, T, d) x (b, T, n, d) -> (b, T, n)"""
    return _bmm(weight.flatten(0, 1)[:, None], x.flatten(0, 1).transpose(1, 2)).view(x.shape[:3])


def _saved_size(b, l, d, n, gated, save):
    """Elements that _saved_parts takes apart, 0 without `save`"""
    return b * d * (-(-l // CHUNK) * n + (l if gated else 0)) if save else 0


def _saved_parts(saved, b, l, d, n):
    """What the backward pass needs: the state before each chunk (chunks, b, n, d), and y before the gate (b, l, d)"""
    states, ungated = saved.tensor_split([b * d * -(-l // CHUNK) * n])
    return states.view(-1, b, n, d), ungated.view(b, -1, d)


def _scan_fwd_plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, save):
    f = _state_dtype(u)
    (b, l, d), n = u.shape, A.shape[1]
    last = torch.empty(b, n, d, dtype=f, device=u.device)
    saved = last.new_empty(_saved_size(b, l, d, n, z is not None, save))
    states, ungated = _saved_parts(saved, b, l, d, n)
    states = [*states.unbind(0), last] if save else [last] * (-(-l // CHUNK) + 1)
    states[0][:] = 0 if initial_state is None else initial_state.transpose(1, 2)
    u_f, B, C = u.to(f).contiguous(), B.to(f), C.to(f)
    A2 = (A.t().to(f) / math.log(2)).contiguous()  # (n, d)
    dt = _step_sizes(delta, delta_bias, delta_softplus, f)
    v = dt * u_f
    y = ungated if save and z is not None else torch.empty_like(v)
    for rows, ch in _tiles(b, n, d):
        a_all, x_all = (last.new_empty(*dt[rows, :CHUNK].shape[:2], *last[0, :, ch].shape) for _ in range(2))
        for i, (h, h_out) in enumerate(itertools.pairwise(states)):
            t = slice(i * CHUNK, (i + 1) * CHUNK)
            reset_t = None if reset is None else reset[rows, t]
            a, x = (whole[:, : l - t.start] for whole in (a_all, x_all))
            h_out[rows, :, ch] = _states(dt[rows, t, ch], v[rows, t, ch], A2[:, ch], B[rows, t], reset_t,
                                         h[rows, :, ch], a, x)
            y[rows, t, ch] = _sum_n(C[rows, t], x)  # (2b)
    y = y if D is None else y.addcmul_(D.to(f), u_f)
    y = y if z is None else F.silu(z.to(f)).mul_(y).contiguous()
    return y.to(u.dtype), last.transpose(1, 2).contiguous(), saved


def _scan_bwd_plain(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, saved):
    """With g_t the gradient of h_t:  g_t = C_t dy_t + a_(t+1) g_(t+1),  a_t = exp(dt_t A), everything else follows from

        dC_t = sum_d h_t dy_t    dB_t = sum_d g_t dt_t u_t    du_t = dt_t sum_n g_t B_t + D dy_t
        d(dt_t) = u_t sum_n g_t B_t + sum_n x_t A    dA = sum_t x_t dt_t    with x_t = g_t a_t h_(t-1)
    """
    f = _state_dtype(u)
    (b, l, d), n = u.shape, A.shape[1]
    states, ungated = _saved_parts(saved, b, l, d, n)
    g_last = states.new_zeros(b, n, d) if dlast is None else dlast.transpose(1, 2).to(f).contiguous()
    dg = torch.empty_like(g_last)
    u, B, C, A = u.to(f).contiguous(), B.to(f), C.to(f), A.t().to(f).contiguous()  # A (n, d)
    A2, dA, dB, dC = A / math.log(2), torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    dt = _step_sizes(delta, delta_bias, delta_softplus, f)
    v = dt * u
    gB, xA = torch.empty_like(v), torch.empty_like(v)  # sum_n g_t B_t and sum_n x_t A
    w, dz = torch.zeros_like(u) if dy is None else dy.to(f), None  # w: the gradient of y before the gate
    if z is not None:
        z = z.to(f)
        dz = torch.ops.aten.silu_backward(w * ungated, z)
        w = F.silu(z).mul_(w)
    for rows, ch in _tiles(b, n, d):
        ag = g_last[rows, :, ch].clone()  # a_(t+1) g_(t+1), here what reaches the last state from the right
        dA_rows = torch.zeros_like(ag)
        whole = [ag.new_empty(*dt[rows, :CHUNK].shape[:2], *ag.shape[1:]) for _ in range(3)]
        for i, h in reversed(list(enumerate(states[:, rows, :, ch].unbind(0)))):
            t = slice(i * CHUNK, (i + 1) * CHUNK)
            reset_t = None if reset is None else reset[rows, t]
            a, x, g = (part[:, : l - t.start] for part in whole)
            dt_t, v_t, w_t, B_t = dt[rows, t, ch], v[rows, t, ch], w[rows, t, ch], B[rows, t]
            _states(dt_t, v_t, A2[:, ch], B_t, reset_t, h, a, x)
            dC[rows, t] += _sum_d(w_t, x)
            torch.mul(w_t[:, :, None], C[rows, t, :, None], out=g)
            before = [h, *x[:, :-1].unbind(1)]
            cut = [None] * len(before)  # 0 * inf would be nan
            if reset_t is not None and reset_t.any():
                cut = reset_t[:, :, None, None].unbind(1)
                before = [h_t.masked_fill(r, 0) for h_t, r in zip(before, cut)]
            parts = a.unbind(1), g.unbind(1), before, dt_t[:, :, None].unbind(1), cut
            for a_t, g_t, h_t, step, r in reversed(list(zip(*parts))):
                torch.mul(a_t, g_t.add_(ag), out=ag)
                if r is not None:
                    ag.masked_fill_(r, 0)
                torch.mul(ag, h_t, out=a_t)  # a is x_t of the formulas now
                dA_rows.addcmul_(a_t, step)
            dB[rows, t] += _sum_d(v_t, g)
            gB[rows, t, ch] = _sum_n(B_t, g)
            xA[rows, t, ch] = a.mul_(A[:, ch]).sum(2)
        dg[rows, :, ch] = ag
        dA[:, ch] += dA_rows.sum(0)
    ddelta = xA.addcmul_(gB, u)
    du = gB.mul_(dt)
    if delta_softplus:
        ddelta.mul_(dt.neg_().expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
    dbias = None if delta_bias is None else ddelta.sum((0, 1))
    dD = None if D is None else (w * u).sum((0, 1))
    du = du if D is None else du.addcmul_(D.to(f), w)
    return du, ddelta, dA.t(), dB, dC, dD, dz, dbias, dg.transpose(1, 2)


# ---------------------------------------------------------------- plain torch: the convolution

def _rows_and_masks(x, W, dilation, initial_state, reset):
    """rows (b, span + l, d): the state, then x; tap w reads row t + w dilation from position t. For each tap the mask
    (b, l, 1) of rows in the document of the position that reads them, and one (b, span, 1) for the final state. None
    stands for a mask that hides nothing."""
    b, l, d = x.shape
    span = (W - 1) * dilation
    state = x.new_zeros(b, span, d) if initial_state is None else initial_state.to(x.dtype)
    rows = torch.cat([state, x], 1)
    if reset is None or not reset.any():  # most blocks of a long text hold no boundary, and masks cost more than taps
        return rows, [None] * W, None
    document = F.pad(reset.cumsum(1), (span, 0))[..., None]  # the state belongs to document 0
    same = [document[:, w * dilation : w * dilation + l] == document[:, span:] for w in range(W)]
    return rows, same, document[:, l:] == document[:, -1:]


def _masked(x, mask):
    return x if mask is None else x.masked_fill(~mask, 0)


def _convolved(rows, same, weight, bias, dilation):
    """The sum of the taps, (b, l, d); weight (W, d): the numbers of a tap side by side, so that vectors take them"""
    l, y = rows.shape[1] - (len(weight) - 1) * dilation, None
    for w, weight_w in enumerate(weight):
        x = _masked(rows[:, w * dilation : w * dilation + l], same[w]).to(weight.dtype)
        if y is not None:
            y.addcmul_(x, weight_w)
        else:
            y = x * weight_w if bias is None else torch.addcmul(bias.to(x.dtype), x, weight_w)
    return y


def _conv_fwd_plain(x, weight, bias, silu, initial_state, reset, dilation):
    f, l = _state_dtype(x), x.shape[1]
    rows, same, tail = _rows_and_masks(x, weight.shape[1], dilation, initial_state, reset)
    y = _convolved(rows, same, weight.t().to(f).contiguous(), bias, dilation)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype), _masked(rows[:, l:], tail).clone()


def _conv_bwd_plain(dy, dfinal, x, weight, bias, silu, initial_state, reset, dilation):
    f, (b, l, d), W = _state_dtype(x), x.shape, weight.shape[1]
    rows, same, tail = _rows_and_masks(x, W, dilation, initial_state, reset)
    span, rows, weight = rows.shape[1] - l, rows.to(f), weight.t().to(f).contiguous()  # (W, d)
    dy = rows.new_zeros(b, l, d) if dy is None else dy.to(f)
    if silu:
        dy = torch.ops.aten.silu_backward(dy, _convolved(rows, same, weight, bias, dilation))
    drows, dweight, product = torch.zeros_like(rows), torch.empty_like(weight), torch.empty_like(dy)
    if dfinal is not None:
        drows[:, l:] += _masked(dfinal.to(f), tail)
    for w in range(W):
        seen = slice(w * dilation, w * dilation + l)
        dy_w = _masked(dy, same[w])
        drows[:, seen].addcmul_(dy_w, weight[w])
        dweight[w] = torch.mul(dy_w, _masked(rows[:, seen], same[w]), out=product).sum((0, 1))
    dbias = rows.new_zeros(0) if bias is None else dy.sum((0, 1))
    return drows[:, span:].clone(), dweight.t(), dbias, drows[:, :span].clone()


# ---------------------------------------------------------------- native code: what is compiled
#
# The functions below do one chunk of a scan, or one convolution. Each is written in torch and runs as it stands, or as
# the C++ that Inductor makes of it: vectors along channels, any batch, length and width. A chunk's outputs are views,
# its last arguments. cpu.py has more such functions. A kernel is a function and the shapes of its tensors:
#     b, l, c, q    any length: batch, positions, blocks of channels, what stands side by side (heads, modules)
#     v, T, t       VECTOR channels of a block, CHUNK positions of a chunk
#     n, L          the number of states or taps, for which the code is compiled; l + n - 1
#     r, s          b again, of parameters and of states, whose rows have distances of their own
#     ~             bfloat16 where a call is in bfloat16, else float32
# Tensors are contiguous, with two exceptions. All of one shape with T, t, r or s have the same distances between rows,
# whatever these are; each of those marked ' has distances of its own.

def _realized(x):
    """x, which Inductor now computes once and stores, instead of computing it again at each use"""
    return x.as_strided(x.shape, x.stride())


def _chunk_states(a, x, h, reset):
    """The states before and after each position of h_t = a_t h_(t-1) + x_t, from h. a and x: a tensor a position."""
    before, after = [], []
    for t, (a_t, x_t) in enumerate(zip(a, x)):
        before.append(h if reset is None else h.masked_fill(reset[:, t, None, None], 0))
        h = _realized(a_t * before[t] + x_t)  # (2a)
        after.append(h)
    return before, after


def _chunk_grads(a, x, g, reset):
    """The gradients g_t = x_t + a_(t+1) g_(t+1) of the states, and that of the state before, from a_(T) g_(T) = g."""
    gs = [None] * len(a)
    for t in reversed(range(len(a))):
        gs[t] = _realized(g + x[t])
        g = a[t] * gs[t]
        g = g if reset is None else g.masked_fill(reset[:, t, None, None], 0)
    return gs, g


def blocks(x):
    """(.., d) -> (.., d / VECTOR, VECTOR), as native code takes channels"""
    return x.view(*x.shape[:-1], x.shape[-1] // VECTOR, VECTOR)


def flat(*xs):
    """(.., blocks, VECTOR) -> (.., d): no loop over d has a remainder then"""
    return [x.flatten(-2) for x in xs]


def _chunk_fwd(u, delta, z, B, C, halvings, D, bias, h, y, out, h_out, reset=None, *, softplus, gated):
    """One chunk of the scan, from the state h (b, n, d) to h_out; halvings (n, d) are -A log2(e), so that
    0.5 ** (dt halvings) = exp(dt A). Parameters come once a row. With a gate `out` is y before it."""
    u, delta, z, halvings, D, bias, h, y, out, h_out = flat(u, delta, z, halvings, D, bias, h, y, out, h_out)
    u, delta, z = u.float(), delta.float(), z.float()
    halvings, h, h_out = (x.transpose(1, 2) for x in (halvings, h, h_out))  # (b, d, n): the loop over n is innermost
    raw = delta + bias[:, None]
    dt = _realized(F.softplus(raw) if softplus else raw)
    v = _realized(dt * u)
    a = (0.5 ** (dt[..., None] * halvings[:, None])).unbind(1)  # (4)
    _, states = _chunk_states(a, (v[..., None] * B[:, :, None]).unbind(1), h, reset)
    x = torch.stack([(h_t * C_t).sum(-1) for h_t, C_t in zip(states, C[:, :, None].unbind(1))], 1)  # (2b)
    x = x + D[:, None] * u
    if gated:
        out.copy_(x)
    y.copy_(x * z * torch.sigmoid(z) if gated else x)
    h_out.copy_(states[-1])


def _chunk_bwd(dy, u, delta, z, out, B, C, A, halvings, D, bias, h, g, dA, dD, dbias, du, ddelta, dz, dB, dC, g_out,
               dA_out, dD_out, dbias_out, reset=None, *, softplus, gated):
    """The gradients of one chunk, by the formulas of _scan_bwd_plain. h is the state before it, out what _chunk_fwd
    gave, g (b, n, d) the gradient of the state after it; dA (b, n, d), dD and dbias (b, d) are sums so far."""
    dy, u, delta, z, out, du, ddelta, dz = flat(dy, u, delta, z, out, du, ddelta, dz)
    dy, u, delta, z = dy.float(), u.float(), delta.float(), z.float()
    A, halvings, h, g, dA, g_out, dA_out = flat(A, halvings, h, g, dA, g_out, dA_out)
    D, bias, dD, dbias, dD_out, dbias_out = flat(D, bias, dD, dbias, dD_out, dbias_out)
    raw = delta + bias[:, None]
    dt = _realized(F.softplus(raw) if softplus else raw)
    v = _realized(dt * u)
    w = dy  # the gradient of y before the gate
    if gated:
        s = torch.sigmoid(z)
        w = _realized(dy * z * s)
        dz.copy_(dy * out * s * (1 + z * (1 - s)))
    # dB and dC are sums over d: loops over d, innermost
    v_n, w_n, B_n, C_n = v[:, :, None], w[:, :, None], B[..., None], C[..., None]  # (b, T, n, d)
    a = (0.5 ** (dt[:, :, None] * halvings[:, None])).unbind(1)
    _, states = _chunk_states(a, (v_n * B_n).unbind(1), h, reset)
    grads, _ = _chunk_grads(a, (w_n * C_n).unbind(1), g, reset)
    dC.copy_(torch.stack([(h_t * w_t).sum(-1) for h_t, w_t in zip(states, w_n.unbind(1))], 1))
    dB.copy_(torch.stack([(g_t * v_t).sum(-1) for g_t, v_t in zip(grads, v_n.unbind(1))], 1))
    # The others are sums over n: loops over n, innermost, so all of it once more. To keep the states of a chunk from
    # one loop to the other would cost more: they do not fit into a cache.
    A, halvings, h, g, dA, g_out, dA_out = (x.transpose(1, 2) for x in (A, halvings, h, g, dA, g_out, dA_out))
    dt_d, v_d, w_d, B_d, C_d = dt[..., None], v[..., None], w[..., None], B[:, :, None], C[:, :, None]  # (b, T, d, n)
    a = (0.5 ** (dt_d * halvings[:, None])).unbind(1)
    before, _ = _chunk_states(a, (v_d * B_d).unbind(1), h, reset)
    grads, g = _chunk_grads(a, (w_d * C_d).unbind(1), g, reset)
    gB = torch.stack([(g_t * B_t).sum(-1) for g_t, B_t in zip(grads, B_d.unbind(1))], 1)
    xs = [g_t * (a_t * h_t) for g_t, a_t, h_t in zip(grads, a, before)]
    dx = gB * u + torch.stack([(x * A).sum(-1) for x in xs], 1)
    dx = _realized(dx * torch.where(raw > 20, 1.0, torch.sigmoid(raw)) if softplus else dx)
    du.copy_(gB * dt + D[:, None] * w)
    ddelta.copy_(dx)
    g_out.copy_(g)
    dA_out.copy_(sum((x * dt_t for x, dt_t in zip(xs, dt_d.unbind(1))), dA))
    dD_out.copy_(dD + (w * u).sum(1))
    dbias_out.copy_(dbias + dx.sum(1))


CHUNK_FWD = _chunk_fwd, "~bTcv ~bTcv ~bTcv' bTn bTn rncv rcv rcv sncv ~bTcv btcv sncv"
CHUNK_BWD = _chunk_bwd, ("~bTcv ~bTcv ~bTcv ~bTcv' bTcv bTn bTn rncv rncv rcv rcv sncv sncv sncv scv scv "
                         "~bTcv ~bTcv ~bTcv btn btn sncv sncv scv scv")


def _taps_fwd(rows, weight, bias, y, *, silu):
    """q convolutions side by side of rows (b, q, W-1 + l, d), which begin with the state, with weight (q, W, d): y
    (b, q, l, d)."""
    rows, weight, bias, y = flat(rows, weight, bias, y)
    x = sum((weight[:, w, None] * rows[:, :, w : w + y.shape[2]] for w in range(weight.shape[1])), bias[:, None])
    y.copy_(x * torch.sigmoid(x) if silu else x)


def _taps_bwd(dy, rows, weight, bias, *, silu):
    """The gradients of the rows after the state, of those of the state, of weight and bias."""
    dy, rows, weight, bias = flat(dy.float(), rows, weight, bias)
    W, l = weight.shape[1], dy.shape[2]
    taps, weights = [rows[:, :, w : w + l] for w in range(W)], [x[:, None] for x in weight.unbind(1)]
    if silu:
        y = sum((x * tap for x, tap in zip(weights, taps)), bias[:, None])
        s = torch.sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    dy = _realized(dy)
    padded = F.pad(dy, (0, 0, W - 1, W - 1))  # not kept: a kept one would be one more pass over memory

    def grad(first, length):
        return sum(x * padded[:, :, W - 1 - w + first :][:, :, :length] for w, x in enumerate(weights))

    # row by row first: one sum over all of b l would lose digits
    dweight = torch.stack([(dy * tap).sum(2).sum(0) for tap in taps], 1)
    return grad(W - 1, l), grad(0, W - 1), dweight, dy.sum(2).sum(0)


TAPS = (_taps_fwd, "bqLcv qncv qcv ~bqlcv'"), (_taps_bwd, "~bqlcv' bqLcv qncv qcv")


# ---------------------------------------------------------------- native code: made by Inductor

COMPILING = threading.Lock()  # Inductor's settings are the process's, and so is what is patched
CODE = {  # the settings
    "fx_graph_cache": False,  # its key is the graph alone, not _patched_inductor
    "cpp.enable_floating_point_contract_flag": "fast", "max_pointwise_cat_inputs": 0, "max_fusion_size": 100000,
    "cpp.max_horizontal_fusion_size": 100000, "cpp.dynamic_threads": True,
    "cpp.vec_isa_ok": True,  # the CPU's flags say so; to compile a test of them takes seconds
    "cpp.enable_loop_tail_vec": False,  # a tail of no iterations makes the code slower
    "pick_loop_orders": False,  # loops are in the order as written
    "aggressive_fusion": True, "score_fusion_memory_threshold": 0,  # for SumsTogether
}


@contextlib.contextmanager
def _patched_inductor():
    """Within, Inductor computes 0.5 ** m, sigmoid and softplus by polynomials, as calls would cost the most; casts the
    bits of a vector in a register; makes vectors of as many channels in bfloat16 as in float32, and stores them without
    a mask; and fuses loops that sum before any others, even if they read nothing in common."""
    from unittest.mock import patch  # as Inductor itself does

    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen import cpp
    from torch._inductor.codegen.cpp import DTYPE_TO_CPP, CppVecKernel, CppVecOverrides
    from torch._inductor.lowering import lowerings, make_pointwise
    from torch._inductor.virtualized import V, ops

    class SumsTogether(InductorChoices):
        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            return InductorChoices.can_fuse(scheduler, node1, node2, max(1, shared_data_score))

        @staticmethod
        def score_fusion(scheduler, node1, node2):
            sums = node1.is_reduction() and node2.is_reduction()
            return sums, InductorChoices.score_fusion(scheduler, node1, node2)

    def vector_bits(x, dtype, src_dtype):
        # Inductor's is a loop over the lanes in memory, which GCC makes ten times as slow where it prefers 256 bits
        return f"at::vec::cast<{DTYPE_TO_CPP[dtype]}, {DTYPE_TO_CPP[src_dtype]}>({x})"

    def store(kernel, value, var, index, dtype, *args):
        # Inductor's masks 16 of 32 lanes of bfloat16, and a load of what lies behind these 16 waits for the store
        code, masked = usual_store(kernel, value, var, index, dtype, *args), r"(\w+)\.store\((.+), \S+\(16L?\)\);"
        return code.map(lambda x: re.sub(masked, r"std::memcpy(\2, &\1, 32);", x)) if dtype == torch.bfloat16 else code

    def number(value):
        return ops.constant(value, torch.float32)

    def polynomial(x, first, *rest):
        y = number(first)
        for coefficient in rest:
            y = y * x + number(coefficient)
        return y

    def bits(x):
        return ops.to_dtype_bitcast(x, torch.int32, torch.float32)

    def from_bits(i):
        return ops.to_dtype_bitcast(i, torch.float32, torch.int32)

    def halve(m):
        """2^-m for m > -128, relative error below 1.7e-7: 2^-round(m) by the exponent's bits, the rest by a polynomial.
        It stays at 2^-126 where m > 126. One minimum of integers sees to that: read as integers, positive floats keep
        their order, and negative ones are below all of them."""
        m = from_bits(ops.minimum(bits(m), ops.constant(0x42FC0000, torch.int32)))  # the bits of 126.0
        r = number(12582912.0) - m  # 1.5 2^23: -round(m) is in the last bits now
        f = number(12582912.0) - r - m  # round(m) - m, -0.5 .. 0.5
        y = polynomial(f, 1.32647271e-3, 9.67151286e-3, 5.55073375e-2, 2.40222421e-1, 6.93146978e-1, 1.0)
        return from_bits(bits(y) + (bits(r) << ops.constant(23, torch.int32)))

    def exp_minus_abs(x):
        return halve(ops.abs(x) * number(1.44269504))

    def sigmoid(x):
        w = exp_minus_abs(x)
        return ops.where(x > number(0.0), number(1.0), w) / (number(1.0) + w)

    def softplus(x):
        """max(x, 0) + log(1 + w), w = exp(-|x|), by a polynomial fitted to log(1 + w) / w on 0 .. 1; x above 20."""
        w = exp_minus_abs(x)
        y = polynomial(w, 0.00512610214, -0.0290740647, 0.0775160868, -0.136022476, 0.190768807, -0.24835399,
                       0.333181217, -0.49999445, 0.999999966)
        return ops.where(x > number(20.0), x, ops.relu(x) + y * w)

    def power(base, x):
        assert base == 0.5
        return make_pointwise(halve)(x)

    aten, usual_store = torch.ops.aten, CppVecKernel._get_store_line
    ours = {aten.pow.Scalar: power, aten.sigmoid.default: make_pointwise(sigmoid),
            aten.softplus.default: make_pointwise(softplus)}
    with (patch.dict(lowerings, ours), patch.object(CppVecKernel, "_get_store_line", store),
          patch.object(CppVecOverrides, "to_dtype_bitcast", staticmethod(vector_bits)),
          patch.object(cpp, "get_loop_body_lowp_fp", lambda body: (None, True)),
          V.set_choices_handler(SumsTogether())):
        yield


def _example(shape, n, i=0):
    """A tensor to trace with, argument i of a kernel. Lengths and strides that a call may choose all differ here:
    Inductor would take two equal ones for the same number for ever."""
    dtype = torch.bfloat16 if shape.startswith("~") else torch.float32
    shape, own_distances = shape.strip("~'"), shape.endswith("'")
    b, c = n + VECTOR + 1, n + 40
    sizes = dict(b=b, r=b, s=b, c=c, v=VECTOR, l=n + 70, n=n, q=6 + (n == 6), L=2 * n + 69, T=CHUNK, t=CHUNK)
    gaps = dict(T=11, t=53, r=23, s=31)
    size = [sizes[letter] for letter in shape]
    if own_distances:
        distances = [5003 + 10 * (i + 1) - j for j in range(len(size) - 2)]  # falling: Inductor keeps the order
        return torch.empty_strided(size, [*distances, VECTOR, 1], dtype=dtype, device="cpu")
    gap = len(shape) * (gaps.get(shape[1:2]) or gaps.get(shape[0], 0))
    around = (0, gap) if shape[1:2] == "c" else (0, 64, gap)  # how much longer the tensor is that this is a part of
    whole = [length + more * (gap > 0) for length, more in zip(size, (*around, 0, 0))]
    return torch.empty(whole, dtype=dtype, device="cpu")[tuple(map(slice, size))]


def _inductor_code(function, shapes, n, options):
    """The source of a Python module, C++ included, whose `call` is `function` for tensors of these shapes"""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(*tensors):
        for x, shape in zip(tensors, shapes.split()):
            for letter, length in zip(shape.strip("~'"), x.shape):
                if letter in "nv":
                    int(length)  # makes a constant of it
        return function(*tensors, **options) or ()

    table = {op: f for op, f in select_decomp_table().items() if op is not torch.ops.aten.softplus.default}
    with _patched_inductor(), torch.no_grad():
        graph = make_fx(traced, table, "symbolic")(*(_example(x, n, i) for i, x in enumerate(shapes.split())))
        fake = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with torch._guards.tracing(torch._guards.TracingContext(fake[0].fake_mode)):
            return compile_fx_inner(graph, fake).source_code


def _imported(path):
    """`call` of the Python module there. Its C++ was compiled when it was made, and lies in Inductor's cache."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.call


@functools.cache
def _compiled(function, shapes, n, **options):
    """`function` as native code, or None where that fails, for want of a C++ compiler. Takes some seconds once on a
    machine. The module that Inductor writes is kept among its caches: to trace the function again, only to find its
    code there, would take most of that time in every process."""
    try:
        # that there is a CUDA toolkit but no GPU is nothing to say in the middle of a run on a CPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        sources = [Path(source).read_bytes() for source in (__file__, function.__code__.co_filename)]
        about = (sources, torch.__version__, torch.backends.cpu.get_cpu_capability(), function.__name__, shapes, n,
                 options)
        path = Path(cache_dir(), "hybrid", hashlib.sha256(repr(about).encode()).hexdigest() + ".py")
        with COMPILING, config.patch(CODE):
            with contextlib.suppress(Exception):  # none yet, or a damaged one
                return _imported(path)
            get_cpp_compiler()  # raises where there is none, before seconds of tracing
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(_inductor_code(function, shapes, n, options), encoding="utf-8")
            part.replace(path)
            return _imported(path)
    except Exception as error:  # whatever a compiler can do wrong
        _runs_plain(f"{type(error).__name__}: {error}".splitlines()[0])
        return None


@functools.cache  # warnings forget what they said whenever a compiler is looked for on the PATH
def _runs_plain(reason):
    warnings.warn(f"kernels: no native code for this CPU, the slower plain form runs ({reason})", stacklevel=3)


WRAPPER = {"clear", "size", "stride", "assert_size_stride", "assert_size_stride_grouped", "empty_strided_cpu",
           "reinterpret_tensor", "torch", "float32"}  # what Inductor's wrappers name besides kernels


def _repeated(call):
    """`call`, the wrapper that Inductor wrote around its kernels, for chunks that differ only in the numbers they hold.
    Each call checks the chunk's tensors and makes others, and views of them, which takes as long as the arithmetic of a
    small chunk. Here only the first call does that; the others go to its kernels, with the tensors that it made."""
    wrapper, calls = call.__func__, []
    if not all(name in WRAPPER or name.startswith("cpp_fused") for name in wrapper.__code__.co_names):
        return lambda tensors: call(list(tensors))  # the wrapper of a PyTorch that does more

    def recorded(kernel, place):
        def run(*args):
            calls.append((kernel, [(place.get(id(x)), x) for x in args]))
            kernel(*args)
        return run

    def run(tensors):
        for kernel, args in calls:
            kernel(*[x if i is None else tensors[i] for i, x in args])
        if not calls:
            place = {id(x): i for i, x in enumerate(tensors)}
            kernels = {k: recorded(x, place) for k, x in wrapper.__globals__.items() if k.startswith("cpp_fused")}
            FunctionType(wrapper.__code__, wrapper.__globals__ | kernels)(call.__self__, list(tensors))

    return run


def _native(kernel, device, dtype, elements, n, **options):
    """The native code of a kernel in dtype, or None where the plain form is to run."""
    if not COMPILE or device.type != "cpu" or dtype == torch.float64 or elements < COMPILE_FROM:
        return None
    function, shapes = kernel
    return _compiled(function, shapes if dtype == torch.bfloat16 else shapes.replace("~", ""), n, **options)


class NativeCode(NamedTuple):
    """Native code of an operation between matrix products in dtype, and of its gradient if that is another operation"""

    dtype: torch.dtype
    fwd: Callable
    bwd: Callable | None = None


def native_code(kernels, device, dtype, elements, n=0, **options):
    """NativeCode of one or two kernels such as TAPS for so many elements of dtype, or None where torch's operations are
    to run."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    code = [_native(kernel, device, dtype, elements * CONV_WORK, n, **options) for kernel in kernels]
    return None if None in code else NativeCode(dtype, *code)


# ---------------------------------------------------------------- native code: the scan and the convolution

def _native_dtype(*xs):
    """The type in which native code reads xs: bfloat16 where all have it"""
    return torch.bfloat16 if all(x is None or x.dtype == torch.bfloat16 for x in xs) else torch.float32


def _chunks(l, *xs):
    """For each chunk of time the parts of every x, (b, T, ..), None for an absent one."""
    absent = [None] * -(-l // CHUNK)
    return list(zip(*(absent if x is None else x.unsafe_split(CHUNK, 1) for x in xs)))  # views, in the fewest calls


def _run_chunk(native, function, tensors, reset, **options):
    """Native code where the chunk is whole and holds no boundary; the few others run as they stand."""
    if tensors[0].shape[1] == CHUNK and not (reset is not None and reset.any()):
        native(tensors)
    else:
        function(*tensors, reset, **options)


# Threads share the rows that a chunk function takes, r = b g of d/g channels each. A batch of one is cut into g groups
# of channels, one a thread but of 32 channels at least; else g = 1. Rows are views of whole tensors, their channels in
# c blocks of VECTOR. u, delta and z, their gradients, y and dy are in bfloat16 where the first three are.

def _whole(x):
    """x, with zeros after the channels where they do not fill the last vector"""
    more = -x.shape[-1] % VECTOR
    return F.pad(x, (0, more)) if more else x


def _groups(b, d):
    most = min(torch.get_num_threads(), d // 32) if b == 1 else 1
    return next((g for g in range(most, 1, -1) if d % (g * VECTOR) == 0), 1)


def _rows_d(x, g, dtype=torch.float32, strided=False):
    """(.., b, l, d) -> (.., r, l, c, VECTOR), and so for states (.., b, n, d). strided: positions may lie apart"""
    x = _whole(x.to(dtype))
    x = x if strided and x.stride(-1) == 1 else x.contiguous()
    if g == 1:  # fewer calls: a chunk of a small block is quick
        return blocks(x)
    return x.unflatten(-1, (g, -1, VECTOR)).transpose(-4, -3).flatten(-5, -4)


def _rows_n(x, g):
    """(b, l, n) -> (r, l, n)"""
    x = x.float().contiguous()
    return x if g == 1 else x[:, None].expand(-1, g, -1, -1).flatten(0, 1)


def _rows_of_parameter(x, u, g):
    """A parameter (d,) or (n, d) -> (r, c, VECTOR) or (r, n, c, VECTOR), one for all b; zeros for an absent one"""
    x = _whole(u.new_zeros(u.shape[2], dtype=torch.float32) if x is None else x.float()).contiguous()
    if g == 1:
        return blocks(x).expand(len(u), *x.shape[:-1], -1, -1)
    x = x.unflatten(-1, (g, -1, VECTOR)).movedim(-3, 0)  # (g, .., c, VECTOR)
    return x.expand(len(u), *x.shape).flatten(0, 1)


def _scan_native(kernel, u, delta, A, z, delta_bias, delta_softplus):
    n, dtype = A.shape[1], u.dtype if u.dtype == torch.float64 else _native_dtype(u, delta, z)
    if u.device.type == "cpu":  # native code's powers of 2 would hide a NaN, and what overflows
        steps = delta if delta_bias is None or delta_softplus else delta + delta_bias
        if not ((A <= 0).all() and (delta_softplus or (steps >= 0).all())):
            return None
    return _native(kernel, u.device, dtype, u.numel() * n, n, softplus=delta_softplus, gated=z is not None)


def _scan_fwd_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, save):
    """By native code, chunk by chunk, or where there is none by _scan_fwd_plain. So are the three other *_torch."""
    native = _scan_native(CHUNK_FWD, u, delta, A, z, delta_bias, delta_softplus)
    if native is None:
        return _scan_fwd_plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, save)
    (b, l, d), n, gated = u.shape, A.shape[1], z is not None
    whole, new = d + -d % VECTOR, functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    dtype, g = _native_dtype(u, delta, z), _groups(b, whole)
    y, last = new(b, l, whole, dtype=dtype), new(b, n, whole)
    saved = new(_saved_size(b, l, whole, n, gated, save))
    states, ungated = parts = _saved_parts(saved, b, l, whole, n)
    u_, delta, y_ = (_rows_d(x, g, dtype) for x in (u, delta, y))
    z = _rows_d(u if z is None else z, g, dtype, strided=True)  # u in place of an absent gate, which is not read
    halvings, D, bias = (_rows_of_parameter(x, u, g) for x in ((A.float() / -math.log(2)).t(), D, delta_bias))
    chunks = _chunks(l, u_, delta, z, _rows_n(B, g), _rows_n(C, g), y_, reset)
    in_turn = [_rows_d(h, g) for h in (last, torch.empty_like(last))]
    states = ([*_rows_d(states, g).unbind(0), in_turn[0]] if save
              else [in_turn[(len(chunks) - i) % 2] for i in range(len(chunks) + 1)])  # the last one is `last`
    states[0][:] = 0 if initial_state is None else _rows_d(initial_state.transpose(1, 2), g)
    unread, native = new(b, CHUNK, whole), _repeated(native)
    outs = _rows_d(ungated, g).split(CHUNK, 1) if save and gated else [_rows_d(unread, g)] * len(chunks)
    for (*x, y_t, reset_t), out, h, h_out in zip(chunks, outs, states, states[1:]):
        _run_chunk(native, _chunk_fwd, (*x, halvings, D, bias, h, y_t, out[:, : y_t.shape[1]], h_out), reset_t,
                   softplus=delta_softplus, gated=gated)
    if whole > d:
        y, last, saved = y[..., :d], last[..., :d], torch.cat([x[..., :d].flatten() for x in parts])
    return y.to(u.dtype).contiguous(), last.transpose(1, 2).contiguous(), saved


def _scan_bwd_torch(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, saved):
    native = _scan_native(CHUNK_BWD, u, delta, A, z, delta_bias, delta_softplus)
    if native is None:
        return _scan_bwd_plain(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset,
                               saved)
    (b, l, d), n, gated, A = u.shape, A.shape[1], z is not None, A.t().float().contiguous()
    whole, new = d + -d % VECTOR, functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    dtype, g = _native_dtype(u, delta, z), _groups(b, whole)
    du, ddelta, dz = (new(b, l, whole, dtype=dtype) for _ in range(3))
    dB, dC = (new(b * g, l, n) for _ in range(2))
    A, halvings, D, bias = (_rows_of_parameter(x, u, g) for x in (A, A / -math.log(2), D, delta_bias))
    dy = torch.zeros_like(u) if dy is None else dy
    states, ungated = _saved_parts(saved, b, l, d, n)
    dy, u_, delta, *grads = (_rows_d(x, g, dtype) for x in (dy, u, delta, du, ddelta, dz))
    z, out = _rows_d(u if z is None else z, g, dtype, strided=True), _rows_d(ungated if gated else u, g)
    chunks = _chunks(l, dy, u_, delta, z, out, _rows_n(B, g), _rows_n(C, g), *grads, dB, dC, reset)
    sums = [new(b, rows, whole).zero_() for rows in (n, n, 1, 1)]  # g, dA, dD, dbias
    new_sums = [torch.empty_like(x) for x in sums]
    if dlast is not None:
        sums[0][..., :d].copy_(dlast.transpose(1, 2))
    ins, outs = ([*(_rows_d(x, g) for x in xs[:2]), *(_rows_d(x, g)[:, 0] for x in xs[2:])] for xs in (sums, new_sums))
    native = _repeated(native)
    for (*x, reset_t), h in reversed(list(zip(chunks, _rows_d(states, g)))):
        _run_chunk(native, _chunk_bwd, (*x[:7], A, halvings, D, bias, h, *ins, *x[7:], *outs), reset_t,
                   softplus=delta_softplus, gated=gated)
        ins, outs = outs, ins
    sums = sums if len(chunks) % 2 == 0 else new_sums
    du, ddelta, dz, dlast, dA, dD, dbias = (x[..., :d] if whole > d else x for x in (du, ddelta, dz, *sums))
    dB, dC = (x if g == 1 else x.unflatten(0, (b, g)).sum(1) for x in (dB, dC))
    return du, ddelta, dA.sum(0).t(), dB, dC, dD.sum((0, 1)), dz, dbias.sum((0, 1)), dlast.transpose(1, 2)


def _side_by_side(rows, weight, bias):
    """A convolution's rows and parameters as those of one of q = 1"""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return [blocks(_whole(x.float()).contiguous()) for x in (rows[:, None], weight.t()[None], bias[None])]


def _conv_native(kernel, x, weight, silu, reset, dilation):
    if dilation == 1 and not (reset is not None and reset.any()):
        return _native(kernel, x.device, x.dtype, x.numel() * CONV_WORK, weight.shape[1], silu=silu)


def _conv_fwd_torch(x, weight, bias, silu, initial_state, reset, dilation):
    native = _conv_native(TAPS[0], x, weight, silu, reset, dilation)
    if native is None:
        return _conv_fwd_plain(x, weight, bias, silu, initial_state, reset, dilation)
    rows, _, _ = _rows_and_masks(x, weight.shape[1], 1, initial_state, None)
    y = torch.empty(*x.shape[:2], x.shape[2] + -x.shape[2] % VECTOR, dtype=_native_dtype(x), device=x.device)
    native([*_side_by_side(rows, weight, bias), blocks(y[:, None])])
    return y[..., : x.shape[2]].to(x.dtype).contiguous(), rows[:, x.shape[1] :].clone()


def _conv_bwd_torch(dy, dfinal, x, weight, bias, silu, initial_state, reset, dilation):
    native = None if dy is None else _conv_native(TAPS[1], x, weight, silu, reset, dilation)
    if native is None:
        return _conv_bwd_plain(dy, dfinal, x, weight, bias, silu, initial_state, reset, dilation)
    (_, l, d), span = x.shape, weight.shape[1] - 1
    rows, _, _ = _rows_and_masks(x, span + 1, 1, initial_state, None)
    dy = blocks(_whole(dy.to(_native_dtype(x))).contiguous())
    grads = native([dy[:, None], *_side_by_side(rows, weight, bias)])
    dx, dstate, dweight, dbias = (grad.squeeze(dim)[..., :d] for grad, dim in zip(grads, (1, 1, 0, 0)))
    if dfinal is not None:  # the last rows of state and x
        dx[:, max(0, l - span) :] += dfinal[:, max(0, span - l) :]
        dstate[:, l:] += dfinal[:, : max(0, span - l)]
    return dx, dweight.t(), dbias, dstate


# ---------------------------------------------------------------- Triton

if triton is not None:
    INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
    PTX = tl.constexpr(not INTERPRET)  # Triton's interpreter cannot run inline PTX
    # Triton gives the lanes of a warp to the last dimensions of a tensor first, before 3.7 to the first ones
    AXIS = tl.constexpr(2 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 0)
    LANES, SEGMENT = 32, 128  # channels of a small program; positions between two states kept for the backward
    # E channels of a thread; blocks of U positions, of PASS in the backward's first pass; AHEAD positions that B and C
    # are read in advance. On an H200 twice the U forward is 6 % faster, and takes 2.5 times as long to compile.
    FWD, BWD = {"E": 2, "U": 8, "AHEAD": 8}, {"E": 2, "U": 4, "AHEAD": 4, "PASS": 8}

    @triton.jit
    def _exp2(x):
        # one instruction; tl.exp2 takes four, for results below 2^-126, which are as good as zero here
        if PTX:
            return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return tl.exp2(x)

    @triton.jit
    def _sigmoid(x):
        e = 1.0 + _exp2(-1.4426950408889634 * x)
        if PTX:
            return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], tl.float32, True, 1)
        else:
            return 1.0 / e

    @triton.jit
    def _softplus(x):
        # max(x, 0) + log1p(e^-|x|), log1p by a minimax polynomial: relative error 2e-7, or |x| 6e-8 where e^x is tiny
        e = _exp2(-1.4426950408889634 * tl.abs(x))
        p = 0.005232690367847681 * e - 0.029505228623747826
        p = p * e + 0.07822594046592712
        p = p * e - 0.13663245737552643
        p = p * e + 0.19106008112430573
        p = p * e - 0.2484298199415207
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        return p * e + tl.maximum(x, 0.0)

    @triton.jit
    def _channel(ptr, d, DIM: tl.constexpr):
        # a (d,) parameter that may be absent
        if ptr is not None:
            return tl.load(ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
        else:
            return tl.zeros(d.shape, tl.float32)

    # Both scans give a channel's states to J lanes of a warp, K to each, and take one position after another; a thread
    # does so for E channels, for which it reads B and C once. Tensors are (R, Q, J), R warps, Q threads of J lanes.
    # What has no states (u, delta, z, y) lies over the lanes by position: of a block of U = S T positions from t on,
    # lane j has t + i S + j % S, i < T. So one lane works out a step size, the others get it by a shuffle, and the sum
    # over states that y is ends in the lane that writes it. There are few warps, so memory is read long before it is
    # needed: a whole block while the one before it is worked on, B and C some positions ahead.

    @triton.jit
    def _places(R: tl.constexpr, Q: tl.constexpr, J: tl.constexpr, E: tl.constexpr):
        # of each thread: its lane, and the first of its channels, counted in the program
        if AXIS == 2:
            r, q, j = tl.arange(0, R)[:, None, None], tl.arange(0, Q)[None, :, None], tl.arange(0, J)[None, None, :]
        else:
            r, q, j = tl.arange(0, R)[None, None, :], tl.arange(0, Q)[None, :, None], tl.arange(0, J)[:, None, None]
        c = (r * Q + q) * E + 0 * j
        return j + 0 * c, c

    @triton.jit
    def _unstack(x, T: tl.constexpr):
        # (R, Q, J, T) -> T of (R, Q, J)
        if T == 1:
            return (tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2]]),)
        elif T == 2:
            return tl.split(x)
        else:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], T // 2, 2]))
            even = _unstack(even, T // 2)
            odd = _unstack(odd, T // 2)
            rows = ()
            for i in tl.static_range(T // 2):
                rows += (even[i], odd[i])
            return rows

    @triton.jit
    def _stack(rows, T: tl.constexpr):
        # T of (R, Q, J) -> (R, Q, J, T)
        if T == 1:
            return rows[0][:, :, :, None]
        elif T == 2:
            return tl.join(rows[0], rows[1])
        else:
            x = tl.join(_stack(rows[::2], T // 2), _stack(rows[1::2], T // 2))
            return tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], T])

    @triton.jit
    def _load_block(ptr, t, d, L, ROW: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
                    E: tl.constexpr, EVEN: tl.constexpr):
        # a block as memory has it: T of (R, Q, J, E)
        e = tl.arange(0, E)[None, None, None, :]
        x = ()
        for i in tl.static_range(T):
            at = ptr + ((t + i * S).to(tl.int64) * ROW + d)[:, :, :, None] + e
            if EVEN:
                x += (tl.load(at),)
            else:
                x += (tl.load(at, mask=(t + i * S < L)[:, :, :, None] & (d[:, :, :, None] + e < DIM), other=0.0),)
        return x

    @triton.jit
    def _unpack(x, T: tl.constexpr, E: tl.constexpr):
        # a block from _load_block as T E of (R, Q, J), float32
        y = ()
        for i in tl.static_range(T):
            y += _unstack(x[i].to(tl.float32), E)
        return y

    @triton.jit
    def _store_block(ptr, x, t, d, L, DIM: tl.constexpr, S: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
                     EVEN: tl.constexpr):
        e = tl.arange(0, E)[None, None, None, :]
        for i in tl.static_range(T):
            at = ptr + ((t + i * S).to(tl.int64) * DIM + d)[:, :, :, None] + e
            if EVEN:
                tl.store(at, _stack(x[i * E : i * E + E], E))
            else:
                ok = (t + i * S < L)[:, :, :, None] & (d[:, :, :, None] + e < DIM)
                tl.store(at, _stack(x[i * E : i * E + E], E), mask=ok)

    @triton.jit
    def _load_flags(reset, t, L, S: tl.constexpr, T: tl.constexpr):
        x = ()
        for i in tl.static_range(T):
            if reset is None:
                x += (t,)
            else:
                x += (tl.load(reset + t + i * S, mask=t + i * S < L, other=0),)
        return x

    @triton.jit
    def _load_numbers(ptr, M: tl.constexpr):
        # the M numbers behind each of (R, Q, J) pointers, at most 4 a load
        if M <= 4:
            return _unstack(tl.load(ptr[:, :, :, None] + tl.arange(0, M)[None, None, None, :]), M)
        else:
            return _load_numbers(ptr, M // 2) + _load_numbers(ptr + M // 2, M // 2)

    @triton.jit
    def _states_at(d, j, DIM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        # where the K states of each lane lie in (d, n), and whether they are there
        n = (j * K)[:, :, :, None] + tl.arange(0, K)[None, None, None, :]
        ok = (d < DIM)[:, :, :, None]
        if j.shape[AXIS] * K != N:
            ok = ok & (n < N)
        return d[:, :, :, None] * N + n, ok

    @triton.jit
    def _load_states(ptr, d, j, DIM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr):
        x = ()
        for e in tl.static_range(E):
            at, ok = _states_at(d + e, j, DIM, N, K)
            x += _unstack(tl.load(ptr + at, mask=ok, other=0.0), K)
        return x

    @triton.jit
    def _store_states(ptr, x, d, j, DIM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr):
        for e in tl.static_range(E):
            at, ok = _states_at(d + e, j, DIM, N, K)
            tl.store(ptr + at, _stack(x[e * K : e * K + K], K), mask=ok)

    @triton.jit
    def _step_size(raw, t, L, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
        x = _softplus(raw) if SOFTPLUS else raw
        if not EVEN:  # past the end nothing decays and nothing is added
            x = tl.where(t < L, x, 0.0)
        return x

    @triton.jit
    def _from_lane(x, m: tl.constexpr):
        # (R, Q, J), every lane with what lane m has
        return tl.gather(x, tl.full(x.shape, m, tl.int32), AXIS)

    @triton.jit
    def _reset_exponent(flag, m: tl.constexpr, reset):
        # what a reset at the position in lane m adds to the exponents of its decays
        if reset is None:
            return 0.0
        else:
            return _from_lane(tl.where(flag != 0, -1e30, 0.0), m)

    @triton.jit
    def _decay(x, a, end, reset):
        if reset is None:
            return _exp2(x * a)
        else:
            return _exp2(x * a + end)

    @triton.jit
    def _advance(h, x, v, a, B, flag, reset, m: tl.constexpr, K: tl.constexpr, E: tl.constexpr):
        # h_t = exp(dt A) h_(t-1) + dt u B of the position in lane m
        new = ()
        end = _reset_exponent(flag, m, reset)
        for e in tl.static_range(E):
            xm = _from_lane(x[e], m)
            vm = _from_lane(v[e], m)
            for n in tl.static_range(K):
                new += (_decay(xm, a[e * K + n], end, reset) * h[e * K + n] + vm * B[n],)
        return new

    @triton.jit
    def _dot(x, y, K: tl.constexpr):
        # the sum of x[n] y[n]
        s = x[0] * y[0]
        for n in tl.static_range(1, K):
            s += x[n] * y[n]
        return s

    @triton.jit
    def _sum_lanes(x, j, S: tl.constexpr):
        # S of (R, Q, J) -> (R, Q, J), the sum over lanes j, j + S, ... of what x[j % S] was in all lanes
        if S == 1:
            return x[0]
        else:
            upper = j % S >= S // 2
            y = ()
            for i in tl.static_range(S // 2):
                mine = tl.where(upper, x[S // 2 + i], x[i])
                y += (mine + tl.gather(tl.where(upper, x[i], x[S // 2 + i]), j ^ (S // 2), AXIS),)
            return _sum_lanes(y, j, S // 2)

    @triton.jit
    def _sum_groups(x, j, S: tl.constexpr):
        # sums over the lanes with the same j % S
        if S >= j.shape[AXIS]:
            return x
        else:
            return _sum_groups(x + tl.gather(x, j ^ S, AXIS), j, 2 * S)

    @triton.jit
    def _total(x, j, S: tl.constexpr, E: tl.constexpr):
        # x[m E + e], the part of each lane in a sum for position m and channel e -> E of (R, Q, J), position j % S
        y = ()
        for e in tl.static_range(E):
            y += (_sum_groups(_sum_lanes(x[e::E], j, S), j, S),)
        return y

    @triton.jit
    def _sum_channels(x, M: tl.constexpr):
        # M of (R, Q, J) -> (J M,); the split makes Triton move channels into registers, where a sum costs an addition
        J: tl.constexpr = x[0].shape[AXIS]
        y = _stack(x, M)
        if AXIS == 0:
            y = tl.permute(y, [2, 1, 0, 3])
        y = tl.reshape(y, [y.shape[0] * y.shape[1] // 2, 2, J * M])
        even, odd = tl.split(tl.permute(y, [0, 2, 1]))
        return tl.sum(even + odd, 0)

    @triton.jit(do_not_specialize=["L"])
    def _scan_fwd_kernel(u, delta, z, A, BC, D, bias, reset, y, last, saved, L, u_batch, delta_batch, z_batch,
                         U_ROW: tl.constexpr, DELTA_ROW: tl.constexpr, Z_ROW: tl.constexpr, DIM: tl.constexpr,
                         N: tl.constexpr, SOFTPLUS: tl.constexpr, EVERY: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
                         J: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
                         AHEAD: tl.constexpr, EVEN: tl.constexpr):
        tiles: tl.constexpr = (DIM + R * Q * E - 1) // (R * Q * E)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        batches = tl.num_programs(0) // tiles
        j, c = _places(R, Q, J, E)
        d = tl.program_id(0) % tiles * (R * Q * E) + c
        u += b * u_batch
        delta += b * delta_batch
        y += b * L * DIM
        last += b * DIM * N
        if z is not None:
            z += b * z_batch
        if reset is not None:
            reset += b * L
        BC += b * tl.cdiv(L, EVERY) * (EVERY * 2 * J * K) + j * (2 * K)
        shift = ()
        skip = ()
        for e in tl.static_range(E):
            shift += (_channel(bias, d + e, DIM),)
            skip += (_channel(D, d + e, DIM),)
        a = [rate * 1.4426950408889634 for rate in _load_states(A, d, j, DIM, N, K, E)]  # A log2(e)
        h = _load_states(last, d, j, DIM, N, K, E)
        t = j % S
        u_next = _load_block(u, t, d, L, U_ROW, DIM, S, T, E, EVEN)
        delta_next = _load_block(delta, t, d, L, DELTA_ROW, DIM, S, T, E, EVEN)
        flags_next = _load_flags(reset, t, L, S, T)
        if z is not None:
            z_next = _load_block(z, t, d, L, Z_ROW, DIM, S, T, E, EVEN)
        BC_next = ()
        for m in tl.static_range(AHEAD):
            BC_next += (_load_numbers(BC + m * (2 * J * K), 2 * K),)
        for start in range(0, L, S * T):
            if saved is not None:  # noqa: SIM102 (known when compiled, the other is not)
                if start % EVERY == 0:
                    _store_states(saved + (start // EVERY * batches + b) * N * DIM, h, d, j, DIM, N, K, E)
            t = start + j % S
            us = _unpack(u_next, T, E)
            raw = _unpack(delta_next, T, E)
            flags = flags_next
            ahead = (tl.minimum(start + S * T, L - S * T) if EVEN else start + S * T) + j % S
            u_next = _load_block(u, ahead, d, L, U_ROW, DIM, S, T, E, EVEN)
            delta_next = _load_block(delta, ahead, d, L, DELTA_ROW, DIM, S, T, E, EVEN)
            flags_next = _load_flags(reset, ahead, L, S, T)
            if z is not None:
                zs = _unpack(z_next, T, E)
                z_next = _load_block(z, ahead, d, L, Z_ROW, DIM, S, T, E, EVEN)
            ys = ()
            for i in tl.static_range(T):
                x = ()
                v = ()
                for e in tl.static_range(E):
                    xe = _step_size(raw[i * E + e] + shift[e], t + i * S, L, SOFTPLUS, EVEN)
                    x += (xe,)
                    v += (xe * us[i * E + e],)
                parts = ()
                for m in tl.static_range(S):
                    BCm = BC_next[0]
                    BC_next = BC_next[1:]
                    BC_next += (_load_numbers(BC + (start + (i * S + m + AHEAD)) * (2 * J * K), 2 * K),)
                    h = _advance(h, x, v, a, BCm, flags[i], reset, m, K, E)
                    for e in tl.static_range(E):
                        parts += (_dot(h[e * K : e * K + K], BCm[K:], K),)
                total = _total(parts, j, S, E)
                for e in tl.static_range(E):
                    o = total[e] + skip[e] * us[i * E + e]
                    if z is not None:
                        o *= zs[i * E + e] * _sigmoid(zs[i * E + e])
                    ys += (o,)
            _store_block(y, ys, t, d, L, DIM, S, T, E, EVEN)
        _store_states(last, h, d, j, DIM, N, K, E)

    # Segment after segment, right to left. From the state saved at its start once through it, the state before every
    # block into `kept`, which is each program's own. Then back, block by block: its decays a_t and what is left of the
    # state before, a_t h_(t-1), into registers, and from the right the gradient of h_t, g_t = w_t C_t + k_(t+1), and
    # k_t = a_t g_t.
    @triton.jit(do_not_specialize=["L"])
    def _scan_bwd_kernel(dy, u, delta, z, A, BC, D, bias, reset, saved, dh, du, ddelta, dz, sums, dBC, kept, L,
                         dy_batch, u_batch, delta_batch, z_batch, DY_ROW: tl.constexpr, U_ROW: tl.constexpr,
                         DELTA_ROW: tl.constexpr, Z_ROW: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr,
                         SOFTPLUS: tl.constexpr, EVERY: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
                         J: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
                         AHEAD: tl.constexpr, PASS: tl.constexpr, EVEN: tl.constexpr):
        tiles: tl.constexpr = (DIM + R * Q * E - 1) // (R * Q * E)
        U: tl.constexpr = S * T
        W: tl.constexpr = 2 * J * K
        BLOCKS: tl.constexpr = EVERY // U
        b = (tl.program_id(0) // tiles).to(tl.int64)
        batches = tl.num_programs(0) // tiles
        j, c = _places(R, Q, J, E)
        none = tl.zeros(j.shape, tl.float32)
        d = tl.program_id(0) % tiles * (R * Q * E) + c
        segments = tl.cdiv(L, EVERY)
        dy += b * dy_batch
        u += b * u_batch
        delta += b * delta_batch
        du += b * L * DIM
        ddelta += b * L * DIM
        dh += b * DIM * N
        if z is not None:
            z += b * z_batch
            dz += b * L * DIM
        if reset is not None:
            reset += b * L
        BC += b * segments * (EVERY * W) + j * (2 * K)
        dBC += tl.program_id(0).to(tl.int64) * segments * (EVERY * W) + tl.arange(0, U * W)
        kept += tl.program_id(0).to(tl.int64) * (BLOCKS * R * Q * E * J * K)
        sums += b * (N + 2) * DIM
        shift = ()
        skip = ()
        for e in tl.static_range(E):
            shift += (_channel(bias, d + e, DIM),)
            skip += (_channel(D, d + e, DIM),)
        dskip = (none,) * E
        dshift = (none,) * E
        da = (none,) * (E * K)
        a = [rate * 1.4426950408889634 for rate in _load_states(A, d, j, DIM, N, K, E)]  # A log2(e)
        k = _load_states(dh, d, j, DIM, N, K, E)
        for segment in range(segments - 1, -1, -1):
            first = segment * EVERY
            final = tl.minimum(first + EVERY, tl.cdiv(L, U) * U) - U
            t = first + j % S
            h = _load_states(saved + (segment * batches + b) * N * DIM, d, j, DIM, N, K, E)
            u_next = _load_block(u, t, d, L, U_ROW, DIM, S, PASS // S, E, EVEN)
            delta_next = _load_block(delta, t, d, L, DELTA_ROW, DIM, S, PASS // S, E, EVEN)
            flags_next = _load_flags(reset, t, L, S, PASS // S)
            B_next = ()
            for m in tl.static_range(AHEAD):
                B_next += (_load_numbers(BC + (first + m) * W, K),)
            for start in range(first, final + U, PASS):
                t = start + j % S
                us = _unpack(u_next, PASS // S, E)
                raw = _unpack(delta_next, PASS // S, E)
                flags = flags_next
                end = final + U  # where not EVEN, nothing is read twice: past L nothing is read
                there = tl.minimum(start + PASS, end - PASS) if EVEN else tl.where(start + PASS < end, start + PASS, L)
                there += j % S
                u_next = _load_block(u, there, d, L, U_ROW, DIM, S, PASS // S, E, EVEN)
                delta_next = _load_block(delta, there, d, L, DELTA_ROW, DIM, S, PASS // S, E, EVEN)
                flags_next = _load_flags(reset, there, L, S, PASS // S)
                for i in tl.static_range(PASS // S):
                    if i * S % U == 0:
                        block = (start - first + i * S) // U
                        _store_states(kept + block * (R * Q * E * J * K), h, c, j, R * Q * E, J * K, K, E)
                    x = ()
                    v = ()
                    for e in tl.static_range(E):
                        xe = _step_size(raw[i * E + e] + shift[e], t + i * S, L, SOFTPLUS, EVEN)
                        x += (xe,)
                        v += (xe * us[i * E + e],)
                    for m in tl.static_range(S):
                        Bm = B_next[0]
                        B_next = B_next[1:]
                        B_next += (_load_numbers(BC + (start + (i * S + m + AHEAD)) * W, K),)
                        h = _advance(h, x, v, a, Bm, flags[i], reset, m, K, E)
            tl.debug_barrier()  # `kept` is written
            t = final + j % S
            u_next = _load_block(u, t, d, L, U_ROW, DIM, S, T, E, EVEN)
            delta_next = _load_block(delta, t, d, L, DELTA_ROW, DIM, S, T, E, EVEN)
            flags_next = _load_flags(reset, t, L, S, T)
            dy_next = _load_block(dy, t, d, L, DY_ROW, DIM, S, T, E, EVEN)
            if z is not None:
                z_next = _load_block(z, t, d, L, Z_ROW, DIM, S, T, E, EVEN)
            h_next = _load_states(kept + (final - first) // U * (R * Q * E * J * K), c, j, R * Q * E, J * K, K, E)
            BC_next = ()
            for m in tl.static_range(U):
                BC_next += (_load_numbers(BC + (final + m) * W, 2 * K),)
            for start in range(final, first - U, -U):
                t = start + j % S
                us = _unpack(u_next, T, E)
                raw = _unpack(delta_next, T, E)
                dys = _unpack(dy_next, T, E)
                if z is not None:
                    zs = _unpack(z_next, T, E)
                flags = flags_next
                h = h_next
                BCs = BC_next
                x = ()
                v = ()
                w = ()  # the gradient of y before the gate
                for i in tl.static_range(T):
                    for e in tl.static_range(E):
                        xe = _step_size(raw[i * E + e] + shift[e], t + i * S, L, SOFTPLUS, EVEN)
                        x += (xe,)
                        v += (xe * us[i * E + e],)
                        we = dys[i * E + e]
                        if z is not None:
                            we *= zs[i * E + e] * _sigmoid(zs[i * E + e])
                        w += (we,)
                decay = ()
                left = ()
                dC = ()
                parts = ()
                for i in tl.static_range(T):
                    for m in tl.static_range(S):
                        BCm = BCs[i * S + m]
                        new = ()
                        wm = ()
                        end = _reset_exponent(flags[i], m, reset)
                        for e in tl.static_range(E):
                            xm = _from_lane(x[i * E + e], m)
                            vm = _from_lane(v[i * E + e], m)
                            wm += (_from_lane(w[i * E + e], m),)
                            for n in tl.static_range(K):
                                f = _decay(xm, a[e * K + n], end, reset)
                                decay += (f,)
                                left += (f * h[e * K + n],)
                                new += (f * h[e * K + n] + vm * BCm[n],)
                            parts += (_dot(new[e * K : e * K + K], BCm[K:], K),)
                        h = new
                        for n in tl.static_range(K):
                            dC += (_dot(h[n::K], wm, E),)
                # What follows is to stay below what came before: a warp has six counters for results on their way, so a
                # shuffle that shares one with a load from memory is as late as the load.
                tl.debug_barrier()
                ahead = tl.maximum(start - U, first)
                there = (ahead if EVEN else tl.where(start > first, ahead, L)) + j % S
                u_next = _load_block(u, there, d, L, U_ROW, DIM, S, T, E, EVEN)
                delta_next = _load_block(delta, there, d, L, DELTA_ROW, DIM, S, T, E, EVEN)
                dy_next = _load_block(dy, there, d, L, DY_ROW, DIM, S, T, E, EVEN)
                flags_next = _load_flags(reset, there, L, S, T)
                if z is not None:
                    z_next = _load_block(z, there, d, L, Z_ROW, DIM, S, T, E, EVEN)
                h_next = _load_states(kept + (ahead - first) // U * (R * Q * E * J * K), c, j, R * Q * E, J * K, K, E)
                dB = ()
                B_parts = ()
                A_parts = ()
                BC_next = ()
                for i in tl.static_range(T - 1, -1, -1):
                    for m in tl.static_range(S - 1, -1, -1):
                        BCm = BCs[i * S + m]
                        k_new = ()
                        da_new = ()
                        g = ()
                        vm = ()
                        q = ()
                        for e in tl.static_range(E):
                            xm = _from_lane(x[i * E + e], m)
                            wm = _from_lane(w[i * E + e], m)
                            vm += (_from_lane(v[i * E + e], m),)
                            for n in tl.static_range(K):
                                g += (wm * BCm[K + n] + k[e * K + n],)
                                k_new += (decay[((i * S + m) * E + e) * K + n] * g[e * K + n],)
                                q += (g[e * K + n] * left[((i * S + m) * E + e) * K + n],)
                                da_new += (da[e * K + n] + q[e * K + n] * xm,)
                        k = k_new
                        da = da_new
                        dB_new = ()
                        for n in tl.static_range(K):
                            dB_new += (_dot(g[n::K], vm, E),)
                        dB = dB_new + dB
                        B_new = ()
                        A_new = ()
                        for e in tl.static_range(E):
                            B_new += (_dot(g[e * K : e * K + K], BCm, K),)
                            A_new += (_dot(q[e * K : e * K + K], a[e * K : e * K + K], K),)
                        B_parts = B_new + B_parts
                        A_parts = A_new + A_parts
                        BC_next += (_load_numbers(BC + (ahead + (U - 1 - i * S - m)) * W, 2 * K),)
                tl.store(dBC + start * W, _sum_channels(dC + dB, 2 * U * K))
                dus = ()
                dxs = ()
                dzs = ()
                for i in tl.static_range(T):
                    y = _total(parts[i * S * E : (i + 1) * S * E], j, S, E)
                    gB = _total(B_parts[i * S * E : (i + 1) * S * E], j, S, E)
                    gaA = _total(A_parts[i * S * E : (i + 1) * S * E], j, S, E)
                    dskip_new = ()
                    dshift_new = ()
                    for e in tl.static_range(E):
                        ue = us[i * E + e]
                        we = w[i * E + e]
                        if z is not None:
                            ze = zs[i * E + e]
                            s = _sigmoid(ze)
                            dzs += (dys[i * E + e] * (y[e] + skip[e] * ue) * (s + s * ze * (1.0 - s)),)
                        dus += (x[i * E + e] * gB[e] + skip[e] * we,)
                        dx = gaA[e] * 0.6931471805599453 + ue * gB[e]  # A is A log2(e) here
                        if SOFTPLUS:
                            dx *= _sigmoid(raw[i * E + e] + shift[e])
                        if not EVEN:
                            dx = tl.where((t + i * S < L) & (d + e < DIM), dx, 0.0)
                        dxs += (dx,)
                        dskip_new += (dskip[e] + we * ue,)
                        dshift_new += (dshift[e] + dx,)
                    dskip = dskip_new
                    dshift = dshift_new
                _store_block(du, dus, t, d, L, DIM, S, T, E, EVEN)
                _store_block(ddelta, dxs, t, d, L, DIM, S, T, E, EVEN)
                if z is not None:
                    _store_block(dz, dzs, t, d, L, DIM, S, T, E, EVEN)
            tl.debug_barrier()  # all have read what the next segment overwrites
        _store_states(dh, k, d, j, DIM, N, K, E)
        _store_states(sums, da, d, j, DIM, N, K, E)
        for e in tl.static_range(E):
            rest = sums + N * DIM + d + e
            once = (j == 0) & (d + e < DIM)
            tl.store(rest, tl.sum(tl.where(j < S, dskip[e], 0.0), AXIS, keep_dims=True) + none, mask=once)
            tl.store(rest + DIM, tl.sum(tl.where(j < S, dshift[e], 0.0), AXIS, keep_dims=True) + none, mask=once)

    @triton.jit
    def _conv_row(x, state, q, d, L, phase, x_row, DIM: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr):
        # row q of a phase: W - 1 rows of the state, then the rows of x
        t = (q - (W - 1)) * STEP + phase
        ok = d < tl.where((t >= 0) & (t < L), DIM, 0)
        row = tl.load(x + t * x_row + d, mask=ok, other=0.0).to(tl.float32)
        if state is not None:
            ok = d < tl.where((q >= 0) & (t < 0), DIM, 0)
            row += tl.load(state + (q * STEP + phase) * DIM + d, mask=ok, other=0.0).to(tl.float32)
        return row

    @triton.jit
    def _conv_document(document, q, L, phase, W: tl.constexpr, STEP: tl.constexpr):
        # the document that row q is in; the state is in document 0
        t = (q - (W - 1)) * STEP + phase
        if document is not None:
            return tl.load(document + t, mask=(t >= 0) & (t < L), other=0)
        else:
            return 0

    @triton.jit
    def _tap(weight, document, reader, RESET: tl.constexpr):
        if RESET:
            return tl.where(document == reader, weight, 0.0)
        else:
            return weight

    # With a dilation of STEP each of STEP phases is a sequence of its own; position j of it reads rows j .. j + W - 1.
    @triton.jit(do_not_specialize=["parts", "L"])
    def _conv_fwd_kernel(x, weight, bias, state, document, y, parts, L, x_batch, x_row, DIM: tl.constexpr,
                         W: tl.constexpr, STEP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
                         T: tl.constexpr, BD: tl.constexpr):
        RESET: tl.constexpr = document is not None
        tiles: tl.constexpr = (DIM + BD - 1) // BD
        d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
        part = tl.program_id(0) // tiles
        first = part % parts // STEP * ROWS
        phase = (part % STEP).to(tl.int64)
        b = (part // parts).to(tl.int64)
        x += b * x_batch
        if state is not None:
            state += b * ((W - 1) * STEP * DIM)
        if RESET:
            document += b * L
        shift = _channel(bias, d, DIM)
        weights = ()
        rows = ()
        docs = ()
        for w in tl.static_range(W):
            weights += (_channel(weight + w * DIM, d, DIM),)
        for w in tl.static_range(W - 1):
            rows += (_conv_row(x, state, first + w, d, L, phase, x_row, DIM, W, STEP),)
            docs += (_conv_document(document, first + w, L, phase, W, STEP),)
        for i in range(first, tl.minimum(first + ROWS, tl.cdiv(L - phase, STEP)), T):
            for j in tl.static_range(T):
                rows += (_conv_row(x, state, i + j + W - 1, d, L, phase, x_row, DIM, W, STEP),)
                docs += (_conv_document(document, i + j + W - 1, L, phase, W, STEP),)
            for j in tl.static_range(T):
                o = shift
                for w in tl.static_range(W):
                    o += _tap(weights[w], docs[j + w], docs[j + W - 1], RESET) * rows[j + w]
                if SILU:
                    o *= _sigmoid(o)
                t = (i + j) * STEP + phase
                tl.store(y + (b * L + t) * DIM + d, o, mask=d < tl.where(t < L, DIM, 0))
            rows = rows[T:]
            docs = docs[T:]

    # The gradients of rows first .. first + ROWS - 1; positions first - (W - 1) .. first + ROWS - 1 contribute to them.
    @triton.jit(do_not_specialize=["parts", "L"])
    def _conv_bwd_kernel(dy, dfinal, x, weight, bias, state, document, dx, dstate, dweight, parts, L, dy_batch,
                         dy_row, x_batch, x_row, DIM: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
                         SILU: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
        RESET: tl.constexpr = document is not None
        SPAN: tl.constexpr = (W - 1) * STEP
        tiles: tl.constexpr = (DIM + BD - 1) // BD
        d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
        part = tl.program_id(0) // tiles
        first = part % parts // STEP * ROWS
        phase = (part % STEP).to(tl.int64)
        b = (part // parts).to(tl.int64)
        x += b * x_batch
        dy += b * dy_batch + d
        dx += b * L * DIM + d
        dstate += b * SPAN * DIM + d
        if state is not None:
            state += b * SPAN * DIM
        if dfinal is not None:
            dfinal += b * SPAN * DIM + d
        if RESET:
            document += b * L
            latest = tl.load(document + L - 1)
        shift = _channel(bias, d, DIM)
        total = tl.zeros([BD], tl.float32)
        weights = ()
        dweights = (total,) * W
        rows = ()
        docs = ()
        grads = (total,) * (W - 1)
        for w in tl.static_range(W):
            weights += (_channel(weight + w * DIM, d, DIM),)
        for w in tl.static_range(W - 1):
            rows += (_conv_row(x, state, first + w - (W - 1), d, L, phase, x_row, DIM, W, STEP),)
            docs += (_conv_document(document, first + w - (W - 1), L, phase, W, STEP),)
        for i in range(first - (W - 1), tl.minimum(first + ROWS, tl.cdiv(L - phase, STEP) + W - 1), T):
            for j in tl.static_range(T):
                rows += (_conv_row(x, state, i + j + W - 1, d, L, phase, x_row, DIM, W, STEP),)
                docs += (_conv_document(document, i + j + W - 1, L, phase, W, STEP),)
            for j in tl.static_range(T):
                q = i + j
                t = q * STEP + phase
                ok = d < tl.where((q >= 0) & (t < L), DIM, 0)
                g = tl.load(dy + t * dy_row, mask=ok, other=0.0).to(tl.float32)
                if SILU:
                    o = shift
                    for w in tl.static_range(W):
                        o += _tap(weights[w], docs[j + w], docs[j + W - 1], RESET) * rows[j + w]
                    s = _sigmoid(o)
                    g *= s + o * s * (1.0 - s)
                grads += (g,)
                own = (q >= first) & (q < first + ROWS)
                mine = tl.where(own, g, 0.0)
                total += mine
                drow = tl.zeros([BD], tl.float32)
                new = ()
                for w in tl.static_range(W):
                    new += (dweights[w] + _tap(mine, docs[j + w], docs[j + W - 1], RESET) * rows[j + w],)
                    drow += _tap(weights[w], docs[j], docs[j + W - 1 - w], RESET) * grads[j + W - 1 - w]
                dweights = new
                if dfinal is not None:
                    f = tl.where(docs[j] == latest, t - L, -1) if RESET else t - L
                    ok = d < tl.where((f >= 0) & (f < SPAN), DIM, 0)
                    drow += tl.load(dfinal + f * DIM, mask=ok, other=0.0).to(tl.float32)
                t -= SPAN
                tl.store(dx + t * DIM, drow, mask=d < tl.where(own & (t >= 0) & (t < L), DIM, 0))
                tl.store(dstate + (t + SPAN) * DIM, drow, mask=d < tl.where(own & (t < 0), DIM, 0))
            rows = rows[T:]
            docs = docs[T:]
            grads = grads[T:]
        dweight += part.to(tl.int64) * ((W + 1) * DIM) + d
        for w in tl.static_range(W):
            tl.store(dweight + w * DIM, dweights[w], mask=d < DIM)
        tl.store(dweight + W * DIM, total, mask=d < DIM)

    @triton.jit
    def _scan_step_kernel(state, u, delta, z, A, B, C, D, bias, reset, y, state_b, state_d, state_n, u_b, delta_b, z_b,
                          B_b, C_b, reset_b, A_d, A_n, DIM: tl.constexpr, N: tl.constexpr, NS: tl.constexpr,
                          SOFTPLUS: tl.constexpr, BD: tl.constexpr):
        tiles: tl.constexpr = (DIM + BD - 1) // BD
        d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
        n = tl.arange(0, NS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        ok = d < DIM
        nd = (n < N)[:, None] & ok[None, :]
        state += b * state_b + n[:, None] * state_n + d[None, :] * state_d
        h = tl.load(state, mask=nd, other=0.0).to(tl.float32)
        if reset is not None:
            h = tl.where(tl.load(reset + b * reset_b) != 0, 0.0, h)
        x = tl.load(delta + b * delta_b + d, mask=ok, other=0.0).to(tl.float32) + _channel(bias, d, DIM)
        if SOFTPLUS:
            x = _softplus(x)
        v = tl.load(u + b * u_b + d, mask=ok, other=0.0).to(tl.float32)
        a = tl.load(A + d[None, :] * A_d + n[:, None] * A_n, mask=nd, other=0.0).to(tl.float32)
        Bn = tl.load(B + b * B_b + n, mask=n < N, other=0.0).to(tl.float32)
        Cn = tl.load(C + b * C_b + n, mask=n < N, other=0.0).to(tl.float32)
        h = _exp2((x * 1.4426950408889634)[None, :] * a) * h + (x * v)[None, :] * Bn[:, None]
        tl.store(state, h, mask=nd)
        o = tl.sum(h * Cn[:, None], 0) + _channel(D, d, DIM) * v
        if z is not None:
            g = tl.load(z + b * z_b + d, mask=ok, other=0.0).to(tl.float32)
            o *= g * _sigmoid(g)
        tl.store(y + b * DIM + d, o, mask=ok)

    @triton.jit
    def _conv_step_kernel(state, x, weight, bias, reset, y, state_b, state_row, state_d, x_b, reset_b,
                          DIM: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, SILU: tl.constexpr,
                          BD: tl.constexpr):
        tiles: tl.constexpr = (DIM + BD - 1) // BD
        d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        ok = d < DIM
        state += b * state_b + d * state_d
        new = tl.load(x + b * x_b + d, mask=ok, other=0.0)
        o = _channel(bias, d, DIM) + _channel(weight + (W - 1) * DIM, d, DIM) * new.to(tl.float32)
        for i in range((W - 1) * STEP):
            row = tl.load(state + i * state_row, mask=ok, other=0.0)
            if reset is not None:
                row = tl.where(tl.load(reset + b * reset_b) != 0, 0.0, row)
            tap = tl.load(weight + i // STEP * DIM + d, mask=d < tl.where(i % STEP == 0, DIM, 0), other=0.0)
            o += tap.to(tl.float32) * row.to(tl.float32)
            tl.store(state + (i - 1) * state_row, row, mask=d < tl.where(i > 0, DIM, 0))
        if W > 1:
            tl.store(state + ((W - 1) * STEP - 1) * state_row, new, mask=ok)
        if SILU:
            o *= _sigmoid(o)
        tl.store(y + b * DIM + d, o, mask=ok)

    def _rows_contiguous(*xs):
        """Each x with a last stride of 1, then their batch strides, then their row strides."""
        xs = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in xs]
        return xs, *([0 if x is None else x.stride(i) for x in xs] for i in (0, 1))

    def _launch(kernel, programs, *args, **constants):
        """On the GPU of its tensors; Triton would take the current one."""
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants, enable_fp_fusion=True)

    def _contiguous(*xs):
        return [x if x is None else x.contiguous() for x in xs]

    def _state_copy(x, b, d, n, device):
        """A new float32 (b, d, n) with what is in x, if any."""
        if x is None:
            return torch.zeros(b, d, n, dtype=torch.float32, device=device)
        return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def _lanes(n):
        """The lanes that share a channel's n states, and how many states each has."""
        K = min(4, triton.next_power_of_2(n))
        return triton.next_power_of_2(triton.cdiv(n, K)), K

    def _layout(n, E, U, **more):
        """The constants that a scan's kernel is launched with, and the channels of a program: 32 if warps allow it."""
        J, K = _lanes(n)
        Q, S = max(1, 32 // J), min(J, U)
        R = min(8, max(1, 16 // Q))
        return dict(N=n, EVERY=SEGMENT, R=R, Q=Q, J=J, K=K, E=E, S=S, T=U // S, num_warps=R, **more), R * Q * E

    def _for_lanes(B, C):
        """B and C (b, l, n) as the scans read them, float32 (b, whole segments, J, 2, K), zero past the ends, and then
        as many positions as are asked for in advance, whatever they hold."""
        b, l, n = B.shape
        J, K = _lanes(n)
        rows = triton.cdiv(l, SEGMENT) * SEGMENT
        new = torch.zeros if rows > l or J * K > n else torch.empty
        BC = new((b * rows + FWD["AHEAD"]) * 2 * J * K, dtype=torch.float32, device=B.device)
        laid = BC[: b * rows * 2 * J * K].view(b, rows, J, 2, K)
        for i, x in enumerate((B, C)):
            laid[:, :l, :, i] = (F.pad(x, (0, J * K - n)) if J * K > n else x).unflatten(2, (J, K))
        return BC

    def _scan_fwd_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, save):
        (b, l, d), n = u.shape, A.shape[1]
        layout, width = _layout(n, **FWD)
        (u, delta, z), batch, row = _rows_contiguous(u, delta, z)
        D, delta_bias, reset = _contiguous(D, delta_bias, reset)
        y = torch.empty(b, l, d, dtype=u.dtype, device=u.device)
        last = _state_copy(initial_state, b, d, n, u.device)
        saved = last.new_empty(triton.cdiv(l, SEGMENT) if save else 0, b * n * d)
        _launch(_scan_fwd_kernel, triton.cdiv(d, width) * b, u, delta, z, A.float().contiguous(), _for_lanes(B, C), D,
                delta_bias, reset, y, last, saved if save else None, l, *batch, *row, DIM=d, SOFTPLUS=delta_softplus,
                **layout, EVEN=l % FWD["U"] == 0 and d % width == 0, num_stages=1,
                maxnreg=255)  # said aloud, 255 registers let the compiler ask for more in advance
        return y, last, saved

    def _scan_bwd_triton(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, saved):
        (b, l, d), n = u.shape, A.shape[1]
        layout, width = _layout(n, **BWD)
        J, K, U, segments, programs = layout["J"], layout["K"], BWD["U"], triton.cdiv(l, SEGMENT), triton.cdiv(d, width)
        dy = torch.zeros_like(u) if dy is None else dy
        (dy, u, delta, z), batch, row = _rows_contiguous(dy, u, delta, z)
        D, delta_bias, reset = _contiguous(D, delta_bias, reset)
        du, ddelta, dz = (None if x is None else x.new_empty(b, l, d) for x in (u, delta, z))
        dh = _state_copy(dlast, b, d, n, u.device)
        sums = dh.new_empty(b, n + 2, d)  # for each row of the batch: of A, (d, n), of D and of the bias
        dBC = dh.new_empty(b, programs, segments * SEGMENT // U, J, 2, U, K)  # C before B, a partial sum a program
        kept = dh.new_empty(b * programs, SEGMENT // U, width, J * K)
        _launch(_scan_bwd_kernel, programs * b, dy, u, delta, z, A.float().contiguous(), _for_lanes(B, C), D,
                delta_bias, reset, saved, dh, du, ddelta, dz, sums, dBC, kept, l, *batch, *row, DIM=d,
                SOFTPLUS=delta_softplus, **layout, EVEN=l % BWD["PASS"] == 0 and d % width == 0, num_stages=1)
        dC, dB = (x.permute(0, 1, 3, 2, 4).reshape(b, -1, J * K)[:, :l, :n] for x in dBC.sum(1).unbind(3))
        dA, dD, dbias = sums.sum(0).split((n, 1, 1))
        return du, ddelta, dA.view(d, n), dB, dC, dD[0].clone(), dz, dbias[0].clone(), dh  # no two may share storage

    def _conv_setup(x, weight, bias, initial_state, reset, dilation, rows):
        """What both convolution kernels are launched with: 64 rows of a phase and 128 channels a program, or LANES."""
        (b, l, d), W = x.shape, weight.shape[1]
        lanes = 128 if W <= 4 else LANES
        parts = triton.cdiv(triton.cdiv(l, dilation) + rows, 64) * dilation
        state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
        document = None if reset is None else reset.cumsum(1, dtype=torch.int32)
        options = dict(DIM=d, W=W, STEP=dilation, ROWS=64, BD=lanes, num_warps=1, num_stages=1)
        weight, bias = _contiguous(weight.t(), bias)
        return triton.cdiv(d, lanes) * parts * b, parts, weight, bias, state, document, options

    def _conv_fwd_triton(x, weight, bias, silu, initial_state, reset, dilation):
        (x,), (x_batch,), (x_row,) = _rows_contiguous(x)
        (b, l, d), span = x.shape, (weight.shape[1] - 1) * dilation
        programs, parts, weight, bias, state, document, options = _conv_setup(x, weight, bias, initial_state, reset,
                                                                              dilation, 0)
        y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
        _launch(_conv_fwd_kernel, programs, x, weight, bias, state, document, y, parts, l, x_batch, x_row, SILU=silu,
                T=8, **options)
        final = x[:, l - span :]
        if l < span:
            final = torch.cat([x.new_zeros(b, span - l, d) if state is None else state[:, l:], x], 1)
        if reset is not None:
            tail = document[:, l - span :] if l >= span else F.pad(document, (span - l, 0))
            final = _masked(final, (tail == document[:, -1:])[..., None])
        return y, final.clone(memory_format=torch.contiguous_format)

    def _conv_bwd_triton(dy, dfinal, x, weight, bias, silu, initial_state, reset, dilation):
        dy = torch.zeros_like(x) if dy is None else dy
        (dy, x), (dy_batch, x_batch), (dy_row, x_row) = _rows_contiguous(dy, x)
        (b, l, d), W = x.shape, weight.shape[1]
        programs, parts, weight, bias, state, document, options = _conv_setup(x, weight, bias, initial_state, reset,
                                                                              dilation, W - 1)
        (dfinal,) = _contiguous(dfinal)
        dx, dstate = x.new_empty(b, l, d), x.new_empty(b, (W - 1) * dilation, d)
        # a partial sum a program; the last row is of bias
        dweight = torch.empty(b * parts, W + 1, d, dtype=torch.float32, device=x.device)
        _launch(_conv_bwd_kernel, programs, dy, dfinal, x, weight, bias, state, document, dx, dstate, dweight, parts, l,
                dy_batch, dy_row, x_batch, x_row, SILU=silu, T=4, **options)
        dweight, dbias = dweight.sum(0).split((W, 1))
        return dx, dweight.t(), dbias[0].clone(), dstate

    def _scan_step_triton(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset):
        (b, d), n = u.shape, A.shape[1]
        (u, delta, z, B, C), batch, _ = _rows_contiguous(u, delta, z, B, C)
        D, delta_bias = _contiguous(D, delta_bias)
        y = torch.empty(b, d, dtype=u.dtype, device=u.device)
        _launch(_scan_step_kernel, triton.cdiv(d, LANES) * b, state, u, delta, z, A, B, C, D, delta_bias, reset, y,
                *state.stride(), *batch, 0 if reset is None else reset.stride(0), *A.stride(), DIM=d, N=n,
                NS=triton.next_power_of_2(n), SOFTPLUS=delta_softplus, BD=LANES, num_warps=1 if n <= 32 else 4)
        return y

    def _conv_step_triton(state, x, weight, bias, silu, reset, dilation):
        (b, d), W = x.shape, weight.shape[1]
        (x,), (x_batch,), _ = _rows_contiguous(x)
        weight, bias = _contiguous(weight.t(), bias)
        y = torch.empty(b, d, dtype=x.dtype, device=x.device)
        _launch(_conv_step_kernel, triton.cdiv(d, 128) * b, state, x, weight, bias, reset, y, *state.stride(), x_batch,
                0 if reset is None else reset.stride(0), DIM=d, W=W, STEP=dilation, SILU=silu, BD=128, num_warps=1)
        return y


# ---------------------------------------------------------------- operators: what autograd and torch.compile see

IMPLEMENTATIONS = {"torch": (_scan_fwd_torch, _scan_bwd_torch, _conv_fwd_torch, _conv_bwd_torch)}
if triton is not None:
    IMPLEMENTATIONS["triton"] = _scan_fwd_triton, _scan_bwd_triton, _conv_fwd_triton, _conv_bwd_triton


# PyTorch finds compiled graphs on disk by the names of their operators, but what these save depends on both variables
NAMESPACE = "hybrid" + re.sub(r"\W", "", "".join(os.environ.get(x, "") for x in ("KERNELS", "TRITON_INTERPRET")))


def _backend(x):
    """"torch", "triton" or "oracle": the environment's KERNELS, or what suits the device of x; on a CPU with
    TRITON_INTERPRET=1 that is Triton."""
    forced = os.environ.get("KERNELS")
    if forced and forced not in ("torch", "triton", "oracle"):
        raise ValueError(f"KERNELS={forced}: choose torch, triton or oracle")
    if forced == "triton" and "triton" not in IMPLEMENTATIONS:
        raise RuntimeError("KERNELS=triton, but Triton is not installed: pip install triton, or unset KERNELS")
    if forced == "triton" and x.device.type == "cpu" and not INTERPRET:
        raise RuntimeError("KERNELS=triton needs a GPU, or TRITON_INTERPRET=1 beside it; or set KERNELS=torch")
    ptx = torch.version.hip is None  # NVIDIA's
    suits = "triton" in IMPLEMENTATIONS and {"cuda": ptx, "cpu": INTERPRET}.get(x.device.type)
    backend = forced or ("triton" if suits else "torch")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("float64 is not for the Triton kernels; set KERNELS=torch")
    return backend


# The arguments of both operators, and the places of those with gradients. A backward operator takes dy and the gradient
# of the last state before them; the scan's takes what was saved after them.
SCAN = ("Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "bool delta_softplus, Tensor? initial_state, Tensor? reset")
CONV = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? reset, SymInt dilation"
SCAN_GRADS, CONV_GRADS = (0, 1, 2, 3, 4, 5, 6, 7, 9), (0, 1, 2, 4)


def run_scan_fwd(u, *args):
    """y, the last state, and with `save`, the last argument, what scan_bwd starts from: states, one every CHUNK or
    SEGMENT positions, and of the torch form with a gate y before it."""
    return IMPLEMENTATIONS[_backend(u)][0](u, *args)


def run_scan_bwd(dy, dlast, u, *args):
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; an empty tensor for an absent one."""
    return _for_operator(IMPLEMENTATIONS[_backend(u)][1](dy, dlast, u, *args), (u, *args), SCAN_GRADS)


def run_conv_fwd(x, *args):
    """y and the final state."""
    return IMPLEMENTATIONS[_backend(x)][2](x, *args)


def run_conv_bwd(dy, dfinal, x, *args):
    """The gradients of x, weight, bias and initial_state; an empty tensor for an absent one."""
    return _for_operator(IMPLEMENTATIONS[_backend(x)][3](dy, dfinal, x, *args), (x, *args), CONV_GRADS)


def _for_operator(grads, args, wanted):
    """A gradient for each wanted argument, contiguous and in its dtype; an empty tensor for an absent one"""
    return tuple(torch.empty(0, device=args[0].device) if args[i] is None else g.to(args[i].dtype).contiguous()
                 for g, i in zip(grads, wanted))


def _operator(run, args, outputs):
    name, schema = run.__name__.removeprefix("run_"), f"({args}) -> ({', '.join(['Tensor'] * outputs)})"
    return torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)


scan_fwd = _operator(run_scan_fwd, f"{SCAN}, bool save", 3)
scan_bwd = _operator(run_scan_bwd, f"Tensor? dy, Tensor? dlast, {SCAN}, Tensor saved", len(SCAN_GRADS))
conv_fwd = _operator(run_conv_fwd, CONV, 2)
conv_bwd = _operator(run_conv_bwd, f"Tensor? dy, Tensor? dfinal, {CONV}", len(CONV_GRADS))


@scan_fwd.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, save):
    (b, l, d), n, f = u.shape, A.shape[1], _state_dtype(u)
    if _backend(u) == "triton":
        saved = u.new_empty(-(-l // SEGMENT) if save else 0, b * d * n, dtype=f)
    else:
        saved = u.new_empty(_saved_size(b, l, d, n, z is not None, save), dtype=f)
    return u.new_empty(b, l, d), u.new_empty(b, d, n, dtype=f), saved


@conv_fwd.register_fake
def _(x, weight, bias, silu, initial_state, reset, dilation):
    b, _, d = x.shape
    return x.new_empty(x.shape), x.new_empty(b, (weight.shape[1] - 1) * dilation, d)


def _save_args(ctx, args):
    ctx.others = [None if isinstance(x, Tensor) else x for x in args]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))


def _saved_args(ctx):
    return [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.others)]


def _for_autograd(grads, args, wanted):
    """A gradient for each of args, None for one that is absent or not wanted"""
    grads = dict(zip(wanted, grads))
    return tuple(None if x is None else grads.get(i) for i, x in enumerate(args))


def _double_backward(oracle, args, wanted, douts, cotangents):
    """The gradients with respect to douts and the wanted args of the sum over these of
    <cotangent_i, d <douts, oracle(args)> / d arg_i>: the definition, differentiated twice."""
    def fresh(x):  # a node of its own, so that only paths inside the oracle count
        return x if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs, douts = {i: fresh(args[i]) for i in wanted}, [fresh(x) for x in douts]
        outputs = oracle(*(inputs.get(i, x) for i, x in enumerate(args)))
        ys, dys = zip(*((y, dy) for y, dy in zip(outputs, douts) if dy is not None))
        xs, vs = zip(*((x, v) for x, v in zip(inputs.values(), cotangents) if x is not None))
        first = torch.autograd.grad(ys, xs, dys, create_graph=True, allow_unused=True)
        firsts, vs = zip(*((g, v) for g, v in zip(first, vs) if g is not None))
        both = *douts, *inputs.values()
        xs = [x for x in both if x is not None]
        second = iter(torch.autograd.grad(firsts, xs, vs, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(second) for x in both]


def _differentiable(function, fwd, bwd, run_fwd, run_bwd, wanted, oracle):
    """Register the gradients of the operators fwd and bwd. Returns a function that does the same for eager calls past
    the operators: their first use imports torch._dynamo, which takes seconds, and each call costs more than a small
    block of work. Only a derivative of the derivative goes through bwd."""

    def setup(ctx, inputs, output):
        saved = output[2:]
        _save_args(ctx, (*inputs[: len(inputs) - len(saved)], *saved))  # `saved` in place of the argument `save`
        ctx.set_materialize_grads(False)

    def grad(ctx, dy, dlast, *_, bwd=bwd):
        args = _saved_args(ctx)
        return _for_autograd(bwd(dy, dlast, *args), args, wanted)

    def bwd_grad(ctx, *cotangents):
        dy, dlast, *args = _saved_args(ctx)
        if _backend(args[0]) == "triton":
            raise RuntimeError(f"{function}: no second derivatives through the Triton kernels; set KERNELS=torch")
        ddy, ddlast, *grads = _double_backward(oracle, args, wanted, (dy, dlast), cotangents)
        return ddy, ddlast, *_for_autograd(grads, args, wanted)

    @bwd.register_fake
    def _(dy, dlast, *args):
        grads = [None if args[i] is None else args[i].new_empty(args[i].shape) for i in wanted]
        return _for_operator(grads, args, wanted)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):  # with a setup_context autograd would look at its signature first, 0.1 ms a call
            output = run_fwd(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *douts):
            return grad(ctx, *douts, bwd=bwd if torch.is_grad_enabled() else run_bwd)

    fwd.register_autograd(grad, setup_context=setup)
    bwd.register_autograd(bwd_grad, setup_context=lambda ctx, inputs, output: _save_args(ctx, inputs))
    return Eager.apply


_eager_scan = _differentiable("selective_scan", scan_fwd, scan_bwd, run_scan_fwd, run_scan_bwd, SCAN_GRADS,
                              lambda *args: selective_scan_oracle(*args[:11], return_last_state=True))
_eager_conv = _differentiable("causal_conv1d", conv_fwd, conv_bwd, run_conv_fwd, run_conv_bwd, CONV_GRADS,
                              lambda *args: causal_conv1d_oracle(*args[:6], True, args[6]))


def _eager(x):
    """Whether a call goes past the operators: one that is not compiled, of no subclass of Tensor, on a CPU or GPU"""
    usual = type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda")
    return usual and not torch.compiler.is_compiling()


# ---------------------------------------------------------------- the public functions

def _expect(function, sizes, **tensors):
    """Raise a one-line error unless each tensor has the shape that its letters have in sizes, and is of floating point,
    reset bool; None stands for an absent one."""
    for name, (x, letters) in tensors.items():
        if x is None:
            continue
        shape = tuple(sizes[letter] for letter in letters.split(", "))
        if x.shape != shape:
            raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}, expected ({letters}) = {tuple(shape)}")
        if not (x.dtype == torch.bool if name == "reset" else x.is_floating_point()):
            raise TypeError(f"{function}: {name} is {x.dtype}, expected {'bool' if name == 'reset' else 'a float'}")


def _silu(function, activation):
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{function}: activation {activation!r} is unknown, choose None, 'silu' or 'swish'")
    return activation is not None


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
                   reset=None, return_last_state=False):
    """Mamba's selective scan (Algorithm 2 and equation (2a, 2b) of arXiv 2312.00752), channels last.

    u, delta, z: (b, l, d), float32, bfloat16, float16 or float64; A: (d, n), negative; B, C: (b, l, n);
    D, delta_bias: (d,). delta_softplus: the step is softplus(delta + delta_bias). z gates: y silu(z).
    initial_state: (b, d, n), zero if absent. reset: (b, l) bool, the state is zeroed before each position where it is
    true. Returns y (b, l, d) in u's dtype, with return_last_state also the state (b, d, n) in float32 (float64 for
    float64 u). Differentiable in every floating-point argument, and through both states. ValueError for a shape that
    does not fit, TypeError for a type."""
    if u.dim() != 3 or A.dim() != 2 or 0 in u.shape:
        raise ValueError(f"selective_scan: u {tuple(u.shape)} must be (b, l, d), not empty, "
                         f"and A {tuple(A.shape)} (d, n)")
    (b, l, d), n = u.shape, A.shape[1]
    _expect("selective_scan", dict(b=b, l=l, d=d, n=n), u=(u, "b, l, d"), delta=(delta, "b, l, d"), A=(A, "d, n"),
            B=(B, "b, l, n"), C=(C, "b, l, n"), D=(D, "d"), z=(z, "b, l, d"), delta_bias=(delta_bias, "d"),
            initial_state=(initial_state, "b, d, n"), reset=(reset, "b, l"))
    args = u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset
    if _backend(u) == "oracle":
        return selective_scan_oracle(*args, return_last_state)
    save = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    y, last, _ = (_eager_scan if _eager(u) else scan_fwd)(*args, save)
    return (y, last) if return_last_state else y


def causal_conv1d(x, weight, bias=None, activation=None, initial_state=None, reset=None, return_final_state=False,
                  dilation=1):
    """Causal depthwise convolution, channels last: y_t = bias + sum_w weight_w x_(t - (W-1-w) dilation).

    x: (b, l, d); weight: (d, W); bias: (d,); activation: None or "silu" ("swish"). initial_state:
    (b, (W-1) dilation, d), the inputs before x, oldest first, zero if absent. reset: (b, l) bool, a position where it
    is true and all after it see nothing from before it. Returns y (b, l, d) in x's dtype, with return_final_state also
    the next call's initial_state. Differentiable in every floating-point argument, and through both states. ValueError
    for a shape that does not fit, TypeError for a type."""
    silu = _silu("causal_conv1d", activation)
    if x.dim() != 3 or weight.dim() != 2 or 0 in x.shape or 0 in weight.shape or dilation < 1:
        raise ValueError(f"causal_conv1d: x {tuple(x.shape)} must be (b, l, d) and weight {tuple(weight.shape)} "
                         f"(d, W), not empty, dilation {dilation} at least 1")
    (b, l, d), W = x.shape, weight.shape[1]
    _expect("causal_conv1d", {"b": b, "l": l, "d": d, "W": W, "(W-1) dilation": (W - 1) * dilation}, x=(x, "b, l, d"),
            weight=(weight, "d, W"), bias=(bias, "d"), reset=(reset, "b, l"),
            initial_state=(initial_state, "b, (W-1) dilation, d"))
    if _backend(x) == "oracle":
        return causal_conv1d_oracle(x, weight, bias, activation, initial_state, reset, return_final_state, dilation)
    y, final = (_eager_conv if _eager(x) else conv_fwd)(x, weight, bias, silu, initial_state, reset, dilation)
    return (y, final) if return_final_state else y


@torch.no_grad()
def selective_scan_step(state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reset=None):
    """One position of selective_scan: state (b, d, n) is updated in place; u, delta, z: (b, d); B, C: (b, n);
    reset: (b,) bool. Returns y (b, d). For decoding: no gradients, few calls, no synchronisation, can be captured in a
    CUDA graph. On a CPU it is fastest where channels lie side by side in state and A."""
    (b, d), n = u.shape, A.shape[1]
    _expect("selective_scan_step", dict(b=b, d=d, n=n), state=(state, "b, d, n"), u=(u, "b, d"), z=(z, "b, d"),
            delta=(delta, "b, d"), A=(A, "d, n"), B=(B, "b, n"), C=(C, "b, n"), D=(D, "d"),
            delta_bias=(delta_bias, "d"), reset=(reset, "b"))
    return scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset)


def scan_step(state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reset=None):
    """selective_scan_step as a decoder calls it, under no_grad: what is checked there takes a fifth of the time."""
    if triton is not None and (u.is_cuda or INTERPRET) and _backend(u) == "triton":
        return _scan_step_triton(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset)
    dtype, f = u.dtype, torch.promote_types(state.dtype, torch.float32)
    if state.dtype != f:  # a small type is for what is kept
        h = state.to(f)
        y = scan_step(h, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reset)
        state.copy_(h)
        return y
    if not dtype == delta.dtype == B.dtype == C.dtype == f or (z is not None and z.dtype != f):
        u, delta, B, C, z = (None if x is None else x.to(f) for x in (u, delta, B, C, z))
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    if reset is not None:
        state.masked_fill_(reset[:, None, None], 0)
    state.mul_((dt.unsqueeze(2) * A).exp_()).addcmul_((dt * u).unsqueeze(2), B.unsqueeze(1))  # (2a)
    y = _bmm(state, C.unsqueeze(2)).squeeze(2)  # (2b)
    y = y if D is None else y.addcmul_(D, u)
    y = y if z is None else y.mul_(F.silu(z))
    return y if dtype == state.dtype else y.to(dtype)


@torch.no_grad()  # else the state would hold every step's graph
def causal_conv1d_step(state, x, weight, bias=None, activation=None, reset=None, dilation=1):
    """One position of causal_conv1d: state (b, (W-1) dilation, d) is updated in place; x: (b, d); reset: (b,) bool.
    Returns y (b, d)."""
    silu, (b, d), W = _silu("causal_conv1d_step", activation), x.shape, weight.shape[1]
    _expect("causal_conv1d_step", {"b": b, "d": d, "W": W, "(W-1) dilation": (W - 1) * dilation}, x=(x, "b, d"),
            weight=(weight, "d, W"), bias=(bias, "d"), reset=(reset, "b"), state=(state, "b, (W-1) dilation, d"))
    if triton is not None and (x.is_cuda or INTERPRET) and _backend(x) == "triton":
        return _conv_step_triton(state, x, weight, bias, silu, reset, dilation)
    rows = torch.cat((state, x.unsqueeze(1)), 1)  # (b, span + 1, d)
    if reset is not None:
        rows[:, :-1].masked_fill_(reset[:, None, None], 0)
    state.copy_(rows[:, 1:])
    y = (rows[:, ::dilation].to(_state_dtype(x)) * weight.t()).sum(1)
    y = y if bias is None else y.add_(bias)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


# ---------------------------------------------------------------- mamba_ssm's and causal_conv1d's own signatures

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    """mamba_ssm.ops.selective_scan_interface.selective_scan_fn. u, delta, z: (b, d, l); A: (d, n), real; B, C: (d, n),
    (b, n, l) or (b, groups, n, l); D, delta_bias: (d,). Returns (b, d, l), and the last state (b, d, n), which is
    differentiable here."""
    if A.is_complex():
        raise TypeError(f"selective_scan_fn: A is {A.dtype}; it must be real, as in Mamba (mamba_ssm takes S4's, too)")
    (b, d, l), n = u.shape, A.shape[1]
    _expect("selective_scan_fn", dict(b=b, d=d, l=l, n=n), delta=(delta, "b, d, l"), z=(z, "b, d, l"), A=(A, "d, n"),
            D=(D, "d"), delta_bias=(delta_bias, "d"))

    def per_channel(x):  # a constant B or C differs by channel, and has no fast form: one group a channel
        return x[None, :, :, None].expand(b, d, n, l) if x.dim() == 2 else x[:, None] if x.dim() == 3 else x

    B, C = per_channel(B), per_channel(C)  # (b, groups, n, l)
    groups = max(B.shape[1], C.shape[1])
    if d % groups or groups % B.shape[1] or groups % C.shape[1]:
        raise ValueError(f"selective_scan_fn: {B.shape[1]} groups of B and {C.shape[1]} of C do not share out evenly "
                         f"among {d} channels")
    if groups > 1:  # gradients of what groups share are summed in the type that it has here
        B, C = B.to(_state_dtype(u)), C.to(_state_dtype(u))
    ys, states = [], []
    u, delta, z = (None if x is None else x.transpose(1, 2) for x in (u, delta, z))
    for g in range(groups):
        c = slice(g * d // groups, (g + 1) * d // groups)
        u_g, delta_g, D_g, z_g, bias_g = (None if x is None else x[..., c] for x in (u, delta, D, z, delta_bias))
        B_g, C_g = (x[:, g * x.shape[1] // groups].transpose(1, 2) for x in (B, C))
        y, h = selective_scan(u_g, delta_g, A[c], B_g, C_g, D_g, z_g, bias_g, delta_softplus, return_last_state=True)
        ys.append(y.transpose(1, 2))
        states.append(h)
    y, h = torch.cat(ys, 1), torch.cat(states, 1)
    return (y, h) if return_last_state else y


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    """causal_conv1d.causal_conv1d_fn. x: (b, d, l); weight: (d, W); bias: (d,); seq_idx: (b, l), equal within a
    sequence, -1 for padding, whose output is 0; initial_states, final_states_out: (b, d, W-1). Returns (b, d, l)."""
    reset = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    state = None if initial_states is None else initial_states.transpose(1, 2)
    y, final = causal_conv1d(x.transpose(1, 2), weight, bias, activation, state, reset, return_final_state=True)
    y, final = y.transpose(1, 2), final.transpose(1, 2)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


@torch.no_grad()  # else the state would hold every step's graph
def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):
    """causal_conv1d.causal_conv1d_update. x: (b, d) or (b, d, l); conv_state: (b, d, k >= W-1), newest last, updated in
    place; cache_seqlens: (b,), conv_state is a ring and x goes in at that position; conv_state_indices: (b,), the rows
    of a larger conv_state, negative ones are skipped and return 0. Returns y in x's shape, without gradient."""
    xs = x[..., None] if x.dim() == 2 else x
    l, k, span = xs.shape[-1], conv_state.shape[-1], weight.shape[1] - 1
    index = None if conv_state_indices is None else conv_state_indices.long()
    state = conv_state if index is None else conv_state[index.clamp(min=0)]
    _expect("causal_conv1d_update", {"b": len(xs), "d": xs.shape[1], "k >= W-1": max(k, span)},
            conv_state=(state, "b, d, k >= W-1"))
    if cache_seqlens is None:
        past = state[..., k - span :]
        new = torch.cat([state, xs.to(state.dtype)], -1)[..., -k:] if k else state
    else:
        at = cache_seqlens.long()[:, None, None]
        ring = lambda i: ((i.to(x.device) + at) % k).expand(-1, xs.shape[1], -1)  # noqa: E731
        past = state.gather(2, ring(torch.arange(-span, 0)))
        first = max(l - k, 0)  # what the ring would overwrite at once: scatter leaves the order of duplicates open
        new = state.scatter(2, ring(torch.arange(first, l)), xs[..., first:].to(state.dtype))
    y = causal_conv1d(xs.transpose(1, 2), weight, bias, activation, past.transpose(1, 2).to(x.dtype)).transpose(1, 2)
    if index is None:
        conv_state.copy_(new)
    else:
        live = index >= 0
        conv_state[index[live]] = new[live]
        y = y.masked_fill(~live[:, None, None], 0)  # padding may hold anything, even NaN
    return y[..., 0] if x.dim() == 2 else y


@torch.no_grad()
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None):
    """mamba_ssm.ops.triton.selective_state_update.selective_state_update, one position. state: (b, d, n) or
    (b, h, d, n), in place; x, dt, z: (b, d) or (b, h, d); A: (d, n) or (h, d, n); B, C: (b, n) or (b, groups, n);
    D, dt_bias: (d,) or (h, d); state_batch_indices: (b,), the rows of a larger state, negative ones are skipped and
    return 0. Returns y in x's shape, without gradient."""
    index = None if state_batch_indices is None else state_batch_indices.long()
    rows = state if index is None else state[index.clamp(min=0)]
    B, C = (m[:, None] if m.dim() == 2 else m for m in (B, C))
    (b, *heads, d, n), groups = rows.shape, B.shape[1]
    hd = "h, d" if heads else "d"
    _expect("selective_state_update", dict(b=b, h=math.prod(heads), d=d, n=n, groups=groups), x=(x, f"b, {hd}"),
            dt=(dt, f"b, {hd}"), z=(z, f"b, {hd}"), A=(A, f"{hd}, n"), B=(B, "b, groups, n"), C=(C, "b, groups, n"),
            D=(D, hd), dt_bias=(dt_bias, hd))
    if rows.shape[1] % groups:
        raise ValueError(f"selective_state_update: {groups} groups of B and C do not share out evenly among the "
                         f"{rows.shape[1]} heads of the state {tuple(state.shape)}")
    h, A = rows.flatten(1, -2).to(_state_dtype(x), copy=True), A.flatten(0, -2)  # (b, h d, n), (h d, n)
    along = [m if m is None else m.flatten(i) for m, i in ((x, 1), (dt, 1), (D, 0), (z, 1), (dt_bias, 0))]
    size, ys = h.shape[1] // groups, []
    for g in range(groups):
        c = slice(g * size, (g + 1) * size)
        x_g, dt_g, D_g, z_g, bias_g = (None if m is None else m[..., c] for m in along)
        ys.append(selective_scan_step(h[:, c], x_g, dt_g, A[c], B[:, g], C[:, g], D_g, z_g, bias_g, dt_softplus))
    new, y = h.view(rows.shape).to(state.dtype), torch.cat(ys, 1)
    if index is None:
        state.copy_(new)
    else:
        live = index >= 0
        state[index[live]] = new[live]
        y = y.masked_fill(~live[:, None], 0)
    return y.view(x.shape)


if __name__ == "__main__":
    import sys

    sys.modules["kernels"] = sys.modules["__main__"]  # the report imports this module: its operators register once
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    import kernel_report

    kernel_report.main()
