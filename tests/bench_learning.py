"""What the recipes learn, against seconds and against tokens: `uv run tests/bench_learning.py [--quick] [NAME ...]`.

Runs `train.py --config recipes/NAME.json` for each recipe and seed, and writes docs/learning.md (the table),
docs/learning_*.png and docs/learning.json (every run's curve). Runs of this machine on record are not repeated, unless
the recipe has changed since; --again repeats them. Names may be beginnings: `mixer_`. --quick: one seed instead of
three. --jobs 2: two processes side by side, of one thread each; their seconds compare only with each other. --steps N:
the recipes once more, with that many steps and one evaluation. --time_of NAME: the same with as many steps each as take
the time of NAME's, start and evaluations aside, by this machine's speeds on record. --on FILE: each on that text.

  text      --data DIR (default: dataset) holds tinyshakespeare.txt, and for books_* the six books; or, for --on, FILE.
            Its last 10 % is the validation split
  seconds   of the whole process: start, compilation, every evaluation and checkpoint
  reset     val_loss_reset: blocks of block_size, each on its own, nats a byte over the whole validation split
  carried   val_loss: the split in 16 streams with the state carried
Control: an interpolated Kneser-Ney 7-gram, which sees as much of a block as the model does.
"""

import argparse
import collections
import hashlib
import json
import os
import re
import statistics
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from machine import cpu

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS, RUNS = ROOT / "docs", ROOT / "runs"
SHAKESPEARE = ["tinyshakespeare.txt"]
BOOKS = ["david_copperfield.txt", "don_quixote.txt", "great_expectations.txt", "middlemarch.txt", "moby_dick.txt",
         "pride_and_prejudice.txt"]
BLOCK, BLOCKS = 64, {"books": 512, "mixer_512": 512, "noise": 128}  # bytes that the control of a figure sees
MACHINE = f"{cpu()}, {os.cpu_count()} cores"
TARGET = 1.898  # val_loss_reset of nanoGPT's CPU configuration at block 64
ORDER = 7


# ---------------------------------------------------------------- the control

def kneser_ney(train: np.ndarray, val: np.ndarray, block: int, order: int = ORDER) -> float:
    """Mean nats a byte of val in blocks of its own under an interpolated Kneser-Ney model of train, one discount an
    order (Chen and Goodman 1999, section 3): P(w|h) = max(c(hw) - D, 0) / c(h) + D n(h) / c(h) P(w|h'), where h' is h
    without its first byte, n(h) the number of bytes that follow h, D = n1 / (n1 + 2 n2), and below the highest order
    c(hw) is the number of bytes that precede hw."""
    grams = {k: pack(train, k) for k in range(1, order + 1)}
    context = np.arange(len(val) - 1) % block + 1  # bytes before each target in its block
    y = val[1:].astype(np.int64)
    p = np.full(len(y), 1 / 256)
    for k in range(1, order + 1):
        if k == order:
            seen, c = np.unique(grams[k], return_counts=True)
        else:
            seen, c = np.unique(np.unique(grams[k + 1]) & ((1 << 8 * k) - 1), return_counts=True)
        n1, n2 = (c == 1).sum(), (c == 2).sum()
        D = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        histories, first = np.unique(seen >> 8, return_index=True)  # sorted: those of one history stand together
        total, kinds = np.add.reduceat(c, first), np.diff(np.append(first, len(seen)))
        at = np.flatnonzero(context >= k - 1)  # targets with k - 1 bytes before them in their block
        gram = pack(val, k)[at + 2 - k]
        i, h = lookup(seen, gram), lookup(histories, gram >> 8)
        count = np.where(i >= 0, c[i], 0)
        known = h >= 0
        mix = np.maximum(count - D, 0) / total[h] + D * kinds[h] / total[h] * p[at]
        p[at] = np.where(known, mix, p[at])
    return float(-np.log(p).mean())


def pack(data, k):
    """Every k bytes in a row as one number, the first byte highest, (n - k + 1,) int64"""
    data, packed = data.astype(np.int64), np.zeros(len(data) - k + 1, dtype=np.int64)
    for i in range(k):
        packed = packed << 8 | data[i:len(data) - k + 1 + i]
    return packed


def lookup(table, keys):
    """Index of each key in the sorted table, -1 where it is not"""
    i = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[i] == keys, i, -1)


# ---------------------------------------------------------------- the runs

def recipes(names) -> list[Path]:
    found = [p for p in sorted((ROOT / "recipes").glob("*.json")) if not names or p.stem.startswith(tuple(names))]
    if not found:
        sys.exit(f"error: no recipe begins with {' or '.join(names)}; there are "
                 f"{', '.join(sorted(p.stem for p in (ROOT / 'recipes').glob('*.json')))}")
    return found


def stage(data: Path, name: str, on: str | None) -> Path:
    """A folder with links to the files a recipe is trained on: its own, or the one that is given."""
    files = [on] if on else BOOKS if name.startswith("books") else SHAKESPEARE
    folder = RUNS / "data" / (Path(on).name if on else "books" if files is BOOKS else "shakespeare")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (data / file).is_file():
            sys.exit(f"error: {data / file} is not there; give --data a folder that has it")
        link = folder / Path(file).name
        link.unlink(missing_ok=True)  # of another --data
        link.symlink_to((data / file).resolve())
    return folder


def record(recipe: Path, seed: int, folder_of_text: Path, jobs: int, variant: str, steps: int | None) -> dict:
    """One run, as a dict of its final figures and its curve; `variant` says what of it is not the recipe's own."""
    name = recipe.stem
    folder = RUNS / f"{name} {variant}".strip().replace(" ", "_") / str(seed)
    command = ["train.py", "--config", f"recipes/{recipe.name}", "--seed", str(seed)]
    command += [] if steps is None else ["--max_iters", str(steps), "--eval_interval", str(steps)]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(command)}", flush=True)
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    start = time.time()
    done = subprocess.run([sys.executable, *command, "--dataset", str(folder_of_text), "--checkpoint_dir",
                           str(folder)], cwd=ROOT, capture_output=True, text=True, env=env)
    seconds = time.time() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: m[k] for k in ("tokens", "seconds", "val_loss", "val_loss_reset")} for m in lines if "val_loss" in m]
    train = [(m["tokens"], round(m["seconds"], 1), round(m["train_loss"], 3)) for m in lines
             if m.get("train_loss") is not None]
    last = next(m for m in reversed(lines) if "val_loss" in m)
    return {"recipe": name, "variant": variant, "seed": seed, "digest": digest(recipe), "seconds": round(seconds, 1),
            "curve": curve, "train": train[::max(1, len(train) // 40)],
            "params": last["params"], "block_size": resolved(recipe).block_size,
            "date": time.strftime("%Y-%m-%d"), "machine": MACHINE, "jobs": jobs}


def steps_in_the_time_of(other: str, recipe: Path, results: list[dict]) -> int:
    """How many steps of a recipe take as long as all of another's, from both recipes' first training line on record to
    the last before an evaluation"""
    def measured(name):
        runs = [r for r in results if r["recipe"] == name and not r["variant"]]
        if not runs:
            sys.exit(f"error: --time_of {other}: no run of {name} on this machine is on record")
        lines = [[t for t in r["train"] if t[0] <= r["curve"][0]["tokens"]] for r in runs]
        pace = statistics.median((x[-1][1] - x[0][1]) / (x[-1][0] - x[0][0]) for x in lines)  # seconds a token
        return runs[0]["curve"][-1]["tokens"], pace

    (tokens, pace), (whole, own_pace) = measured(other), measured(recipe.stem)
    return round(tokens * pace / own_pace / whole * resolved(recipe).max_iters)


def resolved(recipe: Path):
    """The recipe's configuration with the defaults of what it leaves out"""
    from train import load_config  # here, because torch takes seconds
    return load_config(["--config", str(recipe), "--device", "auto"]).config


def digest(recipe: Path) -> str:
    return hashlib.sha256(recipe.read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------- what is written

def spread(values, digits=3):
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of_shakespeare(name: str) -> bool:
    return not name.startswith("books") and " on " not in name


def to_target(run):
    """Seconds up to the first evaluation at or below TARGET, None if there is none"""
    return next((p["seconds"] for p in run["curve"] if p["val_loss_reset"] <= TARGET), None)


def table(runs: dict[tuple[str, str], list[dict]], control: dict[str, float]) -> str:
    """A row for each (recipe, machine)"""
    rows = [("recipe", "machine", "seeds", "parameters", "block", "tokens", "seconds", f"seconds to {TARGET}", "reset",
             "carried")]
    for (name, machine), group in runs.items():
        ends = [r["curve"][-1] for r in group]
        reached = [s for r in group if r["block_size"] == 64 and (s := to_target(r)) is not None]
        seconds = spread([r["seconds"] for r in group], 0) + (" *" if group[0]["jobs"] > 1 else "")
        rows.append((f"`{name}`", machine, str(len(group)), f"{group[0]['params']:,}", str(group[0]["block_size"]),
                     f"{ends[0]['tokens']:,}", seconds,
                     spread(reached, 0) if len(reached) == len(group) and of_shakespeare(name) else "",
                     spread([e["val_loss_reset"] for e in ends]), spread([e["val_loss"] for e in ends])))
    for label, loss in control.items():
        rows.append((f"Kneser-Ney {ORDER}-gram, {label}", *[""] * 7, f"{loss:.3f}", ""))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plot(runs: dict[str, list[dict]], control: float, path: Path, key: str):
    """Training loss against seconds and tokens, a line a recipe with the range of its seeds as a band; validation
    losses as points. runs: by the recipe's name in the legend."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for name, group in runs.items():
        n = min(len(r["train"]) for r in group)
        train = np.array([r["train"][:n] for r in group])  # (seeds, n, 3): tokens, seconds, loss
        for ax, column, along in zip(axes, (1, 0), ("seconds", "tokens")):
            x, losses = train[:, :, column].mean(0), train[:, :, 2]
            line, = ax.plot(x, losses.mean(0), lw=1, label=name)
            ax.fill_between(x, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, lw=0)
            points = [(p[along], p[key]) for r in group for p in r["curve"]]
            ax.plot(*zip(*points), "o", ms=5, color=line.get_color())
    for ax, label in zip(axes, ("seconds, whole process", "tokens")):
        ax.axhline(control, color="black", ls=":", lw=1, label=f"Kneser-Ney {ORDER}-gram")
        ax.set(xlabel=label, xscale="log", ylim=(None, 2.4))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"nats a byte; points: {key}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(results: list[dict], data: Path):
    machines = [machine for machine, _ in collections.Counter(r["machine"] for r in results).most_common()]
    letters, by_name = dict(zip(machines, string.ascii_uppercase)), collections.defaultdict(list)
    for r in sorted(results, key=lambda r: (r["recipe"], r["variant"], letters[r["machine"]], r["seed"])):
        by_name[f"{r['recipe']} {r['variant']}".strip(), letters[r["machine"]]].append(r)
    control, texts, usual = {}, collections.defaultdict(set), {BLOCK, *BLOCKS.values()}  # texts: blocks that they need
    for (name, _), runs in by_name.items():
        if " on " in name:
            texts[name.partition(" on ")[2]].add(runs[0]["block_size"])
        else:
            texts["tinyshakespeare" if of_shakespeare(name) else "books"] = usual
    for label, blocks in sorted(texts.items(), key=lambda text: (text[0] != "tinyshakespeare", text[0])):
        files = {"tinyshakespeare": SHAKESPEARE, "books": BOOKS}.get(label, [label])
        if all((data / f).is_file() for f in files):
            text = np.frombuffer(b"".join((data / f).read_bytes() for f in files), dtype=np.uint8)
            cut = len(text) - len(text) // 10
            for block in sorted(blocks):
                control[f"{label}, blocks of {block}"] = kneser_ney(text[:cut], text[cut:], block)
    figures = collections.defaultdict(lambda: collections.defaultdict(dict))
    for (name, machine), runs in by_name.items():
        if not runs[0]["variant"]:
            figure = re.match(r"mixer_\d+|[^_]+", name)[0]
            figures[figure][machine][name.removeprefix(f"{figure}_")] = runs
    for figure, of_machines in figures.items():
        # seconds of one machine: that with the most recipes, among equals this one
        _, members = max(of_machines.items(), key=lambda item: (len(item[1]), item[0] == letters.get(MACHINE)))
        text, key = ("books", "val_loss") if figure == "books" else ("tinyshakespeare", "val_loss_reset")
        if (label := f"{text}, blocks of {BLOCKS.get(figure, BLOCK)}") in control:
            plot(members, control[label], DOCS / f"learning_{figure}.png", key)
    dates = sorted({r["date"] for r in results})
    (DOCS / "learning.md").write_text(
        "# What the recipes learn\n\n"
        f"`uv run tests/bench_learning.py`, {dates[0]}{' to ' + dates[-1] if dates[-1] != dates[0] else ''}, machines "
        f"{'; '.join(f'{letter}: {machine}' for machine, letter in letters.items())}. Nats a byte over the whole "
        "validation split, seconds of the whole process (*: one thread, beside another run); mean of the seeds, and "
        "their range in brackets.\n\n"
        f"{table(by_name, control)}\n\n"
        + "".join(f"![{p.stem}]({p.name})\n" for p in sorted(DOCS.glob("learning_*.png"))), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes, or beginnings of their names (default: all)")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--again", action="store_true", help="repeat runs that are on record")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each if several")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="run each recipe for N steps")
    length.add_argument("--time_of", metavar="NAME", help="run each recipe for as long as NAME's steps took")
    length.add_argument("--on", metavar="FILE", help="run each recipe on this text of --data")
    parser.add_argument("--data", type=Path, default=ROOT / "dataset", help="folder of the texts (default: dataset)")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps: {args.steps}; at least 1")
    DOCS.mkdir(exist_ok=True)
    store = DOCS / "learning.json"
    results = json.loads(store.read_text()) if store.exists() else []
    wanted = recipes(args.names)
    current = {p.stem: digest(p) for p in recipes([])}
    results = [r for r in results if current.get(r["recipe"]) == r["digest"]]
    elsewhere = [r for r in results if r["machine"] != MACHINE]
    results = [r for r in results if r["machine"] == MACHINE]
    runs = [(recipe, seed) for seed in range(1, 2 if args.quick else 4) for recipe in wanted]
    steps, variant = {recipe: args.steps for recipe in wanted}, f"in {args.steps} steps" if args.steps else ""
    variant = f"on {args.on}" if args.on else variant
    if args.time_of:
        runs = [(recipe, seed) for recipe, seed in runs if recipe.stem != args.time_of]
        steps = {recipe: steps_in_the_time_of(args.time_of, recipe, results) for recipe, _ in runs}
        variant = f"in the time of {args.time_of}"
    asked = {(recipe.stem, seed, variant) for recipe, seed in runs}
    if args.again:
        results = [r for r in results if (r["recipe"], r["seed"], r["variant"]) not in asked]
    on_record = {(r["recipe"], r["seed"], r["variant"]) for r in results}
    runs = [(recipe, seed) for recipe, seed in runs if (recipe.stem, seed, variant) not in on_record]
    texts = {recipe: stage(args.data, recipe.stem, args.on) for recipe, _ in runs}  # ends here where one is missing
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [pool.submit(record, recipe, seed, texts[recipe], args.jobs, variant, steps[recipe])
                for recipe, seed in runs]
        for run in as_completed(todo):
            results.append(run.result())
            store.write_text("[\n" + ",\n".join(json.dumps(r) for r in elsewhere + results) + "\n]\n")
    write(elsewhere + results, args.data)
    print((DOCS / "learning.md").read_text())


if __name__ == "__main__":
    main()
