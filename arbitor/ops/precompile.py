"""Compiles the Triton kernels that some work launches, at once and without launching them.

A cold start would otherwise compile one kernel after the other, each when it is first launched. Here the work
runs with its launches left out, and what it would have launched is compiled meanwhile: by processes where
they were forked in time (see `arbitor.ops.compilers`), else by threads, which have to take turns in the parts
of Triton's compiler that are Python. What was compiled is ready in this process and lies in Triton's cache
for others.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arbitor.ops import compilers

MAX_THREADS = 16


@dataclass(slots=True)
class Compiled:
    """What was compiled, complete when `compiled_ahead` ends.

    Attributes:
        kernels: different ones that the work launches.
        new: of these, not found in Triton's cache.
        seconds: that the work and the compiling took.
        threads: that compiled, or waited for processes and loaded what these compiled.
        processes: that compiled; 0 if it was done in threads of this one.
        by_processes: of the kernels, those that processes compiled or found.
    """

    kernels: int = 0
    new: int = 0
    seconds: float = 0.0
    threads: int = 0
    processes: int = 0
    by_processes: int = 0


@contextlib.contextmanager
def compiled_ahead(
    device: torch.device, threads: int | None = None, processes: compilers.Compilers | None = None
) -> Iterator[Compiled]:
    """Inside, launches are left out and their kernels compiled; the end waits for all of them.

    Whatever the work computes is worthless, since kernels would have written zeros: what it may change must
    be thrown away afterwards. No other thread may launch kernels meanwhile.

    Args:
        device: a GPU, for which is compiled.
        threads: that compile; None takes one for each core, 16 at most, or for each process.
        processes: that compile; None takes those of `fork_compilers`, unless `threads` are given.

    Raises:
        Exception: a kernel could not be compiled; what Triton said.
    """
    from triton import knobs
    from triton.runtime import driver, jit

    if processes is None and threads is None:
        processes = compilers.current()
    driver.active.get_current_device()  # made here, once, and not by all threads
    if processes is not None:
        processes.start(driver.active.get_current_target())
    report = Compiled(
        threads=threads or (processes.count if processes else min(MAX_THREADS, compilers.cores())),
        processes=processes.count if processes else 0,
    )
    compile_now = jit.JITFunction.run
    compiling: dict[Any, Future[None]] = {}
    in_processes: dict[Any, Callable[..., Any]] = {}  # kernels, and how they were compiled before
    counting = threading.Lock()

    def note(*, cache_hit: bool, **_: object) -> None:
        with counting:
            report.new += not cache_hit

    def in_a_process(here: Callable[..., Any], source: Any, options: dict[str, Any], **rest: Any) -> Any:
        assert processes is not None
        new = processes.compile(source, options)
        if new is not None:
            with counting:
                report.by_processes += 1
                report.new += new
        return here(source, options=options, **rest)  # which finds it, or compiles it after all

    def work(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = compile_now(kernel, *arguments, grid=None, warmup=True, **options)
        if device.type == "cuda" and hasattr(compiled, "_init_handles"):
            compiled._init_handles()  # makes or loads its launcher, and loads it onto the GPU

    def submit(kernel: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        key = specialization(kernel, arguments, options)
        if key not in compiling:
            kernel.device_caches[driver.active.get_current_device()]  # as above
            if processes is not None and kernel not in in_processes:
                in_processes[kernel] = kernel.compile
                kernel.compile = functools.partial(in_a_process, kernel.compile)
            compiling[key] = pool.submit(work, kernel, arguments, options)

    began = time.perf_counter()
    listener = knobs.compilation.listener
    with ThreadPoolExecutor(report.threads, initializer=_use, initargs=(device,)) as pool:
        jit.JITFunction.run = submit
        knobs.compilation.listener = note
        try:
            with _zeros():
                yield report
            for future in compiling.values():
                future.result()
        except BaseException:
            if processes is not None:
                processes.end()  # or threads would wait for what they are at
            raise
        finally:
            jit.JITFunction.run = compile_now
            pool.shutdown(cancel_futures=True)
            knobs.compilation.listener = listener
            for kernel, here in in_processes.items():
                kernel.compile = here
    report.kernels = len(compiling)
    report.seconds = time.perf_counter() - began


def specialization(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What makes Triton compile a kernel anew: types, alignment, ones, multiples of 16, constants, options.

    Args:
        kernel: a JIT function.
        arguments: positional ones of a launch.
        options: the others, all of them constants or options of the compiler.
    """
    kinds = [_kind(value, parameter) for value, parameter in zip(arguments, kernel.params, strict=False)]
    return kernel, *kinds, *sorted(options.items())


def _kind(value: Any, parameter: Any) -> tuple[Any, ...]:
    if parameter.is_constexpr:
        return (value,)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(1 << 31) <= value < 1 << 31
        return (int, wide) if parameter.do_not_specialize else (int, wide, value == 1, value % 16 == 0)
    return (type(value),)


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextlib.contextmanager
def _zeros() -> Iterator[None]:
    """Inside, new tensors are zeros: as good as any values, and indices made of them stay inside."""

    def zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: make(*args, **options).zero_()

    makers: dict[str, Callable[..., Tensor]] = {"empty": torch.empty, "empty_like": torch.empty_like}
    for name, make in makers.items():
        setattr(torch, name, zeroed(make))
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)
