"""Is it faster so? `uv run tests/bench_pairs.py [--against COMMIT] [--flags FLAGS] [--change CODE] [--pairs N] [KEYS]`.

Two processes with the same model, text and seed take training steps of train.py in turns, each first as often as the
other, so that what the machine does besides slows both: the ratio of their times holds where the times themselves do
not. One runs this code, the other differs in what is given:
  --against COMMIT  its code is that commit's
  --flags FLAGS     flags of train.py that only the other gets, as in "--compile layers"
  --change CODE     Python that only the other runs before its model is made, with train.py and all that it imports at
                    hand, as in "cpu.onednn_is_faster = lambda: False"
KEYS are flags of train.py for both: --config recipes/shakespeare_87.json, or --n_embd 256 and so on.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from operator import truediv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def worker(pipe, root, flags, change):
    """Whenever asked for n steps, takes them with the code in root and answers with the seconds of one."""
    os.chdir(root)
    sys.path.insert(0, str(root))
    with contextlib.redirect_stdout(io.StringIO()):
        import train

        exec(change, {**sys.modules})
        settings = train.load_config(flags)
        train.keep_freed_memory()
        run = train.Run(settings, train.choose_device(settings.device), 0, 1)
        run.model.train()
        run.train_step()  # loads or compiles what is compiled
        pipe.send("ready")
        for steps in iter(pipe.recv, None):
            start = time.perf_counter()
            for _ in range(steps):
                run.train_step()
            pipe.send((time.perf_counter() - start) / steps)


@contextlib.contextmanager
def stepper(root, flags, change=""):
    """A function of n: the seconds of one of n steps, in a process of their own"""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs, root, flags, change), daemon=True)
    process.start()
    theirs.close()

    def step(n):
        ours.send(n)
        return ours.recv()

    try:
        ours.recv()
        yield step
    except EOFError:
        sys.exit("error: one of the two processes ended; what it said is above")
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join()


@contextlib.contextmanager
def code_of(commit):
    """A folder with the files of that commit"""
    made = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if made.returncode:
        sys.exit(f"error: --against {commit}: {made.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def compare(this, other, pairs, steps):
    """Seconds of a step of each, (pairs,) twice; who is first changes from pair to pair"""
    seconds = ([], [])
    for i in range(pairs):
        for side in ((0, 1), (1, 0))[i % 2]:
            seconds[side].append((this, other)[side](steps))
    return seconds


def main():
    parser = argparse.ArgumentParser(description="Training steps of two kinds in turns.", allow_abbrev=False)
    parser.add_argument("--against", metavar="COMMIT", help="the other's code")
    parser.add_argument("--flags", default="", help="the other's own flags of train.py")
    parser.add_argument("--change", default="", metavar="CODE", help="Python that the other runs first")
    parser.add_argument("--pairs", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a pair (default: %(default)s)")
    args, flags = parser.parse_known_args()
    if "--dataset" not in flags:
        flags += ["--dataset", str(ROOT / "dataset")]
    flags = [str(Path(word).resolve()) if Path(word).exists() else word for word in flags]  # in either's own folder
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(code_of(args.against)) if args.against else ROOT
        this = stack.enter_context(stepper(ROOT, flags))
        other = stack.enter_context(stepper(root, flags + shlex.split(args.flags), args.change))
        ours, theirs = compare(this, other, args.pairs, args.steps)
    ratios, (ms, other_ms) = sorted(map(truediv, ours, theirs)), (1e3 * statistics.median(x) for x in (ours, theirs))
    middle = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"this {ms:.0f} ms a step, other {other_ms:.0f}; this / other {statistics.median(ratios):.3f}, half of the "
          f"pairs within {middle[0]:.3f} to {middle[1]:.3f}")


if __name__ == "__main__":
    main()
