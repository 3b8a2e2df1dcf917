"""Conversations with a model: the history framed as a finetune frames it, answers drawn byte by byte.

The history lives in the KV ledger, so that a turn costs the bytes of that turn. Where the context is full,
the oldest turns are left out, the system text never.
"""

import codecs
import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch

from arbitor.errors import UserError
from arbitor.finetune.instructions import START, Message, frame_prompt
from arbitor.generate import byte_logits, check_sampling, new_generator, sample_id
from arbitor.model.arb import ARBModel
from arbitor.model.ledger import KVLedger
from arbitor.model.vocab import END_IDS, to_bytes
from arbitor.train.display import printable


class Chat:
    """A conversation with a model.

    Args:
        model: any ARBModel, with or without an adapter.
        system: text ahead of the conversation; empty is none.
        max_bytes: where an answer ends if the model does not end it before.
        temperature, top_k, top_p, seed: as in `arbitor.generate.generate`.

    Attributes:
        history: messages so far, the system text included.

    Raises:
        UserError: an argument outside its range, or a system text longer than half the context.
    """

    def __init__(
        self,
        model: ARBModel,
        *,
        system: bytes | str = b"",
        max_bytes: int = 400,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        check_sampling(max_bytes, temperature, top_k, top_p, seed)
        self.model = model
        self.max_bytes = max_bytes
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        # The last id of a training window is a target only, so ctx - 1 ids are the longest context trained.
        self.capacity = model.config.ctx - 1
        self._system = [Message("system", to_bytes(system))] if system else []
        if self._system and len(frame_prompt(self._system)) > self.capacity // 2:
            raise UserError(
                f"the system text has {len(self._system[0].content)} bytes, which leaves too little of the "
                f"context of {model.config.ctx}; use at most {self.capacity // 2 - len(START) - 2}"
            )
        self._generator = new_generator(seed)
        self._ledger = KVLedger(model.config)
        self.history: list[Message] = []
        self._read: list[int] = []  # the ids that the ledger holds, or an empty list if it must start anew
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system text stays."""
        self.history = list(self._system)
        self._forget()

    def say(self, text: bytes | str) -> Iterator[bytes]:
        """The answer to `text`, byte by byte; an answer that is left early is kept as far as it got."""
        self.history.append(Message("user", to_bytes(text)))
        return self._answer()

    def answer(self, messages: Sequence[Message]) -> Iterator[bytes]:
        """The answer to a whole conversation, which replaces the history."""
        self.history = list(messages)
        self._forget()
        return self._answer()

    def _answer(self) -> Iterator[bytes]:
        drawn = bytearray()
        finished = False
        fresh = self._unread()
        try:
            for _ in range(self.max_bytes):
                next_id = self._next_id(fresh)
                if next_id in END_IDS:
                    break
                drawn.append(next_id)
                fresh = [next_id]
                yield bytes([next_id])
            finished = True
        finally:
            self.history.append(Message("assistant", bytes(drawn)))
            if not finished:
                self._forget()

    def _next_id(self, fresh: list[int]) -> int:
        if len(self._read) + len(fresh) > self.capacity:
            # An answer that outgrows the context goes on from the last half of it, as `generate` does.
            fresh = [*self._read, *fresh][-max(self.model.config.ctx // 2, len(START) + 1) :]
            self._forget()
        logits = self.model(torch.tensor([fresh]), ledger=self._ledger).logits
        self._read += fresh
        return sample_id(
            byte_logits(logits[0, -1]),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=self._generator,
        )

    def _unread(self) -> list[int]:
        """What the model must read before it answers: what the ledger lacks, or all of what fits anew."""
        whole = frame_prompt(self.history)
        reserve = min(self.max_bytes, self.capacity // 4)
        read = self._read
        if read and whole[: len(read)] == read and len(whole) + reserve <= self.capacity:
            return whole[len(read) :]
        self._forget()
        has_system = self.history[0].role == "system"
        system, kept = self.history[:has_system], self.history[has_system:]
        while len(kept) > 1 and len(frame_prompt([*system, *kept])) + reserve > self.capacity:
            # A question goes with its answer, so that what is left begins with a question.
            kept.pop(0)
            while len(kept) > 1 and kept[0].role == "assistant":
                kept.pop(0)
        excess = len(frame_prompt([*system, *kept])) + reserve - self.capacity
        if excess > 0:  # one question alone is too long: its end counts
            kept[0] = Message(kept[0].role, kept[0].content[excess:])
        return frame_prompt([*system, *kept])

    def _forget(self) -> None:
        self._ledger.clear()
        self._read = []


PROMPT = "> "
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends; Ctrl-C ends an answer"


def converse(chat: Chat) -> int:
    """Read turns from stdin, a line each, and write the answers to stdout as they are drawn, until the end.

    On a terminal there is a prompt. Characters appear when their last byte has come.

    Returns:
        Exit code: 0.
    """
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and editing
        _note(HELP)
    while (line := _line(on_terminal)) is not None:
        command = line.strip()
        if command == b"/exit":
            break
        if command == b"/reset":
            chat.reset()
        elif command.startswith(b"/"):
            _note(f"unknown command {command[:40].decode('utf-8', 'replace')}; {HELP}")
        elif command:
            _write_answer(chat.say(command), interruptible=on_terminal)
    return 0


def _line(on_terminal: bool) -> bytes | None:
    """The next line without its end; None after the last one."""
    if not on_terminal:
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        return line.rstrip(b"\r\n") if line else None
    try:
        return to_bytes(input(PROMPT))
    except EOFError:
        sys.stdout.write("\n")
        return None


def _write_answer(drawn: Iterator[bytes], *, interruptible: bool) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        for byte in drawn:
            _write(decoder.decode(byte))
    except KeyboardInterrupt:
        if not interruptible:
            raise
    _write(decoder.decode(b"", final=True) + "\n")


def _write(text: str) -> None:
    if text:
        sys.stdout.write(printable(text))
        sys.stdout.flush()


def _note(text: str) -> None:
    print(f"arbitor: {text}", file=sys.stderr, flush=True)
