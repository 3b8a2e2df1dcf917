"""What all tests share: the folder with test data, GPU tests skipped where there is no GPU."""

import hashlib
import os
import shutil
import signal
import time
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


# Tests of operations, layers and parts go through products of shapes, formats and dtypes. All of them and the
# long ones take ten minutes on two cores of today, an hour where two cores are one of ten years ago. There
# only so many cases of a test are run, and none of those that are marked `long`; `--every` asks for all.
CASES = 4
SAMPLED = ("testing/ops/", "testing/ternary/", "testing/model/")
# For a hundred thousand additions in Python. A core of today takes 0.002 to 0.003; on two that take 0.0034
# a third of all tests took 13 minutes.
SLOW_SECONDS = 0.0033
CHOICE = "ARBITOR_TESTS"  # "every" or "sample"; made once, for the processes that share the tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="run all tests on a slow machine, too")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("every"):
        os.environ[CHOICE] = "every"
    elif CHOICE not in os.environ:
        os.environ[CHOICE] = "sample" if seconds_of_additions() > SLOW_SECONDS else "every"


def pytest_report_header() -> str:
    return {
        "every": "all tests are run",
        "sample": "a slow machine: of tests with many cases a sample is run, long tests are not (--every)",
    }[os.environ[CHOICE]]


def seconds_of_additions() -> float:
    """The quickest of some rounds, so that other programs hardly count."""
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        total = 0
        for number in range(100_000):
            total += number
        taken.append(time.perf_counter() - began)
    return min(taken)


@pytest.hookimpl(trylast=True)  # behind `-k`, which may name a case
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ[CHOICE] == "sample":
        left_out = {item for cases in cases_by_test(items) for item in set(cases) - set(sample(cases))}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
        skip_long = pytest.mark.skip(reason="takes long on a slow machine; --every runs it")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip_long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
        for item in marked:
            item.add_marker(skip)


def cases_by_test(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """The cases of each test of which a sample is enough, in order."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.nodeid.startswith(SAMPLED):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(tests.values())


def sample(cases: list[pytest.Item]) -> list[pytest.Item]:
    """At most `CASES` of them: the first, the last, and those between that a hash of their names picks."""
    if len(cases) <= CASES:
        return cases
    between = sorted(cases[1:-1], key=lambda item: hashlib.blake2b(item.nodeid.encode()).digest())
    return [cases[0], *between[: CASES - 2], cases[-1]]


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
