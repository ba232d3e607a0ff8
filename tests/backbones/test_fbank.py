"""Front ends: agreement with torchaudio recording by recording, lengths, sample rates, errors."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_zoo
from mamba_zoo.backbones._fbank import FRONT_ENDS, FilterBank, MelSpectrogram, front_end, mel_statistics

torchaudio: Any = pytest.importorskip("torchaudio", reason="front ends need torchaudio")


def waves(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return 0.1 * torch.randn(*shape) + 0.02


def kaldi(wave: Tensor, rate: int, bins: int) -> Tensor:
    """One recording through torchaudio, as the authors call it."""
    return torchaudio.compliance.kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=bins,
        dither=0.0,
        frame_shift=10,
    )


@pytest.mark.parametrize(("rate", "n"), [(16000, 8000), (16000, 8123), (8000, 4001), (44100, 30000)])
def test_a_batch_is_what_kaldi_makes_of_each_recording(rate, n, device):
    front = FilterBank(rate, 40).to(device)
    batch, lengths = waves(3, n).to(device), torch.tensor([n, n // 2, n // 3 + 7])
    x, frames = front(batch, lengths=lengths)
    for row, length, found, count in zip(batch, lengths.tolist(), x, frames.tolist(), strict=True):
        want = kaldi(row[:length].cpu(), rate, 40)
        assert count == len(want)
        torch.testing.assert_close(found[:count].cpu(), want, rtol=1e-4, atol=1e-4)
        assert not found[count:].any()


def test_frames_are_padded_and_cut_before_normalisation():
    front = FilterBank(8000, 20, frames=30, mean=-4.0, std=2.0)
    plain = FilterBank(8000, 20)
    batch, lengths = waves(2, 4000), torch.tensor([4000, 1600])
    x, frames = front(batch, lengths=lengths)
    assert x.shape == (2, 30, 20)
    assert frames.tolist() == [30, 18]
    raw = plain(batch, lengths=lengths)[0]
    torch.testing.assert_close(x[0], (raw[0, :30] + 4) / 4)
    torch.testing.assert_close(x[1, 18:], torch.full((12, 20), 1.0))


def test_recordings_shorter_than_a_frame_are_padding():
    x, frames = FilterBank(8000, 20, frames=5)(waves(1, 100))
    assert frames.tolist() == [0]
    assert not x.any()


def test_other_rates_are_resampled():
    front = FilterBank(8000, 20)
    wave = waves(1, 16001)
    want, frames = front(torchaudio.functional.resample(wave, 16000, 8000))
    x, count = front(wave, 16000)
    assert count.tolist() == frames.tolist()
    torch.testing.assert_close(x, want)


def test_mel_spectrogram_is_that_of_torchaudio(device):
    front = front_end("epic_sounds").to(device)
    assert isinstance(front, MelSpectrogram)
    wave = waves(2, 24000).to(device)
    transform = torchaudio.transforms.MelSpectrogram(
        24000, 2048, 240, 120, power=1.0, n_mels=128, norm=None, mel_scale="htk", pad_mode="constant"
    )
    want = torch.log(transform(wave.cpu() - wave.cpu().mean(1, keepdim=True)) + 1e-6).transpose(1, 2)
    x, frames = front(wave)
    assert frames.tolist() == [201, 201]
    torch.testing.assert_close(x[:, :201].cpu(), want, rtol=1e-4, atol=1e-4)


def test_front_ends_have_no_weights_and_stay_float32():
    for name in FRONT_ENDS:
        front = front_end(name)
        assert not front.state_dict()
        assert not list(front.parameters())
    front = FilterBank(8000, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, _ = front(waves(1, 4000).bfloat16())
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_statistics_normalise_the_recordings_they_were_measured_on():
    recordings = [waves(4000), 0.1 * waves(2500), waves(100)]
    front = FilterBank(8000, 20)
    mean, std = mel_statistics(front, recordings, 8000)
    values = torch.cat([FilterBank(8000, 20, mean=mean, std=std)(wave)[0].flatten() for wave in recordings])
    assert float(values.mean()) == pytest.approx(0, abs=1e-3)
    assert float(values.std()) == pytest.approx(0.5, abs=1e-3)  # published models divide by twice the deviation
    with pytest.raises(ValueError, match="none of the 1 recordings is as long as one frame"):
        mel_statistics(front, [waves(100)], 8000)


def test_wrong_inputs_and_settings_end_in_one_clear_error():
    front = FilterBank(8000, 20)
    with pytest.raises(TypeError, match=r"torch.int16; scale them to -1..1"):
        front(torch.zeros(1, 800, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"expected \(b, n\)"):
        front(torch.zeros(1, 1, 800))
    with pytest.raises(ValueError, match="lengths run from 0 to 900 samples"):
        front(torch.zeros(2, 800), lengths=torch.tensor([0, 900]))
    with pytest.raises(ValueError, match="sample_rate is needed"):
        FilterBank(None)(torch.zeros(1, 800))
    with pytest.raises(ValueError, match="front_end='speech' is unknown; choose one of audioset"):
        front_end("speech")
    with pytest.raises(ValueError, match="kind='stft' is unknown"):
        front_end({"kind": "stft"})
    with pytest.raises(ValueError, match="std=0 must be above 0"):
        FilterBank(std=0)


def test_without_torchaudio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.compliance.kaldi", None)
    model: Any = mamba_zoo.create_model("aum_mini", front_end={"mel_bins": 40, "frames": 100})
    with pytest.raises(ImportError, match=r"pip install 'mamba_zoo\[audio\]'"):
        model(waves(1, 16000))
