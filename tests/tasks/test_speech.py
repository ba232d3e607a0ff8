"""Speech enhancement and separation: mixtures, metrics, training, files in and out."""

import csv
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as si_sdr

from mamba_zoo.__main__ import main
from mamba_zoo.tasks import sound_files, speech, train_once
from mamba_zoo.tasks.result_names import name_results
from mamba_zoo.tasks.sound_files import (
    BadSoundError,
    list_sounds,
    read_sound,
    resample,
    resample_blocks,
    write_sound,
)
from mamba_zoo.tasks.speech import SpeechEnhancer, SpeechSeparator, best_snr, build_speech_model
from mamba_zoo.tasks.speech_data import EnhancementData, SeparationData
from mamba_zoo.tasks.speech_figures import plot_spectrograms
from mamba_zoo.tasks.speech_predict import enhance_in_chunks
from mamba_zoo.tasks.speech_synthesis import NOISES, synthetic_noise, synthetic_voice

FSDD = Path(os.environ.get("MAMBA_ZOO_DATA", "data")) / "audio" / "fsdd" / "recordings"
TINY: dict[str, Any] = {"dim": 4, "depth": 1, "d_state": 2}


def tone(path: Path, hertz: float, samples: int = 2400, rate: int = 8000) -> Path:
    write_sound(path, 0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate), rate)
    return path


@pytest.fixture
def speakers(tmp_path) -> Path:
    """Two speakers with thirty short recordings each, told apart by their pitch."""
    for i in range(30):
        tone(tmp_path / "voices" / f"{i}_low_{i}.wav", 200 + i)
        tone(tmp_path / "voices" / f"{i}_high_{i}.wav", 1000 + i)
    return tmp_path / "voices"


def by_name(root: Path, **options) -> SeparationData:
    pattern = r"\d+_(?P<speaker>[a-z]+)_"
    return SeparationData(str(root), speaker_pattern=pattern, seconds=0.25, test_mixtures=8, val_mixtures=4, **options)


def test_synthetic_voices_differ_by_speaker_and_repeat_by_seed():
    first = synthetic_voice(0, 0.5, 8000, 1)
    assert first.shape == (4000,)
    assert first.std() == pytest.approx(0.1, rel=0.01)
    assert np.array_equal(first, synthetic_voice(0, 0.5, 8000, 1))
    assert not np.array_equal(first, synthetic_voice(0, 0.5, 8000, 2))
    assert not np.array_equal(first, synthetic_voice(1, 0.5, 8000, 1))


@pytest.mark.parametrize("kind", NOISES)
def test_synthetic_noise(kind):
    noise = synthetic_noise(kind, 4001, 8000, np.random.default_rng(0))
    assert noise.shape == (4001,)
    assert noise.std() == pytest.approx(1, rel=0.01)
    with pytest.raises(ValueError, match="'brown' is unknown"):
        synthetic_noise("brown", 10, 8000, np.random.default_rng(0))


def test_test_mixtures_are_fixed_and_training_mixtures_are_not():
    data, again = (EnhancementData(seconds=0.2, test_mixtures=3, train_mixtures=4) for _ in range(2))
    for i in range(3):
        assert torch.equal(data.split("test")[i][0], again.split("test")[i][0])
    assert not torch.equal(data.split("test")[0][0], data.split("val")[0][0])
    assert not torch.equal(data.split("train")[0][0], data.split("train")[0][0])
    torch.manual_seed(5)
    first = data.split("train")[1][0]
    torch.manual_seed(5)
    assert torch.equal(first, again.split("train")[1][0]), "the seed of an epoch does not decide its mixtures"


def test_noise_is_as_loud_as_asked():
    data = EnhancementData(seconds=0.5, snr_low=3.0, snr_high=3.0, test_mixtures=8)
    for mixture, clean in (data.split("test")[i] for i in range(8)):
        ratio = clean.square().sum() / (mixture - clean[0]).square().sum()
        assert 10 * torch.log10(ratio) == pytest.approx(3, abs=0.1)


def test_parts_share_no_recording_and_speakers_come_from_names(speakers):
    data = by_name(speakers, test_pattern=r"/?[0-4]_(low|high)_", train_mixtures=20)
    made: dict[str, Any] = {part: data.split(part).make.voices for part in ("train", "val", "test")}  # type: ignore
    names = [{path.name for path in voices.paths} for voices in made.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 60
    assert {"0_low_0.wav", "4_high_4.wav"} <= names[2]
    assert made["train"].names == ["high", "low"]
    mixture, voices = data.split("train")[0]
    torch.testing.assert_close(voices.sum(0), mixture)
    peaks = torch.fft.rfft(voices).abs().argmax(-1) * 8000 / voices.shape[-1]
    assert sorted(int(peak > 600) for peak in peaks) == [0, 1], "one of each speaker"


def test_what_cannot_work_says_so(speakers, tmp_path):
    with pytest.raises(ValueError, match="has 1 speakers for train, but sources=2"):
        SeparationData(str(speakers)).split("train")
    with pytest.raises(ValueError, match=r"needs a group \(\?P<speaker>"):
        SeparationData(str(speakers), speaker_pattern="low|high").split("train")
    with pytest.raises(ValueError, match="does not match"):
        SeparationData(str(speakers), speaker_pattern="(?P<speaker>low)").split("train")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        EnhancementData(str(tmp_path / "nothing")).split("train")
    with pytest.raises(ValueError, match=r"no file of .* is left for test"):
        by_name(speakers, test_pattern="nowhere").split("test")
    with pytest.raises(ValueError, match="snr_low=5 is above"):
        EnhancementData(snr_low=5, snr_high=1)
    with pytest.raises(ValueError, match="must be positive"):
        SeparationData(seconds=0)


@pytest.mark.parametrize("layout", [("",), ("train", "test"), ("train", "val", "test")], ids=str)
def test_pairs_of_files(layout, tmp_path):
    for part in layout:
        for i in range(25):
            for side, hertz in (("noisy", 300), ("clean", 500)):
                tone(tmp_path / part / side / f"{i}.wav", hertz + i, 1000 + 100 * i)
    data = EnhancementData(str(tmp_path), seconds=0.25, batch_size=4)
    sizes = {part: len(data.split(part)) for part in ("train", "val", "test")}
    assert sum(sizes.values()) == 25 * len(layout)
    assert min(sizes.values()) >= 1
    mixtures, voices, lengths = next(iter(data.val_dataloader()))
    assert mixtures.shape[1] == voices.shape[2] == lengths.max()
    assert mixtures[lengths.argmin(), lengths.min() :].abs().max() == 0 or len(set(lengths.tolist())) == 1
    assert next(iter(data.train_dataloader()))[0].shape == (4, 2000)
    (tmp_path / layout[0] / "clean" / "0.wav").unlink()
    with pytest.raises(ValueError, match="0 is not in both of noisy and clean"):
        EnhancementData(str(tmp_path)).split("train")


def test_the_loss_is_the_best_assignment_and_bounded():
    voices = torch.randn(3, 2, 500)
    torch.testing.assert_close(best_snr(voices.flip(1), voices), torch.full((3,), 30.0), atol=0.1, rtol=0)
    torch.testing.assert_close(best_snr(voices[:, :1], voices[:, :1]), torch.full((3,), 30.0), atol=0.1, rtol=0)
    half = best_snr(0.5 * voices, voices)
    torch.testing.assert_close(half, torch.full((3,), 6.02), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("task", "data", "name", "options"),
    [
        (SpeechEnhancer, EnhancementData, "semamba_mini", TINY),
        (SpeechEnhancer, EnhancementData, "conv_mask", {"dim": 4, "depth": 1}),
        (SpeechSeparator, SeparationData, "spmamba_mini", {**TINY, "heads": 2, "query_size": 129}),
        (SpeechSeparator, SeparationData, "transformer_mask", {"dim": 8, "depth": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_model_learns_something(task, data, name, options):
    torch.manual_seed(0)
    model = task(name, options=options)
    batch = next(iter(data(seconds=0.3, batch_size=4).val_dataloader()))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        loss = -best_snr(model.separate(model.net, batch), batch[1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert model.predict_step(batch, 0).shape == batch[1].shape


def test_batches_of_different_lengths_are_scored_one_by_one():
    model = SpeechEnhancer("semamba_mini", options=TINY).eval()
    torch.nn.init.normal_(model.net.mask_out.weight)  # type: ignore[union-attr]
    voices = torch.randn(2, 1, 900)
    voices[0, :, 500:] = 0
    batch = (voices[:, 0] + 0.3 * torch.randn(2, 900) * (voices[:, 0] != 0), voices, torch.tensor([500, 900]))
    with torch.no_grad():
        together = model.separate(model.net, batch)
        alone = model.net(batch[0][:1, :500])
    torch.testing.assert_close(si_sdr(together[0, 0], voices[0, 0]), si_sdr(alone[0], voices[0, 0, :500]))


def test_models_that_do_something_else_are_refused():
    with pytest.raises(ValueError, match="is for 16000 samples per second, the data have 8000: set sample_rate=16000"):
        SpeechEnhancer("semamba")
    with pytest.raises(ValueError, match="spmamba_mini is no model that takes noise out"):
        SpeechEnhancer("spmamba_mini", options={"depth": 1})
    with pytest.raises(ValueError, match="vim_mini is no model that takes noise out"):
        SpeechEnhancer("vim_mini")
    with pytest.raises(ValueError, match="is a baseline without scans"):
        SpeechSeparator("conv_mask", scan="raster")
    assert build_speech_model("spmamba_mini", "raster", 3, 8000, options={"depth": 1}).sources == 3  # type: ignore


FIT = [
    "fit", "--task", "speech-enhancement", "--model.options", json.dumps({**TINY, "causal": True}),
    "--data.seconds", "0.3", "--data.train_mixtures", "8", "--data.val_mixtures", "4", "--data.test_mixtures", "4",
    "--data.batch_size", "4", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
]  # fmt: skip


def test_from_training_to_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech, "_PERCEPTUAL", {"stoi": ("no_such_package", None), "pesq": ("no_such_package", None)})
    out = tmp_path / "run"
    assert main([*FIT, "--out", str(out)]) == 0
    assert main(["test", "--checkpoint", str(out), "--batch-size", "3", "--device", "cpu"]) == 0
    assert "no_such_package is not installed" in capsys.readouterr().out.replace("\n", " ")
    found = json.loads((out / "test.json").read_text())
    assert {"si_sdr", "si_sdri", "loss"} <= set(found)
    rows = (out / "mixtures.csv").read_text().splitlines()
    assert len(rows) == 5
    mean = np.mean([float(row.split(",")[rows[0].split(",").index("si_sdri")]) for row in rows[1:]])
    assert mean == pytest.approx(found["si_sdri"], abs=1e-3)
    assert {path.name for path in out.glob("example0*")} == {
        "example0.png", "example0-mixture.wav", "example0-out-enhanced.wav", "example0-true-enhanced.wav",
    }  # fmt: skip
    tone(tmp_path / "new" / "deep" / "long.wav", 440, 9001, 11025)
    for name in ("two.wav", "two.flac"):
        tone(tmp_path / "new" / name, 440, 2000)
    predict = ["predict", "--checkpoint", str(out), "--data", str(tmp_path / "new"), "--out", str(tmp_path / "p")]
    assert main([*predict, "--device", "cpu", "--chunk-seconds", "0.1"]) == 0
    rate, written = wavfile.read(tmp_path / "p" / "deep" / "long-enhanced.wav")
    assert (rate, len(written)) == (11025, 9001)
    assert (tmp_path / "p" / "deep" / "long.png").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "p").glob("*.*")) == [
        "two.flac-enhanced.wav", "two.flac.png", "two.wav-enhanced.wav", "two.wav.png",
    ]  # fmt: skip


def test_mixtures_with_a_silent_voice_are_not_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "_PERCEPTUAL", {"stoi": ("no_such_package", None), "pesq": ("no_such_package", None)})
    for part in ("train", "val", "test"):
        for i in range(4):
            tone(tmp_path / part / "clean" / f"{i}.wav", 200 + 50 * i)
            write_sound(
                tmp_path / part / "noisy" / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(2400), 8000
            )
    write_sound(tmp_path / "test" / "clean" / "2.wav", np.zeros(2400), 8000)
    out = tmp_path / "run"
    data = EnhancementData(str(tmp_path), seconds=0.3, batch_size=4)
    train_once(
        "semamba_mini", data, out, max_epochs=1, model={"options": TINY}, trainer={"accelerator": "cpu"},
        task="speech-enhancement",
    )  # fmt: skip
    assert len(np.load(out / "test_items.npy")) == 3
    assert main(["test", "--checkpoint", str(out), "--batch-size", "1", "--device", "cpu"]) == 0
    with (out / "mixtures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixture"] for row in rows if not row["si_sdr"]] == ["2"]
    found = json.loads((out / "test.json").read_text())
    for name in ("si_sdr", "si_sdri", "loss"):
        mean = np.mean([float(row[name]) for row in rows if row[name]])
        assert found[name] == pytest.approx(mean, abs=1e-3)
    assert json.loads((out / "left_out.json").read_text())["score of mixture 2"] == "a clean voice in it is silent"


def test_results_of_recordings_with_the_same_name_are_kept_apart():
    given = [Path(f"r/{name}") for name in ("0/a.wav", "0/a.flac", "0/a.wav.ogg", "1/a.wav", "1/b.c.wav")]
    names = name_results(given, Path("r"))
    assert [str(name) for name in names] == ["0/a.wav", "0/a.flac", "0/a.wav.ogg", "1/a", "1/b.c"]


@pytest.mark.parametrize("rate", [8000, 11025, 16000])
def test_a_long_recording_is_enhanced_piece_by_piece(rate, tmp_path):
    net: Any = build_speech_model("semamba_mini", None, 1, 8000, options={**TINY, "causal": True}).eval()
    for layer in (net.mask_out, net.phase_real, net.phase_imag):  # it begins as an identity
        torch.nn.init.normal_(layer.weight)
    tone(tmp_path / "in.wav", 440, 3 * rate + 17, rate)
    samples, _ = read_sound(tmp_path / "in.wav")
    (before, after), found = enhance_in_chunks(net, tmp_path / "in.wav", tmp_path / "out.wav", 0.3)
    assert found == rate
    np.testing.assert_array_equal(before, samples)
    with torch.no_grad():
        whole = net(torch.from_numpy(resample(samples, rate, 8000))[None])[0].numpy()
    want = resample(whole, 8000, rate)[: len(samples)]
    np.testing.assert_allclose(after, np.pad(want, (0, len(samples) - len(want))), atol=2e-4)
    written, _ = read_sound(tmp_path / "out.wav")
    np.testing.assert_allclose(written, np.clip(after, -1, 1), atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(8000, 8000), (11025, 8000), (8000, 44100), (48000, 16000)])
@pytest.mark.parametrize("sizes", [[5000], [1, 700, 0, 33], [4999, 1]], ids=str)
def test_blocks_are_resampled_as_the_whole(old, new, sizes):
    samples = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    cuts = np.cumsum(sizes * 8)
    blocks = np.split(samples, cuts[cuts < len(samples)])
    together = np.concatenate(list(resample_blocks(blocks, old, new)))
    np.testing.assert_allclose(together, resample(samples, old, new), atol=1e-5)


def test_clips_that_a_perceptual_metric_cannot_judge_are_left_out(monkeypatch):
    def too_short(*args: Any) -> torch.Tensor:
        warnings.warn("Not enough frames. Returning 1e-5", RuntimeWarning, stacklevel=1)
        return torch.tensor(1e-5)

    monkeypatch.setattr(speech, "_perceptual_metric", too_short)
    task = SpeechEnhancer(options=TINY)
    task.left_out = {"pesq": "not installed"}
    assert task._perceptual(torch.ones(1, 8), torch.ones(1, 8)) == {}
    assert task.left_out["stoi of mixture 0"] == "Not enough frames. Returning 1e-5"


def test_perceptual_metrics_name_what_is_missing(monkeypatch):
    assert speech._missing("pesq", 8000) is None or "is not installed" in str(speech._missing("pesq", 8000))
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: object())
    assert speech._missing("stoi", 11025) is None
    assert speech._missing("pesq", 11025) == "it needs 8000 or 16000 samples per second"


@pytest.mark.parametrize("soundfile", [True, False], ids=["soundfile", "scipy"])
def test_sound_there_and_back(soundfile, tmp_path, monkeypatch):
    if not soundfile:
        monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    samples = np.linspace(-1, 1, 801)
    write_sound(tmp_path / "a" / "b.wav", samples, 16000)
    read, rate = read_sound(tmp_path / "a" / "b.wav")
    assert rate == 16000
    np.testing.assert_allclose(read, samples, atol=2e-4)
    write_sound(tmp_path / "loud.wav", 3 * samples, 8000)
    np.testing.assert_allclose(read_sound(tmp_path / "loud.wav")[0], samples, atol=2e-4)
    wavfile.write(tmp_path / "stereo.wav", 8000, np.array([[0, 32767], [-32768, 0]], np.int16))
    np.testing.assert_allclose(read_sound(tmp_path / "stereo.wav")[0], [0.5, -0.5], atol=1e-4)
    assert [path.name for path in list_sounds(tmp_path)] == ["b.wav", "loud.wav", "stereo.wav"]
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(BadSoundError, match=r"bad\.wav cannot be read"):
        read_sound(tmp_path / "bad.wav")
    with pytest.raises(FileNotFoundError, match="no sound file"):
        read_sound(tmp_path / "none.wav")
    if not soundfile:
        (tmp_path / "x.flac").write_bytes(b"fLaC")
        with pytest.raises(ImportError, match=r"mamba_zoo\[audio\]"):
            read_sound(tmp_path / "x.flac")


def test_resampling_keeps_a_tone():
    time = np.arange(8000) / 8000
    up = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), 8000, 11025)
    assert len(up) == 11025
    want = np.sin(2 * np.pi * 440 * np.arange(11025) / 11025)
    np.testing.assert_allclose(up[200:-200], want[200:-200], atol=0.01)
    assert sound_files.resample(up, 11025, 11025) is up


def test_spectrograms_are_pictures(tmp_path):
    plot_spectrograms(
        {"short": np.zeros(5), "long": np.random.default_rng(0).normal(size=900)}, 8000, tmp_path / "s.png"
    )
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not FSDD.is_dir(), reason="no spoken digits at $MAMBA_ZOO_DATA/audio/fsdd")
def test_mixtures_of_real_speech():
    import yaml

    from mamba_zoo.tasks.recipes import shipped

    settings = yaml.safe_load(shipped()["separation_fsdd"].read_text())["data"]
    data = SeparationData(**{**settings, "root": str(FSDD), "num_workers": 0})
    voices: Any = {part: data.split(part).make.voices for part in ("train", "val", "test")}  # type: ignore[arg-type]
    assert [len(v) for v in voices.values()] == [2400, 300, 300]
    assert all(len(v.names) == 6 for v in voices.values())
    mixture, parts = data.split("test")[7]
    assert mixture.shape == (12000,)
    assert (si_sdr(mixture[None].expand(2, -1), parts).mean()).abs() < 3
