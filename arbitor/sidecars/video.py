"""Clips of video: a ternary autoencoder between pixels and latents, and a head that draws latents by a flow.

Rectified flow (Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching for Generative
Modeling"): on the straight line x_t = (1 - t) noise + t data the head predicts the velocity data - noise, and
a clip is drawn by following the velocity from noise at t = 0 to data at t = 1.

Shape letters: B clips, C channels, F frames, S pixels a side, K = 16 channels of the latents, T, H, W their
times, rows and columns, P = T H W positions, N numbers of a patch, D width, E width of the condition.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.config import LATENT_CHANNELS, VIDEO_HEAD_DIM, ModelConfig
from arbitor.errors import UserError
from arbitor.model.ffn import after_squared_relu
from arbitor.model.norm import rms_norm
from arbitor.ternary import Int8Embedding, Int8Vector, TernaryLinear
from arbitor.ternary.stream import add_to_stream

MIDDLE = 128  # the grey that becomes 0
STANDARD_BITS = 12  # after the point of the constants that standardise latents
TIME_FREQUENCIES = 32
MAX_FREQUENCY = 64.0  # radians over the way from noise to data
MODULATION = 0.5  # of the stream's scale and shift, per unit of what time and condition say
SAMPLERS = ("euler", "heun")


class PatchBlock(nn.Module):
    """x + W2 relu(W1 x)^2 at every position.

    Args:
        dim: D.
        device: where to make it.
    """

    def __init__(self, dim: int, device: torch.device | None) -> None:
        super().__init__()
        self.up = TernaryLinear(dim, 2 * dim, device=device)
        self.down = TernaryLinear(2 * dim, dim, device=device)

    def forward(self, h: Tensor) -> Tensor:
        """Float [..., D] -> the same."""
        return h + after_squared_relu(self.down, self.up(h))


class ClipAutoencoder(nn.Module):
    """What turns clips into latents of 16 channels and back.

    Args:
        size: S.
        frames: F.
        channels: C.
        latent_shape: (16, T, H, W).

    Attributes:
        size, frames, channels, latent_shape: the same.
    """

    def __init__(
        self, size: int, frames: int, channels: int, latent_shape: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.size, self.frames, self.channels = size, frames, channels
        self.latent_shape = latent_shape

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Clips in latents and back.

        Args:
            clips: uint8 [B, F, C, S, S].
            noise: float [B, 16, T, H, W] that is added to the latents, in units of what they are ahead of
                standardisation; it makes the decoder bear latents that were drawn.

        Returns:
            fp32 [B, F, C, S, S]; 0 to 1 is black to white, and it may lie outside.
        """
        raise NotImplementedError

    def encode(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, C, S, S] -> standardised latents fp32 [B, 16, T, H, W], without gradient.

        Raises:
            UserError: another dtype or shape.
        """
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents float [B, 16, T, H, W] -> uint8 [B, F, C, S, S].

        Raises:
            UserError: another shape.
        """
        raise NotImplementedError

    def loss(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean square error of pixels (1 is black to white) of clips in latents and back; see `forward`."""
        return F.mse_loss(self(clips, noise), clips.float() / 255)

    def standardise(self, clips: Tensor, share: float = 1.0) -> None:
        """Make latents like those of these clips have mean 0 and variance 1, if that can be set at all.

        Args:
            clips: uint8 [B, F, C, S, S].
            share: of the way from how it is now.
        """

    def _checked(self, clips: Tensor) -> Tensor:
        wanted = (self.frames, self.channels, self.size, self.size)
        if clips.dtype != torch.uint8 or clips.dim() != 5 or tuple(clips.shape[1:]) != wanted:
            raise UserError(
                f"clips must be uint8 of shape (batch, {', '.join(map(str, wanted))}), got {clips.dtype} "
                f"{tuple(clips.shape)}"
            )
        return clips

    def _checked_latents(self, latents: Tensor) -> Tensor:
        if latents.dim() != 5 or tuple(latents.shape[1:]) != self.latent_shape:
            raise UserError(
                f"latents must have the shape (batch, {', '.join(map(str, self.latent_shape))}), got "
                f"{tuple(latents.shape)}"
            )
        return latents


class VideoAutoencoder(ClipAutoencoder):
    """Boxes of a few frames and pixels as 16 numbers each, and back, by ternary linears.

    Every box is coded by itself. What comes out of `encode` has mean 0 and variance 1 in every channel of the
    data that `standardise` was called with: its constants are integers, in units of 2^-12, and a checkpoint
    holds them. Votes do not change them.

    Args:
        size: S.
        frames: F.
        channels: C.
        patch: pixels a side of a box.
        stride: frames of a box.
        dim: width of the hidden layers.
        num_layers: blocks on each side of the latents.
        device: where to make it.

    Attributes:
        latent_shape: (16, T, H, W).

    Raises:
        UserError: sizes that do not divide.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        *,
        size: int = 16,
        frames: int = 8,
        channels: int = 1,
        patch: int = 4,
        stride: int = 2,
        dim: int = 160,
        num_layers: int = 2,
        device: torch.device | str | None = None,
    ) -> None:
        if size % patch or frames % stride:
            raise UserError(
                f"{frames} frames of {size} pixels do not divide into boxes of {stride} frames of {patch}"
            )
        side = size // patch
        super().__init__(size, frames, channels, (LATENT_CHANNELS, frames // stride, side, side))
        place = None if device is None else torch.device(device)
        self.patch, self.stride = patch, stride
        numbers = channels * stride * patch**2
        self.enter = TernaryLinear(numbers, dim, input_norm=False, device=place)
        self.encoder = nn.ModuleList(PatchBlock(dim, place) for _ in range(num_layers))
        self.to_latent = TernaryLinear(dim, LATENT_CHANNELS, device=place)
        self.from_latent = TernaryLinear(LATENT_CHANNELS, dim, input_norm=False, device=place)
        self.decoder = nn.ModuleList(PatchBlock(dim, place) for _ in range(num_layers))
        # A linear of a normalised input has one magnitude; the gate lets a box keep to the bias, first black.
        self.leave = TernaryLinear(dim, 2 * numbers, device=place)
        self.bias = Int8Vector(numbers, fraction_bits=5, value=-1.0, device=place)
        for name, value in (("latent_mean", 0), ("latent_std", 1 << STANDARD_BITS)):
            constants = torch.full((LATENT_CHANNELS,), value, dtype=torch.int32, device=place)
            self.register_buffer(name, constants)

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `ClipAutoencoder.forward`."""
        with exact(clips):
            latents = self._latents(self._checked(clips))
            if noise is not None:
                latents = latents + noise.permute(0, 2, 3, 4, 1).flatten(1, 3)
            return self._pixels(latents)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """See `ClipAutoencoder.encode`."""
        with exact(clips):
            mean_K, std_K = self._constants()
            z_BPK = (self._latents(self._checked(clips)) - mean_K) / std_K
        return z_BPK.unflatten(1, self.latent_shape[1:]).permute(0, 4, 1, 2, 3)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ClipAutoencoder.decode`."""
        with exact(latents):
            mean_K, std_K = self._constants()
            z_BPK = self._checked_latents(latents).float().permute(0, 2, 3, 4, 1).flatten(1, 3)
            pixels = self._pixels(z_BPK * std_K + mean_K)
        return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)

    @torch.no_grad()
    def standardise(self, clips: Tensor, share: float = 1.0) -> None:
        """Set the constants so that the latents of these clips have mean 0 and variance 1 in every channel.

        Args:
            clips: uint8 [B, F, C, S, S].
            share: of the way from the constants that there are to those of the clips; below 1 they follow an
                autoencoder that learns.
        """
        with exact(clips):
            z_MK = self._latents(self._checked(clips)).flatten(0, 1).double()
        unit = float(1 << STANDARD_BITS)
        mean_K, std_K = z_MK.mean(dim=0) * unit, z_MK.std(dim=0, correction=0) * unit
        for constants, wanted_K in ((self.latent_mean, mean_K), (self.latent_std, std_K)):
            constants.copy_((constants + share * (wanted_K - constants)).round())
        self.latent_std.clamp_min_(1)

    def _constants(self) -> tuple[Tensor, Tensor]:
        unit = 2.0**-STANDARD_BITS
        return self.latent_mean.float() * unit, self.latent_std.float() * unit

    def _latents(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, C, S, S] -> fp32 [B, P, K], not standardised."""
        B, T, side, p = len(clips), self.latent_shape[1], self.latent_shape[2], self.patch
        x = (clips.float() - MIDDLE) / MIDDLE
        x = x.view(B, T, self.stride, self.channels, side, p, side, p).permute(0, 1, 4, 6, 2, 3, 5, 7)
        h_BPD = self.enter(x.reshape(B, T * side * side, -1))
        for block in self.encoder:
            h_BPD = block(h_BPD)
        return self.to_latent(h_BPD)

    def _pixels(self, latents_BPK: Tensor) -> Tensor:
        """Not standardised latents -> fp32 [B, F, C, S, S]."""
        B, T, side, p = len(latents_BPK), self.latent_shape[1], self.latent_shape[2], self.patch
        h_BPD = self.from_latent(latents_BPK)
        for block in self.decoder:
            h_BPD = block(h_BPD)
        x = (2 * gated(self.leave(h_BPD)) + self.bias()).view(
            B, T, side, side, self.stride, self.channels, p, p
        )
        x = x.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(B, self.frames, self.channels, self.size, self.size)
        return x / 2 + MIDDLE / 255


class FlowBlock(nn.Module):
    """Attention among all positions, then a feed-forward part, each on the modulated stream and added to it.

    As in the diffusion transformer (Peebles and Xie 2023, section 3.2), time and condition scale and shift
    what each part reads; unlike there, nothing gates what it adds.

    Args:
        dim: D, a multiple of 32.
        device: where to make it.
    """

    def __init__(self, dim: int, device: torch.device | None) -> None:
        super().__init__()
        self.num_heads = dim // VIDEO_HEAD_DIM
        self.modulate = TernaryLinear(dim, 4 * dim, device=device)
        self.qkv = TernaryLinear(dim, 3 * dim, device=device)
        self.out = TernaryLinear(dim, dim, device=device)
        self.up = TernaryLinear(dim, 4 * dim, device=device)
        self.down = TernaryLinear(4 * dim, dim, device=device)

    def forward(self, h_BPD: Tensor, c_BD: Tensor) -> Tensor:
        """Stream fp32 [B, P, D] and what time and condition say [B, D] -> the stream."""
        modulation = (MODULATION * self.modulate(c_BD).float())[:, None].chunk(4, dim=-1)
        qkv = self.qkv(modulated(h_BPD, *modulation[:2])).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rms_norm(query), rms_norm(key), value)
        h_BPD = add_to_stream(h_BPD, self.out(mixed.transpose(1, 2).flatten(2)))
        return add_to_stream(h_BPD, after_squared_relu(self.down, self.up(modulated(h_BPD, *modulation[2:]))))


class VideoHead(nn.Module):
    """Velocity of the flow from noise to latents, given a time and a condition.

    A transformer over the latents' positions, all of which see each other. What it predicts is the rest that
    the best linear guess for data of variance 1 leaves, in units of its standard deviation (as Karras et al.
    2022, "Elucidating the Design Space of Diffusion-Based Generative Models", section 5, do for diffusion):
    velocity = (2t - 1) / v x_t + prediction / sqrt(v) with v = (1 - t)^2 + t^2.

    Args:
        latent_shape: (16, T, H, W).
        condition_dim: E.
        dim: D, a multiple of 32.
        num_layers: blocks.
        device: where to make it.

    Raises:
        UserError: a width that the heads of 32 do not divide.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int, int],
        condition_dim: int,
        *,
        dim: int = 160,
        num_layers: int = 4,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim % VIDEO_HEAD_DIM:
            raise UserError(f"the width of a video head must be a multiple of {VIDEO_HEAD_DIM}, got {dim}")
        place = None if device is None else torch.device(device)
        self.latent_shape = latent_shape
        channels = latent_shape[0]
        self.embed = TernaryLinear(channels, dim, input_norm=False, device=place)
        self.places = nn.ModuleList(Int8Embedding(size, dim, device=place) for size in latent_shape[1:])
        self.time_in = TernaryLinear(2 * TIME_FREQUENCIES, dim, device=place)
        self.time_out = TernaryLinear(dim, dim, device=place)
        self.condition = TernaryLinear(condition_dim, dim, device=place)
        self.blocks = nn.ModuleList(FlowBlock(dim, place) for _ in range(num_layers))
        self.modulate = TernaryLinear(dim, 2 * dim, device=place)
        self.leave = TernaryLinear(dim, 2 * channels, device=place)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The velocity at x_t.

        Args:
            x_t: float [B, 16, T, H, W].
            t: fp32 [B], 0 at noise and 1 at data.
            condition: float [B, E]; its magnitude does not count.

        Returns:
            fp32 [B, 16, T, H, W].
        """
        t_B1111 = t.float()[:, None, None, None, None]
        variance = (1 - t_B1111).square() + t_B1111.square()
        x_t = x_t.float()
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=x_t.device.type == "cuda"):
            rest = self._rest(x_t * variance.rsqrt(), t, condition)
        return (2 * t_B1111 - 1) / variance * x_t + rest * variance.rsqrt()

    def loss(self, latents: Tensor, condition: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean square error of the velocity, fp32 scalar.

        Args:
            latents: float [B, 16, T, H, W], the data.
            condition: float [B, E].
            noise: float, of the latents' shape, of mean 0 and variance 1.
            t: fp32 [B].
        """
        t_B1111 = t.float()[:, None, None, None, None]
        x_t = (1 - t_B1111) * noise + t_B1111 * latents
        return F.mse_loss(self(x_t, t, condition), latents - noise)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Tensor,
        *,
        steps: int = 32,
        sampler: str = "heun",
        guidance: float = 1.0,
        no_condition: Tensor | None = None,
    ) -> Tensor:
        """Latents drawn by following the velocity from noise to data in equal steps of time.

        Args:
            noise: float [B, 16, T, H, W], of mean 0 and variance 1; all that the result depends on.
            condition: float [B, E].
            steps: of time.
            sampler: "euler", one velocity a step, or "heun", two, of the second order.
            guidance: how far to go beyond the velocity without a condition (Ho and Salimans 2022,
                "Classifier-Free Diffusion Guidance"); 1 takes the velocity as it is.
            no_condition: float [B, E], the condition of an empty text; needed for a guidance other than 1.

        Returns:
            fp32 [B, 16, T, H, W].

        Raises:
            UserError: no steps, another sampler, or guidance without `no_condition`.
        """
        if steps < 1:
            raise UserError(f"a clip takes at least one step to draw, got {steps}")
        if guidance != 1.0 and no_condition is None:
            raise UserError(f"a guidance of {guidance:g} needs no_condition, the condition of an empty text")

        def velocity(x: Tensor, time: float) -> Tensor:
            t_B = torch.full((len(x),), time, device=x.device)
            with_it = self(x, t_B, condition)
            if guidance == 1.0 or no_condition is None:
                return with_it
            without = self(x, t_B, no_condition)
            return without + guidance * (with_it - without)

        return integrate(velocity, noise.float(), steps, sampler)

    def _rest(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction fp32 [B, 16, T, H, W] for x of variance 1."""
        c_BD = rms_norm(self.time_out(F.relu(self.time_in(time_waves(t))).square()).float())
        c_BD = c_BD + rms_norm(self.condition(condition).float())
        h_BPD = self.embed(x.flatten(2).mT).float() + place_vectors(self.places) + c_BD[:, None]
        for block in self.blocks:
            h_BPD = block(h_BPD, c_BD)
        modulation = (MODULATION * self.modulate(c_BD).float())[:, None].chunk(2, dim=-1)
        rest_BPK = gated(self.leave(modulated(h_BPD, *modulation)).float())
        return rest_BPK.mT.unflatten(2, self.latent_shape[1:])


class VideoSequencer(nn.Module):
    """A position of the latents as one of the residual stream: rms_norm(linear + time, row, column vectors).

    Attributes:
        codec: the autoencoder.

    Args:
        config: the fields `video_*` and `dim`.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.codec = make_autoencoder(config, device)
        shape = self.codec.latent_shape
        self.from_latent = TernaryLinear(
            shape[0], config.dim, tscale=config.tscale, input_norm=False, device=device
        )
        self.places = nn.ModuleList(Int8Embedding(size, config.dim, device=device) for size in shape[1:])

    def forward(self, clips: Tensor) -> Tensor:
        """Clips uint8 [B, F, C, S, S] -> [B, P, D] of RMS 1, times first, then rows, then columns.

        Raises:
            UserError: another dtype or shape.
        """
        latents = self.codec.encode(clips)
        return rms_norm(self.from_latent(latents.flatten(2).mT).float() + place_vectors(self.places))


def make_autoencoder(config: ModelConfig, device: torch.device | None = None) -> ClipAutoencoder:
    """The autoencoder that a configuration asks for: of trits, or a frozen one."""
    size, frames, channels = config.video_size, config.video_frames, config.video_channels
    if config.video_autoencoder:
        from arbitor.sidecars.vae import FrozenAutoencoder

        return FrozenAutoencoder(
            config.video_autoencoder, size=size, frames=frames, channels=channels, device=device
        )
    return VideoAutoencoder(
        size=size,
        frames=frames,
        channels=channels,
        patch=config.video_patch,
        stride=config.video_stride,
        dim=config.video_dim,
        device=device,
    )


def make_video_head(config: ModelConfig, device: torch.device | None = None) -> VideoHead:
    """The head that a configuration asks for; its condition is the residual stream behind a text."""
    side = config.video_size // config.video_patch
    shape = (LATENT_CHANNELS, config.video_frames // config.video_stride, side, side)
    return VideoHead(shape, config.dim, dim=config.video_dim, num_layers=config.video_layers, device=device)


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, sampler: str) -> Tensor:
    """x at time 1 from x at time 0, by equal steps.

    Args:
        velocity: (x, time) -> dx / dtime.
        x: where to begin.
        steps: how many.
        sampler: "euler" or "heun".

    Raises:
        UserError: another sampler.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    for step in range(steps):
        first = velocity(x, step / steps)
        ahead = x + first / steps
        if sampler == "heun":
            ahead = x + (first + velocity(ahead, (step + 1) / steps)) / (2 * steps)
        x = ahead
    return x


def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """rms_norm(h) (1 + scale) + shift."""
    return rms_norm(h) * (1 + scale) + shift


def place_vectors(tables: nn.ModuleList) -> Tensor:
    """fp32 [P, D]: the vectors of a position's time, row and column, added.

    Args:
        tables: three of `Int8Embedding`, of times, rows and columns.
    """
    vectors = []
    for table in tables:
        assert isinstance(table, Int8Embedding)
        vectors.append(table(torch.arange(table.num_embeddings, device=table.q.device)))
    times, rows, columns = vectors
    return (times[:, None, None] + rows[:, None] + columns).flatten(0, 2)


def gated(h: Tensor) -> Tensor:
    """The first half of the last dimension times the logistic function of the second."""
    value, gate = h.chunk(2, dim=-1)
    return value * gate.sigmoid()


def time_waves(t: Tensor) -> Tensor:
    """Times fp32 [B] -> sines and cosines fp32 [B, 64] of frequencies from 1 to 64, in octaves' parts."""
    octaves = torch.arange(TIME_FREQUENCIES, device=t.device) / (TIME_FREQUENCIES - 1)
    angles = t.float()[:, None] * torch.exp(octaves * math.log(MAX_FREQUENCY))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def exact(x: Tensor) -> torch.autocast:
    """Outside of bf16, in which latents would be known to 8 bits."""
    return torch.autocast(x.device.type, enabled=False)
