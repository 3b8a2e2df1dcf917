"""Scripts in `training/` begin with larger settings where there is a GPU."""

import pytest
import torch

from arbitor.recipes import with_flag, with_preset


@pytest.mark.parametrize(
    ("tokens", "adds"),
    [
        ([], True),
        (["--steps", "3"], True),
        (["--device", "auto"], True),
        (["--device", "cuda"], True),
        (["--device=cuda"], True),
        (["--device", "cpu"], False),
        (["--device=cpu"], False),
        (["--device", "tpu"], False),
        (["--device"], False),
        (["--preset", "base"], False),
        (["--preset=tiny"], False),
        (["--config", "mine.toml"], False),
        (["--resume"], False),
        (["--task", "flow", "--base", "codec"], False),
        (["--say", "seven"], False),
        (["--sample", "seven", "two"], False),
        (["--help"], False),
    ],
)
def test_the_preset_is_small_where_there_is_a_gpu(tokens, adds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_preset(tokens) == tokens
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_preset(tokens) == ([*tokens, "--preset", "small"] if adds else tokens)


def test_the_flag_of_a_medium_may_be_repeated():
    assert with_flag(["--steps", "3"], "--enable-vision", "--enable-image") == [
        "--enable-vision",
        "--steps",
        "3",
    ]
    for given in (["--enable-vision"], ["--steps", "3", "--enable-image"]):
        assert with_flag(given, "--enable-vision", "--enable-image") == given


def test_an_interrupt_ahead_of_the_command_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", interrupted)
    with pytest.raises(SystemExit) as end:
        with_preset([])
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "arbitor: interrupted\n")


@pytest.mark.parametrize("name", ["text", "vision", "audio", "diffusion", "pretrain"])
def test_every_script_does_so(name, repository):
    assert "with_preset(sys.argv[1:])" in (repository / "training" / f"{name}.py").read_text()
