"""Detection and segmentation on the maps of a backbone: they learn, are scored, predict, and say what is wrong."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_zoo.__main__ import main
from mamba_zoo.tasks import load_task, train_once
from mamba_zoo.tasks._features import Maps, SimplePyramid
from mamba_zoo.tasks.building import freeze_parts
from mamba_zoo.tasks.canvases import COUNTS, Canvases, boxes_of, classes_of
from mamba_zoo.tasks.detection import Detector, DetectorNet, InstanceSegmenter
from mamba_zoo.tasks.detection_data import DetectionData, InstanceData
from mamba_zoo.tasks.draw import draw_regions
from mamba_zoo.tasks.optim import parameter_groups
from mamba_zoo.tasks.segmentation import Segmenter, SegmenterNet, mean_iou
from mamba_zoo.tasks.segmentation_data import IGNORED, SegmentationData

FAST = "test_resnet"  # a tiny network of timm: these tests are about the heads and the data
MINI = {"depths": [1, 1, 1], "patch_size": 4}
SMALL = {"fpn_channels": 32, "hidden": 64, "out_indices": [1], "anchor_size": 9, "rois": 16}


@pytest.fixture
def few(monkeypatch):
    """Canvases enough to see a score rise."""
    for split, count in (("train", 160), ("val", 8), ("test", 24)):
        monkeypatch.setitem(COUNTS, split, count)


def accelerator(device) -> dict:
    return {"accelerator": "gpu" if device.type == "cuda" else "cpu"}


def test_canvases_are_what_their_annotations_say():
    for split in ("train", "val", "test"):
        data = Canvases(split)
        canvas, again, other = data[3], Canvases(split)[3], Canvases(split, seed=1)[3]
        assert np.array_equal(canvas.image, again.image)
        assert not np.array_equal(canvas.image, other.image)
        for i, (x0, y0, x1, y1) in enumerate(boxes_of(canvas).astype(int)):
            own = canvas.instances == i + 1
            assert own.sum() == own[y0:y1, x0:x1].sum() > 20
            assert own[y0].any()
            assert own[:, x1 - 1].any()
            # A digit stands out from its ground.
            assert canvas.image[own].mean() > canvas.image[canvas.instances == 0].mean() + 40
            assert set(classes_of(canvas)[own]) == {canvas.digits[i] + 1}
        with pytest.raises(IndexError):
            data[len(data)]


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("vmamba_mini", MINI, [4, 8, 16]),
        ("vim_mini", {"depth": 4, "patch_size": 16, "img_size": 64}, [4, 8, 16, 32]),
        ("vim_mini", {"depth": 4, "patch_size": 2, "img_size": 64}, [2, 4, 8, 16]),
        (FAST, {}, [2, 4, 8, 16, 32]),
    ],
    ids=["pyramid", "plain", "plain of small patches", "timm"],
)
def test_maps_of_any_backbone_have_the_strides_they_name(name, options, strides, device):
    maps = Maps(name, options=options).to(device)
    found = maps(torch.randn(2, 3, 64, 64, device=device))
    assert maps.strides == strides
    assert [x.shape for x in found] == [(2, c, 64 // s, 64 // s) for c, s in zip(maps.channels, strides, strict=True)]
    torch.stack([x.square().mean() for x in found]).sum().backward()
    unused = {key for key, p in maps.named_parameters() if p.grad is None}
    assert not any(key.startswith("pyramid") for key in unused)


# Four stages or blocks each, as wide as a test allows.
STAGED = {"depths": (1, 1, 1, 1), "dims": 16, "d_state": 2}
PLAIN = {"depth": 4, "dim": 16, "d_state": 2, "img_size": 64}
WINDOWED = {"depths": (1, 1, 1, 1), "dim": 8, "stem_dim": 4, "heads": (1, 1), "windows": (3, 2)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, STAGED) for name in ("vmamba_tiny", "vmamba_tiny_v0", "efficient_vmamba_tiny")),
        ("local_vmamba_tiny", {**STAGED, "directions": ("h", "v_flip")}),
        ("mambavision_t", WINDOWED),
        ("plainmamba_l1", {**PLAIN, "stem_dim": 4}),
        ("local_vim_tiny", {**PLAIN, "directions": ("h", "v_flip")}),
        *((name, PLAIN) for name in ("vim_tiny", "videomamba_tiny")),
    ],
)
def test_every_family_is_trained_in_detection_and_segmentation(name, options, device):
    torch.manual_seed(0)
    net = SegmenterNet(Maps(name, options=options), "fpn", 3, 16, (0.5,) * 3, (0.5,) * 3).to(device)
    scores = net(torch.rand(2, 3, 64, 96, device=device))
    assert scores.shape == (2, 3, 64, 96)
    scores.square().mean().backward()
    detector = DetectorNet(Maps(name, options=options), "mask_rcnn", 3, 16, 16, rois=8, anchor_size=16).to(device)
    mask = torch.zeros(1, 64, 80, dtype=torch.uint8, device=device)
    mask[:, 5:40, 5:40] = 1
    objects = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}
    losses = detector([torch.rand(3, 64, 80, device=device)], [{key: x.to(device) for key, x in objects.items()}])
    torch.stack(list(losses.values())).sum().backward()
    for trained in (net, detector):
        body = dict(trained.get_backbone().body.named_parameters())
        moved = [key for key, p in body.items() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()]
        assert any(key.endswith("A_log") for key in moved)
        assert any("stem" in key or "patch_embed" in key for key in moved)


def test_a_plain_pyramid_sees_every_pixel_at_every_stride():
    pyramid = SimplePyramid(8, 16)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    for y in pyramid(x)[:3]:
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert (grad.abs().sum(1) > 0).all()


def test_optimizer_groups_know_the_backbone_within():
    net = DetectorNet(Maps("vmamba_mini", options=MINI), "retinanet", 3, channels=16)
    exempt = net.no_weight_decay()
    assert exempt <= {key for key, _ in net.named_parameters()}
    assert any(key.endswith("A_log") for key in exempt)
    groups = parameter_groups(net, 0.1, 0.05, layer_decay=0.5)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert len(rates) == len(list(net.parameters()))
    lr = {key: rates[id(p)] for key, p in net.named_parameters()}
    stem = next(value for key, value in lr.items() if ".stem." in key)
    deep = next(value for key, value in lr.items() if ".stages.2.blocks.0." in key)
    assert stem < deep < lr["detector.head.classification_head.cls_logits.weight"] == pytest.approx(0.1)


def test_freezing_holds_the_backbone_and_trains_the_rest():
    net = DetectorNet(Maps(FAST, out_indices=[1, 2]), "faster_rcnn", 3, channels=16, hidden=16)
    held = freeze_parts(net, "backbone")
    assert held == [net.get_backbone()]
    moving = {key for key, p in net.named_parameters() if p.requires_grad}
    assert moving
    assert not any(".maps." in key for key in moving)


@pytest.fixture
def tiles(tmp_path):
    """Dark pictures of 32x32 pixels with one or two bright rectangles, as COCO describes them."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 12)):
        images, objects = [], []
        (tmp_path / "tiles" / split).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 40, (32, 32, 3))
            for k in range(1 + i % 2):
                w, h = (int(v) for v in draw.integers(8, 14, 2))
                x, y = int(draw.integers(0, 17 - w)) + 16 * k, int(draw.integers(0, 33 - h))
                pixels[y : y + h, x : x + w] = draw.integers(150, 256, 3)
                outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                objects.append({"id": len(objects), "image_id": i, "category_id": 1, "bbox": [x, y, w, h]})
                objects[-1] |= {"segmentation": outline, "iscrowd": 0}
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "tiles" / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 32})
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "tile"}]}
        (tmp_path / "tiles" / split / "annotations.json").write_text(json.dumps(content))
    return tmp_path / "tiles"


@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_detectors_learn(head, tiles, tmp_path, device):
    pytest.importorskip("pycocotools", reason="scores need the extra mamba_zoo[detection]")
    masks = head == "mask_rcnn"
    data = (InstanceData if masks else DetectionData)(str(tiles), batch_size=8)
    # One stage needs more steps, and a gentle start.
    epochs, lr, warmup = (16, 6e-3, 1.0) if head == "retinanet" else (5, 8e-3, 0.5)
    model = {"lr": lr, "head": head if head == "retinanet" else None, "warmup_epochs": warmup, **SMALL}
    result = train_once(FAST, data, tmp_path / "run", max_epochs=epochs, model=model, trainer=accelerator(device))
    assert result["curve"][-1]["train/loss"] < 0.6 * result["curve"][0]["train/loss"]
    assert result["test"]["mask_map_50" if masks else "map_50"] > 0.3
    assert result["mask mAP" if masks else "mAP"] == result["test"]["mask_map" if masks else "map"]
    loaded = load_task(tmp_path / "run" / "last.ckpt")
    assert type(loaded) is (InstanceSegmenter if masks else Detector)
    assert loaded.hparams["class_names"] == ["tile"]
    assert loaded.hparams["head"] == head


@pytest.mark.parametrize(("head", "epochs", "batch_size"), [("upernet", 3, 4), ("fpn", 4, 8)])
def test_segmenters_learn_digits(head, epochs, batch_size, few, tmp_path, device):
    data = SegmentationData(batch_size=batch_size)
    model = {"lr": 6e-3, "head": head, "width": 32, "out_indices": [0, 1, 2]}
    result = train_once(FAST, data, tmp_path, max_epochs=epochs, model=model, trainer=accelerator(device))
    assert result["mIoU"] > 0.12  # all background: 1/11
    assert result["test"]["accuracy"] > 0.85
    items = np.load(tmp_path / "test_items.npy")
    assert items.shape == (24,)
    assert ((items >= 0) & (items <= 1)).all()


def test_mean_iou_is_over_classes_that_occur():
    counts = torch.tensor([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert float(mean_iou(counts)) == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert float(mean_iou(torch.zeros(3, 3))) == 0


@pytest.fixture
def regions(tmp_path):
    """Pictures of 30x20 pixels whose left half is a road."""
    root = tmp_path / "regions"
    for i in range(8):
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 30 * i, np.uint8)).save(root / "images" / f"{i}.jpg")
        mask = np.zeros((20, 30), np.uint8)
        mask[:, :15] = 1
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("ground\nroad\n")
    return root


def test_images_and_masks_are_fitted_and_padded_alike(regions):
    data = SegmentationData(str(regions), image_size=48)
    assert data.classes == ["ground", "road"]
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [6, 1, 1]
    x, y = data.split("train")[0]
    assert x.shape == (3, 48, 48)
    assert (y[:32, :24] == 1).all()
    assert (y[:32, 24:] == 0).all()
    assert (y[32:] == IGNORED).all()
    cut, other = SegmentationData(str(regions), image_size=16, scale_min=2.0, scale_max=2.0).split("train")[0]
    assert cut.shape == (3, 16, 16)
    assert (other != IGNORED).all()
    small = SegmentationData(str(regions), image_size=16, scale_min=0.5, scale_max=0.5).split("train")[0][1]
    assert (small == IGNORED).sum() == 16 * 16 - 8 * 5


def test_masks_that_cannot_be_right(regions):
    def error(kind: type[Exception] = ValueError, **options) -> str:
        with pytest.raises(kind) as caught:
            [list(SegmentationData(str(regions), **options).split(s)) for s in ("train", "val", "test")]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    mask = regions / "masks" / "3.png"
    Image.fromarray(np.full((20, 30), 2, np.uint8)).save(mask)
    assert "has the unknown class 2; classes are 0 to 1, and 255" in error()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(mask)
    assert "3.png has colours (RGB)" in error()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(mask)
    assert "3.png is 20x20 pixels, its image is 30x20" in error()
    mask.write_text("no picture")
    assert "cannot read the mask" in error()
    mask.unlink()
    assert "3.jpg has no mask" in error(FileNotFoundError)
    (regions / "classes.txt").unlink()
    assert "classes.txt is missing" in error(FileNotFoundError)
    assert "between 0 and 0.5" in error(val_fraction=0.9)
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        SegmentationData("nowhere").setup()
    with pytest.raises(ValueError, match="choose VOCSegmentation or Cityscapes"):
        SegmentationData("torchvision:CIFAR10").setup()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Detector(FAST, head="mask_rcnn"), "choose one of faster_rcnn, retinanet"),
        (lambda: InstanceSegmenter(FAST, head="retinanet"), "choose one of mask_rcnn"),
        (lambda: Detector(FAST, rois=0, detections=0), "rois=0, detections=0 must be at least 1"),
        (lambda: Detector(FAST, out_indices=[9]), r"out_indices=\[9\] names maps that test_resnet does not have"),
        (lambda: Segmenter(FAST, head="unet"), "choose one of upernet, fpn"),  # type: ignore[arg-type]
        (lambda: Segmenter("vmamba_mino"), "did you mean 'vmamba_mini'"),
        (lambda: Detector("videomamba_mini_video"), "of modality 'video' and takes no images"),
        (lambda: Segmenter(FAST, class_names=["one"]), "at least 2 classes"),
        (lambda: DetectionData(batch_size=0), "batch_size=0"),
        (lambda: DetectionData(hflip=2), "hflip=2 is a probability"),
        (lambda: SegmentationData(scale_min=2), "at most scale_max"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("task", ["object-detection", "instance-segmentation", "semantic-segmentation"])
def test_predictions_are_files_and_pictures(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 32), ("val", 4), ("test", 6)):
        monkeypatch.setitem(COUNTS, split, count)
    for i, canvas in enumerate(Canvases("test")[i] for i in range(2)):
        (tmp_path / "photos" / "more").mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.image).crop((0, 0, 64, 50)).save(tmp_path / "photos" / ("more/1.png" if i else "0.png"))
    options = {"model.name": FAST, "model.options": "null", "trainer.max_epochs": 1, "trainer.accelerator": "cpu"}
    options["model.out_indices"] = "[1,2]"
    if task != "semantic-segmentation":
        options |= {"model.rois": 16, "model.hidden": 32}
    if task == "object-detection":
        options["model.head"] = "faster_rcnn"
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert main(["fit", "--task", task, "--out", "run", *flags]) == 0
    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["images"] == 6
    capsys.readouterr()
    predict = ["predict", "--checkpoint", "run", "--data", "photos", "--device", "cpu", "--out", "found"]
    if task != "semantic-segmentation":
        predict += ["--score", "0.0"]
    assert main(predict) == 0
    assert "2 images -> found" in capsys.readouterr().out
    for name in ("0.png", "more/1.png"):
        with Image.open(tmp_path / "found" / name) as picture:
            assert min(picture.size) >= 380
    if task == "semantic-segmentation":
        with Image.open(tmp_path / "found" / "masks" / "0.png") as mask:
            assert mask.size == (64, 50)
            assert np.asarray(mask).max() <= 10
        with (tmp_path / "run" / "classes.csv").open() as file:
            assert [row["class"] for row in csv.DictReader(file)] == ["background", *map(str, range(10))]
        return
    rows = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert [row["file"] for row in rows] == ["photos/0.png", "photos/more/1.png"]
    objects = [one for row in rows for one in row["objects"]]
    assert objects
    assert all(len(one["bbox"]) == 4 and one["class"] in map(str, range(10)) for one in objects)
    assert all(("segmentation" in one) == (task == "instance-segmentation") for one in objects)
    assert main([*predict[:-2], "--score", "2"]) == 2
    assert "score=2.0 must lie between 0 and 1" in capsys.readouterr().err


def test_regions_are_tinted_and_named_beside_the_picture():
    grey = Image.new("RGB", (40, 30), (100, 100, 100))
    classes = np.zeros((30, 40), int)
    classes[:, 20:] = 2
    tinted = np.asarray(draw_regions(grey, classes, ["ground", "car", "road"]))
    plain = np.asarray(draw_regions(grey, np.zeros((30, 40), int), ["ground", "car", "road"]))
    assert tinted.shape == plain.shape
    changed = (tinted != plain).any(-1)
    edge = changed.any(0).argmax()
    assert changed[:, edge : 2 * edge].all()  # the right half of the enlarged picture
    legend = changed[:, 2 * edge :]
    assert 0 < legend.sum() < 0.2 * legend.size


def test_scores_without_their_package_name_the_extra(monkeypatch):
    monkeypatch.setattr("torchmetrics.detection.mean_ap._PYCOCOTOOLS_AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError, match=r"mamba_zoo\[detection\]"):
        Detector(FAST)
