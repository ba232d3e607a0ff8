"""Scans of videos: their tables by hand, and what each keeps near."""

import math

import pytest
import torch

from mamba_zoo.scans import build_scan, list_scans

SIZES = [(1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 4), (5, 7, 7), (8, 14, 14)]


def places(scan):
    """Frame, row and column of every step, `(k, m, 3)`."""
    _, height, width = scan.size
    return torch.stack([scan.order // (height * width), scan.order // width % height, scan.order % width], dim=-1)


def test_small_tables_by_hand():
    rows, turned = list(range(12)), [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    columns = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert build_scan("spatial_first", 2, 2, 3).order.tolist() == [rows, rows[::-1]]
    assert build_scan("temporal_first", 2, 2, 3).order.tolist() == [turned, turned[::-1]]
    both = [rows, turned, rows[::-1], turned[::-1]]
    assert build_scan("spatiotemporal", 2, 2, 3).order.tolist() == both
    cross = [rows, columns, turned]
    assert build_scan("cross_video", 2, 2, 3).order.tolist() == [*cross, *(row[::-1] for row in cross)]
    snake = build_scan("snake_video", 2, 2, 3).order.tolist()
    assert snake[0] == [0, 1, 2, 5, 4, 3, 9, 10, 11, 8, 7, 6]
    assert snake[1] == [0, 6, 7, 1, 2, 8, 11, 5, 4, 10, 9, 3]
    assert build_scan("hilbert_video", 2, 2, 2).order.tolist()[:2] == [
        [0, 2, 3, 1, 5, 7, 6, 4],
        [0, 4, 6, 2, 3, 7, 5, 1],
    ]


@pytest.mark.parametrize("name", list_scans("*", modality="video"))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_direction_visits_every_token_once(name, size):
    scan = build_scan(name, *size)
    assert scan.reduce == ("mean" if name == "bidirectional" else "sum")
    assert (scan.size, scan.m) == (size, math.prod(size))
    assert (scan.order.sort(dim=-1).values == torch.arange(scan.m)).all()


@pytest.mark.parametrize("name", ["spatiotemporal", "cross_video", "snake_video", "hilbert_video"])
def test_second_half_is_the_first_reversed(name):
    order = build_scan(name, 3, 4, 5).order
    assert torch.equal(order[len(order) // 2 :], order[: len(order) // 2].flip(1))


@pytest.mark.parametrize("name", ["snake_video", "hilbert_video"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_continuous_scans_only_step_to_neighbours_in_space_or_time(name, size):
    steps = places(build_scan(name, *size)).diff(dim=1).abs().sum(-1)
    assert bool((steps == 1).all())


def test_space_first_leaves_a_frame_only_when_it_is_seen():
    for name, direction in (("spatial_first", 0), ("snake_video", 0), ("hilbert_video", 0)):
        frame = places(build_scan(name, 4, 3, 5))[direction, :, 0]
        assert frame.tolist() == sorted(frame.tolist()), name


def test_time_first_leaves_a_place_only_when_all_its_frames_are_seen():
    for name, direction in (("temporal_first", 0), ("spatiotemporal", 1), ("snake_video", 1), ("hilbert_video", 1)):
        place = places(build_scan(name, 4, 3, 5))[direction, :, 1:].reshape(-1, 4, 2)
        assert bool((place == place[:, :1]).all()), name


def test_one_frame_is_an_image():
    for video, image in (("spatial_first", "bidirectional"), ("temporal_first", "bidirectional")):
        assert torch.equal(build_scan(video, 1, 4, 6).order, build_scan(image, 4, 6).order)
    for video, image in (("snake_video", "snake"), ("hilbert_video", "hilbert")):
        assert torch.equal(build_scan(video, 1, 4, 6).order[0], build_scan(image, 4, 6).order[0])


def test_a_class_token_goes_first_and_last():
    order = build_scan("with_token(temporal_first, 0)", 2, 1, 2).order
    assert order.tolist() == [[0, 1, 3, 2, 4], [4, 2, 3, 1, 0]]


def test_scans_of_images_say_that_a_video_is_no_image():
    with pytest.raises(ValueError, match=r"'hilbert' orders a grid of \(height, width\), but the size is \(2, 4, 4\)"):
        build_scan("hilbert", 2, 4, 4)
    with pytest.raises(ValueError, match=r"'hilbert_video' orders a grid of \(frames, height, width\)"):
        build_scan("hilbert_video", 4, 4)
