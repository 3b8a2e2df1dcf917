"""An adapter beside a base that is not its own: every verb that takes one refuses it in one line."""

import io
import shutil
import sys

import pytest

from arbitor.cli import main


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
