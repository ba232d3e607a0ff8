"""Training an image classifier: what is decayed, that it learns, that it resumes exactly, what bad input says."""

import itertools
import json
import resource
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import mamba_zoo
from mamba_zoo.tasks import ImageClassifier, ImageData, train_once
from mamba_zoo.tasks.checkpoints import AtomicCheckpointIO, read_checkpoint
from mamba_zoo.tasks.detection import picture_name
from mamba_zoo.tasks.image_files import BadImageError, read_image
from mamba_zoo.tasks.image_predict import predict_files
from mamba_zoo.tasks.image_transforms import Preprocess, eval_transform, train_transform
from mamba_zoo.tasks.optim import no_decay_names, parameter_groups, warmup_cosine
from mamba_zoo.tasks.running import quiet_trainer
from mamba_zoo.tasks.summary import plot_confusion
from mamba_zoo.tasks.train import make_task

FAST = "test_vit"  # a tiny transformer of timm: these tests are about training, not about the model
CPU = {"accelerator": "cpu"}


def fast_digits(**options) -> ImageData:
    return ImageData(image_size=16, batch_size=200, **options)


def write_image(path, color, size=(20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 60, (size[1], size[0], 3)) + np.array(color)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Red and green JPEGs: 12 + 12 to train on, 4 + 4 each for validation and test."""
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for i in range(count):
            write_image(root / split / "green" / f"{i}.jpg", (0, 180, 0))
            write_image(root / split / "red" / f"{i}.JPG", (180, 0, 0))
    return root


# Parameters that decay would pull towards a value that means something else than "off".
@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_recommended_recipe_decays_weight_matrices_only(name):
    net = mamba_zoo.create_model(name, num_classes=10, device="meta")
    exempt = no_decay_names(net, "recommended", name)
    for key, parameter in net.named_parameters():
        last = key.rsplit(".", 1)[-1]
        special = last in ("A_log", "D", "dt_bias", "pos_embed", "cls_token", "bias") or parameter.ndim == 1
        assert (key in exempt) == special, key
    assert {"A_log", "D", "dt_bias"} <= {key.rsplit(".", 1)[-1] for key in exempt}


@pytest.mark.parametrize(("name", "decayed"), [("vmamba_mini", {"A_log", "dt_bias"}), ("vim_mini", {"A_log"})])
def test_published_recipe_decays_what_the_published_code_does(name, decayed):
    net = mamba_zoo.create_model(name, num_classes=10, device="meta")
    more = no_decay_names(net, "recommended", name) - no_decay_names(net, "as-published", name)
    assert {key.rsplit(".", 1)[-1] for key in more} == decayed


def test_groups_hold_every_parameter_once_with_its_decay():
    net = mamba_zoo.create_model("vmamba_mini", num_classes=10, device="meta")
    exempt = no_decay_names(net)
    for layer_decay in (None, 0.5):
        groups = parameter_groups(net, 0.1, 0.05, layer_decay)
        found = {id(p): group for group in groups for p in group["params"]}
        assert sum(len(g["params"]) for g in groups) == len(found) == len(list(net.parameters()))
        for key, parameter in net.named_parameters():
            assert found[id(parameter)]["weight_decay"] == (0.0 if key in exempt else 0.05), key
        rates = {key: found[id(p)]["lr"] for key, p in net.named_parameters()}
        assert rates["head.fc.weight"] == pytest.approx(0.1)
        assert (min(rates.values()) < 0.05) == (layer_decay is not None)


def test_warmup_cosine_rises_then_falls_to_the_floor():
    factor = warmup_cosine(total_steps=100, warmup_steps=10, floor=0.1)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert max(values) == values[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(0.1)
    assert warmup_cosine(1, 5, 0.0)(0) == 1.0  # a run of one step is not all warm-up


def test_digits_are_split_by_class_and_seed():
    data, again, other = ImageData(), ImageData(), ImageData(split_seed=1)
    sizes = {name: len(data.split(name)) for name in ("train", "val", "test")}
    assert sizes == {"train": 1200, "val": 250, "test": 347}
    assert data.split("test").targets == again.split("test").targets != other.split("test").targets
    counts = np.bincount(data.split("val").targets)
    assert counts.min() >= 23
    x, y = data.split("val")[0]
    assert x.shape == (1, 8, 8)
    assert 0 <= y < 10
    pixels = torch.stack([x for x, _ in data.split("train")])
    assert abs(float(pixels.mean())) < 0.02
    assert abs(float(pixels.std()) - 1) < 0.02


def test_learns_digits(tmp_path, device):
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    data = ImageData(batch_size=48, train_crop="padded")
    result = train_once(
        "vmamba_mini",
        data,
        tmp_path,
        max_epochs=3,
        model={"lr": 5e-3, "warmup_epochs": 0.5, "label_smoothing": 0.0},
        trainer={"accelerator": accelerator},
    )
    assert result["accuracy"] >= 0.85
    assert [row["epoch"] for row in result["curve"]] == [1, 2, 3]
    assert result["images_per_second"] == pytest.approx(3 * 1200 / result["seconds"])
    assert result["curve"][-1]["train/loss"] < 0.5 * result["curve"][0]["train/loss"]
    stored = np.load(tmp_path / "test_predictions.npz")
    assert (stored["target"] == stored["predicted"]).mean() == pytest.approx(result["accuracy"], abs=1e-6)
    assert (result["peak_memory_bytes"] is not None) == (device.type == "cuda")


def test_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    options = {
        "max_epochs": 3,
        "model": {"ema_decay": 0.9, "drop_path_rate": 0.2, "drop_rate": 0.1, "mixup": 0.2, "cutmix": 1.0},
        "trainer": CPU,
    }
    data = {"train_crop": "padded", "random_erase": 0.5}
    whole = train_once(FAST, fast_digits(**data), tmp_path / "whole", **options)

    step = ImageClassifier.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 9:  # in the middle of the second epoch of six steps
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_once(FAST, fast_digits(**data), tmp_path / "parts", **options)
    saved = ImageClassifier.from_checkpoint(tmp_path / "parts" / "last.ckpt")
    assert saved(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    parts = train_once(FAST, fast_digits(**data), tmp_path / "parts", **options)

    a, b = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "parts"))
    assert a["global_step"] == b["global_step"] == 18
    for part in ("state_dict", "ema"):
        for key, value in a[part].items():
            assert torch.equal(value, b[part][key]), f"{part}: {key}"
    assert any(not torch.equal(a["ema"][key], a["state_dict"][f"net.{key}"]) for key in a["ema"])
    assert whole["test"] == parts["test"]
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in r["curve"]] for r in (whole, parts)]
    assert untimed[0] == untimed[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gpu.*\(accelerator gpu\); mamba-zoo doctor"):
        train_once(FAST, fast_digits(), tmp_path, trainer={"accelerator": "gpu"})
    with pytest.raises(ValueError, match=r"gpu.*\(--device gpu\); mamba-zoo doctor"):
        quiet_trainer("gpu")


def test_images_that_cannot_be_paired_are_not_mixed(tmp_path):
    with pytest.raises(ValueError, match="batch_size=65 is odd, but mixup and cutmix pair images"):
        train_once(FAST, ImageData(image_size=16, batch_size=65), tmp_path, model={"cutmix": 1.0}, trainer=CPU)


def test_mixing_leaves_no_image_out():
    model = ImageClassifier(FAST, in_chans=1, img_size=16, mixup=1.0, label_smoothing=0.1).eval()
    x, y = torch.rand(1, 1, 16, 16), torch.tensor([3])
    plain = torch.nn.functional.cross_entropy(model.net(x), y, label_smoothing=0.1)
    assert torch.allclose(model.batch_loss((x.clone(), y)), plain)  # one image has no partner
    x, seen = torch.rand(3, 1, 16, 16), []
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    model.batch_loss((x.clone(), torch.tensor([3, 4, 5])))
    assert seen[0].shape == x.shape
    assert torch.equal(seen[0][2], x[2])
    assert not torch.equal(seen[0][:2], x[:2])


def test_finished_run_is_read_back_and_other_settings_refused(tmp_path, monkeypatch):
    first = train_once(FAST, fast_digits(), tmp_path, max_epochs=1, trainer=CPU)

    def never(*args, **kwargs):
        raise RuntimeError("trained again")

    monkeypatch.setattr("mamba_zoo.tasks.train.fit", never)
    assert train_once(FAST, fast_digits(), tmp_path, max_epochs=1, trainer=CPU) == first
    assert json.loads((tmp_path / "metrics.json").read_text()) == first
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        train_once(FAST, fast_digits(), tmp_path, seed=1, max_epochs=1, trainer=CPU)


def test_average_of_weights_is_what_predicts(tmp_path):
    train_once(FAST, fast_digits(), tmp_path, max_epochs=1, model={"ema_decay": 0.99}, trainer=CPU)
    stored, model = read_checkpoint(tmp_path), ImageClassifier.from_checkpoint(tmp_path)
    for key, value in model.inference_net.state_dict().items():
        assert torch.equal(value, stored["ema"][key])
    x = torch.rand(2, 1, 16, 16)
    assert not torch.equal(model(x), model.net(x))


@pytest.mark.parametrize("freeze", ["backbone", "bn"])
def test_frozen_parts_do_not_move(freeze, tmp_path):
    data = ImageData(image_size=32, batch_size=400)
    train_once("test_resnet", data, tmp_path, max_epochs=1, model={"freeze": freeze, "lr": 1e-2}, trainer=CPU)
    torch.manual_seed(0)  # as train_once seeds: the same weights to start from
    start = make_task("test_resnet", data, model={"freeze": freeze}).net
    trained = ImageClassifier.from_checkpoint(tmp_path / "last.ckpt").net.state_dict()
    norms = {name for name, m in start.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for key, value in start.state_dict().items():
        frozen = key.rpartition(".")[0] in norms or (freeze == "backbone" and not key.startswith("fc."))
        assert torch.equal(trained[key], value) == frozen, key


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_folder_of_jpegs_trains_and_predicts(folder, tmp_path, device, ema_decay):
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    data = ImageData(str(folder), FAST, image_size=32, batch_size=8, train_crop="resized", hflip=0.5, color_jitter=0.1)
    assert data.classes == ["green", "red"]
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [24, 8, 8]
    model = {"lr": 3e-3, "ema_decay": ema_decay}
    result = train_once(FAST, data, tmp_path / "run", max_epochs=4, model=model, trainer={"accelerator": accelerator})
    assert result["accuracy"] == 1.0
    model = ImageClassifier.from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert model.class_names == ["green", "red"]
    files = [folder / "test" / name / file for name, file in (("red", "0.JPG"), ("green", "1.jpg"))]
    probabilities = predict_files(model, files, device=accelerator)
    assert probabilities.argmax(-1).tolist() == [1, 0]
    assert torch.allclose(probabilities.sum(-1), torch.ones(2))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(20, 50), (50, 20), (16, 16), (8, 8)])
def test_uncropped_training_sees_what_evaluation_sees(size, crop_pct):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image, to = Image.fromarray(pixels), Preprocess(16, 3, (0.5,) * 3, (0.25,) * 3, crop_pct=crop_pct)
    seen = train_transform(to, "none", 0.35, 0.0, 0.0, None, 0.0)(image)
    assert torch.equal(seen, eval_transform(to)(image))
    if crop_pct == 1.0:  # the whole image of a square one, shifted by up to two pixels of the padded image
        shifted = train_transform(to, "padded", 0.35, 0.0, 0.0, None, 0.0)(image)
        windows = torch.nn.functional.pad(seen, (2, 2, 2, 2), value=-2.0).unfold(1, 16, 1).unfold(2, 16, 1)
        assert (windows.permute(1, 2, 0, 3, 4) == shifted).flatten(2).all(-1).any()


def test_folder_of_classes_is_split_automatically(folder):
    data = ImageData(str(folder / "train"), val_fraction=0.2, test_fraction=0.2)
    parts = [data.split(name) for name in ("train", "val", "test")]
    assert sorted(item for part in parts for item in part.items) == sorted((folder / "train").rglob("*.[jJ]*"))
    assert all(set(part.targets) == {0, 1} for part in parts)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train", "test"):
        for i in range(6):
            write_image(tmp_path / name / f"{i}.png", (60, 60, 60))
    data = ImageData(str(tmp_path), val_fraction=0.2, test_fraction=0.2)
    assert data.classes == ["car", "test", "train"]
    assert len(data.split("train")) == 10
    (tmp_path / "car").rename(tmp_path / "val")  # nothing but names of splits: images without classes
    with pytest.raises(FileNotFoundError, match=r"train holds no class folders"):
        ImageData(str(tmp_path)).setup()


def test_splits_are_found_in_any_case(folder):
    (folder / "val").rename(folder / "Validation")
    (folder / "train").rename(folder / "TRAIN")
    (folder / "notes").mkdir()
    data = ImageData(str(folder))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [24, 8, 8]


def test_torchvision_data_set_by_name(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    data = ImageData("torchvision:MNIST", "vmamba_mini", in_chans=1, download_dir=str(tmp_path), val_fraction=0.2)
    assert data.num_classes == 10
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [48, 12, 20]
    assert data.split("test")[3][0].shape == (1, 32, 32)
    with pytest.raises(ValueError, match="torchvision:CIFAR10"):
        ImageData("torchvision:Nothing").setup()


def test_bad_folders_say_what_is_wrong(folder, tmp_path):
    def error(root, kind: type[Exception] = FileNotFoundError, **options):
        with pytest.raises(kind) as caught:
            ImageData(str(root), **options).setup()
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert "no folder" in error(tmp_path / "nowhere")
    assert "holds no class folders" in error(folder / "train" / "red")
    (folder / "train" / "blue").mkdir()
    assert "class folder 'blue'" in error(folder)
    write_image(folder / "train" / "blue" / "0.png", (0, 0, 180))
    assert "lacks blue" in error(folder, ValueError)
    assert "class 'blue' has 1 images, too few to split" in error(folder / "train", ValueError)
    for split in ("val", "test"):
        (folder / split).rename(folder / f"old_{split}")
    assert "neither val/ nor test/" in error(folder)


def test_bad_image_is_named_or_left_out(folder):
    good = folder / "train" / "red" / "0.JPG"
    cut = folder / "train" / "red" / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:200])
    text = folder / "train" / "green" / "text.jpg"
    text.write_text("not a picture")
    for workers in (0, 1):
        data = ImageData(str(folder), FAST, image_size=32, num_workers=workers)
        with pytest.raises(BadImageError, match=r"(cut|text)\.jpg"):
            list(data.train_dataloader())
    data = ImageData(str(folder), FAST, image_size=32, on_bad_image="skip")
    assert len(data.split("train")) == 24
    assert sorted(data.skipped) == [text, cut]


def test_images_of_every_kind_are_read_as_they_look(tmp_path):
    grey = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", "L").tobytes() == grey.tobytes()
    palette = Image.fromarray(grey).convert("RGB").quantize(8)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(8)))
    assert read_image(tmp_path / "palette.png", "RGB").size == (8, 6)
    turned = Image.fromarray(grey).rotate(90, expand=True)
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned clockwise by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png", "L")), grey)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImageError, match=r"float\.tif.*unknown range"):
        read_image(tmp_path / "float.tif", "L")


def test_diverged_run_stops_and_keeps_the_last_good_epoch(tmp_path, monkeypatch):
    step = ImageClassifier.training_step

    def poisoned(self, batch, batch_idx):
        if self.current_epoch == 1:
            batch = (batch[0] * float("inf"), batch[1])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", poisoned)
    with pytest.raises(ValueError, match="the loss became nan in epoch 2"):
        train_once(FAST, fast_digits(), tmp_path, max_epochs=3, trainer=CPU)
    stored = read_checkpoint(tmp_path / "last.ckpt")
    assert stored["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in stored["state_dict"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vmamba_mino"}, "did you mean 'vmamba_mini'"),
        ({"name": FAST, "img_size": 8}, "smaller than its patch of 16 pixels"),
        ({"name": FAST, "num_classes": 1}, "at least 2 classes"),
        ({"name": FAST, "ema_decay": 1.5}, "between 0 and 1"),
        ({"name": FAST, "label_smoothing": 2}, "label_smoothing=2 must lie between 0 and 1"),
        ({"name": FAST, "freeze": "all"}, "choose one of none, backbone, bn"),
        ({"name": FAST, "class_names": ["a"]}, "class_names has 1 names"),
    ],
)
def test_bad_settings_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**options)


def test_confusion_of_classes_that_the_font_cannot_write(tmp_path):
    counts = np.array([[3, 1], [0, 2]])  # a warning would be an error here
    for file, names in (("named.png", ["K\u00e4tze", "5 $ or $6"]), ("numbered.png", ["\u65e5\u672c", "\u72ac"])):
        plot_confusion(counts, names, tmp_path / file)
    plot_confusion(counts, ["0", "1"], tmp_path / "expected.png")
    pictures = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert pictures["numbered.png"] == pictures["expected.png"] != pictures["named.png"]


def test_pictures_never_take_the_place_of_images(tmp_path):
    image, out = tmp_path / "photos" / "more" / "a.PNG", tmp_path / "found"
    assert picture_name(image, tmp_path / "photos", out).as_posix() == "more/a.PNG"
    assert picture_name(image, tmp_path / "photos", tmp_path / "photos").as_posix() == "more/a.PNG.png"
    assert picture_name(image, image, out).as_posix() == "a.PNG"
    assert picture_name(image.with_suffix(".jpg"), tmp_path / "photos", out).as_posix() == "more/a.jpg.png"


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(10)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(OSError, match="the previous file is unharmed"):
            io.save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(io.load_checkpoint(path)["weights"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_never_runs_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": {}, "hyper_parameters": Attack()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="Checkpoints never execute code"):
        ImageClassifier.from_checkpoint(tmp_path / "bad.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "bad.ckpt").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        ImageClassifier.from_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ImageClassifier.from_checkpoint(tmp_path)
