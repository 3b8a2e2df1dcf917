"""Conversations as ids: how messages are framed with control tokens, and which ids are answers.

    PAD PAD [SYSTEM text] USER text ASSISTANT text STOP USER text ASSISTANT text STOP ...

The two PADs on the left let the model's trigram window stand on the first token. Answers are the bytes after
ASSISTANT, and the STOP that ends them: they are what a finetune learns and what generation writes. Batches
are filled on the right, where a causal model cannot see the filling.

Shape letters: B conversations, L ids, N = L - 3 targets, S vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import CONTROL_IDS, PAD, STOP

ROLES = ("system", "user", "assistant")
START = (PAD,) * (WINDOW - 1)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        role: of `ROLES`.
        content: its text as bytes.
    """

    role: str
    content: bytes

    def ids(self) -> list[int]:
        """The role's token, the bytes, and STOP after an answer."""
        end = [STOP] if self.role == "assistant" else []
        return [CONTROL_IDS[self.role.upper()], *self.content, *end]


@dataclass(frozen=True, slots=True)
class Example:
    """A framed conversation.

    Attributes:
        ids: int64 [L], from the PADs on.
        is_answer: bool [L], where `ids` are to be learnt.
        pixels: uint8 [C, H, W], an image that stands ahead of the ids; None for text alone.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    pixels: np.ndarray | None = None

    @property
    def num_answer_ids(self) -> int:
        """Ids that are to be learnt."""
        return int(self.is_answer.sum())


def frame(messages: Sequence[Message]) -> Example:
    """The ids of a whole conversation, and which of them are answers."""
    ids = list(START)
    is_answer = [False] * len(ids)
    for message in messages:
        part = message.ids()
        ids += part
        # The token of the role is given; the bytes and STOP are learnt.
        is_answer += [False] + [message.role == "assistant"] * (len(part) - 1)
    return Example(np.array(ids, dtype=np.int64), np.array(is_answer, dtype=bool))


def frame_prompt(messages: Sequence[Message]) -> list[int]:
    """The ids after which the model is to write the next answer: the conversation and ASSISTANT."""
    return [*frame(messages).ids.tolist(), CONTROL_IDS["ASSISTANT"]]


def fitted(example: Example, ctx: int) -> Example | None:
    """The example cut to its first `ctx` ids; None if no answer is left."""
    if len(example.ids) <= ctx:
        return example
    cut = Example(example.ids[:ctx], example.is_answer[:ctx])
    return cut if cut.is_answer.any() else None


def prefix_of(model: ARBModel, examples: Sequence[Example]) -> Tensor | None:
    """What stands ahead of the ids of a batch: float [B, P, D] of the images, or None without any."""
    pixels = [example.pixels for example in examples if example.pixels is not None]
    return model.encode("image", torch.from_numpy(np.stack(pixels))) if pixels else None


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """A batch, filled up on the right with PAD.

    Returns:
        ids int64 [B, L], and bool [B, N]: where the target of row i, which is id i + 3, is an answer.
    """
    length = max(WINDOW + 1, *(len(example.ids) for example in examples))
    ids_BL = torch.full((len(examples), length), PAD, dtype=torch.int64)
    is_answer_BL = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids_BL[row, : len(example.ids)] = torch.from_numpy(example.ids)
        is_answer_BL[row, : len(example.ids)] = torch.from_numpy(example.is_answer)
    return ids_BL, is_answer_BL[:, WINDOW:]


def answer_losses(logits_BNS: Tensor, ids_BL: Tensor, is_answer_BN: Tensor) -> Tensor:
    """Cross entropy of each answer id; nothing else has a part in it.

    Args:
        logits_BNS: the model's, one row more than there are targets (the last one predicts what follows).
        ids_BL: the ids that it was given.
        is_answer_BN: as `collate` gave it.

    Returns:
        fp32 nats [number of answer ids], in the order of the batch.

    Raises:
        UserError: there is no answer.
    """
    is_answer_BN = is_answer_BN.to(logits_BNS.device)
    targets = ids_BL[:, WINDOW:].to(logits_BNS.device)[is_answer_BN]
    if not len(targets):
        raise UserError("the batch holds no answer to learn")
    return F.cross_entropy(logits_BNS[:, :-1][is_answer_BN], targets, reduction="none")
