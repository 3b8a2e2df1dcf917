"""A run so small that a step takes milliseconds."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arbitor.config import RunConfig, preset
from arbitor.data import open_corpus
from arbitor.train.checkpoint import Checkpoint
from arbitor.train.device import Device, deterministic, resolve_device
from arbitor.train.loop import Trainer
from testing.small_run import MODEL, one_thread  # noqa: F401 - a fixture that runs by itself

SMALL: dict[str, Any] = {
    **MODEL,
    "ctx": 16,
    "steps": 12,
    "batch": 4,
    "eval_steps": 4,
    "eval_interval": 4,
    "save_interval": 4,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arbitor.train.report.SAMPLE_BYTES", 12)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a text `data.txt` in it."""
    monkeypatch.chdir(tmp_path)
    lines = [f"line {i}: the value of f({i}) is {i * i % 97}\n" for i in range(300)]
    (tmp_path / "data.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the small run, for `start_training`."""
    return {**SMALL, "data": ["data.txt"]}


@pytest.fixture
def cpu() -> Device:
    return resolve_device("cpu")


@pytest.fixture
def make_config(settings: dict[str, Any]) -> Callable[..., RunConfig]:
    """make_config(**settings) -> configuration of the small run."""
    return lambda **changes: preset("tiny", **{**settings, **changes})


@pytest.fixture
def make_trainer(
    workplace: Path, cpu: Device, make_config: Callable[..., RunConfig]
) -> Callable[..., Trainer]:
    """make_trainer(steps_taken=0, checkpoint=None, **settings) -> trainer of the small run."""

    def make(steps_taken: int = 0, checkpoint: Checkpoint | None = None, **changes: Any) -> Trainer:
        config = make_config(**changes)
        corpus = open_corpus(config.data.data, min_bytes=config.model.ctx)
        with deterministic(config.train.seed, cpu.device):
            trainer = Trainer(config, corpus, cpu, checkpoint)
            for _ in range(steps_taken):
                trainer.take_step()
        return trainer

    return make


class _Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may handle it."""


@dataclass
class KillOutcome:
    """Whether the block was killed, or came to its end before the call was reached."""

    killed: bool = False


@pytest.fixture
def kill_at_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """kill_at_call(n): a block that dies at the n-th call that changes, opens or flushes a file."""

    @contextlib.contextmanager
    def kill(at: int) -> Iterator[KillOutcome]:
        outcome, count = KillOutcome(), 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def dying(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if count == at:
                    raise _Killed
                count += 1
                return call(*args, **kwargs)

            return dying

        with monkeypatch.context() as patch:
            for name in ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                yield outcome
            except _Killed:
                outcome.killed = True

    return kill
