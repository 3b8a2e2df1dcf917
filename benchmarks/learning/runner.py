"""Runs what a plan asks for in worker processes and writes each result at once."""

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np

from benchmarks.learning.contestants import Run
from benchmarks.learning.corpus import Texts
from benchmarks.learning.sizes import Size
from benchmarks.learning.training import Worker

Planner = Callable[[set[Run]], Sequence[Run]]
Recorder = Callable[[Run, dict[str, str]], None]


def run_all(
    plan: Planner,
    record: Recorder,
    size: Size,
    texts: Texts,
    *,
    device: str,
    jobs: int,
    minutes: float | None = None,
) -> bool:
    """Keep `jobs` processes busy with what `plan` offers until it offers nothing more, or the time is over.

    Args:
        plan: the runs that can start now, given those that are running.
        record: takes a finished run and its row.
        size: scale of the comparison.
        texts: what is trained and measured on.
        device: "cpu" or "cuda"; all processes share it.
        jobs: processes.
        minutes: after this long, runs that are not finished are abandoned; None is no limit.

    Returns:
        Whether everything was run.
    """
    start = time.time()
    deadline = float("inf") if minutes is None else start + 60 * minutes
    longest = 0.0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tempfile.TemporaryDirectory() as scratch:
        train_path, held_out_path = (str(Path(scratch, f"{part}.npy")) for part in ("train", "held_out"))
        np.save(train_path, texts.train)
        np.save(held_out_path, texts.held_out)
        with ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=functools.partial(
                Worker.start, size, train_path, held_out_path, device, threads, deadline
            ),
        ) as pool:
            running: dict[Future[dict[str, str] | None], tuple[Run, float]] = {}
            while True:
                busy = {run for run, _ in running.values()}
                for run in plan(busy)[: jobs - len(running)]:
                    if time.time() + longest < deadline:
                        running[pool.submit(Worker.measure, run)] = (run, time.time())
                if not running:
                    return not plan(set())
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, began = running.pop(future)
                    row = future.result()
                    if row is not None:
                        longest = max(longest, time.time() - began)
                        record(run, row)
