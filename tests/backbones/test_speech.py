"""SEMamba and SPMamba beyond parity: lengths, padded batches, orders, silence, dtypes, checkpoints."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamba_zoo
from mamba_zoo.backbones import card
from mamba_zoo.backbones._stft import Spectrum


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """GPUs may choose another algorithm for another length, and not all of them round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


PUBLISHED = ["semamba", "spmamba", "spmamba_echo2mix"]
SMALL = {
    "semamba_mini": {"dim": 8, "depth": 1, "d_state": 3, "hop": 64},
    "spmamba_mini": {"dim": 4, "depth": 1, "d_state": 3, "heads": 2, "query_size": 129},
}


def small(name: str, **kwargs) -> Any:
    model: Any = mamba_zoo.create_model(name, **SMALL[name], **kwargs).eval()
    if name == "semamba_mini":  # which begins as an identity
        for layer in (model.mask_out, model.phase_real, model.phase_imag):
            nn.init.normal_(layer.weight)
    return model


def test_the_small_enhancer_begins_with_what_came_in():
    wave = torch.randn(2, 1000)
    torch.testing.assert_close(mamba_zoo.create_model("semamba_mini")(wave), wave)


@pytest.fixture(params=SMALL)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("published", PUBLISHED)
def test_has_the_published_number_of_parameters(published):
    model = mamba_zoo.create_model(published, device="meta")
    assert sum(p.numel() for p in model.parameters()) == card(published).params


def test_they_are_listed_as_audio():
    assert {*PUBLISHED, *SMALL} <= set(mamba_zoo.list_models(modality="audio"))
    assert "16 kHz" in mamba_zoo.model_card("semamba").notes


@pytest.mark.parametrize("samples", [1, 2, 100, 128, 129, 255, 256, 257, 1001])
def test_takes_any_length(name, samples):
    wave = torch.randn(2, samples)
    y = small(name)(wave)
    assert y.shape == ((2, samples) if name == "semamba_mini" else (2, 2, samples))
    assert y.isfinite().all()


@pytest.mark.parametrize("scan", ["bidirectional", "reverse(raster)", "join(raster, random(seed=1, k=1))"])
def test_a_padded_batch_gives_what_its_signals_give_alone(name, scan, device):
    model = small(name, scan=scan).to(device)
    if name == "spmamba_mini":
        nn.init.normal_(model.blocks[0].attention.query.weight)  # so that attention to padding would show
    lengths = [901, 1, 130, 1500, 256, 300]
    wave = torch.randn(len(lengths), 1500, device=device)
    with torch.no_grad():
        together = model(wave, lengths)
        for i, n in enumerate(lengths):
            alone = model(wave[i : i + 1, :n])[0]
            torch.testing.assert_close(together[i, ..., :n], alone, rtol=1e-3, atol=1e-4)
            assert together[i, ..., n:].abs().max() == 0 if n < 1500 else True


@pytest.mark.parametrize("options", [{"causal": True}, {"mirror": True}], ids=str)
def test_causal_and_mirrored_batches_are_padded_likewise(options):
    model = small("semamba_mini", **options)
    wave, lengths = torch.randn(3, 700), torch.tensor([700, 20, 333])
    with torch.no_grad():
        together = model(wave, lengths)
        for i, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(together[i, :n], model(wave[i : i + 1, :n])[0], rtol=1e-3, atol=1e-4)


def test_refuses_what_is_no_batch_of_signals(name):
    model = small(name)
    with pytest.raises(ValueError, match=r"must be \(b, n\)"):
        model(torch.randn(2, 1, 500))
    with pytest.raises(TypeError, match="floating-point"):
        model(torch.zeros(1, 500, dtype=torch.int16))
    with pytest.raises(ValueError, match="one number from 1 to 500 for each of 2"):
        model(torch.randn(2, 500), [500, 501])


@pytest.mark.parametrize(("scan", "k"), [("raster", 1), ("bidirectional", 2), ("random(k=3)", 3)])
def test_parameters_follow_the_directions(name, scan, k):
    model = small(name, scan=scan)
    stacked = {p.shape[0] for key, p in model.named_parameters() if ".ssm." in key}
    assert stacked == {k}
    model(torch.randn(1, 600)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_time_and_frequency_can_have_orders_of_their_own(name):
    model = small(name, scan="raster", freq_scan="bidirectional")
    shapes = {key: p.shape[0] for key, p in model.named_parameters() if key.endswith("A_log")}
    assert {k for key, k in shapes.items() if ".time." in key} == {1}
    assert {k for key, k in shapes.items() if ".freq." in key} == {2}
    with pytest.raises(ValueError, match="cross"):
        small(name, scan="cross")


def test_without_a_scan_the_rest_stays(name):
    model, control = small(name), small(name, scan="none")
    assert set(control.state_dict()) == {key for key in model.state_dict() if ".ssm." not in key}
    control(torch.randn(1, 500)).square().sum().backward()
    assert all(p.grad is not None for p in control.parameters())


def test_the_order_of_the_frames_matters(name):
    model, wave = small(name), torch.randn(1, 1024)
    other = small(name, scan="join(raster, random(k=1))")
    other.load_state_dict(model.state_dict())
    assert (model(wave) - other(wave)).abs().max() > 1e-5


def test_loudness_passes_through_and_silence_stays_silence(name):
    model, wave = small(name), torch.randn(1, 1000)
    with torch.no_grad():
        torch.testing.assert_close(model(wave * 0.01), model(wave) * 0.01, rtol=1e-3, atol=1e-6)
        assert model(torch.zeros(1, 1000)).abs().max() < 1e-3


def test_another_sample_rate_is_resampled_and_back(name):
    pytest.importorskip("torchaudio")
    model = small(name)
    y = model.at_rate(torch.randn(1, 2205), 22050)
    assert y.shape[-1] == 2205
    x = torch.randn(1, 800)
    assert torch.equal(model.at_rate(x, 8000), model(x))


def test_recomputing_blocks_changes_nothing(name):
    model, wave = small(name), torch.randn(1, 700)
    want = torch.autograd.grad(model(wave).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    got = torch.autograd.grad(model(wave).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, want)


def test_mixed_and_low_precision(name, device):
    model, wave = small(name).to(device), torch.randn(1, 900, device=device)
    with torch.no_grad():
        want = model(wave)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = model(wave)
        low = model.bfloat16()(wave.bfloat16())
    assert low.dtype == torch.bfloat16
    for got in (mixed, low.float()):
        assert got.isfinite().all()
        assert (got - want).norm() < 0.3 * want.norm()


def test_optimizers_find_what_not_to_decay(name):
    model = small(name)
    exempt = model.no_weight_decay()
    assert exempt <= {key for key, _ in model.named_parameters()}
    assert {
        key for key, p in model.named_parameters() if key.endswith(("A_log", ".D", "dt_bias")) or p.dim() < 2
    } <= exempt
    assert any(key.endswith("in_proj.weight") for key in set(dict(model.named_parameters())) - exempt)


@pytest.mark.parametrize("prefix", ["", "module.", "audio_model."])
def test_a_training_checkpoint_of_spmamba_loads(prefix, tmp_path):
    model = small("spmamba_mini")
    torch.save(
        {"state_dict": {prefix + key: v for key, v in model.state_dict().items()}, "epoch": 3}, tmp_path / "w.ckpt"
    )
    again = small("spmamba_mini", checkpoint_path=tmp_path / "w.ckpt")
    assert all(torch.equal(v, again.state_dict()[key]) for key, v in model.state_dict().items())


def test_a_wrong_file_is_refused(tmp_path):
    torch.save({"generator": small("semamba_mini").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        mamba_zoo.create_model("semamba", checkpoint_path=tmp_path / "w.pth")


@pytest.mark.parametrize(("n_fft", "hop"), [(400, 100), (256, 64), (256, 128), (512, 128)])
@pytest.mark.parametrize("mirror", [False, True])
def test_spectra_there_and_back(n_fft, hop, mirror):
    spectrum = Spectrum(n_fft, hop, mirror)
    wave = torch.randn(2, 1999, dtype=torch.float64)
    there = spectrum.analyse(wave)
    assert there.shape == (2, 1999 // hop + 1, n_fft // 2 + 1)
    torch.testing.assert_close(spectrum.synthesise(there, 1999), wave)
    if mirror:
        window = torch.hann_window(n_fft, dtype=torch.float64)
        want = torch.stft(wave, n_fft, hop, window=window, return_complex=True).transpose(1, 2)
        torch.testing.assert_close(there, want)


def test_spectra_of_a_padded_batch():
    spectrum, lengths = Spectrum(64, 16), [200, 97, 40]
    wave: Tensor = torch.randn(3, 200, dtype=torch.float64)
    there = spectrum.analyse(wave, lengths)
    back = spectrum.synthesise(there, 200, lengths)
    for i, n in enumerate(lengths):
        alone = spectrum.analyse(wave[i : i + 1, :n])[0]
        torch.testing.assert_close(there[i, : len(alone)], alone)
        assert there[i, len(alone) :].abs().sum() == 0
        torch.testing.assert_close(back[i, :n], wave[i, :n])
        assert back[i, n:].abs().sum() == 0
    with pytest.raises(ValueError, match="between 1 and half"):
        Spectrum(64, 40)
