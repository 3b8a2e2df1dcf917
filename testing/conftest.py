"""What all tests share: the folder with test data, GPU tests skipped where there is no GPU."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Tests work on small tensors, which a second thread slows down; set before torch is first imported, and
# inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests interrupt what they start; a shell that runs them in the background leaves that ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where there is no GPU, Triton's kernels are tested under its interpreter, which Triton must know before it
# is first imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are the same on every machine and every run, however slow the machine is.
settings.register_profile("arbitor", deadline=None, derandomize=True)
settings.load_profile("arbitor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_folder(repository: Path) -> Path:
    """Real data for tests, from ARBITOR_TEST_DATA or `shared/data` beside the checkout; skips without it."""
    folder = Path(os.environ.get("ARBITOR_TEST_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set ARBITOR_TEST_DATA to a folder that has it")
    return folder
