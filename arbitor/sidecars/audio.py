"""AudioVQEncoder: a waveform as a few codes of trits a time, and back; AudioSequencer: those as positions.

Shape letters: B waveforms, N samples, F frames (100 a second), T = F / 2 times (50 a second), Q codes a time,
K trits of a code, C channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model.norm import rms_norm
from arbitor.model.vq import quantize
from arbitor.ops.fsq import fsq_trits
from arbitor.sidecars.spectrum import equalised, inverse_frames, log_mel, reconstruction_loss
from arbitor.ternary import Int8Vector, TernaryConv1d, TernaryLinear, TernaryUpsample1d

FRAMES_PER_SECOND = 100
STRIDE = 2  # frames of a time
TIMES_PER_SECOND = FRAMES_PER_SECOND // STRIDE
BANDS = 64
# Log magnitudes are mapped from about -11 ... 1 to about -2 ... 2.
LOG_MIDDLE, LOG_UNIT = -5.0, 3.0
HEAD_GAIN = 2.0  # of log magnitudes, nats per unit of the head's output
MAX_LOG = 2.0  # e^2 is 17 dB above full scale


class CodecOutput(NamedTuple):
    """What the codec returns.

    Attributes:
        wave: fp32 [B, N].
        ids: int64 [B, T, Q].
    """

    wave: Tensor
    ids: Tensor


class ConvBlock(nn.Module):
    """x + W2 relu(W1 window(x))^2, at every time.

    Args:
        dim: C.
        kernel_size, dilation: of W1.
        device: where to make it.
    """

    def __init__(self, dim: int, kernel_size: int, dilation: int, device: torch.device | None) -> None:
        super().__init__()
        self.up = TernaryConv1d(dim, 2 * dim, kernel_size, dilation=dilation, device=device)
        self.down = TernaryConv1d(2 * dim, dim, 1, device=device)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Float [B, C, T] -> the same."""
        return x_BCT + self.down(F.relu(self.up(x_BCT)).square())


class AudioVQEncoder(nn.Module):
    """Log-mel frames -> strided ternary convolutions -> FSQ codes -> ternary decoder -> spectra -> waveform.

    The encoder's first layer is fixed: 64 log-mel magnitudes of 40 ms every 10 ms. A convolution of the
    samples themselves would lose how loud they are, since every ternary layer divides by the root mean square
    of its input and none has a bias. The decoder predicts magnitude and phase of every frame and transforms
    them back (Siuzdak 2023, "Vocos: Closing the gap between time-domain and Fourier-based neural vocoders"),
    so all its layers work at the rate of frames. Codes are finite scalar quantisation with three levels
    (`arbitor.ops.fsq`); their look-up is exact.

    Args:
        rate: samples a second of the waveforms, a multiple of 200.
        dim: C.
        num_codes: Q.
        code_trits: K, so that a code is one of 3^K.
        num_layers: blocks on each side of the codes.
        device: where to make it.

    Raises:
        UserError: a size that cannot be used.
    """

    def __init__(
        self,
        *,
        rate: int = 8000,
        dim: int = 160,
        num_codes: int = 4,
        code_trits: int = 5,
        num_layers: int = 3,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if rate < 2000 or rate % (2 * FRAMES_PER_SECOND):
            raise UserError(f"the rate of a codec must be a multiple of 200 from 2000 Hz on, got {rate}")
        if num_codes < 1 or num_layers < 1:
            raise UserError(f"a codec needs codes and layers, got {num_codes} and {num_layers}")
        self.rate, self.dim, self.num_codes, self.code_trits = rate, dim, num_codes, code_trits
        self.hop = rate // FRAMES_PER_SECOND
        self.window = 4 * self.hop
        bins = self.window // 2 + 1
        place = None if device is None else torch.device(device)
        dilations = [3**layer % 26 for layer in range(num_layers)]  # 1, 3, 9, then again
        self.enter = TernaryConv1d(BANDS, dim, 5, input_norm=False, device=place)
        self.frames_in = ConvBlock(dim, 3, 1, place)
        self.squeeze = TernaryConv1d(dim, dim, 2 * STRIDE, stride=STRIDE, device=place)
        self.encoder = nn.ModuleList(ConvBlock(dim, 3, d, place) for d in dilations)
        self.to_code = TernaryConv1d(dim, num_codes * code_trits, 1, device=place)
        self.from_code = TernaryConv1d(num_codes * code_trits, dim, 3, input_norm=False, device=place)
        self.decoder = nn.ModuleList(ConvBlock(dim, 3, d, place) for d in dilations)
        self.spread = TernaryUpsample1d(dim, dim, STRIDE, kernel_size=3, device=place)
        self.frames_out = nn.ModuleList(ConvBlock(dim, 3, 1, place) for _ in range(2))
        self.leave = TernaryConv1d(dim, 3 * bins, 1, device=place)
        self.log_bias = Int8Vector(bins, fraction_bits=3, value=-8.0, device=place)

    @property
    def num_values(self) -> int:
        """How many values a code has: 3^K."""
        return 3**self.code_trits

    @property
    def samples_per_time(self) -> int:
        """Samples that one time's codes stand for."""
        return STRIDE * self.hop

    def features(self, wave_BN: Tensor) -> Tensor:
        """fp32 [B, N], N a multiple of `samples_per_time` -> what the encoder reads, [B, 64, F]."""
        bands_BFM = log_mel(wave_BN, self.rate, self.window, self.hop, BANDS)
        return ((bands_BFM - LOG_MIDDLE) / LOG_UNIT).transpose(1, 2)

    def forward(self, wave: Tensor) -> CodecOutput:
        """A waveform in codes and back, with the gradient passed straight through the rounding.

        Args:
            wave: float [B, N] in -1...1, N >= 1.
        """
        code_BTQK, ids_BTQ = self._codes(self._checked(wave))
        return CodecOutput(self._waveform(code_BTQK)[:, : wave.shape[1]], ids_BTQ)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Float [B, N] -> ids int64 [B, T, Q] in 0...3^K - 1, T = ceil(N / samples_per_time)."""
        return self._codes(self._checked(wave))[1]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, T, Q] -> waveform fp32 [B, T * samples_per_time].

        Raises:
            UserError: another shape, or ids out of range (not checked on CUDA).
        """
        if ids.dim() != 3 or ids.shape[2] != self.num_codes or ids.is_floating_point():
            raise UserError(
                f"codes must be integers (batch, times, {self.num_codes}), got {ids.dtype} {tuple(ids.shape)}"
            )
        if not ids.numel():
            return torch.zeros(len(ids), 0, device=ids.device)
        if ids.device.type == "cpu":
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.num_values:
                wrong = low if low < 0 else high
                raise UserError(f"codes must be 0...{self.num_values - 1}, got {wrong}")
        return self._waveform(fsq_trits(ids, self.code_trits).float())

    def loss(self, wave: Tensor) -> tuple[Tensor, CodecOutput]:
        """`reconstruction_loss` of a waveform [B, N] in codes and back, and what came back."""
        output = self(wave)
        return reconstruction_loss(output.wave, wave, self.rate), output

    def _checked(self, wave: Tensor) -> Tensor:
        """fp32, filled up with zeros to whole times."""
        if wave.dim() != 2 or not wave.shape[1] or not wave.is_floating_point():
            raise UserError(
                f"a codec takes float waveforms (batch, samples), got {wave.dtype} {tuple(wave.shape)}"
            )
        return F.pad(wave.float(), (0, -wave.shape[1] % self.samples_per_time))

    def _codes(self, wave_BN: Tensor) -> tuple[Tensor, Tensor]:
        # Outside of bf16, in which more numbers would fall onto the threshold of a trit.
        with torch.autocast(wave_BN.device.type, enabled=False):
            h_BCF = self.frames_in(self.enter(self.features(wave_BN)))
            h_BCT = self.squeeze(h_BCF)
            for block in self.encoder:
                h_BCT = block(h_BCT)
            z_BTC = self.to_code(h_BCT).transpose(1, 2)
            return quantize(z_BTC.unflatten(2, (self.num_codes, self.code_trits)))

    def _waveform(self, code_BTQK: Tensor) -> Tensor:
        with torch.autocast(code_BTQK.device.type, enabled=False):
            h_BCT = self.from_code(code_BTQK.flatten(2).transpose(1, 2))
            for block in self.decoder:
                h_BCT = block(h_BCT)
            h_BCF = self.spread(h_BCT)
            for block in self.frames_out:
                h_BCF = block(h_BCF)
            log_BFK, real_BFK, imaginary_BFK = self.leave(h_BCF).transpose(1, 2).chunk(3, dim=-1)
            magnitude = (HEAD_GAIN * log_BFK + self.log_bias()).clamp(max=MAX_LOG).exp()
            scale = magnitude * (real_BFK.square() + imaginary_BFK.square() + 1e-6).rsqrt()
            spectrum = torch.complex(scale * real_BFK, scale * imaginary_BFK)
            return inverse_frames(spectrum, self.window, self.hop)


class AudioSequencer(nn.Module):
    """A fiftieth of a second of sound as one position: rms_norm(a ternary linear of its codes' trits).

    So codes that differ in a trit have vectors that are alike, which a table of codes would have to learn.

    Attributes:
        codec: what turns waveforms into codes. Listening and speaking do not change it.
        equalise: whether waveforms are brought to one spectrum in the long run.

    Args:
        config: the fields `audio_*` and `dim`.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.equalise = config.audio_equalise
        self.codec = AudioVQEncoder(
            rate=config.audio_rate,
            dim=config.audio_dim,
            num_codes=config.audio_codes,
            code_trits=config.audio_trits,
            num_layers=config.audio_layers,
            device=device,
        )
        # Trits have one magnitude, and how many of them are 0 says something: no norm.
        self.from_trits = TernaryLinear(
            config.audio_codes * config.audio_trits,
            config.dim,
            tscale=config.tscale,
            input_norm=False,
            device=device,
        )

    def forward(self, sound: Tensor) -> Tensor:
        """Waveforms float [B, N] at the codec's rate, or codes int64 [B, T, Q] -> [B, T, D] of RMS 1.

        A waveform is brought to a largest sample of 1/2 first, and with `equalise` to the usual spectrum in
        the long run: what is said depends neither on how loud it is nor on the microphone.

        Raises:
            UserError: another shape.
        """
        codes_BTQ = self._heard(sound) if sound.is_floating_point() else sound
        if codes_BTQ.dim() != 3 or codes_BTQ.shape[2] != self.codec.num_codes:
            raise UserError(
                f"codes must have the shape (batch, times, {self.codec.num_codes}), got {tuple(sound.shape)}"
            )
        trits_BTQK = fsq_trits(codes_BTQ, self.codec.code_trits)
        return rms_norm(self.from_trits(trits_BTQK.flatten(2).float()).float())

    def _heard(self, wave_BN: Tensor) -> Tensor:
        if wave_BN.dim() == 2 and wave_BN.shape[1]:  # else the codec says what is wrong
            wave_BN = levelled(wave_BN)
            if self.equalise:
                wave_BN = levelled(equalised(wave_BN, self.codec.rate))
        return self.codec.encode(wave_BN)


def levelled(wave_BN: Tensor) -> Tensor:
    """Each waveform [N] times what makes its largest sample 1/2; silence stays what it is."""
    return wave_BN * (0.5 / wave_BN.abs().amax(dim=-1, keepdim=True).clamp_min(1e-4))
