"""Kernels of a run are compiled ahead of it, once, and leave no trace in what it computes."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from arbitor.cli import main as cli_main
from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.ops import compilers, thresholds
from arbitor.ops.precompile import Compiled
from arbitor.train import ahead
from arbitor.train.device import Device

GPU = Device(torch.device("cuda", 0), "a GPU", "asked for")

# Trains twice on the CPU; ahead of the second time, and not of the first, steps are taken with launches left
# out, for a GPU that need not be there.
TRACES = """
import json, os
os.environ["TRITON_INTERPRET"] = "0"
import torch
from triton.runtime import driver, jit
from testing.ops.compile_kernels import Target
from arbitor.ops import backend
driver.set_active(Target())
kernels = []
backend.uses_triton = lambda _: bool(kernels)
from arbitor.train import ahead, session
from arbitor.train.device import Device
launched = []
jit.JITFunction.run = lambda kernel, *_, **__: launched.append(kernel)
before = session._train

def train(folder, config, corpus, device, *rest, **options):
    state = torch.get_rng_state()
    if folder.name == "ahead":
        kernels.append(1)
        shapes = lambda changes: ahead.step_shapes(config.model.ctx, changes)[:3]
        report = ahead._compile(config, Device(device.device, "", ""), 2, shapes, 2)
        kernels.clear()
        assert report.kernels > 20 and len(launched) == report.kernels
    assert torch.equal(torch.get_rng_state(), state)
    return before(folder, config, corpus, device, *rest, **options)

session._train = train
settings = json.loads(os.environ["SETTINGS"])
for run in ("plain", "ahead"):
    assert session.start_training(settings, run=run) == 0
"""


def test_compiling_ahead_leaves_no_trace_in_a_run(repository, workplace, settings):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", TRACES],
        env={**os.environ, "PYTHONPATH": path, "SETTINGS": json.dumps(settings)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain, after = (losses(workplace / "runs" / run) for run in ("plain", "ahead"))
    assert len(plain) == settings["steps"]
    assert plain == after


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.gpu
def test_a_run_on_a_gpu_compiles_once_and_trains_alike(workplace, settings, monkeypatch):
    workplace.chmod(0o700)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(workplace / "triton"))
    monkeypatch.setenv(thresholds.VARIABLE, str(workplace / "table.json"))
    flags = ["--preset", "tiny", "--device", "cuda", "--data", "data.txt", "--steps", "8", "--ctx", "64"]
    outputs = {}
    for run in ("first", "second"):
        command = [sys.executable, "-m", "arbitor", "train", *flags, "--run", run]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs[run] = done.stdout
    assert "kernels with" in outputs["first"]
    assert "process" in outputs["first"].partition("kernels with")[2].splitlines()[0]
    assert "kernels with" not in outputs["second"]
    assert losses(workplace / "runs" / "first") == losses(workplace / "runs" / "second") != []


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """compile_for_run on a GPU that is not there: a list of the shapes it asked for, and what it printed."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ahead, "uses_kernels", lambda: True)
    monkeypatch.setattr(thresholds, "identity", lambda _: "this GPU")
    monkeypatch.setattr(thresholds, "table", lambda _: thresholds.Table(thresholds.DEFAULTS))
    asked = []

    def compiled(config, device, threads, shapes, micro_batches):
        asked.append((shapes([64, 1024]), micro_batches))
        return Compiled(kernels=30, new=30, seconds=2.0, threads=4, processes=4, by_processes=30)

    monkeypatch.setattr(ahead, "_compile", compiled)
    said = []
    return lambda **settings: (
        ahead.compile_for_run(preset("tiny", **settings), GPU, said.append),
        asked,
        said,
    )


def test_what_was_compiled_is_said_once_and_remembered(fake_gpu, tmp_path):
    pytest.importorskip("triton")
    for _ in range(2):
        _, asked, said = fake_gpu(batch=2, ctx=64)
    assert asked == [([(2, 64)], 1)]
    assert said == ["compiled 30 kernels with 4 processes in 2.0 s"]
    fake_gpu(batch=64, ctx=128, accum=5)
    assert asked[1:] == [([(10, 117)], 2)], "a larger batch launches what one beyond the last change does"
    marks = list((tmp_path / "triton" / "arbitor").iterdir())
    assert len(marks) == 2
    for mark in marks:
        mark.unlink()
    fake_gpu(batch=2, ctx=64)
    assert len(asked) == 3


@pytest.mark.parametrize("settings", [{"steps": 7}, {"seed": 3}, {"batch": 3}, {"rule": "row"}, {"dim": 320}])
def test_what_changes_kernels_is_part_of_what_is_remembered(fake_gpu, settings):
    pytest.importorskip("triton")
    fake_gpu()
    _, asked, _ = fake_gpu(**settings)
    assert len(asked) == (1 if {"steps", "seed"} & {*settings} else 2)


def test_where_nothing_can_be_written_a_run_goes_on(fake_gpu, tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "triton").write_text("no folder")
    _, asked, said = fake_gpu()
    assert len(asked) == len(said) == 1


@pytest.mark.parametrize("reason", ["cpu", "no kernels", "audio", "no memory"])
def test_where_it_is_of_no_use_nothing_is_compiled_and_processes_end(fake_gpu, monkeypatch, reason):
    pytest.importorskip("triton")
    ended = []
    monkeypatch.setattr(compilers, "end_compilers", lambda: ended.append(True))
    config, device = preset("tiny"), GPU
    if reason == "cpu":
        device = Device(torch.device("cpu"), "cpu", "")
    if reason == "no kernels":
        monkeypatch.setattr(ahead, "uses_kernels", lambda: False)
    if reason == "audio":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, audio_task="codec"))
    if reason == "no memory":

        def full(*_):
            raise torch.cuda.OutOfMemoryError("full")

        monkeypatch.setattr(ahead, "_compile", full)
    said = []
    ahead.compile_for_run(config, device, said.append)
    assert (said, ended) == ([], [True])


def test_a_run_forks_ahead_of_its_first_look_at_the_gpu(workplace, settings, monkeypatch):
    done = []
    monkeypatch.setattr(compilers, "fork_compilers", lambda: done.append("forked"))

    def look(_):
        done.append("looked")
        raise UserError("that is all")

    monkeypatch.setattr("arbitor.train.session.resolve_device", look)
    for device in ("auto", "cpu"):
        assert cli_main(["train", "--data", "data.txt", "--device", device]) == 2
    assert done == ["forked", "looked", "looked"]


@pytest.mark.parametrize("ctx", [4, 16, 128, 4096])
def test_shapes_have_batches_between_each_two_changes_within_the_context(ctx):
    changes = [8, 64, 512, 1024, 2048]
    shapes = ahead.step_shapes(ctx, changes)
    assert all(4 <= length <= ctx for _, length in shapes)
    positions = [batch * (length - ahead.WINDOW) for batch, length in shapes]
    for low, high in zip([0, *changes], [*changes, 1 << 20], strict=True):
        assert any(low < number <= high for number in positions), (low, high)
    assert positions[0] == max(positions)


def test_turns_are_found_wherever_they_lie():
    ends = [1, 2, 3, 64, 65, 100, 4096, 100_000]
    assert list(ahead._turns(lambda size: sum(size > end for end in ends))) == ends
    assert list(ahead._turns(lambda size: 0)) == []
