"""Adapters that do not belong to a base, or are computed otherwise, are refused in one line."""

import io
import json
import shutil
import sys

import pytest

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
