"""Conversations from JSON Lines files, split into those to learn from and those held out.

A line is one of
    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"prompt": "...", "response": "..."}            ("completion" and "answer" serve as "response")
    {"instruction": "...", "input": "...", "output": "..."}        ("input" may be missing or empty)
and may have other fields, which are ignored. The last two may have a "system" text, too.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from arbitor.data.contents import BadLineError, opened, parse_line
from arbitor.data.corpus import held_out_share
from arbitor.data.images import CaptionedImages, Geometry, open_images
from arbitor.data.sources import Skipped, find_sources
from arbitor.errors import UserError
from arbitor.finetune import synthetic
from arbitor.finetune.instructions import ROLES, Example, Message, fitted, frame
from arbitor.train.task import framed

OWN_SHARE = "0.1"
MAX_LINE_BYTES = 16 << 20
_RESPONSES = ("response", "completion", "answer", "output")
_FORMS = '{"messages": [{"role": ..., "content": ...}]}, or "prompt" and "response"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Instructions:
    """What a finetune learns from and what it is measured on.

    Attributes:
        train: examples to learn from, each with an answer.
        held_out: examples to measure on; no conversation is in both.
        prompts: the held-out conversations up to their first answer, and that answer, to show samples of.
        description: one line for the user.
        unit: what an example is, in words.
    """

    train: list[Example]
    held_out: list[Example]
    prompts: list[tuple[list[Message], bytes]]
    description: str
    unit: str = "conversations"

    def fingerprint(self) -> str:
        """Checksum of all ids of both parts, in hexadecimal."""
        hasher = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            for example in part:
                hasher.update(len(example.ids).to_bytes(8, "little"))
                hasher.update(example.ids.astype("<i8").tobytes())
                hasher.update(np.packbits(example.is_answer).tobytes())
                if example.pixels is not None:
                    hasher.update(np.ascontiguousarray(example.pixels).tobytes())
            hasher.update(b"|")
        return hasher.hexdigest()


def open_instructions(data: Sequence[str], held_out: str | None, ctx: int) -> Instructions:
    """Read `data` (files, folders, globs of .jsonl or .jsonl.gz; none: the embedded instructions).

    Args:
        data: what to read.
        held_out: a path, or the share of the conversations to hold out, spread evenly; None is a tenth.
        ctx: longest example in ids; what is longer is cut on the right, or left out if no answer remains.

    Raises:
        UserError: something that cannot be read or used, with file and line, or too few conversations.
    """
    name = " ".join(data) if data else synthetic.DESCRIPTION
    conversations = read_conversations(data) if data else synthetic.synthetic_conversations()
    share = held_out_share(OWN_SHARE if held_out is None else held_out)
    if share is None:
        assert held_out is not None
        kept_out = read_conversations([held_out])
        out_keys = {_key(conversation) for conversation in kept_out}
        train = [conversation for conversation in conversations if _key(conversation) not in out_keys]
    else:
        train, kept_out = _split(conversations, share)
    both = len(conversations) - len(train) if share is None else 0
    train_examples, cut, dropped = _examples(train, ctx)
    held_out_examples, cut_out, dropped_out = _examples(kept_out, ctx)
    for part, examples in (("to learn from", train_examples), ("held out", held_out_examples)):
        if not examples:
            raise UserError(
                f"{name}: no conversation {part} has an answer within the context of {ctx} bytes; give more "
                "or shorter ones, a larger --ctx, or another --held-out"
            )
    notes = {
        "cut to the context": cut + cut_out,
        "left out, no answer within the context": dropped + dropped_out,
        "left out, also held out": both,
    }
    told = "".join(f"; {count:,} {what}" for what, count in notes.items() if count)
    return Instructions(
        train=train_examples,
        held_out=held_out_examples,
        prompts=[_prompt(conversation) for conversation in kept_out[:64]],
        description=f"{name}: {len(train_examples):,} conversations to learn from, "
        f"{len(held_out_examples):,} held out{told}",
    )


def open_captions(data: Sequence[str], held_out: str | None, ctx: int, geometry: Geometry) -> Instructions:
    """Images whose captions are the answers; see `arbitor.data.images.open_images`.

    Args:
        data: what to read; none is scikit-learn's digits.
        held_out: as there.
        ctx: longest caption with what frames it, in ids; what is longer is cut.
        geometry: of the model's images.

    Raises:
        UserError: data that cannot be used.
    """
    corpus = open_images(data, held_out, geometry)
    return Instructions(
        train=_captioned(corpus.train, ctx),
        held_out=_captioned(corpus.held_out, ctx),
        prompts=[],
        description=corpus.description,
        unit="images",
    )


def _captioned(images: CaptionedImages, ctx: int) -> list[Example]:
    examples = []
    for number, caption in enumerate(images.captions):
        ids_1L, mask_1L = framed([caption], ctx)
        examples.append(Example(ids_1L[0].numpy(), mask_1L[0].numpy(), images.image(number)))
    return examples


def read_conversations(data: Sequence[str]) -> list[list[Message]]:
    """The conversations of JSON Lines files, in the order of the files and lines.

    Raises:
        UserError: naming the file and the first bad line, and how many more there are.
    """
    skipped = Skipped()
    conversations: list[list[Message]] = []
    problems: list[str] = []
    for source in find_sources(data, skipped):
        before = len(conversations) + len(problems)
        for number, line in _lines(source.path):
            try:
                conversations.append(_conversation(_record(line, first=number == 1)))
            except BadLineError as error:
                problems.append(f"{str(source.path)!r}, line {number}: {error}")
        if len(conversations) + len(problems) == before:
            raise UserError(f"{str(source.path)!r} holds no conversations")
    if problems:
        more = len(problems) - 1
        rest = f" (and {more:,} more bad line{'s' if more > 1 else ''})" if more else ""
        raise UserError(f"{problems[0]}{rest}")
    return conversations


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{str(path)!r}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB, which no "
                    "conversation is; is this a JSON Lines file?"
                )
            if line.strip():
                yield number, line


def _record(line: bytes, *, first: bool) -> dict[str, Any]:
    record = parse_line(line, first=first)
    if not isinstance(record, dict):
        raise BadLineError(f"a JSON object is needed, {_FORMS}; got a {type(record).__name__}")
    return record


def _conversation(record: dict[str, Any]) -> list[Message]:
    if "messages" in record:
        return _messages(record["messages"])
    if "prompt" in record:
        question = _text(record, "prompt")
    elif "instruction" in record:
        question = _text(record, "instruction")
        if record.get("input"):
            question += b"\n" + _text(record, "input")
    else:
        names = ", ".join(repr(name) for name in list(record)[:8])[:200] or "none"
        raise BadLineError(f"neither messages nor a prompt; needed are {_FORMS}, the fields are {names}")
    answer = next((name for name in _RESPONSES if name in record), None)
    if answer is None:
        raise BadLineError(f"a prompt without its answer: a field of {', '.join(_RESPONSES)} is needed")
    messages = [Message("user", question), Message("assistant", _text(record, answer))]
    if record.get("system"):
        messages.insert(0, Message("system", _text(record, "system")))
    return _checked(messages)


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list):
        raise BadLineError(f"messages must be a list, got a {type(given).__name__}")
    messages = []
    for number, message in enumerate(given, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadLineError(f"message {number} must be an object with a role and a content")
        role = message["role"]
        if role not in ROLES:
            raise BadLineError(
                f"message {number} has the role {str(role)[:40]!r}; roles are {', '.join(ROLES)}"
            )
        if role == "system" and number > 1:
            raise BadLineError(f"message {number} is a system message; only the first one can be")
        messages.append(Message(role, _text(message, "content")))
    return _checked(messages)


def _checked(messages: list[Message]) -> list[Message]:
    if not any(message.role == "assistant" for message in messages):
        raise BadLineError("no message of the assistant, so there is nothing to learn")
    return messages


def _text(record: dict[str, Any], name: str) -> bytes:
    text = record[name]
    if not isinstance(text, str):
        raise BadLineError(f"{name} must be a string, got a {type(text).__name__}")
    return text.encode("utf-8", "replace")


def _key(conversation: list[Message]) -> bytes:
    return hashlib.blake2b(frame(conversation).ids.tobytes(), digest_size=16).digest()


def _split(
    conversations: list[list[Message]], share: Fraction
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Every (1/share)th different conversation is held out, with all its copies."""
    order: dict[bytes, int] = {}
    train: list[list[Message]] = []
    held_out: list[list[Message]] = []
    for conversation in conversations:
        i = order.setdefault(_key(conversation), len(order))
        out = int((i + 1) * share) > int(i * share)
        (held_out if out else train).append(conversation)
    return train, held_out


def _examples(conversations: Sequence[list[Message]], ctx: int) -> tuple[list[Example], int, int]:
    """Examples of at most `ctx` ids; how many were cut, and how many left out."""
    examples, cut = [], 0
    for conversation in conversations:
        whole = frame(conversation)
        example = fitted(whole, ctx)
        if example is not None:
            examples.append(example)
            cut += example is not whole
    return examples, cut, len(conversations) - len(examples)


def _prompt(conversation: list[Message]) -> tuple[list[Message], bytes]:
    first = next(i for i, message in enumerate(conversation) if message.role == "assistant")
    return conversation[:first], conversation[first].content
