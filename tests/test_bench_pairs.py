"""The pairs of steps: a known difference is found, and the code of a commit is that commit's."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import bench_pairs
import pytest

TINY = ["--n_embd", "16", "--attention_type", "standard", "--batch_size", "2", "--block_size", "16", "--device", "cpu"]


@pytest.mark.slow
def test_a_slower_step_is_found(tmp_path):
    (tmp_path / "text").write_bytes(Path(textwrap.__file__).read_bytes())
    slower = "step = train.Run.train_step; import time\n" \
             "train.Run.train_step = lambda run: (step(run), time.sleep(0.3))"
    command = [sys.executable, bench_pairs.__file__, *TINY, "--dataset", str(tmp_path), "--pairs", "3", "--change"]
    said = subprocess.run([*command, slower], capture_output=True, text=True)
    this, other, ratio = (float(x) for x in re.search(
        r"this (\d+) ms a step, other (\d+); this / other ([\d.]+)", said.stdout).groups())
    assert other > this + 250 and ratio == pytest.approx(this / other, rel=0.5)
    said = subprocess.run([*command, "pass", "--nothing", "1"], capture_output=True, text=True)
    assert said.returncode == 1 and "unknown key --nothing" in said.stderr


def test_the_code_of_a_commit(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "train.py").write_text("then")
    git("add", ".")
    git("commit", "-qm", "then")
    (tmp_path / "train.py").write_text("now")
    monkeypatch.setattr(bench_pairs, "ROOT", tmp_path)
    with bench_pairs.code_of("HEAD") as folder:
        assert (folder / "train.py").read_text() == "then"
    with pytest.raises(SystemExit, match="--against none: fatal"), bench_pairs.code_of("none"):
        pass


def test_each_is_first_as_often():
    order = []
    this, other = (lambda n, name=name: order.append(name) or n for name in "ab")
    assert bench_pairs.compare(this, other, 4, 7) == ([7] * 4, [7] * 4)
    assert "".join(order) == "abbaabba"
