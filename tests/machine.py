"""What the benchmarks ask the machine."""

import platform
from pathlib import Path

import torch


def _cpuinfo():
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.is_file() else ""


def multiplies_bfloat16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo().split()))


def cpu() -> str:
    """The CPU's name, as far as the system tells it, its vectors, and whether it multiplies bfloat16."""
    name = next((line.split(":")[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")),
                platform.processor() or "unknown CPU")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{' with bfloat16' if multiplies_bfloat16() else ''}"


def resident(field: str) -> float:
    """VmRSS, what this process holds in memory, or VmHWM, the most that it held, in MB; Linux."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024 / 1e6
