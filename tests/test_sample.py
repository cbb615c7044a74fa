"""sample.py against recomputation from scratch, numpy references and float64 sums over the whole sequence."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sample
from model import GPT, GPTConfig
from prepare import Tokenizer
from sample import NOT_FINITE, SampleError, TextStream, generate, load_model, main, next_token

ROOT = Path(__file__).resolve().parent.parent
EOT = 256
MIXERS = ["standard", "mamba", "fractal", ["mamba", "standard", "fractal"]]


def make_model(attention_type, dtype=torch.float64, **keys):
    """A small model whose matrices are large enough for its choices to depend on the whole context."""
    torch.manual_seed(7)
    keys = {"vocab_size": 257, "block_size": 16, "n_layer": 3, "n_embd": 16, "n_head": 2, "tie_weights": False,
            "fractal_count": 2, "fractal_dim_range": [8, 16], **keys}
    model = GPT(GPTConfig(attention_type=attention_type, **keys))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and p.shape[0] > 1:
                p.mul_(0.5 / p.std()) if p.std() > 0 else None
    return model.to(dtype).eval()


def spelling_model(text: bytes, after_last=EOT):
    """A bigram model, by its weights: <|endoftext|> and each byte of text, all different, call for the next one."""
    ring = [EOT, *text]
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_embd=64, ffn_mult=0.0, tie_weights=False))
    with torch.no_grad():
        model.h[0].mixer.c_proj.weight.zero_()
        model.wte.weight[ring] = torch.linalg.qr(torch.randn(64, 64)).Q[:len(ring)]
        model.lm_head.weight.zero_()
        model.lm_head.weight.index_add_(0, torch.tensor([*text, after_last]), 20 * model.wte.weight[ring])
    return model


def save(model, path, /, tokenizer="byte", **changes):
    torch.save({"format": 1, "model": model.state_dict(), "model_args": model.config.model_dump(), "optimizer": [],
                "step": 500, "tokens": 10**6, "rng": [], "loader": {}, "state": [], "config": {},
                "tokenizer": tokenizer, "best_val_loss": 1.5, **changes}, path)
    return str(path)


def prompt_of(T, B=1, seed=0):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


def tokens_of(*args, **keys):
    return torch.stack(list(generate(*args, **keys)), dim=1).tolist()  # (B, T)


def greedy_from_scratch(model, idx, n, repetition_penalty=1.0):
    """idx (1, T): the whole sequence, or the learned table's reach of it, again for every token."""
    crop = model.config.block_size if model.config.position == "learned" else idx.shape[1] + n
    with torch.no_grad():
        for _ in range(n):
            logits = model(idx[:, -crop:])[0][0, -1]
            for i in set(idx[0].tolist()) if repetition_penalty != 1 else ():
                logits[i] = logits[i] / repetition_penalty if logits[i] > 0 else logits[i] * repetition_penalty
            idx = torch.cat((idx, logits.argmax().view(1, 1)), dim=1)
    return idx[:, -n:].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# generate


@pytest.mark.parametrize("attention_type", MIXERS, ids=str)
@pytest.mark.parametrize("T", [1, 530], ids=["one token", "longer than what is fed at once"])
def test_generate_is_recomputing(attention_type, T):
    model, idx = make_model(attention_type), prompt_of(T)
    expected = greedy_from_scratch(model, idx, 24)
    assert len(set(expected[0])) > 8  # a model that repeats itself would prove little
    assert tokens_of(model, idx, 24, temperature=0) == expected


@pytest.mark.parametrize("attention_type", ["standard", ["mamba", "standard", "fractal"]], ids=str)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 45])
def test_learned_positions_are_cropped_as_in_nanogpt(attention_type, T):
    model, idx = make_model(attention_type, position="learned"), prompt_of(T)
    assert tokens_of(model, idx, 24, temperature=0) == greedy_from_scratch(model, idx, 24)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_samples_share_a_prefill(position, monkeypatch):
    model, idx = make_model(["mamba", "standard", "fractal"], position=position), prompt_of(21, B=2)
    first, second = (tokens_of(model, row[None], 12, temperature=0)[0] for row in idx)
    fed, prefill = [], sample.prefill
    monkeypatch.setattr(sample, "prefill", lambda model, idx: fed.append(idx.shape) or prefill(model, idx))
    assert tokens_of(model, idx, 12, temperature=0, num_samples=3) == [first] * 3 + [second] * 3
    assert fed == ([(2, 21)] if position == "rope" else [(2, 16), *[(6, 16)] * 11])  # then the table is full
    rows = tokens_of(model, idx[:1], 12, num_samples=3, generator=torch.Generator().manual_seed(1))
    assert len({tuple(row) for row in rows}) == 3  # draws of their own


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(penalty):
    model, idx = make_model(["mamba", "standard"], n_layer=2, vocab_size=40), prompt_of(9) % 40
    expected = greedy_from_scratch(model, idx, 24, penalty)
    assert expected != greedy_from_scratch(model, idx, 24)
    assert tokens_of(model, idx, 24, temperature=0, repetition_penalty=penalty) == expected


def test_generate_leaves_the_program_as_it_was():
    model, idx = make_model("fractal").train(), prompt_of(3)
    random_numbers = torch.get_rng_state()
    stream = generate(model, idx, 5, generator=torch.Generator().manual_seed(1))
    assert not next(stream).requires_grad and torch.is_grad_enabled()
    stream.close()
    assert model.training and torch.equal(torch.get_rng_state(), random_numbers)
    draws = [tokens_of(model, idx, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert model.training and torch.equal(torch.get_rng_state(), random_numbers)


def test_padded_vocabulary_is_never_drawn():
    model = make_model("standard", vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    keys = {"temperature": 3.0, "generator": torch.Generator().manual_seed(1), "num_samples": 64}
    assert max(map(max, tokens_of(model, prompt_of(2), 4, **keys))) >= 257
    assert max(map(max, tokens_of(model, prompt_of(2), 4, n_vocab=257, **keys))) < 257


def test_time_per_token_is_flat():
    model = make_model(["mamba", "standard"], dtype=torch.float32, n_layer=2)
    streams = [generate(model, prompt_of(4), 1000) for _ in range(2)]
    seconds = [[], []]
    for _ in range(600):
        next(streams[1])
    for _ in range(100):  # in turns, so that a busy machine slows both
        for stream, times in zip(streams, seconds):
            start = time.thread_time()
            next(stream)
            times.append(time.thread_time() - start)
    assert np.median(seconds[1]) < 1.3 * np.median(seconds[0])


# ---------------------------------------------------------------------------------------------------------------------
# Filters


def reference_probabilities(logits, temperature, top_k, top_p, min_p):
    """The distribution after temperature, top-k, top-p and min-p by their definitions, token by token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    p = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    p = {i: x / sum(p.values()) for i, x in p.items()}
    if top_p is not None:
        kept, mass = {}, 0.0
        for i in order:
            if mass < top_p:
                kept[i] = p[i]
            mass += p[i]
            assume(abs(mass - top_p) > 1e-9)  # where rounding would decide
        p = kept
    if min_p is not None:
        p = {i: x for i, x in p.items() if x >= min_p * max(p.values()) * (1 - 1e-12)}
    return {i: x / sum(p.values()) for i, x in p.items()}


filters = st.fixed_dictionaries({
    "temperature": st.floats(0.3, 3), "top_k": st.none() | st.integers(1, 12),
    "top_p": st.none() | st.floats(0.01, 0.999), "min_p": st.none() | st.floats(0.01, 1)})
distinct_logits = st.lists(st.integers(-300, 300), min_size=10, max_size=10, unique=True).map(
    lambda xs: [x / 100 for x in xs])


@given(distinct_logits, filters)
@settings(max_examples=60, deadline=None)
def test_draws_follow_the_filtered_distribution(logits, keys):
    expected, n = reference_probabilities(logits, **keys), 40_000
    rows = torch.tensor(logits, dtype=torch.float64).expand(n, -1)
    token = next_token(rows, **keys, generator=torch.Generator().manual_seed(1))
    frequency = np.bincount(token[:, 0].numpy(), minlength=10) / n
    for i, f in enumerate(frequency):
        p = expected.get(i, 0.0)
        assert abs(f - p) <= 6 * math.sqrt(p * (1 - p) / n) + 2 / n * (p > 0)  # 0 where p is 0


@given(distinct_logits, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_filters_at_their_edges(logits, seed):
    rows = torch.tensor(logits, dtype=torch.float64).expand(64, -1)

    def draw(**keys):
        return next_token(rows, generator=torch.Generator().manual_seed(seed), **keys)

    best, free = rows.argmax(-1, keepdim=True), draw()
    for off in ({"top_k": 10}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert torch.equal(draw(**off), free)
    for strict in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5},
                   {"temperature": 1e-308}):
        assert torch.equal(draw(**strict), best)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def stream_of(data: bytes, stop=None, end=True):
    """What a stream of byte tokens shows after each of them."""
    stream, pieces = TextStream(Tokenizer(), stop), []
    for token in [*data, *[EOT] * end]:
        pieces.append(stream.push(token))
        if stream.done:
            break
    return [*pieces, stream.held]


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_stream_is_the_text(data):
    assert "".join(stream_of(data)) == data.decode("utf-8", "replace")


def test_characters_appear_whole_and_at_once():
    assert stream_of("aé☃😀".encode(), end=False) == ["a", "", "é", "", "", "☃", "", "", "", "😀", ""]
    assert stream_of("a☃".encode()[:-1], end=False) == ["a", "", "", ""]  # cut by the limit, not wrong
    assert stream_of(b"a\xffb\xe2") == ["a", "\ufffd", "b", "", "\ufffd", ""]


texts = st.text(alphabet="abé", max_size=24)


@given(texts, st.text(alphabet="abé", min_size=1, max_size=5), st.booleans())
def test_stop_text(text, stop, end):
    pieces = stream_of(text.encode(), stop, end)
    assert "".join(pieces) == text.split(stop)[0]
    shown = ""
    for piece in pieces[:-1]:  # what is shown is all that is sure: with nothing more it would stand, with stop it ends
        shown += piece
        assert text.split(stop)[0].startswith(shown)


def test_only_what_may_be_the_stop_text_is_held():
    assert stream_of(b"xabaabc", "abc", end=False) == ["x", "", "", "ab", "a", "", "", ""]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def run(capsys, *argv):
    """stdout and stderr of a run that succeeds"""
    main(["--device", "cpu", *map(str, argv)])
    return capsys.readouterr()


def error_of(capsys, *argv):
    """the one line of a run that fails"""
    with pytest.raises(SystemExit) as exit:
        main(["--device", "cpu", *map(str, argv)])
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert exit.value.code == 2 and out == "" and line.startswith("error: ")
    lines = [line for line in err.splitlines() if line.strip() and "B/s]" not in line]  # a slow machine shows a bar
    assert len(lines) <= 2 and "Traceback" not in err  # the model's line may stand above
    return line


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    return save(spelling_model("abéc☃ z".encode()), tmp_path_factory.mktemp("speller") / "m.pt")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    model = make_model(["mamba", "standard", "fractal"], torch.float32, n_embd=[24, 16, 24], n_layer=None, n_head=None)
    return save(model, tmp_path_factory.mktemp("hybrid") / "m.pt")


def test_text_goes_to_stdout_and_the_rest_to_stderr(capsys, speller, tmp_path):
    out, err = run(capsys, "--model_path", speller)
    assert out == "abéc☃ z\n"  # an empty prompt starts a document, <|endoftext|> ends it
    assert "step 500" in err and "1.5" in err and "11 new" in err
    assert run(capsys, "--model_path", speller, "--prompt", "ab").out == "éc☃ z\n"
    assert run(capsys, "--model_path", speller, "--max_new_tokens", 3).out == "ab\n"  # the third is half an é
    (tmp_path / "f").write_bytes("x\xffb".encode("latin-1") + "é".encode())
    assert run(capsys, "--model_path", speller, "--input_file", tmp_path / "f").out == "c☃ z\n"


@pytest.mark.parametrize("stop, shown", [("c", "abé"), ("éc", "ab"), ("☃ z", "abéc"), ("q", "abéc☃ z"),
                                         ("zz", "abéc☃ z")])
def test_stop_flag(capsys, speller, stop, shown):
    assert run(capsys, "--model_path", speller, "--stop", stop).out == shown + "\n"


def test_several_samples(capsys, speller):
    out = run(capsys, "--model_path", speller, "--num_samples", 2, "--stop", " ").out
    assert out == "--- sample 1 of 2\nabéc☃\n--- sample 2 of 2\nabéc☃\n"

    flags = ["--num_samples", 3, "--temperature", 30, "--max_new_tokens", 200, "--seed", 0]
    out = run(capsys, "--model_path", speller, *flags).out
    model, generator = load_model(speller, torch.device("cpu"))[0], torch.Generator().manual_seed(0)
    rows = tokens_of(model, torch.tensor([[EOT]]), 200, 30.0, generator=generator, num_samples=3)
    texts = [bytes(row[:row.index(EOT)] if EOT in row else row).decode("utf-8", "replace") for row in rows]
    assert len(set(map(len, texts))) > 1  # each ends where it ends
    assert out == "".join(f"--- sample {i} of 3\n{text}\n" for i, text in enumerate(texts, 1))


def test_seed(capsys, hybrid):
    draws = [run(capsys, "--model_path", hybrid, "--max_new_tokens", 20, *seed).out
             for seed in (("--seed", 3), ("--seed", 3), ("--seed", 4), ())]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_flags_reach_the_sampler(capsys, hybrid):
    model, _ = load_model(hybrid, torch.device("cpu"))
    idx = torch.tensor([[EOT, *b"To be"]])
    for keys in ({"top_k": 1}, {"top_k": 3, "temperature": 2.0}, {"top_p": 0.5, "repetition_penalty": 2.0},
                 {"min_p": 0.9, "temperature": 0.5}):
        flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
        out = run(capsys, "--model_path", hybrid, "--prompt", "To be", "--max_new_tokens", 30, "--seed", 5, *flags).out
        stream, expected, keys = TextStream(Tokenizer()), "", {"temperature": 0.8, **keys}
        for token in generate(model, idx, 30, **keys, generator=torch.Generator().manual_seed(5)):
            expected += "" if stream.done else stream.push(token.item())
        assert out == expected + "\n"


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(1, 5), st.integers(0, 1))
def test_blocks_of_a_document_do_not_depend_on_how_it_is_read(pieces, T, ahead):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "text_chunks", lambda *_: pieces)
        blocks = [ids.tolist() for ids in sample.document_blocks(None, Tokenizer(), T, ahead)]
    document = [EOT, *b"".join(pieces)]
    assert blocks == [document[i:i + T + ahead] for i in range(0, len(document) - ahead, T)]


def score_of(capsys, *argv):
    return {key: float(value) for key, value in map(str.split, run(capsys, *argv).out.splitlines())}


def nats_from_scratch(model, ids):
    """Summed -log p of ids, each given <|endoftext|> and all before it, in float64, from one call."""
    with torch.no_grad():
        logp = model.double()(torch.tensor([[EOT, *ids[:-1]]]))[0][0].log_softmax(-1)
    return -logp[range(len(ids)), ids].sum().item()


@pytest.mark.parametrize("size", [1, 511, 512, 1333])
def test_score(capsys, hybrid, tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "f").write_bytes(data)
    got = score_of(capsys, "--model_path", hybrid, "--score", tmp_path / "f")
    nats = nats_from_scratch(load_model(hybrid, "cpu")[0], list(data))
    assert got["bytes"] == got["tokens"] == size
    assert got["nats/token"] == pytest.approx(nats / size, rel=2e-6)
    assert got["bits/byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-6)


def test_score_with_learned_positions_starts_each_block_afresh(capsys, tmp_path):
    model = make_model("standard", torch.float32, position="learned")
    data = np.random.default_rng(0).bytes(75)
    (tmp_path / "f").write_bytes(data)
    got = score_of(capsys, "--model_path", save(model, tmp_path / "m.pt"), "--score", tmp_path / "f")
    ids, nats = torch.tensor([EOT, *data]), 0.0
    for i in range(0, 75, 16):
        x, y = ids[i:i + 16][:75 - i], ids[i + 1:i + 17]
        nats -= model.double()(x[None])[0][0].log_softmax(-1)[range(len(y)), y].sum().item()
    assert got["nats/token"] == pytest.approx(nats / 75, rel=2e-6)


def test_bpe(capsys, gpt2_cache, tmp_path):
    model = make_model(["mamba", "standard"], torch.float32, n_layer=2, vocab_size=50257, tie_weights=True)
    path, tokenizer = save(model, tmp_path / "m.pt", tokenizer="gpt2"), Tokenizer("gpt2")
    text = "The naïve café ☃ stands\n\n  where it stood; <|endoftext|> is text here. " * 40
    (tmp_path / "f").write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text).tolist()
    with torch.no_grad():
        logp = model.double()(torch.tensor([[tokenizer.eot, *ids[:-1]]]))[0][0].log_softmax(-1)
    nats, size = -logp[range(len(ids)), ids].sum().item(), len(text.encode())
    got = score_of(capsys, "--model_path", path, "--score", tmp_path / "f")
    assert (got["bytes"], got["tokens"]) == (size, len(ids)) and len(ids) > 600
    assert got["bits/byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-6)

    expected = greedy_from_scratch(model, torch.tensor([[tokenizer.eot, *ids[:9]]]), 8)[0]
    prompt = tokenizer.decode(ids[:9])
    out = run(capsys, "--model_path", path, "--prompt", prompt, "--max_new_tokens", 8, "--temperature", 0).out
    assert out == tokenizer.decode(expected) + "\n"

    (tmp_path / "g").write_bytes(b"good so far \xff")
    for flag in ("--score", "--input_file"):
        assert "byte 12" in error_of(capsys, "--model_path", path, flag, tmp_path / "g")
    assert "byte 2" in error_of(capsys, "--model_path", path, "--prompt", "ab\udcff")  # as the shell hands it over


@pytest.mark.parametrize("size", [0, 1, 511, 1300])
def test_encode(capsys, hybrid, tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "f").write_bytes(data)
    run(capsys, "--model_path", hybrid, "--encode", tmp_path / "f", "--output", tmp_path / "f.npy")
    got = np.load(tmp_path / "f.npy", mmap_mode="r")
    with torch.no_grad():
        whole, _ = load_model(hybrid, "cpu")[0].double().encode(torch.tensor([[EOT, *data]]))
    assert got.shape == (size, 16) and got.dtype == np.float32
    np.testing.assert_allclose(got, whole[0, 1:], rtol=0, atol=1e-5 * whole.abs().max())
    assert sorted(os.listdir(tmp_path)) == ["f", "f.npy"]


def test_encode_that_fails_leaves_the_old_file(capsys, hybrid, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(2000))
    (tmp_path / "f.npy").write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "publish", fail)
    error = error_of(capsys, "--model_path", hybrid, "--encode", tmp_path / "f", "--output", tmp_path / "f.npy")
    assert "f.npy cannot be written: No space" in error and (tmp_path / "f.npy").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["f", "f.npy"]


def test_encode_writes_over_nothing_it_reads(capsys, hybrid, tmp_path):
    (tmp_path / "f").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    before = Path(hybrid).read_bytes()
    job = ("--model_path", hybrid, "--encode", tmp_path / "f")
    for output in (tmp_path / "f", tmp_path / "link", hybrid, tmp_path):
        assert "another name" in error_of(capsys, *job, "--output", output)
    assert (tmp_path / "f").read_bytes() == b"text" and Path(hybrid).read_bytes() == before


def test_fractal_levels(capsys, hybrid, speller, tmp_path):
    data = np.random.default_rng(0).bytes(600)
    (tmp_path / "f").write_bytes(data)
    model, _ = load_model(hybrid, "cpu")
    scores, texts = [], []
    for levels in (1, 2, None):
        model.set_fractal_levels(levels)
        scores.append(nats_from_scratch(model, list(data)) / 600)
        flags = [] if levels is None else ["--fractal_levels", levels]
        got = score_of(capsys, "--model_path", hybrid, "--score", tmp_path / "f", *flags)
        assert got["nats/token"] == pytest.approx(scores[-1], rel=2e-6)
        texts.append(run(capsys, "--model_path", hybrid, "--seed", 0, *flags).out)
    assert scores[0] != scores[1] and texts[0] != texts[1]
    assert "fractal" in error_of(capsys, "--model_path", speller, "--fractal_levels", 1)


def test_dtype(capsys, hybrid, tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(200)))
    full, half = (score_of(capsys, "--model_path", hybrid, "--score", tmp_path / "f", "--dtype", dtype)["nats/token"]
                  for dtype in ("float32", "bfloat16"))
    assert full != half and full == pytest.approx(half, rel=0.03)


@pytest.mark.parametrize("flags, said", [
    ("--temperature -1", "0 or more"), ("--temperature nan", "0 or more"), ("--top_k 0", "at least 1"),
    ("--top_p 0", "at most 1"), ("--top_p 1.01", "at most 1"), ("--min_p 2", "from 0 to 1"), ("--seed -1", "from 0 to"),
    ("--repetition_penalty 0", "0.01 to 100"), ("--max_new_tokens 1.5", "whole number"), ("--num_samples x", "whole"),
    ("--fractal_levels 0", "at least 1"), ("--topk 3", "--top_k"), ("--dtype int8", "bfloat16"), ("extra", "extra"),
    ("--prompt a --score b", "not allowed with"), ("--stop=", "--stop"),
    ("--stop \udcff", "UTF-8"), ("--num_samples 1000000000", "10000"), ("--encode a", "--output"),
    ("--output a.npy", "--encode"), ("--encode a --output no/such/a.npy", "no folder no/such"),
    ("--score a --top_k 3", "--top_k"), ("--encode a --output b --seed 1", "--seed"), ("--device gpu", "--device cpu")])
def test_wrong_flags(capsys, flags, said):
    assert said in error_of(capsys, *flags.split())


def test_cuda_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:1"):
        error = error_of(capsys, "--device", name, "--model_path", "nothing/is/loaded.pt")
        assert name in error and "auto" in error and "--device cpu" in error


def test_missing_checkpoint_names_the_newest(capsys, hybrid, tmp_path):
    assert "uv run train.py" in error_of(capsys, "--model_path", tmp_path / "best_model.pt")
    assert "uv run train.py" in error_of(capsys, "--model_path", tmp_path / "no" / "folder" / "best_model.pt")
    for age, step in enumerate((500, 1500, 1000, 2000)):
        path = tmp_path / f"checkpoint_step_{step:06d}.pt"
        path.touch()
        os.utime(path, (age, age))
    for missing in (tmp_path / "best_model.pt", tmp_path):
        error = error_of(capsys, "--model_path", missing)
        places = [error.find(f"checkpoint_step_{step:06d}.pt") for step in (2000, 1000, 1500)]
        assert -1 < places[0] < places[1] < places[2] and "000500" not in error


def test_bad_checkpoints(hybrid, tmp_path):
    good, path = Path(hybrid).read_bytes(), tmp_path / "m.pt"
    middle = len(good) // 2
    for damaged in (b"", b"not a checkpoint", good[:-1], good[:middle],
                    good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]):
        path.write_bytes(damaged)
        with pytest.raises(SampleError, match="damaged"):
            load_model(path, "cpu")
    torch.save([1, 2], path)
    with pytest.raises(SampleError, match="not a checkpoint"):
        load_model(path, "cpu")
    model = make_model("mamba", torch.float32)
    save(model, path, format=2)
    with pytest.raises(SampleError, match="format 2"):
        load_model(path, "cpu")
    for changes in ({"model": {}}, {"model_args": {"n_embd": 8, "vocab_size": 257}}, {"model_args": {"colour": "red"}}):
        save(model, path, **changes)
        with pytest.raises(SampleError, match="does not fit") as error:
            load_model(path, "cpu")
        assert "\n" not in str(error.value)


def test_unusable_models_and_files(capsys, hybrid, tmp_path):
    model = make_model("mamba", torch.float32)
    model.wte.weight.data[:, 0] = math.nan
    broken, output = save(model, tmp_path / "m.pt"), tmp_path / "f.npy"
    (tmp_path / "f").write_bytes(b"text")
    for job in ((), ("--score", tmp_path / "f"), ("--encode", tmp_path / "f", "--output", output)):
        assert "not finite" in error_of(capsys, "--model_path", broken, *job)
    assert not output.exists()
    model.wte.weight.data[:200], model.wte.weight.data[200:] = math.nan, 0  # what comes after is, not the prompt
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--model_path", str(save(model, broken)), "--max_new_tokens", "99", "--seed", "1"])
    said = capsys.readouterr()
    assert said.out and said.err.endswith(f"error: {NOT_FINITE}\n")
    (tmp_path / "empty").touch()
    assert "empty" in error_of(capsys, "--model_path", hybrid, "--score", tmp_path / "empty")
    for flag in ("--score", "--input_file"):
        assert "no-file" in error_of(capsys, "--model_path", hybrid, flag, tmp_path / "no-file")
        assert str(tmp_path) in error_of(capsys, "--model_path", hybrid, flag, tmp_path)


@pytest.mark.parametrize("how", ["closed pipe", "Ctrl-C", "Ctrl-C, two samples"])
def test_the_reader_may_leave(tmp_path, how):
    endless = save(spelling_model("abé☃".encode(), after_last=ord("a")), tmp_path / "m.pt")
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--model_path", endless, "--max_new_tokens",
               str(10**9)]
    command += ["--num_samples", "2"] * ("two" in how)
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen(  # a shell that runs the tests in the background leaves them Ctrl-C ignored
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        text = "abé☃" * 10  # UTF-8, whatever the locale
        if "two" in how:
            assert b"seed" in process.stderr.readline()
            time.sleep(2)  # nothing is shown before the end
        else:
            assert process.stdout.read(len(text.encode())) == text.encode()
        if how == "closed pipe":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == (0 if how == "closed pipe" else 130)
        assert len(process.stderr.read().splitlines()) == (0 if "two" in how else 1)  # the model
        if "two" in how:
            shown = process.stdout.read().decode()
            assert all(f"--- sample {i} of 2\n{text}" in shown for i in (1, 2))
    finally:
        process.kill()
