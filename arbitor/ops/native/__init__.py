"""Passes over memory on a CPU in C, compiled where there is a C compiler; else torch's operations work.

The library is compiled when it is first needed, which takes about a second, and kept in `arbitor/native` of
`$XDG_CACHE_HOME` or `~/.cache`, by what went into it. It shares torch's threads: it is linked to the OpenMP
runtime that torch has loaded. `ARB_TERNARY_BACKEND=torch` leaves it out.

Results are those of torch's operations, bit for bit, so that a run may go on where there is no compiler. A
library for which that does not hold on a few examples (`check.py`) is not used.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arbitor.ops.backend import requested_backend
from arbitor.ops.trust import why_untrusted

SOURCE = Path(__file__).with_name("passes.c")
# Contraction would round two operations at once where a machine can; the others let loops be vectorised.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120.0  # after which a compiler is given up

_PLAIN = (Tensor, nn.Parameter)

_tried: "Found | None" = None


@dataclass(frozen=True, slots=True)
class Found:
    """The library, or why there is none.

    Attributes:
        library: its functions, by the names in `passes.c`.
        compiler: that made it.
        problem: empty if it is there.
    """

    library: ctypes.CDLL | None
    compiler: str = ""
    problem: str = ""


class Folding(ctypes.Structure):
    """`struct folding` of `passes.c`."""

    _fields_ = (
        ("old", ctypes.c_float),
        ("fresh", ctypes.c_float),
        ("kept", ctypes.c_float),
        ("lookahead", ctypes.c_float),
        ("decoded", ctypes.c_float * 8),
        ("encoded", ctypes.c_float * 8),
        ("thresholds", ctypes.c_int32 * 8),
        ("lowest", ctypes.c_int32),
        ("highest", ctypes.c_int32),
    )


class Voting(ctypes.Structure):
    """`struct voting` of `passes.c`."""

    _fields_ = (
        ("factor", ctypes.c_float),
        ("span", ctypes.c_int32),
        ("threshold", ctypes.c_int32),
        ("lowest", ctypes.c_int32),
        ("rail", ctypes.c_int32),
        ("reset", ctypes.c_int32),
    )


def passes(*tensors: Tensor) -> ctypes.CDLL | None:
    """The functions of `passes.c`, compiled if need be, for these tensors on a CPU.

    Returns:
        None where there are none or they are not to be used, where tensors are not contiguous, and where they
        only stand for some, as while torch traces.
    """
    if not all(type(tensor) in _PLAIN and tensor.is_contiguous() for tensor in tensors):
        return None
    if torch.compiler.is_compiling():
        return None
    if _tried is not None:
        return _tried.library
    return None if requested_backend() == "torch" else found().library


@contextlib.contextmanager
def trying(library: ctypes.CDLL | None) -> Iterator[None]:
    """Inside, `passes` gives this library, or torch's operations work in its place."""
    global _tried
    before, _tried = _tried, Found(library)
    try:
        yield
    finally:
        _tried = before


@functools.cache
def found() -> Found:
    """What there is in this process; compiles the library if nobody did yet."""
    runtime = _openmp()
    if runtime is None:
        return Found(None, problem="torch has not loaded one OpenMP runtime, whose threads could be shared")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *COMPILERS))), None)
    if compiler is None:
        return Found(None, problem=f"no C compiler was found ({', '.join(COMPILERS)})")
    try:
        library = _library(compiler, runtime)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        return Found(None, compiler, f"{compiler} failed: {line}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, compiler, f"{compiler}: {error}")
    from arbitor.ops.native.check import disagreements  # whose imports need this module

    if wrong := disagreements(library):
        return Found(None, compiler, f"what {compiler} makes differs from torch in {', '.join(wrong)}")
    return Found(library, compiler)


def _library(compiler: str, runtime: str) -> ctypes.CDLL:
    """From the cache, if it is safe to load from and has it; else compiled, and kept there if that can be."""
    folder = _folder()
    path = folder / f"{_key(compiler, runtime)}.so"
    safe = why_untrusted(folder) is None
    if safe and path.is_file() and why_untrusted(path) is None:
        with contextlib.suppress(OSError, AttributeError):  # damaged: made anew
            return _typed(ctypes.CDLL(str(path)))
    if safe:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    kept = safe and os.access(folder, os.W_OK)
    with tempfile.TemporaryDirectory(dir=folder if kept else None) as scratch:
        made = Path(scratch, path.name)
        _compile(compiler, runtime, made)
        library = _typed(ctypes.CDLL(str(made)))
        if kept:
            with contextlib.suppress(OSError):  # a full disk: next time then
                os.replace(made, path)
    return library


def _compile(compiler: str, runtime: str, path: Path) -> None:
    """Linked to torch's own runtime first, so that the compiler's is left out as not needed."""
    command = [compiler, *FLAGS, "-fopenmp", "-shared", "-fPIC", "-o", str(path), str(SOURCE)]
    command += ["-Wl,--as-needed", runtime, "-lm"]
    none = subprocess.DEVNULL
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS, stdin=none)


def _openmp() -> str | None:
    """The path of the OpenMP runtime that this process has loaded; None if there is none, or not one."""
    torch.get_num_threads()  # which loads it at the latest
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            paths = {line[line.index("/") :].rstrip("\n") for line in file if "/" in line}
    except OSError:
        return None
    runtimes = {path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}
    return runtimes.pop() if len(runtimes) == 1 else None


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "arbitor" / "native"


def _key(compiler: str, runtime: str) -> str:
    """Of all that the library depends on."""
    stats = [(path, os.stat(path)) for path in (os.path.realpath(compiler), runtime)]
    files = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    parts = [SOURCE.read_bytes(), *map(os.fsencode, (*FLAGS, *files, _cpu()))]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _cpu() -> str:
    """What `-march=native` depends on."""
    lines = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read().split("\n\n")[0]
        lines += [line for line in first.splitlines() if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(lines)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    nothing = {
        "squared_relu": [*[pointer] * 2, size, size, number],
        "quantize": [*[pointer] * 5, size, size, real, real, real, number],
        "scale_sums": [*[pointer] * 3, size, size, number],
        "round_scaled": [*[pointer] * 3, size, size, number],
        "widen_products": [*[pointer] * 4, size, size, number, number],
        "through_norm": [*[pointer] * 4, size, size, number, number],
        "decode": [*[pointer] * 4, size, size, size, number],
        "random_bits": [*[pointer] * 2, size, size, number],
        "fold": [*[pointer] * 4, size, size, size, number, pointer, number],
    }
    for name, arguments in nothing.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.update.argtypes = [*[pointer] * 5, size, pointer, number]
    library.update.restype = number
    return library
