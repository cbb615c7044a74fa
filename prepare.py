"""Text to tokens: the tokenizer, the token cache, standard corpora and the contiguous-stream data loader.

    uv run prepare.py                         tokenize dataset/ and say what is in it
    uv run prepare.py shakespeare             download a standard corpus into it first (also: enwik8, text8)
    uv run prepare.py --tokenizer gpt2        byte-pair tokens instead of bytes

A data set is a folder. Each visible file in it, in sorted path order, is one document, stored as <|endoftext|> and then
its tokens. All documents together are one stream of n tokens, whose last part is the validation split.

    B batch_size    T block_size    L lanes = batch_size * world_size    n tokens in a stream
"""

import argparse
import codecs
import difflib
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import urllib.request
import uuid
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

CHUNK = 1 << 20  # bytes read, encoded and written at a time
CACHE_FORMAT = b"2"  # part of every cache key: raise it when the stored layout or the encoding changes
KEY_BYTES = 16
RACY_NS = 2 * 10**9  # the coarsest file timestamps in use (FAT) tick every 2 s
STALE_SECONDS = 3600  # a temporary file untouched for so long has no living writer

CORPORA = {  # name: (address, file in the data set, SHA-256 of that file, unzipped)
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "tinyshakespeare.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("https://mattmahoney.net/dc/enwik8.zip",
               "enwik8", "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
    "text8": ("https://mattmahoney.net/dc/text8.zip",
              "text8", "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"),
}


class DataError(Exception):
    """A fault of data, disk or network; str() is one line: what is wrong, where, what to do."""


@contextmanager
def reading(path):
    """Within, path is read; where that fails, DataError names it."""
    try:
        yield
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e


# ---------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text <-> token ids. name: "byte" (256 bytes, then <|endoftext|>) or a tiktoken encoding such as "gpt2".

    token_bytes: (n_vocab,) int64, how many bytes of text a token stands for, 0 for <|endoftext|>:
    bits per byte = summed nats / ln 2 / token_bytes[targets].sum(). Raises DataError.
    """

    def __init__(self, name: str = "byte"):
        self.name = name
        if name == "byte":
            self._bpe = None
            self._vocab = [bytes([i]) for i in range(256)] + [b""]
            self.eot = 256
        else:
            self._bpe = _load_bpe(name)
            self._vocab = [b""] * self._bpe.n_vocab  # special tokens and unused ids carry no text
            special = {self._bpe.encode_single_token(text) for text in self._bpe.special_tokens_set}
            for i in set(range(self._bpe.n_vocab)) - special:
                with suppress(KeyError):
                    self._vocab[i] = self._bpe.decode_single_token_bytes(i)
            self.eot = self._bpe.eot_token
        self.n_vocab = len(self._vocab)
        self.token_bytes = np.array([len(b) for b in self._vocab], dtype=np.int64)
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 1 << 16 else np.uint32)

    def encode(self, text: str | bytes) -> np.ndarray:
        """-> (number of tokens,) of self.dtype. The text of a special token is data like any other."""
        if self._bpe is None:
            # surrogateescape restores the bytes of a command-line argument that is not UTF-8
            data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            return np.frombuffer(data, np.uint8).astype(self.dtype)
        if not isinstance(text, str):
            try:
                text = text.decode()
            except UnicodeDecodeError as e:
                raise _not_utf8("the text", e.start, self.name) from None
        return np.array(self._bpe.encode_ordinary(text), dtype=self.dtype)

    def decode_bytes(self, ids) -> bytes:
        return b"".join([self._vocab[i] for i in np.asarray(ids).ravel().tolist()])

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _load_bpe(name):
    import tiktoken  # here, because bytes do without

    known = ["byte", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise DataError(f"unknown tokenizer {name!r}: did you mean {near!r}? Known are {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:  # those of requests are OSErrors; a wrong hash is a ValueError
        raise DataError(f"cannot load the vocabulary of tokenizer {name!r} ({type(e).__name__}): connect to the "
                        "network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or train with "
                        "--tokenizer byte") from e


def _not_utf8(what, offset, name):
    return DataError(f"{what}: byte {offset} is not valid UTF-8, which tokenizer {name!r} reads: "
                     "convert the text to UTF-8, or train with --tokenizer byte")


# Where a document may be cut so that its pieces encode to the tokens of the whole. tiktoken splits a text into the
# successive matches of a regex, which leave no gap, and merges bytes only inside a match. The regex never looks behind,
# so nothing right of a cut depends on what is left of it. A cut is safe if it falls between two matches of the whole
# text and the matches left of it stay the same when the text ends there.
# (a) Between a non-space x and a space; for GPT-2 also a newline. A space either opens a match or stands in one of
#     white space alone, and so does a newline for GPT-2 (in cl100k and o200k newlines can end a match of punctuation),
#     so no match holds both sides. Left of the cut each repetition stops at the end as it did at the space, and the
#     white space that $ and (?!\S) come after has ended before x.
# (b) cl100k and o200k: between a newline and x, x not "/" (o200k has [\r\n/]*). No match goes on from a newline to
#     such an x. Left of the cut, white space ending in this newline is one match, of \s*[\r\n]+ or of \s++$.
# Python's \S is inside tiktoken's: it excludes all of Unicode's White_Space, and \x1c to \x1f besides.
GPT2_CUT = re.compile(r"(?<=\S)(?=[ \n])")
CL100K_CUT = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=[^\s/])")
SAFE_CUTS = dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), GPT2_CUT)
SAFE_CUTS |= dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), CL100K_CUT)


def text_chunks(path: Path, tokenizer: Tokenizer) -> Iterator[bytes | str]:
    """A file in pieces of about CHUNK bytes that encode on their own: their tokens, joined, are those of the whole.

    bytes for "byte", else str. Without a safe cut, or for a tokenizer not in SAFE_CUTS, the file is one piece.
    Raises DataError.
    """
    with reading(path), open(path, "rb") as f:
        blocks = iter(lambda: f.read(CHUNK), b"")
        if tokenizer.name == "byte":
            yield from blocks
        else:
            yield from cut_safely(_decode(blocks, path, tokenizer.name), SAFE_CUTS.get(tokenizer.name))


def _decode(blocks, path, name):
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read = 0
    for block in chain(blocks, [b""]):
        offset = n_read - len(decoder.getstate()[0])  # it may still hold the first bytes of a character
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise _not_utf8(path, offset + e.start, name) from None
        n_read += len(block)


def cut_safely(texts: Iterator[str], safe_cut: re.Pattern | None) -> Iterator[str]:
    """Joins texts and cuts each anew, at its first safe place; all in one piece if safe_cut is None."""
    held, last = [], ""  # last: the character before text, for the pattern to look behind at
    for text in texts:
        if safe_cut and (m := safe_cut.search(last + text)):
            cut = m.start() - len(last)
            yield "".join([*held, text[:cut]])
            held = [text[cut:]]
        else:
            held.append(text)
        last = text[-1:]
    yield "".join(held)


# ---------------------------------------------------------------------------------------------- files and the cache


@dataclass(frozen=True)
class Corpus:
    """A data set as one stream. tokens: (n,) uint16 or uint32, memory-mapped, read-only."""

    tokens: np.memmap
    files: list[Path]
    is_default: bool  # the Python library's text, because the data set is empty
    fingerprint: str  # of all file names and contents
    n_bytes: int  # of text

    def split(self, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """-> (train_tokens, val_tokens): the last val_fraction of the stream validates, as in nanoGPT."""
        cut = int(len(self.tokens) * (1 - val_fraction))
        return self.tokens[:cut], self.tokens[cut:]


def visible_files(dataset: Path) -> list[Path]:
    """All files below dataset in sorted path order, but for names that start with a dot. Links are followed."""
    if not dataset.exists():
        return []
    if not dataset.is_dir():
        raise DataError(f"{dataset} is a file: give the folder that holds your text files")
    return sorted(_walk(dataset, above=frozenset()))


def _walk(folder, above):
    with reading(folder):
        here = folder.resolve()
        if here in above:  # a link to a folder above would never end
            return
        for path in folder.iterdir():
            if path.name[0] != ".":
                if path.exists() and not (path.is_dir() or path.is_file()):  # a named pipe would keep a reader waiting
                    raise DataError(f"{path} is no file with text: move it away")
                yield from _walk(path, above | {here}) if path.is_dir() else [path]


def load_corpus(dataset: Path, tokenizer: Tokenizer, progress: bool = True) -> Corpus:
    """The visible files of dataset, or the default corpus if it has none, encoded once and then memory-mapped.

    Cache: dataset/.cache/<tokenizer>/<key>.bin. The key is made from the names and contents of the files, hashed in
    the pass that encodes them, and a file gets its name only when it is whole, so that any number of processes may
    do this at once, and be killed. It ends with its key, which a copy cut short lacks. Raises DataError.
    """
    dataset = Path(dataset)
    store = dataset / ".cache"
    folder = store / tokenizer.name
    try:
        root, files = dataset, visible_files(dataset)
        if is_default := not files:
            root = default_corpus(dataset)
            files = visible_files(root)
        named = {path.relative_to(root).as_posix(): path for path in files}
        entries = _find_cache(named, store, folder, progress)
        if entries is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(store):
                entries = _find_cache(named, store, folder, progress)
                entries = entries or _encode_files(named, tokenizer, store, folder, progress)
        path = folder / f"{_key(entries)}.bin"
        n_tokens = (path.stat().st_size - KEY_BYTES) // tokenizer.dtype.itemsize
        tokens = np.memmap(path, dtype=tokenizer.dtype, mode="r", shape=n_tokens)
    except OSError as e:
        raise DataError(f"cannot use the token cache in {store} ({e.strerror}): make that folder writable and see "
                        "that its disk has space, or point --dataset at a new folder with a link to "
                        f"{dataset} in it") from e
    _remove_old(store, keep=path)
    return Corpus(tokens, files, is_default, _key(entries), sum(entry[0] for entry in entries.values()))


@contextmanager
def _one_at_a_time(store):
    """Makes the ranks of a run wait for the first, where the system can; where not, each encodes for itself."""
    with open(store / "lock", "ab") as f:
        with suppress(ImportError, OSError):  # Windows, some network disks
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield


# The index spares a start the reading of all files. It maps a name to [bytes, mtime, ctime, time of reading, SHA-256].
# ctime, because tools that set mtime (cp -p, rsync, tar) cannot set it. An entry is believed only if the file was last
# changed more than RACY_NS before the reading: a second edit in the same tick of the clock would leave no trace.


def _read_index(store):
    with suppress(OSError, ValueError):
        index = json.loads((store / "index.json").read_bytes())
        return index if isinstance(index, dict) else {}
    return {}


def _write_index(store, entries):
    with suppress(OSError), temporary_file(store) as f:  # a read-only data set: its files are hashed at each start
        f.write(json.dumps(entries, indent=0).encode())
        publish(f, store / "index.json")


def _stamp(path):
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, time.time_ns()]


def _entry(path, old):
    with reading(path):
        stamp = _stamp(path)
        if old and old[:3] == stamp[:3] and max(old[1:3]) + RACY_NS < old[3]:
            return old
        with open(path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            return [f.tell(), *stamp[1:], sha256]


def _find_cache(named, store, folder, progress):
    """-> index entries of the files as they are now, if folder has the tokens of just these, else None."""
    if not any(folder.glob("*.bin")):
        return None
    index = _read_index(store)
    bar = tqdm(named.items(), "checking files", disable=not progress, leave=False, delay=1)
    entries = {name: _entry(path, index.get(name)) for name, path in bar}
    if entries != index:
        _write_index(store, entries)
    return entries if _is_whole(folder / f"{_key(entries)}.bin") else None


def _key(entries):
    key = hashlib.sha256(CACHE_FORMAT)
    for name, entry in entries.items():
        key.update(os.fsencode(name) + b"\0" + bytes.fromhex(entry[4]))
    return key.hexdigest()[: 2 * KEY_BYTES]


def _is_whole(path):
    with suppress(OSError), open(path, "rb") as f:
        f.seek(-KEY_BYTES, os.SEEK_END)
        return f.read() == bytes.fromhex(path.stem)
    return False


def _encode_files(named, tokenizer, store, folder, progress):
    """Writes folder/<key>.bin; -> index entries. Threads, because tiktoken, hashlib and numpy let go of the GIL."""
    workers = os.process_cpu_count()
    size = sum(path.stat().st_size for path in named.values() if path.exists())
    bar = tqdm(None, f"encoding ({tokenizer.name})", size, leave=False, unit="B", unit_scale=True, disable=not progress)
    entries, pending = {}, deque()  # pending: (future of tokens, bytes of text), in the stream's order
    with temporary_file(store) as f, ThreadPoolExecutor(workers) as pool, bar:

        def write_until(n_pending):
            while len(pending) > n_pending:
                tokens, n = pending.popleft()
                f.write(tokens.result())
                bar.update(n)

        for name, path in named.items():
            with reading(path):
                stamp, sha256, n_bytes = _stamp(path), hashlib.sha256(), 0
            pending.append((pool.submit(np.full, 1, tokenizer.eot, tokenizer.dtype), 0))
            for chunk in text_chunks(path, tokenizer):
                data = chunk if isinstance(chunk, bytes) else chunk.encode()  # of strict UTF-8: those of the file
                sha256.update(data)
                n_bytes += len(data)
                pending.append((pool.submit(tokenizer.encode, chunk), len(data)))
                write_until(2 * workers)  # bounds the memory
            entries[name] = [n_bytes, *stamp[1:], sha256.hexdigest()]
        write_until(0)
        f.write(bytes.fromhex(_key(entries)))
        publish(f, folder / f"{_key(entries)}.bin")
    _write_index(store, entries)
    return entries


@contextmanager
def temporary_file(folder: Path, prefix: str = ""):
    """A new binary file of a unique name, removed at the end unless it was published."""
    path = folder / f"{prefix}{uuid.uuid4().hex}.tmp"
    try:
        with open(path, "xb") as f:
            yield f
    finally:
        path.unlink(missing_ok=True)


def publish(f, path: Path):
    """Gives a temporary file its name in one step, its bytes on the disk first."""
    f.flush()
    os.fsync(f.fileno())
    f.close()  # Windows renames closed files only
    os.replace(f.name, path)


def _remove_old(store, keep):
    """Removes the tokens of other contents, and what killed processes left behind."""
    with suppress(OSError):  # read-only, or another process was first
        for path in keep.parent.glob("*.bin"):
            if path != keep:
                path.unlink()
        for path in store.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------- corpora


def default_corpus(dataset: Path) -> Path:
    """Python's own library, its sources with their docstrings and its language reference, about 10 MB of text.

    -> dataset/.default, ten files of near equal size, built once. Modules and topics come in the order of their names'
    hashes, which mixes them, so that the last tenth, the validation split, is like the rest.
    """
    root = dataset / ".default"
    if visible_files(root):
        return root
    library = Path(sysconfig.get_path("stdlib"))
    # encodings: tables of code points; _sysconfigdata: this machine's build flags; pydoc_data: read as text below
    skip = re.compile(r"site-packages|tests?/|_test/|__pycache__|encodings/|_sysconfigdata|pydoc_data/|config-")
    texts = {}
    for path in (p for kind in ("py", "txt", "rst") for p in library.rglob(f"*.{kind}")):
        name = path.relative_to(library).as_posix()
        if not skip.search(name):
            with reading(path), suppress(UnicodeDecodeError):
                texts[name] = path.read_bytes().decode().strip()
    with suppress(ImportError):
        from pydoc_data.topics import topics

        texts |= {f"topic {name}": text.strip() for name, text in topics.items()}
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise DataError(f"{dataset} has no files, and this Python has no library sources to use instead: put text "
                        "files into it, or run `uv run prepare.py shakespeare`")
    done, total, parts = 0, sum(map(len, texts.values())), [[] for _ in range(10)]
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        parts[10 * done // total].append(texts[name])
        done += len(texts[name])
    work = dataset / ".cache" / f"{uuid.uuid4().hex}.tmp"
    work.mkdir(parents=True)
    for i, part in enumerate(parts):
        (work / f"python_library_{i}.txt").write_bytes("\n\n\n".join([*part, ""]).encode())
    try:
        work.rename(root)
    except OSError:
        shutil.rmtree(work)
        if not visible_files(root):  # not the work of another process that was first
            raise
    return root


def download(name: str, dataset: Path) -> Path:
    """Brings a corpus of CORPORA into dataset, whole and verified or not at all; -> its path. Raises DataError."""
    url, filename, sha256 = CORPORA[name]
    target, store = Path(dataset, filename), Path(dataset, ".cache")
    try:
        if target.exists():
            if _sha256(target) != sha256:
                raise DataError(f"{target} exists and is not {name}: move it away, then run this again")
            print(f"{target} is there already, nothing to download")
            return target
        store.mkdir(parents=True, exist_ok=True)
        with temporary_file(store) as f, temporary_file(store) as unzipped:
            _fetch(url, f)
            if url.endswith(".zip"):
                with zipfile.ZipFile(f.name) as archive, archive.open(filename) as text:
                    shutil.copyfileobj(text, unzipped, CHUNK)
                f, unzipped = unzipped, f
            f.flush()
            if (actual := _sha256(f.name)) != sha256:
                raise DataError(f"{url} sent SHA-256 {actual}, expected {sha256}: nothing was kept, try again")
            publish(f, target)
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as e:  # the last: encrypted, another compression
        raise DataError(f"{url} sent no zip file with {filename} in it: nothing was kept, try again") from e
    except (OSError, ValueError, http.client.HTTPException) as e:  # a length that is no number
        raise DataError(f"cannot download {url} to {target} ({e}): check the network and the disk, try again") from e
    return target


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(url, f):
    request = urllib.request.Request(url, headers={"User-Agent": "hybrid-lm"})  # some servers refuse urllib's own
    with urllib.request.urlopen(request, timeout=60) as response:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(None, url.rpartition("/")[2], size or None, unit="B", unit_scale=True) as bar:
            while block := response.read(CHUNK):
                f.write(block)
                bar.update(len(block))
    f.flush()
    if f.tell() < size:
        raise ConnectionError(f"cut off after {f.tell():,} of {size:,} bytes")


# ---------------------------------------------------------------------------------------------- batches


def _shift(ids: np.ndarray, eot: int):
    """(B, T+1) ids -> x, y (B, T) int64, reset (B, T) bool: y is x one step on, -1 where a document starts."""
    import torch  # here, because its import takes seconds and tokenizing does without

    ids = torch.from_numpy(ids)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:]
    return x, y.masked_fill(y == eot, -1), x == eot


class DataLoader:
    """Batches (x, y, reset) without end: x, y (B, T) int64, y = -1 where nothing is predicted, reset (B, T) bool.

    sequential: the stream is a circle that each epoch cuts at a random place and then into L lanes of n // L tokens;
    rank r has lanes r*B to (r+1)*B-1. Row i goes on where row i of the batch before stopped, so state can be carried;
    reset marks the start of each document, lane and epoch. Only whole lanes and blocks are used: up to T-1 tokens at
    the end of each lane and L-1 of the circle are left out, different ones in each epoch.
    Otherwise rows are windows at random places, with a reset at the start of each.
    A batch depends only on seed and step; the rows of all ranks are those of one process with B = L.
    Raises DataError if the stream is too short for one step.
    """

    def __init__(self, tokens, batch_size, block_size, eot, sequential=True, seed=1337, rank=0, world_size=1):
        self.tokens = np.asarray(tokens)  # still memory-mapped; a plain view, because slicing np.memmap is slow
        self.lanes = batch_size * world_size
        self.rank_lanes = slice(rank * batch_size, (rank + 1) * batch_size)
        self.block_size, self.eot, self.sequential, self.seed = block_size, eot, sequential, seed
        n = len(self.tokens)
        needed = self.lanes * block_size if sequential else block_size + 1
        if n < needed:
            sizes = f"batch_size {batch_size}, block_size {block_size}, {world_size} processes"
            raise DataError(f"the training split has {n:,} tokens and one step needs {needed:,} ({sizes}): "
                            "lower batch_size, block_size or val_fraction, or put more text into the data set")
        self.steps_per_epoch = max(1, n // self.lanes // block_size)
        self.step = 0

    def next_batch(self):
        n, T = len(self.tokens), self.block_size
        epoch, t = divmod(self.step, self.steps_per_epoch)
        if self.sequential:
            cut = np.random.default_rng((self.seed, epoch)).integers(n)
            starts = (cut + np.arange(self.lanes) * (n // self.lanes) + t * T) % n
        else:
            starts = np.random.default_rng((self.seed, self.step)).integers(n - T, size=self.lanes)
        starts = starts[self.rank_lanes]  # (B,)
        # A slice a row reads just the pages it needs. They stay in the resident size until the kernel wants them back:
        # clean page cache, not a leak, so the file is not mapped anew for each batch as in nanoGPT.
        ids = np.empty((len(starts), T + 1), dtype=np.int64)
        for row, a in zip(ids, starts):
            row[:] = self.tokens[a : a + T + 1] if a + T < n else self.tokens.take(range(a, a + T + 1), mode="wrap")
        x, y, reset = _shift(ids, self.eot)
        if t == 0 or not self.sequential:
            reset[:, 0] = True
        if self.sequential:
            to_first = -starts % n  # steps until the stream's first token, which follows none
            for i in np.flatnonzero(to_first <= T):
                k = to_first[i]
                y[i, max(k - 1, 0) : k] = -1
                reset[i, k : k + 1] = True
        self.step += 1
        return x, y, reset

    def state_dict(self) -> dict:
        keys = ("step", "lanes", "block_size", "sequential", "seed")
        return {key: getattr(self, key) for key in keys} | {"n_tokens": len(self.tokens)}

    def load_state_dict(self, state: dict):
        """Goes on at the saved step. Raises DataError if the batches would not be those of the saved loader."""
        for key, value in self.state_dict().items():
            if key != "step" and state[key] != value:
                raise DataError(f"the saved data position has {key} {state[key]}, this run {value}: make them agree")
        self.step = state["step"]


def _gather(tokens, starts, ends, block_size, eot):
    """(x, y, reset) of T inputs from each start, fewer where its end comes first: what is left is eot, with y = -1."""
    tokens, ids = np.asarray(tokens), np.full((len(starts), block_size + 1), eot, dtype=np.int64)
    for row, a, b in zip(ids, starts, np.minimum(starts + block_size, ends)):
        if a < b:
            row[: b - a + 1] = tokens[a : b + 1]
    return _shift(ids, eot)


def eval_lanes(tokens, n_lanes: int, block_size: int, eot: int):
    """All of tokens in n_lanes contiguous lanes, each target once, for an evaluation that carries state: (x, y, reset),
    (n_lanes, T) each, as DataLoader's; reset also marks the start of each lane."""
    n = len(tokens) - 1  # inputs that have a target
    length = -(-n // n_lanes)
    begin = np.arange(n_lanes) * length
    end = np.minimum(begin + length, n)
    for t in range(0, length, block_size):
        x, y, reset = _gather(tokens, begin + t, end, block_size, eot)
        reset[:, 0] |= t == 0
        yield x, y, reset


def eval_blocks(tokens, batch_size: int, block_size: int, eot: int):
    """All of tokens in consecutive blocks, each on its own, each target once, nanoGPT's protocol: (x, y, reset),
    (batch_size, T) each, as DataLoader's; reset also marks the start of each row."""
    n = len(tokens) - 1  # inputs that have a target
    for start in range(0, n, batch_size * block_size):
        begin = start + np.arange(batch_size) * block_size
        x, y, reset = _gather(tokens, begin, n, block_size, eot)
        reset[:, 0] = True
        yield x, y, reset


# ---------------------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description="Tokenizes a folder of text files, after a download if one is named.")
    parser.add_argument("corpus", nargs="?", choices=CORPORA, help="a standard corpus to download into the folder")
    parser.add_argument("--dataset", type=Path, default=Path("dataset"), metavar="DIR", help="the folder (dataset)")
    parser.add_argument("--tokenizer", default="byte", metavar="NAME", help='"byte" (default), "gpt2", ...')
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        if args.corpus:
            download(args.corpus, args.dataset)
        start = time.perf_counter()
        tokenizer = Tokenizer(args.tokenizer)
        corpus = load_corpus(args.dataset, tokenizer)
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    seconds = time.perf_counter() - start
    if corpus.is_default:
        print(f"{args.dataset} has no files: this is the default corpus, the Python library's sources and reference")
    names = ", ".join(str(path) for path in corpus.files[:3]) + ", ..." * (len(corpus.files) > 3)
    print(f"files   {len(corpus.files):>14,}   {names}")
    print(f"bytes   {corpus.n_bytes:>14,}")
    print(f"tokens  {len(corpus.tokens):>14,}   {tokenizer.name}, vocabulary {tokenizer.n_vocab:,}")
    print(f"seconds {seconds:>14.2f}")
    print(f"cache   {corpus.tokens.nbytes:>14,}   bytes in {corpus.tokens.filename}")


if __name__ == "__main__":
    main()
