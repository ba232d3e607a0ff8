"""What the losses of forecasts are made of: weights of the steps, spectra, frequencies taken out."""

import numpy as np
import pytest
import torch

from mamba_zoo.tasks._series_loss import known_error, spectral_error, step_weights, without_frequencies


def test_far_steps_count_less_and_unknown_values_not_at_all():
    wanted = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, torch.nan]])[..., None]
    weights, arctan = step_weights("root", 3), step_weights("arctan", 100_000)
    assert step_weights("even", 3) is None
    assert weights is not None
    assert arctan is not None
    assert weights.tolist() == pytest.approx([1, 2**-0.5, 3**-0.5])
    assert arctan[[0, -1]].tolist() == pytest.approx([1, 1 - np.pi / 4], abs=1e-4)
    mean, of_windows = known_error(torch.zeros(2, 3, 1), wanted, "mae", weights)
    assert of_windows.tolist() == pytest.approx([2, (1 + 3 * 2**-0.5) / (1 + 2**-0.5)])
    assert float(mean) == pytest.approx((2 * (1 + 2**-0.5 + 3**-0.5) + 1 + 3 * 2**-0.5) / (2 + 2 * 2**-0.5 + 3**-0.5))
    nothing = known_error(torch.zeros(1, 3, 1), torch.full((1, 3, 1), torch.nan), "mse", weights)
    assert float(nothing[0]) == float(nothing[1]) == 0


@pytest.mark.parametrize("steps", [1, 8, 9])
def test_spectra_are_compared_by_the_formula_of_the_transform(steps):
    generator = torch.Generator().manual_seed(steps)
    found, wanted = (torch.randn(3, steps, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    at = torch.arange(steps // 2 + 1)[:, None] * torch.arange(steps)
    waves = torch.exp(-2j * np.pi * at / steps) / steps**0.5
    expected = torch.einsum("ks,bsv->bkv", waves, (found - wanted).to(waves.dtype)).abs()
    mean, of_windows = spectral_error(found, wanted)
    assert float(mean) == pytest.approx(float(expected.mean()), rel=1e-6)
    assert of_windows.tolist() == pytest.approx(expected.mean((1, 2)).tolist(), rel=1e-6)


def test_gradients_of_spectra_are_those_of_differences_and_none_where_nothing_is_known():
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(2, 5, 2, generator=generator) for _ in range(2))
    wanted[0, 3, 1] = torch.nan
    found.requires_grad_()
    spectral_error(found, wanted)[0].backward()
    gradient = found.grad
    assert gradient is not None
    assert float(gradient[0, 3, 1]) == 0
    for b, step, v in [(0, 0, 0), (0, 4, 1), (1, 3, 1)]:
        with torch.no_grad():
            shift = torch.zeros_like(found)
            shift[b, step, v] = 1e-2
            slope = (spectral_error(found + shift, wanted)[0] - spectral_error(found - shift, wanted)[0]) / 2e-2
        assert float(gradient[b, step, v]) == pytest.approx(float(slope), rel=1e-2, abs=1e-4)
    known = wanted.clone()
    known[0, 3, 1] = found[0, 3, 1].detach()  # no error
    errors = [spectral_error(found.detach(), values)[0].item() for values in (wanted, known)]
    assert errors[0] == pytest.approx(errors[1])
    same = torch.ones(1, 4, 1, requires_grad=True)
    spectral_error(same, torch.ones(1, 4, 1))[0].backward()
    assert same.grad is not None
    assert same.grad.abs().max() == 0


def test_frequencies_are_taken_out_of_a_window_and_of_what_follows_alike():
    torch.manual_seed(0)
    x, y = torch.randn(64, 24, 2), torch.randn(64, 9, 2)
    y[0, 3, 1] = torch.nan
    new_x, new_y = without_frequencies(x, y, 0.25)
    assert new_x[0, :, 1].equal(x[0, :, 1])  # cannot be known
    assert new_y[0, :, 1].isnan().sum() == 1
    before, after = (torch.fft.rfft(torch.cat(part, 1)[1:], dim=1) for part in ((x, y), (new_x, new_y)))
    gone = after.abs() < 1e-4
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(after[~gone], before[~gone], atol=1e-4, rtol=1e-4)
