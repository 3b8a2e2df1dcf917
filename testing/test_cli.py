"""The command line: verbs, help, and every kind of bad input as one line and exit code 2."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import arbitor
from arbitor import __main__ as command
from arbitor.cli import main
from arbitor.config import PRESETS, load_config, preset
from arbitor.train.loop import Trainer

TOML = """
[model]
dim = 32
num_prelude_layers = 1
num_heads = 2
head_dim = 8
rope_dim = 8
value_dim = 16
kv_latent_dim = 32
ffn_dim = 64
ctx = 16
[train]
steps = 3
batch = 4
eval_steps = 4
device = "cpu"
"""
TRAIN = ["train", "--data", "data.txt", "--config", "small.toml"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a data file, a config file and a finished run `done`."""
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("arbitor.train.report.SAMPLE_BYTES", 12)
        lines = [f"line {i}: the value of f({i}) is {i * i % 97}\n" for i in range(100)]
        Path("data.txt").write_text("".join(lines))
        Path("small.toml").write_text(TOML)
        assert main([*TRAIN, "--run", "done"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained` as the current folder."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("arbitor.train.report.SAMPLE_BYTES", 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "here"
    torch.set_num_threads(threads)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under `folder`, with the content of its files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(workplace, capsys):
    """refused(arguments, words): exit code 2, one line with these words, nothing on disk changed."""

    def check(arguments: list[str], *words: str) -> None:
        before = tree(workplace)
        capsys.readouterr()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("arbitor: error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.endswith("\n")
        for word in words:
            assert word in captured.err
        assert captured.out == ""
        assert tree(workplace) == before

    return check


# -- what is refused ----------------------------------------------------------------------------------------


def test_bad_data(refused, workplace):
    (workplace / "empty.txt").touch()
    (workplace / "short.txt").write_text("short")
    (workplace / "folder").mkdir()
    (workplace / "folder" / "binary").write_bytes(bytes(100))
    small = ["--config", "small.toml"]
    refused(["train", "--data", "nowhere.txt", *small], "nowhere.txt")
    refused(["train", "--data", "empty.txt", *small], "empty.txt")
    refused(["train", "--data", "short.txt", *small], "short.txt", "context")
    refused(["train", "--data", "folder", *small], "folder")
    refused(["train", "--data", "*.nothing", *small], "*.nothing")
    refused(["train", "--data", "data.txt", "--held-out", "2", *small], "--held-out")
    refused(["eval", "--data", "nowhere.txt"], "nowhere.txt")
    refused(["eval", "--data", "empty.txt"], "empty.txt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "small.toml", "--data"],
        ["train", "--config", "small.toml", "--data", "data.txt", "--held-out"],
        ["train", "--enable-vision", "--config", "small.toml", "--data"],
        ["train", "--enable-audio", "--config", "small.toml", "--data"],
        ["eval", "--data"],
        ["finetune", "done", "--data"],
        ["diffusion", "--data"],
        ["pretrain", "--config", "small.toml", "--code-data"],
    ],
)
def test_nobodys_home_is_one_line(arguments, refused):
    refused([*arguments, "~nobody-of-that-name/x"], "no such file or folder: '~nobody-of-that-name/x'")


def test_a_run_that_was_moved_is_no_data(refused, workplace):
    (workplace / "runs").rename(workplace / "moved")
    refused(
        ["train", "--data", "moved"], "no text files in the folder 'moved' (skipped 1 holding a run; a file"
    )


def test_bad_settings(refused, workplace):
    refused(["train", "--preset", "tinny"], "tinny", "did you mean 'tiny'?")
    refused([*TRAIN, "--steps", "0"], "error: --steps must be between 1")
    refused([*TRAIN, "--batch", "-1"], "error: --batch must be between 1")
    refused([*TRAIN, "--lr", "nan"], "error: --lr must be finite")
    refused([*TRAIN, "--ctx", "3"], "error: --ctx must be between 4")
    refused(
        [*TRAIN, "--accum-threshold", "500"], "error: --accum-threshold must be between 2 and 127, got 500"
    )
    refused(["train", "--resume", "--eval-steps", "0"], "error: --eval-steps must be between 1")
    refused(["smoke", "--preset", "tiny", "--ctx", "3"], "error: --ctx must be between 4")
    (workplace / "typo.toml").write_text("[train]\nstpes = 3\n")
    refused(["train", "--config", "typo.toml"], "typo.toml", "stpes", "did you mean 'steps'?")
    (workplace / "type.toml").write_text("[train]\nsteps = 'many'\n")
    refused(["train", "--config", "type.toml"], "type.toml", "steps", "integer")
    (workplace / "broken.toml").write_text("[train\n")
    refused(["train", "--config", "broken.toml"], "broken.toml")
    refused(["train", "--config", "nowhere.toml"], "nowhere.toml")
    refused(["train", "--config", "small.toml", "--preset", "enormous"], "enormous")


def test_bad_command_lines(refused):
    refused(["trian"], "trian", 'Did you mean "train"?')
    refused(["train", "--setps", "3"], "--setps", "Did you mean --steps?")
    refused(["train", "--steps", "three"], "--steps", "three")
    refused(["train", "--steps"], "--steps")
    refused(["train", "--steps", "3", "--steps", "4"], "--steps")
    refused(["train", "tiny"], "unexpected argument 'tiny'")
    refused(["train", "--state", "ful"], "--state", 'Did you mean "full"?')
    refused(["train", "--resume=3"], "--resume")
    refused(["train", "--enable-vision", "--image-size", "0"], "--enable-vision", "--image-size 0")
    refused([*TRAIN, "--enable-vision", "--image-patch", "5"], "no multiple of image_patch 5")
    refused(["train", "--enable-memory", "--memory-rows", "0"], "--enable-memory", "--memory-rows 0")
    refused([*TRAIN, "--memory-rows", "-5"], "--memory-rows must be between 0")
    refused([*TRAIN, "--max-moe-iters", "0"], "--max-moe-iters must be between 1")
    refused(["--bogus"], "--bogus")
    refused(["eval"], "--data")


def test_bad_names_of_runs(refused):
    refused([*TRAIN, "--run", "done"], "'done' exists", "--resume", "--reset")
    for name in ("../elsewhere", "a b", "a\nb", "''", "-a", ".a", ""):
        refused([*TRAIN, f"--run={name}"], f"--run {name!r} is no name of a run")
    refused([*TRAIN, "--reset"], "--reset", "--run")
    refused([*TRAIN, "--run", "done", "--reset", "--resume"], "--resume", "--reset")
    refused(["train", "--resume", "--run", "don"], "did you mean 'done'?")
    refused(["train", "--resume", "--lr", "0.5"], "--lr 0.5 contradicts")
    refused(["train", "--resume", "--enable-memory"], "--enable-memory contradicts", "memory_rows = 0")
    refused(["train", "--resume", "--run", "don", "--disable-vq"], "did you mean 'done'?")
    refused(["generate", "don"], "did you mean 'done'?")
    refused(["eval", "nowhere", "--data", "data.txt"], "nowhere")
    refused(["audit", "nowhere"], "nowhere")


def test_a_batch_that_no_machine_holds(refused):
    refused([*TRAIN, "--batch", "2147483648", "--run", "large"], "--batch 2147483648", "--accum")


@pytest.mark.parametrize("verb", ["train", "finetune", "eval"])
def test_data_without_a_value_is_not_the_embedded_data(refused, verb):
    refused([verb, "--data"], "parameter --data requires at least 1")
    refused([verb, "--data", "--device", "cpu"], "parameter --data requires at least 1")


def test_a_reset_with_bad_data_deletes_nothing(refused):
    refused(["train", "--run", "done", "--reset", "--data", "nowhere.txt"], "nowhere.txt")


def test_a_reset_that_comes_to_nothing_keeps_what_was_there(refused, workplace, monkeypatch, capsys):
    reset = [*TRAIN, "--run", "done", "--reset"]
    refused([*reset, "--batch", "2147483648"], "--batch 2147483648")
    take_step = Trainer.take_step

    def fail(trainer):
        if trainer.step == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", fail)
    before = tree(workplace)
    assert main(reset) == 2
    assert capsys.readouterr().err.startswith("arbitor: error: out of memory; a smaller --batch")
    assert tree(workplace) == before


def test_what_a_killed_reset_left_is_found_again(workplace, capsys):
    """Neither listed nor lost; gone once there is something in its place."""
    run, former = workplace / "runs" / "done", workplace / "runs" / ".done.former"
    run.rename(former)
    run.mkdir()
    shutil.copy(former / "config.toml", run)
    assert main(["train", "--resume", "--run", "done"]) == 2
    assert "(what --reset was replacing is in runs/.done.former)" in capsys.readouterr().err
    assert main(["eval", "--data", "data.txt"]) == 2
    assert main([*TRAIN, "--run", "done", "--reset", "--steps", "2"]) == 0
    assert not former.exists()
    assert main(["eval", "--data", "data.txt"]) == 0
    run.rename(former)
    assert main([*TRAIN, "--run", "done"]) == 2  # it is there again
    assert "the run 'done' exists: continue it with --resume" in capsys.readouterr().err
    run.rename(former)
    assert main(["train", "--resume", "--run", "done"]) == 0
    assert "'done' is finished" in capsys.readouterr().out


def test_a_run_without_its_settings_is_no_dead_end(refused, workplace, capsys):
    run = workplace / "runs" / "done"
    (run / "config.toml").unlink()
    refused(["train", "--resume", "--run", "done"], "lost its config.toml", "runs/done/best/config.toml")
    assert main(["eval", "done", "--data", "data.txt"]) == 0


def test_bad_checkpoints(refused, workplace):
    model = workplace / "runs" / "done" / "best" / "model.safetensors"
    data = model.read_bytes()
    verbs = [["generate", "done"], ["eval", "done", "--data", "data.txt"]]
    for damaged, word in (
        (data[:-7], "model.safetensors is damaged or cut short"),
        (data[:20], "model.safetensors is damaged or cut short"),
        (b"", "model.safetensors is damaged or cut short"),
        (data + b"\0", "model.safetensors is damaged or cut short"),
        (data[:-1] + bytes([data[-1] ^ 1]), "model.safetensors is damaged: the checksum of tensor"),
        (struct.pack("<Q", 1 << 62) + data[8:], "model.safetensors is damaged or cut short"),
    ):
        model.write_bytes(damaged)
        for verb in verbs:
            refused(verb, word)
    save_file({"weight": torch.zeros(2, 2)}, model)
    for verb in verbs:
        refused(verb, "was not written by arbitor")


def test_resuming_from_a_truncated_checkpoint_or_another_models(refused, workplace, monkeypatch, capsys):
    (workplace / "runs" / "done" / "summary.json").unlink()
    for name in ("best", ".latest.previous"):
        shutil.rmtree(workplace / "runs" / "done" / name, ignore_errors=True)
    latest = workplace / "runs" / "done" / "latest"
    model = latest / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])
    refused(["train", "--resume"], "cannot resume", "model.safetensors is damaged or cut short")
    model.write_bytes(data)
    (workplace / "wide.toml").write_text(TOML.replace("ffn_dim = 64", "ffn_dim = 96"))
    assert main(["train", "--data", "data.txt", "--config", "wide.toml", "--run", "wide"]) == 0
    shutil.rmtree(latest)
    shutil.copytree(workplace / "runs" / "wide" / "latest", latest)
    refused(["train", "--resume", "--run", "done"], "of another model: ffn_dim is 96 there, 64 in this run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_is_not_there(refused):
    refused([*TRAIN, "--device", "cuda"], "--device cuda", "use --device cpu")
    refused(["generate", "--device", "cuda"], "--device cuda")
    refused(["eval", "--data", "data.txt", "--device", "cuda"], "--device cuda")


@pytest.mark.parametrize(
    ("value", "words"),
    [("tritn", "must be one of auto, triton, torch"), ("triton", "Triton is not installed")],
)
def test_a_back_end_that_is_not_there(refused, capsys, monkeypatch, value, words):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", value)
    monkeypatch.setattr("arbitor.ops.backend.has_triton", lambda: False)
    smoke = ["smoke", "--preset", "tiny"]
    for verb in (TRAIN, ["generate", "done"], ["eval", "done", "--data", "data.txt"], smoke):
        refused(verb, f"ARB_TERNARY_BACKEND is '{value}'", words)
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("arbitor ")  # what is installed is told all the same
    assert captured.err.startswith(f"arbitor: error: ARB_TERNARY_BACKEND is '{value}'")


def test_bad_sampling_settings(refused):
    refused(["generate", "done", "--temperature", "-1"], "error: --temperature is -1")
    refused(["generate", "done", "--top-p", "2"], "error: --top-p is 2")
    refused(["generate", "done", "--bytes", "-1"], "error: --bytes is -1")


def test_no_run_at_all(workplace, refused):
    shutil.rmtree(workplace / "runs")
    for verb in (["generate"], ["eval", "--data", "data.txt"], ["audit"], ["train", "--resume"]):
        refused(verb, "there is no run under ./runs", "`arbitor train` makes one")
    for arguments, maker in (
        (["finetune"], "arbitor train"),
        (["finetune", "--enable-vision"], "arbitor train --enable-vision"),
        (["finetune", "--enable-audio"], "arbitor audio"),
        (["finetune", "nowhere", "--enable-audio", "--task", "speak"], "arbitor audio"),
        (["finetune", "--enable-video"], "arbitor diffusion"),
        (["generate", "--image", "x.png"], "arbitor train --enable-vision"),
        (["audio", "--say", "seven"], "arbitor audio --task speak"),
        (["diffusion", "--sample", "seven"], "arbitor diffusion"),
    ):
        refused(arguments, "there is no run", f"`{maker}` makes one")


def test_the_traceback_is_for_those_who_ask(workplace, capsys):
    assert main(["train", "--data", "nowhere.txt", "--debug"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("Traceback (most recent call last)")
    assert captured.splitlines()[-1].startswith("arbitor: error: ")


def test_a_bug_is_told_as_one(workplace, capsys, monkeypatch):
    monkeypatch.setattr("arbitor.train.session.open_corpus", lambda *_, **__: 1 / 0)
    assert main(TRAIN) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("arbitor: error: unexpected ZeroDivisionError")
    assert captured.count("\n") == 1


def test_an_interrupt_of_the_imports_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "arbitor.cli")

    class Interrupted:
        def find_spec(self, name, *_):
            if name == "arbitor.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert command.run() == 130
    assert capsys.readouterr() == ("", "arbitor: interrupted\n")


def test_an_interrupt_ahead_of_a_run_is_one_line(workplace, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("arbitor.train.session.start_training", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "arbitor: interrupted\n")


def test_what_is_too_short_is_named(refused, workplace):
    (workplace / "short.txt").write_text("short")
    refused([*TRAIN, "--held-out", "short.txt"], "error: short.txt: the held-out data is 5 bytes long")
    (workplace / "few.txt").write_text("just enough to train on, no more")
    refused(
        ["train", "--data", "few.txt", "--config", "small.toml"],
        "few.txt: the held-out data is 3 bytes long",
        "a larger --held-out or a smaller --ctx",
    )


def test_a_name_whose_run_was_killed_at_its_very_beginning(refused, workplace):
    """Nothing, an empty file of metrics, a half-written file of settings: what a kill may leave."""
    for number, left in enumerate(([], ["metrics.jsonl"], ["metrics.jsonl", ".config.toml.tmp-17"])):
        run = workplace / "runs" / f"begun{number}"
        run.mkdir()
        for name in left:
            (run / name).touch()
        refused([*TRAIN, "--run", run.name], "exists, without a checkpoint", "start it anew with --reset")
        assert main([*TRAIN, "--run", run.name, "--reset"]) == 0


def test_a_run_that_cannot_begin_leaves_no_folder(refused, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("arbitor.train.session.Trainer", fail)
    refused([*TRAIN, "--run", "large"], "out of memory")


# -- where stdout leads -------------------------------------------------------------------------------------


def run_with(stdout, *arguments, buffered=True):
    """The command in a process of its own whose stdout is a file, or a pipe that nobody reads."""
    environment = {**os.environ, "PYTHONPATH": str(Path(arbitor.__file__).parents[1])}
    environment |= {"PYTHONUNBUFFERED": "" if buffered else "1"}
    return subprocess.run(
        [sys.executable, "-m", "arbitor", *arguments],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.fixture
def unread_pipe():
    """The end to write to of a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_stdout_is_one_line(workplace, buffered):
    for verb in (["--help"], ["eval", "done", "--data", "data.txt"]):
        with open("/dev/full", "w") as full:
            done = run_with(full, *verb, buffered=buffered)
        assert done.returncode == 2
        assert done.stderr == "arbitor: error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("verb", [["eval", "done", "--data", "data.txt"], ["audit", "done"], ["--help"]])
def test_a_pipe_without_a_reader_ends_a_verb_quietly(workplace, unread_pipe, verb):
    done = run_with(unread_pipe, *verb)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["full", "unread"])
def test_training_goes_on_without_a_stdout(workplace, unread_pipe, where):
    with open("/dev/full", "w") as full:
        done = run_with(full if where == "full" else unread_pipe, *TRAIN, "--run", "deaf")
    reason = "No space left on device" if where == "full" else "Broken pipe"
    assert done.stderr == f"arbitor: note: cannot write to stdout: {reason}; going on\n"
    assert done.returncode == 0
    assert (workplace / "runs" / "deaf" / "summary.json").exists()


# -- what works ---------------------------------------------------------------------------------------------


def test_flags_override_the_file_which_overrides_the_preset(workplace):
    assert main([*TRAIN, "--steps", "2", "--seed", "5", "--run", "mine", "--no-save"]) == 0
    config = load_config(workplace / "runs" / "mine" / "config.toml")
    assert (config.train.steps, config.train.seed, config.train.save) == (2, 5, False)
    assert config.train.batch == 4
    assert config.train.rule == preset("tiny").train.rule
    assert config.data.data == ("data.txt",)


def test_the_back_end_in_use_is_shown(workplace, capsys, monkeypatch):
    assert main([*TRAIN, "--run", "usual", "--no-save"]) == 0
    assert "back end  torch: the reference operations, as there is no GPU" in capsys.readouterr().out
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    assert main([*TRAIN, "--run", "asked", "--no-save"]) == 0
    assert "asked for by ARB_TERNARY_BACKEND" in capsys.readouterr().out


def test_flags_of_parts_make_a_run_and_may_be_repeated_to_resume_it(workplace, capsys):
    toml = TOML.replace(
        "[train]", "motif_trits = 3\ngraph_edges = 8\ngraph_heads = 2\nmemory_dim = 8\n[train]"
    )
    (workplace / "parts.toml").write_text(toml)
    command = ["train", "--data", "data.txt", "--config", "parts.toml", "--run", "parts"]
    parts = ["--enable-memory", "--memory-rows", "9", "--disable-vq"]
    assert main([*command, *parts]) == 0
    model = load_config(workplace / "runs" / "parts" / "config.toml").model
    assert (model.memory_rows, model.motif_trits, model.graph_edges) == (9, 0, 0)
    note = "arbitor: note: --disable-vq leaves the graph out as well: it links motifs\n"
    assert capsys.readouterr().err == note
    for repeated in (parts, ["--enable-memory"], ["--disable-graph", "--disable-moe"]):
        assert main(["train", "--resume", "--run", "parts", *repeated]) == 0
        captured = capsys.readouterr()
        assert "'parts' is finished" in captured.out
        assert captured.err == ""


def test_runs_are_numbered_and_reset(workplace, capsys):
    for number in (1, 2):
        assert main(TRAIN) == 0
        assert (workplace / "runs" / f"tiny-{number}" / "summary.json").exists()
    (workplace / "runs" / "tiny-1" / "note").touch()
    assert main([*TRAIN, "--run", "tiny-1", "--reset", "--steps", "2"]) == 0
    assert not (workplace / "runs" / "tiny-1" / "note").exists()
    assert json.loads((workplace / "runs" / "tiny-1" / "summary.json").read_text())["steps"] == 2
    assert main([*TRAIN, "--run", "fresh", "--reset"]) == 0


def test_generate_writes_prompt_and_bytes(workplace, capfdbinary):
    arguments = ["generate", "done", "--prompt", "line", "--bytes", "9", "--seed", "3"]
    outputs = []
    for checkpoint in ("done", "runs/done/final", "runs/done/final/model.safetensors"):
        arguments[1] = checkpoint
        assert main(arguments) == 0
        outputs.append(capfdbinary.readouterr())
    assert outputs[0].out.startswith(b"line")
    assert 4 < len(outputs[0].out) <= 4 + 9 + 1
    assert outputs[1].out == outputs[2].out
    assert b"runs/done/best on cpu" in outputs[0].err
    prompt = ["generate", "done", "--prompt", "-x", "--bytes", "0"]
    assert main(prompt) == 0
    assert capfdbinary.readouterr().out == b"-x\n"


def test_generate_and_eval_change_nothing(workplace, capfdbinary):
    before = tree(workplace)
    assert main(["generate", "--bytes", "3"]) == 0
    assert main(["eval", "--data", "data.txt"]) == 0
    assert main(["audit"]) == 0
    assert tree(workplace) == before


def test_eval_gives_the_figure_of_the_summary(workplace, capsys):
    summary = json.loads((workplace / "runs" / "done" / "summary.json").read_text())
    data = Path("data.txt").read_bytes()
    Path("held-out.txt").write_bytes(data[len(data) - summary["held_out_bytes"] :])
    assert main(["eval", "runs/done/final", "--data", "held-out.txt"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"{summary['held_out_bits_per_byte']:.4f} bits per byte"
    assert f"all of {summary['held_out_bytes']:,} bytes of held-out.txt" in printed


def test_audit_lists_the_tensors_and_fails_on_a_float(workplace, capsys):
    assert main(["audit", "done"]) == 0
    printed = capsys.readouterr().out
    for word in ("head.q", "T_accum", "int8", "bytes a weight", "no float weight"):
        assert word in printed
    assert "not looked at" not in printed
    (workplace / "runs" / "done" / "best" / "masters.pt").write_bytes(b"?")
    assert main(["audit", "done"]) == 0
    assert "not looked at: masters.pt\n" in capsys.readouterr().out
    save_file({"layer.weight": torch.zeros(4, 4)}, workplace / "runs" / "done" / "best" / "model.safetensors")
    assert main(["audit", "done"]) == 1
    assert "layer.weight" in capsys.readouterr().out


def test_audit_refuses_what_is_damaged_or_no_checkpoint(workplace, refused):
    model = workplace / "runs" / "done" / "best" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    refused(["audit", "done"], "checksum")
    refused(["audit", "data.txt"], "data.txt is no checkpoint")


def test_a_field_without_fields_is_noted(workplace, capsys):
    (workplace / "data.jsonl").write_text(json.dumps({"body": "text of its own " * 300}) + "\n")
    note = "arbitor: note: --field body has no effect: no .jsonl file is among the data\n"
    for data, expected in (("data.txt", note), ("data.jsonl", "")):
        train = ["train", "--config", "small.toml", "--run", f"of-{data}", "--no-save"]
        for verb in (train, ["eval", "done"]):
            assert main([*verb, "--data", data, "--field", "body"]) == 0
            assert capsys.readouterr().err == expected
    assert main(["eval", "done", "--data", "data.txt"]) == 0
    assert capsys.readouterr().err == ""


def test_several_data_files_follow_one_flag(workplace, refused):
    (workplace / "more.txt").write_text("more text, " * 400)
    assert main(["train", "--config", "small.toml", "--data", "data.txt", "more.txt", "--run", "two"]) == 0
    assert "more.txt" in (workplace / "runs" / "two" / "config.toml").read_text()
    refused([*TRAIN, "--steps", "1.5"], "'1.5' is no whole number")


def test_a_model_that_diverged_says_so(workplace, capsys, monkeypatch):
    from arbitor.model import ARBModel

    forward = ARBModel.forward

    def nowhere(self, *args, **rest):
        output = forward(self, *args, **rest)
        return type(output)(output.logits * float("nan"), None)

    monkeypatch.setattr(ARBModel, "forward", nowhere)
    for verb in (["generate", "done", "--prompt", "x"], ["eval", "done", "--data", "data.txt"]):
        assert main(verb) == 2
        assert "its training diverged" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"arbitor {arbitor.__version__}\n"
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb in ("train", "generate", "eval", "audit", "doctor", "--debug"):
        assert verb in printed
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    flags = (
        "preset data held-out field steps batch accum ctx state rule lr seed device config run resume reset",
        "disable-moe disable-vq disable-graph enable-memory memory-rows max-moe-iters",
        "image-size image-patch image-channels no-augment",
        "eval-steps eval-interval save-interval no-save log-interval",
        "accum-threshold e-accum-threshold scale-lr",
    )
    for flag in " ".join(flags).split():
        assert f"--{flag} " in printed
    for name in PRESETS:
        assert re.search(rf"[ ,]{name}[ ,.]", printed), f"--preset does not list {name}"
    assert "--enable-vision" in printed
    assert "--enable-image" in printed


def test_help_loads_no_torch(repository):
    code = "import sys; from arbitor.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)


@pytest.mark.parametrize("module", ["arbitor", "arbitor.train"])
def test_modules_are_the_same_command(module, repository, tmp_path):
    verb = ["train"] if module == "arbitor" else []
    command = [sys.executable, "-m", module, *verb, "--steps", "many"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "arbitor: error: Invalid value for --steps: 'many' is no whole number\n"


@pytest.mark.parametrize("verb", ["audio", "diffusion", "pretrain"])
def test_scripts_are_verbs_which_work_from_any_folder(verb, workplace):
    done = run_with(subprocess.PIPE, verb, "--steps", "many")
    assert done.stderr == "arbitor: error: Invalid value for --steps: 'many' is no whole number\n"
    assert done.returncode == 2


def test_commands_that_messages_print_are_verbs():
    from arbitor.train import learnt

    tables = (learnt._TRIED, learnt._MADE, learnt._ADDED, *learnt._MADE_FROM.values())
    for printed in [line for table in tables for line in table.values()]:
        program, verb, *_ = printed.split()
        assert program == "arbitor"
        assert main([verb, "--help"]) == 0
