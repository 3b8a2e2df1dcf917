"""`arbitor doctor`: what this machine has, and whether training works on it."""

import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from arbitor import __version__
from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ops import native, thresholds
from arbitor.ops.backend import VARIABLE, requested_backend
from arbitor.ops.compilers import cores
from arbitor.ops.int8_matmul import cpu
from arbitor.ops.trit_codec import trit_pack, trit_unpack
from arbitor.ternary import TernaryLinear, VoteOptimizer
from arbitor.train.crowding import busy_advice
from arbitor.train.device import Device, backend, deterministic, resolve_device, uses_kernels
from arbitor.train.display import format_bytes
from arbitor.train.report import print_rows

PACKAGES = ("torch", "numpy", "safetensors", "rich", "cyclopts", "pillow")
SELF_TEST_MODEL = ModelConfig(
    dim=32,
    num_prelude_layers=1,
    num_heads=2,
    head_dim=8,
    rope_dim=8,
    value_dim=16,
    kv_latent_dim=32,
    ffn_dim=64,
    ctx=16,
)


def examine(console: Console | None = None, measure: bool = False) -> int:
    """Print what is there and test it.

    Args:
        console: where to; None is stdout.
        measure: first measure the thresholds between kernels on the GPU, and store them.

    Returns:
        Exit code: 0 if the self-test passes, else 1.

    Raises:
        UserError: there is nothing to measure, or the measured cannot be stored.
    """
    console = console or Console(highlight=False)
    try:
        device = resolve_device("auto")
    except UserError:
        print_rows(console, _versions())  # at least
        raise
    if measure:
        measure_thresholds(device)
    print_rows(console, describe(device))
    load = _load()
    if load is not None and (advice := busy_advice(load, torch.get_num_threads(), cores())):
        console.print(Text(f"warning: {advice}", style="yellow"), soft_wrap=True)
    passed = True
    for name, check in (("pack and decode", check_codec), ("training step", check_training_step)):
        started = time.perf_counter()
        try:
            check(device)
            outcome = Text("ok", style="green")
        except Exception as error:  # whatever fails here is the answer that was asked for
            passed = False
            outcome = Text(
                f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}", style="bold red"
            )
        took = f" ({time.perf_counter() - started:.2f} s)"
        console.print(Text(f"self-test: {name}: ").append(outcome).append(took), soft_wrap=True)
    return 0 if passed else 1


def describe(device: Device) -> dict[str, str]:
    """Rows of label and text about this machine."""
    rows = {
        **_versions(),
        "device": f"{device.name}: {device.reason}",
        "back end": backend(device.device),
    }
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.device)
        free, total = torch.cuda.mem_get_info(device.device)
        rows["gpu"] = (
            f"{torch.cuda.device_count()} in all; compute capability {properties.major}.{properties.minor}, "
            f"{format_bytes(free)} of {format_bytes(total)} memory free, CUDA {torch.version.cuda}"
        )
    if device.is_cuda and uses_kernels():
        rows["kernels"] = f"compiled ones are kept in {_kernel_cache()}, which is yours alone"
        rows["thresholds"] = describe_thresholds(device)
    load = _load()
    shown = "" if load is None else f"; load {load:.1f} over the last minute"
    rows["threads"] = f"{torch.get_num_threads()} on {cores()} logical cores{shown}"
    if not device.is_cuda:
        rows["products"] = _products()
        rows["passes"] = describe_passes()
    rows["memory"] = _memory()
    rows["disk"] = _disk(Path.cwd())
    return rows


def _versions() -> dict[str, str]:
    """Rows about what is installed."""
    return {
        "arbitor": __version__,
        "python": f"{platform.python_version()} at {sys.executable}, {platform.platform()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def _products() -> str:
    """How the codes of tokens are multiplied with trits on a CPU."""
    if cpu.library_pays():
        return "of int8 by torch, which are the fastest here"
    if cpu.compiled_pays():
        return "of codes and trits by the compiled passes, which are the fastest here"
    return "of floats, which are the fastest here"


def measure_thresholds(device: Device) -> None:
    """Measure the thresholds between the kernels of a GPU, and store them.

    Raises:
        UserError: there is no GPU or there are no kernels, or the file cannot be written.
    """
    if not device.is_cuda:
        raise UserError(
            f"there is nothing to measure: {device.reason}, and on a CPU every process finds out for itself "
            "which products are faster"
        )
    if not uses_kernels():
        raise UserError(f"there is nothing to measure: {backend(device.device)}")
    thresholds.write(thresholds.path(), thresholds.identity(device.device), thresholds.measure(device.device))


def describe_passes() -> str:
    """Who makes the passes over memory on a CPU."""
    if requested_backend() == "torch":
        return f"torch's, which {VARIABLE} asks for"
    found = native.found()
    if found.library is None:
        return f"torch's, which are slower, since {found.problem}"
    return f"in C, compiled by {found.compiler}"


def describe_thresholds(device: Device) -> str:
    """The thresholds between the kernels of a GPU, and where they come from."""
    table = thresholds.table(device.device)
    values = ", ".join(f"{name} {value}" for name, value in table.values.items())
    if table.source:
        return f"{values} ({table.source})"
    if table.problem:
        return f"{values} (defaults: {table.problem})"
    return f"{values} (defaults; `arbitor doctor --measure` measures them on this GPU)"


def _kernel_cache() -> Path:
    from arbitor.ops.triton import cache_folder

    return cache_folder()


def check_codec(device: Device) -> None:
    """Every pattern of five trits survives packing, and a layer decodes to trits times a power of two."""
    digits = torch.arange(3**5)[:, None] // 3 ** torch.arange(4, -1, -1) % 3
    trits = (digits - 1).to(torch.int8).to(device.device)
    if not torch.equal(trit_unpack(trit_pack(trits), 5), trits):
        raise RuntimeError("trits do not survive packing")
    layer = TernaryLinear(170, 7, device=device.device)
    expected = layer.trits().float() * torch.exp2(layer.E.float())
    if not torch.equal(layer.decode(), expected):
        raise RuntimeError("a matrix does not decode to its trits and exponents")


def check_training_step(device: Device) -> None:
    """Some steps on one repeated batch change trits and lower the loss."""
    with deterministic(0, device.device):
        model = ARBModel(config=SELF_TEST_MODEL, device=device.device)
        optimizer = VoteOptimizer(model)
        ids_BL = (torch.arange(64) * 7 % 32 + 64).view(4, 16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        losses = []
        for _ in range(8):
            loss = model(ids_BL, targets=ids_BL).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if optimizer.dropped_steps or not changed:
        raise RuntimeError("a training step changed nothing")
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")


def _load() -> float | None:
    """Mean number of processes that ran or waited in the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # which names the build too
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return f"{format_bytes(sizes['MemAvailable'])} of {format_bytes(sizes['MemTotal'])} available"
    except (OSError, KeyError, ValueError, IndexError):
        return "unknown on this system"


def _disk(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    writable = "" if os.access(folder, os.W_OK) else ", which cannot be written to"
    return f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free at {folder}{writable}"
