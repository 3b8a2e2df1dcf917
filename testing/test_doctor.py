"""The doctor describes the machine and tests that training works."""

import io

import pytest
import torch
from rich.console import Console

from arbitor import doctor
from arbitor.cli import main
from arbitor.errors import UserError
from arbitor.ops import native, thresholds
from arbitor.train.device import Device


@pytest.fixture
def console():
    return Console(file=io.StringIO(), highlight=False)


def test_it_describes_the_machine_and_passes(console):
    assert doctor.examine(console) == 0
    printed = console.file.getvalue()
    for words in (
        "arbitor ",
        "python ",
        f"torch {torch.__version__}",
        "cyclopts ",
        "device ",
        "back end ",
        "threads ",
        "kernels " if torch.cuda.is_available() else "products ",
        "memory ",
        "disk ",
        "self-test: pack and decode: ok",
        "self-test: training step: ok",
    ):
        assert words in printed


def test_it_says_who_makes_the_passes(monkeypatch):
    monkeypatch.setattr(doctor.native, "found", lambda: native.Found(None, "cc", "cc failed: no space"))
    assert doctor.describe_passes() == "torch's, which are slower, since cc failed: no space"
    monkeypatch.setattr(doctor.native, "found", lambda: native.Found(object(), "/usr/bin/cc"))
    assert doctor.describe_passes() == "in C, compiled by /usr/bin/cc"
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    assert doctor.describe_passes() == "torch's, which ARB_TERNARY_BACKEND asks for"


@pytest.mark.parametrize("check", ["check_codec", "check_training_step"])
def test_a_failing_self_test_is_exit_code_1(console, monkeypatch, check):
    def broken(device):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor, check, broken)
    assert doctor.examine(console) == 1
    assert "FAILED: RuntimeError: no such thing" in console.file.getvalue()


def test_the_self_test_notices_training_that_does_nothing(monkeypatch):
    monkeypatch.setattr("arbitor.ternary.VoteOptimizer.step", lambda self: None)
    with pytest.raises(RuntimeError, match="changed nothing"):
        doctor.check_training_step(doctor.resolve_device("cpu"))


def test_the_self_test_notices_a_codec_that_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "trit_pack", lambda trits, pack=doctor.trit_pack: pack(-trits))
    with pytest.raises(RuntimeError, match="do not survive packing"):
        doctor.check_codec(doctor.resolve_device("cpu"))


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (99.0, True)])
def test_the_warning_is_printed(console, monkeypatch, load, warned):
    monkeypatch.setattr(doctor, "_load", lambda: load)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    assert doctor.examine(console) == 0
    printed = console.file.getvalue()
    assert ("warning: other programs keep about 99.0 of 2 cores busy" in printed) is warned
    assert f"2 on 2 logical cores; load {load:.1f} over the last minute" in printed


# -- thresholds ---------------------------------------------------------------------------------------------

GPU = Device(torch.device("cuda", 0), "a GPU", "asked for")


@pytest.fixture
def table(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setenv(thresholds.VARIABLE, str(tmp_path / "table.json"))
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "auto")
    monkeypatch.setattr(thresholds, "identity", lambda _: "this GPU")
    monkeypatch.setattr("arbitor.train.device.has_triton", lambda: True)
    thresholds.table.cache_clear()
    yield tmp_path / "table.json"
    thresholds.table.cache_clear()


def test_thresholds_are_shown_with_their_source(table, monkeypatch):
    shown = doctor.describe_thresholds(GPU)
    how = "`arbitor doctor --measure` measures them on this GPU"
    assert shown == f"few_tokens 8, few_expert_rows 16 (defaults; {how})"
    monkeypatch.setattr(thresholds, "measure", lambda _: {"few_tokens": 128, "few_expert_rows": 32})
    doctor.measure_thresholds(GPU)
    shown = doctor.describe_thresholds(GPU)
    assert shown.startswith(f"few_tokens 128, few_expert_rows 32 ({table}, measured 20")


def test_a_table_that_is_not_believed_is_shown_as_that(table):
    table.write_text("no JSON")
    table.chmod(0o600)
    with pytest.warns(UserWarning, match="is damaged"):
        shown = doctor.describe_thresholds(GPU)
    assert shown.startswith("few_tokens 8, few_expert_rows 16 (defaults: ")
    assert "is damaged" in shown


def test_without_a_gpu_or_kernels_there_is_nothing_to_measure(table, monkeypatch, capsys):
    if not torch.cuda.is_available():
        assert main(["doctor", "--measure"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("arbitor: error: there is nothing to measure: ")
        assert err.count("\n") == 1
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    with pytest.raises(UserError, match="nothing to measure: torch: the reference operations"):
        doctor.measure_thresholds(GPU)
    assert not table.exists()


@pytest.mark.gpu
def test_a_gpu_is_measured_by_the_command(table, capsys):
    assert main(["doctor", "--measure"]) == 0
    out = capsys.readouterr().out
    assert f"({table}, measured " in out
    assert "kernels " in out
