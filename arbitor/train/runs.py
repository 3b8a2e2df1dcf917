"""Folders of runs: `./runs/<preset>-1`, `-2`, ...; how they are named, found, made and emptied."""

import contextlib
import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arbitor.config import RUNS
from arbitor.errors import UserError
from arbitor.train import swap
from arbitor.train.learnt import assumption, lacks, learnt_of, maker, refusal, tells_before

CONFIG_FILE = "config.toml"
FINETUNE_FILE = "finetune.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
CHECKPOINTS = ("best", "latest", "final")  # in the order in which a model is looked for


def run_path(name: str) -> Path:
    """Where the run `name` lies.

    Raises:
        UserError: the name is not one plain component of a path.
    """
    if not is_name(name):
        raise UserError(
            f"--run {name!r} is no name of a run: use letters, digits, '-', '_' and '.', "
            "neither '-' nor '.' at the beginning, no '/'"
        )
    return RUNS / name


def is_name(text: str) -> bool:
    """Whether a run may be called so."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None


def list_runs() -> list[Path]:
    """All runs, newest first."""
    if not RUNS.is_dir():
        return []
    found = [path for path in RUNS.iterdir() if (path / CONFIG_FILE).is_file() and not is_former(path)]
    return sorted(found, key=_age, reverse=True)


def existing_run(name: str | None) -> Path:
    """The run of that name; without a name the newest that can be resumed, or that is finished.

    Raises:
        UserError: there is none.
    """
    if name is None:
        runs = list_runs()
        if not runs:
            raise UserError(f"there is no run under ./{RUNS}; `arbitor train` makes one")
        return next((run for run in runs if is_finished(run) or _checkpoint_of(run)), runs[0])
    path = run_path(name)
    if not (path / CONFIG_FILE).is_file():
        if found := _checkpoint_of(path):
            raise UserError(f"{path} has lost its {CONFIG_FILE}; put it back from {found / CONFIG_FILE}")
        raise UserError(f"there is no run {name!r} under ./{RUNS}{_suggestion(name)}")
    return path


def refuse_existing(name: str) -> None:
    """Raise UserError if something of that name exists."""
    path = run_path(name)
    if not path.exists():
        return
    if (path / CONFIG_FILE).is_file() and (is_finished(path) or _checkpoint_of(path)):
        raise UserError(
            f"the run {name!r} exists: continue it with --resume, start it anew with --reset, "
            "or choose another --run"
        )
    raise UserError(
        f"the run {name!r} exists, without a checkpoint to go on from: start it anew with --reset, or choose "
        "another --run"
    )


def make_run(preset: str, name: str | None = None) -> Path:
    """Make the folder of a new run, named `<preset>-<number>` unless a name is given.

    Raises:
        UserError: the name is taken, or the folder cannot be made.
    """
    try:
        RUNS.mkdir(exist_ok=True)
        if name is not None:
            refuse_existing(name)
            path = run_path(name)
            path.mkdir()
            return path
        number = 1
        while True:
            path = RUNS / f"{preset}-{number}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
    except OSError as error:
        reason = f"{RUNS} is a file" if RUNS.is_file() else error.strerror
        raise UserError(
            f"cannot make a run under {RUNS.resolve()}: {reason}; train in a folder that you may write to, "
            f"where {RUNS} is a folder or not there"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[None]:
    """While a run is made anew: the one that there was lies aside, and is deleted once that is done.

    It comes back if the new one leaves neither a checkpoint nor a summary. A process that is killed meanwhile
    leaves it in `former_of(path)`.

    Raises:
        UserError: the folder holds something else than a run, or cannot be moved.
    """
    _refuse_no_run(path)
    former = former_of(path)
    if former.exists() and not _is_of_use(path):  # of a process that was killed
        remove_run(path)
    else:
        forget_former(path)
        try:
            path.rename(former)
        except OSError as error:
            raise UserError(f"cannot move {path} aside: {error.strerror}") from error
    try:
        yield
    finally:
        if _is_of_use(path):
            forget_former(path)
        else:
            if path.exists():
                remove_run(path)
            former.rename(path)


def former_of(path: Path) -> Path:
    """Where a run lies that is being replaced."""
    return path.with_name(f".{path.name}.former")


def put_back(path: Path) -> None:
    """Put a run back that a `replacing` which was killed has moved, if nothing is in its place."""
    if not path.exists() and former_of(path).is_dir():
        with contextlib.suppress(OSError):
            former_of(path).rename(path)


def is_former(path: Path) -> bool:
    """Whether a folder is a run that is being replaced."""
    return path.name.startswith(".") and path.name.endswith(".former")


def forget_former(path: Path) -> None:
    """Delete what a run has replaced, if that is still there."""
    if former_of(path).is_dir():
        remove_run(former_of(path))


def _is_of_use(path: Path) -> bool:
    return _checkpoint_of(path) is not None or is_finished(path)


def remove_run(path: Path) -> None:
    """Delete a run; anything that is not one is refused.

    Raises:
        UserError: the folder holds something else, or cannot be removed.
    """
    _refuse_no_run(path)
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from error


def _refuse_no_run(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    if not is_folder or not ((path / CONFIG_FILE).is_file() or _is_beginning(path)):
        raise UserError(f"{path} is not a run (it has no {CONFIG_FILE}); it stays as it is")


def remove_if_untrained(path: Path) -> None:
    """Delete a run that never took a step, if it can be deleted."""
    metrics = path / METRICS_FILE
    with contextlib.suppress(OSError, UserError):
        if not _checkpoint_of(path) and not (metrics.exists() and metrics.stat().st_size):
            remove_run(path)


def _is_beginning(path: Path) -> bool:
    """Whether a folder holds nothing, or what a run holds whose settings were never written."""
    return all(
        (entry.name == METRICS_FILE and entry.is_file() and not entry.stat().st_size)
        or entry.name.startswith(f".{CONFIG_FILE}.tmp-")
        for entry in path.iterdir()
    )


def is_finished(path: Path) -> bool:
    """Whether the run in `path` reached its last step, and its summary can be read."""
    return bool(read_summary(path))


def read_summary(path: Path) -> dict[str, Any]:
    """`summary.json` of a finished run; empty if there is none, or none with its figures in it."""
    try:
        summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(summary, dict) or type(summary.get("steps")) is not int:
        return {}
    figure = summary.get("figure", "bits_per_byte")
    return summary if type(summary.get(f"held_out_{figure}")) is float else {}


def find_checkpoint(
    given: str | Path | None = None, wanted: Sequence[str] = (), *, made_by: str | None = None
) -> Path:
    """The checkpoint folder that a command means.

    Args:
        given: name of a run, folder of a run, checkpoint folder, or its `model.safetensors`; None is the
            newest run that has a checkpoint and has learnt what is wanted. Of a run, `best` is taken, else
            `latest`, else `final`.
        wanted: what it must have learnt one of, of `arbitor.config.LEARNT`; empty is anything. A checkpoint
            without settings is taken for what it may have learnt; so is one that is given, with a note, if
            its settings do not say what was learnt before.
        made_by: command that is named where there is no run at all; default the one for what is wanted.

    Raises:
        UserError: there is none, or it has learnt something else.
    """
    made_by = made_by or maker(wanted)
    if given is None:
        if found := newest_checkpoint(wanted):
            return found
        folder = newest_checkpoint()
        if folder is None:
            problem = (
                f"no run under ./{RUNS} has a checkpoint"
                if list_runs()
                else f"there is no run under ./{RUNS}"
            )
            raise UserError(f"{problem}; `{made_by}` makes one")
    else:
        folder = _named_checkpoint(given, made_by)
    refuse_unlearnt(folder, learnt_of(folder), wanted, given is None or tells_before(folder))
    return folder


def refuse_unlearnt(folder: Path, learnt: Sequence[str] | None, wanted: Sequence[str], is_all: bool) -> None:
    """Raise UserError if a checkpoint is known to have learnt nothing of what is `wanted`.

    Args:
        folder: the checkpoint, or an adapter's folder.
        learnt: what it has learnt; None if that is not known.
        wanted: as `find_checkpoint` takes it.
        is_all: whether that is all it has learnt; else nothing but a note is written.
    """
    if learnt is None or not lacks(learnt, wanted):
        return
    if not is_all:
        print(f"arbitor: note: {assumption(folder, learnt, wanted)}", file=sys.stderr)
        return
    other = newest_checkpoint(wanted, known=True)
    raise UserError(
        refusal(folder, name_of(folder), learnt, wanted, None if other is None else name_of(other))
    )


def newest_checkpoint(wanted: Sequence[str] = (), *, known: bool = False) -> Path | None:
    """The newest run's checkpoint that may have learnt what is `wanted`, as `find_checkpoint` takes it.

    Args:
        wanted: any of these.
        known: leave out checkpoints whose settings cannot be read.
    """
    for folder in filter(None, map(_checkpoint_of, list_runs())):
        learnt = learnt_of(folder)
        if not lacks(learnt, wanted) and not (known and learnt is None):
            return folder
    return None


def name_of(checkpoint: Path) -> str:
    """What a command calls a checkpoint: its run, if that means this one, else its path."""
    run = checkpoint.parent
    return run.name if run.parent == RUNS and _checkpoint_of(run) == checkpoint else str(checkpoint)


def _named_checkpoint(given: str | Path, made_by: str) -> Path:
    name, path = str(given), Path(given)
    is_part = bool(name) and not name.startswith(".") and name == os.path.basename(name)
    if is_part and ((RUNS / name / CONFIG_FILE).is_file() or _checkpoint_of(RUNS / name)):
        path = RUNS / name
    if path.is_file():
        if path.name != MODEL_FILE:
            raise UserError(f"{given} is no checkpoint: give its folder, its {MODEL_FILE}, or a run")
        path = path.parent
    if (path / MODEL_FILE).exists():
        return path
    if found := _checkpoint_of(path):
        if not (found / MODEL_FILE).exists() and (found / ADAPTER_FILE).exists():
            raise UserError(
                f"{found} is an adapter, which is no model without its base: `arbitor generate` and `arbitor "
                "chat` take it as it is; else give the base"
            )
        return found
    if swap.locate(path) != path:
        return swap.locate(path)
    if (path / CONFIG_FILE).is_file():
        raise UserError(
            f"the run {path} has no checkpoint (trained with --no-save, or stopped before its first)"
        )
    if path.exists():
        raise UserError(f"{path} is neither a run nor a checkpoint: it holds no {MODEL_FILE}")
    raise UserError(f"there is no run or checkpoint {name!r}{_suggestion(name, made_by)}")


def _checkpoint_of(run: Path) -> Path | None:
    for name in CHECKPOINTS:
        folder = swap.locate(run / name)
        if folder.is_dir():
            return folder
    return None


def _age(run: Path) -> tuple[int, int, str]:
    digits = run.name.rpartition("-")[2]
    return (run / CONFIG_FILE).stat().st_mtime_ns, int(digits) if digits.isdecimal() else 0, run.name


def _suggestion(name: str, made_by: str = "arbitor train") -> str:
    names = [run.name for run in list_runs()]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    more = ", ..." if len(names) > 5 else ""
    return f"; runs: {', '.join(names[:5])}{more}" if names else f"; `{made_by}` makes one"
