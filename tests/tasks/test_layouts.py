"""COCO, VOC and Cityscapes in miniature: the very folders, file names and formats in which they are published."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_zoo.tasks.coco import AnnotationError
from mamba_zoo.tasks.detection import Detector, InstanceSegmenter
from mamba_zoo.tasks.detection_data import DetectionData, InstanceData
from mamba_zoo.tasks.segmentation_data import IGNORED, SegmentationData

FAST = {"name": "test_resnet", "fpn_channels": 16, "hidden": 16, "out_indices": [1], "anchor_size": 9, "rois": 16}
RNG = np.random.default_rng(0)
# Category numbers of COCO have gaps; file order is by number there, but nothing says so.
CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "indoor", "id": 90, "name": "toothbrush"},
    {"supercategory": "outdoor", "id": 13, "name": "stop sign"},
]
# What is in each image: its PIL mode, EXIF orientation and annotations. Images are 48 pixels wide and 32 high.
SHAPES = {
    9: ("RGB", 1, [{"category_id": 90, "bbox": [4.5, 6.25, 20.0, 12.5]}, {"category_id": 1, "bbox": [20, 2, 28, 30]}]),
    25: ("L", 1, [{"category_id": 13, "bbox": [1, 1, 10, 10]}]),
    30: ("CMYK", 1, [{"category_id": 1, "bbox": [30.12, 10.4, 17.88, 21.6]}]),
    34: ("RGB", 6, [{"category_id": 1, "bbox": [10, 5, 20, 20]}]),
    36: ("RGB", 1, []),
    42: ("RGB", 1, [{"category_id": 1, "crowd": True, "bbox": [0, 0, 48, 16]}]),
}


def outline_of(bbox: list[float]) -> list[list[float]]:
    x, y, w, h = bbox
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_coco(root, empty_box: bool = False):
    """`annotations/instances_{train,val}2017.json` with the images in `train2017/` and `val2017/`."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, objects = [], []
        for number, (mode, turn, found) in SHAPES.items():
            name = f"{number:012}.jpg"
            size = (32, 48) if turn == 6 else (48, 32)  # turned by a quarter when shown
            exif = Image.Exif()
            exif[0x0112] = turn
            picture = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            picture.convert(mode).save(root / split / name, exif=exif)
            images.append({"license": 4, "file_name": name, "height": 32, "width": 48, "id": number})
            for each in found:
                one = {"id": 900 + len(objects), "image_id": number, "iscrowd": int(each.get("crowd", False))}
                one |= {"category_id": each["category_id"], "bbox": each["bbox"], "area": 10.0}
                one["segmentation"] = outline_of(each["bbox"])
                if one["iscrowd"]:  # the upper half, column by column
                    one["segmentation"] = {"counts": [0, *[16] * 96], "size": [32, 48]}
                objects.append(one)
        if empty_box and split == "train2017":
            objects.append({**objects[0], "id": 2206849, "bbox": [9.98, 31.0, 0.0, 1.0]})
        content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": objects}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({**content, "categories": CATEGORIES}))
        for other in ("captions", "person_keypoints"):
            (root / "annotations" / f"{other}_{split}.json").write_text("{}")
    (root / "annotations" / "image_info_test2017.json").write_text("{}")
    return root


def test_coco(tmp_path):
    data = InstanceData(str(write_coco(tmp_path / "coco")))
    assert data.classes == ["person", "stop sign", "toothbrush"]
    train, val = data.split("train"), data.split("val")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [6, 6, 6]
    found = [train[i] for i in range(6)]
    assert all(x.shape == (3, 32, 48) and x.min() >= 0 and x.max() <= 1 for x, _ in found)
    assert found[0][1]["labels"].tolist() == [3, 1]
    assert found[0][1]["boxes"].tolist() == [[4.5, 6.25, 24.5, 18.75], [20, 2, 48, 32]]
    grey, _ = found[1]
    assert grey[0].equal(grey[1])
    assert [len(y["boxes"]) for _, y in found] == [2, 1, 1, 1, 0, 0]
    crowd = val[5][1]
    assert crowd["iscrowd"].tolist() == [1]
    assert crowd["masks"][0, :16].all()
    assert not crowd["masks"][0, 16:].any()
    inside = found[3][1]["masks"][0].nonzero()
    assert (inside.amin(0).tolist(), inside.amax(0).tolist()) == ([5, 10], [24, 29])


@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_detectors_take_coco_as_it_is(head, tmp_path):
    pytest.importorskip("pycocotools", reason="scores need the extra mamba_zoo[detection]")
    masks = head == "mask_rcnn"
    data = (InstanceData if masks else DetectionData)(str(write_coco(tmp_path / "coco")), batch_size=6)
    model: Detector = (InstanceSegmenter if masks else Detector)(class_names=data.classes, head=head, **FAST)
    scores = {}
    model.log = lambda name, value, **_: scores.update({name: float(value.detach())})  # type: ignore[method-assign]
    batch = next(iter(data.train_dataloader()))
    model.training_step(batch, 0).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # Images without objects alone: nothing but background to learn from.
    images, objects = zip(*[data.split("train")[4]] * 2, strict=True)
    model.training_step((list(images), list(objects)), 0).backward()
    model.eval()
    with torch.no_grad():
        model.validation_step(next(iter(data.val_dataloader())), 0)
    model.on_validation_epoch_end()
    assert {"val/map", "val/map_50"} | ({"val/mask_map"} if masks else set()) <= set(scores)


def test_cocos_empty_boxes_stop_the_run_or_are_counted(tmp_path):
    root = str(write_coco(tmp_path / "coco", empty_box=True))
    with pytest.raises(AnnotationError, match=r"annotation 2206849 is empty in its image .*on_bad_box='drop'"):
        DetectionData(root).setup()
    data = DetectionData(root, on_bad_box="drop")
    assert data.describe("images") == [
        ("images", "6 train, 6 val, no test: test scores are those of val"),
        ("left out", "1 objects"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [5, 5, 10]}, "a bbox that is not four numbers"),
        ({"bbox": [5, 5, float("nan"), 3]}, "is empty in its image"),
        ({"bbox": [47.9, 5, 0.6, 3], "image_id": 25}, None),
        ({"bbox": [48.0, 5, 0.9, 3], "image_id": 25}, "is empty in its image"),
        ({"segmentation": []}, "annotation 900 has no usable mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "a polygon of 4 numbers.*on_bad_box='drop'"),
        ({"segmentation": {"counts": "1"}}, "need size and counts"),
    ],
    ids=str,
)
def test_objects_of_coco_that_cannot_be_right(change, message, tmp_path):
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= change
    file.write_text(json.dumps(content))
    if message is None:
        InstanceData(str(root)).setup()
        return
    with pytest.raises(AnnotationError, match=message):
        InstanceData(str(root)).setup()
    if "bbox" not in str(message):
        dropped = InstanceData(str(root), on_bad_box="drop")
        assert len(dropped.split("train")[0][1]["boxes"]) in (1, 2)
        assert dropped.describe("images")[-1] == ("left out", "1 objects")


@pytest.mark.parametrize(("part", "key"), [("images", "height"), ("annotations", "bbox"), ("images", "id")])
def test_entries_that_lack_something_are_named(part, key, tmp_path):
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    del content[part][1][key]
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=f"lacks {key}"):
        DetectionData(str(root)).setup()


def test_pixels_as_stored_where_the_annotations_mean_those(tmp_path):
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "instances_train2017.json"
    upright = DetectionData(str(root)).split("train")[3][0]
    content = json.loads(file.read_text())
    content["images"][3] |= {"width": 32, "height": 48}
    content["annotations"] = [o for o in content["annotations"] if o["image_id"] != 34]
    file.write_text(json.dumps(content))
    stored = DetectionData(str(root)).split("train")[3][0]
    assert stored.shape == (3, 48, 32)
    assert upright.equal(stored.rot90(-1, (1, 2)))  # orientation 6: shown turned clockwise


def test_images_may_lie_one_folder_deeper(tmp_path):
    root = write_coco(tmp_path / "coco")
    (root / "images").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).rename(root / "images" / split)
    assert len(DetectionData(str(root)).split("train")) == 6


def write_voc(root) -> None:
    """`VOCdevkit/VOC2012` with JPEG images and masks whose palette is VOC's: 255 is the void along outlines."""
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
        (base / folder).mkdir(parents=True)
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0, *[7] * (3 * 252), 224, 224, 192]
    for split, names in (("train", ["2007_000032", "2007_000039"]), ("val", ["2007_000033"])):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
            mask = np.zeros((20, 30), np.uint8)
            mask[:, 10:], mask[:, 20:], mask[:, 10] = 1, 20, 255
            picture = Image.fromarray(mask, mode="P")
            picture.putpalette(palette)
            picture.save(base / "SegmentationClass" / f"{name}.png")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_voc(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("what is there needs no download")

    write_voc(tmp_path)
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", no_network)
    data = SegmentationData("torchvision:VOCSegmentation", image_size=30, download_dir=str(tmp_path))
    assert len(data.classes) == 21
    assert (data.classes[0], data.classes[1], data.classes[20]) == ("background", "aeroplane", "tvmonitor")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [2, 1, 1]
    x, y = data.split("val")[0]
    assert x.shape == (3, 30, 30)
    assert y[:20].unique().tolist() == [0, 1, 20, IGNORED]
    assert (y[:20, :10] == 0).all()
    assert (y[:20, 10] == IGNORED).all()
    assert (y[:20, 11:20] == 1).all()
    assert (y[:20, 20:] == 20).all()
    assert (y[20:] == IGNORED).all()  # the padding


def test_voc_is_downloaded_only_where_it_is_missing(tmp_path, monkeypatch):
    def fetched(url, root, **_):
        write_voc(tmp_path)

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fetched)
    data = SegmentationData("torchvision:VOCSegmentation", image_size=30, download_dir=str(tmp_path))
    assert len(data.split("train")) == 2


def write_cityscapes(root) -> None:
    """`leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`, as published."""
    for split, city in (("train", "zurich"), ("train", "aachen"), ("val", "frankfurt")):
        images, masks = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in (19, 218):
            name = f"{city}_000000_{number:06}"
            Image.fromarray(RNG.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(images / f"{name}_leftImg8bit.png")
            mask = np.zeros((32, 64), np.uint8)
            mask[1, :34], mask[2], mask[3] = np.arange(34), 7, 255  # every labelId; a road; licence plates are -1
            Image.fromarray(mask).save(masks / f"{name}_gtFine_labelIds.png")
            Image.fromarray(mask).convert("RGBA").save(masks / f"{name}_gtFine_color.png")
            Image.fromarray(mask.astype(np.uint16) * 1000).save(masks / f"{name}_gtFine_instanceIds.png")
            (masks / f"{name}_gtFine_polygons.json").write_text("{}")


def test_cityscapes(tmp_path):
    write_cityscapes(tmp_path)
    data = SegmentationData("torchvision:Cityscapes", image_size=64, download_dir=str(tmp_path))
    assert len(data.classes) == 19
    assert (data.classes[0], data.classes[-1]) == ("road", "bicycle")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [4, 2, 2]
    images = data.split("train").items.images
    assert ["aachen" in path for path in images] == [True, True, False, False]
    x, y = data.split("val")[0]
    assert x.shape == (3, 64, 64)
    # The 19 classes that count, by labelId, as https://www.cityscapes-dataset.com/dataset-overview lists them.
    counted = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    want = [counted.index(i) if i in counted else IGNORED for i in range(34)]
    assert y[1, :34].tolist() == want
    assert (y[2] == 0).all()
    assert (y[3] == IGNORED).all()
    assert (y[0] == IGNORED).all()


def test_data_sets_that_are_not_there_say_where_they_should_be(tmp_path):
    with pytest.raises(OSError, match=r"could not get torchvision's Cityscapes in .*Dataset not found or incomplete"):
        SegmentationData("torchvision:Cityscapes", download_dir=str(tmp_path)).setup()
