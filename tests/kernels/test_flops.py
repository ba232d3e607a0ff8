"""FLOPs as `FlopCounterMode` counts them: per step visited, forward and backward, with and without data."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mamba_zoo.kernels import causal_conv1d, selective_scan

B, L, K, D, N, M, W = 2, 10, 3, 4, 5, 7, 4


def scan(device: str, **options):
    order = torch.stack([torch.randperm(L)[:M] for _ in range(K)]).to(device)
    leaf = {"device": device, "requires_grad": True}
    return selective_scan(
        torch.rand(B, L, D, **leaf), torch.rand(B, L, K, D, **leaf), -torch.rand(K, D, N, **leaf),
        torch.rand(B, L, K, N, **leaf), torch.rand(B, L, K, N, **leaf), order=order, **options,
    )  # fmt: skip


def conv(device: str):
    order = torch.stack([torch.randperm(L)[:M] for _ in range(K)]).to(device)
    leaf = {"device": device, "requires_grad": True}
    return causal_conv1d(torch.rand(B, L, D, **leaf), torch.rand(K, D, W, **leaf), order=order)


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scan_counts_nine_per_state_and_step_visited(device):
    steps = B * K * M * D
    assert count(lambda: scan(device)) == 9 * steps * N
    assert count(lambda: scan(device, D=torch.rand(K, D, device=device))) == 9 * steps * N + steps
    gated = {"D": torch.rand(K, D, device=device), "z": torch.rand(B, L, D, device=device)}
    assert count(lambda: scan(device, **gated)) == 9 * steps * N + 2 * steps


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolution_counts_two_per_tap(device):
    assert count(lambda: conv(device)) == 2 * B * K * M * D * W


@pytest.mark.parametrize("run", [scan, conv], ids=["scan", "conv"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_counts_twice_the_forward(run, device):
    forward = count(lambda: run(device))
    assert count(lambda: run(device).sum().backward()) == 3 * forward


def test_orders_per_sample_count_once_a_sample():
    order = torch.stack([torch.randperm(L) for _ in range(B * K)]).view(B, K, L)
    x, weight = torch.rand(B, L, D), torch.rand(K, D, W)
    assert count(lambda: causal_conv1d(x, weight, order=order)) == 2 * B * K * L * D * W
