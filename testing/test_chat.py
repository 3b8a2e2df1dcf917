"""Chat: what the model is given turn by turn, what of a long history stays, and the terminal."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arbitor.chat import Chat, converse
from arbitor.cli import main
from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.finetune.instructions import Message, frame, frame_prompt
from arbitor.model import ARBModel
from arbitor.model.vocab import EOS, PAD, STOP

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


class Scripted:
    """Stands in for a model: answers with given ids, and notes which contexts it was given."""

    def __init__(self, *answers, ctx=64):
        self.config = ModelConfig(ctx=ctx, num_prelude_layers=1)
        self.script = iter([i for answer in answers for i in answer])
        self.contexts = []
        self.calls = []

    def __call__(self, ids, *, ledger, prefix=None):
        if ledger.num_ids == 0:
            self.contexts.append([])
        ledger.extend(ids)
        self.calls.append(ids.shape[1])
        self.contexts[-1] += ids[0].tolist()
        logits = torch.zeros(1, 1, 288)
        logits[0, 0, next(self.script)] = 100.0
        return SimpleNamespace(logits=logits)


def said(chat, text):
    return b"".join(chat.say(text))


def test_turns_are_framed_as_in_training_and_read_once():
    model = Scripted([*b"xy", STOP], [*b"z", EOS], ctx=64)
    chat = Chat(model, temperature=0, system="s")
    assert said(chat, "ab") == b"xy"
    assert said(chat, b"c") == b"z"
    talk = [Message(SYSTEM, b"s"), Message(USER, b"ab"), Message(ASSISTANT, b"xy"), Message(USER, b"c")]
    whole = frame([*talk, Message(ASSISTANT, b"z")]).ids.tolist()
    assert model.contexts == [whole[:-1]]  # the last STOP would be read with the next turn
    assert model.calls == [len(frame_prompt(talk[:2])), 1, 1, 4, 1]
    assert chat.history == [*talk, Message(ASSISTANT, b"z")]


def test_a_reset_forgets_all_but_the_system_text():
    model = Scripted([*b"x", STOP], [*b"y", STOP])
    chat = Chat(model, temperature=0, system="s")
    said(chat, "ab")
    chat.reset()
    said(chat, "c")
    assert model.contexts[1][:-1] == frame_prompt([Message(SYSTEM, b"s"), Message(USER, b"c")])


def test_an_answer_ends_at_the_limit_and_the_next_turn_closes_it():
    model = Scripted(b"xxx", [STOP])
    chat = Chat(model, temperature=0, max_bytes=3)
    assert said(chat, "a") == b"xxx"
    said(chat, "b")
    talk = [Message(USER, b"a"), Message(ASSISTANT, b"xxx"), Message(USER, b"b")]
    assert model.contexts == [frame_prompt(talk)]


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_got():
    model = Scripted(b"xy", [STOP])
    chat = Chat(model, temperature=0)
    drawn = chat.say("a")
    assert next(drawn) == b"x"
    drawn.close()
    assert chat.history[-1] == Message(ASSISTANT, b"x")
    model.script = iter([STOP])
    said(chat, "b")
    assert model.contexts[-1] == frame_prompt(
        [Message(USER, b"a"), Message(ASSISTANT, b"x"), Message(USER, b"b")]
    )


def test_the_oldest_turns_go_when_the_context_is_full():
    answers = [[*f"{i}" * 4, STOP] for i in range(6)]
    model = Scripted(*([*map(ord, a[:-1]), STOP] for a in answers), ctx=40)
    chat = Chat(model, temperature=0, system="sys", max_bytes=8)
    for i in range(6):
        said(chat, f"q{i}")
    start = [PAD, PAD, *Message(SYSTEM, b"sys").ids()]
    for context in model.contexts:
        assert context[: len(start)] == start
        assert context[len(start)] == Message(USER, b"").ids()[0]
        assert len(context) <= 39
    last = model.contexts[-1]
    assert bytes(i for i in last if i < 256).startswith(b"sysq")
    assert b"q5" in bytes(i for i in last if i < 256)
    assert b"q0" not in bytes(i for i in last if i < 256)
    assert len(chat.history) == 13


def test_a_question_longer_than_the_context_counts_by_its_end():
    model = Scripted([STOP], ctx=40)
    chat = Chat(model, temperature=0, system="sys", max_bytes=8)
    said(chat, "a" * 100 + "the end")
    (context,) = model.contexts
    assert context[-8:-1] == list(b"the end")
    assert context[2:6] == Message(SYSTEM, b"sys").ids()
    assert len(context) == 39 - 8


def test_an_answer_longer_than_the_context_goes_on():
    model = Scripted(b"abcdefgh" * 12, [STOP], ctx=24)
    chat = Chat(model, temperature=0, max_bytes=96)
    assert said(chat, "q") == b"abcdefgh" * 12
    assert len(model.contexts) > 2
    assert all(len(context) <= 23 for context in model.contexts)
    said(chat, "r")
    assert model.contexts[-1][:3] == frame_prompt([Message(USER, b"")])[:3]


def test_bad_arguments():
    for settings, word in (
        ({"temperature": -1}, "temperature"),
        ({"max_bytes": -1}, "bytes"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"system": "s" * 40}, "system text has 40 bytes"),
    ):
        with pytest.raises(UserError, match=word):
            Chat(Scripted(ctx=64), **settings)


def test_a_model_answers_alike_through_the_ledger_and_anew():
    torch.manual_seed(0)
    small = {"dim": 32, "num_prelude_layers": 2, "num_heads": 2, "head_dim": 8, "rope_dim": 8}
    model = ARBModel(config=ModelConfig(**small, value_dim=16, kv_latent_dim=32, ffn_dim=64, ctx=96)).eval()
    chat = Chat(model, temperature=0, max_bytes=10)
    for text in ("one", "two", "three"):
        anew = Chat(model, temperature=0, max_bytes=10)
        expected = b"".join(anew.answer([*chat.history, Message(USER, text.encode())]))
        assert said(chat, text) == expected


@pytest.fixture
def talk(monkeypatch, capfd):
    """talk(model, lines) -> stdout and stderr of a chat over a pipe."""

    def run(model, data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capfd.readouterr()
        assert converse(Chat(model, temperature=0)) == 0
        return capfd.readouterr()

    return run


def test_a_pipe_is_answered_line_by_line(talk):
    model = Scripted([*"é".encode(), STOP], [*b"b", STOP], [*b"c", STOP])
    out, err = talk(model, "grüß\n\nx\r\n/reset\n/oops\n last ".encode())
    assert out == "é\nb\nc\n"
    assert err.count("\n") == 1
    assert "unknown command /oops" in err
    assert model.contexts[0][3:9] == list("grüß".encode())
    assert model.contexts[1][2:-1] == frame_prompt([Message(USER, b"last")])[2:]


def test_exit_ends_and_bad_bytes_are_replaced(talk):
    model = Scripted([0xC3, STOP], [0xFF, 27, *b"a", STOP])
    out, _ = talk(model, b"x\ny\n/exit\nz\n")
    assert out == "\N{REPLACEMENT CHARACTER}\n\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}a\n"


def test_the_verb_takes_the_newest_finetune(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.train.report.SAMPLE_BYTES", 2)
    Path("data.txt").write_text("some text to learn from\n" * 40)
    fields = {"dim": 32, "num_prelude_layers": 1, "num_heads": 2, "head_dim": 8, "rope_dim": 8, "ctx": 48}
    Path("small.toml").write_text("[model]\n" + "\n".join(f"{k} = {v}" for k, v in fields.items()))
    flags = ["--config", "small.toml", "--data", "data.txt", "--device", "cpu", "--steps", "2"]
    assert main(["train", *flags, "--run", "base"]) == 0
    Path("talk.jsonl").write_text(
        "".join(json.dumps({"prompt": str(i), "response": "y"}) + "\n" for i in range(20))
    )
    assert main(["finetune", "--data", "talk.jsonl", "--steps", "60", "--lr", "0.02", "--run", "tuned"]) == 0
    capfd.readouterr()
    for arguments in ([], ["tuned"], ["--adapter", "tuned"], ["base", "--adapter", "tuned"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7\n8\n")))
        assert main(["chat", *arguments, "--temperature", "0"]) == 0
        out, err = capfd.readouterr()
        assert out == "y\ny\n"
        assert "base/best with the adapter" in err
        assert "tuned/best on cpu" in err
        assert "note" not in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7\n")))
    assert main(["chat", "base", "--bytes", "1"]) == 0
    assert capfd.readouterr().err == (
        "arbitor: note: runs/base/best was not finetuned on conversations and will merely continue text; "
        "teach it to answer with: arbitor finetune base\nruns/base/best on cpu\n"
    )


def test_an_interrupted_pass_through_the_model_leaves_no_trace():
    def script():
        yield ord("x")
        raise KeyboardInterrupt  # when the ledger holds an id more than was answered

    model = Scripted()
    model.script = script()
    chat = Chat(model, temperature=0)
    with pytest.raises(KeyboardInterrupt):
        said(chat, "a")
    model.script = iter([STOP])
    said(chat, "b")
    talk = [Message(USER, b"a"), Message(ASSISTANT, b"x"), Message(USER, b"b")]
    assert model.contexts[-1] == frame_prompt(talk)


def test_a_terminal_is_prompted_and_an_answer_can_be_stopped(monkeypatch, capfd):
    lines = iter(["hi", "again"])

    def ask(prompt):
        assert prompt == "> "
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def script():
        yield ord("x")
        raise KeyboardInterrupt

    model = Scripted()
    model.script = script()
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", ask)
    chat = Chat(model, temperature=0)
    say = chat.say

    def then_another_script(text):
        if text == b"again":
            model.script = iter([*b"y", STOP])
        return say(text)

    monkeypatch.setattr(chat, "say", then_another_script)
    assert converse(chat) == 0
    out, err = capfd.readouterr()
    assert out == "x\ny\n\n"
    assert "/reset forgets" in err
