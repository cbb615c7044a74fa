"""The control that every table of losses is printed with, against its definition written as a recursion."""

import json
import math
import textwrap
from collections import Counter
from pathlib import Path

import bench_learning
import numpy as np
import pytest
from bench_learning import kneser_ney, steps_in_the_time_of, write

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


def test_steps_in_the_time_of_another(tmp_path):
    """A recipe that is 1.5 times as slow a token, in steps of another size, takes two thirds of the tokens; what comes
    before the first training line, between the evaluations and after the last, does not count."""
    def run(name, seconds_a_step, tokens_a_step, steps, start, seed):
        train = [(i * tokens_a_step, start + i * seconds_a_step + (i > 100) * 50, 2.0)
                 for i in range(10, steps + 1, 10)]
        return {"recipe": name, "variant": "", "seed": seed, "train": train,
                "curve": [{"tokens": 100 * tokens_a_step}, {"tokens": steps * tokens_a_step}]}

    recipe = tmp_path / "slow.json"
    recipe.write_text(json.dumps({"config": {"max_iters": 400}}))
    results = [run("fast", 0.2, 1000, 200, 3, 1), run("slow", 0.15, 500, 400, 9, 1), run("slow", 0.15, 500, 400, 5, 2)]
    results.append(run("slow", 9.0, 500, 400, 5, 1) | {"variant": "in the time of fast"})
    assert steps_in_the_time_of("fast", recipe, results) == round(200 * 0.2 / 0.15)
    with pytest.raises(SystemExit, match="no run of none on this machine is on record"):
        steps_in_the_time_of("none", recipe, results)


def test_runs_of_two_machines_have_rows_of_their_own(tmp_path, monkeypatch):
    drawn, plot = [], bench_learning.plot
    monkeypatch.setattr(bench_learning, "DOCS", tmp_path)
    monkeypatch.setattr(bench_learning, "MACHINE", "small")
    monkeypatch.setattr(bench_learning, "plot", lambda *args: drawn.append(args[0]) or plot(*args))
    (tmp_path / "tinyshakespeare.txt").write_bytes(Path(textwrap.__file__).read_bytes())

    def run(machine, seed, seconds, loss):
        return {"recipe": "shakespeare_fast", "variant": "", "seed": seed, "machine": machine, "date": "2026-11-27",
                "jobs": 1, "params": 9, "block_size": 64, "seconds": seconds, "train": [(100, 1.0, 2.5), (200, 2.0, 2)],
                "curve": [{"tokens": 200, "seconds": seconds - 1, "val_loss": loss, "val_loss_reset": loss}]}

    write([run("small", 1, 9.0, 1.9), run("large", 1, 3.0, 1.7), run("large", 2, 5.0, 1.6)], tmp_path)
    text = (tmp_path / "learning.md").read_text()
    assert "machines A: large; B: small." in text and (tmp_path / "learning_shakespeare.png").stat().st_size > 1000
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "fast" in line]
    assert [row[1:3] + row[6:9] for row in rows] == [
        ["A", "2", "4 (3 to 5)", "3 (2 to 4)", "1.650 (1.600 to 1.700)"], ["B", "1", "9", "", "1.900"]]
    assert [r["machine"] for r in drawn[0]["fast"]] == ["small"]  # as many recipes as the other, and this machine


def test_runs_on_another_text_have_its_control_and_no_target(tmp_path, monkeypatch):
    """nanoGPT's 1.898 is a loss on tinyshakespeare: another text's runs are not measured by it, nor drawn beside it."""
    drawn = []
    monkeypatch.setattr(bench_learning, "DOCS", tmp_path)
    monkeypatch.setattr(bench_learning, "plot", lambda runs, *_: drawn.append(list(runs)))
    text = Path(textwrap.__file__).read_bytes()
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    (tmp_path / "tale.txt").write_bytes(text[::-1])

    def run(variant, loss):
        return {"recipe": "shakespeare_fast", "variant": variant, "seed": 1, "machine": "A", "date": "2026-11-27",
                "jobs": 1, "params": 9, "block_size": 64, "seconds": 9.0, "train": [(100, 1.0, 2.5)],
                "curve": [{"tokens": 200, "seconds": 8.0, "val_loss": loss, "val_loss_reset": loss}]}

    write([run("", 1.8), run("on tale.txt", 1.5)], tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
            (tmp_path / "learning.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[7], row[8]) for row in rows[:2]] == [
        ("`shakespeare_fast`", "8", "1.800"), ("`shakespeare_fast on tale.txt`", "", "1.500")]
    reversed_text = np.frombuffer(text[::-1], dtype=np.uint8)
    cut = len(text) - len(text) // 10
    loss = kneser_ney(reversed_text[:cut], reversed_text[cut:], 64)
    assert [(row[0], row[8]) for row in rows[-1:]] == [("Kneser-Ney 7-gram, tale.txt, blocks of 64", f"{loss:.3f}")]
    assert drawn == [["fast"]]


def test_a_recipe_is_trained_on_the_text_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_learning, "RUNS", tmp_path / "runs")
    for name in ("tale.txt", "tinyshakespeare.txt"):
        (tmp_path / name).write_text(name)
    assert [p.read_text() for p in bench_learning.stage(tmp_path, "shakespeare_fast", "tale.txt").iterdir()] == [
        "tale.txt"]
    assert [p.read_text() for p in bench_learning.stage(tmp_path, "shakespeare_fast", None).iterdir()] == [
        "tinyshakespeare.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tale.txt").write_text("another")
    assert [p.read_text() for p in bench_learning.stage(tmp_path / "other", "shakespeare_fast", "tale.txt").iterdir()
            ] == ["another"]
    with pytest.raises(SystemExit, match="is not there; give --data"):
        bench_learning.stage(tmp_path, "shakespeare_fast", "none.txt")
