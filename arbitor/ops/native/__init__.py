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
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arbitor.cache import cache_folder
from arbitor.ops.backend import requested_backend
from arbitor.ops.trust import make_private, why_untrusted

SOURCE = Path(__file__).with_name("passes.c")
# Contraction would round two operations at once where a machine can; the others let loops be vectorised.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120.0  # after which a compiler is given up

_PLAIN = (Tensor, nn.Parameter)

_lock = threading.RLock()
_tried: "ContextVar[Found | None]" = ContextVar("tried", default=None)


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


def passes(*tensors: tuple[Tensor, torch.dtype]) -> ctypes.CDLL | None:
    """The functions of `passes.c`, compiled if need be.

    Args:
        tensors: whose memory is to be read or written, and the dtypes that the functions take.

    Returns:
        None where there are none or they are not to be used; where a tensor is not a plain contiguous one of
        its dtype on a CPU; and while torch traces what is done with tensors.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    if not all(map(_is_plain, tensors)):
        return None
    if (tried := _tried.get()) is not None:
        return tried.library
    return None if requested_backend() == "torch" else found().library


def _is_plain(given: tuple[Tensor, torch.dtype]) -> bool:
    tensor, dtype = given
    if type(tensor) not in _PLAIN or tensor.dtype != dtype or not tensor.is_cpu:
        return False
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor._is_zerotensor()


@contextlib.contextmanager
def trying(library: ctypes.CDLL | None) -> Iterator[None]:
    """Inside, in this thread, `passes` gives this library, or torch's operations work in its place."""
    token = _tried.set(Found(library))
    try:
        yield
    finally:
        _tried.reset(token)


def found() -> Found:
    """What there is in this process; compiles the library if nobody did yet."""
    with _lock:
        return _found()


@functools.cache
def _found() -> Found:
    from arbitor.ops.native.check import disagreements  # whose imports need this module

    runtime = _openmp()
    if runtime is None:
        return Found(None, problem="torch has no OpenMP runtime whose threads could be shared")
    problem = f"no C compiler was found ({', '.join(COMPILERS)})"
    for compiler in _compilers():
        try:
            library = _library(compiler, runtime)
            wrong = disagreements(library)
        except Exception as error:  # whatever it is, torch's operations are there
            problem = f"{' '.join(compiler)}: {_line_of(error)}"
            continue
        if not wrong:
            return Found(library, " ".join(compiler))
        problem = f"what {' '.join(compiler)} makes differs from torch in {', '.join(wrong)}"
    return Found(None, problem=problem)


def _line_of(error: Exception) -> str:
    """What went wrong, in one line."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[-1])


def _compilers() -> Iterator[list[str]]:
    """Commands to try, each once: that of $CC first, which may have arguments."""
    own = os.environ.get("CC", "")
    try:
        named = shlex.split(own)
    except ValueError:  # an open quote
        named = [own]
    seen = set()
    for command in (named, *([name] for name in COMPILERS)):
        if command and (path := shutil.which(command[0])) and (path, *command[1:]) not in seen:
            seen.add((path, *command[1:]))
            yield [path, *command[1:]]


def _library(compiler: Sequence[str], runtime: str) -> ctypes.CDLL:
    """From the cache, if that is safe and has it whole; else compiled, and kept there if that can be."""
    key = _key(compiler, runtime)
    folder = _folder()
    if folder is not None and (kept := _kept(folder, key)) is not None:
        with contextlib.suppress(OSError):
            return _typed(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, f"{key}.so")
        _compile(compiler, runtime, made)
        library = _typed(ctypes.CDLL(str(made)))
        if folder is not None:
            with contextlib.suppress(OSError):  # a full disk: next time then
                _keep(made, folder, key)
    return library


def _compile(compiler: Sequence[str], runtime: str, path: Path) -> None:
    """Linked to torch's own runtime and no other: what needs another one is an error."""
    code = path.with_suffix(".o")
    none = subprocess.DEVNULL
    for command in (
        [*compiler, *FLAGS, "-fopenmp", "-fPIC", "-c", "-o", str(code), str(SOURCE)],
        [*compiler, "-shared", "-Wl,-z,defs", "-o", str(path), str(code), runtime, "-lm"],
    ):
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            stdin=none,
        )


def _kept(folder: Path, key: str) -> Path | None:
    """The library of that key, if there is one with the content that its name tells."""
    for path in folder.glob(f"{key}-*.so"):
        if why_untrusted(path) is None and path.name == _name(key, path.read_bytes()):
            return path
    return None


def _keep(made: Path, folder: Path, key: str) -> None:
    """Under a name that tells the content, in one move."""
    content = made.read_bytes()
    handle, place = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(place, 0o700)
        os.replace(place, folder / _name(key, content))
    except BaseException:
        os.unlink(place)
        raise


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.blake2b(content, digest_size=16).hexdigest()}.so"


def _openmp() -> str | None:
    """The path of the OpenMP runtime that torch computes with; None if it cannot be told."""

    class Symbol(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        where = ctypes.cast(torch_cpu.omp_get_max_threads, ctypes.c_void_p)
        symbol = Symbol()
        told = ctypes.CDLL(None).dladdr(where, ctypes.byref(symbol))
    except (OSError, AttributeError, TypeError):
        return None
    path = os.path.realpath(os.fsdecode(symbol.file)) if told and symbol.file else ""
    return path if Path(path).name.startswith(("libgomp", "libiomp", "libomp")) else None


def _folder() -> Path | None:
    """Where libraries are kept, made for this user alone; None without one, or if others may write there."""
    try:
        folder = cache_folder() / "native"
        if why_untrusted(folder) is not None:
            return None
        make_private(folder)
    except (OSError, RuntimeError):  # the latter: no home
        return None
    return folder if why_untrusted(folder) is None and os.access(folder, os.W_OK | os.X_OK) else None


def _key(compiler: Sequence[str], runtime: str) -> str:
    """Of all that the library depends on."""
    stats = [(path, os.stat(path)) for path in (os.path.realpath(compiler[0]), runtime)]
    files = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    parts = [SOURCE.read_bytes(), *map(os.fsencode, (*compiler, *FLAGS, *files, _cpu()))]
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
    library.multiply_trits.argtypes = [*[pointer] * 6, size, size, size, number]
    library.update.restype = library.multiply_trits.restype = number
    return library
