"""The training run as its user sees it: configuration, learning, exact resume, signals, several processes."""

import copy
import errno
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter

import kernels
import sample
import train
from model import GPT, GPTConfig, map_state
from prepare import Tokenizer

ROOT = Path(train.__file__).parent
TINY = ["--n_embd", "16,8,16", "--attention_type", "mamba,fractal,standard", "--n_head", "1", "--d_state", "4",
        "--fractal_count", "2", "--fractal_dim_range", "8,16", "--fractal_depth_range", "1,2", "--block_size", "16",
        "--batch_size", "2", "--eval_iters", "2", "--dtype", "float32", "--device", "cpu", "--compile", "false",
        "--optimizer", "adamw", "--learning_rate", "4e-3", "--weight_decay", "0.1", "--qk_norm", "false",
        "--zero_init", "false"]
STILL = ["--fractal_drop", "0", "--fractal_level_drop", "0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a real text in dataset/."""
    (tmp_path / "dataset").mkdir()
    for name in ("textwrap.py", "json/decoder.py"):
        text = (Path(os.__file__).parent / name).read_bytes()
        (tmp_path / "dataset" / name.replace("/", "_")).write_bytes(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    return tmp_path


@pytest.fixture(autouse=True)
def handlers():
    """Those of signals are the process's own again after a run in it."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def made(*flags):
    return train.Run(train.load_config([*TINY, *map(str, flags)]), torch.device("cpu"), 0, 1)


def run(*flags):
    """One run in this process; returns the Run."""
    torch.manual_seed(time.time_ns())  # nothing may depend on what the process did before
    this = made(*flags)
    this.main()
    return this


def command(*flags, **kw):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        train.load_config([str(flag) for flag in flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


# -- configuration

def test_shipped_files_are_what_a_missing_file_becomes(folder, capsys):
    settings = train.load_config(["--device", "cpu"])
    assert "wrote the default" in capsys.readouterr().out
    for name in ("current_configuration.json", "current_configuration.schema.json"):
        assert json.loads((folder / name).read_text()) == json.loads((ROOT / name).read_text())
    content = json.loads((folder / "current_configuration.json").read_text())["config"]
    assert isinstance(content["n_embd"], list) and isinstance(content["attention_type"], list)
    assert set(settings.config.attention_type) == {"standard", "mamba", "fractal"}
    assert len(set(settings.config.n_embd)) > 1


def test_model_py_prints_the_layer_table_of_the_shipped_file(folder):
    flags = ["--n_embd", "16,8", "--dtype", "bfloat16", "--device", "cpu", "--vocab_size", "257"]
    done = subprocess.run([sys.executable, str(ROOT / "model.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fractal" in done.stdout and re.search(r"all +[\d,]+ +[\d,]+$", done.stdout.strip())
    assert GPT(train.load_config(flags).config).layer_table(torch.bfloat16) in done.stdout
    done = subprocess.run([sys.executable, str(ROOT / "model.py"), "--tokenizer", "no_such"], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_briefs_example_is_valid_and_cuda_is_never_a_silent_fallback(folder, capsys):
    example = {"config": {"batch_size": 64, "block_size": 128, "n_embd": [256, 256, 192, 128, 128, 192, 256, 256],
                          "attention_type": ["mamba", "standard", "standard", "mamba"] + ["standard"] * 4},
               "device": "cuda", "compile": True}
    (folder / "current_configuration.json").write_text(json.dumps(example))
    config = train.load_config(["--device", "cpu"]).config
    assert config.n_layer == 8 and config.n_head == [4, 4, 3, 2, 2, 3, 4, 4]
    if not torch.cuda.is_available():
        line, = refused(capsys)
        assert '"auto"' in line and "--device cpu" in line


def test_the_schema_follows_the_keys(folder):
    """It appears beside a file that has none, and one of other keys is written anew."""
    (folder / "current_configuration.json").write_text("{}")
    for _ in range(2):
        train.load_config(["--device", "cpu"])
        assert json.loads((folder / train.SCHEMA_FILE).read_text()) == train.Settings.model_json_schema(by_alias=True)
        (folder / train.SCHEMA_FILE).write_text("{}")


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, rank, processes, index in (("auto", 0, 1, 0), ("cuda:1", 0, 1, 1), ("cuda", 1, 2, 1)):
        assert train.choose_own_device(name, rank, processes) == torch.device("cuda", index) == current.pop()
    for name, processes, words in (("cuda:1", 2, "each takes its own"), ("cuda", 3, "3 processes for 2 GPUs")):
        with pytest.raises(train.RunError, match=words):
            train.choose_own_device(name, 0, processes)


def test_flags_win_and_fit_the_files_lists(folder, capsys):
    file = {"config": {"n_embd": [64, 32, 16, 64], "attention_type": ["mamba", "fractal", "standard", "mamba"],
                       "n_layer": 4, "epochs": 3}}
    (folder / "current_configuration.json").write_text(json.dumps(file))
    config = train.load_config(["--n_embd", "24,16", "--max_iters=7", "--fractal_depth_range", "1,2", "--bias", "true",
                                "--learning_rate", "1e-4", "--tie_weights", "null"]).config
    assert config.n_layer == 2 and config.attention_type == ["mamba", "fractal"]
    assert 'note: attention_type: the file\'s 4 entries made 2: ["mamba", "fractal"]\n' in capsys.readouterr().out
    assert (config.max_iters, config.epochs, config.bias, config.learning_rate) == (7, None, True, 1e-4)
    config = train.load_config(["--n_layer", "6"]).config
    assert config.n_embd == [64, 32, 16, 64, 64, 32] and config.max_iters is None
    assert train.load_config(["--max_iters", "null"]).config.epochs == 3  # that other key stays


@pytest.mark.parametrize("flags, words", [
    (["--bath_size", "3"], ["--bath_size", "--batch_size"]),
    (["--batch_size", "0"], ["--batch_size 0", "greater than 0"]),
    (["--n_embd", "64,x"], ["--n_embd", "valid integer"]),
    (["--attention_type", "mamba,atention"], ["--attention_type", "'standard', 'mamba'"]),
    (["--n_embd", "8,8", "--attention_type", "mamba,mamba,mamba"], ["n_embd has 2", "attention_type has 3"]),
    (["--max_iters", "5", "--epochs", "2"], ["max_iters", "epochs"]),
    (["--fractal_depth_range", "1,6"], ["fractal_depth_range", "H^2"]),
    (["--learning_rate", "1e-4", "--min_lr", "1e-3"], ["min_lr", "learning_rate"]),
    (["--device", "gpu"], ["--device", "cuda"]),
    (["--config", "nowhere.json"], ["nowhere.json"]),
    (["--compile", "maybe"], ["--compile", "boolean"]),
    (["--n_head", "5"], ["flags: n_head: 5 heads"]),
    (["--ffn_mult", "Infinity"], ["--ffn_mult inf", "finite"]),
    (["--epochs", "1e400"], ["--epochs inf", "finite"]),
    (["--seed", "99999999999999999999"], ["--seed", "less than"]),
    (["--eval_iters", str(2**63)], ["--eval_iters", "less than"]),
    (["--eval_lanes", "1000000000000"], ["--eval_lanes", "less than"]),
    (["--n_layer", str(10**18)], ["--n_layer", "less than"]),
    (["--fractal_count", str(10**9)], ["--fractal_count", "less than"]),
    (["--n_head", "[]"], ["flags: n_head: an empty list"]),
    (["--ffn_mult=-1,4"], ["--ffn_mult", "greater than"]),
    (["--ffn_mult", "1e308"], ["--ffn_mult", "less than"]),
    (["--norm_eps", "1e308"], ["--norm_eps", "less than"]),
    (["--epochs", "1e308"], ["--epochs", "less than"]),
    (["--n_embd", "[" * 100000], ["--n_embd", "valid integer"]),
    (["--position", "learned", "--window", "3"], ["window: 3", "at least block_size = 128"]),
    (["--fractal_depths", "[[6]]", "--fractal_dims", "[[8]]"], ["--fractal_depths 6", "less than or equal to 5"]),
    (["--fractal_depths", "[[1]]", "--fractal_dims", "[[0]]"], ["--fractal_dims 0", "greater than 0"]),
    (["stray"], ["stray"]),
])
def test_mistakes_are_one_line_each(folder, capsys, flags, words):
    line, = refused(capsys, *flags)
    assert all(word in line for word in words)


def test_mistakes_in_the_file_name_file_key_value_and_nearest_key(folder, capsys):
    file = folder / "mine.json"
    file.write_text(json.dumps({"config": {"n_embed": 3, "dropout": 1.5, "seed": 2}, "batch_size": 3, "devise": "cpu"}))
    text = "\n".join(refused(capsys, "--config", file))
    for words in ("config.n_embed; the nearest is n_embd", "dropout is 1.5", "seed belongs outside",
                  "batch_size belongs inside", "devise; the nearest is device"):
        assert words in text
    for key, nearest in ("dropot", "dropout"), ("bathc", "batch_size"), ("iters", "max_iters"):
        file.write_text(json.dumps({"config": {key: 1}}))
        assert f"config.{key}; the nearest is {nearest}" in "".join(refused(capsys, "--config", file))
    lines = refused(capsys, "--config", file, "--batch_size", 0, "--seed", -1)
    assert "--batch_size 0" in "".join(lines) and "--seed -1" in "".join(lines)
    file.write_text('{"config": {"n_embd": 64,}}')
    line, = refused(capsys, "--config", file)
    assert "line 1, column" in line


def test_mistakes_of_model_and_training_come_together(folder, capsys):
    file = folder / "mine.json"
    file.write_text(json.dumps({"config": {"n_embd": 32, "n_head": 5, "learning_rate": 0.1, "min_lr": 1.0,
                                           "max_iters": 5, "epochs": 2}}))
    lines = refused(capsys, "--config", file)
    assert [words for words in ("n_head: 5 heads do not divide", "epochs: 2", "min_lr: 1.0 is above")
            if not any(words in line for line in lines)] == []
    file.write_text("[]")
    assert "must be an object" in refused(capsys, "--config", file)[0]
    for value in ("9" * 5000, "[" * 100000):
        file.write_text('{"config": {"n_embd": ' + value + "}}")
        line, = refused(capsys, "--config", file)
        assert "mine.json: cannot be read" in line
    (folder / "current_configuration.json").symlink_to("on a disk that is not there")
    line, = refused(capsys)
    assert "current_configuration.json: no such file" in line


def test_mistakes_of_lengths_and_ranges_come_together(folder, capsys):
    file = folder / "mine.json"
    file.write_text(json.dumps({"config": {"n_embd": [8, 8], "n_head": [1], "dropout": 1.5}, "seed": -1}))
    lines = refused(capsys, "--config", file)
    assert len(lines) == 3
    assert [words for words in ("n_embd has 2, n_head has 1", "dropout is 1.5", "seed is -1")
            if not any(words in line for line in lines)] == []
    lines = refused(capsys, "--fractal_depth_range", "7,6", "--fractal_dim_range", "9,15")
    assert [line.split(": ")[2] for line in lines] == ["fractal_depth_range", "fractal_depth_range",
                                                       "fractal_dim_range"]


def test_of_several_processes_one_names_the_mistakes(folder, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        train.load_config(["--batch_size", "0"])
    assert capsys.readouterr().err == ""


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        train.load_config(["--help"])
    text = capsys.readouterr().out
    for key, field in train.KEYS.items():
        if key != "$schema":
            assert f"--{key} VALUE" in text and field.description.split()[0] in text


def test_descriptions_name_the_words_that_a_key_takes():
    words = {key: re.findall(r"'(\w+)'", str(re.findall(r"Literal\[.*?\]", str(field.annotation))))
             for key, field in train.KEYS.items()}
    assert words["attention_type"][:3] == ["standard", "mamba", "fractal"]
    assert [(key, word) for key, field in train.KEYS.items() for word in words[key]
            if not re.search(rf"\b{word}\b", field.description)] == []


def test_readme_lists_every_key():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [f"| `{key}` | `{json.dumps(field.get_default(call_default_factory=True))}` | {field.description} |"
            for key, field in train.KEYS.items() if key != "$schema"]
    assert [row for row in rows if row not in readme] == []


# -- a run and its files

def same(a, b, path=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}.{i}")
    else:
        assert a == b or a != a, path


def assert_resume_is_exact(folder, step, *flags, start=run):
    """A run up to `step` that goes on from its checkpoint before the last ends as the whole run did. Returns its last
    checkpoint."""
    last = folder / f"checkpoints/checkpoint_step_{step:06d}.pt"
    start("--max_iters", step, *flags)
    whole = train.load_checkpoint(last)
    last.unlink()
    before = train.checkpoints(last.parent)[-1]
    torch.save(train.load_checkpoint(before) | {"seconds": 1e6}, before)
    start("--max_iters", step, *flags, "--init_from", "resume")
    resumed, metrics = train.load_checkpoint(last), (last.parent / "metrics.jsonl").read_text().splitlines()
    assert min(resumed["seconds"], json.loads(metrics[-1])["seconds"]) > 1e6
    for checkpoint in (whole, resumed):
        del checkpoint["seconds"], checkpoint["config"]["init_from"]
    same(whole, resumed)
    return whole


@pytest.mark.parametrize("extra", [
    ["--dropout", "0.1", "--token_noise", "0.1", "--ngram_orders", "2,3", "--ngram_dropout", "0.2"],
    ["--optimizer", "muon", "--gradient_accumulation_steps", "2"],
    ["--sequential", "false", "--position", "learned"],
    pytest.param(["--compile", "true", "--n_embd", "32,32,32", "--qk_norm", "true"], marks=pytest.mark.slow),
], ids=["adamw-noise", "muon-accumulation", "windows-learned", "native"])
def test_resume_is_bit_for_bit(folder, extra, two_threads, monkeypatch):
    monkeypatch.setattr(kernels, "COMPILE_FROM", 1)
    assert_resume_is_exact(folder, 20, "--checkpoint_interval", 10, "--eval_interval", 5, *extra)
    steps = [m["step"] for m in map(json.loads, (folder / "checkpoints/metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(steps) and Counter(steps) == {5: 1, 10: 2, 15: 1, 20: 2}


LAYERS = ["--n_embd", "16,16,16", "--attention_type", "standard,mamba,fractal", "--fractal_depth_range", "1,1",
          "--compile", "layers"]


@pytest.mark.slow
def test_compiled_layers_train_as_they_are_written(folder, capsys, monkeypatch):
    """The same losses to rounding, in blocks with and without a boundary; and resume is bit for bit."""
    for path in (folder / "dataset").iterdir():
        path.unlink()
    for i in range(99):  # 40 tokens each with <|endoftext|>, read in blocks of 16
        (folder / f"dataset/{i:02}.txt").write_text(f"A document of 39 bytes, as they go: {i:03}")
    common = ["--checkpoint_interval", 4, "--eval_interval", 4, *LAYERS]

    def losses(*flags):
        run("--max_iters", 8, *common, *flags)
        lines = map(json.loads, (folder / "checkpoints/metrics.jsonl").read_text().splitlines())
        return [line[key] for line in lines for key in ("train_loss", "val_loss", "grad_norm") if key in line]

    kinds, to_device = set(), train.to_device

    def watched(*args, **keys):
        batch = to_device(*args, **keys)
        if torch.is_grad_enabled():  # a batch to train on
            kinds.add(batch[2] is None)
        return batch

    monkeypatch.setattr(train, "to_device", watched)
    torch.testing.assert_close(losses(), losses("--compile", "false"), rtol=1e-4, atol=0)
    assert kinds == {True, False}
    assert "layers compiled" in capsys.readouterr().out
    assert_resume_is_exact(folder, 8, *common, "--dropout", "0.1")


def test_what_a_gpu_compiles(folder, monkeypatch):
    """Nothing where there is no Triton, as on Windows, or where the GPU is too old for it."""
    this = made("--compile", "true")
    this.device = torch.device("cuda")
    monkeypatch.setattr(kernels, "COMPILE", True)
    for triton, capability, said in ((None, (8, 0), "not compiled (Triton is not installed)"),
                                     (torch, (6, 1), "not compiled (this GPU is too old for Triton)"),
                                     (torch, (8, 0), "compiled")):
        monkeypatch.setattr(kernels, "triton", triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert this.compile() == said and (this.step_model is this.model) == (said != "compiled")
    monkeypatch.setattr(this, "try_compiled_layers", lambda: "")
    this.settings.compile = "layers"
    assert this.compile() == "layers compiled" and this.step_model is this.model


def test_a_compiled_model_makes_no_gradients_of_its_state(folder):
    """Compiled code makes one of every output that has one, and those of states, all zeros, are large."""
    model, idx = made().model, torch.zeros(2, 4, dtype=torch.long)
    compiled = torch.compile(train.Truncated(model), backend="aot_eager", fullgraph=True)
    start = model.initial_state(2)
    (_, loss, state), (_, expected, usual) = (f(idx, idx, state=start) for f in (compiled, model))
    torch.testing.assert_close((loss, state), (expected, map_state(torch.Tensor.detach, usual)))
    assert loss.requires_grad and not any(t.requires_grad for t in tree_leaves(state))
    assert any(t.requires_grad for t in tree_leaves(usual))


def test_every_kind_of_layer_stays_compiled(monkeypatch):
    """With boundaries and without, with a state and without, however many kinds of layers there are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = GPT(GPTConfig(vocab_size=9, n_embd=[8, 8, 8, 16, 16, 16], n_head=1, block_size=4,
                          attention_type=["standard", "mamba", "fractal"] * 2, fractal_count=1,
                          fractal_depth_range=[2, 2]))
    idx, boundary = torch.zeros(2, 4, dtype=torch.long), torch.eye(2, 4).bool()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        train.compile_layers(model)
        for reset in None, boundary:
            for state in None, model.initial_state(2):
                model(idx, idx, state=state, reset=reset)


def test_layers_that_cannot_be_compiled_run_as_they_are(folder, capsys, monkeypatch):
    def no_compiler(*args, **keys):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", lambda *args, **keys: no_compiler)
    this = run("--max_iters", 2, "--compile", "layers")
    assert "warning: the layers could not be compiled, they run more slowly (RuntimeError: no g++)" in \
        capsys.readouterr().out and this.step == 2
    this.sharded = True  # FSDP's weights stay partly gathered where a pass fails, and optimizers would miss them
    with pytest.raises(train.RunError, match=r"^fsdp: true, .* \(RuntimeError: no g\+\+\); add --compile false$"):
        this.compile()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_on_another_device(away, folder, monkeypatch, optimizer):
    """Training, also resumed, and samples: the losses are the CPU's; what it saved scores a file on both alike."""
    flags = [*STILL, "--optimizer", optimizer, "--ngram_orders", "2,3", "--ngram_rows", 64, "--max_iters", 6,
             "--checkpoint_interval", 3, "--eval_interval", 3, "--gradient_accumulation_steps", 2]
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 8)

    def losses(device, *more):
        settings = train.load_config([*TINY, *map(str, flags), "--checkpoint_dir", device.type, *more])
        this = train.Run(settings, device, 0, 1)
        this.main()
        return [m[key] for m in this.metrics for key in ("val_loss", "val_loss_reset") if key in m]

    cpu, text = torch.device("cpu"), folder / "few.py"
    text.write_bytes((folder / "dataset/textwrap.py").read_bytes()[:500])
    expected = losses(cpu)
    assert losses(away) == pytest.approx(expected, rel=1e-3)
    (folder / away.type / "checkpoint_step_000006.pt").unlink()
    assert losses(away, "--init_from", "resume") == pytest.approx(expected, rel=1e-3)
    models = [sample.load_model(folder / away.type / "best_model.pt", device)[0] for device in (cpu, away)]
    scores = [sample.score(model, Tokenizer("byte"), text) for model in models]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert sample.encode(models[1], Tokenizer("byte"), text, folder / "features.npy") == (scores[0][2], 8)


def test_files_of_a_run(folder, monkeypatch):
    steps, step = [], train.Run.train_step
    monkeypatch.setattr(train.Run, "train_step", lambda this: steps.append(step(this)) or steps[-1])
    this = run("--max_iters", 20, "--checkpoint_interval", 5, "--keep_checkpoints", 2, "--eval_interval", 10)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert [n for n in names if n.endswith(".pt")] == ["best_model.pt", "checkpoint_step_000015.pt",
                                                       "checkpoint_step_000020.pt"]
    assert {"loss.png", "metrics.jsonl"} <= set(names) and any(n.startswith("events.out.tfevents") for n in names)
    assert not any(".tmp" in n for n in names)
    checkpoint = torch.load(folder / "checkpoints/best_model.pt", weights_only=True)
    assert {"format", "model", "model_args", "optimizer", "step", "tokens", "rng", "loader", "state", "config",
            "tokenizer", "best_val_loss"} <= checkpoint.keys()
    assert checkpoint["model_args"]["fractal_depths"] == this.model.config.fractal_depths
    lines = [json.loads(line) for line in (folder / "checkpoints/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        keys = {"step", "tokens", "seconds"}
        assert line.keys() in ({*keys, "train_loss", "learning_rate", "grad_norm", "tokens_per_second"},
                               {*keys, "val_loss", "val_loss_reset", "val_bits_per_byte", "params"})
        assert line["tokens"] == line["step"] * 32
    for line, ten in zip((line for line in lines if "train_loss" in line), (steps[:10], steps[10:]), strict=True):
        assert line["train_loss"] == pytest.approx(sum(loss for loss, _, _ in ten) / 10)
        assert (line["learning_rate"], line["grad_norm"]) == ten[-1][1:]
    vals = [line for line in lines if "val_loss" in line]
    assert vals[-1]["params"] == sum(p.numel() for p in this.model.parameters())
    assert vals[-1]["val_bits_per_byte"] == pytest.approx(vals[-1]["val_loss"] / math.log(2), rel=1e-6)


def test_a_file_that_cannot_be_written_ends_the_run(folder, monkeypatch):
    """What the writing thread meets, the run does; and nothing half-written stays."""
    def full(run, file):
        file.write(b"half")
        raise OSError("No space left on device")

    run("--max_iters", 4, "--eval_interval", 2)
    before = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(train.RunError, match=r"best_model.pt cannot be written: No space"):
        run("--max_iters", 6, "--eval_interval", 2, "--init_from", "resume")
    assert {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")} == before
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_full_disk_is_one_line(folder):
    run("--max_iters", 2)
    newest = folder / "checkpoints/checkpoint_step_000002.pt"
    size = newest.stat().st_size // 2
    process = command("--max_iters", 4, "--init_from", "resume",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert re.fullmatch(r"error: .*\.pt cannot be written: .*File too large.*", err.splitlines()[-1])
    assert train.load_checkpoint(newest)["step"] == 2 and not list((folder / "checkpoints").glob(".*"))


def test_validation_losses_cover_the_split_once(folder, capsys):
    """Both numbers against a float64 model that reads the whole split (or each block) in one call."""
    this = run("--max_iters", 3, "--eval_lanes", 1, "--eval_iters", "null")
    best = train.load_checkpoint(folder / "checkpoints/best_model.pt")
    model = GPT(GPTConfig(**best["model_args"])).double().eval()
    model.load_state_dict(best["model"])
    tokens = torch.as_tensor(this.val_tokens.astype("int64"))
    x, y = tokens[:-1], tokens[1:]
    y = torch.where(y == this.tokenizer.eot, -1, y)
    vals = [m for m in this.metrics if "val_loss" in m][-1]
    with torch.no_grad():
        carried = model(x[None], y[None], reset=(x == 256)[None])[1].item()
        alone = [(model(x[None, i:i + 16], y[None, i:i + 16], reset=(x == 256)[None, i:i + 16])[1].item(),
                  (y[i:i + 16] >= 0).sum().item()) for i in range(0, len(x), 16)]
    assert vals["val_loss"] == pytest.approx(carried, abs=2e-5)
    said = re.search(r"step 3: val_loss ([\d.]+) .* carried \(.*, ([\d.]+) with each block", capsys.readouterr().out)
    assert said.groups() == (f"{vals['val_loss']:.4f}", f"{vals['val_loss_reset']:.4f}")
    expected = sum(a * n for a, n in alone) / sum(n for _, n in alone)
    this.config.eval_lanes = 5
    this.evaluate()
    this.writer.close()
    for found in (vals, this.metrics[-1]):
        assert found["val_loss_reset"] == pytest.approx(expected, abs=2e-5)


def test_what_is_frozen_stays(folder, monkeypatch):
    """Of all hidden matrices, too, which leaves Muon with nothing to do."""
    make, before = train.make_optimizers, []

    def frozen(model, *args):
        model.h.requires_grad_(False)
        before.extend(p.clone() for p in model.h.parameters())
        return make(model, *args)

    monkeypatch.setattr(train, "make_optimizers", frozen)
    this = run("--max_iters", 2, "--optimizer", "muon")
    assert all(map(torch.equal, before, this.model.h.parameters())) and this.model.wte.weight.grad.any()


def test_an_adapter_of_the_weight_is_trained(folder, monkeypatch):
    """As a parametrization: it alone, by AdamW, in a run like any other."""
    class Adapter(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.A, self.B = (torch.nn.Parameter(x * torch.ones(n)) for n, x in zip(linear.weight.shape, (0, 1)))

        def forward(self, weight):
            return weight + self.A[:, None] * self.B

    def adapted(model, *args):
        model.requires_grad_(False)
        for linear in [m for m in model.h.modules() if isinstance(m, torch.nn.Linear)]:
            parametrize.register_parametrization(linear, "weight", Adapter(linear))
        return make(model, *args)

    make = train.make_optimizers
    monkeypatch.setattr(train, "make_optimizers", adapted)
    this = run("--max_iters", 2, "--optimizer", "muon")
    moved = {name.rpartition(".")[2] for name, p in this.model.named_parameters() if p in this.optimizers[0].state}
    assert moved == {"A", "B"} and all(p.any() for name, p in this.model.named_parameters() if name.endswith(".A"))


def test_groups_keep_learning_rates_of_their_own(folder, monkeypatch):
    def make(model, config, device):
        layers = {"params": list(model.h.parameters()), "lr": 3e-3}
        return [torch.optim.AdamW([layers, {"params": list(model.wte.parameters())}], lr=config.learning_rate)]

    monkeypatch.setattr(train, "make_optimizers", make)
    keys = ("--learning_rate", 4e-2, "--min_lr", 4e-2, "--warmup_iters", 4)
    for steps, share, how in ((2, 0.5, "scratch"), (6, 1, "resume")):
        this = run(*keys, "--max_iters", steps, "--init_from", how)
        rates = [group["lr"] for group in this.optimizers[0].param_groups]
        assert rates == pytest.approx([share * 3e-3, share * 4e-2])


def test_what_an_optimizer_counts_is_not_shared_out(folder, monkeypatch):
    """FSDP cannot cut a number in parts, and NAdam keeps two for each parameter."""
    monkeypatch.setattr(train, "make_optimizers", lambda model, *_: [torch.optim.NAdam(model.parameters())])
    monkeypatch.setattr(train, "share_like", lambda p, t: shared.append((p.shape, t.shape)) or t)
    shared = []
    run("--max_iters", 1)
    run("--max_iters", 1, "--init_from", "resume")
    assert shared and all(p == t for p, t in shared)


def test_a_new_run_never_writes_over_another(folder, capsys):
    run("--max_iters", 2)
    first = (folder / "checkpoints/best_model.pt").read_bytes()
    run("--max_iters", 2, "--seed", 5)
    assert (folder / "checkpoints/run_001/best_model.pt").read_bytes() == first
    assert (folder / "checkpoints/run_001/metrics.jsonl").exists()
    assert len(list((folder / "checkpoints").glob("events.*"))) == 1
    assert "run_001" in capsys.readouterr().out
    (folder / "checkpoints/run_²").mkdir()
    run("--max_iters", 2, "--init_from", folder / "checkpoints/run_001/best_model.pt")
    assert (folder / "checkpoints/run_002").is_dir()


def test_a_run_from_a_checkpoint_keeps_its_model_and_sets_its_own_noise(folder, capsys):
    run("--max_iters", 1, "--ngram_orders", "2", "--dropout", 0.3)
    noise = {"dropout": 0.1, "ngram_dropout": 0.2, "token_noise": 0.3, "fractal_drop": 0.4, "fractal_level_drop": 0.5}
    capsys.readouterr()
    flags = [word for key, value in noise.items() for word in (f"--{key}", str(value).lstrip("0"))]
    this = run("--max_iters", 1, "--init_from", folder / "checkpoints/best_model.pt", *flags)
    assert this.model.config.ngram_orders == [2] and {key: getattr(this.model.config, key) for key in noise} == noise
    assert this.model.ngrams.dropout == 0.2
    note, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note:"))
    assert note.endswith("differs in: ngram_orders")
    common = "--max_iters", 1, "--init_from", folder / "checkpoints/run_001/best_model.pt", "--ngram_orders", "2"
    assert run(*common, "--block_size", 8, "--window", 16).tokens == 2 * 8 and "note" not in capsys.readouterr().out


def test_a_run_from_gpt2(folder, capsys, gpt2_cache):
    """A folder as the Hugging Face hub has them: its weights in blocks of our own size, with its logits at first."""
    from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2))
    theirs.save_pretrained(folder / "hub")
    for path in (folder / "dataset").iterdir():
        path.write_bytes(path.read_bytes()[:3000])
    common = ["--init_from", "hub", "--tokenizer", "gpt2", "--max_iters", 1, "--dropout", "0.1"]
    this = run(*common, "--learning_rate", "1e-12", "--min_lr", 0, "--weight_decay", 0)
    assert this.model.config.block_size == 16 and this.model.config.dropout == 0.1
    idx = torch.randint(50257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(this.model.eval()(idx)[0], theirs.eval()(idx).logits, rtol=1e-4, atol=1e-5)
    out = capsys.readouterr().out
    assert "note: the model is the checkpoint's; the configuration differs in: " in out and "n_embd" in out
    for name, words in (("hub", "add --tokenizer gpt2"), ("nothing/here", "init_from: nothing/here is no checkpoint")):
        with pytest.raises(train.RunError, match=words):
            run("--init_from", name, "--max_iters", 1, "--tokenizer", "byte" if name == "hub" else "gpt2")
    (folder / "checkpoints/hints").mkdir()
    weights = (folder / "hub/model.safetensors").read_bytes()
    (folder / "hub/model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(train.RunError, match="init_from: hub is no checkpoint of ours"):
        run(*common)
    (folder / "hub/model.safetensors").write_bytes(weights)
    for name in ("checkpoints", "checkpoints/hints", "checkpoints/best_modle", "best_modle.pt"):  # paths, not names
        with pytest.raises(train.SampleError, match=r"is a folder|is not there"):
            run("--init_from", name, "--max_iters", 1)
    with pytest.raises(train.RunError, match="block_size: 65, but hub has 64 positions"):
        run(*common, "--block_size", 65)
    MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(folder / "mamba")
    with pytest.raises(train.RunError, match="tokens that no tokenizer here makes"):
        run("--init_from", "mamba", *common[2:])
    common[1] = "checkpoints/best_model.pt"
    with pytest.raises(train.RunError, match=r"block_size: 17, but checkpoints/best_model.pt has 16 positions"):
        run(*common, "--block_size", 17)
    assert train.load_checkpoint(folder / common[1])["step"] == 1  # not moved away


def test_resume_refuses_another_run_and_names_both_values(folder, capsys):
    run("--max_iters", 4)
    with pytest.raises(train.RunError, match=r"block_size is 8 but 16 in the .* --init_from checkpoints/best_model.pt"):
        run("--max_iters", 8, "--init_from", "resume", "--block_size", 8)
    for key, value in dict(seed=3, optimizer="muon", beta1=0.8, beta2=0.8, weight_decay=0.2, carry_state="false",
                           gradient_accumulation_steps=2, val_fraction=0.2, dropout=0.1).items():
        with pytest.raises(train.RunError, match=f"{key} is "):
            run("--max_iters", 8, "--init_from", "resume", f"--{key}", value)
    with pytest.raises(train.RunError, match="there are 2 processes but 1 in the checkpoint"):
        train.Run(train.load_config([*TINY, "--init_from", "resume"]), torch.device("cpu"), 0, 2)
    run("--max_iters", 4, "--init_from", "resume")
    assert "already at step 4" in capsys.readouterr().out
    run("--max_iters", 6, "--learning_rate", 1e-4, "--init_from", "resume")
    (folder / "dataset/another.txt").write_text("more")
    with pytest.raises(train.RunError, match="data set"):
        run("--max_iters", 8, "--init_from", "resume")


def test_resume_passes_over_a_damaged_checkpoint(folder, capsys):
    run("--max_iters", 4, "--checkpoint_interval", 2)
    newest = folder / "checkpoints/checkpoint_step_000004.pt"
    newest.write_bytes(newest.read_bytes()[:2000])
    this = run("--max_iters", 4, "--init_from", "resume")
    assert this.step == 4 and "damaged" in capsys.readouterr().out
    assert train.load_checkpoint(newest)["step"] == 4
    newest.write_bytes(newest.read_bytes()[:2000])
    left_by_kills = [folder / f"checkpoints/.{name}.99.tmp" for name in ("best_model.pt", "loss.png")]
    for path in left_by_kills:
        path.touch()
    run("--max_iters", 3, "--init_from", "resume", "--keep_checkpoints", 1)  # its own, and what it does not know
    assert [p.name[-4:-3] for p in train.checkpoints(folder / "checkpoints")] == ["3", "4"]
    assert run("--max_iters", 3, "--init_from", "resume").step == 3
    assert not any(path.exists() for path in left_by_kills)


def test_the_best_model_of_a_resumed_run_is_the_one_on_the_disk(folder):
    """It may be of a step after the checkpoint, or have stayed elsewhere."""
    flags = ["--max_iters", 4, "--checkpoint_interval", 2, "--eval_interval", 1, "--init_from", "resume"]
    run(*flags[:-2])
    later, best = (folder / f"checkpoints/{name}.pt" for name in ("checkpoint_step_000004", "best_model"))
    killed = train.load_checkpoint(best) | {"best_val_loss": 0.5}
    later.unlink()
    torch.save(killed, best)
    written = best.read_bytes()
    assert run(*flags).best_val_loss == 0.5 and best.read_bytes() == written
    for damage in (best.unlink, lambda: best.write_bytes(written[:2000])):
        later.unlink()
        damage()
        this = run(*flags)
        assert this.best_val_loss == train.load_checkpoint(best)["best_val_loss"] > 0.5


def test_resume_does_not_go_back_behind_what_another_run_has_saved(folder):
    run("--max_iters", 2)
    this = made("--max_iters", 3, "--init_from", "resume")
    run("--max_iters", 4, "--init_from", "resume")
    metrics = (folder / "checkpoints/metrics.jsonl").read_bytes()
    with pytest.raises(train.RunError, match="another run has just saved in checkpoints/"):
        this.main()
    assert (folder / "checkpoints/metrics.jsonl").read_bytes() == metrics


def test_resume_in_another_type(folder):
    exact, half, brain = (made(*STILL, "--dtype", dtype) for dtype in ("float32", "float16", "bfloat16"))
    half.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected, *steps = (this.train_step() for this in (exact, half, brain))
    assert steps == [pytest.approx(expected, rel=0.02)] * 2  # the norm is not of the scaled loss
    assert len({loss for loss, _, _ in (expected, *steps)}) == 3  # products are of the type asked for
    run("--max_iters", 2)
    for step, dtype in ((4, "float16"), (6, "bfloat16"), (8, "float16")):
        assert run("--max_iters", step, "--init_from", "resume", "--dtype", dtype).step == step


def test_a_validation_split_that_predicts_nothing_is_an_error(folder):
    """Its loss would be 0, and the first evaluation's model the best for ever."""
    with pytest.raises(train.DataError, match=r"split has 1 tokens and nothing to predict: raise val_fraction"):
        run("--max_iters", 4, "--val_fraction", 1e-9)
    (folder / "dataset/zzz.txt").touch()
    with pytest.raises(train.DataError, match="split has 2 tokens"):
        run("--max_iters", 4, "--val_fraction", 5e-5)


def test_bad_steps_are_skipped_and_then_stop_the_run(folder, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    this = made("--max_iters", 30, "--max_bad_steps", 3, "--checkpoint_interval", 1, "--keep_checkpoints", 9)
    forward, calls = this.model.forward, Counter()

    def sometimes_nan(*args, **kw):
        logits, loss, state = forward(*args, **kw)
        calls["n"] += 1
        return logits, loss * math.nan if calls["n"] in (2, 5, 6, 7) else loss, state

    this.model.forward = sometimes_nan
    before = {}
    step = this.train_step

    def watched():
        weights = {k: v.clone() for k, v in this.model.state_dict().items()}
        out, leaves = step(), []
        unchanged = all(torch.equal(v, weights[k]) for k, v in this.model.state_dict().items())
        train.map_state(leaves.append, this.state)
        before[this.step] = (unchanged, not any(t.any() for t in leaves))  # what was skipped may have held a boundary
        return out

    this.train_step = watched
    with pytest.raises(train.RunError, match="in 3 steps in a row, up to step 7; lower learning_rate and start from"):
        this.main()
    assert {s: v for s, v in before.items() if v == (True, True)}.keys() == {2, 5, 6, 7}
    assert [p.name[-4:-3] for p in train.checkpoints(folder / "checkpoints")] == ["1", "3", "4"]
    never_saved = made("--max_bad_steps", 1, "--checkpoint_dir", "others")
    monkeypatch.setattr(never_saved, "train_step", lambda: (math.nan, 0.0, 0.0))
    with pytest.raises(train.RunError, match=r"lower learning_rate$"):
        never_saved.main()
    text = (folder / "checkpoints/metrics.jsonl").read_text()
    assert "NaN" not in text, "strict JSON"
    missing = [line["step"] for line in map(json.loads, text.splitlines()) if line["train_loss"] is None]
    assert missing == [2, 5, 6]  # the seventh ended the run
    assert this.writer.all_writers is None, "closed: its thread would write on, wherever the process is by then"


def test_a_step_without_finite_gradients_moves_the_stream_on(folder):
    """Two runs whose first step changes no weight, one as its gradients overflow, go on with the same state."""
    states = []
    for broken in (False, True):
        this = train.Run(train.load_config([*TINY, *STILL, "--min_lr", "0", "--lr_decay_iters", "1"]),
                         torch.device("cpu"), 0, 1)
        this.step = 2  # the schedule has come to its end: a rate of 0
        if broken:
            this.model.ln_f.weight.register_hook(lambda grad: grad * math.inf)
        loss, _, norm = this.train_step()
        assert math.isfinite(loss) and math.isfinite(norm) != broken
        states.append(this.state)
    same(*states)


def test_accumulation_is_one_larger_batch(folder):
    """Two batches of one row, seen as random windows, give the gradient of their concatenation."""
    this = made("--batch_size", 1, "--gradient_accumulation_steps", 2, "--sequential", "false", "--fractal_drop", 0,
                "--fractal_level_drop", 0, "--grad_clip", 0)
    batches = [this.loader.next_batch() for _ in range(2)]
    batches[1][1][:, :5] = -1  # unequal counts of targets
    this.loader.next_batch = iter(batches).__next__
    grads = {}
    this.optimizers[0].step = lambda: grads.update({n: p.grad.clone() for n, p in this.model.named_parameters()})
    loss, _, _ = this.train_step()
    x, y, reset = (torch.cat(t) for t in zip(*batches))
    this.model.zero_grad()
    _, expected, _ = this.model(x, y, reset=reset)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and this.tokens == 32
    for name, p in this.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_resets_go_only_where_they_mark_nothing():
    """A batch without its reset gives the loss it has with it, and keeps it wherever a boundary lies."""
    model = GPT(GPTConfig(n_embd=16, attention_type=["mamba", "fractal", "standard"], vocab_size=257, n_head=1,
                          fractal_dim_range=[8, 8], ngram_orders=[3], fractal_drop=0, fractal_level_drop=0))
    x, y = torch.randint(257, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    nowhere = torch.zeros(3, 12, dtype=torch.bool)
    first, inside = nowhere.clone(), nowhere.clone()
    first[:, 0], inside[1, 5] = True, True
    for reset, fresh, stays in ((nowhere, False, False), (first, False, True), (first, True, False),
                                (inside, False, True), (inside, True, True)):
        batch = train.to_device((x, y, reset), torch.device("cpu"), fresh)
        assert (batch[2] is not None) == stays and (batch[2] is None or batch[2].equal(reset))
        with torch.no_grad():
            state = None if fresh else model(x, y)[2]
            losses = [model(x, y, state=state, reset=r)[1] for r in (reset, batch[2])]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_learning_rate_schedule():
    config = train.Config(max_iters=1000, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=500)
    rates = [train.schedule_at(step, config, 1000) * config.learning_rate for step in range(1000)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[255] == pytest.approx(0.55, abs=1e-9) and rates[500:] == [0.1] * 500
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    usual = [train.schedule_at(step, train.Config(learning_rate=2.0), n)
             for step, n in ((0, 400), (19, 400), (210, 400), (400, 400), (0, 9000))]
    assert usual == pytest.approx([1 / 20, 1, 0.55, 0.1, 1 / 100])  # warm-up for a twentieth or 100 steps, down to 0.1


@pytest.mark.parametrize("at_once", [train.ORTHOGONALISED_AT_ONCE, 2 * 64 * 64, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_muon_moves_the_singular_values_alone(transposed, at_once, monkeypatch):
    """Each update is U p(p(..p(S))) V^T of the momentum's singular values S / |S|, p(s) = a s + b s^3 + c s^5."""
    torch.manual_seed(0)
    monkeypatch.setattr(train, "ORTHOGONALISED_AT_ONCE", at_once)
    weights = [torch.randn(5, 9) for _ in range(3)] + [torch.randn(4, 4)]
    params = [torch.nn.Parameter(w.t().clone() if transposed else w) for w in weights]
    muon = train.Muon(params, lr=0.5, weight_decay=0.1)
    expected, momenta = [p.detach().double() for p in params], [0] * 4
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            U, S, Vh = torch.linalg.svd(0.05 * g + 0.95 * momenta[i], full_matrices=False)
            S = S / S.norm()
            for _ in range(5):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            expected[i] = expected[i] * (1 - 0.05) - 0.5 * 0.2 * math.sqrt(max(p.shape)) * (U * S) @ Vh
        muon.step()
    exact = train.choose_dtype("auto", torch.device("cpu")) == torch.float32
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach().double(), e, rtol=0, atol=1e-5 if exact else 3e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_compiles_nothing_never_imports_the_compiler(folder, optimizer):
    flags = [*TINY, "--max_iters", "2", "--optimizer", optimizer]
    code = "import sys, train; train.main(); sys.exit('torch._dynamo' in sys.modules and 'compiler imported')"
    done = subprocess.run([sys.executable, "-c", code, *flags], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "checkpoints").glob("checkpoint_step_*.pt"))) == 1


def test_decay_and_muon_take_the_right_parameters():
    config = train.Config(n_embd=[16, 8], attention_type=["mamba", "fractal"], vocab_size=11, optimizer="muon",
                          fractal_dim_range=[8, 8], bias=True, ngram_orders=[2], weight_decay=0.2)
    model = GPT(config)
    names = {id(p): n for n, p in model.named_parameters()}
    adamw, muon = train.make_optimizers(model, config, torch.device("cpu"))
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in adamw.param_groups)
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert decayed == {"wte.weight", "lm_head.weight", "ngrams.table.weight"}
    assert [g["weight_decay"] for g in adamw.param_groups + muon.param_groups] == [0.2, 0, 0.2]
    assert muon.defaults["lr"] == adamw.defaults["lr"] == config.learning_rate
    assert decayed | plain | hidden == set(names.values())
    assert all(re.search(r"A_log|\.D$|\.a$|conv|ln_|bias", n) for n in plain)
    assert all(re.search(r"in_proj|x_proj|dt_proj|out_proj|c_fc|c_proj|resize|W_in|W_out|\.M\.", n) for n in hidden)


RECIPES = sorted((ROOT / "recipes").glob("*.json"))


def recipe_model(path):
    config = train.load_config(["--config", str(path), "--device", "cpu"]).config
    return config, GPT(GPTConfig(**{k: v for k, v in config.model_dump().items() if k in GPTConfig.model_fields}
                                 | {"vocab_size": 257}))


def test_recipes_keep_their_promises():
    """Every recipe is valid; mixers are equal in parameters and tokens, those of noise but for it; the equal recipe is
    nanoGPT's size."""
    sizes, tokens, without_noise = {}, set(), set()
    for path in RECIPES:
        config, model = recipe_model(path)
        if path.stem.startswith("mixer_"):
            sizes[path.stem] = model.num_params()
            tokens.add(config.max_iters * config.batch_size * config.block_size)
        if path.stem.startswith("noise_"):
            without_noise.add(config.model_copy(update=dict.fromkeys(train.NOISE, 0.0)).model_dump_json())
        if path.stem == "shakespeare_equal":
            assert model.num_params() <= 810_000 and not config.ngram_orders
    assert len(without_noise) == 1
    assert len(sizes) == 16 and len(tokens) == 1 and max(sizes.values()) <= 1.02 * min(sizes.values())


@pytest.mark.parametrize("base, changes", [
    ("ablation_all", {"adamw": ["learning_rate", "muon_learning_rate", "optimizer"], "bigrams": ["ngram_orders"],
                      "gelu": ["activation"], "no_qk_norm": ["qk_norm"], "no_zero_init": ["zero_init"],
                      "one_rate": ["muon_learning_rate"], "tied": ["tie_weights"], "all": []}),
    ("books_carried", {"long": ["batch_size", "block_size"], "reset": ["carry_state"], "windows": ["sequential"],
                       "carried": []})])
def test_recipes_differ_by_what_their_names_say(base, changes):
    prefix, found = base.partition("_")[0], {}
    recipes = {path.stem: json.loads(path.read_text())["config"] for path in RECIPES}
    for name, config in recipes.items():
        if name.startswith(f"{prefix}_"):
            differs = [key for key in config | recipes[base] if config.get(key) != recipes[base].get(key)]
            found[name.removeprefix(f"{prefix}_")] = sorted(differs)
    assert found == changes


def test_a_hybrid_learns_a_real_text(folder):
    """Well below the entropy of single bytes, in half a minute."""
    for path in (folder / "dataset").iterdir():
        path.unlink()
    library = Path(os.__file__).parent
    text = "".join((library / f"{name}.py").read_text() for name in ("argparse", "typing", "tarfile", "inspect"))
    (folder / "dataset/library.txt").write_text(text)
    counts = Counter(text.encode())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    this = run("--max_iters", 150, "--n_embd", "64,48,64", "--batch_size", 8, "--block_size", 64, "--learning_rate",
               4e-3, "--eval_interval", 150, "--eval_iters", 20)
    assert this.best_val_loss < 0.75 * unigram


# -- steps and keys against torch's own

@pytest.mark.parametrize("flags, carries", [([], True), (["--carry_state", "false"], False),
                                            (["--sequential", "false"], False)], ids=["carried", "reset", "windows"])
def test_steps_are_a_loop_of_torchs_own(folder, flags, carries):
    """The state carried, without its gradient, or not; clipped gradients; AdamW with the betas of the file."""
    given = ["--grad_clip", "0.1", "--beta1", "0.8", "--beta2", "0.7", "--weight_decay", "0", "--max_iters", "9"]
    this = train.Run(train.load_config([*TINY, *STILL, *given, *flags]), torch.device("cpu"), 0, 1)
    model, loader = copy.deepcopy((this.model, this.loader))
    adamw, state = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.7), weight_decay=0), None
    for step in range(4):
        x, y, reset = loader.next_batch()
        _, loss, state = model(x, y, state=state, reset=reset)
        state = map_state(torch.Tensor.detach, state) if carries else None
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        adamw.param_groups[0]["lr"] = 4e-3 * train.schedule_at(step, this.config, 9)
        adamw.step()
        assert norm > 0.2 and this.train_step() == pytest.approx(
            (loss.item(), adamw.param_groups[0]["lr"], norm.item()), rel=1e-4)
    for ours, expected in zip(this.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-5)


def test_keys_reach_the_run(folder):
    def start(*flags):
        return train.Run(train.load_config([*TINY, *flags]), torch.device("cpu"), 0, 1)

    batches = [(str(B), start("--batch_size", str(B)).loader.steps_per_epoch) for B in range(1, 5)]
    B, share, n = next((B, n / steps, n) for B, steps in batches for n in range(1, steps) if n / steps * steps > n)
    assert start("--batch_size", B, "--epochs", str(share), "--max_iters", "null").max_iters == n
    this = start("--epochs", "1.5", "--gradient_accumulation_steps", "2", "--optimizer", "muon",
                 "--muon_learning_rate", "0.3", "--max_iters", "null")
    assert this.max_iters == math.ceil(1.5 * this.loader.steps_per_epoch / 2)
    assert [o.defaults["lr"] for o in this.optimizers] == [4e-3, 0.3]
    (folder / "other").mkdir()
    (folder / "other/book").write_bytes(b"text " * 99)
    this = start("--vocab_size", "300", "--dataset", "other")
    assert this.model.wte.num_embeddings == 300 and this.corpus.files == [Path("other/book")]
    with pytest.raises(train.RunError, match="vocab_size: 256, but the tokenizer has 257"):
        start("--vocab_size", "256")
    with pytest.raises(train.RunError, match="give bfloat16 or float32"):
        train.Run(train.load_config([*TINY, "--fsdp", "true", "--dtype", "float16"]), torch.device("cpu"), 0, 2)
    for value in (True, False):
        start("--compile", json.dumps(value))
        assert kernels.COMPILE == value
    runs = [start("--seed", seed) for seed in ("1", "1", "2")]
    for drawn in [run.model.lm_head.weight for run in runs], [run.loader.next_batch()[0] for run in runs]:
        assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])


def test_the_best_model_is_that_of_the_lowest_loss(folder, monkeypatch):
    losses = iter([3.0, 9.0, 1.0, 9.0, 2.0, 9.0])  # carried and reset, three times
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 0.0))
    run("--max_iters", 3, "--eval_interval", 1)
    assert train.load_checkpoint(folder / "checkpoints/best_model.pt")["step"] == 2


@pytest.mark.parametrize("batches", ["2", "null"])
def test_both_losses_are_of_the_same_text(folder, monkeypatch, batches):
    seen = []

    def look(_, batches, *__):
        targets = torch.cat([y.flatten() for _, y, _ in batches])
        seen.append(targets[targets >= 0].sort().values)
        return 1.0, 1.0

    monkeypatch.setattr(train, "evaluate", look)
    this = run("--max_iters", 1, "--eval_iters", batches)
    assert torch.equal(*seen)
    assert len(seen[0]) == (2 * 16 * 16 if batches == "2" else (this.val_tokens[1:] != 256).sum())


def test_bits_are_of_bytes_not_of_tokens(gpt2_cache):
    tokenizer = Tokenizer("gpt2")
    model = GPT(GPTConfig(vocab_size=50257, n_embd=8, n_layer=1, tie_weights=False))
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = torch.tensor(tokenizer.encode("It was the best of times").astype("int64"))[None]
    batch = ids[:, :-1], ids[:, 1:], torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
    nats, bits = train.evaluate(model, [batch], torch.device("cpu"), torch.autocast("cpu", enabled=False),
                                torch.as_tensor(tokenizer.token_bytes), False, 0, 1)
    assert nats == pytest.approx(math.log(50257), rel=1e-5)
    assert bits == pytest.approx(math.log2(50257) * 5 / len(" was the best of times"), rel=1e-5)


def test_processes_share_the_rows_of_an_evaluation(folder, monkeypatch):
    this, sums = made(), []
    batches = list(train.eval_lanes(this.val_tokens, 3, 16, this.tokenizer.eot))
    monkeypatch.setattr(train.dist, "all_reduce", sums.append)
    (nats, _), *_ = (train.evaluate(this.model, batches, this.device, this.autocast, this.token_bytes, True, rank, n)
                     for n in (1, 2, 4) for rank in range(n))  # of four processes one has no row
    for of_all in sum(sums[:2]), sum(sums[2:]):
        assert of_all[0] / of_all[1] == pytest.approx(nats, rel=1e-5)
        assert of_all[1] == of_all[2] == (this.val_tokens[1:] != this.tokenizer.eot).sum()


def test_all_processes_stop_where_one_is_asked_to(folder, monkeypatch):
    this = made()
    this.world_size = 2
    for mine, other in itertools.product((False, True), repeat=2):
        this.stopping = mine
        monkeypatch.setattr(train.dist, "all_reduce", lambda flag, other=other: flag.add_(other))
        assert this.stop_requested() == (mine or other)


# -- folders and what is in them

def test_one_run_at_a_time_writes_to_a_folder(folder):
    first = train.Run(train.load_config(TINY), torch.device("cpu"), 0, 1)
    first.open_logs()
    written = (folder / "checkpoints/metrics.jsonl").read_bytes()
    with pytest.raises(train.RunError, match="another run writes to checkpoints/"):
        run("--max_iters", 2)
    assert not (folder / "checkpoints/run_001").exists()
    assert (folder / "checkpoints/metrics.jsonl").read_bytes() == written
    first.closing.close()
    run("--max_iters", 2)


def test_a_run_does_not_read_what_it_writes(folder):
    for inside in ("dataset", "dataset/run", str(folder / "dataset/a/b")):
        with pytest.raises(train.RunError, match="is in the data set dataset/"):
            run("--max_iters", 1, "--checkpoint_dir", inside)
    run("--max_iters", 1, "--checkpoint_dir", "dataset/.run")


def test_what_cannot_be_written_is_named(folder, monkeypatch):
    (folder / "file").touch()
    with pytest.raises(train.RunError, match="checkpoint_dir: file is a file"):
        run("--checkpoint_dir", "file")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, file in ((SummaryWriter, "add_scalar", "events"), (Figure, "savefig", "loss.png")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(train.RunError, match=rf"checkpoints/{file}.* cannot be written: No space left"):
                run("--max_iters", 1)


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, ""), (MemoryError("Unable to allocate 8 GiB"), 1, "memory is too small, .*: Unable"),
    (lambda: torch.empty(2**46), 1, "memory is too small, lower batch_size, block_size or n_embd: "),
    (RuntimeError("CUDA out of memory. Tried to\nallocate"), 1, "memory is too small, .*: CUDA out of memory"),
    (RuntimeError("CUDA error: an illegal memory access"), RuntimeError, "")])
def test_ctrl_c_before_the_loop_and_memory_that_is_too_small(folder, monkeypatch, capsys, error, code, said):
    def fails(*_, **__):
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(train, "load_corpus", fails)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])
    with pytest.raises(SystemExit if isinstance(code, int) else code) as stop:
        train.main()
    err = capsys.readouterr().err
    assert not isinstance(code, int) or (stop.value.code == code and len(err.splitlines()) == bool(said))
    assert re.match(said and f"error: {said}", err)


def test_files_that_are_damaged_or_of_other_code(folder):
    (folder / "current_configuration.schema.json").write_bytes(b"\xff\xfe")
    run("--max_iters", 2)
    schema = json.loads((folder / "current_configuration.schema.json").read_text())
    assert "n_embd" in str(schema)
    with open(folder / "checkpoints/metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe{\nnull\n")
    this = run("--max_iters", 3, "--init_from", "resume")
    assert [m["step"] for m in this.metrics] == [2, 2, 3, 3]
    path = folder / "checkpoints/best_model.pt"
    checkpoint = train.load_checkpoint(path)
    for key, value in (("model_args", {"colour": "red"}), ("model", {"new.weight": torch.ones(1)})):
        torch.save({**checkpoint, key: checkpoint[key] | value}, folder / "other.pt")
        with pytest.raises(train.SampleError, match=r"init_from other\.pt: the checkpoint does not fit this model\.py"):
            run("--init_from", "other.pt")


def test_a_sample_that_cannot_be_made_does_not_end_the_run(folder, capsys):
    this = train.Run(train.load_config([*TINY, "--tie_weights", "false"]), torch.device("cpu"), 0, 1)
    this.folder.mkdir()
    torch.nn.init.zeros_(this.model.ln_f.weight)  # all tokens alike, so that soon the one below is drawn
    with torch.no_grad():
        this.model.wte.weight[:200] = math.nan
    this.show()
    assert "no sample: what the model computes is not finite" in capsys.readouterr().out


# -- signals and processes

def test_the_command_that_resumes_starts_as_many_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_iters", "9", "--epochs=2", "--seed", "3"])
    assert train.resume_command() == "uv run train.py --max_iters 9 --epochs=2 --seed 3 --init_from resume"
    for key, value in dict(WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, GROUP_WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    assert train.resume_command(18) == ("uv run torchrun --nnodes=2 --nproc_per_node=4 train.py --seed 3 "
                                        "--init_from resume --max_iters 18")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_prints_the_command_that_resumes(folder, number):
    process = command("--max_iters", 100000, "--eval_interval", 100000, "--checkpoint_interval", 100000,
                      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # if the tests run under nohup
    metrics = folder / "checkpoints/metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    if number == signal.SIGHUP:
        time.sleep(0.01)
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    step = int(re.search(r"stopped at step (\d+)", out)[1])
    assert "--init_from resume" in out
    assert train.load_checkpoint(folder / f"checkpoints/checkpoint_step_{step:06d}.pt")["step"] == step


def test_a_run_that_nobody_listens_to_saves_and_ends(folder, monkeypatch):
    """Ctrl-C ends tee as well, and the bar and the losses of a `train.py | tee log` come to a closed pipe."""
    process = command("--max_iters", 100000, "--eval_interval", 1, "--checkpoint_interval", 100000)
    while "step 1: val_loss" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    step = int(re.search(r"stopped at step (\d+) of 100000, saved in checkpoints/", process.stderr.read())[1])
    assert (folder / f"checkpoints/checkpoint_step_{step:06d}.pt").exists()

    def closed(*_):
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(train.tqdm, "update", closed)
        patch.setattr(os, "dup2", lambda *_: None)
        run("--max_iters", 3)
    assert (folder / "checkpoints/checkpoint_step_000001.pt").exists()


@pytest.fixture
def signalled(monkeypatch):
    """signalled(n): step n, counted from 1, gets a signal"""
    def at(n):
        step = train.Run.train_step

        def train_step(this):
            if this.step == n - 1:
                signal.raise_signal(signal.SIGTERM)
            return step(this)

        monkeypatch.setattr(train.Run, "train_step", train_step)
    return at


def test_a_signal_in_the_last_step_comes_too_late(folder, capsys, signalled):
    signalled(3)
    this = run("--max_iters", 3)
    out = capsys.readouterr().out
    assert "val_loss" in this.metrics[-1] and "lowest val_loss" in out and "--init_from resume --max_iters 6" in out


def test_an_evaluation_that_a_signal_put_off_is_made_on_resume_once(folder, signalled, monkeypatch):
    flags = ["--max_iters", 6, "--eval_interval", 2]

    def evaluations(this):
        return [(m["step"], m["val_loss"]) for m in this.metrics if "val_loss" in m]

    expected = evaluations(run(*flags))
    signalled(4)
    stopped = run(*flags)
    assert stopped.step == 4 and evaluations(stopped) == expected[:1]
    assert evaluations(run(*flags, "--init_from", "resume")) == expected

    def killed(this):
        raise SystemError

    for path in train.checkpoints(folder / "checkpoints")[1:]:
        path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train.Run, "train_step", killed)
        run(*flags, "--init_from", "resume")
    assert evaluations(run(*flags, "--init_from", "resume")) == expected


FSDP = ["--fsdp", "true", "--optimizer", "muon", "--gradient_accumulation_steps", "2"]


@pytest.mark.parametrize("flags", [pytest.param([], id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)])
def test_two_processes_are_one_larger_batch(folder, flags, capsys):
    """Over gloo with two rows a process they take the same steps as one process with four, also where one of them has
    fewer targets, and go on from what they saved; what FSDP saved, one process could load as well."""
    text = (folder / "dataset/textwrap.py").read_text()
    for path in (folder / "dataset").iterdir():
        path.unlink()
    for i in range(0, 800, 2):  # documents of two characters: each third target is <|endoftext|>, which does not count
        (folder / f"dataset/{i:03}.txt").write_text(text[i : i + 2])
    (folder / "dataset/long.txt").write_text(text[800:2000])
    common = [*STILL, "--checkpoint_interval", 3, "--eval_lanes", 1, "--fractal_depths", "[[],[1,2],[]]",
              "--fractal_dims", "[[],[8,16],[]]", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(ROOT / "train.py")]
    env, outs, logged = os.environ | {"OMP_NUM_THREADS": "1"}, [], []

    def first_metrics(checkpoint_dir):
        return json.loads((folder / checkpoint_dir / "metrics.jsonl").read_text().splitlines()[0])

    def two_processes(*flags):
        done = subprocess.run([*torchrun, *TINY, *map(str, flags)], capture_output=True, text=True, env=env,
                              timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        outs.append(done.stdout)
        logged.append(first_metrics("checkpoints"))

    two, out = assert_resume_is_exact(folder, 6, *common, start=two_processes), outs[0]
    assert out.count("best_model.pt") == 1  # one process speaks
    assert ("sharded over 2 processes" in out) == bool(flags)
    assert "train on:  uv run torchrun --nproc_per_node=2 train.py" in out and "--init_from resume" in out
    alone = run(*common, "--max_iters", 6, "--batch_size", 4, "--checkpoint_dir", "one")
    assert ("note: fsdp: one process" in capsys.readouterr().out) == bool(flags)
    loaders = [train.DataLoader(alone.loader.tokens, 2, 16, 256, rank=rank, world_size=2) for rank in range(2)]
    targets = sorted(sum((loader.next_batch()[1] >= 0).sum() for _ in range(6)) for loader in loaders)
    assert 1.2 * targets[0] < targets[1]
    one = train.load_checkpoint(folder / "one/checkpoint_step_000006.pt")
    assert len(two["rng"]) == len(two["state"]) == 2 and two["tokens"] == one["tokens"]
    assert not torch.equal(*(rng["cpu"] for rng in two["rng"]))  # noise of its own
    for key in ("train_loss", "grad_norm", "tokens"):
        assert logged[0][key] == pytest.approx(first_metrics("one")[key], rel=0.02)
    for name, p in one["model"].items():
        if flags and p.ndim == 2:  # Muon makes much of rounding where a gradient has no full rank
            assert (two["model"][name] - p).norm() < 0.05 * p.norm()
        else:
            torch.testing.assert_close(two["model"][name], p, rtol=2e-3, atol=2e-5)
    assert [[*o["state"]] for o in two["optimizer"]] == [[*o["state"]] for o in one["optimizer"]]
    assert two["best_val_loss"] == pytest.approx(one["best_val_loss"], rel=1e-4)
