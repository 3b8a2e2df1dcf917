"""Adapters that do not belong to a base, or are computed otherwise, are refused in one line."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from arbitor.cli import main
from arbitor.errors import UserError
from arbitor.finetune.adapter import read_adapter, write_adapter
from arbitor.finetune.lora import Adapter, adapter_parameters, attach, fingerprint


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_adapter_of_another_base_is_refused_in_one_line(verb, finetune, workplace, capfd, monkeypatch):
    assert finetune("--steps", "1", "--run", "tuned") == 0
    flags = ["--config", "small.toml", "--data", "data.txt", "--seed", "1"]
    assert main(["train", *flags, "--run", "other"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    more = ["--bytes", "2"] if verb == "generate" else []
    assert main([verb, "base", "--adapter", "tuned", *more]) == 0
    capfd.readouterr()
    for given in (["other", "--adapter", "tuned"], ["runs/other/final", "--adapter", "runs/tuned/final"]):
        assert main([verb, *given, *more]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert "is an adapter for another base (runs/base/best)" in err
    # Other weights where the adapter's own base was.
    shutil.rmtree("runs/base/best")
    shutil.copytree("runs/other/best", "runs/base/best")
    assert main([verb, "tuned", *more]) == 2
    assert "is an adapter for another base" in capfd.readouterr().err


def test_an_adapter_of_another_base_is_told_as_one_whatever_that_base_has_learnt(finetune, capfd):
    assert finetune("--steps", "1", "--run", "tuned") == 0
    Path("photos").mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(f"photos/{number}.png")
        Path(f"photos/{number}.txt").write_text(f"<{number}>")
    sizes = ["--image-size", "8", "--image-patch", "4", "--image-channels", "1"]
    flags = ["--enable-vision", "--config", "small.toml", "--data", "photos", *sizes, "--steps", "1"]
    assert main(["train", *flags, "--run", "vision"]) == 0
    capfd.readouterr()
    assert main(["generate", "vision", "--adapter", "tuned"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "arbitor: error: runs/tuned/best is an adapter for another base (runs/base/best): the model's "
        "weights are not those that it was trained beside\n"
    )
    # Beside its own base, what both have learnt is what is told.
    assert main(["generate", "base", "--adapter", "tuned", "--image", "photos/1.png"]) == 2
    assert (
        "to continue text and to answer, not to name images: the run 'vision' has" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [3, 4]),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
    ],
)
def test_settings_of_peft_that_compute_otherwise_are_refused(name, value, make_model, tmp_path):
    model = make_model()
    adapter = Adapter(rank=2, alpha=4.0, modules=("head",))
    attach(model, adapter)
    write_adapter(tmp_path, adapter, adapter_parameters(model), "", fingerprint(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_bdlora": None}))
    assert read_adapter(tmp_path).adapter == adapter
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=f"{name} is .*, which is not supported"):
        read_adapter(tmp_path)
