"""What the benchmarks ask the machine."""

import platform
from pathlib import Path


def cpu() -> str:
    """The CPU's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or "unknown CPU")


def resident(field: str) -> float:
    """VmRSS, what this process holds in memory, or VmHWM, the most that it held, in MB; Linux."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024 / 1e6
