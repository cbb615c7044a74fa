"""
What a model does faster on a CPU than plain torch would: the same numbers and gradients, in fewer passes over memory.

model.py says in torch what each layer computes. At some places it asks first whether something of this file applies;
if not (on a GPU, within torch.compile, for a shape that does not fit) its own lines run. So a first reading can do
without this file. Classes named ..CPU are torch with a gradient made by hand. Those named Native.. call native code,
which Inductor makes of the small functions above them (`native_code` in kernels.py), where `compile` is on and enough
is to be computed to be worth it; FeedForwardCPU does either.

Letters: B, T, C, nh, hs, W as in model.py, n modules of a fractal, H their width. Of native code: d for all channels,
and those of kernels.py ("native code: what is compiled"), where it says how to read the shapes of a kernel.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import TAPS, VECTOR, NativeCode, blocks, flat, native_code

# ---------------------------------------------------------------------------------------------------------------------
# Types and products

def eager_cpu(x):
    """Whether x, of float32 or float64, is on a CPU and in eager code"""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def product_type(x) -> torch.dtype:
    """The type of matrix products with x: autocast's, or its own"""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 with vectors twice as wide as MKL does: on AMD's CPUs with AVX-512"""
    cpu = Path("/proc/cpuinfo")
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu.is_file() and "AuthenticAMD" in cpu.read_text()


onednn_is_faster._dynamo_marked_constant = True  # for torch.compile; its own decorator imports torch._dynamo


def by_onednn(x, weight) -> bool:
    large = x.numel() >= 2048 * x.shape[-1] and weight.numel() >= 8192  # smaller products take longer by oneDNN
    return large and weight.device.type == "cpu" and product_type(weight) == torch.float32 and onednn_is_faster()


def as_image(x):
    """x (..., C) -> (1, C, 1, N), channels last: where a convolution with one tap is a product with x (N, C)"""
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def linear(x, weight, bias=None):
    """x weight^T + bias, x (..., C), weight (D, C). PyTorch gives float32 products to MKL, convolutions to oneDNN."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return F.conv2d(as_image(x), weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def linear_backward(dy, x, weight):
    """The gradients of x (N, C) and weight (D, C), for dy (N, D), that of linear(x, weight)"""
    if not by_onednn(x, weight):
        return dy @ weight, dy.t() @ x
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        as_image(dy), as_image(x), weight[..., None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, True, False])
    return dx.permute(0, 2, 3, 1).reshape_as(x), dweight.view_as(weight)


# ---------------------------------------------------------------------------------------------------------------------
# Norms

def _normed(z, inverse, eps, r):
    """n = z r, r = (inverse sum z^2 + eps)^-1/2 over the last dimension of z (b, q, l, d); inverse (q, 1) is 1 / width,
    without the zeros that fill a vector; eps (q, 1)"""
    r.copy_(torch.rsqrt((z * z).sum(-1) * inverse + eps))
    return z * r[..., None]


def _normed_bwd(dn, n, inverse, r):
    """The gradient of z"""
    along = (dn * n).sum(-1) * inverse
    return (dn - n * along[..., None]) * r[..., None]


def _norm_fwd(z, inverse, eps, y, r, gain=None):
    """y = n gain; inverse, eps (q,), gain (q, d)"""
    z, y = flat(z.float(), y)
    n = _normed(z, inverse[:, None], eps[:, None], r)
    y.copy_(n if gain is None else n * gain.flatten(-2)[:, None])


def _norm_bwd(dy, z, r, inverse, dz, gain=None):
    """The gradients of z and of the gain"""
    dy, z, dz = flat(dy.float(), z.float(), dz)
    n = z * r[..., None]
    dz.copy_(_normed_bwd(dy if gain is None else dy * gain.flatten(-2)[:, None], n, inverse[:, None], r))
    return () if gain is None else ((dy * n).sum(2).sum(0),)


def _stream_norm_fwd(x, inverse, eps, gain, y, r, more=None, total=None):
    """y = n gain for the norm n of total = x + more (b, l, d), or of x alone; inverse, eps (1,)"""
    x, gain, y = flat(x, gain, y)
    if more is not None:
        more, total = flat(more.float(), total)
        x = x + more
        total.copy_(x)
    y.copy_(_normed(x, inverse[0], eps[0], r) * gain)


def _stream_norm_bwd(dy, dtotal, total, r, inverse, gain, dx, dmore=None):
    """The gradient of x and of more: dtotal and what comes through the norm; and that of the gain"""
    dy, dtotal, total, gain, dx = flat(dy.float(), dtotal, total, gain, dx)
    n = total * r[..., None]
    grad = dtotal + _normed_bwd(dy * gain, n, inverse[0], r)
    dx.copy_(grad)
    if dmore is not None:
        dmore.flatten(-2).copy_(grad)
    return (dy * n).sum(1).sum(0),


NORM = (_norm_fwd, "~bqlcv' q q bqlcv' bql"), (_norm_bwd, "bqlcv' ~bqlcv' bql q ~bqlcv'")
STREAM_NORM = (_stream_norm_fwd, "blcv q q cv ~blcv bl"), (_stream_norm_bwd, "~blcv blcv blcv bl q cv blcv")
ADD_NORM = tuple((f, f"{shapes} {more}") for (f, shapes), more in zip(STREAM_NORM, ("~blcv blcv", "~blcv")))
HEAD_NORM = (_norm_fwd, "~bqlcv' q q ~bqlcv' bql qcv"), (_norm_bwd, "~bqlcv' ~bqlcv' bql q ~bqlcv' qcv")


class NativeStreamNorm(torch.autograd.Function):
    """x + y and its norm in the type of the products, by native code in one pass over memory, as are the gradients"""

    @staticmethod
    def forward(ctx, code, x, y, gain, eps):
        inverse, eps = gain.new_full((1,), 1 / len(gain)), gain.new_full((1,), eps)
        x, n, r = x.contiguous(), x.new_empty(x.shape, dtype=code.dtype), x.new_empty(x.shape[:2])
        tensors = [blocks(x), inverse, eps, blocks(gain), blocks(n), r]
        if y is not None:
            x = torch.empty_like(x)
            tensors += blocks(y.contiguous()), blocks(x)
        code.fwd(tensors)
        ctx.code, ctx.adds = code, y is not None
        ctx.save_for_backward(x, r, inverse, gain)
        return x, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx, dn):
        x, r, inverse, gain = ctx.saved_tensors
        grad, dy = torch.empty_like(x), dn.new_empty(dn.shape) if ctx.adds else None
        tensors = [dn.contiguous(), dx.contiguous(), x]
        (dgain,) = ctx.code.bwd([*map(blocks, tensors), r, inverse, blocks(gain), blocks(grad),
                                 *([blocks(dy)] if ctx.adds else [])])
        return None, grad, dy, dgain, None


def add_rms_norm(x, y, gain, eps):
    """x + y (B, T, C), or x alone, and its RMS norm, by native code; None where torch's operations are to run"""
    if not eager_cpu(x) or not x.dtype == gain.dtype == torch.float32 or len(gain) % VECTOR:
        return None
    code = native_code(STREAM_NORM if y is None else ADD_NORM, x.device, product_type(gain), x.numel())
    if code is None or (y is not None and y.dtype != code.dtype):
        return None
    return NativeStreamNorm.apply(code, x, y, gain, eps)


class RMSNormCPU(torch.autograd.Function):
    """A fifth of the time of F.rms_norm, which on a CPU makes ten passes over memory, most of them backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        # LayerNorm's backward at mean 0, which differs by the mean's own dependence on x: r mean(dy weight)
        x, weight, r = ctx.saved_tensors
        C = x.shape[-1]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, [C], torch.zeros_like(r), r, weight, None, [True, True, False])
        return dx.addcmul_(r, (dy @ weight)[..., None], value=1 / C), dweight, None


# ---------------------------------------------------------------------------------------------------------------------
# Attention

def _rotate(a, b, cos, sin, y_a, y_b):
    """(a + ib) (cos + i sin) for a, b (b, q, l, d) and cos, sin (l, d)"""
    a, b, cos, sin, y_a, y_b = flat(a.float(), b.float(), cos, sin, y_a, y_b)
    y_a.copy_(a * cos - b * sin)
    y_b.copy_(b * cos + a * sin)


def _weigh_rows(x, r, y):
    """y = r x"""
    x, y = flat(x.float(), y)
    y.copy_(x * r[..., None])


def _softmax_fwd(s, hidden, w, r):
    """w = 2^(s - max s), 0 where hidden < 0, and r = 1 / sum w"""
    s, hidden, w = flat(s.float(), hidden.float()[:, None], w)
    s = s + hidden
    x = torch.where(hidden < 0, 0.0, 0.5 ** (s.amax(-1, keepdim=True) - s))
    w.copy_(x)
    r.copy_(1 / x.sum(-1))


def _softmax_bwd(dp, w, r, ds):
    """ds = log(2) p (g - sum p g) for dp = r g, g the gradient of p = r w"""
    dp, w, ds = flat(dp.float(), w.float(), ds)
    along = (w * dp).sum(-1) * r
    ds.copy_(math.log(2) * w * (dp - along[..., None]))


ROTATE = ((_rotate, "~bqlcv' ~bqlcv' lcv lcv ~bqlcv' ~bqlcv'"),)
WEIGH_ROWS = ((_weigh_rows, "~bqlcv' bql ~bqlcv'"),)
SOFTMAX = (_softmax_fwd, "~bqlcv ~blcv' ~bqlcv bql"), (_softmax_bwd, "~bqlcv ~bqlcv bql ~bqlcv")


class AttentionCode(NamedTuple):
    """Native code for what stands between the matrix products of attention, norms of heads if there are any"""

    softmax: NativeCode
    rotate: NativeCode
    weigh_rows: NativeCode
    norm: NativeCode | None = None


def attention_code(device, dtype, elements, norm):
    """AttentionCode for products in dtype and so many elements of q, or None where torch's operations are to run."""
    kernels = (SOFTMAX, ROTATE, WEIGH_ROWS, HEAD_NORM)[: 4 if norm else 3]
    codes = [native_code(kernel, device, dtype, elements) for kernel in kernels]
    return None if None in codes else AttentionCode(*codes)


def hidden_keys(mask, q, S, fill=0):
    """What is added to scores, (1 or B, T, fill + S): -inf where a key is hidden, as the first `fill` are, else 0"""
    if mask is None:
        mask = torch.ones(1, 1, q.shape[2], S, dtype=torch.bool, device=q.device).tril(S - q.shape[2])
    hidden = q.new_full((len(mask), q.shape[2], fill + S), -math.inf)
    hidden[:, :, fill:].masked_fill_(mask[:, 0], 0)
    return hidden


class NativeHeadNorm(torch.autograd.Function):
    """RMSNorm over the last dimension of the first n heads of x (B, nh, T, hs), the others as they are, by native code;
    gain (n, hs)"""

    @staticmethod
    def forward(ctx, code, x, gain, eps):
        n, y = len(gain), torch.empty_like(x)
        inverse, eps = gain.new_full((n,), 1 / x.shape[3]), gain.new_full((n,), eps)
        r = gain.new_empty(len(x), n, x.shape[2])
        code.fwd([blocks(x[:, :n]), inverse, eps, blocks(y[:, :n]), r, blocks(gain)])
        y[:, n:] = x[:, n:]
        ctx.code = code
        ctx.save_for_backward(x, r, inverse, gain)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, r, inverse, gain = ctx.saved_tensors
        n, dx, dy = len(gain), torch.empty_like(x), dy if dy.stride(-1) == 1 else dy.contiguous()
        (dgain,) = ctx.code.bwd([blocks(dy[:, :n]), blocks(x[:, :n]), r, inverse, blocks(dx[:, :n]), blocks(gain)])
        dx[:, n:] = dy[:, n:]
        return None, dx, dgain, None


class NativeAttention(torch.autograd.Function):
    """attend of model.py for qkv (B, 3 nh, T, hs) after past k and v (B, nh, P, hs), by native code around the six
    products. Weights w are kept before they are divided by their sum: p = r w."""

    @staticmethod
    def forward(ctx, code, qkv, past_k, past_v, rotary, mask):
        (q, k, v), P = qkv.chunk(3, dim=1), 0 if past_k is None else past_k.shape[2]
        B, nh, T, hs = q.shape
        fill = -(P + T) % VECTOR  # zeros before the first key, hidden, for rows of whole vectors
        half, scale = hs // 2, hs**-0.5 / math.log(2)  # exp is a power of 2
        cos, sin = (torch.ones(P + T, half), torch.zeros(P + T, half)) if rotary is None else \
            (rotary[0][:, :half], rotary[1][:, half:])
        ctx.table, ctx.table_q = (cos[P:], sin[P:]), (cos[P:] * scale, sin[P:] * scale)
        (all_k, all_v), wide_q = q.new_empty(2, B, nh, fill + P + T, hs), q.new_empty(B, nh, T, hs)
        all_k[:, :, :fill], all_v[:, :, :fill] = 0, 0
        if P:
            turn(code, past_k.to(k.dtype).contiguous(), all_k[:, :, fill : fill + P], cos[:P], sin[:P])
            all_v[:, :, fill : fill + P] = past_v
        turn(code, k, all_k[:, :, fill + P:], *ctx.table)
        turn(code, q, wide_q, *ctx.table_q)
        all_v[:, :, fill + P:] = v
        q, k, v = wide_q, all_k, all_v
        w, r, y = q @ k.mT, q.new_empty(B, nh, T, dtype=torch.float32), q.new_empty(B, T, nh, hs)
        hidden = hidden_keys(mask, q, P + T, fill).expand(B, -1, -1)
        code.softmax.fwd([blocks(w), blocks(hidden), blocks(w), r])
        code.weigh_rows.fwd([blocks(w @ v), r, blocks(y.transpose(1, 2))])
        ctx.code = code
        ctx.save_for_backward(q, k, v, w, r)
        return y.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        code, (q, k, v, w, r), (cos, sin), (cos_q, sin_q) = ctx.code, ctx.saved_tensors, ctx.table, ctx.table_q
        B, nh, T, hs = q.shape
        dqkv, rdy = q.new_empty(B, T, 3 * nh, hs).transpose(1, 2), torch.empty_like(q)
        dq, dk, dv = dqkv.chunk(3, dim=1)
        code.weigh_rows.fwd([blocks(dy.contiguous().view(B, T, nh, hs).transpose(1, 2)), r, blocks(rdy)])
        dv.copy_((w.mT @ rdy)[:, :, -T:])
        ds = rdy @ v.mT
        code.softmax.bwd([blocks(ds), blocks(w), r, blocks(ds)])
        turn(code, ds @ k, dq, cos_q, -sin_q)
        turn(code, (ds.mT @ q)[:, :, -T:], dk, cos, -sin)
        return None, dqkv, None, None, None, None


def turn(code, x, y, cos, sin):
    """y = x (B, nh, S, hs), its two halves rotated as pairs by cos and sin (S, hs / 2)"""
    (a, b), (y_a, y_b) = ([blocks(half) for half in t.chunk(2, dim=-1)] for t in (x, y))
    code.rotate.fwd([a, b, blocks(cos.contiguous()), blocks(sin.contiguous()), y_a, y_b])


class AttentionCPU(torch.autograd.Function):
    """softmax(q k^T / sqrt(hs) + hidden) v for q (N, T, hs), k and v (N, S, hs), hidden broadcast to (N, T, S).

    The CPU's fused kernel keeps no (T, S) matrix but trains slower in bfloat16, in short blocks up to eight times.
    Autograd would make the gradient of k^T, and to transpose it takes Inductor longer than three of the products."""

    @staticmethod
    def forward(ctx, q, k, v, hidden, dropout):
        ctx.scale, ctx.dropout = q.shape[-1] ** -0.5, dropout
        p = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
        kept, mask = torch.native_dropout(p, dropout, True) if dropout else (p, None)
        ctx.save_for_backward(q, k, v, p, kept, mask)
        return kept @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, p, kept, mask = ctx.saved_tensors
        dp = dy @ v.transpose(1, 2)
        if mask is not None:
            dp = (dp * mask).div_(1 - ctx.dropout)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq, dk, dv = ds @ k, ds.transpose(1, 2) @ q, kept.transpose(1, 2) @ dy
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Fractals

def _gated_norm_fwd(z, gate, inverse, eps, y, r):
    """y = n silu(gate)"""
    z, gate, y = flat(z, gate.float(), y)
    y.copy_(_normed(z, inverse[:, None], eps[:, None], r) * gate * torch.sigmoid(gate))


def _gated_norm_bwd(dy, z, gate, r, inverse, dz, dgate):
    dy, z, gate, dz, dgate = flat(dy.float(), z, gate.float(), dz, dgate)
    n, s = z * r[..., None], torch.sigmoid(gate)
    dgate.copy_(dy * n * s * (1 + gate * (1 - s)))
    dz.copy_(_normed_bwd(dy * gate * s, n, inverse[:, None], r))


GATED_NORM = ((_gated_norm_fwd, "bqlcv' ~bqlcv' q q ~bqlcv' bql"),
              (_gated_norm_bwd, "~bqlcv' bqlcv' ~bqlcv' bql q bqlcv' ~bqlcv'"))


class FractalCode(NamedTuple):
    """Native code for what stands between the matrix products of a fractal layer, in dtype: convolutions with SiLU,
    norms for each type that z comes in, and the gate over a norm."""

    dtype: torch.dtype
    taps: NativeCode
    norm: dict[torch.dtype, NativeCode]
    gate: NativeCode


def fractal_code(device, dtype, elements, W):
    """FractalCode for convolutions of W taps over so many elements, or None where torch's operations are to run."""
    taps = native_code(TAPS, device, dtype, elements, W, silu=True)
    norm = {f: native_code(NORM, device, f, elements) for f in {dtype, torch.float32}}
    gate = native_code(GATED_NORM, device, dtype, elements)
    return None if None in (taps, gate, *norm.values()) else FractalCode(dtype, taps, norm, gate)


class ModuleNormCPU(torch.autograd.Function):
    """y = z r, r = (inverse_H sum z^2 + eps)^-1/2 over the last dimension; dz = r (dy - y inverse_H sum dy y). y is in
    float32 at least, whatever z: on a CPU to change types costs as much as the arithmetic."""

    @staticmethod
    def forward(ctx, z, inverse_H, eps):
        ctx.dtype, z = z.dtype, z.to(inverse_H.dtype)
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        r = torch.addcmul(eps, norm.square_(), inverse_H).rsqrt_()
        y = torch.mul(z, r, out=z.new_empty(z.shape))  # contiguous, whatever came
        ctx.save_for_backward(y, r, inverse_H)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        y, r, inverse_H = ctx.saved_tensors
        along = torch.linalg.vecdot(dy, y)[..., None].mul_(-inverse_H)
        return torch.addcmul(dy, y, along).mul_(r).to(ctx.dtype), None, None


def along_time(x):
    """(B, T, n, H), H contiguous, as native code takes it: (B, n, T, H / 16, 16)"""
    return blocks(x).transpose(1, 2)


class NativeUnits(torch.autograd.Function):
    """u_c(z) of L levels, by native code around two products of matrices: z (B, T, n, H), conv (L, n, H, w), M
    (L, n, H, H) in the type of the products, past (B, w - 1, n H) or None -> the last w - 1 inputs (B, w - 1, n H), and
    u_c(z) (B, T, n, H) of each level. Each norm and convolution, and the gradient of each, goes over memory once, and
    reads and writes in the order and the type that the products want."""

    @staticmethod
    def forward(ctx, code, z, conv, M, past, inverse_H, eps):
        (B, T, n, H), (L, _, _, w), float32 = z.shape, conv.shape, torch.float32
        conv = blocks(conv.transpose(2, 3).contiguous())  # (L, n, w, H / 16, 16)
        inverse_H, eps = inverse_H[:, 0], eps[:, 0]
        rows = blocks(z.new_empty(B, n, w - 1 + T, H, dtype=float32))
        start, x, end = rows[:, :, : w - 1], rows[:, :, w - 1 :], rows[:, :, T:]
        start[:] = 0 if past is None else along_time(past.view(B, w - 1, n, H))
        r_z, r = z.new_empty(B, n, T, dtype=float32), z.new_empty(L, B, n, T, dtype=float32)
        code.norm[z.dtype].fwd([along_time(z), inverse_H, eps, x, r_z])
        v, no_bias = z.new_empty(L, n, B, T, H, dtype=M.dtype), torch.zeros_like(conv[0, :, 0])
        for conv_c, v_c in zip(conv, blocks(v).transpose(1, 2)):
            code.taps.fwd([rows, conv_c, no_bias, v_c])
        u = torch.bmm(v.view(L * n, B * T, H), M.flatten(0, 1)).view_as(v)
        ys = [z.new_empty(z.shape, dtype=float32) for _ in range(L)]
        for u_c, y, r_c in zip(blocks(u).transpose(1, 2), ys, r):
            code.norm[M.dtype].fwd([u_c, inverse_H, eps, along_time(y), r_c])
        ctx.code = code
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, r_z, rows, conv, v, M, u, r, inverse_H, no_bias)
        return end.transpose(1, 2).reshape(B, w - 1, n * H), *ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dend, *dys):
        code, (z, r_z, rows, conv, v, M, u, r, inverse_H, no_bias) = ctx.code, ctx.saved_tensors
        (L, n, B, T, H), w, du = v.shape, conv.shape[2], torch.empty_like(u)
        for dy, u_c, r_c, du_c in zip(dys, blocks(u).transpose(1, 2), r, blocks(du).transpose(1, 2)):
            dy = z.new_zeros(z.shape, dtype=r.dtype) if dy is None else dy.contiguous()
            code.norm[M.dtype].bwd([along_time(dy), u_c, r_c, inverse_H, du_c])
        v, du = v.view(L * n, B * T, H), du.view(L * n, B * T, H)
        dM, dv = torch.bmm(v.mT, du).view_as(M), torch.bmm(du, M.flatten(0, 1).mT).view_as(u)
        dx, dconv = None, []
        for dv_c, conv_c in zip(blocks(dv).transpose(1, 2), conv):
            dx_c, _, dconv_c, _ = code.taps.bwd([dv_c, rows, conv_c, no_bias])  # (B, n, T, H), .., (n, w, H)
            dx = dx_c if dx is None else dx.add_(dx_c)
            dconv.append(dconv_c)
        if dend is not None:
            dx[:, :, T - w + 1 :] += dend.view(B, w - 1, n, H).transpose(1, 2)
        dz = z.new_empty(z.shape)
        code.norm[z.dtype].bwd([blocks(dx), along_time(z), r_z, inverse_H, along_time(dz)])
        return None, dz, torch.stack(dconv).transpose(2, 3), dM, None, None, None


class NativeGate(torch.autograd.Function):
    """n(z) silu(gate) for z (B, T, n, H) of each group and their gates (B, T, sum n H) side by side, by native code in
    one pass over memory; norms: 1 / true width and eps, (n,) each, of each group"""

    @staticmethod
    def forward(ctx, code, gate, norms, *zs):
        y, rs = gate.new_empty(gate.shape), []
        for z, (inverse_H, eps), gate_g, y_g in zip(zs, norms, of_groups(gate, zs), of_groups(y, zs)):
            B, T, n, _ = z.shape
            rs.append(eps.new_empty(B, n, T))
            code.fwd([along_time(z), gate_g, inverse_H, eps, y_g, rs[-1]])
        ctx.code, ctx.norms = code, norms
        ctx.save_for_backward(gate, *zs, *rs)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, *saved = ctx.saved_tensors
        zs, rs = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        dgate, dzs = gate.new_empty(gate.shape), [torch.empty_like(z) for z in zs]
        groups = (of_groups(x, zs) for x in (dy.contiguous(), gate, dgate))
        for z, r, dz, (inverse_H, _), dy_g, gate_g, dgate_g in zip(zs, rs, dzs, ctx.norms, *groups):
            ctx.code.bwd([dy_g, along_time(z), gate_g, r, inverse_H, along_time(dz), dgate_g])
        return None, dgate, None, *dzs


def of_groups(x, zs):
    """The parts of x (B, T, sum n H) that belong to the groups of zs, as native code takes them"""
    parts = x.split([z.shape[2] * z.shape[3] for z in zs], dim=-1)
    return [along_time(part.unflatten(-1, z.shape[2:])) for part, z in zip(parts, zs)]


# ---------------------------------------------------------------------------------------------------------------------
# The feed-forward layer

def _square_fwd(x, y):
    """y = relu(x)^2"""
    x, y = flat(x.float(), y)
    root = F.relu(x)
    y.copy_(root * root)


def _square_bwd(dy, y, dx):
    """dx = 2 relu(x) dy, for y = relu(x)^2"""
    dy, y, dx = flat(dy.float(), y.float(), dx)
    dx.copy_(2 * y.sqrt() * dy)


SQUARE = (_square_fwd, "~bcv ~bcv"), (_square_bwd, "~bcv ~bcv ~bcv")


class FeedForwardCPU(torch.autograd.Function):
    """relu(x w^T)^2 v^T (arXiv 2109.08668) for x (N, C), w (H, C), v (C, H), with native code for the square, or
    torch's operations where that is None. The square is made in place, and nothing else that is H wide is kept."""

    @staticmethod
    def forward(ctx, code, x, w, v):
        square = linear(x, w)
        if code is None:
            square.relu_().square_()
        else:
            code.fwd([blocks(square), blocks(square)])
        ctx.code = code
        ctx.save_for_backward(x, w, v, square)
        return linear(square, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, v, square = ctx.saved_tensors
        dh, dv = linear_backward(dy, square, v)
        if ctx.code is None:
            dh.mul_(square.sqrt().mul_(2))
        else:
            ctx.code.bwd([blocks(dh), blocks(square), blocks(dh)])
        return None, *linear_backward(dh, x, w), dv


def relu2_feed_forward(x, w, v):
    """relu(x w^T)^2 v^T for x (.., C), in the type of the products"""
    dtype = product_type(w)
    elements = x.shape[:-1].numel() * len(w)
    code = native_code(SQUARE, x.device, dtype, elements) if len(w) % VECTOR == 0 else None
    return FeedForwardCPU.apply(code, *(t.to(dtype) for t in (x.flatten(0, -2), w, v))).view_as(x)
