"""Scans of series: along steps, over variates, and orders that follow from data."""

import pytest
import torch

from mamba_zoo.scans import build_scan, correlation_scan, list_scans, permuted_spec, with_correlation


def test_small_tables_by_hand():
    assert build_scan("forward", 3).order.tolist() == [[0, 1, 2]]
    assert build_scan("reversed", 3).order.tolist() == [[2, 1, 0]]
    assert build_scan("both_ways(forward)", 3).order.tolist() == [[0, 1, 2], [2, 1, 0]]
    assert build_scan("step_first", 2, 3).order.tolist() == [[0, 3, 1, 4, 2, 5]]
    assert build_scan("permuted((2, 0, 1))", 3, 2).order.tolist() == [[4, 5, 0, 1, 2, 3]]
    assert build_scan("shuffled", 6).order.tolist() == [[3, 2, 1, 0, 4, 5]], "no longer the recorded table"
    assert {"forward", "bidirectional", "random", "permuted"} <= set(list_scans(modality="series"))


def test_what_a_permutation_does_not_reach_follows_it():
    assert build_scan("permuted((1, 0))", 4).order.tolist() == [[1, 0, 2, 3]]
    assert build_scan("permuted", 4).order.tolist() == [[0, 1, 2, 3]]


def test_shuffled_keeps_the_steps_of_a_variate_together():
    order = build_scan("shuffled(seed=3)", 5, 4).order.view(5, 4)
    assert torch.equal(order - order[:, :1], torch.arange(4).expand(5, 4))
    assert not torch.equal(order[:, 0], torch.arange(0, 20, 4))


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (2, 0, 1, 3)])
def test_refuses_what_is_no_permutation_of_the_axis(order):
    with pytest.raises(ValueError, match="permutation of 0 to"):
        build_scan(permuted_spec(order), 3)


def test_correlation_walks_along_alike_variates():
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 200, generator=g)
    noise = 0.1 * torch.randn(200, 4, generator=g)
    x = torch.stack([one, two, -one, two], dim=1) + noise
    spec = correlation_scan(x)
    order = build_scan(spec, 4).order[0].tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    x[5, 1] = torch.nan  # a missing value does not spoil a variate
    assert correlation_scan(x) == spec
    assert with_correlation("both_ways(correlation)", spec) == f"both_ways({spec})"
    assert with_correlation("forward", spec) == "forward"
    with pytest.raises(ValueError, match=r"\(steps, variates\)"):
        correlation_scan(x[0])


@pytest.mark.parametrize("name", ["correlation", "learned"])
def test_orders_that_follow_from_data_need_them(name):
    assert name in list_scans(modality="series")
    assert name not in list_scans()
    with pytest.raises(ValueError, match=f"scan='{name}'"):
        build_scan(f"both_ways({name})", 5)


def test_a_single_or_constant_variate_has_an_order():
    assert correlation_scan(torch.randn(9, 1)) == "permuted((0,))"
    assert correlation_scan(torch.ones(9, 3)) == "permuted((0, 1, 2))"
