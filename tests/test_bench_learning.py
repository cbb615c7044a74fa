"""The control that every table of losses is printed with, against its definition written as a recursion."""

import math
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bench_learning import kneser_ney

ORDER, BLOCK = 4, 16


def probabilities(train: bytes):
    """p(byte, history) of Chen and Goodman's interpolated Kneser-Ney model, a discount an order, from dictionaries."""
    counts = {ORDER: Counter(train[i:i + ORDER] for i in range(len(train) - ORDER + 1))}
    for k in range(ORDER - 1, 0, -1):  # how many bytes come before each gram
        longer = {train[i:i + k + 1] for i in range(len(train) - k)}
        counts[k] = Counter(gram[1:] for gram in longer)
    discount = {k: (n := Counter(c.values()))[1] / (n[1] + 2 * n[2]) for k, c in counts.items()}

    def p(byte: bytes, history: bytes) -> float:
        k = len(history) + 1
        lower = p(byte, history[1:]) if history else 1 / 256
        followers = [c for gram, c in counts[k].items() if gram[:-1] == history]
        if not followers:
            return lower
        total, D = sum(followers), discount[k]
        return (max(counts[k][history + byte] - D, 0) + D * len(followers) * lower) / total
    return p


def test_kneser_ney_is_its_definition():
    text = Path(textwrap.__file__).read_bytes()
    train, val = text[:3000], text[3000:3120]
    p = probabilities(train)
    for history in (b"", b"t", b"self"[-3:], b"\xff\xff"):
        assert sum(p(bytes([b]), history) for b in range(256)) == pytest.approx(1)
    nats = [-math.log(p(val[t:t + 1], val[max((t - 1) // BLOCK * BLOCK, t - ORDER + 1):t]))
            for t in range(1, len(val))]
    arrays = (np.frombuffer(part, dtype=np.uint8) for part in (train, val))
    assert kneser_ney(*arrays, BLOCK, ORDER) == pytest.approx(sum(nats) / len(nats), rel=1e-9)
