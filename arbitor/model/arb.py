"""ARBModel: bytes in, logits of the byte after next positions out; another medium may come first.

    embedding -> sequencer, behind the prefix of a sidecar -> VQ bridge -> prelude (n-gram memory after its
    first block) -> core -> coda -> output router, byte head

A part that the configuration does not ask for is not made.

A mixed sequence is the positions of one image (or sound) followed by those of the text, in one causal
sequence. Every part treats both alike, but for the memory over bytes, the heads and the losses, which are of
the text's positions only. The context length `ctx` counts ids; the prefix comes on top of it.

Shape letters: B batch, L ids, N positions of the text (L - 2 without a ledger), P positions of the prefix,
Q = P + N, D dim, S vocabulary, C modalities.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor import config as presets
from arbitor.config import ModelConfig, did_you_mean
from arbitor.errors import UserError
from arbitor.model import rotary
from arbitor.model.block import Block
from arbitor.model.core import MoEGraph
from arbitor.model.heads import ByteHead, TalkerHead
from arbitor.model.ledger import KVLedger
from arbitor.model.memgram import MemGram
from arbitor.model.router import MODALITIES, OutputRouter
from arbitor.model.sequencer import WINDOW, TextSequencer
from arbitor.model.vocab import PAD
from arbitor.model.vq import VQBridge
from arbitor.ops.activations import compute_dtype
from arbitor.ternary import Int8Embedding, VoteOptimizer, runtime
from arbitor.ternary.stream import add_to_stream, deferring, settled, stream_dtype, widened

DEFAULT_PRESET = "arb-1b"
DIVERSITY_WEIGHT = 0.3
ROUTER_WEIGHT = 0.01
NOT_COUNTED = -100  # a target without a loss


@dataclasses.dataclass(frozen=True, slots=True)
class ARBOutput:
    """What a call of the model returns.

    Attributes:
        logits: fp32 [B, N, S], with a prefix as without; row i predicts position i + 3 of the ids (with a
            ledger: the last row predicts the id that follows).
        loss: fp32 scalar, the weighted sum of `losses`; None without targets.
        losses: fp32 scalars, unweighted; empty without targets. "text" is the mean cross entropy in nats;
            "ponder", "commitment", "diversity" and "router" are there if the part is that they belong to.
        modalities: fp32 [B, N, C], the output router's logits of `MODALITIES`; None without a router.
    """

    logits: Tensor
    loss: Tensor | None
    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    modalities: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass through the parts gives: see `ARBOutput`; `losses` are those that need no targets."""

    logits: Tensor
    modalities: Tensor | None
    losses: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """The positions of a sequence that are text, `first` to ahead of `end`, and the ids that made them."""

    ids_BL: Tensor  # noqa: N815
    first: int
    end: int


class ARBModel(nn.Module):
    """Byte-level ternary decoder.

    All parameters and buffers are integers; there is no float tensor in `state_dict()`.

    Attributes:
        config: the architecture.
        sidecars: what turns other media into a prefix, by the medium's name ("image").
        heads: heads of modalities other than bytes, by the modality's name.
        ledgers: those that the model was called with and that are still alive.
    """

    def __init__(
        self,
        preset: str | None = None,
        *,
        config: ModelConfig | None = None,
        device: torch.device | str | None = None,
        enable_memory: bool | None = None,
        enable_vision: bool | None = None,
        enable_audio: bool | None = None,
        enable_video: bool | None = None,
        **overrides: Any,
    ) -> None:
        """Makes a model with random trits, drawn from torch's global generator.

        Args:
            preset: name of a preset, such as "tiny"; without it and `config`, it is "arb-1b".
            config: a whole configuration instead of a preset.
            device: where to make it; None is torch's default device.
            enable_memory: True adds the n-gram memory, of its usual size if no other is given; False leaves
                it out.
            enable_vision: the same for images: True adds the image sidecar.
            enable_audio: the same for sounds: True adds the audio sidecar and the head that speaks.
            enable_video: the same for clips of video: True adds the video sidecar and the head that draws.
            overrides: fields of `ModelConfig` that replace the preset's or the configuration's.

        Raises:
            UserError: both preset and config, an unknown preset or field, or a bad value.
        """
        super().__init__()
        self.config = config = _resolve(
            preset, config, enable_memory, enable_vision, enable_audio, enable_video, overrides
        )
        place = torch.get_default_device() if device is None else torch.device(device)
        self.embed = Int8Embedding(config.vocab_size, config.dim, kind="embedding", device=place)
        self.sequencer = TextSequencer(config, place)
        self.vq = VQBridge(config, place) if config.has_motifs else None
        self.prelude = nn.ModuleList(Block(config, place) for _ in range(config.num_prelude_layers))
        self.memory = MemGram(config, place, host=config.memory_host) if config.memory_rows else None
        code_dim = None if self.vq is None else self.vq.code_dim
        self.core = MoEGraph(config, code_dim, place) if config.has_core else None
        self.coda = nn.ModuleList(Block(config, place) for _ in range(config.num_coda_layers))
        self.router = OutputRouter(config, place) if config.output_router else None
        self.head = ByteHead(config, place)
        self.heads = nn.ModuleDict()
        # Last, so that a sidecar does not change which random numbers the other parts get.
        self.sidecars = nn.ModuleDict()
        if config.image_size:
            from arbitor.sidecars.image import ImageSequencer

            self.sidecars["image"] = ImageSequencer(config, place)
        if config.audio_rate:
            from arbitor.sidecars.audio import AudioSequencer

            self.sidecars["audio"] = AudioSequencer(config, place)
            self.heads["audio"] = TalkerHead(config, place)
        if config.video_size:
            from arbitor.sidecars.video import VideoSequencer, make_video_head

            self.sidecars["video"] = VideoSequencer(config, place)
            self.heads["video"] = make_video_head(config, place)
        self._metrics: dict[str, Tensor] = {}
        self.ledgers: weakref.WeakSet[KVLedger] = weakref.WeakSet()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode(self, medium: str, media: Tensor) -> Tensor:
        """The prefix that a sidecar makes of its media, to be given to `forward` or `generate`.

        Args:
            medium: name of the sidecar, such as "image".
            media: what it takes; moved to the model's device.

        Returns:
            [B, P, D], RMS 1, with its gradient.

        Raises:
            UserError: the model has no such sidecar, or the sidecar cannot use the media.
        """
        if medium not in self.sidecars:
            raise UserError(
                f"this model has no sidecar for {medium!r} (it has {', '.join(self.sidecars) or 'none'}); "
                "train one with the flag that enables it"
            )
        device = self.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self.sidecars[medium](media.to(device))

    def take_encoder(self, source: str) -> None:
        """Give the frozen image encoder its weights; see `arbitor.sidecars.encoder.FrozenEncoder.take`.

        Args:
            source: a folder, or a name on the hub.

        Raises:
            UserError: the model has no frozen encoder, or the source does not fit it.
        """
        encoder = getattr(self.sidecars["image"], "encoder", None) if "image" in self.sidecars else None
        if encoder is None:
            raise UserError("this model has no frozen image encoder: its image_encoder is empty")
        encoder.take(source)

    def take_autoencoder(self, source: str) -> None:
        """Give the frozen autoencoder its weights; see `arbitor.sidecars.vae.FrozenAutoencoder.take`.

        Args:
            source: a folder, or a name on the hub.

        Raises:
            UserError: the model has no frozen autoencoder, or the source does not fit it.
        """
        if "video" not in self.sidecars or not self.config.video_autoencoder:
            raise UserError("this model has no frozen autoencoder: its video_autoencoder is empty")
        from arbitor.sidecars.vae import FrozenAutoencoder

        codec = self.sidecars["video"].codec
        assert isinstance(codec, FrozenAutoencoder)
        codec.take(source)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        ledger: KVLedger | None = None,
        prefix: Tensor | None = None,
        target_mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> ARBOutput:
        """Logits of every position, and the loss if targets are given.

        On CUDA, matrix products of floats run in bf16 (autocast), which is the dtype of the residual stream
        as well where Triton's kernels run; see `arbitor.ternary.stream.stream_dtype`.

        Args:
            ids: integers [B, L] in 0..vocab_size - 1, L >= 3 (with a ledger that holds some: L >= 1). Moved
                to the model's device. Their range is checked if they come from the CPU; on another device
                the check would cost a synchronisation each call.
            targets: integers [B, L], usually the ids themselves, L >= 4: position i + 3 is the target of row
                i, and the last row, whose target lies outside, does not count.
            ledger: earlier positions, to which these ids are appended; no gradient is recorded.
            prefix: float [B, P, D], what stands ahead of the ids, from `encode`; with a ledger only while
                that is empty. The ids then begin like every text, with three PAD ahead of its first byte.
            target_mask: bool [B, L], the targets that count for the losses of text and router; None is all.
            context: integers [B, K], K >= 3, ids that come ahead of these. They are read first, without a
                gradient, into a ledger that these ids are read behind, with one; row i then predicts
                position i + 1.

        Returns:
            logits [B, L - 2, vocab_size]; with a context or a ledger that holds some, [B, L, vocab_size].

        Raises:
            UserError: shapes, types or ids that cannot be used.
        """
        ids_BL = self._checked(ids, "ids")
        prefix_BPD = None if prefix is None else self._checked_prefix(prefix, len(ids_BL))
        if ledger is not None:
            if context is not None:
                raise UserError("a context and a ledger were given: the context has a ledger of its own")
            if targets is not None:
                raise UserError(
                    "targets and a ledger were given; a loss needs the whole text without a ledger"
                )
            self.ledgers.add(ledger)
            with torch.no_grad():
                start = ledger.num_positions
                num_prefix = 0 if prefix_BPD is None else prefix_BPD.shape[1]
                done = self._run(ledger.extend(ids_BL, num_prefix), start, ledger, prefix_BPD)
                return ARBOutput(done.logits, None, modalities=done.modalities)
        if context is not None:
            return self._behind(self._checked(context, "context"), ids_BL, targets, prefix, target_mask)
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
        mask_BN = None
        if target_mask is not None:
            if targets_BL is None:
                raise UserError("target_mask says which targets count, and no targets were given")
            mask_BN = self._checked_mask(target_mask, targets_BL)
        done = self._run(ids_BL, 0, None, prefix_BPD)
        if targets_BL is None:
            return ARBOutput(done.logits, None, modalities=done.modalities)
        losses = self._losses(done, targets_BL[:, WINDOW:], mask_BN)
        return ARBOutput(done.logits, self._weighted(losses), losses, done.modalities)

    def _behind(
        self,
        context_BK: Tensor,
        ids_BL: Tensor,
        targets: Tensor | None,
        prefix: Tensor | None,
        target_mask: Tensor | None,
    ) -> ARBOutput:
        """`forward` behind a context."""
        if prefix is not None:
            raise UserError("a context and a prefix were given; a prefix comes ahead of the first ids")
        if context_BK.shape[0] != ids_BL.shape[0] or context_BK.shape[1] < WINDOW or ids_BL.shape[1] < 2:
            raise UserError(
                f"a context of {tuple(context_BK.shape)} and ids of {tuple(ids_BL.shape)}: the batch must "
                f"agree, and they need {WINDOW} and 2 ids at least"
            )
        ledger = KVLedger(self.config, context_BK.shape[1] + ids_BL.shape[1] - 2)
        with torch.no_grad():
            self._run(ledger.extend(context_BK), 0, ledger, None)
        start = ledger.num_positions
        done = self._run(ledger.extend(ids_BL), start, ledger, None)
        if targets is None:
            return ARBOutput(done.logits, None, modalities=done.modalities)
        targets_BL = self._checked(targets, "targets")
        if targets_BL.shape != ids_BL.shape:
            raise UserError(
                f"targets are {tuple(targets_BL.shape)}, ids {tuple(ids_BL.shape)}; both must agree"
            )
        mask_BN = None if target_mask is None else self._checked_mask(target_mask, targets_BL, first=1)
        losses = self._losses(done, targets_BL[:, 1:], mask_BN)
        return ARBOutput(done.logits, self._weighted(losses), losses, done.modalities)

    def speak(
        self,
        ids: Tensor | None,
        codes: Tensor,
        counts: Tensor | None = None,
        *,
        ledger: KVLedger | None = None,
    ) -> ARBOutput:
        """Logits of the codes of a sound behind a text, time by time, and the loss if `counts` are given.

        The text's positions come first, those of the sound behind them; what a time is predicted from is the
        position ahead of it. A sound ends with the first code `heads["audio"].end`.

        Args:
            ids: int64 [B, L], texts that end with the same id; None while the ledger holds the text.
            codes: int64 [B, T, Q], the sounds so far, T >= 0; with a filled ledger, those that follow.
            counts: int64 [B], times of each sound; what stands behind them in `codes` does not count.
            ledger: earlier positions, to which these are appended; no gradient is recorded.

        Returns:
            With `counts`: logits fp32 [B, T + 1, Q, V + 1] and losses, "audio" in nats per code; with a
            router, its logits of all positions and its loss: bytes of the text, and codes. Without: as
            logits the residual stream [B, D] of the last position, which `heads["audio"].draw` takes.

        Raises:
            UserError: the model has no audio sidecar.
        """
        if "audio" not in self.sidecars:
            raise UserError("this model has no sidecar for sounds; make it with enable_audio=True")
        codes_BTQ = codes.to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and ledger is None), self._autocast():
            parts, text = [], None
            if ids is not None:
                ids_BL = self._checked(ids, "ids")
                parts.append(self.sequencer(self.embed(ids_BL)))
                text = _Text(ids_BL, 0, parts[0].shape[1])
            if codes_BTQ.shape[1]:
                parts.append(self.sidecars["audio"](codes_BTQ))
            h_BQD = torch.cat([part.float() for part in parts], dim=1)
            start = 0 if ledger is None else ledger.num_positions
            if ledger is not None:
                self.ledgers.add(ledger)
                ledger.reserve(h_BQD.shape[1])
            h_BQD, losses = self._trunk(h_BQD, start, ledger, text)
        if counts is None:
            return ARBOutput(h_BQD[:, -1].float(), None)
        assert text is not None
        head = self.heads["audio"]
        assert isinstance(head, TalkerHead)
        count_B = counts.to(self.device)
        logits_BTQV, losses["audio"] = head.loss(h_BQD[:, text.end - 1 :], codes_BTQ, count_B)
        modalities_BQC = None
        if self.router is not None:
            # Ahead of the sound the text's ids follow; PAD, which comes ahead of the text, is not predicted.
            text_BN = torch.where(text.ids_BL[:, WINDOW:] == PAD, NOT_COUNTED, MODALITIES.index("text"))
            time_T = torch.arange(codes_BTQ.shape[1] + 1, device=self.device)
            sound_BT = torch.where(time_T <= count_B[:, None], MODALITIES.index("audio"), NOT_COUNTED)
            modalities_BQC = self.router(h_BQD)
            losses["router"] = self._routed(modalities_BQC, torch.cat([text_BN, sound_BT], dim=1))
        return ARBOutput(logits_BTQV, self._weighted(losses, "audio"), losses, modalities_BQC)

    def read(self, ids: Tensor) -> Tensor:
        """The residual stream behind a text, fp32 [B, D]: the condition of the head that draws clips.

        Args:
            ids: integers [B, L], L >= 3, texts that end with the same id.

        Raises:
            UserError: shapes, types or ids that cannot be used.
        """
        return self._read(self._checked(ids, "ids"))[0][:, -1].float()

    def flow(self, ids: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> ARBOutput:
        """The loss of the velocity from noise to a clip's latents, given a text; see `VideoHead.loss`.

        Args:
            ids: integers [B, L], L >= 3, texts that end with the same id.
            latents: float [B, K, T, H, W], of the model's autoencoder.
            noise: float, of the latents' shape, of mean 0 and variance 1.
            t: fp32 [B], 0 at noise and 1 at data.

        Returns:
            As logits the residual stream fp32 [B, D] that the head reads, and losses, "video" as mean square
            error; with a router, its logits of all positions and its loss: bytes of the text, and behind the
            last of them the clip.

        Raises:
            UserError: the model has no video sidecar, or ids that cannot be used.
        """
        if "video" not in self.sidecars:
            raise UserError("this model has no sidecar for clips; make it with enable_video=True")
        from arbitor.sidecars.video import VideoHead

        ids_BL = self._checked(ids, "ids")
        h_BND, losses = self._read(ids_BL)
        condition_BD = h_BND[:, -1].float()
        head = self.heads["video"]
        assert isinstance(head, VideoHead)
        latents, noise, t_B = (tensor.to(self.device) for tensor in (latents, noise, t))
        losses["video"] = head.loss(latents, condition_BD, noise, t_B)
        modalities_BNC = None
        if self.router is not None:
            text_BN = torch.where(ids_BL[:, WINDOW:] == PAD, NOT_COUNTED, MODALITIES.index("text"))
            modalities_BNC = self.router(h_BND)
            modality_BN = F.pad(text_BN, (0, 1), value=MODALITIES.index("video"))
            losses["router"] = self._routed(modalities_BNC, modality_BN)
        return ARBOutput(condition_BD, self._weighted(losses, "video"), losses, modalities_BNC)

    def _read(self, ids_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The residual stream [B, N, D] of a text alone, and the losses of parts that need no targets."""
        with self._autocast():
            h_BND = self.sequencer(self.embed(ids_BL))
            return self._trunk(h_BND, 0, None, _Text(ids_BL, 0, h_BND.shape[1]))

    def part_metrics(self) -> dict[str, Tensor]:
        """Metrics of the last forward, scalars on the device; which ones depends on the parts there are.

        `mean_iterations` of a position in the core; `expert_load`, the largest load over the mean one;
        `motif_perplexity` and `motif_dead_share`; `graph_edges` in use and `graph_reach`, the share of
        positions with neighbours; `router_accuracy` (with targets).
        """
        return dict(self._metrics)

    def prepare_ternary_backward(
        self, loss_signal: Tensor | None = None, update_scales: bool = True
    ) -> VoteOptimizer:
        """Make sure that the coming backward is captured; see `arbitor.ternary.runtime`."""
        return runtime.prepare_ternary_backward(self, loss_signal, update_scales)

    def _ternary_update_memory(
        self,
        loss_signal: Tensor | None = None,
        loss_components: Mapping[str, Tensor] | None = None,
        update_scales: bool = True,
    ) -> bool:
        """Take a step from what backward captured; see `arbitor.ternary.runtime.ternary_update_memory`."""
        return runtime.ternary_update_memory(self, loss_signal, loss_components, update_scales)

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
        prefix: Tensor | None = None,
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
            prefix=prefix,
        )

    def _run(self, ids_BL: Tensor, start: int, ledger: KVLedger | None, prefix_BPD: Tensor | None) -> _Pass:
        """All parts, for the positions whose first one, the prefix's if there is one, is number `start`."""
        num_prefix = 0 if prefix_BPD is None else prefix_BPD.shape[1]
        with self._autocast():
            h_BQD = self.sequencer(self.embed(ids_BL))
            if prefix_BPD is not None:
                h_BQD = torch.cat([prefix_BPD.to(h_BQD.dtype), h_BQD], dim=1)
            text = _Text(ids_BL, num_prefix, h_BQD.shape[1])
            h_BQD, losses = self._trunk(h_BQD, start, ledger, text)
        h_BND = h_BQD[:, num_prefix:]
        # Outside of bf16: the head's integer sums are exact, and rounding logits to 8 bits would cost loss.
        with torch.autocast(h_BND.device.type, enabled=False):
            if not self._is_integer:
                logits_BNS = self.head.logits(h_BND).float()
            elif type(self.head) is ByteHead:
                logits_BNS = self.head.logits(h_BND, dtype=compute_dtype(h_BND)).float()
            else:  # what wraps a head may work in the dtype of its input
                logits_BNS = self.head.logits(widened(h_BND)).float()
        modalities_BNC = None if self.router is None else self.router(h_BND)
        return _Pass(logits_BNS, modalities_BNC, losses)

    @property
    def _is_integer(self) -> bool:
        """Whether its byte table is one of integers: stand-ins of floats keep the dtype that they give."""
        return isinstance(self.embed, Int8Embedding)

    def _autocast(self) -> torch.autocast:
        device = self.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def _trunk(
        self, h_BQD: Tensor, start: int, ledger: KVLedger | None, text: "_Text | None"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What stands between the sequencers and the heads, and the losses of parts that need no targets.

        Args:
            h_BQD: positions of all media, in their order.
            start: number of the first one.
            ledger: holds those ahead of it, if it is not the first.
            text: which of the positions are text; None without any.
        """
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        motif_BQ = None
        if self.vq is not None:
            h_BQD, motif_BQ, vq_losses = self.vq(h_BQD)
            losses |= vq_losses
            metrics |= self.vq.metrics(motif_BQ)
        rotation = rotary.rotation(
            start, h_BQD.shape[1], self.config.rope_dim, self.config.rope_theta, h_BQD.device
        )
        layers = itertools.repeat(None) if ledger is None else iter(ledger.layers)

        def through(blocks: Iterable[nn.Module], h_BQD: Tensor) -> Tensor:
            stream = deferring(h_BQD)
            for block in blocks:
                stream = block(stream, rotation, next(layers))
            return settled(stream)

        if self._is_integer:
            h_BQD = h_BQD.to(stream_dtype(h_BQD))
        prelude = list(self.prelude)
        if self.memory is not None:
            h_BQD = through(prelude[:1], h_BQD)
            h_BQD = self._with_memory(h_BQD, text, motif_BQ, ledger)
            prelude = prelude[1:]
        h_BQD = through(prelude, h_BQD)
        if self.core is not None:
            # In fp32: a position's state is a sum over iterations, and whether it halts a comparison.
            code_vectors = None if self.vq is None else self.vq.code_vectors
            core = self.core(widened(h_BQD), motif_BQ, code_vectors)
            h_BQD = core.state.to(h_BQD.dtype)
            metrics |= core.metrics
            if core.ponder is not None:
                losses["ponder"] = core.ponder
        self._metrics = metrics
        return through(self.coda, h_BQD), losses

    def _with_memory(
        self, h_BQD: Tensor, text: "_Text | None", motif_BQ: Tensor | None, ledger: KVLedger | None
    ) -> Tensor:
        """The residual stream and what the memory adds: of motifs everywhere, of bytes in the text only."""
        assert self.memory is not None
        if self.config.memory_over == "bytes":
            if text is None:
                return h_BQD
            text_BND = h_BQD[:, text.first : text.end]
            text_BND = add_to_stream(text_BND, self.memory(widened(text_BND), text.ids_BL))
            if text_BND.shape[1] == h_BQD.shape[1]:
                return text_BND
            return torch.cat([h_BQD[:, : text.first], text_BND, h_BQD[:, text.end :]], dim=1)
        assert motif_BQ is not None
        motif_BL = self.memory.preceded(motif_BQ, None if ledger is None else ledger.motif_tail)
        if ledger is not None:
            ledger.motif_tail = motif_BL[:, -2:].clone()
        return add_to_stream(h_BQD, self.memory(widened(h_BQD), motif_BL))

    def _losses(self, done: _Pass, targets_BN: Tensor, mask_BN: Tensor | None) -> dict[str, Tensor]:
        """Losses of all rows but the last, whose target is not known; those of the parts, of all rows.

        Args:
            done: the pass through the parts.
            targets_BN: int64, of all rows but the last.
            mask_BN: bool, those that count; None is all.
        """
        if mask_BN is not None:
            targets_BN = targets_BN.masked_fill(~mask_BN, NOT_COUNTED)
        text = F.cross_entropy(
            done.logits[:, :-1].flatten(0, 1), targets_BN.flatten(), ignore_index=NOT_COUNTED
        )
        losses = {"text": text, **done.losses}
        if done.modalities is not None:
            # A prefix has no head that predicts it, so only the text's rows have a modality to learn.
            modality_BN = torch.full_like(targets_BN, MODALITIES.index("text"))
            modality_BN = modality_BN.masked_fill(targets_BN == NOT_COUNTED, NOT_COUNTED)
            losses["router"] = self._routed(done.modalities[:, :-1], modality_BN)
        return losses

    def _routed(self, modalities_BNC: Tensor, modality_BN: Tensor) -> Tensor:
        """The router's loss, and its accuracy among the metrics; see `OutputRouter.loss`."""
        loss, self._metrics["router_accuracy"] = OutputRouter.loss(modalities_BNC, modality_BN)
        return loss

    def _weighted(self, losses: dict[str, Tensor], main: str = "text") -> Tensor:
        """Sum of the losses, each times its weight; that of `main` has 1."""
        weights = {
            "commitment": 1.0,
            "diversity": DIVERSITY_WEIGHT,
            "ponder": self.config.ponder_weight,
            "router": ROUTER_WEIGHT,
        }
        total = losses[main]
        for name, weight in weights.items():
            if weight and name in losses:
                total = total + weight * losses[name]
        return total

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

    def _checked_prefix(self, prefix: Tensor, batch: int) -> Tensor:
        """Float [B, P, D] on the model's device."""
        wanted = f"a float tensor of shape ({batch}, positions, {self.config.dim}), as encode() makes it"
        if not isinstance(prefix, Tensor):
            raise UserError(f"prefix must be {wanted}, got {type(prefix).__name__}")
        fits = prefix.dim() == 3 and prefix.shape[0] == batch and prefix.shape[2] == self.config.dim
        if not fits or not prefix.shape[1] or not prefix.is_floating_point():
            raise UserError(f"prefix must be {wanted}, got {prefix.dtype} {tuple(prefix.shape)}")
        return prefix.to(self.device)

    def _checked_mask(self, target_mask: Tensor, targets_BL: Tensor, first: int = WINDOW) -> Tensor:
        """Bool [B, L - first] on the model's device: the targets of all rows but the last that count."""
        if target_mask.dtype != torch.bool or target_mask.shape != targets_BL.shape:
            raise UserError(
                f"target_mask must be bool of the targets' shape {tuple(targets_BL.shape)}, got "
                f"{target_mask.dtype} {tuple(target_mask.shape)}"
            )
        mask_BN = target_mask[:, first:]
        if mask_BN.device.type == "cpu" and not bool(mask_BN.any()):
            raise UserError(f"target_mask counts no target from position {first} on; the loss needs one")
        return mask_BN.to(self.device)


def _resolve(
    preset: str | None,
    config: ModelConfig | None,
    enable_memory: bool | None,
    enable_vision: bool | None,
    enable_audio: bool | None,
    enable_video: bool | None,
    overrides: dict[str, Any],
) -> ModelConfig:
    """The configuration that the constructor's arguments mean."""
    if preset is not None and config is not None:
        raise UserError("ARBModel takes either the name of a preset or config=ModelConfig(...), not both")
    if config is None:
        config = presets.preset(DEFAULT_PRESET if preset is None else preset).model
    allowed = [field.name for field in dataclasses.fields(config)]
    for name in overrides:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise UserError(f"ModelConfig has no field {name!r}{hint}; allowed are {', '.join(allowed)}")
    config = dataclasses.replace(config, **overrides)
    if enable_memory is not None:
        rows = (config.memory_rows or presets.MEMORY_ROWS) if enable_memory else 0
        config = dataclasses.replace(config, memory_rows=rows)
    if enable_vision is not None:
        size = (config.image_size or presets.IMAGE_SIZE) if enable_vision else 0
        config = dataclasses.replace(config, image_size=size)
    if enable_audio is not None:
        rate = (config.audio_rate or presets.AUDIO_RATE) if enable_audio else 0
        config = dataclasses.replace(config, audio_rate=rate)
    if enable_video is not None:
        size = (config.video_size or presets.VIDEO_SIZE) if enable_video else 0
        config = dataclasses.replace(config, video_size=size)
    return config
