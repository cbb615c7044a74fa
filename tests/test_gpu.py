"""What only a GPU can show; without one this file is skipped. The kernels as a GPU runs them, at the sizes of
test_triton.py and at larger ones, where many programs run at once; models and whole runs on them."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import MIXERS, V, make
from test_triton import (
    CONVS,
    FLOAT32,
    SCANS,
    _chunks,
    _conv,
    _conv_inputs,
    _limit,
    _scan,
    _scan_inputs,
    _steps,
    _within,
)

import kernels

ROOT = Path(kernels.__file__).parent

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA GPU here; test_triton.py runs the same kernels in Triton's interpreter",
                allow_module_level=True)

pytestmark = pytest.mark.slow
MANY = {
    "many programs": {"b": 3, "l": 517, "d": 333, "n": 16, "reset": True},
    "whole tiles": {"b": 2, "l": 512, "d": 512, "n": 16},
    "a batch for every tile of channels": {"b": 16, "l": 256, "d": 1024, "n": 16, "dtype": "bfloat16"},
    "64 states": {"b": 2, "l": 200, "d": 100, "n": 64},
}
MANY_CONVS = {
    "many programs": {"b": 3, "l": 517, "d": 333, "reset": True},
    "whole tiles, bfloat16": {"b": 4, "l": 512, "d": 512, "dtype": "bfloat16"},
    "dilation": {"b": 3, "l": 517, "d": 333, "dilation": 5},
}


@pytest.fixture
def on_gpu():
    """New tensors are made on the GPU."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("case", [*SCANS, *MANY])
def test_scan_equals_oracle(on_gpu, case):
    case = (SCANS | MANY)[case]
    _within(_scan(**case), _limit(**case))


@pytest.mark.parametrize("case", [*CONVS, *MANY_CONVS])
def test_conv_equals_oracle(on_gpu, case):
    case = (CONVS | MANY_CONVS)[case]
    _within(_conv(**case), _limit(**case))


def test_chunks_with_carried_state_are_the_whole(on_gpu):
    def scan(*x):
        return kernels.selective_scan(*x[:8], True, x[8], None, True)

    def conv(*x):
        return kernels.causal_conv1d(*x[:3], "silu", x[3], None, True, 2)

    _within(_chunks(scan, _scan_inputs(2, 300, 65, 16), (0, 1, 3, 4, 6), 8, 129), FLOAT32)
    _within(_chunks(conv, _conv_inputs(2, 300, 65, dilation=2), (0,), 3, 5), FLOAT32)


def test_steps_equal_oracle(on_gpu):
    _within(_steps(), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_gives_the_same_bits(on_gpu, dtype):
    """No sum depends on the order in which programs end, and no thread reads what another has yet to write."""
    def once():
        inputs = [None if x is None else x.detach().requires_grad_() for x in scan]
        y, last = kernels.selective_scan(*inputs[:8], True, inputs[8], reset, True)
        c = [x.detach().requires_grad_() for x in conv]
        v, final = kernels.causal_conv1d(*c[:3], "silu", c[3], reset, True)
        outputs = y, last, v, final
        return [*outputs, *torch.autograd.grad(outputs, [*inputs, *c], [torch.ones_like(x) for x in outputs])]

    name = str(dtype).removeprefix("torch.")
    scan, conv = _scan_inputs(4, 1000, 1024, 16, dtype=name), _conv_inputs(4, 1000, 1024, dtype=name)
    reset = torch.rand(4, 1000) < 0.01
    first = once()
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(once(), first))


def test_a_step_can_be_captured_in_a_graph(on_gpu):
    u, delta, A, B, C, D, z, bias, state = _scan_inputs(2, 4, 33, 16)
    y, last = kernels.selective_scan_oracle(*(x.double() for x in (u, delta, A, B, C, D, z, bias)), True,
                                            state.double(), None, True)
    held = [x[:, 0].clone() for x in (u, delta, B, C, z)]

    def step(h):
        return kernels.selective_scan_step(h, *held[:2], A, held[2], held[3], D, held[4], bias, True)

    step(state.clone())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(state)
    for t in range(4):
        for x, whole in zip(held, (u, delta, B, C, z)):
            x.copy_(whole[:, t])
        graph.replay()
        _within({"y": float((out - y[:, t]).norm() / y[:, t].norm())}, FLOAT32)
    _within({"state": float((state - last).norm() / last.norm())}, FLOAT32)


def both(kind, **keys):
    """A model in float64 on the CPU, and the same in float32 on the GPU, for evaluation; a batch with a boundary."""
    model = make(kind, **keys).eval()
    idx, reset = torch.randint(V, (3, 25)), torch.zeros(3, 25, dtype=torch.bool)
    reset[1, 5] = True
    return model, copy.deepcopy(model).float().cuda(), idx, reset


def losses_and_gradients(model, state, idx, reset):
    """Of two blocks, the state carried."""
    total = 0.0
    for t in slice(0, 12), slice(12, 24):
        target = idx[:, t.start + 1 : t.stop + 1]
        _, loss, state = model(idx[:, t], target, state=state, reset=reset[:, t])
        total = total + loss
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return total.item(), torch.cat([g.flatten() for g in grads if g is not None]).cpu().double()


@pytest.mark.parametrize("kind", MIXERS)
def test_model_equals_the_cpu(kind):
    cpu, gpu, idx, reset = both(kind)
    loss, grads = losses_and_gradients(cpu, cpu.initial_state(3), idx, reset)
    loss_gpu, grads_gpu = losses_and_gradients(gpu, gpu.initial_state(3), idx.cuda(), reset.cuda())
    assert abs(loss_gpu - loss) < 1e-5 * loss
    assert (grads_gpu - grads).norm() < 1e-4 * grads.norm()


def test_compiled_model_equals_the_cpu():
    """In float32, and under autocast within what bfloat16 holds."""
    cpu, gpu, idx, reset = both("hybrid", fractal_depth_range=[1, 2])
    loss, grads = losses_and_gradients(cpu, cpu.initial_state(3), idx, reset)
    compiled, idx, reset = torch.compile(gpu, dynamic=False, fullgraph=True), idx.cuda(), reset.cuda()
    for dtype, near, grads_near in (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 0.1):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss_gpu, grads_gpu = losses_and_gradients(compiled, gpu.initial_state(3, dtype), idx, reset)
        assert abs(loss_gpu - loss) < near * loss
        assert (grads_gpu - grads).norm() < grads_near * grads.norm()


def test_a_whole_run(tmp_path):
    """Training compiled in bfloat16, resumed to the same losses; writing and scoring with what came of it."""
    def program(name, *flags):
        done = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True, text=True,
                              cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def losses():
        metrics = [json.loads(line) for line in (tmp_path / "checkpoints/metrics.jsonl").read_text().splitlines()]
        return {m["step"]: m["train_loss"] for m in metrics if "train_loss" in m}

    text = (Path(os.__file__).parent / "argparse.py").read_bytes()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/argparse.txt").write_bytes(text)
    flags = ("--device", "cuda", "--n_embd", "64,48,64", "--attention_type", "mamba,fractal,standard", "--ffn_mult", 2,
             "--fractal_depth_range", "1,2", "--batch_size", 8, "--max_iters", 40, "--eval_interval", 20,
             "--checkpoint_interval", 20, "--ngram_orders", "2", "--dropout", 0.1, "--token_noise", 0.05)
    assert "cuda, bfloat16, compiled" in program("train.py", *flags)
    whole = losses()
    (tmp_path / "checkpoints/checkpoint_step_000040.pt").unlink()
    assert "resuming from" in program("train.py", *flags, "--init_from", "resume")
    resumed = losses()
    assert whole.keys() == resumed.keys() == {10, 20, 30, 40} and whole[40] < whole[10]
    assert all(abs(whole[step] - resumed[step]) < 1e-2 for step in whole)
    assert program("sample.py", "--max_new_tokens", 50, "--seed", 1).strip()
    bits = [float(re.search(r"bits/byte +([\d.]+)", program("sample.py", "--device", device, "--dtype", "float32",
                                                            "--score", "dataset/argparse.txt"))[1])
            for device in ("cuda", "cpu")]
    assert abs(bits[0] - bits[1]) < 1e-3 * bits[1]
