"""Schedule, metrics file, picture, device, display formats."""

import ctypes
import io
import json
import math
import platform
import subprocess
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console

from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.train import device as device_module
from arbitor.train.device import (
    deterministic,
    keep_freed_memory,
    process_memory,
    resolve_device,
    thread_count,
)
from arbitor.train.display import Display, format_bytes, format_seconds, printable
from arbitor.train.metrics import MetricsLog, read_metrics, seconds_so_far
from arbitor.train.plot import _round_step, plot_loss
from arbitor.train.schedule import default_peak, learning_rate


def test_the_schedule_warms_up_over_five_percent_and_ends_at_zero():
    rates = [learning_rate(step, 200, 0.05) for step in range(200)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == 0.05
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[105] == pytest.approx(0.025)  # the middle of the cosine
    assert 0 < rates[-1] < 1e-4 * 0.05
    assert learning_rate(200, 200, 0.05) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"steps": 1}, 0.05),
        ({"steps": 480}, 0.05),
        ({"steps": 1920}, 0.025),
        ({"steps": 48_000}, 0.005),
        ({"steps": 1920, "state": "compact"}, 0.035),
        ({"steps": 1920, "state": "lean"}, 0.075),
        ({"steps": 1920, "state": "lean", "rule": "sign"}, 0.05),  # of the tables
        ({"steps": 1920, "audio_rate": 8000, "audio_task": "listen"}, 0.05),
        ({"steps": 1920, "video_size": 8, "video_task": "flow"}, 0.05),
        ({"steps": 1920, "image_size": 16}, 0.05),
        ({"steps": 1920, "text_weight": 1.0}, 0.025),
        ({"steps": 1920, "text_weight": 1.0, "image_weight": 1.0, "image_size": 16}, 0.05),
    ],
)
def test_the_usual_peak_of_text_falls_with_the_root_of_the_length(settings, rate):
    assert default_peak(preset("tiny", **settings)) == pytest.approx(rate)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20])
def test_short_runs_have_a_rate_above_zero_in_every_step(steps, warmup):
    rates = [learning_rate(step, steps, 0.1, warmup) for step in range(steps)]
    assert all(0 < rate <= 0.1 for rate in rates)


def step_line(step: int, **changes):
    line = {
        "step": step,
        "bytes_seen": 100 * step,
        "loss": 2.0,
        "bits_per_byte": 2.0 / math.log(2),
        "lr": 0.1,
    }
    return {**line, "bytes_per_second": 50.0, "memory": 1, "flip_rate": 0.0, **changes}


def test_metrics_are_cut_back_to_a_step(tmp_path):
    log = MetricsLog(tmp_path)
    evaluation = {"step": 2, "held_out_bits_per_byte": 3.0, "held_out_bytes": 9, "seconds": 1.5}
    log.write(step_line(1), step_line(2), evaluation, step_line(3))
    assert seconds_so_far(log.path) == 3 * 2.0 + 1.5
    log.cut_after(2)
    log.write(step_line(3, loss=float("nan")))
    log.close()
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 2, 3]
    assert json.loads(log.path.read_text().splitlines()[-1])["loss"] is None


def test_an_unfinished_line_ends_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step_line(1)) + "\n" + json.dumps(step_line(2)))
    assert [line["step"] for line in read_metrics(path)] == [1]
    log = MetricsLog(tmp_path)
    log.cut_after(9)
    log.close()
    assert path.read_text() == json.dumps(step_line(1)) + "\n"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n",
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b"[1]\n",
        b"3\n",
        b'{"step": 2}\n',
        json.dumps(step_line(2, bytes_per_second=0)).encode() + b"\n",
        json.dumps(step_line(2, bytes_per_second=None)).encode() + b"\n",
        json.dumps(step_line(2, bytes_seen="many")).encode() + b"\n",
        json.dumps(step_line(-1)).encode() + b"\n",
        json.dumps(step_line(2.5)).encode() + b"\n",
        json.dumps(step_line(2, loss=[])).encode() + b"\n",
        b'{"step": 2, "held_out_bits_per_byte": 2.0, "held_out_bytes": 9, "seconds": null}\n',
        b'{"step": 2, "held_out_bits_per_byte": 2.0, "held_out_bytes": 9, "seconds": NaN}\n',
    ],
)
def test_a_damaged_line_costs_no_other_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    before, after = (json.dumps(step_line(step)).encode() + b"\n" for step in (1, 3))
    path.write_bytes(before + damage + after)
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    assert seconds_so_far(path) == 3 * 2.0
    plot_loss(path, tmp_path / "loss.png", "a run")
    log = MetricsLog(tmp_path)
    log.cut_after(3)
    log.close()
    assert path.read_bytes() == before + damage + after
    log = MetricsLog(tmp_path)
    log.cut_after(2)
    log.close()
    assert path.read_bytes() == before


def test_lines_that_the_disk_never_takes_are_an_error_at_the_end(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    assert log.write(step_line(1)) == "No space left on device"
    assert log.write(step_line(2)) is None, "told once"
    with pytest.raises(UserError, match=r"cannot write the last lines of .*metrics\.jsonl: No space left"):
        log.close()


def test_one_process_at_a_time(tmp_path):
    log = MetricsLog(tmp_path)
    with pytest.raises(UserError, match="is being trained by another process"):
        MetricsLog(tmp_path)
    log.close()
    MetricsLog(tmp_path).close()


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_a_picture_is_drawn_from_any_number_of_steps(tmp_path, count):
    lines = [step_line(i + 1, bits_per_byte=8 / (1 + i / 50)) for i in range(count)]
    lines += [{"step": count, "held_out_bits_per_byte": 2.5, "held_out_bytes": 9, "seconds": 1.0}] * (
        count > 1
    )
    lines += [step_line(count + 1, loss=None, bits_per_byte=None)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 540)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize("span", [1e-3, 0.9, 1.0, 7.3, 1e9])
def test_ticks_are_round_and_few(span):
    step = _round_step(span, 6)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert 2 <= span / step <= 6.01


def test_the_device_is_explained():
    assert resolve_device("cpu").reason == "asked for"
    automatic = resolve_device("auto")
    assert automatic.is_cuda == torch.cuda.is_available()
    assert automatic.reason
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_one_clear_error():
    with pytest.raises(UserError, match=r"^--device cuda: .*; use --device cpu"):
        resolve_device("cuda")


def test_compiled_kernels_that_others_could_write_are_refused_ahead_of_all_work(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setattr(device_module, "_why_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    tmp_path.chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "auto")
    with pytest.raises(UserError, match="would run as you, but everybody may write to"):
        resolve_device("cuda")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    assert resolve_device("cuda").name == "a GPU"
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "auto")
    tmp_path.chmod(0o700)
    assert resolve_device("cuda").name == "a GPU"


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_determinism_is_what_it_was_afterwards(mode):
    torch.set_deterministic_debug_mode(mode)
    before = torch.get_deterministic_debug_mode()
    try:
        with deterministic(0, torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_deterministic_debug_mode() == before
    finally:
        torch.set_deterministic_debug_mode("default")


def test_settings_of_torch_are_put_back():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with deterministic(3, torch.device("cpu")), thread_count(2):
        assert torch.are_deterministic_algorithms_enabled()
        first = torch.rand(1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    with deterministic(3, torch.device("cpu")):
        assert torch.equal(torch.rand(1), first)


def test_figures_for_people():
    assert [format_bytes(n) for n in (0, 999, 1000, 1234567, 999_600, 2.5e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "1000 kB",
        "2.5 GB",
    ]
    assert [format_seconds(n) for n in (0, 61, 3600 * 3 + 62)] == ["0:00", "1:01", "3:01:02"]
    assert printable("a\x1b[2J\tb\nc\x9b") == "a\ufffd[2J\tb\nc\ufffd"
    assert process_memory() > 1 << 20


def test_progress_of_what_has_no_steps(monkeypatch):
    """On a terminal a bar; elsewhere a line every ten seconds, and none for what is over before."""
    clock = iter([0.0, 4.0, 11.0, 12.0, 30.0, 31.0])
    monkeypatch.setattr("arbitor.train.display.time.monotonic", lambda: next(clock))
    plain = Console(file=io.StringIO(), highlight=False)
    display = Display(plain)
    for done in range(1, 7):
        display.progress("measuring: window", done, 6)
    assert plain.file.getvalue() == "measuring: window 3/6\nmeasuring: window 5/6\n"
    monkeypatch.setattr("arbitor.train.display.time.monotonic", iter(range(100)).__next__)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    with Display(terminal) as display:
        display.progress("measuring: window", 1, 4)
    assert "measuring: window 1/4" in terminal.file.getvalue()
    assert "25 %" in terminal.file.getvalue()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_c_library_takes_the_settings_that_keep_freed_memory():
    code = "from arbitor.train.device import keep_freed_memory as keep; raise SystemExit(not keep())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_c_library_keeps_its_ways(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
