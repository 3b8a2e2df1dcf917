"""What every comparison notes beside its figures: where, with what, when, from which commit."""

import contextlib
import datetime
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def commit() -> str:
    """The commit of this checkout, with `-dirty` behind it if files differ from it; empty without git."""
    command = ("git", "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12")
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or "cpu: " with its name and the widest vectors that torch uses there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"cpu: {model}, {torch.backends.cpu.get_cpu_capability()}"


def slug(device: torch.device) -> str:
    """The device in a file's name: "cpu", "h100", "h200", or the whole name of another GPU."""
    if device.type == "cpu":
        return "cpu"
    words = device_name(device).lower().replace("nvidia", "").split()
    return next((word for word in words if word in ("h100", "h200")), "-".join(words))


@contextlib.contextmanager
def float_products() -> Iterator[None]:
    """Products of fp32 on a GPU's tensor cores inside, as whoever trains floats allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def plotted(path: Path, draw: Callable[[], None]) -> str:
    """Draw with matplotlib, if it is there; a line for the user that says where, or why there is nothing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        return f"no plot: {error.name} is not installed; pip install matplotlib"
    matplotlib.use("Agg")
    draw()
    return f"plot: {path}"


def triton_version() -> str:
    """Of the installed Triton; empty without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def provenance(device: torch.device, from_commit: str) -> dict[str, str]:
    """The columns `commit`, `device`, `torch` and `date` of a row."""
    return {
        "commit": from_commit,
        "device": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
