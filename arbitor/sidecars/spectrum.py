"""Spectra of waveforms: short-time transforms there and back, mel bands, and the distances made of them.

Shape letters: B waveforms, N samples, F frames, W samples of a window, K frequency bins, M mel bands.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-5  # magnitudes below count as this one ahead of a logarithm
METRIC_RATE, METRIC_BANDS, METRIC_WINDOW, METRIC_HOP = 16_000, 80, 1024, 256
# Windows in seconds and bands of the reconstruction's loss.
LOSS_SCALES = ((0.008, 16), (0.016, 32), (0.032, 64), (0.064, 80), (0.128, 80))
WAVE_WEIGHT = 1.0
EQUAL_BANDS = 12
EQUAL_MARGIN = 0.1  # seconds of silence that a filter may ring into
EQUAL_FALL = 3.0  # amplitude falls as 1 / (1 + 3 u) for u from 0 to 1 over the bands: 12 dB
MOST_EQUALISED = 2.5  # nats of amplitude, 22 dB, from the mean of the bands


@lru_cache(maxsize=64)
def _window(size: int, device: torch.device) -> Tensor:
    """A periodic Hann window, fp32 [W]."""
    return torch.hann_window(size, device=device)


@lru_cache(maxsize=64)
def mel_filters(rate: int, bins: int, bands: int, device: torch.device) -> Tensor:
    """Triangles of equal height 1 whose feet are the neighbours' peaks, evenly spaced in mel, fp32 [K, M].

    The mel scale is 2595 log10(1 + f / 700 Hz) (O'Shaughnessy 1987), from 0 to rate / 2. A triangle narrower
    than a bin is widened to reach the bins beside its peak, so that no band is empty.

    Args:
        rate: samples a second.
        bins: K, from 0 to rate / 2.
        bands: M.
        device: where to make it.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    mel_points = torch.linspace(0, top, bands + 2, dtype=torch.float64)
    points = 700 * (10 ** (mel_points / 2595) - 1)
    step = rate / 2 / (bins - 1)
    frequency_K1 = torch.arange(bins, dtype=torch.float64)[:, None] * step
    left_M, peak_M, right_M = points[:-2], points[1:-1], points[2:]
    rising = 1 - (peak_M - frequency_K1) / (peak_M - left_M).clamp_min(step)
    falling = 1 - (frequency_K1 - peak_M) / (right_M - peak_M).clamp_min(step)
    return torch.minimum(rising, falling).clamp_min_(0).to(device, torch.float32)


def frame_spectrum(wave_BN: Tensor, window: int, hop: int) -> Tensor:
    """Complex spectra [B, F, K] of F = N / hop frames, K = window / 2 + 1.

    The middle of frame f is sample hop * (f + 1/2). A sine of amplitude 1 has a magnitude of about 1. Zeros
    stand beyond both ends.

    Args:
        wave_BN: float [B, N], N a multiple of `hop`.
        window: W, even, hop or more.
        hop: samples from one frame to the next.
    """
    margin = window - hop
    padded = F.pad(wave_BN, (margin // 2, margin - margin // 2))
    frames_BFW = padded.unfold(1, window, hop) * _window(window, wave_BN.device)
    return torch.fft.rfft(frames_BFW) * (4 / window)


def inverse_frames(spectrum_BFK: Tensor, window: int, hop: int) -> Tensor:
    """Waveform [B, F * hop] of the spectra of `frame_spectrum`, by weighted overlap and add.

    Where frames do not agree, the result is the waveform whose spectra are nearest to them (Griffin and Lim
    1984, equation 6).
    """
    hann = _window(window, spectrum_BFK.device)
    frames_BFW = torch.fft.irfft(spectrum_BFK * (window / 4), n=window) * hann
    num_frames = frames_BFW.shape[1]
    length, margin = (num_frames - 1) * hop + window, window - hop

    def added(frames: Tensor) -> Tensor:
        return F.fold(frames.transpose(1, 2), (1, length), (1, window), stride=(1, hop))[:, 0, 0]

    weight = added(hann.square().expand(1, num_frames, window))
    wave = added(frames_BFW) / weight.clamp_min(1e-3)
    return wave[:, margin // 2 : margin // 2 + num_frames * hop]


def mel_magnitudes(wave_BN: Tensor, rate: int, window: int, hop: int, bands: int) -> Tensor:
    """Sums of magnitudes in mel bands, fp32 [B, F, M]; N is filled up to a multiple of `hop`."""
    wave_BN = F.pad(wave_BN.float(), (0, -wave_BN.shape[1] % hop))
    magnitude = frame_spectrum(wave_BN, window, hop).abs()
    return magnitude @ mel_filters(rate, magnitude.shape[-1], bands, wave_BN.device)


def log_mel(wave_BN: Tensor, rate: int, window: int, hop: int, bands: int) -> Tensor:
    """Natural logarithm of `mel_magnitudes`, floored at `FLOOR`."""
    return mel_magnitudes(wave_BN, rate, window, hop, bands).clamp_min(FLOOR).log()


@lru_cache(maxsize=4)  # each is as long as a waveform
def _interpolation(rate: int, bins: int, bands: int, device: torch.device) -> Tensor:
    """Weights fp32 [K, M] that take numbers at points evenly spaced in mel, from 0 to rate / 2, to bins."""
    frequency_K = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    place_K = torch.log1p(frequency_K / 700) / math.log1p(rate / 2 / 700) * (bands - 1)
    weight_KM = 1 - (place_K[:, None] - torch.arange(bands)).abs()
    return weight_KM.clamp_min_(0).to(device, torch.float32)


def equalised(wave_BN: Tensor, rate: int) -> Tensor:
    """Waveforms through smooth filters after which their spectra are alike in the long run.

    That takes away how a microphone, a room and a voice colour what is said, as the mean normalisation of
    cepstra does (Atal 1974, "Effectiveness of linear prediction characteristics of the speech wave"). Here a
    filter is given by the power of the whole waveform in 12 bands, so that it cannot undo single sounds, and
    its gains are bounded.

    Args:
        wave_BN: float [B, N].
        rate: samples a second.

    Returns:
        fp32 [B, N], up to a factor for each; silence stays silence.
    """
    samples = wave_BN.shape[1]
    with torch.autocast(wave_BN.device.type, enabled=False):
        padded = F.pad(wave_BN.float(), (0, math.ceil(EQUAL_MARGIN * rate)))  # or the ends would meet
        spectrum_BK = torch.fft.rfft(padded)
        weight_KM = _interpolation(rate, spectrum_BK.shape[1], EQUAL_BANDS, wave_BN.device)
        power_BM = spectrum_BK.abs().square() @ weight_KM / weight_KM.sum(dim=0).clamp_min(FLOOR)
        loudest_B1 = power_BM.amax(dim=1, keepdim=True)
        wanted_M = -2 * torch.linspace(1, 1 + EQUAL_FALL, EQUAL_BANDS, device=wave_BN.device).log()
        gain_BM = (wanted_M - (power_BM + 1e-6 * loudest_B1).clamp_min(1e-20).log()) / 2
        gain_BM = gain_BM - gain_BM.mean(dim=1, keepdim=True)
        curve_BK = (gain_BM.clamp(-MOST_EQUALISED, MOST_EQUALISED) @ weight_KM.T).exp()
        return torch.fft.irfft(spectrum_BK * curve_BK, n=padded.shape[1])[:, :samples]


def metric_mel(wave_BN: Tensor) -> Tensor:
    """What reconstructions are measured with: 80 log-mel bands [B, F, 80] of a waveform at 16 kHz."""
    return log_mel(wave_BN, METRIC_RATE, METRIC_WINDOW, METRIC_HOP, METRIC_BANDS)


def reconstruction_loss(wave_BN: Tensor, target_BN: Tensor, rate: int) -> Tensor:
    """Mean L1 distance of log-mel magnitudes at five window lengths, plus the L1 distance of the waveforms.

    The multi-scale mel loss of Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN",
    section 3.4, with the term in the time domain of Défossez et al. 2022, "High Fidelity Neural Audio
    Compression", section 3.4; without adversaries.

    Args:
        wave_BN: float [B, N].
        target_BN: what it should be.
        rate: of both, samples a second.

    Returns:
        fp32 scalar.
    """
    distances = []
    for seconds, bands in LOSS_SCALES:
        hop = max(1, round(rate * seconds / 4))
        mine, theirs = (log_mel(w, rate, 4 * hop, hop, bands) for w in (wave_BN, target_BN))
        distances.append((mine - theirs).abs().mean())
    return torch.stack(distances).mean() + WAVE_WEIGHT * (wave_BN - target_BN).abs().mean()
