"""Runs in processes of their own, one GPU each where there are several."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from benchmarks.ablation.training import Job, Run, measure_on

Recorder = Callable[[Run, dict[str, str]], None]


@dataclass(frozen=True, slots=True)
class _Running:
    """A process, what it trains, and the GPU that it sees."""

    run: Run
    gpu: str | None
    process: BaseProcess


def run_all(runs: Sequence[Run], record: Recorder, job: Job, jobs: int) -> list[str]:
    """Train all runs, `jobs` at a time, and record each as soon as it is finished.

    A run that fails does not stop the others; whatever ends this function ends its processes.

    Args:
        runs: in the order in which they start.
        record: takes a finished run and its row.
        job: what they share.
        jobs: processes at a time; on GPUs they take turns, process n the n-th.

    Returns:
        A line for every run that failed.
    """
    gpus = visible_gpus() if job.device != "cpu" else [None]
    free = [gpus[number % len(gpus)] for number in range(jobs)]
    waiting = list(runs)
    running: dict[Connection, _Running] = {}
    failures = []
    try:
        while waiting or running:
            while waiting and free:
                receiver, started = _start(waiting.pop(0), free.pop(0), job)
                running[receiver] = started
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                done = running.pop(ready)
                outcome = _received(ready, done.process)
                free.append(done.gpu)
                if isinstance(outcome, str):
                    failures.append(f"{done.run}: {outcome}")
                else:
                    record(done.run, outcome)
    finally:
        for left in running.values():
            left.process.terminate()
            left.process.join()
    return failures


def visible_gpus() -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES that select one GPU each; a single None without CUDA."""
    if not torch.cuda.is_available():
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [*named.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]


def _start(run: Run, gpu: str | None, job: Job) -> tuple[Connection, _Running]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_measured, args=(sender, gpu, run, job), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of what can be received
    return receiver, _Running(run, gpu, process)


def _send_measured(sender: Connection, gpu: str | None, run: Run, job: Job) -> None:
    """In the process: send the row, or a line about what went wrong."""
    try:
        outcome: dict[str, str] | str = measure_on(gpu, run, job)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}".splitlines()[0]
    sender.send(outcome)


def _received(receiver: Connection, process: BaseProcess) -> dict[str, str] | str:
    """The row, or a line about what went wrong."""
    try:
        outcome: dict[str, str] | str = receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode} (killed, or out of memory?)"
    finally:
        receiver.close()
    process.join()
    return outcome
