"""
The training run. `uv run train.py` trains what current_configuration.json describes; every key is also a flag.

One process on a CPU or a GPU, or one for each device with `uv run torchrun --nproc_per_node=N train.py` (DDP, or
FSDP2 with `--fsdp true`). Top to bottom: configuration, files of a run, optimizers, schedule, evaluation, the run.
"""

import gc
import time

START = time.monotonic()  # before the slow imports: a run's seconds count from here
if __name__ == "__main__":
    gc.disable()  # until the loop: imports make a million objects, and looking for garbage among them takes 0.3 s

import argparse
import contextlib
import ctypes
import difflib
import functools
import inspect
import itertools
import json
import logging
import math
import mmap
import os
import re
import shlex
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_origin

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import kernels
from model import GPT, MOST_LAYERS, PER_LAYER, Block, Count, GPTConfig, Probability, layer_counts, map_state
from prepare import DataError, DataLoader, Tokenizer, eval_blocks, eval_lanes, load_corpus, publish, temporary_file
from sample import CHECKPOINT_FORMAT, SampleError, choose_device, fitting, generate, load_checkpoint

CONFIG_FILE = Path("current_configuration.json")
SCHEMA_FILE = Path("current_configuration.schema.json")
RUN_FILES = ("checkpoint_step_*.pt", "best_model.pt", "metrics.jsonl", "loss.png", "events.out.tfevents.*")
LOG_EVERY = 10  # steps between two training lines of metrics.jsonl
SAMPLE_TOKENS = 200  # tokens of the sample shown at every evaluation

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class Config(GPTConfig):
    """The "config" object of the file: the model's keys, and those of data and optimisation."""

    tokenizer: str = Field("byte", description="byte, gpt2 or another tiktoken name")
    batch_size: Count = Field(16, description="rows of a batch, for each process")
    gradient_accumulation_steps: Count = Field(1, description="batches summed into one optimizer step")
    sequential: bool = Field(True, description="contiguous streams with the state carried; false: random windows")
    carry_state: bool = Field(True, description="false: every block of a stream starts with a fresh state")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the token stream, its end, kept for validation")
    max_iters: Count | None = Field(None, description="optimizer steps; null: as epochs says, or 2000")
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the training split, in place of max_iters")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw, or muon: Muon for hidden matrices, AdamW elsewhere")
    learning_rate: PositiveFloat = Field(2e-3, description="highest learning rate")
    muon_learning_rate: PositiveFloat | None = Field(None, description="Muon's highest one; null: learning_rate")
    min_lr: NonNegativeFloat | None = Field(None, description="last learning rate; null: learning_rate / 10")
    warmup_iters: int | None = Field(None, ge=0, description="warm-up steps; null: min(100, max_iters / 20)")
    lr_decay_iters: Count | None = Field(None, description="step where the cosine ends; null: max_iters")
    weight_decay: NonNegativeFloat = Field(0.1, description="decay of the matrices of linear and embedding layers")
    beta1: Probability = Field(0.9, description="AdamW's first beta")
    beta2: Probability = Field(0.99, description="AdamW's second beta")
    grad_clip: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0: no clipping")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the matrix products: auto, float32, bfloat16 or float16")
    eval_interval: Count = Field(250, description="steps between evaluations")
    eval_iters: Count | None = Field(None, description="batches of an evaluation; null: the validation split")
    eval_lanes: Count = Field(
        16, le=2**16, description="rows of an evaluation: contiguous streams, or blocks on their own")
    checkpoint_interval: Count = Field(500, description="steps between checkpoints")
    keep_checkpoints: Count = Field(3, description="newest checkpoints kept")
    max_bad_steps: Count = Field(20, description="steps in a row with a loss or gradient not finite that end the run")

    def _complete(self) -> list[str]:
        mistakes = super()._complete()
        if self.max_iters is not None and self.epochs is not None:
            mistakes.append(f"epochs: {self.epochs} beside max_iters {self.max_iters}; give one of the two")
        if self.max_iters is None and self.epochs is None:
            self.max_iters = 2000
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.min_lr > self.learning_rate:
            mistakes.append(f"min_lr: {self.min_lr} is above learning_rate {self.learning_rate}")
        return mistakes


class Settings(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_file: str | None = Field(None, alias="$schema", description="the schema an editor completes from")
    config: Config = Field(default_factory=Config, description="model, data and optimisation")
    dataset: str = Field("dataset", description="folder of the training text")
    checkpoint_dir: str = Field("checkpoints", description="folder of checkpoints, metrics and plots")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 or mps")
    compile: bool | Literal["layers"] = Field(
        True, description='on GPUs compile the model, on CPUs what is between matrix products; "layers": whole layers')
    fsdp: bool = Field(False, description="torchrun: each process keeps its share of weights and optimizer (FSDP2)")
    seed: int = Field(1337, ge=0, lt=2**62, description="seed of initialisation, data order and dropout")
    init_from: str = Field("scratch", description="scratch, resume, a checkpoint to start from, or gpt2")


DEFAULT_FILE = """{
    "$schema": "current_configuration.schema.json",
    "config": {
        "tokenizer": "byte",
        "batch_size": 8,
        "block_size": 128,
        "n_embd": [128, 96, 64, 96, 128],
        "attention_type": ["mamba", "fractal", "standard", "fractal", "mamba"],
        "n_head": null,
        "qk_norm": true,
        "zero_init": true,
        "max_iters": 800,
        "optimizer": "muon",
        "learning_rate": 0.02,
        "muon_learning_rate": 0.008,
        "weight_decay": 0.0,
        "eval_interval": 200,
        "eval_iters": 20
    },
    "dataset": "dataset",
    "checkpoint_dir": "checkpoints",
    "device": "auto",
    "compile": true,
    "seed": 1337
}
"""
OUTER = {(field.alias or name): field for name, field in Settings.model_fields.items() if name != "config"}
KEYS = {**Config.model_fields, **OUTER}


@contextlib.contextmanager
def replacing(path: Path):
    """A new binary file that takes the place of `path` once it is whole and on the disk."""
    with temporary_file(path.parent, prefix=f".{path.name}.") as file:
        yield file
        publish(file, path)


def write_atomically(path: Path, text: str):
    with replacing(path) as file:
        file.write(text.encode())


def parse_value(key: str, text: str):
    """A flag's text as the value its key takes: JSON, a,b,c as a list, anything else as a string."""
    if KEYS[key].annotation is str:
        return text
    if "," in text and not text.startswith(("[", "{")):
        return [read_json(part) for part in text.split(",")]
    value = read_json(text)
    return [value] if get_origin(KEYS[key].annotation) is list and not isinstance(value, list) else value


def read_json(text: str):
    """What the text says in JSON, where a number may begin with its point, or the text"""
    try:
        return json.loads(re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", text))
    except (ValueError, RecursionError):
        return text


def unknown_key(key: str, where: str, flag: str = "") -> str:
    nearest = difflib.get_close_matches(key.removeprefix("config."), KEYS, n=1, cutoff=0.5)
    return f"{where}: unknown key {flag}{key}" + (f"; the nearest is {flag}{nearest[0]}" if nearest else "")


def read_flags(argv: list[str]) -> tuple[Path | None, dict, list[str]]:
    """The file that --config names, the keys that are given as flags, mistakes."""
    parser = argparse.ArgumentParser(
        usage="uv run train.py [--config FILE] [--KEY VALUE ...]", allow_abbrev=False, exit_on_error=False,
        description="Train the model that current_configuration.json describes. Every key is also a flag, and flags "
                    "win: --batch_size 8 --n_embd 64,32,64 --compile false")
    parser.add_argument("--config", type=Path, help=f"configuration file (default: {CONFIG_FILE})")
    for key, field in KEYS.items():
        if key != "$schema":
            default = json.dumps(field.get_default(call_default_factory=True))
            text = f"{field.description} (default: {default})"
            parser.add_argument(f"--{key}", metavar="VALUE", help=text.replace("%", "%%"))
    try:
        known, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        return None, {}, [f"flags: {error}"]
    mistakes = [unknown_key(word[2:].split("=")[0], "flags", "--") for word in unknown if word.startswith("--")]
    if unknown and not mistakes:
        mistakes = [f"flags: {unknown[0]} belongs to no key; write --key value"]
    flags = {key: parse_value(key, text) for key, text in vars(known).items() if key != "config" and text is not None}
    return known.config, flags, mistakes


def read_file(path: Path) -> tuple[dict, list[str]]:
    """The file's keys at one level, those of "config" and those beside it, and its mistakes of form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{path}: no such file; name another with --config, or leave --config out"]
    except json.JSONDecodeError as error:
        return {}, [f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"]
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, numbers or nesting of thousands
        return {}, [f"{path}: cannot be read: {error}"]
    if not isinstance(content, dict) or not isinstance(content.get("config", {}), dict):
        return {}, [f'{path}: must be an object whose "config" is an object']
    mistakes, flat = [], {}
    for inside, section in (("config", content.get("config", {})), ("", content)):
        for key, value in section.items():
            if key not in KEYS and (inside or key != "config"):
                mistakes.append(unknown_key(f"{inside}.{key}" if inside else key, str(path)))
            elif key in KEYS and (key in Config.model_fields) != bool(inside):
                mistakes.append(f'{path}: {key} belongs {"outside" if inside else "inside"} the "config" object')
            elif key != "config":
                flat[key] = value
    return flat, mistakes


def merge(file: dict, flags: dict, where: str) -> tuple[dict, list[str], list[str]]:
    """Flags over file; max_iters and epochs replace each other. Lists of one level must agree in length; where flags
    set the number of layers, the file's lists are cut to it or repeated. Returns the keys, notes on that, mistakes."""
    notes, mistakes = [], []
    for level, name in ((file, where), (flags, "flags")):
        counts = layer_counts(level)
        mistakes += [f"{name}: {key}: an empty list; give one entry for each layer" for key in PER_LAYER
                     if level.get(key) == []]
        if 0 not in counts.values() and len(set(counts.values())) > 1:
            described = ", ".join(f"{key} has {n}" for key, n in counts.items())
            mistakes.append(f"{name}: layers do not agree: {described}; make them equal, or give one value for all")
    merged = dict(file)
    for key, other in (("epochs", "max_iters"), ("max_iters", "epochs")):
        if flags.get(key) is not None:
            merged.pop(other, None)
    wanted = set(layer_counts(flags).values())
    if len(wanted) == 1 and not mistakes and max(wanted) <= MOST_LAYERS:
        n_layer = wanted.pop()
        merged.pop("n_layer", None)
        for key in PER_LAYER:
            value = file.get(key)
            if key not in flags and isinstance(value, list) and value and len(value) != n_layer:
                merged[key] = [value[i % len(value)] for i in range(n_layer)]
                notes.append(f"{key}: the file's {len(value)} entries made {n_layer}: {json.dumps(merged[key])}")
    return merged | flags, notes, mistakes


def explain(error: ValidationError, flags: dict, where: str, rules: bool) -> list[str]:
    """One line for each key that pydantic found wrong: where it stands, its value, what is allowed; and with rules, for
    each rule between keys that is broken."""
    allowed: dict[str, list[str]] = {}
    values, lines = {}, []
    for e in error.errors():
        key = next((part for part in e["loc"] if part in KEYS), None)
        if key is None:  # a rule between keys: its message names them
            for line in e["msg"].removeprefix("Value error, ").split("\n") if rules else []:
                lines.append(f"{'flags' if line.partition(':')[0] in flags else where}: {line}")
            continue
        pattern = e["type"] == "string_pattern_mismatch"  # of the device
        message = f"must be {KEYS[key].description}" if pattern else e["msg"].replace("Input should be", "must be")
        values.setdefault(key, e["input"])
        if message not in allowed.setdefault(key, []):
            allowed[key].append(message)
    return [f"flags: --{key} {values[key]}: {' or '.join(m)}" if key in flags else
            f"{where}: {key} is {json.dumps(values[key])}: {' or '.join(m)}" for key, m in allowed.items()] + lines


def write_schema():
    """The schema of the keys as they are now beside the configuration file, for an editor."""
    text = json.dumps(Settings.model_json_schema(by_alias=True), indent=2) + "\n"
    with contextlib.suppress(OSError):  # nothing depends on it
        if CONFIG_FILE.exists() and not (SCHEMA_FILE.exists() and SCHEMA_FILE.read_bytes() == text.encode()):
            write_atomically(SCHEMA_FILE, text)


def load_config(argv: list[str] | None = None) -> Settings:
    """Read file and flags. Mistakes are printed, one line each, and end the program with exit code 2."""
    path, flags, mistakes = read_flags(sys.argv[1:] if argv is None else argv)
    if path is None and not os.path.lexists(CONFIG_FILE):
        try:
            write_atomically(CONFIG_FILE, DEFAULT_FILE)
            print(f"{CONFIG_FILE} was missing: wrote the default one")
        except OSError as error:
            mistakes.append(f"{CONFIG_FILE} is missing, and the default one cannot be written here: {error.strerror}")
    write_schema()
    where = path or CONFIG_FILE
    file, file_mistakes = read_file(where)
    merged, notes, merge_mistakes = merge(file, flags, str(where))
    mistakes += file_mistakes + merge_mistakes
    try:
        settings = Settings(config={k: v for k, v in merged.items() if k in Config.model_fields},
                            **{k: v for k, v in merged.items() if k in OUTER})
    except ValidationError as error:
        mistakes += explain(error, flags, str(where), rules=not merge_mistakes)
    if not mistakes:
        try:
            choose_device(settings.device)
        except SampleError:
            mistakes = [f'device: "{settings.device}", but PyTorch sees no such device here; set "device": "auto" in '
                        'the file or add --device cpu']
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes one speaks
        for line in mistakes:
            print(f"error: {line}", file=sys.stderr)
        for note in [] if mistakes else notes:
            print(f"note: {note}")
    if mistakes:
        sys.exit(2)
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# The files of a run


class RunError(Exception):
    """A mistake that only shows once the run's files are read; its text is one line."""


@contextlib.contextmanager
def writing(path: Path):
    """Within, path is written; where that fails, RunError names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the zip writer's own may hide the system's
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise RunError(f"{path} cannot be written: {getattr(cause, 'strerror', None) or cause}") from None


def lock(folder: Path, closing: contextlib.ExitStack):
    """Hold the folder, as one run at a time does, where the system can; closing lets go of it. Raises RunError."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        closing.callback(os.close, file := os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"checkpoint_dir: another run writes to {folder}/; wait for its end, or give this one "
                           "another --checkpoint_dir") from None
        except OSError:  # some network disks
            pass


def archive_run(folder: Path):
    """Move an earlier run's files into folder/run_001 (002, ...), so that a new run never writes over them."""
    files = sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))
    if not files:
        return
    number = 1 + max((int(p.name[4:]) for p in folder.glob("run_*") if p.name[4:].isdecimal()), default=0)
    target = folder / f"run_{number:03d}"
    target.mkdir()
    for path in files:
        path.rename(target / path.name)
    print(f"moved the {len(files)} files of an earlier run into {target}/ (--init_from resume would have continued it)")


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint_step_*.pt, oldest step first."""
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint_step_*.pt")
                if (m := re.fullmatch(r"checkpoint_step_(\d+)\.pt", path.name))]
    return [path for _, path in sorted(numbered)]


def newest_checkpoint(folder: Path, say) -> dict:
    """The newest checkpoint_step that loads; damaged ones are named and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
            say(f"resuming from {path}")
            return checkpoint
        except SampleError as error:
            say(f"warning: {error}; trying the one before")
    raise RunError(f"init_from: no checkpoint_step_*.pt to resume in {folder}/; leave --init_from out to start a run")


NOISE = ("dropout", "ngram_dropout", "token_noise", "fractal_drop", "fractal_level_drop")  # of training, not weights
FIXED = (*GPTConfig.model_fields, "tokenizer", "batch_size", "gradient_accumulation_steps", "sequential",
         "carry_state", "val_fraction", "optimizer", "weight_decay", "beta1", "beta2", "seed")


def check_resumable(checkpoint: dict, settings: Settings, fingerprint: str, world_size: int):
    """A resumed run must be the same run: every key it depends on agrees with the checkpoint's."""
    then, now = (file | file["config"] for file in (checkpoint["config"], settings.model_dump(by_alias=True)))
    before = {key: then.get(key, KEYS[key].get_default(call_default_factory=True)) for key in FIXED}  # it may be older
    different = [f"{key} is {now[key]} but {before[key]} in the checkpoint" for key in FIXED if now[key] != before[key]]
    if len(checkpoint["rng"]) != world_size:
        different.append(f"there are {world_size} processes but {len(checkpoint['rng'])} in the checkpoint")
    if checkpoint["loader"]["fingerprint"] != fingerprint:
        different.append("the data set's content has changed since the checkpoint")
    if different:
        raise RunError(f"init_from resume: {'; '.join(different)}; change it back, start anew without --init_from, or "
                       f"begin a new run with the weights: --init_from {settings.checkpoint_dir}/best_model.pt")


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to a step; a line cut short by a kill is left out."""
    metrics = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                metrics.append(json.loads(line))
    return [m for m in metrics if isinstance(m, dict) and m["step"] <= last_step]


def plot_losses(metrics: list[dict], path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for key, style in (("train_loss", {"lw": 0.8, "alpha": 0.6}), ("val_loss", {"marker": "o"}),
                       ("val_loss_reset", {"marker": "o", "ls": "--"})):
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if points:
            ax.plot(*zip(*points), label=key, markersize=3, **style)
    ax.set(xlabel="step", ylabel="nats per token")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend()
    with writing(path), replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, evaluation


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, float32 elsewhere (float16 needs to be asked for)."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def whole(t):
    """The whole of a tensor that FSDP shards (all processes call this together); any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def share_like(p, t):
    """t, which every process has whole, or where p is sharded this process's share of it."""
    if not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor  # half a second that few runs need
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


class Uncompiled:
    """torch's optimizers without the wrappers that exempt them from torch.compile: at their first call these import
    the whole compiler, 0.8 of the 2.5 seconds in which a run starts."""

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))


class AdamW(Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


ORTHOGONALISED_AT_ONCE = 2**26  # elements; each takes some 14 bytes meanwhile, also where FSDP shares out all else


class Muon(Uncompiled, torch.optim.Muon):
    """torch's Muon, faster: matrices of about one shape, lying or standing, are orthogonalised together, in bfloat16
    only where the hardware multiplies it; else torch's takes longer than the rest of a small model's step. Updates are
    scaled to the root mean square of AdamW's (arXiv 2502.16982, torch's adjust_lr_fn="match_rms_adamw")."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, shapes = [p for p in group["params"] if p.grad is not None], {}
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                A, B = (-(-length // 64) * 64 for length in sorted(p.shape))  # padded by zeros, shapes are few
                shapes.setdefault((A, B, p.device), []).append(p)
            momenta, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, momenta, group["momentum"])  # Nesterov's, in the gradients' place
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            slices = ((key, alike) for key, same in shapes.items() for alike in itertools.batched(
                same, max(1, ORTHOGONALISED_AT_ONCE // (key[0] * key[1])), strict=False))
            for (A, B, device), alike in slices:
                together = torch.zeros(len(alike), A, B, dtype=alike[0].dtype, device=device)
                standing = [p.shape[0] > p.shape[1] for p in alike]
                for x, p, up in zip(together, alike, standing):
                    grad = whole(p.grad)
                    x[: min(p.shape), : max(p.shape)] = grad.mT if up else grad
                together = orthogonalise(together, choose_dtype("auto", device), group).to(together.dtype)
                for x, p, up in zip(together, alike, standing):
                    update = x[: min(p.shape), : max(p.shape)]
                    update = share_like(p, update.mT if up else update)
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalise(G, dtype, group):
    """Newton-Schulz steps towards U V^T of each G = U S V^T, G (n, A, B), A <= B, as torch.optim.Muon does them."""
    a, b, c = group["ns_coefficients"]
    X = (G / G.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])).to(dtype)
    for _ in range(group["ns_steps"]):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X


def make_optimizers(model: GPT, config: Config, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW with decay on the weights of Linear and Embedding, without on all else (A_log, D, a, convolutions, norms,
    biases); with "muon" the Linear weights inside the layers and of skips go to Muon."""
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.EmbeddingBag)))
    trained = {p for p in model.parameters() if p.requires_grad}  # not what is frozen or made by a parametrization
    matrices = dict.fromkeys(w for m in layers if (w := m.weight) in trained)  # tied ones once
    parts = (model.h, model.skip) if config.optimizer == "muon" else ()
    hidden = {m.weight for part in parts for m in part.modules() if isinstance(m, nn.Linear)} & matrices.keys()
    groups = [
        {"params": [p for p in matrices if p not in hidden], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type in ("cpu", "cuda"))]
    if hidden:
        params = [p for p in matrices if p in hidden]
        optimizers.append(Muon(params, config.muon_learning_rate or config.learning_rate, config.weight_decay))
    return optimizers


def schedule_at(step: int, config: Config, max_iters: int) -> float:
    """The learning rate of a step as a share of the highest: linear warm-up, then half a cosine down to min_lr."""
    warmup = min(100, max_iters // 20) if config.warmup_iters is None else config.warmup_iters
    end, lowest = config.lr_decay_iters or max_iters, config.min_lr / config.learning_rate
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def to_device(batch, device: torch.device, fresh: bool):
    """(x, y, reset) on the device. On a CPU reset becomes None, which spares each layer its masks, where it marks
    nothing but the first position of rows whose state is fresh; compiled GPU code wants the same kind in every call."""
    x, y, reset = batch
    matters = device.type != "cpu" or reset[:, int(fresh):].any()
    later = device.type == "cuda"  # on MPS a copy may begin when its source is gone (pytorch issue 139550)
    return [None if t is None else t.to(device, non_blocking=later) for t in (x, y, reset if matters else None)]


@torch.no_grad()
def evaluate(model: GPT, batches, device, autocast, token_bytes, carried: bool, rank: int, world_size: int):
    """Mean nats a token and bits a byte over batches of (x, y, reset), the state carried from one to the next or not.
    Each process takes its share of the rows; one without any runs a row that does not count, as all must take part in
    FSDP's forward pass."""
    model.eval()
    sums, state = torch.zeros(3, dtype=torch.float64), None  # nats, tokens, bytes
    for batch in batches:
        mine = slice(rank, None, world_size) if rank < len(batch[0]) else slice(1)
        x, y, reset = to_device([t[mine] for t in batch], device, fresh=state is None)
        with autocast:
            _, loss, state = model(x, y, state=state, reset=reset)
        state = model.next_block(state) if carried else None
        if rank < len(batch[0]):
            seen = y[y >= 0]
            n_bytes = token_bytes[seen].sum().item()
            sums += torch.tensor((loss.item() * len(seen), len(seen), n_bytes), dtype=torch.float64)
    model.train()
    if world_size > 1:
        dist.all_reduce(sums)  # by gloo
    nats, tokens, n_bytes = sums.tolist()
    return nats / max(1, tokens), nats / math.log(2) / max(1, n_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@contextlib.contextmanager
def quiet_compiler():
    """Within, warnings and log lines are not shown: PyTorch has many about its own machinery."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def compile_layers(model: GPT):
    """Have each layer of the model compiled at its first call; layers that are alike share their code."""
    compiled = torch.compile(functools.partial(truncated, Block.forward), dynamic=False)
    # each kind of layer with and without document boundaries, with a state and without; past 8 it would give up
    torch._dynamo.config.recompile_limit = 8 + 4 * len(model.h)
    for block in model.h:
        block.forward = functools.partial(compiled, block)


def truncated(forward, *args, **kwargs):
    """forward's outputs with the last, the new state, detached, as the loop would do it later: compiled code would make
    the gradient of every output, zeros though it be."""
    *outputs, state = forward(*args, **kwargs)
    return *outputs, map_state(torch.Tensor.detach, state)


class Truncated(nn.Module):
    """The whole model so, as a module, which is what DDP wraps."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return truncated(self.model, *args, **kwargs)


def names_a_hub_model(init_from: str) -> bool:
    """Whether it is a folder of the Hugging Face form, or, as gpt2 and openai-community/gpt2, no path to a file."""
    path = Path(init_from)
    if path.exists() or path.suffix == ".pt":
        return (path / "config.json").is_file()
    return len(path.parts) == 1 or not path.parent.exists()


def resume_command(max_iters: int | None = None) -> str:
    """The command line that goes on with this run, to another max_iters if one is given."""
    changed = {"--init_from": "resume"} | ({"--max_iters": str(max_iters)} if max_iters else {})
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*changed, *["--epochs"] * bool(max_iters)):
        parser.add_argument(flag)
    _, kept = parser.parse_known_args()
    program = ["train.py"]
    if "WORLD_SIZE" in os.environ:
        nodes, here = (int(os.environ.get(key, 1)) for key in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        program = ["torchrun", *[f"--nnodes={nodes}"] * (nodes > 1), f"--nproc_per_node={here}", "train.py"]
    return shlex.join(["uv", "run", *program, *kept, *itertools.chain(*changed.items())])


class Run:
    """One process's part of a training run: what stays fixed, then what every step changes."""

    def __init__(self, settings: Settings, device: torch.device, rank: int, world_size: int):
        self.settings, self.config = settings, settings.config
        self.device, self.rank, self.world_size = device, rank, world_size
        self.folder, self.stopping = Path(settings.checkpoint_dir), False
        self.carries = self.config.sequential and self.config.carry_state
        self.sharded = settings.fsdp and world_size > 1
        if self.sharded and self.config.dtype == "float16":
            raise RunError('fsdp: true with dtype "float16"; give bfloat16 or float32')
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"checkpoint_dir: {self.folder} is a file; give a folder")
        self.tokenizer = Tokenizer(self.config.tokenizer)
        vocab_size, n_vocab = self.config.vocab_size, self.tokenizer.n_vocab
        if vocab_size is not None and vocab_size < n_vocab:
            raise RunError(f"vocab_size: {vocab_size}, but the tokenizer has {n_vocab}; set it to null")
        checkpoint = self.find_checkpoint()
        self.load_data()
        if settings.init_from == "resume":
            check_resumable(checkpoint, settings, self.corpus.fingerprint, world_size)
        self.build_model(checkpoint)
        self.step, self.tokens, self.evaluated = 0, 0, 0  # evaluated: the step of the last evaluation
        self.best_val_loss, self.seconds_before = math.inf, 0.0
        self.metrics, self.closing = [], contextlib.ExitStack()
        self.state = self.initial_state()
        torch.manual_seed(settings.seed + 1 + rank)
        if settings.init_from == "resume":
            self.restore(checkpoint)

    def say(self, text, write=tqdm.write):
        """Process 0 prints, or has `write` do it (the progress bar). If stdout is closed, as by Ctrl-C, which ends tee
        too, the run saves, ends and says so on stderr."""
        try:
            if self.rank == 0:
                write(text)
                sys.stdout.flush()
        except OSError:
            self.stopping = True
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def load_data(self):
        config, folder, dataset = self.config, self.folder.resolve(), Path(self.settings.dataset).resolve()
        if folder.is_relative_to(dataset) and not any(part[0] == "." for part in folder.relative_to(dataset).parts):
            raise RunError(f"checkpoint_dir: {self.folder}/ is in the data set {self.settings.dataset}/, where what "
                           "a run writes would be taken for text; give another")
        self.corpus = corpus = load_corpus(self.settings.dataset, self.tokenizer, progress=self.rank == 0)
        train_tokens, self.val_tokens = corpus.split(config.val_fraction)
        if not (self.val_tokens[1:] != self.tokenizer.eot).any():
            raise DataError(f"the validation split has {len(self.val_tokens)} tokens and nothing to predict: raise "
                            "val_fraction or put more text into the data set")
        self.loader = DataLoader(train_tokens, config.batch_size, config.block_size, self.tokenizer.eot,
                                 config.sequential, self.settings.seed, self.rank, self.world_size)
        self.token_bytes = torch.as_tensor(self.tokenizer.token_bytes, device=self.device)
        accumulation = config.gradient_accumulation_steps
        self.tokens_per_step = self.world_size * accumulation * config.batch_size * config.block_size
        steps = (config.epochs or 0) * self.loader.steps_per_epoch / accumulation
        self.max_iters = config.max_iters or max(1, math.ceil(steps - 1e-6))
        names = ", ".join(path.name for path in corpus.files[:6]) + (" ..." if len(corpus.files) > 6 else "")
        origin = f" of Python's own library, as {self.settings.dataset}/ is empty" if corpus.is_default else ""
        self.say(f"text: {corpus.n_bytes:,} bytes in {len(corpus.files)} files ({names}){origin}")
        self.say(f"tokens: {len(train_tokens):,} to train, {len(self.val_tokens):,} to validate; "
                 f"tokenizer {self.tokenizer.name}")

    def find_checkpoint(self) -> dict | None:
        init_from = self.settings.init_from
        if init_from == "scratch":
            return None
        if init_from == "resume":
            self.found = checkpoints(self.folder)  # open_logs asks whether they still are all
            return newest_checkpoint(self.folder, self.say)
        checkpoint = self.pretrained() if names_a_hub_model(init_from) else load_checkpoint(Path(init_from))
        if checkpoint["tokenizer"] != self.tokenizer.name:
            raise RunError(f"tokenizer: {self.tokenizer.name}, but {init_from} was trained on "
                           f"{checkpoint['tokenizer']}; add --tokenizer {checkpoint['tokenizer']}")
        return checkpoint

    def pretrained(self) -> dict:
        """GPT-2 from the Hugging Face hub, or from a folder of that form, as if it were a checkpoint of ours."""
        name = self.settings.init_from
        try:
            model = GPT.from_pretrained(name, block_size=self.config.block_size)
        except Exception as error:  # damaged files fail anywhere between JSON, safetensors and shapes
            raise RunError(f"init_from: {name} is no checkpoint of ours, and as a model of the Hugging Face hub or a "
                           f"folder of that form it cannot be loaded: {str(error).splitlines()[0]}") from None
        if (model.config.position, model.config.vocab_size) != ("learned", 50257):
            raise RunError(f"init_from: {name} was trained on tokens that no tokenizer here makes; GPT-2 will do")
        return {"model_args": model.config.model_dump(), "model": model.state_dict(), "tokenizer": "gpt2"}

    def build_model(self, checkpoint: dict | None):
        config, settings = self.config, self.settings
        self.model_args = config.model_dump(include=set(GPTConfig.model_fields))
        self.model_args["vocab_size"] = config.vocab_size or self.tokenizer.n_vocab
        if checkpoint is not None:
            ours = {key: self.model_args[key] for key in NOISE}
            with fitting(f"init_from {settings.init_from}: the checkpoint"):
                theirs = GPTConfig(**checkpoint["model_args"]).model_dump() | ours
            if theirs["position"] == "learned" and config.block_size > theirs["block_size"]:
                raise RunError(f"block_size: {config.block_size}, but {settings.init_from} has "
                               f"{theirs['block_size']} positions")
            if changed := [key for key, own in self.model_args.items() if own != theirs[key] and key != "block_size"]:
                self.say(f"note: the model is the checkpoint's; the configuration differs in: {', '.join(changed)}")
            self.model_args = theirs
        torch.manual_seed(settings.seed)
        self.model = GPT(GPTConfig(**self.model_args))
        if checkpoint is not None:
            with fitting(f"init_from {settings.init_from}: the checkpoint"):
                self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.say(self.model.layer_table(self.dtype))

        self.autocast = (contextlib.nullcontext() if self.dtype == torch.float32 else
                         torch.autocast(self.device.type, self.dtype))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if settings.fsdp and not self.sharded:
            self.say("note: fsdp: one process has nothing to share; start N by torchrun --nproc_per_node=N train.py")
        if self.sharded:
            # a layer's weights are whole while it runs, those outside the layers throughout a pass; the copies of
            # matrices that autocast makes stay until the backward pass
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for part in (*self.model.h, self.model):
                fully_shard(part, mesh=mesh)
        how = self.compile()
        if self.sharded:
            how += f", sharded over {self.world_size} processes"
        elif self.world_size > 1:
            for p in self.model.parameters():  # DDP waits for every gradient; fractals of depth 1 have no joins
                p.requires_grad_(p.requires_grad and p.numel() > 0)
            self.step_model = DDP(self.step_model, device_ids=[self.device] if self.device.type == "cuda" else None,
                                  gradient_as_bucket_view=True)
        self.optimizers = make_optimizers(self.model, config, self.device)
        self.highest_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.say(f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}, {how}: {self.max_iters} steps of "
                 f"{self.tokens_per_step:,} tokens")

    def compile(self) -> str:
        """Compile what the settings ask for, as far as the device can; returns in words what came of it. Training calls
        step_model; within as_written layers run uncompiled."""
        wanted, kind = self.settings.compile, self.device.type
        kernels.COMPILE, self.step_model, self.as_written = bool(wanted), self.model, contextlib.nullcontext
        if not wanted:
            return "not compiled (compile is false)"
        if kind not in ("cpu", "cuda"):
            return f"not compiled (not supported on {kind})"
        if kind == "cuda" and kernels.triton is None:
            return "not compiled (Triton is not installed)"
        if kind == "cuda" and torch.cuda.get_device_capability(self.device) < (7, 0):
            return "not compiled (this GPU is too old for Triton)"
        if kind == "cuda" and not self.sharded and wanted != "layers":
            self.step_model = torch.compile(Truncated(self.model), dynamic=False)
            return "compiled"
        if kind == "cuda" or wanted == "layers":
            self.say("compiling the layers: some seconds for each kind, minutes for deep fractals")
            reason = self.try_compiled_layers()
            if not reason:  # evaluation has too many shapes to compile for
                self.as_written = functools.partial(torch.compiler.set_stance, "force_eager")
                return "layers compiled"
            if self.sharded:  # what failed half-way has left FSDP's weights partly gathered
                raise RunError(f"fsdp: true, and the layers could not be compiled ({reason}); add --compile false")
            self.say(f"warning: the layers could not be compiled, they run more slowly ({reason})")
            if kind == "cuda":
                return "not compiled"
        return "compiled between matrix products (the first time on a machine takes up to a minute)"

    def try_compiled_layers(self) -> str:
        """Compile the layers in a step of training that changes nothing. Returns an empty text, or why that failed; the
        layers then run as before."""
        compile_layers(self.model)
        idx = torch.zeros(self.config.batch_size, self.config.block_size, dtype=torch.long)
        x, y, reset = to_device((idx, idx, idx > 0), self.device, fresh=False)
        try:
            with quiet_compiler(), torch.random.fork_rng(devices=[self.device] * (self.device.type == "cuda")):
                with self.autocast:
                    _, loss, _ = self.model(x, y, state=self.initial_state(), reset=reset)
                loss.backward()
        except Exception as error:  # whatever a compiler can do wrong
            for block in self.model.h:
                del block.forward
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self.model.zero_grad(set_to_none=True)
        return ""

    def initial_state(self) -> dict | None:
        if not self.carries:
            return None
        state = self.model.initial_state(self.config.batch_size, self.dtype)
        return map_state(lambda t: whole(t).detach(), state)  # of a mixer whose state begins with weights

    def restore(self, checkpoint: dict):
        self.step, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self.evaluated = checkpoint.get("evaluated", self.step)  # it may be older
        self.seconds_before = checkpoint["seconds"]
        with contextlib.suppress(SampleError):  # it may be of a later step, damaged or not there
            self.best_val_loss = load_checkpoint(self.folder / "best_model.pt", mmap=True)["best_val_loss"]
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer"]):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, state in saved["state"].items():  # before it is loaded: no device need hold all of it
                alike = {key: t for key, t in state.items() if getattr(t, "shape", None) == params[i].shape}
                state.update({key: share_like(params[i], t) for key, t in alike.items()})
            optimizer.load_state_dict(saved)
        if checkpoint["scaler"]:  # another type may have had none
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.loader.load_state_dict(checkpoint["loader"])
        self.state = map_state(lambda t: t.to(self.device), checkpoint["state"][self.rank])
        rng = checkpoint["rng"][self.rank]
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])

    def snapshot(self) -> dict:
        """The whole run as plain values and tensors; all processes call this together."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        ranks = [(rng, map_state(lambda t: t.cpu(), self.state))] * self.world_size
        if self.world_size > 1:
            dist.gather_object(ranks[0], ranks if self.rank == 0 else None)  # each in its place
        return {
            "format": CHECKPOINT_FORMAT, "model": self.gathered(self.model.state_dict()), "model_args": self.model_args,
            "optimizer": [self.gathered(optimizer.state_dict()) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds(),
            "evaluated": self.evaluated, "best_val_loss": self.best_val_loss,
            "rng": [r for r, _ in ranks], "state": [s for _, s in ranks],
            "loader": self.loader.state_dict() | {"fingerprint": self.corpus.fingerprint},
            "config": self.settings.model_dump(by_alias=True), "tokenizer": self.tokenizer.name,
        }

    def gathered(self, state: dict) -> dict:
        """The state with whole tensors, so that a checkpoint does not tell how it was trained; on process 0."""
        def take(t):
            if not hasattr(t, "full_tensor"):
                return t
            t = whole(t)
            return t.cpu() if self.rank == 0 else None  # one after the other: all at once might not fit

        return map_state(take, state) if self.sharded else state

    @contextlib.contextmanager
    def saving(self, best: bool, step: bool):
        """A thread writes the run as it is now, as the best model, as the step's checkpoint, or both, while what stands
        within goes on: the disk takes as long as a plot and a sample. All processes call this together."""
        names = ["best_model.pt"] * best + [f"checkpoint_step_{self.step:06d}.pt"] * step
        run = self.snapshot() if names else None
        with ThreadPoolExecutor(1) as pool:
            written = [pool.submit(self.write, run, name) for name in names if self.rank == 0]
            yield
            for file in written:
                file.result()

    def write(self, run: dict, name: str):
        with writing(self.folder / name), replacing(self.folder / name) as file:
            torch.save(run, file)
        written = checkpoints(self.folder)
        if self.folder / name in written:  # damaged ones of later steps may be there, which a resumed run passed over
            for path in written[: written.index(self.folder / name) + 1][: -self.config.keep_checkpoints]:
                path.unlink()

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - START

    def open_logs(self):
        if self.world_size > 1:
            dist.barrier()  # all have read what is moved now
        if self.rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder, self.closing)
        for path in itertools.chain(*(self.folder.glob(f".{name}.*.tmp") for name in RUN_FILES)):
            path.unlink()  # of a run that was killed while it wrote
        if self.settings.init_from != "resume":
            archive_run(self.folder)
        elif checkpoints(self.folder) != self.found:
            raise RunError(f"checkpoint_dir: another run has just saved in {self.folder}/; start once more")
        self.metrics = read_metrics(self.folder / "metrics.jsonl", self.step)
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))
        self.writer = self.closing.enter_context(SummaryWriter(self.folder, purge_step=self.step + 1))

    def log(self, **values):
        if self.rank > 0:
            return
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON knows no NaN
        self.metrics.append({"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds(), 3), **values})
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.metrics[-1]) + "\n")
        with writing(self.folder / "events.out.tfevents.*"):
            for key, value in values.items():
                if value is not None:
                    self.writer.add_scalar(key, value, self.step)

    def evaluate(self) -> bool:
        """Both validation losses, of the same text; leaves the training state as it was. Returns whether val_loss is
        the lowest yet."""
        config, losses = self.config, []
        for cut, carried in (eval_lanes, True), (eval_lanes if config.eval_iters else eval_blocks, False):
            batches = cut(self.val_tokens, config.eval_lanes, config.block_size, self.tokenizer.eot)
            losses.append(evaluate(self.model, itertools.islice(batches, config.eval_iters), self.device, self.autocast,
                                   self.token_bytes, carried, self.rank, self.world_size))
        (val_loss, bits), (reset_loss, _) = losses
        self.log(val_loss=val_loss, val_loss_reset=reset_loss, val_bits_per_byte=bits, params=self.model.num_params())
        self.say(f"step {self.step}: val_loss {val_loss:.4f} nats/token with the state carried ({bits:.4f} bits/byte), "
                 f"{reset_loss:.4f} with each block on its own")
        self.evaluated = self.step
        if best := val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
        return best

    def show(self):
        """The plot and a sample; leaves the training state as it was."""
        if self.rank == 0:
            plot_losses(self.metrics, self.folder / "loss.png")
        if self.rank == 0 or self.sharded:
            generator = torch.Generator(self.device).manual_seed(self.settings.seed)
            start = torch.full((1, 1), self.tokenizer.eot, device=self.device)
            try:
                with self.autocast:
                    tokens = list(generate(self.model, start, SAMPLE_TOKENS, generator=generator,
                                           n_vocab=self.tokenizer.n_vocab))
                self.say(f"--- sample\n{self.tokenizer.decode(torch.cat(tokens).tolist())}\n---")
            except SampleError as error:
                self.say(f"no sample: {error}")

    def review(self, saves: bool):
        """An evaluation and what it shows; meanwhile the best model is written and, if asked, the step's checkpoint."""
        with self.as_written():
            best = self.evaluate()
            with self.saving(best, saves):
                self.show()

    def train_step(self) -> tuple[float, float, float]:
        """One optimizer step over gradient_accumulation_steps batches; returns loss, learning rate, gradient norm. The
        loss is the mean over all targets of all processes. A step whose loss or gradients are not finite is skipped."""
        share = schedule_at(self.step, self.config, self.max_iters)
        for optimizer, rates in zip(self.optimizers, self.highest_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = share * rate
            optimizer.zero_grad(set_to_none=True)
        batches = [to_device(self.loader.next_batch(), self.device, fresh=self.state is None)
                   for _ in range(self.config.gradient_accumulation_steps)]
        counts = torch.stack([(y >= 0).sum() for _, y, _ in batches])
        total = counts.sum()
        if self.world_size > 1:
            dist.all_reduce(total)
        step_loss = torch.zeros((), device=self.device)
        for i, (x, y, reset) in enumerate(batches):
            last = i == len(batches) - 1
            if self.sharded:
                self.model.set_requires_gradient_sync(last)
            later = isinstance(self.step_model, DDP) and not last
            with self.step_model.no_sync() if later else contextlib.nullcontext():
                with self.autocast:
                    _, loss, state = self.step_model(x, y, state=self.state, reset=reset)
                part = counts[i] / total.clamp(min=1)
                self.scaler.scale(loss * part * self.world_size).backward()  # DDP and FSDP divide by world_size
            step_loss += loss.detach() * part
            if self.carries:  # truncated back-propagation: the state goes on, its gradient does not
                self.state = self.model.next_block(map_state(torch.Tensor.detach, state))
            del state  # it holds what layers kept for the backward pass
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf,
                                                   foreach=self.sharded or None))  # torch's own choice is no for shares
        if self.world_size > 1:
            dist.all_reduce(step_loss)
        loss, grad_norm = torch.stack((step_loss, grad_norm)).tolist()  # waits for the device, once
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        elif not math.isfinite(loss):  # nor is the state, perhaps
            self.state = self.initial_state()
        self.scaler.update()
        self.step += 1
        self.tokens += self.tokens_per_step
        return loss, share * self.config.learning_rate, grad_norm

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.world_size == 1:
            return self.stopping
        flag = torch.tensor(float(self.stopping), device=self.device)
        dist.all_reduce(flag)
        return flag.item() > 0

    def handle_signal(self, number, _frame):
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    def loop(self):
        """Train up to max_iters or until a signal; returns whether the run got to its end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(signal.SIGHUP, lambda *_: setattr(self, "stopping", True))  # shell and system send one each
        config, stop, bad_steps, losses = self.config, False, 0, []
        self.model.train()
        with tqdm(total=self.max_iters, initial=self.step, disable=self.rank > 0, unit="step", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
            if self.step % config.eval_interval == 0 and self.evaluated < self.step:  # a signal came before it
                self.review(saves=True)
            clock = time.monotonic()
            while self.step < self.max_iters and not stop:
                loss, lr, grad_norm = self.train_step()
                losses.append(loss)
                bad_steps = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else bad_steps + 1
                if bad_steps == config.max_bad_steps:
                    again = (f" and start from a checkpoint in {self.folder}/, from an older one if the newest does "
                             "the same" if checkpoints(self.folder) else "")
                    raise RunError(f"loss or gradients were not finite in {bad_steps} steps in a row, up to step "
                                   f"{self.step}; lower learning_rate{again}")
                self.say(1, bar.update)
                last = self.step == self.max_iters
                if self.step % LOG_EVERY == 0 or last:
                    speed = len(losses) * self.tokens_per_step / (time.monotonic() - clock)
                    mean_loss = sum(losses) / len(losses)
                    bar.set_postfix_str(f"loss {mean_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                    self.log(train_loss=mean_loss, learning_rate=lr, grad_norm=grad_norm,
                             tokens_per_second=round(speed))
                    losses, clock = [], time.monotonic()
                paused, stop = time.monotonic(), self.stop_requested() and not last
                # not amid bad steps: the weights before them may be the reason
                saves = (self.step % config.checkpoint_interval == 0 and not bad_steps) or last or stop
                if (self.step % config.eval_interval == 0 or last) and not stop:
                    self.review(saves)
                elif saves:
                    with self.saving(best=False, step=True):
                        pass
                clock += time.monotonic() - paused
        return not stop

    def main(self):
        if self.step >= self.max_iters:
            self.say(f"already at step {self.step} of max_iters {self.max_iters}; raise --max_iters to train on")
            return
        gc.enable()
        with self.closing:
            self.open_logs()
            finished = self.loop()
        if not finished:
            self.say(f"stopped at step {self.step} of {self.max_iters}, saved in {self.folder}/; to go on:\n"
                     f"  {resume_command()}")
            return
        best = shlex.quote(str(self.folder / "best_model.pt"))
        self.say(f"{self.step} steps, {self.tokens:,} tokens, {self.seconds() / 60:.1f} minutes; "
                 f"lowest val_loss {self.best_val_loss:.4f}\n"
                 f"sample:    uv run sample.py --model_path {best} --prompt 'The '\n"
                 f"train on:  {resume_command(2 * self.max_iters)}")


def keep_freed_memory():
    """Let glibc reuse freed blocks of up to 64 MB, where it gives those above 32 and the heap's free end back to the
    system and pays a fault for each page of the next one; and have the heap's first gigabyte ask for huge pages. A step
    of shakespeare_87, whose tables have gradients that large, takes 0.72 to 0.80 of the time that it takes without."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        mmap_threshold, trim_threshold, huge = -3, -1, 2**21
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)
        if block := libc.malloc(2**30):  # an extension of the heap, not touched, so no memory yet
            libc.madvise(-(-block // huge) * huge, 2**30 - huge, mmap.MADV_HUGEPAGE)
            libc.free(block)
        libc.mallopt(mmap_threshold, 2**26)


def choose_own_device(name: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of one of the processes on this machine: of several each takes a GPU of its own. Raises RunError."""
    device = choose_device(name)
    if device.type == "cuda":
        if local_world_size > 1 and device.index is not None:
            raise RunError(f'device: "{name}" for {local_world_size} processes; give "cuda", and each takes its own')
        if local_world_size > torch.cuda.device_count():
            raise RunError(f"{local_world_size} processes for {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        device = torch.device("cuda", local_rank) if device.index is None else device
        torch.cuda.set_device(device)
    elif device.type == "mps" and local_world_size > 1:
        if name == "mps":
            raise RunError('device: "mps" serves one process; add --device cpu, or leave torchrun out')
        device = torch.device("cpu")
    return device


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    settings = load_config()
    keep_freed_memory()
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    try:
        device = choose_own_device(settings.device, local_rank, local_world_size)
        if world_size > 1:  # Python objects go by gloo: NCCL would gather them in the GPUs' memory
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        Run(settings, device, rank, world_size).main()
    except KeyboardInterrupt:  # before the loop, which saves
        sys.exit(130)
    except (RunError, SampleError, DataError, OSError, MemoryError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", reason):
            raise
        if isinstance(error, (MemoryError, RuntimeError)):
            reason = "memory is too small, lower batch_size, block_size or n_embd: " + reason.partition("\n")[0]
        if local_rank == 0:  # another machine may lack what this one has
            print(f"error: {reason}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # all is written and closed; taking torch and its compiler apart would take 0.7 s more
