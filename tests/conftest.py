import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

# Before any library reads them: no hub, no telemetry, one thread, which small models like best, and no GPU, where
# precision and rounding would be others.
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the commands that tests start are compiled once, not each time
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that started them
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="runner-tests-")  # of token ids
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from pathlib import Path

import pytest
import torch  # noqa: F401  with it here, no test leaves a library out for the others (runner/lean.py)
from tiny import save_tiny


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what is imported by now for what stays, as a process for one run does."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def libraries_are_no_garbage() -> Iterator[None]:
    """Once a test has imported so much that Python looked through all of it, see that no later one does."""
    searches = gc.get_stats()[2]["collections"]
    yield
    if gc.get_stats()[2]["collections"] > searches:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny_llama", "llama")


@pytest.fixture(scope="session")
def neox_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny_neox", "neox")
