"""Annotations in COCO's format: masks as COCO reads them, and one clear error for each thing that cannot be right."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_zoo.tasks.canvases import CLASSES, SIZE, Canvases, boxes_of
from mamba_zoo.tasks.coco import AnnotationError, decode, encode, read_coco
from mamba_zoo.tasks.detection_data import DetectionData, InstanceData, Objects

RNG = np.random.default_rng(0)


def blob(height: int = 23, width: int = 31) -> np.ndarray:
    return RNG.random((height, width)) > RNG.uniform(0.2, 0.8)


def write(folder, count: int = 6, **changes) -> dict:
    """A folder of images of 40x30 pixels with one box each, and what its file says."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(count)],
        "annotations": [
            {
                "id": i,
                "image_id": 10 + i,
                "category_id": 7 if i % 2 else 3,
                "bbox": [5, 6, 10, 8],
                "segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]],
                "iscrowd": 0,
            }
            for i in range(count)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    } | changes
    for i in range(count):
        pixels = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "annotations.json").write_text(json.dumps(content))
    return content


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_run_lengths_are_read_as_cocos_own_code_reads_them():
    mask_api = pytest.importorskip("pycocotools.mask", reason="pycocotools is an extra: mamba_zoo[detection]")
    for _ in range(20):
        mask = blob()
        packed = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert np.array_equal(decode(text, *mask.shape), mask)
        assert np.array_equal(decode(encode(mask), *mask.shape), mask)
        again = mask_api.decode(mask_api.frPyObjects(encode(mask), *mask.shape)).astype(bool)
        assert np.array_equal(again, mask)


def test_long_runs_and_full_masks():
    for mask in (np.zeros((300, 200), bool), np.ones((300, 200), bool)):
        assert np.array_equal(decode(encode(mask), 300, 200), mask)


def test_polygons_cover_the_pixels_within():
    mask = decode([[5, 6, 15, 6, 15, 14, 5, 14]], 30, 40)
    want = np.zeros((30, 40), bool)
    want[6:14, 5:15] = True
    assert np.array_equal(mask, want)
    assert decode([[0, 0, 4, 0, 4, 4, 0, 4], [20, 20, 24, 20, 24, 24, 20, 24]], 30, 40)[21:23, 21:23].all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_polygons_are_filled_as_cocos_own_code_fills_them():
    mask_api = pytest.importorskip("pycocotools.mask", reason="pycocotools is an extra: mamba_zoo[detection]")
    for size, least in ((12, 0.9), (60, 0.97), (150, 0.99)):
        for _ in range(10):
            angles = np.sort(RNG.uniform(0, 2 * np.pi, 12))
            reach = size / 2 * RNG.uniform(0.6, 1, 12)
            middle = RNG.uniform(20, 140, 2)  # some leave the picture
            polygon = (middle + np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)).ravel().tolist()
            want = mask_api.decode(mask_api.frPyObjects([polygon], 160, 160))[..., 0].astype(bool)
            found = decode([polygon], 160, 160)
            assert (found & want).sum() >= least * (found | want).sum()


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        (None, "it has none"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
        ({"size": [9, 9], "counts": [81]}, r"of \[9, 9\], the image is of \[30, 40\]"),
        ({"size": [30, 40], "counts": [10, 10]}, "sum to 20, not to 1200"),
    ],
)
def test_an_outline_that_is_none(outline, message):
    with pytest.raises(ValueError, match=message):
        decode(outline, 30, 40)


def test_boxes_classes_and_masks_arrive(tmp_path):
    write(tmp_path, count=7)
    data = InstanceData(str(tmp_path))
    assert data.classes == ["cat", "dog"]  # by number, whatever the order in the file
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [5, 1, 1]
    image, found = data.split("train")[0]
    assert image.shape == (3, 30, 40)
    assert found["boxes"].tolist() == [[5, 6, 15, 14]]
    assert found["masks"].shape == (1, 30, 40)
    assert set(found["labels"].tolist()) <= {1, 2}
    flipped, moved = InstanceData(str(tmp_path), hflip=1.0).split("train")[0]
    assert moved["boxes"].tolist() == [[25, 6, 35, 14]]
    assert flipped.equal(image.flip(-1))
    assert moved["masks"].equal(found["masks"].flip(-1))


def test_canvases_of_digits_in_cocos_format_are_read_as_they_were_drawn(tmp_path):
    images, objects = [], []
    for number in range(8):
        canvas = Canvases("val")[number]
        Image.fromarray(canvas.image).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        for i, (x0, y0, x1, y1) in enumerate(boxes_of(canvas).tolist()):
            one = {"id": len(objects), "image_id": number, "category_id": int(canvas.digits[i]), "iscrowd": 0}
            outline = encode(canvas.instances == i + 1)
            objects.append({**one, "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": outline})
    categories = [{"id": i, "name": str(i)} for i in range(10)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    found, classes = read_coco(tmp_path / "annotations.json", tmp_path)
    assert classes == CLASSES
    drawn, read = Objects(Canvases("val"), masks=True), Objects(found, masks=True)
    for number in range(8):
        torch.testing.assert_close(read[number], drawn[number], rtol=0, atol=0)


def test_an_annotation_file_of_which_nothing_is_left_says_so(tmp_path):
    write(tmp_path, **box(bbox=[5, 6, 0, 8]))
    with pytest.raises(AnnotationError, match="annotates no object but the 1 that cannot be right; on_bad_box='error'"):
        DetectionData(str(tmp_path), on_bad_box="drop").setup()


def test_folders_of_splits_and_cocos_own_layout(tmp_path):
    for split, count in (("train", 4), ("valid", 2), ("test", 3)):
        write(tmp_path / "a" / split, count)
    assert [len(DetectionData(str(tmp_path / "a")).split(s)) for s in ("train", "val", "test")] == [4, 2, 3]
    for split, count in (("train2017", 4), ("val2017", 2)):
        write(tmp_path / "b" / split, count)
        (tmp_path / "b" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "b" / split / "annotations.json").rename(tmp_path / "b" / "annotations" / f"instances_{split}.json")
    assert [len(DetectionData(str(tmp_path / "b")).split(s)) for s in ("train", "val", "test")] == [4, 2, 2]


def test_crowds_are_scored_but_not_learnt(tmp_path):
    content = write(tmp_path)
    for each in content["annotations"]:
        each["iscrowd"] = 1
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = DetectionData(str(tmp_path))
    assert data.split("train")[0][1]["boxes"].shape == (0, 4)
    assert data.split("val")[0][1]["iscrowd"].tolist() == [1]


def listed_in(data, split) -> list:
    return [data.split(split)[i] for i in range(len(data.split(split)))]


def box(**changes) -> dict:
    return {"annotations": [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [5, 6, 10, 8], **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (box(bbox=[35, 6, 10, 8]), r"\[35, 6, 10, 8\] .* of annotation 1 lies outside its image 0.png of 40x30"),
        (box(bbox=[5, 6, 0, 8]), "annotation 1 is empty in its image"),
        (box(category_id=4), "annotation 1 has category_id 4, which is not listed"),
        (box(image_id=4), "annotation 1 has image_id 4, which is not listed"),
        ({"images": []}, "lists no image"),
        ({"annotations": []}, "annotates no object"),
        ({"categories": 3}, "no annotation file in COCO's format"),
    ],
    ids=str,
)
def test_annotations_that_cannot_be_right(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(AnnotationError, match=message):
        DetectionData(str(tmp_path)).setup()


def test_bad_boxes_can_be_left_out(tmp_path):
    content = write(tmp_path)
    content["annotations"][0]["bbox"] = [35, 6, 10, 8]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = DetectionData(str(tmp_path), on_bad_box="drop")
    assert (
        sum(len(data.split(s)[i][1]["boxes"]) for s in ("train", "val", "test") for i in range(len(data.split(s)))) == 5
    )


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        DetectionData(str(tmp_path / "nowhere")).setup()
    with pytest.raises(FileNotFoundError, match="no annotation file in"):
        DetectionData(str(tmp_path)).setup()
    write(tmp_path)
    (tmp_path / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the image .*3\.png, which is not there"):
        DetectionData(str(tmp_path)).setup()
    (tmp_path / "annotations.json").write_text("[1")
    with pytest.raises(AnnotationError, match="no annotation file in COCO's format"):
        DetectionData(str(tmp_path)).setup()


def test_other_classes_and_other_sizes_are_refused(tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "val", categories=[{"id": 7, "name": "dog"}, {"id": 3, "name": "cow"}])
    with pytest.raises(AnnotationError, match=r"\(cow, dog\) are not those trained on \(cat, dog\)"):
        DetectionData(str(tmp_path)).setup()
    one = tmp_path / "one"
    write(one)
    for i in range(6):
        Image.new("RGB", (20, 20)).save(one / f"{i}.png")
    with pytest.raises(AnnotationError, match="is 20x20 pixels, its annotations are for 40x30"):
        DetectionData(str(one)).split("train")[0]


def test_masks_are_needed_for_outlines_only(tmp_path):
    write(tmp_path, **box())
    assert len(DetectionData(str(tmp_path)).split("train")) == 4
    data = InstanceData(str(tmp_path))
    with pytest.raises(AnnotationError, match=r"has no usable mask \(it has none\)"):
        [listed_in(data, split) for split in ("train", "val", "test")]


def test_read_coco_keeps_images_without_objects(tmp_path):
    write(tmp_path, **box())
    found, _ = read_coco(tmp_path / "annotations.json", tmp_path)
    assert [len(item.boxes) for item in found] == [1, 0, 0, 0, 0, 0]
