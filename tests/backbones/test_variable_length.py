"""Every registered model of sound and series: unequal lengths, padded or packed, give what each gives alone."""

import inspect
from typing import Any

import pytest
import torch

import mamba_zoo

NAMES = [*mamba_zoo.list_models(modality="audio"), *mamba_zoo.list_models(modality="series")]
# What makes a model of a family small, and the lengths that it is tried with.
SPECTROGRAMS = {"dim": 24, "depth": 2, "d_state": 3, "mel_bins": 32, "frames": 48, "num_classes": 5}
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "aum_mini": ({**SPECTROGRAMS, "stem": 8}, (48, 21, 67, 8)),
    "aum": ({**SPECTROGRAMS, "patch_size": 8}, (48, 21, 67, 8)),
    "ssamba": ({**SPECTROGRAMS, "patch_size": 8}, (48, 21, 67, 8)),
    "semamba": ({"dim": 8, "depth": 1, "d_state": 3}, (1200, 1, 451)),
    "spmamba": ({"dim": 4, "depth": 1, "d_state": 3, "heads": 2}, (1200, 1, 451)),
    "series_mamba": ({"dim": 16, "depth": 2, "num_classes": 3, "scan": "bidirectional"}, (7, 1, 12, 5)),
}


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """GPUs may choose another algorithm for another length, and not all of them round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def takes_lengths(name: str) -> bool:
    model: Any = mamba_zoo.create_model(name, device="meta")
    return {"lengths", "cu_seqlens"} <= set(inspect.signature(model.forward).parameters)


def small(name: str) -> tuple[Any, list[torch.Tensor]]:
    options, lengths = next(found for family, found in SMALL.items() if name.startswith(family))
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model(name, **options).eval()
    for key in ("mask_out", "phase_real", "phase_imag"):  # the small enhancer begins as an identity
        if hasattr(model, key):
            torch.nn.init.normal_(getattr(model, key).weight)
    channels = {"mel_bins": (32,), "spectrum": ()}
    shape = next((size for key, size in channels.items() if hasattr(model, key)), (1,))
    return model, [torch.randn(n, *shape) for n in lengths]


def test_all_but_models_of_fixed_windows_take_any_lengths():
    fixed = {name for name in NAMES if not takes_lengths(name)}
    assert fixed == {"dlinear", "mambats", "nlinear", "s_mamba", "series_linear", "timemachine"}


@pytest.mark.parametrize("name", [name for name in NAMES if takes_lengths(name)])
def test_padded_and_packed_batches_are_each_input_alone(name, device):
    model, inputs = small(name)
    model, inputs = model.to(device), [x.to(device) for x in inputs]
    lengths = torch.tensor([len(x) for x in inputs], device=device)
    cuts = torch.tensor([0, *lengths.cumsum(0).tolist()], device=device)
    padded = torch.full((len(inputs), int(lengths.max()) + 9, *inputs[0].shape[1:]), 7.0, device=device)
    for row, x in zip(padded, inputs, strict=True):
        row[: len(x)] = x
    with torch.no_grad():
        alone = [model(x[None])[0] for x in inputs]
        in_batch = model(padded, lengths=lengths)
        in_pack = model(torch.cat(inputs)[None], cu_seqlens=cuts)
    for i, (want, x) in enumerate(zip(alone, inputs, strict=True)):
        got = in_batch[i], in_pack[i if len(in_pack) > 1 else 0]
        if hasattr(model, "spectrum"):  # samples come out, not one answer
            got = got[0][..., : len(x)], got[1][..., cuts[i] : cuts[i + 1]]
        torch.testing.assert_close(got[0], want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got[1], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["aum_small", "ssamba_tiny", "semamba_mini", "spmamba_mini", "series_mamba"])
def test_what_comes_last_reaches_what_came_first(name):
    model, inputs = small(name)
    x = inputs[0][None].clone()
    changed = x.clone()
    changed[:, -len(x[0]) // 8 :] += 1
    with torch.no_grad():
        before, after = model(x), model(changed)
    if hasattr(model, "spectrum"):
        before, after = before[..., : x.shape[1] // 8], after[..., : x.shape[1] // 8]
    assert (before - after).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["semamba_mini", "spmamba_mini"])
def test_boundaries_that_do_not_fit_are_refused(name):
    model, _ = small(name)
    for cuts in ([0, 3], [1, 900], [0, 400, 400, 900]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to n"):
            model(torch.randn(1, 900), cu_seqlens=torch.tensor(cuts))
    with pytest.raises(ValueError, match="not both"):
        model(torch.randn(1, 900), [900], torch.tensor([0, 900]))
