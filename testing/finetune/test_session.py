"""`arbitor finetune` from the command line: files, resume to the bit, refusals, what the result is for."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import arbitor
from arbitor.cli import main
from arbitor.finetune.adapter import apply_adapter, find_adapter, read_adapter
from arbitor.finetune.lora import adapter_parameters
from arbitor.finetune.material import batch_order
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.metrics import EVALUATION_KEYS, STEP_KEYS
from testing.test_cli import tree

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
FINAL = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture
def refused(workplace, capsys):
    """refused(arguments, words): exit code 2, one line with these words, nothing on disk changed."""

    def check(arguments, *words):
        before = tree(workplace)
        capsys.readouterr()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("arbitor: error: ")
        assert captured.err.count("\n") == 1, captured.err
        for word in words:
            assert word in captured.err
        assert tree(workplace) == before

    return check


def summary(run):
    return json.loads(Path("runs", run, "summary.json").read_text())


def test_a_finetune_learns_and_leaves_the_base_alone(finetune, workplace, capsys):
    before = tree(workplace / "runs" / "base")
    assert finetune("--steps", "60", "--lr", "0.02", "--run", "tuned") == 0
    assert tree(workplace / "runs" / "base") == before
    out = capsys.readouterr().out
    assert "not a bit of it changed (checksum verified)" in out
    figures = summary("tuned")
    assert figures["held_out_answer_loss"] < 0.8 * figures["held_out_answer_loss_before"]
    loss = f"{figures['held_out_answer_loss_before']:.4f} -> {figures['held_out_answer_loss']:.4f}"
    assert f"held-out loss {loss} nats per byte" in out
    visible = {path.name for path in Path("runs/tuned").iterdir() if not path.name.startswith(".")}
    assert visible == {
        *("finetune.json", "metrics.jsonl", "loss.png", "sample.txt", "summary.json"),
        *("latest", "best", "final"),
    }
    assert {path.name for path in Path("runs/tuned/final").iterdir()} == set(FINAL)
    lines = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert sum("held_out_bits_per_byte" in line for line in lines) == 2
    for line in lines:
        assert list(line) == list(STEP_KEYS if "loss" in line else EVALUATION_KEYS)
        assert line.get("flip_rate") is None


def test_the_files_have_the_names_and_shapes_of_peft(finetune):
    assert finetune("--steps", "2", "--rank", "3", "--run", "tuned", "--targets", "ffn", "head") == 0
    config = json.loads(Path("runs/tuned/final/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["target_modules"] == ["prelude.0.ffn.up", "prelude.0.ffn.down", "head"]
    assert config["base_model_name_or_path"] == "runs/base/best"
    tensors = load_file("runs/tuned/final/adapter_model.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        f"base_model.model.{name}.lora_{part}.weight": (shape, torch.float32)
        for name, part, shape in (
            ("prelude.0.ffn.up", "A", (3, 32)),
            ("prelude.0.ffn.up", "B", (64, 3)),
            ("prelude.0.ffn.down", "A", (3, 64)),
            ("prelude.0.ffn.down", "B", (32, 3)),
            ("head", "A", (3, 32)),
            ("head", "B", (288, 3)),
        )
    }


def test_peft_computes_the_same(finetune):
    peft = pytest.importorskip("peft", reason="the peft library is not installed here")
    from arbitor.finetune.peft import peft_layers

    assert finetune("--steps", "5", "--run", "tuned") == 0
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours = arbitor.load("runs/base", "cpu")
        apply_adapter(ours, read_adapter(Path("runs/tuned/final")))
        config = peft.PeftConfig.from_pretrained("runs/tuned/final")
        config._register_custom_module(peft_layers())
        theirs = peft.PeftModel.from_pretrained(
            arbitor.load("runs/base", "cpu"), "runs/tuned/final", config=config
        )
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--dropout", "0.3"], ["--full"]], ids=["adapter", "full"])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_resumed_finetune_equals_an_uninterrupted_one(finetune, workplace, flags, at):
    steps = ["--steps", "8", "--eval-interval", "4", "--save-interval", "3", *flags]
    assert finetune(*steps, "--run", "whole") == 0
    stop_after(at, lambda: finetune(*steps, "--run", "parts"), code=130)
    assert not Path("runs/parts/summary.json").exists()
    assert main(["finetune", "--resume", "--run", "parts"]) == 0
    for name in ("final", "best", "latest"):
        files = {path.name for path in Path("runs/whole", name).iterdir()}
        assert len(files) == 4
        for file in files:
            assert Path("runs/parts", name, file).read_bytes() == Path("runs/whole", name, file).read_bytes()
    timeless = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("bytes_per_second", "memory", "seconds")}
            for line in lines
        ]
        for lines in (
            Path("runs", run, "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")
        )
    ]
    assert timeless[0] == timeless[1]
    assert main(["finetune", "--resume", "--run", "parts"]) == 0  # finished: nothing to do


def stop_after(step, run, code):
    """Send SIGINT to this process while step `step` is taken."""
    from arbitor.finetune.loop import Finetune

    take_step = Finetune._take_step

    def interrupted(self):
        take_step(self)
        if self.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetune, "_take_step", interrupted)
        assert run() == code


def test_stopped_ahead_of_the_first_step_nothing_is_said_to_be_saved(finetune, capsys):
    from arbitor.finetune.loop import Finetune
    from arbitor.train.signals import Interrupted

    def interrupted(_):
        signal.raise_signal(signal.SIGINT)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetune, "_measured", interrupted)
        assert finetune("--steps", "8", "--run", "early") == 130
    told = capsys.readouterr().out
    assert (
        "stopped at step 0 of 8; nothing was learnt yet; go on with: arbitor finetune --resume --run" in told
    )
    assert not Path("runs/early/latest").exists()
    assert main(["finetune", "--resume", "--run", "early"]) == 0


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(finetune):
    steps = ["--steps", "8", "--save-interval", "3", "--eval-interval", "0"]
    assert finetune(*steps, "--run", "whole") == 0
    stop_after(7, lambda: finetune(*steps, "--run", "parts"), code=130)
    for name in FINAL:
        file = Path("runs/parts/latest", name)
        data = file.read_bytes()
        copy = Path("copy")
        shutil.copytree("runs/parts", copy)
        file.write_bytes(data[:-3])
        assert main(["finetune", "--resume", "--run", "parts"]) == 0, name
        for final in FINAL:
            assert (
                Path("runs/parts/final", final).read_bytes() == Path("runs/whole/final", final).read_bytes()
            )
        shutil.rmtree("runs/parts")
        copy.rename("runs/parts")


def test_a_resume_needs_the_same_data_base_and_settings(finetune, refused, workplace):
    stop_after(2, lambda: finetune("--steps", "8", "--run", "parts"), code=130)
    resume = ["finetune", "--resume", "--run", "parts"]
    refused([*resume, "--rank", "4"], "--rank 4 contradicts rank = 8")
    refused(["finetune", "--resume", "--run", "prats"], "no finetune 'prats'", "parts")
    refused(["train", "--resume", "--run", "parts"], "parts")
    talk = workplace / "talk.jsonl"
    text = talk.read_text()
    talk.write_text(text.replace("say 3", "say 4"))
    refused(resume, "the conversations are not what they were")
    talk.write_text(text)
    shutil.rmtree("runs/base/best")
    assert (
        main(["train", "--config", "small.toml", "--data", "data.txt", "--seed", "1", "--run", "other"]) == 0
    )
    shutil.copytree("runs/other/best", "runs/base/best")
    refused(resume, "is not the checkpoint that 'parts' was started from")
    assert finetune("--steps", "1", "--run", "fresh") == 0
    refused(["generate", "--adapter", "parts"], "is an adapter for another base")


def test_votes_leave_a_run_like_any_other(finetune, workplace, capsysbinary):
    before = tree(workplace / "runs" / "base")
    assert finetune("--full", "--steps", "30", "--run", "voted") == 0
    assert tree(workplace / "runs" / "base") == before
    figures = summary("voted")
    assert figures["held_out_answer_loss"] < 0.8 * figures["held_out_answer_loss_before"]
    assert "going on from the base's accumulators" in capsysbinary.readouterr().out.decode()
    for verb in (
        ["audit", "voted"],
        ["eval", "voted", "--data", "data.txt"],
        ["generate", "voted", "--bytes", "2"],
    ):
        assert main(verb) == 0
    assert b"no float weight, no float training state" in capsysbinary.readouterr().out
    ours, base = (load_checkpoint(Path("runs", run, "final")) for run in ("voted", "base"))
    assert any(not torch.equal(ours.weights[name], tensor) for name, tensor in base.weights.items())
    assert ours.optimizer_state.keys() == base.optimizer_state.keys()
    assert ours.config.learnt == ("text", "chat")
    assert main(["train", "--resume", "--run", "voted"]) == 2
    assert b"arbitor finetune --resume --run voted" in capsysbinary.readouterr().err


def test_chat_knows_votes_on_conversations_of_an_earlier_version(finetune, workplace, capsys, monkeypatch):
    monkeypatch.setattr(
        "arbitor.finetune.methods.in_order", lambda _: None
    )  # which did not say what it learns
    assert finetune("--full", "--steps", "1", "--run", "voted") == 0
    assert load_checkpoint(Path("runs/voted/best")).config.learnt == ("text",)
    capsys.readouterr()
    for arguments in (["voted"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7\n")))
        assert main(["chat", *arguments, "--bytes", "1"]) == 0
        assert capsys.readouterr().err == "runs/voted/best on cpu\n"


def test_lean_votes_start_from_zero(finetune, capsys):
    assert finetune("--full", "--state", "lean", "--steps", "2", "--run", "voted") == 0
    assert "accumulators start at zero" in capsys.readouterr().out


def test_bad_settings(refused, workplace):
    data = ["--data", "talk.jsonl"]
    refused(["finetune", "bas", *data], "did you mean 'base'?")
    refused(["finetune", "base", "--data", "nowhere.jsonl"], "nowhere.jsonl")
    refused(["finetune", "base", "--data", "data.txt"], "line 1: not valid JSON", "more bad lines")
    refused(["finetune", "base", *data, "--rank", "0"], "--rank")
    refused(["finetune", "base", *data, "--rank", "two"], "--rank", "two")
    refused(["finetune", "base", *data, "--alpha", "-1"], "--alpha")
    refused(["finetune", "base", *data, "--dropout", "1"], "--dropout")
    refused(["finetune", "base", *data, "--targets", "fnn"], "--targets 'fnn'", "did you mean 'ffn'?")
    refused(["finetune", "base", *data, "--lr", "nan"], "--lr")
    refused(["finetune", "base", *data, "--steps", "0"], "--steps")
    refused(["finetune", "base", *data, "--batch", "0"], "--batch")
    refused(["finetune", "base", *data, "--seed", "-1"], "--seed")
    refused(["finetune", "base", *data, "--ctx", "64"], "--ctx is 64, the base was trained with 32")
    refused(["finetune", "base", *data, "--ctx", "3"], "--ctx")
    refused(["finetune", "base", *data, "--held-out", "2"], "--held-out")
    refused(["finetune", "base", *data, "--full", "--rank", "4"], "--rank has no effect")
    refused(["finetune", "base", *data, "--state", "lean"], "--state has no effect")
    refused(["finetune", "base", *data, "--run", "base"], "'base' exists")
    refused(["finetune", "base", *data, "--run", "../x"], "'../x'")
    refused(["finetune", "--resume"], "no finetune under ./runs")
    refused(["generate", "--adapter", "base"], "no adapter 'base'")
    refused(["chat", "bas"], "did you mean 'base'?")


def test_bad_adapters(finetune, refused, workplace):
    assert finetune("--steps", "1", "--run", "tuned") == 0
    refused(["finetune", "tuned"], "is an adapter; a finetune starts from a base")
    folder = Path("runs/tuned/best")
    weights, config = folder / PEFT_FILES[1], folder / PEFT_FILES[0]
    data, text = weights.read_bytes(), config.read_text()
    verb = ["generate", "tuned"]
    for damaged in (data[:-7], data[:20], b"", data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(damaged)
        refused(verb, "adapter_model.safetensors is damaged")
    tensors = {name: torch.zeros(2, 3) for name in load_file("runs/tuned/final/adapter_model.safetensors")}
    save_file(tensors, weights)
    refused(verb, "is not of the rank 8")
    save_file({"weight": torch.zeros(2)}, weights)
    refused(verb, "no part of a plain LoRA adapter")
    weights.unlink()
    refused(verb, "no such file")
    weights.write_bytes(data)
    for old, new, word in (
        ('"LORA"', '"IA3"', "not the configuration of a LoRA adapter"),
        ('"use_dora": false', '"use_dora": true', "use_dora is True"),
        ('"r": 8', '"r": null', "r must be a number"),
        ("{", "", "is damaged"),
        ("runs/base/best", "runs/gone", "names 'runs/gone' as its base"),
    ):
        config.write_text(text.replace(old, new, 1))
        refused(verb, word)


def test_an_adapter_that_peft_wrote_is_read(finetune, workplace):
    assert finetune("--steps", "3", "--run", "tuned") == 0
    foreign = workplace / "foreign"
    foreign.mkdir()
    save_file(
        load_file("runs/tuned/final/adapter_model.safetensors"), foreign / PEFT_FILES[1], {"format": "pt"}
    )
    text = Path("runs/tuned/final/adapter_config.json").read_text()
    (foreign / PEFT_FILES[0]).write_text(text.replace('"target_modules": [', '"target_modules": ["x.",'))
    ours, theirs = read_adapter(Path("runs/tuned/final")), read_adapter(foreign)
    assert theirs.base_fingerprint is None
    assert all(torch.equal(theirs.weights[name], tensor) for name, tensor in ours.weights.items())
    model = arbitor.load("runs/base", "cpu")
    apply_adapter(model, theirs)
    assert all(torch.equal(p, ours.weights[name]) for name, p in adapter_parameters(model).items())


def test_what_names_an_adapter(finetune, workplace):
    assert finetune("--steps", "1", "--run", "tuned") == 0
    best = Path("runs/tuned/best")
    for given in ("tuned", "runs/tuned", best, best / PEFT_FILES[1], best / PEFT_FILES[0]):
        assert find_adapter(given) == best
    for given in ("base", "runs/base", "nothing", "", ".", "data.txt", "a\0b"):
        assert find_adapter(given) is None


def test_generation_and_audit_take_an_adapter(finetune, capsysbinary):
    assert finetune("--steps", "3", "--lr", "0.05", "--run", "tuned") == 0
    texts = []
    for flags in (["tuned"], ["--adapter", "tuned"], ["base", "--adapter", "runs/tuned/best"], ["base"]):
        capsysbinary.readouterr()
        assert main(["generate", *flags, "--bytes", "30", "--seed", "3", "--prompt", "line"]) == 0
        texts.append(capsysbinary.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert main(["audit", "tuned"]) == 0
    audited = capsysbinary.readouterr().out.decode()
    assert "float adapter" in audited
    assert "adapter training state" in audited
    assert main(["audit", "base"]) == 0
    assert "no float weight" in capsysbinary.readouterr().out.decode()


def test_an_adapter_in_the_folder_of_a_base_fails_the_audit(finetune):
    assert finetune("--steps", "1", "--run", "tuned") == 0
    shutil.copy("runs/tuned/best/adapter_model.safetensors", "runs/base/best")
    assert main(["audit", "base"]) == 1


def test_the_embedded_set_runs_without_data(workplace, capsys):
    assert main(["finetune", "--steps", "1", "--run", "tuned"]) == 0
    assert "embedded instructions" in capsys.readouterr().out
    assert summary("tuned")["base"] == "runs/base/best"


def test_a_run_of_an_earlier_version_that_learnt_no_text_is_no_base_unless_named(workplace):
    folder = workplace / "runs/old/best"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    for path in (folder, folder.parent):  # newer than the base
        (path / "config.toml").write_text("[model]\naudio_rate = 8000\n[data]\naudio_task = 'codec'\n")
    assert main(["finetune", "--steps", "1", "--run", "tuned"]) == 0
    assert summary("tuned")["base"] == "runs/base/best"


def test_a_diverging_finetune_stops(finetune, capsys, monkeypatch):
    monkeypatch.setattr("arbitor.finetune.loop.MAX_DROPPED_IN_A_ROW", 3)
    monkeypatch.setattr(
        "arbitor.finetune.material.answer_losses",
        lambda logits, ids, is_answer: logits[:, :-1][is_answer][:, 0] * float("nan"),
    )
    assert finetune("--steps", "9", "--run", "tuned") == 1
    assert "not finite" in capsys.readouterr().err
    assert not Path("runs/tuned/summary.json").exists()
    weights = load_file("runs/tuned/latest/adapter_model.safetensors")
    assert all(bool(t.isfinite().all()) for t in weights.values())
    assert not any(bool(t.any()) for name, t in weights.items() if "lora_B" in name)


def test_an_epoch_shows_every_example_once():
    for num_examples, batch in ((10, 4), (3, 8), (7, 7)):
        order = [i for step in range(35) for i in batch_order(5, step, num_examples, batch)]
        for epoch in range(len(order) // num_examples):
            part = order[epoch * num_examples : (epoch + 1) * num_examples]
            assert sorted(part) == list(range(num_examples))
    assert (
        list(batch_order(0, 0, 50, 50)) != list(batch_order(1, 0, 50, 50)) != list(batch_order(0, 1, 50, 50))
    )


def test_ctrl_c_in_a_real_process_saves(workplace, repository):
    command = [
        sys.executable,
        "-m",
        "arbitor",
        "finetune",
        "base",
        "--data",
        "talk.jsonl",
        "--steps",
        "1000000",
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path("runs/base-lora-1/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with: arbitor finetune --resume --run base-lora-1" in out
    assert find_adapter("base-lora-1") is not None


def test_a_base_that_changed_is_noticed(finetune, capsys, monkeypatch):
    from arbitor.finetune.methods import AdapterMethod

    step = AdapterMethod.step

    def careless(self, loss, lr):
        with torch.no_grad():
            self.model.embed.q[0, 0] ^= 1
        return step(self, loss, lr)

    monkeypatch.setattr(AdapterMethod, "step", careless)
    assert finetune("--steps", "1", "--run", "tuned") == 1
    assert "the base's weights changed" in capsys.readouterr().err
    assert not Path("runs/tuned/summary.json").exists()


def test_the_recipe_is_the_command(workplace, repository):
    recipe = repository / "training" / "finetuning" / "text.py"
    result = subprocess.run(
        [sys.executable, recipe, "base", "--data", "talk.jsonl", "--steps", "1", "--run", "tuned"],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "base_unchanged" in Path("runs/tuned/summary.json").read_text()
