"""Runs in processes of their own, one GPU each where there are several."""

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from benchmarks.ablation.training import Job, Run, measure_on

Recorder = Callable[[Run, dict[str, str]], None]


def run_all(runs: Sequence[Run], record: Recorder, job: Job, jobs: int) -> list[str]:
    """Train all runs, `jobs` at a time, and record each as soon as it is finished.

    A run that fails does not stop the others.

    Args:
        runs: in the order in which they start.
        record: takes a finished run and its row; called in this thread.
        job: what they share.
        jobs: processes at a time; on GPUs they take turns, process n the n-th.

    Returns:
        A line for every run that failed.
    """
    gpus = visible_gpus() if job.device != "cpu" else [None]
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for number in range(jobs):
        free.put(gpus[number % len(gpus)])

    def train(run: Run) -> dict[str, str]:
        gpu = free.get()
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                return process.submit(measure_on, gpu, run, job).result()
        finally:
            free.put(gpu)

    failures = []
    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(train, run): run for run in runs}
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    row = future.result()
                except BrokenProcessPool:
                    failures.append(f"{run}: its process died (killed, or out of memory)")
                except Exception as error:
                    failures.append(f"{run}: {type(error).__name__}: {error}".splitlines()[0])
                else:
                    record(run, row)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def visible_gpus() -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES that select one GPU each; a single None without CUDA."""
    if not torch.cuda.is_available():
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [*named.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]
