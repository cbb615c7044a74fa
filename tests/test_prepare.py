import hashlib
import http.server
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import prepare
from prepare import (
    DataError,
    DataLoader,
    Tokenizer,
    eval_blocks,
    eval_lanes,
    load_corpus,
    publish,
    temporary_file,
    text_chunks,
    visible_files,
)

ROOT = Path(prepare.__file__).parent

# Patching CHUNK or building a tokenizer once for all examples is meant.
settings.register_profile("prepare", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("prepare")

# Everything the split patterns tell apart: spaces, line ends, other white space, characters that only Python's \s calls
# space (\x1c), letters of several kinds, contractions, digits, punctuation, and the slash that o200k joins to newlines.
NASTY = " \n\r\t\v\x0b\x1c\x85\u00a0\u3000\u2028/.!'’sSltvérRſ1२aZ中あǅʰ\u0301\U0001f600\x00"
nasty_text = st.text(st.sampled_from(NASTY), max_size=60) | st.text(max_size=60)


def make(folder, files):
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path(folder)


def caches(dataset, tokenizer="byte"):
    return sorted(Path(dataset, ".cache", tokenizer).glob("*.bin"))


def leftovers(dataset):
    return [p for p in Path(dataset).rglob("*.tmp")]


@pytest.fixture(scope="module")
def gpt2(gpt2_cache):
    return Tokenizer("gpt2")


@pytest.fixture
def byte():
    return Tokenizer("byte")


# ---------------------------------------------------------------------------------------------- tokenizer


@given(st.binary())
def test_byte_tokenizer_round_trips_all_bytes(data):
    t = Tokenizer("byte")
    ids = t.encode(data)
    assert ids.tolist() == list(data)
    assert t.decode_bytes(ids) == data
    assert t.decode(torch.from_numpy(ids.astype(np.int64))) == data.decode("utf-8", errors="replace")


@given(nasty_text)
def test_byte_tokenizer_reads_text_as_utf8(text):
    t = Tokenizer("byte")
    assert t.decode_bytes(t.encode(text)) == text.encode() and t.decode(t.encode(text)) == text


def test_byte_tokenizer_constants(byte):
    assert (byte.name, byte.n_vocab, byte.eot) == ("byte", 257, 256)
    assert byte.decode_bytes([72, 256, 105]) == b"Hi"
    assert byte.token_bytes.tolist() == [1] * 256 + [0] and byte.token_bytes.dtype == np.int64
    assert byte.encode("\udcff").tolist() == [255]  # how Python hands over the argument byte 0xff


@given(nasty_text | st.text(max_size=40).map(lambda s: f"{s}<|endoftext|>{s}"))
def test_gpt2_is_tiktokens_encode_ordinary(gpt2, text):
    ids = gpt2.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2.encode(text.encode()).tolist() == ids.tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.token_bytes[ids].sum() == len(text.encode())
    assert gpt2.eot not in ids


def test_gpt2_constants(gpt2):
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.dtype) == ("gpt2", 50257, 50256, np.uint16)
    assert gpt2.decode_bytes([gpt2.eot, *gpt2.encode("a"), gpt2.eot]) == b"a"
    assert gpt2.token_bytes[gpt2.eot] == 0 and (gpt2.token_bytes[:-1] > 0).all()
    with pytest.raises(DataError, match=r"byte 2 is not valid UTF-8.*--tokenizer byte"):
        gpt2.encode(b"ab\xff")


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(DataError, match=r"unknown tokenizer 'gtp2': did you mean 'gpt2'.*byte.*o200k_base"):
        Tokenizer("gtp2")


def test_vocabulary_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there: the network is down
    with pytest.raises(DataError, match=r"'cl100k_base'.*TIKTOKEN_CACHE_DIR.*--tokenizer byte") as e:
        Tokenizer("cl100k_base")
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------- cutting documents


PATTERNS = ["gpt2", "cl100k_base", "o200k_base"]  # all there are in SAFE_CUTS, see the first test


@pytest.fixture(scope="module")
def encodings(gpt2):
    """Each encoding's split pattern over GPT-2's merges: the pattern alone decides where a cut is safe."""
    ranks = {token: i for i, token in enumerate(gpt2._vocab[:-1])}
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
        for name in prepare.SAFE_CUTS:
            pattern = getattr(openai_public, name)()["pat_str"]
            made[name] = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return made


def test_all_patterns_are_tested(encodings):
    tested = {(encodings[name]._pat_str, prepare.SAFE_CUTS[name]) for name in PATTERNS}
    assert {(encodings[name]._pat_str, cut) for name, cut in prepare.SAFE_CUTS.items()} == tested


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300)
@given(texts=st.lists(nasty_text, max_size=6))
@example(texts=["a", "\n", "\n", "b"])
@example(texts=["!\n", "/\n", "x"])
@example(texts=["!", "\n\n", "a"])
@example(texts=["!", "\x1c", " ", " ", " a"])
@example(texts=["a \n", " ", "\n中", "a  ", "'s"])
def test_pieces_encode_to_the_whole(encodings, name, texts):
    encoding, whole = encodings[name], "".join(texts)
    pieces = list(prepare.cut_safely(iter(texts), prepare.SAFE_CUTS[name]))
    assert "".join(pieces) == whole
    assert [i for piece in pieces for i in encoding.encode_ordinary(piece)] == encoding.encode_ordinary(whole)
    # Stricter, as merges need not show it: the matches are the same, by the engine of tiktoken's reference encoder.
    assert [m for piece in pieces for m in regex.findall(encoding._pat_str, piece)] == regex.findall(
        encoding._pat_str, whole
    )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("text", ["It was the best of times, it was the worst.\n" * 50, "天地玄黄，宇宙洪荒。\n" * 100])
def test_prose_in_any_script_is_cut(name, text):
    blocks = [text[i : i + 50] for i in range(0, len(text), 50)]
    pieces = list(prepare.cut_safely(iter(blocks), prepare.SAFE_CUTS[name]))
    assert len(pieces) > len(blocks) // 2 and max(map(len, pieces)) < 200


def test_without_a_rule_a_document_is_one_piece():
    assert list(prepare.cut_safely(iter(["a b", " c"]), None)) == ["a b c"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 1 << 20])
def test_file_in_chunks_is_the_file(gpt2, byte, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    text = "Ça va?  It's 100 €\r\n\r\n中文。\n\n😀😀 <|endoftext|> the end"
    path = tmp_path / "f"
    path.write_bytes(text.encode())
    for t in (gpt2, byte):
        ids = np.concatenate([t.encode(c) for c in text_chunks(path, t)])
        assert ids.tolist() == t.encode(text).tolist()


@given(st.lists(st.sampled_from([b"a", "é".encode(), "中".encode(), "😀".encode(), b"\xff", b"\xe4\xb8", b"\xf0\x9f"])))
def test_invalid_utf8_names_file_and_offset(gpt2, tmp_path, monkeypatch, parts):
    monkeypatch.setattr(prepare, "CHUNK", 3)
    path, data = tmp_path / "f", b"".join(parts)
    path.write_bytes(data)
    try:
        data.decode()
    except UnicodeDecodeError as e:
        with pytest.raises(DataError, match=rf"f: byte {e.start} is not valid UTF-8.*--tokenizer byte"):
            list(text_chunks(path, gpt2))
    else:
        assert "".join(text_chunks(path, gpt2)).encode() == data


# ---------------------------------------------------------------------------------------------- files


def test_a_full_disk_keeps_no_temporary_file(tmp_path):
    """What is held back until the file is closed fails once more there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError), temporary_file(tmp_path) as f:
            f.write(bytes(2000))
            publish(f, tmp_path / "whole")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_visible_files(tmp_path):
    names = ["b.txt", "a/z", "a.txt", "a/ü/ß", ".hidden", ".cache/x", "a/.git/y", "Z"]
    make(tmp_path, dict.fromkeys(names, b""))
    expected = sorted(tmp_path / name for name in ("b.txt", "a/z", "a.txt", "a/ü/ß", "Z"))
    assert visible_files(tmp_path) == expected
    assert visible_files(tmp_path / "nowhere") == []
    with pytest.raises(DataError, match=r"b\.txt is a file.*folder"):
        visible_files(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "a/pipe")
    with pytest.raises(DataError, match=r"pipe is no file with text"):
        visible_files(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path, byte):
    books = make(tmp_path / "books", {"b": b"text"})
    dataset = make(tmp_path / "dataset", {"a": b"more"})
    (dataset / "books").symlink_to(books)
    (books / "circle").symlink_to(dataset)
    (dataset / "circle").symlink_to(dataset)
    assert visible_files(dataset) == [dataset / "a", dataset / "books" / "b"]
    (dataset / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read .*broken: No such file"):
        load_corpus(dataset, byte, progress=False)


FILES = {
    "b.txt": b"no newline at the end",
    "a/ünï/中.txt": "naïve 中文\n".encode(),
    "a/empty": b"",
    "special.txt": b"a<|endoftext|>b",
    ".ignored": b"never read",
}


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_the_stream_is_each_document_after_endoftext(tmp_path, gpt2_cache, name):
    t = Tokenizer(name)
    corpus = load_corpus(make(tmp_path, FILES), t, progress=False)
    texts = [FILES[n] for n in ("a/empty", "a/ünï/中.txt", "b.txt", "special.txt")]
    assert corpus.tokens.tolist() == [i for text in texts for i in [t.eot, *t.encode(text).tolist()]]
    assert (corpus.tokens == t.eot).sum() == len(texts)
    assert corpus.files == visible_files(tmp_path) and not corpus.is_default
    assert corpus.n_bytes == sum(map(len, texts)) == t.token_bytes[corpus.tokens].sum()
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == t.dtype


def test_binary_files(tmp_path, byte, gpt2):
    data = bytes(range(256)) * 3
    dataset = make(tmp_path, {"data.bin": data})
    assert load_corpus(dataset, byte, progress=False).tokens[1:].tolist() == list(data)
    with pytest.raises(DataError, match=r"data\.bin: byte 128 is not valid UTF-8"):
        load_corpus(dataset, gpt2, progress=False)
    assert not caches(dataset, "gpt2") and not leftovers(dataset)


def test_an_empty_document_is_a_corpus_of_one_token(tmp_path, byte):
    corpus = load_corpus(make(tmp_path, {"a": b""}), byte, progress=False)
    assert corpus.tokens.tolist() == [256] and corpus.n_bytes == 0


def test_the_split_is_nanogpts(tmp_path, byte):
    corpus = load_corpus(make(tmp_path, {"a": b"x" * 1114}), byte, progress=False)
    train, val = corpus.split(0.1)
    assert len(train) == int(1115 * 0.9) and train.tolist() + val.tolist() == corpus.tokens.tolist()
    assert [len(part) for part in corpus.split(0.0)] == [1115, 0]


def test_memory_does_not_grow_with_the_corpus(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2)
    dataset = make(tmp_path, {"a": b"0123456789abcde\n" * (1 << 22)})  # 64 MB of text, 128 MB of tokens
    tracemalloc.start()
    try:
        corpus = load_corpus(dataset, byte, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus.tokens) == 1 + (1 << 26)
    assert peak < 24 * prepare.CHUNK  # two chunks a thread wait, as text or as twice as many bytes of tokens


# ---------------------------------------------------------------------------------------------- cache


def test_nothing_is_encoded_or_read_again(tmp_path, byte, monkeypatch):
    dataset = make(tmp_path, FILES)
    first = load_corpus(dataset, byte, progress=False)
    written = caches(dataset)[0].stat()
    monkeypatch.setattr(prepare, "text_chunks", None)
    again = load_corpus(dataset, byte, progress=False)  # too fresh for the index: hashed, not encoded
    monkeypatch.setattr(prepare, "RACY_NS", -(10**12))  # as if the files were old
    monkeypatch.setattr(hashlib, "file_digest", None)
    third = load_corpus(dataset, byte, progress=False)  # neither
    assert first.tokens.tolist() == again.tokens.tolist() == third.tokens.tolist()
    assert first.fingerprint == again.fingerprint == third.fingerprint
    assert first.n_bytes == again.n_bytes == third.n_bytes
    assert caches(dataset)[0].stat().st_mtime_ns == written.st_mtime_ns and len(caches(dataset)) == 1


def same_size_and_mtime(dataset):
    path = dataset / "b.txt"
    s = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))


CHANGES = {
    "same size and mtime": same_size_and_mtime,
    "longer": lambda d: (d / "b.txt").write_bytes(b"another text, and longer"),
    "renamed, same order": lambda d: (d / "b.txt").rename(d / "c.txt"),
    "renamed, other order": lambda d: (d / "b.txt").rename(d / "z.txt"),
    "removed": lambda d: (d / "b.txt").unlink(),
    "added": lambda d: (d / "new").write_bytes(b""),
    "swapped": lambda d: (
        (d / "b.txt").rename(d / ".x"),
        (d / "special.txt").rename(d / "b.txt"),
        (d / ".x").rename(d / "special.txt"),
    ),
}


@pytest.mark.parametrize("trust", ["fresh", "old"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_notices(tmp_path, byte, gpt2, monkeypatch, change, trust):
    dataset = make(tmp_path / "d", FILES)
    if trust == "old":  # the index believes all it may: sizes, mtime and ctime
        monkeypatch.setattr(prepare, "RACY_NS", -(10**12))
    before = load_corpus(dataset, byte, progress=False)
    load_corpus(dataset, gpt2, progress=False)
    CHANGES[change](dataset)
    after = load_corpus(dataset, byte, progress=False)
    expected = [i for path in visible_files(dataset) for i in [256, *path.read_bytes()]]
    assert after.tokens.tolist() == expected
    assert after.fingerprint != before.fingerprint
    assert [path.stem for path in caches(dataset)] == [after.fingerprint]  # the old one is gone
    assert len(caches(dataset, "gpt2")) == 1  # the other tokenizer's is not ours to judge


def test_the_cache_notices_an_edit_in_the_same_tick_of_the_clock(tmp_path, byte, monkeypatch):
    tick = time.time_ns()
    monkeypatch.setattr(prepare, "_stamp", lambda path: [path.stat().st_size, tick, tick, time.time_ns()])
    dataset = make(tmp_path, {"a": b"one"})
    load_corpus(dataset, byte, progress=False)
    make(tmp_path, {"a": b"two"})
    assert byte.decode(load_corpus(dataset, byte, progress=False).tokens) == "two"


def test_fingerprint_is_of_names_and_contents_alone(tmp_path, byte, gpt2):
    one = load_corpus(make(tmp_path / "one", FILES), byte, progress=False)
    two = load_corpus(make(tmp_path / "two", FILES), gpt2, progress=False)
    assert one.fingerprint == two.fingerprint


def test_a_broken_index_is_no_harm(tmp_path, byte):
    dataset = make(tmp_path, FILES)
    before = load_corpus(dataset, byte, progress=False)
    for broken in (b'{"b.txt": [21', b"[]"):
        (dataset / ".cache" / "index.json").write_bytes(broken)
        assert load_corpus(dataset, byte, progress=False).fingerprint == before.fingerprint


@pytest.mark.parametrize("size", [0, 5, 16, 24, -1])
def test_a_cache_cut_short_is_made_again(tmp_path, byte, size):
    dataset = make(tmp_path, FILES)
    tokens = load_corpus(dataset, byte, progress=False).tokens.tolist()
    (cache,) = caches(dataset)
    os.truncate(cache, size if size >= 0 else cache.stat().st_size - 2)
    assert load_corpus(dataset, byte, progress=False).tokens.tolist() == tokens


KILLED = """
import sys, time, prepare
prepare.CHUNK = 1 << 16
publish = prepare.publish
def hang(f, path):
    f.flush()
    print(f.name, flush=True)
    time.sleep(600)
prepare.publish = hang
prepare.load_corpus(sys.argv[1], prepare.Tokenizer("byte"), progress=False)
"""


def test_a_killed_run_leaves_nothing_that_counts(tmp_path, byte):
    text = os.urandom(1 << 18)
    dataset = make(tmp_path, {"a": text})
    process = subprocess.Popen([sys.executable, "-c", KILLED, dataset], cwd=ROOT, stdout=subprocess.PIPE)
    half = Path(process.stdout.readline().decode().strip())  # written, not yet named
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert half.stat().st_size == 2 * (len(text) + 1) + prepare.KEY_BYTES and not caches(dataset)
    corpus = load_corpus(dataset, byte, progress=False)
    assert corpus.tokens[1:].astype(np.uint8).tobytes() == text
    assert half.exists()  # as far as anyone can tell it may be a live process's
    os.utime(half, (0, time.time() - prepare.STALE_SECONDS - 1))
    load_corpus(dataset, byte, progress=False)
    assert not leftovers(dataset)


def test_an_error_while_encoding_leaves_the_old_cache(tmp_path, byte, monkeypatch):
    dataset = make(tmp_path, {"a": b"old"})
    before = load_corpus(dataset, byte, progress=False)
    (dataset / "a").write_bytes(b"new")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"\.cache \(No space left on device\).*writable"):
        load_corpus(dataset, byte, progress=False)
    assert [path.stem for path in caches(dataset)] == [before.fingerprint] and not leftovers(dataset)


@pytest.mark.parametrize("locks", [True, False])
def test_many_at_once(tmp_path, byte, monkeypatch, locks):
    encoded, encode_files = [], prepare._encode_files
    monkeypatch.setattr(prepare, "_encode_files", lambda *args: encoded.append(1) or encode_files(*args))
    if not locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    dataset = make(tmp_path, {"a": b"text " * 100_000, "b": b"more"})
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: load_corpus(dataset, byte, progress=False), range(12)))
    assert len({corpus.fingerprint for corpus in found}) == 1 == len(caches(dataset))
    assert all((corpus.tokens == found[0].tokens).all() for corpus in found)
    assert not leftovers(dataset)
    assert len(encoded) == 1 or not locks


def test_no_place_for_the_cache(tmp_path, byte):
    dataset = make(tmp_path, {"a": b"text", ".cache": b"in the way"})
    with pytest.raises(DataError, match=r"cannot use the token cache in .*\.cache .*writable.*link") as e:
        load_corpus(dataset, byte, progress=False)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------- default corpus


@pytest.fixture(scope="module")
def default_dataset(tmp_path_factory):
    dataset = tmp_path_factory.mktemp("default") / "dataset"  # not even the folder is there
    load_corpus(dataset, Tokenizer("byte"), progress=False)
    return dataset


def test_default_corpus_is_prose_and_code(default_dataset, byte):
    corpus = load_corpus(default_dataset, byte, progress=False)
    assert corpus.is_default and len(corpus.files) == 10
    assert {path.parent for path in corpus.files} == {default_dataset / ".default"}
    assert 3e6 < corpus.n_bytes < 15e6
    text = byte.decode(corpus.tokens)
    assert "The \"raise\" statement" in text and "def dataclass(" in text and "\ufffd" not in text
    sizes = [path.stat().st_size for path in corpus.files]
    assert max(sizes) < 1.5 * min(sizes)
    assert not leftovers(default_dataset)


def test_default_corpus_is_deterministic(default_dataset, tmp_path):
    again = prepare.default_corpus(tmp_path)
    for path in visible_files(default_dataset / ".default"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_default_corpus_gives_way(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(prepare, "default_corpus", lambda d: make(d / ".default", {"x": b"library"}).joinpath())
    assert load_corpus(tmp_path, byte, progress=False).is_default
    make(tmp_path, {"mine": b"text"})
    corpus = load_corpus(tmp_path, byte, progress=False)
    assert not corpus.is_default and byte.decode(corpus.tokens) == "text"
    (tmp_path / "mine").unlink()
    assert byte.decode(load_corpus(tmp_path, byte, progress=False).tokens) == "library"


def test_no_files_and_no_library(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"no files.*prepare\.py shakespeare"):
        load_corpus(tmp_path / "d", byte, progress=False)


# ---------------------------------------------------------------------------------------------- loader

sizes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))  # B, T, world size


@st.composite
def streams(draw, sequential=None):
    """-> (tokens, eot, keyword arguments of DataLoader without rank), long enough for a step."""
    B, T, world_size = draw(sizes)
    n = draw(st.integers(B * T * world_size + 1, B * T * world_size * 5 + 20))
    eot = 99
    tokens = draw(st.lists(st.sampled_from([1, 2, 3, eot]), min_size=n, max_size=n))
    if sequential is None:
        sequential = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    kwargs = dict(batch_size=B, block_size=T, sequential=sequential, seed=seed, world_size=world_size)
    return np.array(tokens, np.uint16), eot, kwargs


def joined(loaders):
    return [torch.cat(parts) for parts in zip(*(loader.next_batch() for loader in loaders))]


def same(batch, other):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(batch, other))


@given(streams())
def test_loader_laws(stream):
    """A twin over 0, 1, 2, .. with the same seed tells the positions, from which all else follows."""
    tokens, eot, kwargs = stream
    n, T = len(tokens), kwargs["block_size"]
    ranks = [DataLoader(tokens, eot=eot, rank=r, **kwargs) for r in range(kwargs["world_size"])]
    twins = [DataLoader(np.arange(n), eot=-5, rank=r, **kwargs) for r in range(kwargs["world_size"])]
    L = kwargs["batch_size"] * kwargs["world_size"]
    assert ranks[0].steps_per_epoch == max(1, n // L // T)
    for _ in range(3):
        before, seen = None, []
        for t in range(ranks[0].steps_per_epoch):
            x, y, reset = joined(ranks)
            position = joined(twins)[0].numpy()
            assert x.shape == y.shape == reset.shape == position.shape == (L, T)
            assert (x.dtype, y.dtype, reset.dtype) == (torch.int64, torch.int64, torch.bool)
            follows = (position + 1) % n
            assert (position[:, 1:] == follows[:, :-1]).all()  # contiguous, around the circle
            assert (x.numpy() == tokens[position]).all()
            target = np.where((tokens[follows] == eot) | (follows == 0), -1, tokens[follows].astype(int))
            assert (y.numpy() == target).all()
            starts = (tokens[position] == eot) | (position == 0)
            if kwargs["sequential"]:
                starts[:, 0] |= t == 0
                assert before is None or (position[:, 0] == (before + 1) % n).all()  # goes on where it stopped
            else:
                starts[:, 0] = True
                assert (position[:, 1:] > position[:, :-1]).all() and (follows > 0).all()
            assert (reset.numpy() == starts).all()
            before = position[:, -1]
            seen += position.ravel().tolist()
        if kwargs["sequential"]:
            assert len(set(seen)) == len(seen) == ranks[0].steps_per_epoch * L * T  # the lanes do not overlap


@given(streams())
def test_ranks_share_the_batch_of_one_process(stream):
    tokens, eot, kwargs = stream
    ranks = [DataLoader(tokens, eot=eot, rank=r, **kwargs) for r in range(kwargs["world_size"])]
    alone = kwargs | {"batch_size": kwargs["batch_size"] * kwargs["world_size"], "world_size": 1}
    one = DataLoader(tokens, eot=eot, **alone)
    for _ in range(2 * one.steps_per_epoch + 1):
        assert same(joined(ranks), one.next_batch())


@given(streams(), st.integers(0, 30))
def test_resume_is_exact(stream, steps):
    tokens, eot, kwargs = stream
    loader = DataLoader(tokens, eot=eot, **kwargs)
    for _ in range(steps):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))  # plain values only
    resumed = DataLoader(tokens, eot=eot, **kwargs)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == loader.state_dict()
    for _ in range(2 * loader.steps_per_epoch + 1):
        assert same(resumed.next_batch(), loader.next_batch())


@pytest.mark.parametrize("sequential", [True, False])
def test_loader_randomness_is_its_own(sequential):
    tokens = np.arange(1000)

    def batches(seed):
        loader = DataLoader(tokens, 2, 8, eot=-5, sequential=sequential, seed=seed)
        return [loader.next_batch()[0][:, 0].tolist() for _ in range(2 * loader.steps_per_epoch)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = batches(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    assert batches(7) == one != batches(8)
    assert one[: len(one) // 2] != one[len(one) // 2 :]  # each epoch is cut anew


def test_over_epochs_every_token_is_used():
    loader = DataLoader(np.arange(107), 2, 10, eot=-5)  # 7 of 107 are left out of each epoch
    seen = {i for _ in range(40 * loader.steps_per_epoch) for i in loader.next_batch()[0].ravel().tolist()}
    assert seen == set(range(107))


def test_too_little_data():
    with pytest.raises(DataError, match=r"31 tokens.*needs 32 \(batch_size 2, block_size 8, 2 proc.*lower batch_size"):
        DataLoader(np.zeros(31), 2, 8, eot=1, world_size=2)
    assert DataLoader(np.zeros(32), 2, 8, eot=1, world_size=2).steps_per_epoch == 1
    with pytest.raises(DataError, match=r"8 tokens.*needs 9"):
        DataLoader(np.zeros(8), 2, 8, eot=1, sequential=False)
    assert DataLoader(np.zeros(9), 2, 8, eot=1, sequential=False).next_batch()[0].shape == (2, 8)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"block_size": 4}, {"seed": 1}, {"sequential": False}])
def test_a_position_of_another_run_is_refused(change):
    kwargs = dict(batch_size=2, block_size=8, eot=-5)
    state = DataLoader(np.arange(100), **kwargs).state_dict()
    with pytest.raises(DataError, match=r"saved data position has .*, this run"):
        DataLoader(np.arange(100), **kwargs | change).load_state_dict(state)
    with pytest.raises(DataError, match=r"n_tokens 100, this run 101"):
        DataLoader(np.arange(101), **kwargs).load_state_dict(state)


# ---------------------------------------------------------------------------------------------- evaluation


@st.composite
def splits(draw):
    n = draw(st.integers(0, 80))
    eots = draw(st.sets(st.integers(0, 80), max_size=5))
    tokens = np.array([99 if i in eots else i for i in range(n)], np.uint32)
    return tokens, draw(st.integers(1, 6)), draw(st.integers(1, 9))


def checked(batches, rows, T):
    for x, y, reset in batches:
        assert x.shape == y.shape == reset.shape == (rows, T)  # static, so that a compiled model is compiled once
        assert (x.dtype, y.dtype, reset.dtype) == (torch.int64, torch.int64, torch.bool)
        yield x, y, reset


@given(splits())
def test_eval_lanes_cover_each_target_once_in_contiguous_lanes(split):
    tokens, rows, T = split
    batches = list(checked(eval_lanes(tokens, rows, T, eot=99), rows, T))
    if len(tokens) < 2:
        assert batches == []
        return
    x, y, reset = (torch.cat(parts, dim=1).numpy() for parts in zip(*batches))
    length = -(-(len(tokens) - 1) // rows)
    covered = 0
    for i in range(rows):
        a, b = min(i * length, len(tokens) - 1), min((i + 1) * length, len(tokens) - 1)
        assert x[i, : b - a].tolist() == tokens[a:b].tolist()
        assert y[i, : b - a].tolist() == [-1 if k == 99 else k for k in tokens[a + 1 : b + 1].tolist()]
        assert (y[i, b - a :] == -1).all()
        assert reset[i, 0] and (reset[i, 1 : b - a] == (x[i, 1 : b - a] == 99)).all()
        covered += b - a
    assert covered == len(tokens) - 1
    assert len(batches) == -(-length // T)


@given(splits())
def test_eval_blocks_cover_each_target_once_in_blocks(split):
    tokens, rows, T = split
    batches = list(checked(eval_blocks(tokens, rows, T, eot=99), rows, T))
    found = [row for batch in batches for row in zip(*(part.tolist() for part in batch))]
    n_blocks = max(0, -(-(len(tokens) - 1) // T))
    assert len(batches) == -(-n_blocks // rows)
    for k, (x, y, reset) in enumerate(found):
        block = tokens[k * T : k * T + T + 1].tolist() if k < n_blocks else []
        n_targets = max(0, len(block) - 1)
        assert x[:n_targets] == block[:-1]
        assert y == [-1 if token == 99 else token for token in block[1:]] + [-1] * (T - n_targets)
        assert reset[0] and reset[1:n_targets] == [token == 99 for token in x[1:n_targets]]


def test_bits_per_byte_of_a_uniform_model(tmp_path, gpt2):
    """All targets of a split, evaluated either way, stand for all its bytes but those of the first token."""
    text = "It was the best of times, it was the worst of times, 中文.\n" * 20
    tokens = load_corpus(make(tmp_path, {"a": text.encode(), "b": b"x"}), gpt2, progress=False).tokens
    for batches in (eval_lanes(tokens, 3, 16, gpt2.eot), eval_blocks(tokens, 3, 16, gpt2.eot)):
        targets = torch.cat([y[y >= 0] for _, y, _ in batches])
        assert gpt2.token_bytes[targets].sum() == len(text.encode()) + 1
        assert len(targets) == len(tokens) - 2


# ---------------------------------------------------------------------------------------------- downloads

TEXT = b"to be or not to be\n" * 10_000


def zipped(name, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


BROKEN_ZIP = bytearray(zipped("text", TEXT))
BROKEN_ZIP[45:60] = b"\xff" * 15  # inside the compressed data
SENT = {
    "/text": TEXT,
    "/text.zip": zipped("text", TEXT),
    "/wrong": TEXT[:-1] + b"?",
    "/wrong.zip": zipped("text", TEXT[:-1] + b"?"),
    "/other.zip": zipped("something", TEXT),
    "/no.zip": b"<html>please log in</html>",
    "/broken.zip": bytes(BROKEN_ZIP),
    "/cut": TEXT,
    "/cut.zip": zipped("text", TEXT),
}


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(path): prepare.CORPORA["text"] comes from a local server; -> the requests it got so far."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path not in SENT:
                return self.send_error(404)
            body = SENT[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "cut" in self.path else body)

        def log_message(self, *args):
            pass

    def start(path):
        url = f"http://127.0.0.1:{server.server_address[1]}{path}"
        monkeypatch.setattr(prepare, "CORPORA", {"text": (url, "text", hashlib.sha256(TEXT).hexdigest())})
        return requests

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield start
        server.shutdown()
        thread.join()


def everything(folder):
    return [p for p in Path(folder).rglob("*") if p.is_file()]


@pytest.mark.parametrize("path", ["/text", "/text.zip"])
def test_download(serve, tmp_path, capsys, path):
    requests = serve(path)
    target = prepare.download("text", tmp_path / "d")
    assert target == tmp_path / "d" / "text" and target.read_bytes() == TEXT
    assert everything(tmp_path) == [target]
    assert prepare.download("text", tmp_path / "d") == target
    assert requests == [path] and "nothing to download" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/wrong", "sent SHA-256 .*, expected .*nothing was kept"),
        ("/wrong.zip", "sent SHA-256 .*, expected .*nothing was kept"),
        ("/other.zip", "no zip file with text in it"),
        ("/no.zip", "no zip file with text in it"),
        ("/broken.zip", "no zip file with text in it"),
        ("/cut", "cut off after 95,000 of 190,000 bytes"),
        ("/cut.zip", "cut off after"),
        ("/missing", "404"),
    ],
)
def test_failed_download_leaves_nothing(serve, tmp_path, path, message):
    serve(path)
    with pytest.raises(DataError, match=message) as e:
        prepare.download("text", tmp_path)
    assert "\n" not in str(e.value) and everything(tmp_path) == []


def test_download_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "CORPORA", {"text": ("http://127.0.0.1:9/text", "text", "")})
    with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/text .*refused.*check the network"):
        prepare.download("text", tmp_path)


def test_download_does_not_touch_a_file_of_that_name(serve, tmp_path):
    requests = serve("/text")
    make(tmp_path, {"text": b"mine"})
    with pytest.raises(DataError, match=r"text exists and is not text: move it away"):
        prepare.download("text", tmp_path)
    assert (tmp_path / "text").read_bytes() == b"mine" and requests == []


def test_corpora_table():
    for url, filename, sha256 in prepare.CORPORA.values():
        assert url.startswith("https://") and Path(filename).name == filename and len(bytes.fromhex(sha256)) == 32


# ---------------------------------------------------------------------------------------------- command line


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    prepare.main()


def test_main_prints_a_table(serve, tmp_path, capsys, monkeypatch):
    serve("/text.zip")
    run(monkeypatch, "text", "--dataset", tmp_path)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["files"] == ["1", str(tmp_path / "text")]
    assert lines["bytes"] == ["190,000"] and lines["tokens"][0] == "190,001"
    assert lines["cache"] == ["380,002", "bytes", "in", str(caches(tmp_path)[0])]


def test_main_says_when_it_uses_the_default_corpus(default_dataset, capsys, monkeypatch):
    run(monkeypatch, "--dataset", default_dataset)
    assert "has no files: this is the default corpus" in capsys.readouterr().out


def test_main_errors_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, "--dataset", tmp_path, "--tokenizer", "bite")
    assert e.value.code == "error: unknown tokenizer 'bite': did you mean 'byte'? Known are " + ", ".join(
        ["byte", *tiktoken.list_encoding_names()]
    )


def test_main_takes_any_name_of_a_file(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"text")
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as where the locale is en_US.UTF-8
    command = [sys.executable, "prepare.py", "--dataset", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert "caf\\udce9.txt" in done.stdout


def test_tokenizing_does_not_wait_for_torch():
    code = "import sys, prepare; prepare.Tokenizer('byte'); assert not {'torch', 'tiktoken'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
