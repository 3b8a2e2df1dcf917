"""ARBModel: bytes in, logits of the byte after next positions out.

Shape letters: B batch, L ids, N positions (L - 2 without a ledger), D dim, S vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor import config as presets
from arbitor.config import ModelConfig, did_you_mean
from arbitor.errors import UserError
from arbitor.model import rotary
from arbitor.model.block import Block
from arbitor.model.ledger import KVLedger
from arbitor.model.sequencer import WINDOW, TextSequencer
from arbitor.ternary import Int8Embedding


@dataclasses.dataclass(frozen=True, slots=True)
class ARBOutput:
    """What a call of the model returns.

    Attributes:
        logits: fp32 [B, N, S]; row i predicts position i + 3 of the ids (with a ledger: the last row predicts
            the id that follows).
        loss: fp32 scalar, mean cross entropy in nats, or None without targets.
    """

    logits: Tensor
    loss: Tensor | None


class ARBModel(nn.Module):
    """Byte-level ternary decoder: embedding, trigram sequencer, attention and feed-forward layers, byte head.

    All parameters are integers; there is no float tensor in `state_dict()`.
    """

    def __init__(
        self,
        preset: str | None = None,
        *,
        config: ModelConfig | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> None:
        """Makes a model with random trits, drawn from torch's global generator.

        Args:
            preset: name of a preset, such as "tiny"; this or `config` must be given.
            config: a whole configuration instead of a preset.
            device: where to make it; None is torch's default device.
            overrides: fields of `ModelConfig` that replace the preset's or the configuration's.

        Raises:
            UserError: neither or both of preset and config, an unknown preset or field, or a bad value.
        """
        super().__init__()
        self.config = _resolve(preset, config, overrides)
        place = torch.get_default_device() if device is None else torch.device(device)
        dim, vocab_size = self.config.dim, self.config.vocab_size
        self.embed = Int8Embedding(vocab_size, dim, kind="embedding", device=place)
        self.sequencer = TextSequencer(self.config, place)
        self.prelude = nn.ModuleList(Block(self.config, place) for _ in range(self.config.num_prelude_layers))
        self.coda = nn.ModuleList(Block(self.config, place) for _ in range(self.config.num_coda_layers))
        self.head = Int8Embedding(vocab_size, dim, kind="head", device=place)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, ledger: KVLedger | None = None
    ) -> ARBOutput:
        """Logits of every position, and the loss if targets are given.

        On CUDA, matrix products of floats run in bf16 (autocast); the residual stream stays fp32.

        Args:
            ids: integers [B, L] in 0..vocab_size - 1, L >= 3 (with a ledger that holds some: L >= 1). Moved
                to the model's device. Their range is checked if they come from the CPU; on another device
                the check would cost a synchronisation each call.
            targets: integers [B, L], usually the ids themselves, L >= 4: position i + 3 is the target of row
                i, and the last row, whose target lies outside, does not count.
            ledger: earlier positions, to which these ids are appended; no gradient is recorded.

        Returns:
            logits [B, L - 2, vocab_size]; with a ledger that holds some, [B, L, vocab_size].

        Raises:
            UserError: shapes, types or ids that cannot be used.
        """
        ids_BL = self._checked(ids, "ids")
        if ledger is not None:
            if targets is not None:
                raise UserError(
                    "targets and a ledger were given; a loss needs the whole text without a ledger"
                )
            with torch.no_grad():
                start = ledger.num_positions
                return ARBOutput(self._logits(ledger.extend(ids_BL), start, ledger), None)
        if ids_BL.shape[1] < WINDOW:
            raise UserError(
                f"ids have length {ids_BL.shape[1]}, at least {WINDOW} are needed; pad on the left with PAD"
            )
        targets_BL = None
        if targets is not None:
            targets_BL = self._checked(targets, "targets")
            if targets_BL.shape != ids_BL.shape:
                raise UserError(
                    f"targets are {tuple(targets_BL.shape)}, ids {tuple(ids_BL.shape)}; both must agree"
                )
            if targets_BL.shape[1] <= WINDOW:
                raise UserError(
                    f"targets have length {WINDOW}, the first one is position 3; give at least 4 ids"
                )
        logits_BNS = self._logits(ids_BL, 0, None)
        if targets_BL is None:
            return ARBOutput(logits_BNS, None)
        loss = F.cross_entropy(logits_BNS[:, :-1].flatten(0, 1), targets_BL[:, WINDOW:].flatten())
        return ARBOutput(logits_BNS, loss)

    def generate(
        self,
        prompt: bytes | str = b"",
        max_bytes: int = 400,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: Callable[[bytes], object] | None = None,
    ) -> bytes:
        """Bytes that follow the prompt; see `arbitor.generate.generate`."""
        from arbitor.generate import generate

        return generate(
            self,
            prompt,
            max_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stream=stream,
        )

    def _logits(self, ids_BL: Tensor, start: int, ledger: KVLedger | None) -> Tensor:
        """fp32 logits [B, L - 2, S] of the positions whose first one is number `start` of the context."""
        device = ids_BL.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            h_BND = self.sequencer(self.embed(ids_BL))
            rotation = rotary.rotation(
                start, h_BND.shape[1], self.config.rope_dim, self.config.rope_theta, device
            )
            for index, block in enumerate((*self.prelude, *self.coda)):
                h_BND = block(h_BND, rotation, None if ledger is None else ledger.layers[index])
        # Outside of bf16: the head's integer sums are exact, and rounding logits to 8 bits would cost loss.
        with torch.autocast(device.type, enabled=False):
            return self.head.logits(h_BND).float()

    def _checked(self, ids: Tensor, name: str) -> Tensor:
        """int64 [B, L] on the model's device."""
        if (
            not isinstance(ids, Tensor)
            or ids.dim() != 2
            or ids.is_floating_point()
            or ids.dtype == torch.bool
        ):
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise UserError(f"{name} must be an integer tensor of shape (batch, length), got {given}")
        if ids.numel() == 0:
            raise UserError(
                f"{name} have shape {tuple(ids.shape)}, which holds nothing; give at least one id"
            )
        if ids.device.type == "cpu":
            low, high = (int(extreme) for extreme in torch.aminmax(ids))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise UserError(f"{name} contain {wrong}; allowed are 0 to {self.config.vocab_size - 1}")
        return ids.to(self.device, torch.int64)


def _resolve(preset: str | None, config: ModelConfig | None, overrides: dict[str, Any]) -> ModelConfig:
    """The configuration that the constructor's arguments mean."""
    if (preset is None) == (config is None):
        names = ", ".join(presets.PRESETS)
        raise UserError(f"ARBModel needs either the name of a preset ({names}) or config=ModelConfig(...)")
    if config is None:
        assert preset is not None
        config = presets.preset(preset).model
    allowed = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise UserError(f"ModelConfig has no field {name!r}{hint}; allowed are {', '.join(allowed)}")
    return dataclasses.replace(config, **overrides)
