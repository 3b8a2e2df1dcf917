"""Processes that run Triton's compiler, half of which is Python, where threads of a process take turns.

They are forked, so that they need not import torch again, and ahead of this process's first use of CUDA,
whose state a fork must not inherit; they are told which GPU to compile for and never ask one. What they
compile lies in Triton's cache, where this process finds it under the same key.

Until they are needed there is one process, the leader, which imports Triton meanwhile; it forks the others.
All are in a process group of their own, which a terminal's Ctrl-C does not reach: they end when this process
says so, or when it is gone and with it its end of their pipes.
"""

import atexit
import contextlib
import importlib
import os
import queue
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from arbitor.ops.backend import has_triton, requested_backend

MOST = 16
# Where Linux shows NVIDIA's GPUs, also those of a Windows host: asking CUDA would be using it.
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
LONGEST = 120.0  # seconds that a kernel may take, after which a process counts as dead; most take one
_PATIENCE = 2.0  # seconds that the leader is given to end the others

_current: "Compilers | None" = None


class Compilers:
    """Processes that compile.

    Args:
        count: how many, once they are needed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._owner = os.getpid()
        self._started = self._ended = False
        self._control, control = Pipe()
        pairs = [Pipe() for _ in range(count)]
        self._ends = [own for own, _ in pairs]
        with warnings.catch_warnings():
            # Python warns of threads, which the processes do not have; nothing here waits for one.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._leader = os.fork()
        if not self._leader:
            for end in (self._control, *self._ends):
                end.close()
            _exit_after(_lead, control, [end for _, end in pairs])
        with contextlib.suppress(OSError):  # whichever of the two processes comes first
            os.setpgid(self._leader, self._leader)
        for end in (control, *(end for _, end in pairs)):
            end.close()
        self._idle: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()

    def start(self, target: Any) -> None:
        """Let them begin, for a GPU (Triton's `GPUTarget`); later calls have no effect."""
        if self._started or self._ended:
            return
        self._started = True
        try:
            self._control.send(target)
        except OSError:  # the leader is gone, and with it the others
            self._ends = []
        for end in self._ends:
            self._idle.put(end)
        if not self._ends:
            self._idle.put(None)

    def compile(self, source: Any, options: Mapping[str, Any]) -> bool | None:
        """Compile into Triton's cache, as the first that is idle; for threads.

        Args:
            source: Triton's `ASTSource` of a kernel that lies in a module under its own name.
            options: of the compiler.

        Returns:
            Whether it was new there; None if it could not be compiled, or by none of them. Then whoever asked
            does it, and hears what Triton says.

        Raises:
            InterruptedError: `end` was called.
        """
        function = source.fn.fn
        request = (
            (function.__module__, function.__qualname__),
            (source.signature, source.constants, source.attrs),
            dict(options),
        )
        end = self._idle.get()
        answer = None
        if end is not None:
            try:
                end.send(request)
                if not end.poll(LONGEST):
                    raise EOFError("it hangs")
                answer = end.recv()
            except (EOFError, OSError):
                end = None  # it died; this place stays empty
            except Exception:  # what cannot be pickled was not sent, says `pickle` in several ways
                answer = None
        self._idle.put(end)
        if self._ended:
            raise InterruptedError("compiling was ended")
        return answer

    def end(self) -> None:
        """End all of them, at once if they are at work."""
        if self._ended or os.getpid() != self._owner:
            return
        self._ended = True
        self._control.close()
        deadline = time.monotonic() + (_PATIENCE if self._started else 0.0)
        gone = False  # the leader ends the others, of which it is the parent, before it goes
        while not gone and time.monotonic() < deadline:
            time.sleep(0.002)
            gone = self._is_gone(os.WNOHANG)
        if not gone:
            with contextlib.suppress(OSError):
                os.killpg(self._leader, signal.SIGKILL)
            self._is_gone(0)

    def _is_gone(self, how: int) -> bool:
        try:
            return os.waitpid(self._leader, how)[0] != 0
        except ChildProcessError:  # somebody else waited for it
            return True

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended


def fork_compilers() -> None:
    """Fork the leader, if there may be kernels to compile: to be called ahead of the first use of CUDA.

    Where it is too late for that, where processes cannot be forked or no more are allowed, and where there
    seems to be no GPU, nothing is done.
    """
    global _current
    if _current is None and _may_fork():
        with contextlib.suppress(OSError):  # no more processes or files are allowed: threads will do
            _current = Compilers(min(MOST, cores()))


def current() -> Compilers | None:
    """Those that `fork_compilers` forked, if they were not ended."""
    return None if _current is None or _current.ended else _current


@atexit.register
def end_compilers() -> None:
    """End what `fork_compilers` forked, if it did."""
    global _current
    ended, _current = _current, None
    if ended is not None:
        ended.end()


def cores() -> int:
    """Logical cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux binds a process to cores
        return os.cpu_count() or 1


def _may_fork() -> bool:
    return (
        sys.platform == "linux"
        and torch.version.cuda is not None
        and any(map(os.path.exists, GPU_FILES))
        and not torch.cuda.is_initialized()
        and os.environ.get("TRITON_INTERPRET") != "1"
        and requested_backend() != "torch"
        and has_triton()
    )


# -- in the processes ---------------------------------------------------------------------------------------


def _exit_after(work: Any, *arguments: Any) -> NoReturn:
    """What a forked process does, and its end; nothing of what this module's importer would do follows."""
    try:
        work(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def _lead(control: Connection, ends: list[Connection]) -> None:
    """The leader: prepare, wait, fork the others, wait, end them."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # whoever reads the output of the process that forked waits for nobody else
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it sends to its own group
    _prepare()
    try:
        target = control.recv()
    except (EOFError, OSError):
        return
    with contextlib.suppress(Exception):
        from triton.compiler.compiler import make_backend

        make_backend(target).hash()  # asks the assembler for its version
    children = []
    for end in ends:
        if child := os.fork():
            children.append(child)
            continue
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        control.close()
        for other in ends:
            if other is not end:
                other.close()
        _exit_after(_work, end, target)
    for end in ends:
        end.close()
    with contextlib.suppress(EOFError, OSError):
        control.recv()  # there is nothing to receive but the end
    os.killpg(0, signal.SIGTERM)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _prepare() -> None:
    """What every process needs: the compiler, its hash, and the modules of the kernels."""
    with contextlib.suppress(Exception):  # whatever it is, it shows where it matters, in a process that waits
        import triton.compiler
        import triton.experimental.gluon  # noqa: F401, which a first launch imports

        importlib.import_module("triton.runtime.cache").triton_key()
        importlib.import_module("triton.backends.nvidia.driver").library_dirs()  # asks where CUDA's lies
    for module in sorted(Path(__file__).parent.glob("*/triton.py")):
        with contextlib.suppress(Exception):
            importlib.import_module(f"{__package__}.{module.parent.name}.triton")


class _NoGPU:
    """Stands for Triton's driver: compiling must not ask it for anything."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"a process that compiles was to use CUDA (Triton's {name})")


def _work(end: Connection, target: Any) -> None:
    """Compile what comes, until nothing can come."""
    from triton import knobs
    from triton.runtime import driver

    news: list[bool] = []
    driver.set_active(_NoGPU())
    knobs.compilation.listener = lambda *, cache_hit, **_: news.append(not cache_hit)
    while True:
        try:
            request = end.recv()
        except (EOFError, OSError):
            return
        answer = None
        with contextlib.suppress(Exception):
            news.clear()
            _compile(target, *request)
            answer = any(news)
        try:
            end.send(answer)
        except OSError:
            return


def _compile(
    target: Any, place: tuple[str, str], parts: tuple[Any, Any, Any], options: dict[str, Any]
) -> None:
    import triton
    from triton.compiler import ASTSource

    module, name = place
    source = ASTSource(getattr(importlib.import_module(module), name), *parts)
    compiled = triton.compile(source, target=target, options=options)
    # Some versions of Triton have the C compiler make a launcher for each kernel. Where that needs a driver,
    # or fails, it is left to the process that launches.
    with contextlib.suppress(Exception):
        if target.backend == "cuda":
            importlib.import_module("triton.backends.nvidia.driver").CudaLauncher(source, compiled.metadata)
