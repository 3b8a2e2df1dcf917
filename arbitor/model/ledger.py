"""The KV ledger: what attention keeps of past positions while bytes are decoded one after another.

Shape letters: B batch, N new positions, M positions in all, C latent, R rotary dims.
"""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.errors import UserError


class LayerLedger:
    """Latents and rotary keys of one attention layer, in buffers that are filled from the front."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_positions = 0
        self._latent: Tensor | None = None
        self._shared_key: Tensor | None = None

    def append(self, latent_BNC: Tensor, shared_key_BNR: Tensor) -> tuple[Tensor, Tensor]:
        """Adds N positions; returns views on all: latents [B, M, C], rotated shared keys [B, M, R]."""
        if self.num_positions == 0:
            self._latent = self._buffer(latent_BNC)
            self._shared_key = self._buffer(shared_key_BNR)
        assert self._latent is not None
        assert self._shared_key is not None
        first, last = self.num_positions, self.num_positions + latent_BNC.shape[1]
        assert last <= self.capacity, "KVLedger.extend checks the capacity before any layer appends"
        self._latent[:, first:last] = latent_BNC
        self._shared_key[:, first:last] = shared_key_BNR
        self.num_positions = last
        return self._latent[:, :last], self._shared_key[:, :last]

    def clear(self) -> None:
        """Forgets all positions."""
        self.num_positions = 0
        self._latent = self._shared_key = None

    def _buffer(self, example_BND: Tensor) -> Tensor:
        B, _, width = example_BND.shape
        return example_BND.new_empty((B, self.capacity, width))


class KVLedger:
    """The ledgers of a model's attention layers, and the last ids and motifs, which the next n-grams need.

    Give the same ledger to every call of the model together with the ids that follow: the first call needs at
    least three ids and may have a prefix, later calls need one id. No gradient is recorded through a ledger.

    Attributes:
        num_ids: ids read so far.
        num_prefix: positions of other media ahead of the first id.
        num_positions: positions held in each layer, num_prefix + num_ids - 2 (0 before the first call).
        capacity: positions that fit.
        layers: one ledger an attention layer, prelude first.
        motif_tail: the last two motifs, int64 [B, 2], kept by a model whose memory reads motifs; else None.
    """

    def __init__(self, config: ModelConfig, capacity: int | None = None) -> None:
        """Makes an empty ledger; buffers are allocated at the first call of the model.

        Args:
            config: the model's.
            capacity: positions to hold, those of a prefix included; None takes those of `config.ctx` ids
                without a prefix, which are ctx - 2.
        """
        self.capacity = config.ctx - 2 if capacity is None else capacity
        self.num_ids = 0
        self.num_prefix = 0
        num_layers = config.num_prelude_layers + config.num_coda_layers
        self.layers = [LayerLedger(self.capacity) for _ in range(num_layers)]
        self._tail_B2: Tensor | None = None
        self.motif_tail: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """Positions held in each layer."""
        return self.num_prefix + max(0, self.num_ids - 2)

    def extend(self, ids_BN: Tensor, num_prefix: int = 0) -> Tensor:
        """Registers the ids that follow; returns them with the two before them, [B, N + 2].

        At the first call, there is nothing before them: the ids come back as they are.

        Args:
            ids_BN: int64 ids.
            num_prefix: positions of other media ahead of them; at the first call only.

        Raises:
            UserError: they do not fit, the batch differs from the ledger's, a first call has fewer than 3
                ids, or a later one has a prefix.
        """
        count = ids_BN.shape[1]
        if num_prefix and self._tail_B2 is not None:
            raise UserError(
                "a prefix comes ahead of the first ids, and the ledger holds some; clear it to begin anew"
            )
        if self._tail_B2 is None and count < 3:
            raise UserError(f"an empty ledger needs at least 3 ids, got {count}; pad on the left with PAD")
        if count < 1:
            raise UserError("no ids were given; a ledger needs at least 1 more")
        if self._tail_B2 is not None and self._tail_B2.shape[0] != ids_BN.shape[0]:
            raise UserError(
                f"the ledger holds a batch of {self._tail_B2.shape[0]}, the ids one of {ids_BN.shape[0]}"
            )
        if self.num_prefix + num_prefix + self.num_ids + count - 2 > self.capacity:
            ahead = f" behind a prefix of {num_prefix} positions" if num_prefix else ""
            raise UserError(
                f"the ledger holds {self.num_positions} of {self.capacity} positions, {count} more "
                f"ids{ahead} do not fit; clear it and give the last part of the text again"
            )
        if self._tail_B2 is not None:
            ids_BN = torch.cat([self._tail_B2, ids_BN], dim=1)
        self._tail_B2 = ids_BN[:, -2:].clone()
        self.num_ids += count
        self.num_prefix += num_prefix
        return ids_BN

    def reserve(self, count: int) -> None:
        """Registers `count` positions of other media than text, behind those that there are.

        Raises:
            UserError: they do not fit.
        """
        if self.num_positions + count > self.capacity:
            raise UserError(
                f"the ledger holds {self.num_positions} of {self.capacity} positions, {count} more do not fit"
            )
        self.num_prefix += count

    def clear(self) -> None:
        """Forgets everything; another batch may follow."""
        self.num_ids = self.num_prefix = 0
        self._tail_B2 = self.motif_tail = None
        for layer in self.layers:
            layer.clear()


def reset_runtime_state(model: nn.Module) -> None:
    """Clear every KV ledger that the model has read or written, and with them its sliding windows.

    Between texts that have nothing to do with each other nothing may be left of the one before. Weights and
    training state stay as they are. A model without ledgers is left alone.
    """
    for module in model.modules():
        for ledger in list(getattr(module, "ledgers", ())):
            ledger.clear()
