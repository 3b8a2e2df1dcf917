import math

import numpy as np
import pytest
import torch

from arbitor.data.clips import coloured
from arbitor.sidecars.spectrum import (
    FLOOR,
    MOST_EQUALISED,
    equalised,
    frame_spectrum,
    inverse_frames,
    log_mel,
    mel_filters,
    metric_mel,
    reconstruction_loss,
)


def sine(frequency, rate=8000, seconds=0.5, amplitude=1.0):
    time = torch.arange(int(rate * seconds)) / rate
    return amplitude * torch.sin(2 * math.pi * frequency * time)[None]


@pytest.mark.parametrize(("window", "hop"), [(320, 80), (512, 128), (64, 64), (100, 50)])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_spectra_give_the_waveform_back(window, hop, frames):
    wave = torch.randn(2, frames * hop, generator=torch.Generator().manual_seed(0))
    spectrum = frame_spectrum(wave, window, hop)
    assert spectrum.shape == (2, frames, window // 2 + 1)
    back = inverse_frames(spectrum, window, hop)
    assert back.shape == wave.shape
    # At the very ends, where a window is near 0, nothing could be divided by.
    weight = inverse_frames(frame_spectrum(torch.ones_like(wave), window, hop), window, hop)
    inside = (weight - 1).abs() < 1e-3
    assert inside.float().mean() > (0.9 if window > hop else 0.8)
    torch.testing.assert_close(back[inside], wave[inside], rtol=0, atol=2e-3)


def test_a_sine_of_amplitude_one_has_magnitude_one():
    magnitude = frame_spectrum(sine(1000.0), 320, 80).abs()[0, 10]
    assert int(magnitude.argmax()) == 1000 * 320 // 8000
    assert float(magnitude.max()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("rate", "bins", "bands"), [(8000, 161, 64), (16000, 513, 80), (8000, 17, 16)])
def test_every_band_reaches_a_bin_and_bins_between_peaks_count_once(rate, bins, bands):
    filters_KM = mel_filters(rate, bins, bands, torch.device("cpu"))
    assert filters_KM.shape == (bins, bands)
    assert bool((filters_KM.amax(dim=0) > 0.3).all())
    assert bool(((filters_KM >= 0) & (filters_KM <= 1)).all())
    peaks = filters_KM.argmax(dim=0)
    assert bool((peaks[1:] >= peaks[:-1]).all())


def test_louder_means_larger_by_the_logarithm_and_silence_is_the_floor():
    soft, loud = (log_mel(sine(700.0, amplitude=a), 8000, 320, 80, 64) for a in (0.1, 0.2))
    above = soft > math.log(100 * FLOOR)
    torch.testing.assert_close((loud - soft)[above], torch.full_like(soft[above], math.log(2)))
    assert bool((log_mel(torch.zeros(1, 999), 8000, 320, 80, 64) == math.log(FLOOR)).all())


def test_the_metric_has_80_bands():
    assert metric_mel(torch.zeros(1, 16000)).shape == (1, 63, 80)


def test_the_loss_is_zero_for_the_target_and_has_a_gradient_elsewhere():
    target = sine(500.0)
    assert float(reconstruction_loss(target, target, 8000)) == 0
    wave = (0.5 * target + 0.01 * torch.randn(target.shape)).requires_grad_()
    loss = reconstruction_loss(wave, target, 8000)
    loss.backward()
    assert float(loss.detach()) > 0.3
    assert bool(torch.isfinite(wave.grad).all())
    assert float(wave.grad.abs().max()) > 0


def test_the_loss_of_silence_is_finite_with_its_gradient():
    wave = torch.zeros(1, 4000, requires_grad=True)
    reconstruction_loss(wave, torch.zeros(1, 4000), 8000).backward()
    assert bool(torch.isfinite(wave.grad).all())


def noise(samples, seed=0):
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


def unit(wave):
    return wave / wave.square().mean().sqrt()


def test_a_colour_is_taken_away():
    """Two recordings of one sound by microphones that differ by up to 12 dB become nearly the same."""
    given = noise(8000)
    octaves = np.array([-1.0, 0.5, 1, 0, -0.5, -1, 0.5, 1])
    other = torch.from_numpy(coloured(given[0].numpy(), octaves)).float()[None]
    before = float((unit(other) - unit(given)).square().mean())
    after = float((unit(equalised(other, 8000)) - unit(equalised(given, 8000))).square().mean())
    assert before > 0.1
    assert after < 0.1 * before


def test_bands_fall_to_a_quarter():
    spectrum = torch.fft.rfft(equalised(noise(80_000), 8000)).abs()[0]
    low, high = spectrum[100:400].mean(), spectrum[-4000:-100].mean()  # from 10 to 40 Hz, and the last 400
    assert float(high / low) == pytest.approx(0.25, rel=0.15)


def test_a_sound_at_the_end_is_not_heard_at_the_start():
    given = torch.zeros(1, 4000)
    ramp = torch.linspace(0, 1, 800)
    given[:, -800:] = sine(300.0, seconds=0.1) * ramp
    even = equalised(given, 8000).abs()
    assert float(even[:, :400].max()) < 0.01 * float(even.max())


def test_what_is_hardly_there_is_amplified_by_a_bounded_factor():
    def beside(wave):
        magnitude = torch.fft.rfft(wave).abs()[0]
        return float(magnitude[1000:].max() / magnitude.max())  # from 2 kHz on

    faint = sine(1000.0) * torch.hann_window(4000) + 1e-4 * noise(4000)
    assert beside(equalised(faint, 8000)) < 1.01 * math.exp(2 * MOST_EQUALISED) * beside(faint)
    assert beside(equalised(faint, 8000)) > 10 * beside(faint)


@pytest.mark.parametrize("samples", [1, 2, 3, 40, 8000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equalised_sounds_are_finite_and_as_long(samples, dtype):
    waves = torch.cat([torch.zeros(1, samples), 1e-8 * noise(samples), noise(samples)]).to(dtype)
    even = equalised(waves, 8000)
    assert even.shape == waves.shape
    assert even.dtype == torch.float32
    assert bool(torch.isfinite(even).all())
    assert not even[0].any()


def test_waveforms_do_not_change_each_other():
    waves = torch.cat([noise(400, 1), 0.1 * noise(400, 2)])
    each = torch.cat([equalised(wave[None], 8000) for wave in waves])
    torch.testing.assert_close(equalised(waves, 8000), each, rtol=1e-4, atol=1e-5)
