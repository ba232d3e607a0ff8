"""Naming and tagging recordings: sources and splits, random changes, training, long files, tables and pictures."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torchmetrics.functional.classification import binary_average_precision

from mamba_zoo.__main__ import main
from mamba_zoo.tasks import audio_augment as augment
from mamba_zoo.tasks import train_once
from mamba_zoo.tasks._tagging_metrics import OverClasses
from mamba_zoo.tasks.audio_classification import AudioClassifier, AudioTagger, _levelled, _rolled
from mamba_zoo.tasks.audio_data import AudioData, TaggingData, collate
from mamba_zoo.tasks.audio_models import SpectrogramImage, build_listener
from mamba_zoo.tasks.audio_predict import predict_windows, windows
from mamba_zoo.tasks.audio_sources import find_recordings, tones
from mamba_zoo.tasks.optim import parameter_groups
from mamba_zoo.tasks.sound_files import BadSoundError
from mamba_zoo.tasks.train import make_task

pytest.importorskip("torchaudio", reason="front ends need torchaudio")
CPU = {"accelerator": "cpu"}
RATE = 8000
TINY = {"options": {"dim": 16, "depth": 1, "d_state": 2}, "lr": 5e-3}
FSDD = Path(os.environ.get("MAMBA_ZOO_DATA", "data")) / "audio" / "fsdd"


def write_tone(path: Path, hertz: float, seconds: float = 0.3, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(len(path.stem)).standard_normal(len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time) + 0.003 * noise, rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Low and high tones in two class folders, wav and flac."""
    root = tmp_path_factory.mktemp("sounds")
    for i in range(20):
        write_tone(root / "low" / f"{i}.wav", 300 + 5 * i)
        write_tone(root / "high" / f"{i}.flac", 1500 + 20 * i)
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A run that tells the tones apart."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = train_once("aum_mini", small(folder), out, max_epochs=12, model=TINY, trainer=CPU)
    assert result["accuracy"] == 1.0
    return out / "last.ckpt"


def small(root: Any, **options: Any) -> AudioData:
    return AudioData(str(root), sample_rate=RATE, seconds=0.3, mel_bins=20, batch_size=16, **options)


def digits(root: Path) -> Path:
    for digit in range(2):
        for speaker in ("ann", "bob"):
            for take in range(12):
                write_tone(root / "recordings" / f"{digit}_{speaker}_{take}.wav", 300 + 900 * digit, 0.1)
    return root


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def counts(data: AudioData) -> dict[str, int]:
    return {name: len(data.split(name)) for name in ("train", "val", "test")}  # type: ignore[arg-type]


def test_folders_of_classes_are_split_by_shares(folder):
    data = small(folder)
    assert data.classes == ["high", "low"]
    assert counts(data) == {"train": 30, "val": 4, "test": 6}
    wave, target = data.split("train")[0]
    assert wave.dtype == torch.float32
    assert len(wave) == 2400
    assert target in (0, 1)
    paths = [{r.source for r in data.split(name).recordings} for name in ("train", "val", "test")]  # type: ignore[arg-type]
    assert not paths[0] & paths[1] | paths[0] & paths[2] | paths[1] & paths[2]


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for i in range(count):
            write_tone(tmp_path / split / "a" / f"{i}.wav", 300, 0.1)
            write_tone(tmp_path / split / "b" / f"{i}.wav", 900, 0.1)
    assert counts(small(tmp_path)) == {"train": 12, "val": 4, "test": 6}


def test_digits_have_their_official_split_or_leave_a_speaker_out(tmp_path):
    root = digits(tmp_path)
    data = small(root, val_fraction=0.2)
    assert data.classes == ["0", "1"]
    assert counts(data) == {"train": 22, "val": 6, "test": 20}
    assert {int(r.source.stem.rpartition("_")[2]) for r in data.split("test").recordings} == {0, 1, 2, 3, 4}
    alone = small(root, test_speaker="bob", val_fraction=0.2)
    assert {r.speaker for r in alone.split("test").recordings} == {"bob"}
    assert {r.speaker for part in ("train", "val") for r in alone.split(part).recordings} == {"ann"}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test_speaker='eve' is none of ann, bob"):
        small(root, test_speaker="eve").setup()


def test_speech_commands_are_read_as_torchaudio_unpacks_them(tmp_path):
    root = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for word in ("yes", "no"):
        for i in range(6):
            write_tone(root / word / f"{i:08x}_nohash_0.wav", 400, 0.1)
    write_tone(root / "_background_noise_" / "hum.wav", 50)
    (root / "validation_list.txt").write_text("yes/00000000_nohash_0.wav\nno/00000000_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("yes/00000001_nohash_0.wav\nno/00000001_nohash_0.wav\n")
    for given in (root, root.parent, tmp_path):
        data = small(given)
        assert data.classes == ["no", "yes"]
        assert counts(data) == {"train": 8, "val": 2, "test": 2}
    assert find_recordings(str(root))[0].speaker == "00000000"


def test_a_csv_file_names_paths_labels_splits_and_speakers(tmp_path):
    rows = ["path,label,split,speaker"]
    for i in range(8):
        write_tone(tmp_path / "wav" / f"{i}.wav", 300 + 900 * (i % 2), 0.1)
        rows.append(f"wav/{i}.wav,{'ab'[i % 2]},{('train', 'train', 'val', 'test')[i // 2]},s{i % 3}")
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(rows))
    assert counts(small(manifest)) == {"train": 4, "val": 2, "test": 2}
    manifest.write_text("path,label,split\nwav/0.wav,a,dev\n")
    with pytest.raises(ValueError, match="line 2: split 'dev' is unknown"):
        small(manifest).setup()
    manifest.write_text("path,label\nwav/99.wav,a\n")
    with pytest.raises(FileNotFoundError, match="line 2: no file"):
        small(manifest).setup()
    manifest.write_text("file,class\n")
    with pytest.raises(ValueError, match="needs the columns path and label; it has class, file"):
        small(manifest).setup()
    manifest.write_text("path,label\nwav/0.wav,a;b\n")
    with pytest.raises(ValueError, match="has 2 labels; classification needs one"):
        small(manifest).setup()
    manifest.write_text("path,label\nwav/0.wav,\nwav/1.wav,b\n")
    with pytest.raises(ValueError, match=r"0\.wav has no label; classification needs one for each"):
        small(manifest).setup()
    manifest.write_text("path,label\nwav/0.wav,a\nwav/1.wav,b\nwav/3.wav,b\n")
    with pytest.raises(ValueError, match="has 1 recording of class 'a' to divide among train and test and val"):
        small(manifest).setup()
    with pytest.raises(ValueError, match=r"test_speaker='eve': .* does not say who speaks; give a CSV file with"):
        small(manifest, test_speaker="eve").setup()


def test_wrong_sources_and_settings_say_so(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no folder or CSV file"):
        small(tmp_path / "nowhere").setup()
    with pytest.raises(ValueError, match="holds no folders; make one for each class"):
        small(tmp_path).setup()
    with pytest.raises(ValueError, match="layout='tree' is unknown"):
        small(folder, layout="tree").setup()
    digits(tmp_path)
    write_tone(tmp_path / "recordings" / "noise.wav", 50)
    with pytest.raises(ValueError, match="is not named DIGIT_SPEAKER_TAKE"):
        small(tmp_path, layout="fsdd").setup()
    with pytest.raises(ValueError, match="normalise='imagenet' is unknown"):
        small(folder, normalise="imagenet")
    with pytest.raises(ValueError, match=r"speed=0.9 must lie between 0 and 0.5"):
        AudioClassifier(speed=0.9)
    with pytest.raises(ValueError, match="has neither published weights nor a scan"):
        build_listener("spectrogram_cnn", 2, 20, 30, scan="hilbert")


def test_synthetic_sounds_are_the_same_everywhere():
    recordings = tones(RATE, 2)
    first, again = ([np.asarray(r.source) for r in found] for found in (recordings, tones(RATE, 2)))
    assert len({r.labels for r in recordings}) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(float(np.abs(sound).max()) <= 1 for sound in first)
    assert len({len(sound) for sound in first}) > 6
    assert {r.speaker for r in tones(RATE, 4)} == {f"instrument{i}" for i in range(4)}


def test_long_training_recordings_are_cut_anywhere_and_others_at_their_start(tmp_path):
    for name in "ab":
        for i in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{i}.wav", np.linspace(0, 0.5, RATE), RATE)
    data = small(tmp_path)
    torch.manual_seed(0)
    starts = {round(float(data.split("train")[0][0][0]), 3) for _ in range(5)}
    assert len(starts) > 1
    assert float(data.split("test")[0][0][0]) == 0
    assert len(data.split("test")[0][0]) == 2400


def test_batches_are_padded():
    waves, lengths, targets = collate([(torch.ones(3), 1), (torch.ones(5), 0)])
    assert waves.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert lengths.tolist() == [3, 5]
    assert targets.tolist() == [1, 0]


def test_speed_changes_pitch_and_length():
    time = torch.arange(8000) / 8000
    wave = torch.sin(2 * torch.pi * 200 * time)[None].repeat(2, 1)
    faster, lengths = augment.change_speed(wave, torch.tensor([8000, 4000]), torch.tensor([1.25, 0.8]))
    assert lengths.tolist() == [6400, 5000]
    assert not faster[1, 5000:].any()
    for row, length, hertz in zip(faster, lengths.tolist(), (250, 160), strict=True):
        spectrum = torch.fft.rfft(row[:length]).abs()
        assert float(spectrum.argmax()) * 8000 / length == pytest.approx(hertz, abs=2)


def test_noise_has_the_asked_level():
    torch.manual_seed(0)
    wave = torch.sin(torch.arange(8000) / 5)[None].repeat(2, 1)
    noisy = augment.add_noise(wave, torch.tensor([8000, 8000]), torch.tensor([10.0, 30.0]), torch.tensor([0.0, 1.0]))
    power = (noisy - wave).pow(2).mean(1)
    torch.testing.assert_close(10 * torch.log10(wave.pow(2).mean(1) / power), torch.tensor([10.0, 30.0]))


def test_a_shorter_vocal_tract_moves_formants_up():
    x = torch.zeros(3, 2, 40)
    x[:, :, 20] = 1.0
    warped = augment.warp_bands(x, torch.tensor([1.0, 1.2, 0.8]), 20.0, 4000.0)
    torch.testing.assert_close(warped[0], x[0], atol=1e-4, rtol=0)
    peaks = warped[:, 0].argmax(-1).tolist()
    assert peaks[1] > 20 > peaks[2]
    # Band 20 of 40 is centred at 1,185 Hz; a fifth more is band 23.
    assert peaks[1] == 23


def test_masks_hide_runs_of_bands_and_frames():
    torch.manual_seed(0)
    x = torch.ones(64, 50, 40)
    hidden = augment.mask(x, 10, 0, (1, 0)) == 0
    assert (hidden.all(1) == hidden.any(1)).all(), "bands are hidden at all times"
    assert 0 < int(hidden.any(1).sum(1).max()) <= 11
    hidden = augment.mask(x, 0, 20, (0, 1)) == 0
    assert (hidden.all(2) == hidden.any(2)).all()
    assert torch.equal(augment.mask(x, 0, 0), x)


def test_levelling_takes_channel_loudness_and_silence_away():
    torch.manual_seed(0)
    padding = torch.arange(30) >= torch.tensor([[30], [20]])
    x, gains = torch.randn(2, 30, 8), torch.randn(2, 1, 8)
    want = _levelled(x, padding, 1.0)
    torch.testing.assert_close(_levelled(x + gains, padding, 1.0), want, rtol=1e-2, atol=1e-2)
    assert not want[1, 20:].any()
    torch.testing.assert_close(want[1, :20].mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    # Digital silence before and after a recording is as good as none.
    silent = torch.full((1, 40, 8), -16.0)
    silent[:, 10:30] = x[1:, :20]
    heard = _levelled(silent, torch.zeros(1, 40, dtype=torch.bool), 1.0)
    assert not heard[:, :10].any()
    assert not heard[:, 30:].any()
    torch.testing.assert_close(heard[0, 10:30], want[1, :20])


def test_tempo_changes_length_and_leaves_bands():
    x = torch.zeros(2, 20, 4)
    x[:, :10, 1] = torch.arange(10.0)
    x[:, 10:] = -1.0
    stretched, frames = augment.change_tempo(x, torch.tensor([10, 10]), torch.tensor([0.5, 2.0]))
    assert frames.tolist() == [20, 5]
    torch.testing.assert_close(stretched[0, :18, 1], torch.arange(18) / 2)
    torch.testing.assert_close(stretched[1, :5, 1], torch.arange(5) * 2.0)
    assert (stretched[1, 5:] == -1).all()
    assert not stretched[0, :, 0].any()


def test_rolling_keeps_every_frame():
    x = torch.arange(4.0)[None, :, None].expand(2, 4, 1)
    assert _rolled(x, torch.tensor([0, 3]))[..., 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 0]]


def test_random_changes_are_for_training_only():
    model = AudioClassifier(
        front_end={"sample_rate": RATE, "mel_bins": 20, "frames": 30}, speed=0.2, tempo=0.2, noise=1.0, vocal_tract=0.2,
        channel=6.0, shift=10, mask_bands=5, mask_frames=5, mixup=0.5, level="recording",
    )  # fmt: skip
    waves, lengths = 0.1 * torch.randn(4, 2000), torch.tensor([2000, 1500, 1800, 1000])
    assert torch.equal(model.spectrograms(waves, lengths), model.spectrograms(waves, lengths))
    changed = [model.spectrograms(waves, lengths, training=True) for _ in range(2)]
    assert changed[0].shape == (4, 30, 20)
    assert not torch.equal(*changed)
    assert all(x.isfinite().all() for x in changed)
    model.train()
    loss = model.batch_loss((waves, lengths, torch.tensor([0, 1, 2, 3])))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["spectrogram_cnn", "spectrogram_transformer", "vim_mini", "resnet10t"])
def test_baselines_and_image_models_listen_too(name, folder):
    model = make_task(name, small(folder), model={"drop_rate": 0.1, "drop_path_rate": 0.1})
    assert model.net(torch.randn(2, 30, 20)).shape == (2, 2)
    assert isinstance(model.net, SpectrogramImage) == (not name.startswith("spectrogram"))
    grouped = parameter_groups(model.net, 0.1, 0.05, None)
    assert sum(len(group["params"]) for group in grouped) == len(list(model.net.parameters()))


def test_a_trained_model_is_tested_and_read_again(trained):
    model = AudioClassifier.from_checkpoint(trained)
    assert model.class_names == ["high", "low"]
    assert model.front_end.frames == 30
    assert model.front_end.mean != 0
    assert main(["test", "--checkpoint", str(trained)]) == 0
    assert json.loads((trained.parent / "test.json").read_text())["top1"] == 1.0
    assert (trained.parent / "confusion.png").stat().st_size > 1000
    assert (trained.parent / "spectrograms.png").stat().st_size > 1000


def test_predictions_of_a_folder_are_written(trained, folder, tmp_path):
    out, pieces, pictures = tmp_path / "found.csv", tmp_path / "windows.csv", tmp_path / "pictures"
    flags = ["--windows", str(pieces), "--pictures", str(pictures), "--top", "2", "--device", "cpu"]
    for i in range(3):
        write_tone(tmp_path / "new" / f"{'ab'[i // 2]}" / f"{(0, 1, 0)[i]}.wav", (310, 1600, 320)[i], rate=16000)
    flags += ["--checkpoint", str(trained), "--data", str(tmp_path / "new"), "--out", str(out)]
    assert main(["predict", *flags]) == 0
    rows = table(out)
    assert [Path(row["file"]).name for row in rows] == ["0.wav", "1.wav", "0.wav"]
    assert [row["predicted"] for row in rows] == ["low", "high", "low"]
    assert float(rows[0]["probability"]) + float(rows[0]["probability_2"]) == pytest.approx(1, abs=1e-5)
    assert len(table(pieces)) == 3
    assert sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png")) == [
        "a/0.png", "a/1.png", "b/0.png",
    ]  # fmt: skip


def test_a_long_recording_is_heard_window_by_window(trained, tmp_path):
    time = np.arange(RATE * 2) / RATE
    path = tmp_path / "long.wav"
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * np.where(time < 1, 310, 1600) * time), RATE)
    model = AudioClassifier.from_checkpoint(trained)
    places, probabilities = predict_windows(model, path, batch_size=4)
    assert places[0] == (0, 0.3)
    assert places[1][0] == pytest.approx(0.15)
    assert places[-1][1] == pytest.approx(2.0)
    found = [model.class_names[i] for i in probabilities.argmax(1).tolist()]
    assert {name for name, (start, end) in zip(found, places, strict=True) if end <= 1.0} == {"low"}
    assert {name for name, (start, end) in zip(found, places, strict=True) if start >= 1.0} == {"high"}


def test_windows_cover_a_file_once(tmp_path):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.linspace(-0.9, 0.9, 2500), 1000, subtype="FLOAT")
    found = list(windows(path, 1000, 1.0))
    assert [round(start, 3) for start, _ in found] == [0, 0.5, 1.0, 1.5]
    assert [len(samples) for _, samples in found] == [1000, 1000, 1000, 1000]
    np.testing.assert_allclose(found[1][1], np.linspace(-0.9, 0.9, 2500)[500:1500], atol=1e-6)
    assert [len(samples) for _, samples in windows(path, 1000, 10.0)] == [2500]
    with pytest.raises(ValueError, match="overlap=1 must be"):
        next(windows(path, 1000, 1.0, overlap=1))


def test_unreadable_files_stop_or_are_left_out(trained, tmp_path):
    write_tone(tmp_path / "new" / "good.wav", 310)
    (tmp_path / "new" / "bad.wav").write_bytes(b"not a sound")
    flags = ["predict", "--checkpoint", str(trained), "--data", str(tmp_path / "new"), "--device", "cpu"]
    out = ["--out", str(tmp_path / "found.csv")]
    with pytest.raises(BadSoundError, match=r"bad\.wav cannot be read as sound"):
        AudioClassifier.from_checkpoint(trained).predict_files(_arguments(tmp_path / "new", "error"))
    assert main([*flags, *out, "--on-bad-file", "skip"]) == 0
    assert len(table(tmp_path / "found.csv")) == 1


def _arguments(data: Path, on_bad_file: str) -> Any:
    import argparse

    return argparse.Namespace(
        data=data, out=None, batch_size=4, num_workers=0, device="cpu", top=1, windows=None, pictures=None,
        on_bad_file=on_bad_file,
    )  # fmt: skip


def test_tags_that_nothing_can_be_said_of_do_not_count():
    metric = OverClasses(binary_average_precision)
    assert float(metric(torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64))) == 0
    metric.reset()
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4], [0.8, 0.9, 0.1]])
    tags = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])  # the third on nothing
    metric.update(scores[:1], tags[:1])
    metric.update(scores[1:], tags[1:])
    assert float(metric.compute()) == pytest.approx((1.0 + 0.5) / 2)


def test_tags_are_learnt_and_scored_by_average_precision(tmp_path):
    rows = ["path,label"]
    time = np.arange(2400) / RATE
    for i in range(48):
        tags = [name for bit, name in enumerate(("low", "mid", "high")) if i >> bit & 1]
        sound = sum(0.2 * np.sin(2 * np.pi * {"low": 300, "mid": 900, "high": 2500}[t] * time) for t in tags)
        sound = sound + 0.003 * np.random.default_rng(i).standard_normal(2400)
        soundfile.write(tmp_path / f"{i}.wav", sound, RATE)
        rows.append(f"{i}.wav,{';'.join(tags)}")
    (tmp_path / "tags.csv").write_text("\n".join(rows))
    data = TaggingData(str(tmp_path / "tags.csv"), sample_rate=RATE, seconds=0.3, mel_bins=20, batch_size=16)
    assert data.classes == ["high", "low", "mid"]
    result = train_once("aum_mini", data, tmp_path / "run", max_epochs=40, model=TINY, trainer=CPU)
    assert result["mAP"] > 0.95
    assert np.load(tmp_path / "run" / "test_items.npy").max() <= 1
    model = AudioTagger.from_checkpoint(tmp_path / "run" / "last.ckpt")
    _, probabilities = predict_windows(model, tmp_path / "7.wav")
    assert probabilities.shape == (1, 3)
    assert (probabilities > 0.5).all(), "a recording of all three has three probabilities of its own"


def test_orders_of_recordings_are_trained_alike(folder, tmp_path):
    for scan in ("time_first", "none"):
        result = train_once("aum_mini", small(folder), tmp_path / scan, scan, max_epochs=1, model=TINY, trainer=CPU)
        assert result["settings"]["scan"] == scan
    net: Any = AudioClassifier.from_checkpoint(tmp_path / "none" / "last.ckpt").net
    assert net.scan == "none"


@pytest.mark.skipif(not FSDD.exists(), reason="no Free Spoken Digits at $MAMBA_ZOO_DATA/audio/fsdd")
def test_spoken_digits_are_found_as_their_authors_split_them():
    data = AudioData(str(FSDD), sample_rate=8000)
    assert counts(data) == {"train": 2430, "val": 270, "test": 300}
    assert data.classes == [str(i) for i in range(10)]
    one_out = AudioData(str(FSDD), sample_rate=8000, test_speaker="theo")
    assert counts(one_out)["test"] == 500
