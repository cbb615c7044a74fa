"""
A language model whose every layer is attention, Mamba or a probabilistic fractal, at a width of its own.

    idx (B, T) -> wte (+ wpe) -> Block 0 -> ... -> Block n-1 -> ln_f -> lm_head -> logits (B, T, V)

B batch, T time, C width of the layer at hand, V vocabulary; in attention nh heads, hs head size, W window, S keys of
the past and of now; in Mamba N states a channel; in fractals w taps, C depth and H width of a module.

Every mixer maps (x, state, reset) -> (y, state): x (B, T, C); state is what the past leaves behind, None where the
stream starts here; reset (B, T) is true where a new document starts, and nothing before such a position is seen from
there on. The whole sequence, any split of it with the state carried, and one token at a time give the same numbers
and the same gradients. The model never detaches a state: the training loop does.
"""

import functools
import itertools
import math
import random
import sys
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cpu import (
    AttentionCPU,
    ModuleNormCPU,
    NativeAttention,
    NativeGate,
    NativeHeadNorm,
    NativeUnits,
    RMSNormCPU,
    add_rms_norm,
    attention_code,
    eager_cpu,
    fractal_code,
    hidden_keys,
    linear,
    product_type,
    relu2_feed_forward,
)
from kernels import VECTOR, causal_conv1d, selective_scan

PER_LAYER = ("n_embd", "n_head", "attention_type", "ffn_mult")  # keys with a value for each layer
Mixer = Literal["standard", "mamba", "fractal"]
MOST_LAYERS = 10000
Count = Annotated[int, Field(gt=0, lt=2**31)]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]
Depth = Annotated[int, Field(ge=1, le=5)]
Multiple = Annotated[float, Field(ge=0, le=1000)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def layer_counts(keys: dict) -> dict[str, int]:
    """The number of layers that each key gives: the lists among PER_LAYER by their lengths, and n_layer"""
    counts = {key: len(keys[key]) for key in PER_LAYER if isinstance(keys.get(key), list)}
    return counts | ({"n_layer": keys["n_layer"]} if isinstance(keys.get("n_layer"), int) else {})


class GPTConfig(BaseModel):
    """The model's keys. A per-layer key holds a list with one entry a layer, or one value for all layers;
    validation expands each to a list, draws the fractal modules and fills in what is null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    vocab_size: Count | None = Field(None, description="rows of the embedding table; null: the tokenizer's")
    block_size: Count = Field(128, description="tokens of one training block")
    n_layer: Count | None = Field(
        None, le=MOST_LAYERS, description="number of layers; null: as many as the lists have, or 4")
    n_embd: Count | list[Count] = Field(128, description="width of each layer")
    n_head: Count | list[Count | None] | None = Field(None, description="heads a layer; null: width // 64")
    attention_type: Mixer | list[Mixer] = Field("standard", description="each layer's mixer: standard, mamba, fractal")
    ffn_mult: Multiple | list[Multiple] = Field(4.0, description="feed-forward width / layer width; 0: no feed-forward")
    window: Count | None = Field(None, description="positions an attention query sees; null: block_size")
    position: Literal["rope", "learned"] = Field("rope", description="rope: rotary positions; learned: GPT-2's table")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="rmsnorm or layernorm, before mixers and FFNs")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="added to the variance in every norm")
    bias: bool = Field(False, description="biases in attention, feed-forward and layer norms")
    qk_norm: bool = Field(False, description="RMS norm of each head's queries and keys")
    zero_init: bool = Field(False, description="mixers and feed-forward layers add nothing at first")
    ngram_orders: list[Annotated[int, Field(ge=2)]] = Field([], description="hashed n-grams added to the embedding")
    ngram_rows: Count = Field(16384, description="rows of each order's table of hashed n-grams")
    activation: Literal["relu2", "gelu_tanh", "silu"] = Field(
        "relu2", description="relu2, gelu_tanh or silu, in feed-forward layers")
    dropout: Probability = Field(0.0, description="dropout of embeddings, attention and residual branches")
    ngram_dropout: Probability = Field(0.0, description="training: an n-gram's row is left out with this probability")
    token_noise: Probability = Field(0.0, description="training: the model reads another token with this probability")
    tie_weights: bool | None = Field(None, description="lm_head = wte; null: where first and last width agree")
    skip_connections: bool = Field(False, description="learned path from each layer to its mirror of equal width")
    d_state: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Mamba: state size N of each channel")
    d_conv: Count = Field(4, description="Mamba: taps of the causal convolution")
    expand: Count = Field(2, description="Mamba: inner width / layer width")
    dt_rank: Count | None = Field(None, description="Mamba: rank of the step sizes; null: ceil(width / 16)")
    fractal_count: Count = Field(4, le=1000, description="fractal modules in a fractal layer")
    fractal_depth_range: Range = Field([1, 3], description="lowest and highest depth of a module, at most 5")
    fractal_dim_range: Range = Field([32, 64], description="lowest and highest width of a module, in steps of 8")
    fractal_kernel: Count = Field(4, description="taps of each unit's causal convolution")
    fractal_drop: Probability = Field(0.05, description="training: a join takes a single branch with this probability")
    fractal_level_drop: Probability = Field(
        0.1, description="training: a module is cut to 1 .. C levels with this probability")
    fractal_seed: int = Field(1337, description="seed of the depths and widths drawn for each module")
    fractal_depths: list[list[Depth]] | None = Field(
        None, description="depth of each module of each layer; null: drawn")
    fractal_dims: list[list[Count]] | None = Field(None, description="width of each module of each layer; null: drawn")

    @model_validator(mode="after")
    def _resolve(self):
        if mistakes := self._complete():
            raise ValueError("\n".join(mistakes))
        return self

    def _complete(self) -> list[str]:
        """Fill in what is null; returns the mistakes between keys, a line each."""
        mistakes, lengths = [], layer_counts(vars(self))
        if len(set(lengths.values())) > 1:
            described = ", ".join(f"{key} gives {n} layers" for key, n in lengths.items())
            return [f"{described}: make them equal, or give one value for all layers"]
        self.n_layer = next(iter(lengths.values()), 4)
        if self.n_layer == 0:
            return [f"{next(iter(lengths))}: an empty list; give one entry for each layer"]
        for key in PER_LAYER:
            if not isinstance(getattr(self, key), list):
                setattr(self, key, [getattr(self, key)] * self.n_layer)
        self.n_head = [max(1, C // 64) if nh is None else nh for nh, C in zip(self.n_head, self.n_embd)]
        self.window = self.window or self.block_size
        for i, (kind, C, nh, mult) in enumerate(zip(self.attention_type, self.n_embd, self.n_head, self.ffn_mult)):
            if kind == "standard" and C % nh:
                mistakes.append(f"n_head: {nh} heads do not divide the width {C} of layer {i}; change n_head or n_embd")
            elif kind == "standard" and self.position == "rope" and (C // nh) % 2:
                mistakes.append(f"n_head: heads of layer {i} are {C // nh} wide; rotary positions need an even width")
            if mult and feed_forward_width(mult, C) < 1:
                mistakes.append(f"ffn_mult: {mult} at layer {i}; 0 or at least 1 / width is allowed")
        if self.tie_weights and self.n_embd[0] != self.n_embd[-1]:
            mistakes.append(f"tie_weights: true, but the first width is {self.n_embd[0]}, the last {self.n_embd[-1]}")
        if self.tie_weights is None:
            self.tie_weights = self.n_embd[0] == self.n_embd[-1]
        if self.position == "learned" and self.window < self.block_size:
            mistakes.append(f"window: {self.window} with learned positions; at least block_size = {self.block_size}")
        return mistakes + self._draw_fractals()

    def _draw_fractals(self) -> list[str]:
        """Depths C and widths H of every module, from fractal_seed alone; lists that are given stay as they are."""
        (a, b), (lo, hi) = self.fractal_depth_range, self.fractal_dim_range
        mistakes = []
        if a > b:
            mistakes.append(f"fractal_depth_range: [{a}, {b}] is empty; the first must not exceed the second")
        if b > 5:
            mistakes.append(f"fractal_depth_range: depth {b} is refused, at most 5: a module of depth C and width H "
                            "costs (2^C - 1)(H^2 + w H) multiply-adds a token")
        if -(-lo // 8) > hi // 8:
            mistakes.append(f"fractal_dim_range: [{lo}, {hi}] holds no multiple of 8")
        if mistakes:
            return mistakes
        if (self.fractal_depths is None) != (self.fractal_dims is None):
            return ["fractal_depths: give it together with fractal_dims, or neither"]
        if self.fractal_depths is not None:
            shapes = [[len(row) for row in rows] for rows in (self.fractal_depths, self.fractal_dims)]
            if shapes[0] != shapes[1] or len(shapes[0]) != self.n_layer:
                return [f"fractal_depths: one list a layer ({self.n_layer}), each as long as its list in fractal_dims"]
            empty = [i for i, row in enumerate(self.fractal_depths) if not row and self.attention_type[i] == "fractal"]
            return [f"fractal_depths: fractal layer {i} has no module" for i in empty]
        self.fractal_depths, self.fractal_dims = [], []
        for layer, kind in enumerate(self.attention_type):
            rng = random.Random(self.fractal_seed * 1000003 + layer)
            drawn = [(rng.randint(a, b), 8 * rng.randint(-(-lo // 8), hi // 8))
                     for _ in range(self.fractal_count if kind == "fractal" else 0)]
            self.fractal_depths.append([C for C, _ in drawn])
            self.fractal_dims.append([H for _, H in drawn])
        return []


class Linear(nn.Linear):
    """nn.Linear by cpu.py's product, which on some CPUs takes less time"""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def is_plain(layer: nn.Linear) -> bool:
    """Whether it does with its weight and bias what nn.Linear does"""
    return type(layer).forward in (Linear.forward, nn.Linear.forward)


def weight_of(layer: nn.Linear):
    """Its weight, for code that does not call the layer. TypeError where the layer's own forward does more with x."""
    if not is_plain(layer):
        raise TypeError(f"{type(layer).__name__} in place of Linear: its forward would not be called here, only its "
                        "weight read; change the weight itself, by torch.nn.utils.parametrize")
    return layer.weight


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467)."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        if eager_cpu(x):
            return RMSNormCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, C: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(C, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(C, config.norm_eps)


def add_norm(norm, x, y=None):
    """x + y (B, T, C), or x alone, and its norm"""
    if type(norm) is RMSNorm and (both := add_rms_norm(x, y, norm.weight, norm.eps)):
        return both
    x = x if y is None else x + y
    return x, norm(x)


def map_state(f, state):
    """Apply f to every tensor of a nested state of dicts, lists and tuples; None, the start of a stream, stays."""
    if isinstance(state, dict):
        return {key: map_state(f, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_state(f, value) for value in state)
    return None if state is None else f(state)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

@torch.inference_mode(False)  # one that a sample asks for first is kept for training
def rotary_table(S: int, hs: int, dtype: torch.dtype, device: torch.device):
    """(cos, cos) and (-sin, sin), (S, hs) each, of RoFormer's rotations (arXiv 2104.09864), base 10000, positions
    0 .. S-1, for rotate."""
    exact = dict(dtype=torch.float64, device="cpu")  # angles in float32 would be S 2^-24 off, and MPS has no float64
    frequency = 10000.0 ** (-torch.arange(0, hs, 2, **exact) / hs)
    angle = torch.outer(torch.arange(S, **exact), frequency)  # (S, hs / 2)
    cos, sin = (x.to(device, dtype) for x in (angle.cos(), angle.sin()))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


kept_rotary_table = functools.lru_cache(maxsize=16)(rotary_table)


def constant_rotary_table(*args):
    """rotary_table, made once; to compiled code it is a constant, whose sines are not taken again at each call. Fake
    tensors, as torch.export has them, are not kept."""
    faked = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return rotary_table(*args) if faked else kept_rotary_table(*args)


constant_rotary_table._dynamo_marked_constant = True  # torch.compiler.assume_constant_result imports a compiler first


def rotate(x, cos, sin):
    """x (B, nh, S, hs), cos and sin (S, hs), or (hs) for all positions alike -> x, its two halves rotated as pairs"""
    if torch.compiler.is_compiling():  # Inductor's vectors do not span the seam of a roll
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :half], sin[:, half:]
        turned = ((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype))  # before they are joined in memory
        return torch.stack(turned, -2).flatten(-2)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class MultiHeadAttention(nn.Module):
    """Causal self-attention over the last `window` positions of the stream.

    State: unrotated keys and values of the last W-1 positions, (B, nh, W-1, hs) each, and valid (B, W-1), false for
    slots that are empty or lie before the last reset. Rotations use positions local to the call."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd[layer]
        self.n_head = config.n_head[layer]
        self.window = config.window
        self.rope = config.position == "rope"
        self.dropout = config.dropout
        self.c_attn = Linear(C, 3 * C, bias=config.bias)
        self.q_norm, self.k_norm = (RMSNorm(C // self.n_head, config.norm_eps) if config.qk_norm else None
                                    for _ in range(2))
        self.c_proj = Linear(C, C, bias=config.bias)

    def initial_state(self, B, device, dtype):
        C, W = self.c_proj.weight.shape[0], self.window
        keys = torch.zeros(B, self.n_head, W - 1, C // self.n_head, device=device, dtype=dtype)
        return keys, torch.zeros_like(keys), torch.zeros(B, W - 1, device=device, dtype=torch.bool)

    def forward(self, x, state, reset):
        (B, T, C), nh = x.shape, self.n_head
        qkv = self.c_attn(x).view(B, T, 3 * nh, C // nh).transpose(1, 2)  # (B, 3 nh, T, hs)
        past_k, past_v, past_valid = state or (None, None, None)
        mask, valid = attention_mask(B, T, self.window, past_valid, reset, x.device)
        S = T if state is None else past_k.shape[2] + T
        wide = torch.promote_types(x.dtype, torch.float32)
        rotary = constant_rotary_table(S, C // nh, wide, x.device) if self.rope else None
        code = self.native_code(qkv, S, state)
        if code and self.q_norm is not None:
            gain = torch.cat([norm.weight.expand(nh, -1) for norm in (self.q_norm, self.k_norm)])
            qkv = NativeHeadNorm.apply(code.norm, qkv, gain, self.q_norm.eps)
        q, k, v = qkv.chunk(3, dim=1)  # (B, nh, T, hs) each
        if code:
            y = NativeAttention.apply(code, qkv, past_k, past_v, rotary, mask)
        else:
            if self.q_norm is not None:
                q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            rotated_q, all_k, all_v = q, after(past_k, k), after(past_v, v)
            if self.rope:
                cos, sin = rotary
                rotated_q, all_k = rotate(q, cos[S - T:], sin[S - T:]), rotate(all_k, cos, sin)
            y = attend(rotated_q, all_k, all_v, mask, self.dropout if self.training else 0.0)
            y = y.transpose(1, 2).reshape(B, T, C)
        n = self.window - 1
        state = (last(t if T >= n else after(past, t), n, 2) for past, t in ((past_k, k), (past_v, v)))
        return self.c_proj(y), (*state, valid)

    def native_code(self, qkv, S, state):
        """What NativeAttention and NativeHeadNorm run for this call, or None where torch's operations are to run: off
        the CPU, compiled, with dropout, with norms of heads of another class, where gradients reach the state, where
        the halves of heads are no whole vectors, and where (T, S) weights take too much memory, as all are kept"""
        _, _, T, hs = qkv.shape
        if not {type(self.q_norm), type(self.k_norm)} <= {RMSNorm, type(None)}:
            return None
        if not eager_cpu(self.c_attn.weight) or T > 512 or S > 1024 or hs % (2 * VECTOR):
            return None
        if (self.dropout and self.training) or any(past.requires_grad for past in state or ()):
            return None
        return attention_code(qkv.device, qkv.dtype, qkv.numel() // 3, norm=self.q_norm is not None)


def after(past, t):
    """The positions of t (B, nh, T, hs), after those of the past"""
    return t if past is None else torch.cat((past.to(t.dtype), t), dim=2)


def last(t, n, dim):
    """The last n positions of t along dim, zeros before them where there are fewer"""
    if (missing := n - t.shape[dim]) <= 0:
        return t.narrow(dim, -missing, n)
    return torch.cat((t.new_zeros(*t.shape[:dim], missing, *t.shape[dim + 1:]), t), dim)


def attention_mask(B, T, W, past_valid, reset, device):
    """What each query sees, (B, 1, T, S), or None for the plain causal triangle; and which of the last W-1 keys the
    next call may see, (B, W-1). past_valid (B, W-1): the same for this call, None: the stream starts here."""
    document = torch.zeros(B, T, dtype=torch.int, device=device) if reset is None else reset.cumsum(1)
    valid = torch.ones_like(document, dtype=torch.bool)
    if past_valid is not None:
        document = F.pad(document, (W - 1, 0))
        valid = torch.cat((past_valid, valid), dim=1)  # (B, S)
    S = valid.shape[1]
    now_valid = last(valid & (document == document[:, -1:]), W - 1, 1)
    if past_valid is None and reset is None and T <= W:
        return None, now_valid
    behind = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S)
    mask = ((behind >= 0) & (behind < W)) & (document[:, S - T:, None] == document[:, None]) & valid[:, None]
    return mask[:, None], now_valid


def attend(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(hs)) v with a boolean mask (true: seen), or with the causal triangle where mask is None."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512 and torch.is_grad_enabled():
        hidden = hidden_keys(mask, q, k.shape[2])
        hidden = hidden[0] if mask is None else hidden.repeat_interleave(q.shape[1], 0)
        return AttentionCPU.apply(*(t.flatten(0, 1) for t in (q, k, v)), hidden, dropout).view_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


# ---------------------------------------------------------------------------------------------------------------------
# Mamba (arXiv 2312.00752)

class MambaBlock(nn.Module):
    """Mamba-1's selective state space mixer: gate, causal convolution, selective scan.

    State: the last d_conv-1 inputs of the convolution (B, d_conv-1, d_inner) and h (B, d_inner, N), float32."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd[layer]
        self.d_inner = config.expand * C
        self.dt_rank = config.dt_rank or math.ceil(C / 16)
        self.d_state = config.d_state
        self.in_proj = Linear(C, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1, self.d_state + 1).float().log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, C, bias=False)

    def initial_state(self, B, device, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        return (torch.zeros(B, self.conv1d.kernel_size[0] - 1, self.d_inner, device=device, dtype=dtype),
                torch.zeros(B, self.d_inner, self.d_state, device=device, dtype=wide))

    def forward(self, x, state, reset):
        conv, h = state or (None, None)
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, d_inner) each
        x, conv = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", initial_state=conv,
                                reset=reset, return_final_state=True)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = linear(dt, weight_of(self.dt_proj))  # (B, T, d_inner); its bias joins inside the scan, in float32
        y, h = selective_scan(x, dt, -self.A_log.exp(), B, C, self.D, z, self.dt_proj.bias, delta_softplus=True,
                              initial_state=h, reset=reset, return_last_state=True)
        return self.out_proj(y), (conv, h)


# ---------------------------------------------------------------------------------------------------------------------
# Fractal (after FractalNet, arXiv 1605.07648, made causal, streamable and probabilistic)

class FractalModule(nn.Module):
    """The weights of one module: depth C and width H, a convolution and a matrix for each level, C - 1 joins."""

    def __init__(self, C: int, H: int, kernel: int):
        super().__init__()
        self.conv = nn.ParameterList(torch.randn(H, kernel) / math.sqrt(kernel) for _ in range(C))
        self.M = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(C))
        self.a = nn.Parameter(torch.zeros(C - 1))


class FractalBlock(nn.Module):
    """K modules side by side, each a recursion of depth C_k at width H_k; n(.) is a gainless RMS norm over a module:

        [z_1 .. z_K | g] = W_in x
        u_c(z) = n( M_c silu(conv_c(n(z))) )
        f_1 = u_1,  f_c(z) = p_c f_{c-1}(f_{c-1}(z)) + (1 - p_c) u_c(z),  p_c = sigmoid(a_c)
        y = W_out( concat_k n(f_{C_k}(z_k)) * silu(g) )

    Training draws, for each row, call and join, one branch instead of the mean with probability fractal_drop, and
    cuts a module to m levels with probability fractal_level_drop. `levels` = m cuts every module at evaluation.
    Modules of equal depth, a group, run together, padded to the widest, as one batch of matrix products. So do units
    that take the same input: those of levels C .. 1 take z, those of levels i .. 1 take f_i(z).

    State: the last w-1 inputs of each application, (B, w-1, L n H) for the L units of n modules that run together, in
    evaluation order."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, self.depths, self.dims = config.n_embd[layer], config.fractal_depths[layer], config.fractal_dims[layer]
        self.kernel, self.eps = config.fractal_kernel, config.norm_eps
        self.drop, self.level_drop = config.fractal_drop, config.fractal_level_drop
        self.levels = None
        self.groups = {c: [k for k, depth in enumerate(self.depths) if depth == c] for c in sorted(set(self.depths))}
        self.W_in = Linear(C, 2 * sum(self.dims), bias=False)
        self.fractals = nn.ModuleList(FractalModule(c, H, self.kernel) for c, H in zip(self.depths, self.dims))
        self.W_out = Linear(sum(self.dims), C, bias=False)

    def budget(self, depth: int) -> int:
        """Levels that a module of this depth runs"""
        return min(depth, self.levels or depth)

    def width(self, group: list[int]) -> int:
        """The width H that a group's modules are padded to, whole vectors of VECTOR channels"""
        return -(-max(self.dims[k] for k in group) // VECTOR) * VECTOR

    def initial_state(self, B, device, dtype):
        return tuple(torch.zeros(B, self.kernel - 1, L * len(group) * self.width(group), device=device, dtype=dtype)
                     for c, group in self.groups.items() for L in units_together(self.budget(c)))

    def past(self, state):
        """An iterator over the states, or over as many None at a stream's start. ValueError if they were made for other
        levels."""
        expected = sum(2 ** (self.budget(c) - 1) for c in self.groups)
        if state is not None and len(state) != expected:
            raise ValueError(f"fractal_levels: the state has {len(state)} entries a layer, this model's setting needs "
                             f"{expected}; start a new state when the levels change")
        return iter([None] * expected if state is None else state)

    def packed(self):
        """For each group of n modules of depth C, padded with zeros: convolutions (C, n H, w), matrices (C, n, H, H),
        transposed, join weights (C - 1, n, 1), 1 / true width and eps (n, 1)"""
        packed = []
        for c, group in self.groups.items():
            modules = [(self.fractals[k], self.width(group) - self.dims[k]) for k in group]
            conv = [F.pad(m.conv[i], (0, 0, 0, pad)) for i in range(c) for m, pad in modules]
            M = [F.pad(weight_of(m.M[i]), (0, pad, 0, pad)) for i in range(c) for m, pad in modules]
            a = torch.cat([m.a for m, _ in modules]).view(len(group), c - 1)  # gives contiguous gradients, as DDP wants
            p = a.t().sigmoid()[:, :, None]
            wide = torch.promote_types(p.dtype, torch.float32)
            inverse_H = torch.stack([p.new_full((1,), 1 / self.dims[k], dtype=wide) for k in group])
            packed.append((torch.stack(conv).unflatten(0, (c, -1)).flatten(1, 2),
                           torch.stack(M).unflatten(0, (c, -1)).mT, p, inverse_H, torch.full_like(inverse_H, self.eps)))
        return packed

    def in_groups(self, weight):
        """weight (_, S, ..) -> (_, sum n H, ..): the channels in the order of the groups, modules padded with zeros"""
        parts, zeros = weight.split(self.dims, dim=1), (0, 0) * (weight.dim() - 2)
        pads = [(k, self.width(group) - self.dims[k]) for group in self.groups.values() for k in group]
        return torch.cat([F.pad(parts[k], (*zeros, 0, pad)) if pad else parts[k] for k, pad in pads], dim=1)

    def projections(self):
        """W_in (2 sum n H, C) and W_out (C, sum n H) for channels as in_groups has them"""
        W_in, W_out = map(weight_of, (self.W_in, self.W_out))
        return self.in_groups(W_in.unflatten(0, (2, -1))).flatten(0, 1), self.in_groups(W_out)

    def native_code(self, z, state, reset):
        """What the native functions run for this call, or None where torch's operations are to run: where a block is
        shorter than the taps or holds a boundary, or where gradients reach the state"""
        weight = self.W_in.weight
        if not eager_cpu(weight) or z.shape[1] < self.kernel or (reset is not None and reset.any()):
            return None
        if any(past.requires_grad for past in state or ()):
            return None
        return fractal_code(z.device, product_type(weight), z.numel(), self.kernel)

    def forward(self, x, state, reset):
        W_in, W_out = self.projections()
        z, gate = linear(x, W_in).chunk(2, dim=-1)  # (B, T, sum n H) each
        past, packed, code, calls = self.past(state), self.packed(), self.native_code(z, state, reset), []
        outputs, z = [], z.split([conv.shape[1] for conv, *_ in packed], dim=-1)
        for (c, group), weights, z_g in zip(self.groups.items(), packed, z):
            z_g = z_g.unflatten(-1, (len(group), -1))  # (B, T, n, H)
            calls.append(_FractalGroup(self, c, weights, past, reset, z_g, code))
            outputs.append(calls[-1].run(z_g, c))
        if code:
            y = NativeGate.apply(code.gate, gate, [(call.inverse_H[:, 0], call.eps[:, 0]) for call in calls], *outputs)
        else:
            y = torch.cat([call.norm(output).flatten(2) for call, output in zip(calls, outputs)], dim=-1)
            y = y * F.silu(gate.to(y.dtype))
        return linear(y, W_out), tuple(itertools.chain(*(call.states for call in calls)))


def units_together(levels: int) -> list[int]:
    """How many units each step of a recursion of so many levels runs together, in evaluation order"""
    return [levels] + [L for deep in range(1, levels) for L in units_together(deep)]


class _FractalGroup:
    """One forward call of the n modules of a layer that share a depth, padded to one width H."""

    def __init__(self, block: FractalBlock, depth: int, weights, past, reset, z, code):
        self.depth, self.code = depth, code
        self.conv, self.M, self.p, self.inverse_H, self.eps = weights
        self.M = self.M if code is None else self.M.to(code.dtype)
        self.low = self.depth + 1 - block.budget(self.depth)  # the level at which every recursion ends
        self.past, self.reset, self.states = past, reset, []
        self.dtype, self.drop, self.cut = z.dtype, block.drop, None
        if block.training and self.depth > 1:
            shape = (z.shape[0], z.shape[2])
            cut = torch.randint(1, self.depth + 1, shape, device=z.device)
            cut_now = torch.rand(shape, device=z.device) < block.level_drop
            self.cut = torch.where(cut_now, cut, self.depth)  # (B, n), the levels that are left

    def norm(self, z):
        """z (..., n, H), zero in its padding -> RMS-normalised over each module's true width"""
        if eager_cpu(self.M):
            return ModuleNormCPU.apply(z, self.inverse_H, self.eps)
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=self.inverse_H.dtype)
        return (z * torch.addcmul(self.eps, norm.square(), self.inverse_H).rsqrt_()).to(z.dtype)

    def units(self, z, c):
        """u_low(z) .. u_c(z), (B, T, n, H) each"""
        B, T, n, H = z.shape
        levels, L, past = slice(self.low - 1, c), c - self.low + 1, next(self.past)
        if self.code:
            past = None if past is None else past[..., : n * H]  # all L levels read the same
            state, *ys = NativeUnits.apply(self.code, z, self.conv[levels].unflatten(1, (n, H)), self.M[levels], past,
                                           self.inverse_H, self.eps)
            self.states.append(state.repeat(1, 1, L).to(self.dtype))
            return ys
        conv, M = self.conv[levels].flatten(0, 1), self.M[levels].flatten(0, 1)  # (L n H, w), (L n, H, H)
        v = self.norm(z)[:, :, None].expand(B, T, L, n, H).reshape(B, T, L * n * H)
        v, state = causal_conv1d(v, conv, None, "silu", past, self.reset, return_final_state=True)
        self.states.append(state.to(self.dtype))
        v = torch.bmm(v.view(B * T, L * n, H).transpose(0, 1), M)  # (L n, B T, H)
        return self.norm(v.transpose(0, 1).view(B, T, L, n, H)).unbind(2)

    def join(self, deep, shallow, c):
        """f_c(z), (depth + 1 - c)th join from the top; a module cut to m levels takes u_c(z) from the mth join on"""
        weight = self.p[c - 2]  # (n, 1)
        if self.cut is not None:
            p = weight[:, 0]
            one_branch, take_deep = torch.rand(2, *self.cut.shape, device=deep.device)
            weight = torch.where(one_branch < self.drop, (take_deep < p).to(p.dtype), p)
            weight = torch.where(self.depth + 1 - c < self.cut, weight, 0.0)[:, None, :, None]  # (B, 1, n, 1)
        return torch.lerp(shallow, deep, weight.to(deep.dtype))

    def run(self, z, c):
        """f_c(z)"""
        y, *shallow = self.units(z, c)
        for i, u in enumerate(shallow, self.low + 1):  # y = f_{i-1}(z)
            y = self.join(self.run(y, i - 1), u, i)
        return y


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def feed_forward_width(mult: float, C: int) -> int:
    return int(mult * C + 1e-6)  # where mult is the ratio of two widths, the product may fall short of the first


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd[layer]
        hidden = feed_forward_width(config.ffn_mult[layer], C)
        self.activation = config.activation
        self.c_fc = Linear(C, hidden, bias=config.bias)
        self.c_proj = Linear(hidden, C, bias=config.bias)

    def forward(self, x):
        plain = self.activation == "relu2" and is_plain(self.c_fc) and is_plain(self.c_proj)
        if plain and self.c_fc.bias is None and eager_cpu(self.c_fc.weight):
            return relu2_feed_forward(x, self.c_fc.weight, self.c_proj.weight)
        return self.c_proj(self.activate(self.c_fc(x)))

    def activate(self, x):
        if self.activation == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh") if self.activation == "gelu_tanh" else F.silu(x)


class Block(nn.Module):
    """Routes the residual stream through one mixer and a feed-forward layer, resizing it first where widths differ."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, before = config.n_embd[layer], config.n_embd[max(layer - 1, 0)]
        self.kind = config.attention_type[layer]
        mixer = {"standard": MultiHeadAttention, "mamba": MambaBlock, "fractal": FractalBlock}[self.kind]
        self.resize = Linear(before, C, bias=False) if before != C else None
        self.ln_1 = make_norm(config, C)
        self.mixer = mixer(config, layer)
        self.ffn = FeedForward(config, layer) if config.ffn_mult[layer] else None
        self.ln_2 = make_norm(config, C) if self.ffn else None
        self.dropout = config.dropout

    def forward(self, x, state, reset, skip=None):
        if self.resize is not None:
            x = self.resize(x).to(x.dtype)  # under autocast too, the residual stream stays as exact as the embedding
        if skip is not None:
            x = x + skip
        x, n = add_norm(self.ln_1, x)
        y, state = self.mixer(n, state, reset)
        y = F.dropout(y, self.dropout, self.training)
        if self.ffn is None:
            return x + y, state
        x, n = add_norm(self.ln_2, x, y)
        return x + F.dropout(self.ffn(n), self.dropout, self.training), state


def replace_some(idx, share: float):
    """idx with this share of its tokens, each drawn for itself, replaced by any of idx: unigram noise, a language
    model's counterpart of smoothing by interpolation (arXiv 1703.02573)."""
    other = idx.flatten()[torch.randint(idx.numel(), idx.shape, device=idx.device)]
    return torch.where(torch.rand(idx.shape, device=idx.device) < share, other, idx)


class NGramEmbedding(nn.Module):
    """For each order n the last n tokens, hashed to a row of a table; the sum over the orders, (B, T, C).

    State: the last max(orders) - 1 tokens of the document (B, max(orders) - 1), -1 for none."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.orders, self.rows = sorted(set(config.ngram_orders)), config.ngram_rows
        self.reach, self.dropout = self.orders[-1] - 1, config.ngram_dropout
        self.table = nn.EmbeddingBag(len(self.orders) * self.rows, config.n_embd[0], mode="sum")

    def initial_state(self, B, device):
        return torch.full((B, self.reach), -1, dtype=torch.long, device=device)

    def forward(self, idx, past, reset):
        B, T = idx.shape
        tokens = torch.cat((self.initial_state(B, idx.device) if past is None else past, idx), dim=1)
        document = None if reset is None else F.pad(reset.cumsum(1), (self.reach, 0))  # (B, reach + T)
        h, rows = tokens[:, self.reach:], []
        for n in range(2, self.reach + 2):  # h: the last n tokens as a number of 64 bits, overflow wanted
            at = slice(self.reach + 1 - n, self.reach + 1 - n + T)
            token = tokens[:, at]
            if reset is not None:
                token = torch.where(document[:, at] == document[:, self.reach:], token, -1)
            h = (h ^ (h >> 29)) * 0x2545F4914F6CDD1D + token + 1
            if n in self.orders:
                rows.append((h ^ (h >> 32)) % self.rows + len(rows) * self.rows)
        past = tokens[:, T:].contiguous()
        if reset is not None:
            past = torch.where(document[:, T:] == document[:, -1:], past, -1)
        rows, weights = torch.stack(rows, dim=-1).flatten(0, 1), None  # (B T, orders)
        if self.training and self.dropout:
            weights = F.dropout(torch.ones_like(rows, dtype=self.table.weight.dtype), self.dropout)
        return self.table(rows, per_sample_weights=weights).view(B, T, -1), past


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size: null; give the tokenizer's n_vocab")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd[0])
        self.wpe = nn.Embedding(config.block_size, config.n_embd[0]) if config.position == "learned" else None
        self.ngrams = NGramEmbedding(config) if config.ngram_orders else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        mirrors = range((config.n_layer + 1) // 2, config.n_layer) if config.skip_connections else ()
        self.skip = nn.ModuleDict({
            str(j): Linear(C, C, bias=False) for j in mirrors
            if (C := config.n_embd[j]) == config.n_embd[config.n_layer - 1 - j]})
        self.ln_f = make_norm(config, config.n_embd[-1])
        self.lm_head = Linear(config.n_embd[-1], config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        runs = [list(layers) for _, layers in itertools.groupby(range(config.n_layer), config.n_embd.__getitem__)]
        self.bottleneck = min(runs, key=lambda layers: config.n_embd[layers[0]])[-1]  # the first of minimum width
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        wte, wpe, lm_head, c_attn, c_fc       N(0, 0.02^2); n-gram table 0
        attention and FFN c_proj, W_out       N(0, (0.02 / sqrt(2 n_layer))^2)
        resize, W_in                          N(0, 1 / fan_in)
        skip                                  0
        fractal conv, M_c, a_c                N(0, 1 / w), N(0, 2.8 / H), 0
        in_proj, x_proj, conv1d               U(-b, b), b = 1 / sqrt(fan_in); out_proj the same / sqrt(n_layer)
        dt_proj                               weight U(-b, b), b = dt_rank^-0.5; bias so that softplus gives dt
                                              log-uniform in [0.001, 0.1]
        A_log, D                              log(1 .. N), 1
        norms, biases                         1, 0
        zero_init                             c_proj, W_out, out_proj 0
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if isinstance(module, nn.Embedding) or leaf in ("lm_head", "c_attn", "c_fc"):
                nn.init.normal_(module.weight, std=0.02)
            elif leaf in ("c_proj", "W_out"):
                nn.init.normal_(module.weight, std=residual_std)
            elif leaf in ("resize", "W_in"):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif name.startswith("skip.") or isinstance(module, nn.EmbeddingBag):
                nn.init.zeros_(module.weight)
            elif isinstance(module, FractalModule):
                for M in module.M:
                    nn.init.normal_(M.weight, std=math.sqrt(2.8 / M.in_features))
            elif isinstance(module, MambaBlock):
                module.out_proj.weight /= math.sqrt(self.config.n_layer)
                nn.init.uniform_(module.dt_proj.weight, -module.dt_rank**-0.5, module.dt_rank**-0.5)
                dt = torch.exp(torch.rand(module.d_inner) * math.log(100) + math.log(0.001)).clamp(min=1e-4)
                module.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            back = leaf in ("c_proj", "W_out", "out_proj")  # to the stream
            if (back or leaf in ("c_attn", "c_fc")) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if back and self.config.zero_init:
                nn.init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **keys) -> "GPT":
        """A GPT-2 or Mamba-1 of the Hugging Face hub by its name (gpt2, state-spaces/mamba-130m-hf), or one in a folder
        that save_pretrained wrote, with the logits that transformers gives, to float32 rounding. keys go over the
        model's own; a smaller block_size cuts the table of positions. ValueError for any other kind of model, and
        transformers' own errors where nothing can be loaded."""
        from transformers import AutoConfig, AutoModelForCausalLM

        c = AutoConfig.from_pretrained(name_or_path)
        if (c.model_type == "gpt2" and c.activation_function in ("gelu_new", "gelu_pytorch_tanh")
                and c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx and not c.add_cross_attention):
            own = dict(block_size=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, bias=True,
                       position="learned", norm="layernorm", activation="gelu_tanh",
                       ffn_mult=(c.n_inner or 4 * c.n_embd) / c.n_embd)
            names = {"transformer.": "", ".attn.": ".mixer.", ".mlp.": ".ffn."}
        elif (c.model_type == "mamba" and c.hidden_act == "silu" and c.use_conv_bias and not c.use_bias
                and c.intermediate_size == c.expand * c.hidden_size):
            own = dict(n_embd=c.hidden_size, n_layer=c.num_hidden_layers, attention_type="mamba", ffn_mult=0.0,
                       d_state=c.state_size, d_conv=c.conv_kernel, expand=c.expand, dt_rank=int(c.time_step_rank))
            names = {"backbone.": "", "embeddings.": "wte.", "layers.": "h.", ".norm.": ".ln_1.", "norm_f.": "ln_f."}
        else:
            raise ValueError(f"{name_or_path}: a {c.model_type} model; GPT-2 and Mamba-1 in their usual forms will do")
        own |= dict(vocab_size=c.vocab_size, norm_eps=c.layer_norm_epsilon, tie_weights=c.tie_word_embeddings)
        config = GPTConfig(**own | keys)
        if "position" in own and config.block_size > c.n_positions:
            raise ValueError(f"block_size: {config.block_size}, but {name_or_path} has {c.n_positions} positions")
        model = cls(config)
        ours, theirs = model.state_dict(), AutoModelForCausalLM.from_pretrained(name_or_path).state_dict()
        for key, weight in theirs.items():
            for old, new in names.items():
                key = key.replace(old, new)
            if key == "wpe.weight":
                weight = weight[: model.config.block_size]
            elif c.model_type == "gpt2" and ".c_" in key and weight.dim() == 2:
                weight = weight.t()  # GPT-2 keeps its matrices as (in, out)
            ours[key] = weight
        model.load_state_dict(ours)
        return model

    def initial_state(self, B: int, dtype: torch.dtype | None = None) -> dict:
        """The state at the start of a stream, as explicit tensors; dtype is that of the activations."""
        weight, state = self.wte.weight, {}
        if self.wpe is not None:
            state["pos"] = torch.zeros(B, dtype=torch.long, device=weight.device)
        if self.ngrams is not None:
            state["ngrams"] = self.ngrams.initial_state(B, weight.device)
        state["layers"] = [block.mixer.initial_state(B, weight.device, dtype or weight.dtype) for block in self.h]
        return state

    def next_block(self, state: dict) -> dict:
        """The state that the next training or evaluation block starts from; views are copied, as they would keep all
        keys and values in memory. With learned positions attention starts fresh and recurrent layers carry on, as
        GPT-2's table has no position past block_size."""
        state = map_state(torch.Tensor.contiguous, state)
        if self.wpe is None:
            return state
        fresh = [map_state(torch.zeros_like, s) if block.kind == "standard" else s
                 for block, s in zip(self.h, state["layers"])]
        return {**state, "layers": fresh, "pos": torch.zeros_like(state["pos"])}

    def set_fractal_levels(self, levels: int | None):
        """Cut every fractal module to at most `levels` levels from now on (None: all). States do not carry over."""
        if levels is not None and levels < 1:
            raise ValueError(f"fractal_levels: {levels}; at least 1")
        for block in self.h:
            if block.kind == "fractal":
                block.mixer.levels = levels

    def trunk(self, idx, state=None, reset=None, n_layer=None):
        """idx (B, T) -> the residual stream after the first n_layer layers (B, T, C), and the state there."""
        layers = list(self.h)[:n_layer]
        if self.training and self.config.token_noise:
            idx = replace_some(idx, self.config.token_noise)
        x = self.wte(idx)
        past = [None] * len(layers) if state is None else state["layers"]
        new_state = {}
        if self.wpe is not None:
            pos, new_state["pos"] = self._positions(idx, state, reset)
            x = x + self.wpe(pos)
        if self.ngrams is not None:
            grams, new_state["ngrams"] = self.ngrams(idx, None if state is None else state["ngrams"], reset)
            x = x + grams
        x = F.dropout(x, self.config.dropout, self.training)
        outputs, new_state["layers"] = [], []
        for i, block in enumerate(layers):
            skip = self.skip[str(i)](outputs[self.config.n_layer - 1 - i]) if str(i) in self.skip else None
            x, s = block(x, past[i], reset, skip)
            outputs.append(x if self.skip else None)  # of no use without skips, and would stay in memory
            new_state["layers"].append(s)
        return x, new_state

    def _positions(self, idx, state, reset):
        """Positions (B, T) since the last reset or the stream's start, and the next one (B,)."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"learned positions reach {self.config.block_size} tokens (block_size), not {T}")
        t = torch.arange(T, device=idx.device).expand(B, T)
        pos = t if state is None else state["pos"][:, None] + t
        if reset is not None:
            last = torch.where(reset, t, -1).cummax(1).values  # (B, T), index of the last reset, -1: none yet
            pos = torch.where(last >= 0, t - last, pos)
        return pos, pos[:, -1] + 1

    def forward(self, idx, targets=None, state=None, reset=None, last_only=False, return_logits=False):
        """idx, targets (B, T) int64, a target of -1 is ignored; reset (B, T) bool; state from an earlier call.
        Returns (logits, loss, state). Without targets: logits (B, T, V), or (B, 1, V) with last_only, and loss None.
        With targets: the mean cross entropy in nats, float32, and logits only with return_logits."""
        x, state = self.trunk(idx, state, reset)
        if last_only:
            x = x[:, -1:]
        _, x = add_norm(self.ln_f, x)
        logits = self.lm_head(x) if targets is None or return_logits else None
        loss = None if targets is None else cross_entropy(x.flatten(0, 1), weight_of(self.lm_head), targets.flatten())
        return logits, loss, state

    def encode(self, idx, state=None, reset=None):
        """The bottleneck's features: the residual stream after the last layer of the first run of minimum-width
        layers, (B, T, min width), and the state of the layers up to there."""
        return self.trunk(idx, state, reset, n_layer=self.bottleneck + 1)

    def num_params(self) -> int:
        """All parameters, tied ones once, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> list[int]:
        """Forward FLOPs a token of each layer, and of lm_head at the end: two for each multiply-add of matrix products,
        convolutions and scans, attention's over a full window, those of each application in a fractal. Norms, gates and
        activations are left out, and of any other mixer all but its linear layers. Training costs three times as
        much."""
        flops = []
        for i, block in enumerate(self.h):
            macs = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
            macs += self.skip[str(i)].weight.numel() if str(i) in self.skip else 0
            mixer = block.mixer
            if block.kind == "standard":
                macs += 2 * mixer.window * mixer.c_proj.in_features
            elif block.kind == "mamba":
                macs += mixer.d_inner * (mixer.conv1d.kernel_size[0] + 3 * mixer.d_state)  # decay, input, output
            elif block.kind == "fractal":
                macs -= sum(C * H * H for C, H in zip(mixer.depths, mixer.dims))
                macs += sum((2 ** mixer.budget(C) - 1) * (H * H + mixer.kernel * H)
                            for C, H in zip(mixer.depths, mixer.dims))
            flops.append(2 * macs)
        return [*flops, 2 * self.lm_head.weight.numel()]

    def layer_table(self, dtype: torch.dtype | None = None) -> str:
        """One line a layer: index, type, width, parameters, forward FLOPs a token, bytes of state a stream; dtype is
        that of the activations."""
        rows = [("layer", "type", "width", "parameters", "FLOPs/token", "state bytes")]
        flops = self.flops_per_token()
        for i, (block, state) in enumerate(zip(self.h, self.initial_state(1, dtype)["layers"])):
            n = sum(p.numel() for p in block.parameters())
            if str(i) in self.skip:
                n += self.skip[str(i)].weight.numel()
            kind = block.kind
            if kind == "fractal":
                kind += " " + " ".join(f"{C}x{H}" for C, H in zip(block.mixer.depths, block.mixer.dims))
            if i == self.bottleneck:
                kind += " (bottleneck)"
            size = sum(t.nbytes for t in state)
            rows.append((str(i), kind, str(self.config.n_embd[i]), f"{n:,}", f"{flops[i]:,}", f"{size:,}"))
        rest = self.num_params() - sum(p.numel() for m in (self.h, self.skip) for p in m.parameters())
        rows.append(("", "embeddings, head", "", f"{rest:,}", f"{flops[-1]:,}", ""))
        rows.append(("", "all", "", f"{self.num_params():,}", f"{sum(flops):,}", ""))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                 for row in rows]
        return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def logits_at_once(x) -> int:
    """float32 logits held at a time: 16 MiB, which a CPU's caches hold, or 256 on a GPU, where more chunks would pass
    over the weights and their gradient too often"""
    return 2**26 if x.is_cuda else 2**22


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of softmax(x w^T), x (N, C), w (V, C), targets (N,), with -1 ignored, in chunks of rows.
    The gradients are made along with the loss: no (N, V) tensor outlives its chunk, nothing is recomputed, and there
    is one backward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        w = weight.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        need_grad = any(ctx.needs_input_grad)  # of a parameter under no_grad, too: cross_entropy detaches it
        dx = torch.empty_like(x) if need_grad else None
        dw = torch.zeros_like(weight, dtype=wide) if need_grad else None
        for i in range(0, x.shape[0], chunk):
            xc, t = x[i:i + chunk], targets[i:i + chunk, None]
            seen = t >= 0
            logits = F.log_softmax(F.linear(xc, w).to(wide), dim=-1)
            loss -= (logits.gather(1, t.clamp(min=0)) * seen).sum()
            if need_grad:
                logits.exp_().scatter_add_(1, t.clamp(min=0), torch.full_like(logits[:, :1], -1.0))
                dlogits = logits.mul_(seen).to(x.dtype)  # (chunk, V): softmax - onehot
                dx[i:i + chunk] = dlogits @ w
                if dw.dtype == x.dtype:
                    dw.addmm_(dlogits.t(), xc)
                else:
                    dw += dlogits.t() @ xc
                del dlogits
            del logits  # before the next chunk's are made
        if need_grad:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors  # of no further use, so scaled in place: dw may be the largest tensor of all
        return dx.mul_(grad), dw.mul_(grad), None, None


def cross_entropy(x, weight, targets):
    """Mean cross entropy of the logits x weight^T over the targets that are not -1; x (N, C), weight (V, C)."""
    x = x.to(product_type(x))
    count = (targets >= 0).sum().clamp(min=1)
    if x.shape[0] * weight.shape[0] <= logits_at_once(x):
        logits = linear(x, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count
    return chunked_cross_entropy(x, weight if torch.is_grad_enabled() else weight.detach(), targets) / count


def chunked_cross_entropy(x, weight, targets):
    """LinearCrossEntropy out of reach of a compiler, which would unroll its loop and hold all chunks at once"""
    apply = LinearCrossEntropy.apply
    if "torch._dynamo" in sys.modules:  # else there is none, and torch.compiler.disable would import it
        apply = torch.compiler.disable(apply)
    return apply(x, weight, targets, max(1, logits_at_once(x) // weight.shape[0]))


chunked_cross_entropy._torchdynamo_disable = True  # of this function alone, not of what it calls


if __name__ == "__main__":
    from prepare import DataError, Tokenizer
    from train import choose_device, choose_dtype, load_config

    settings = load_config()
    config = settings.config
    try:
        config.vocab_size = config.vocab_size or Tokenizer(config.tokenizer).n_vocab
    except DataError as error:
        sys.exit(f"error: {error}")
    print(GPT(config).layer_table(choose_dtype(config.dtype, choose_device(settings.device))))
