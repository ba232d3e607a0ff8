"""Streams: in chunks of any size, or one token after another, a causal model gives what it makes of the whole input."""

from typing import Any

import pytest
import torch

import mamba_zoo
from mamba_zoo.backbones import stream
from mamba_zoo.backbones._mixer import Mamba


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """GPUs may choose another algorithm for another length, and not all of them round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


CUTS = [[1], [7], [100], [64, 1, 300]]


def chunks(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    found, start, i = [], 0, 0
    while start < x.shape[1]:
        found.append(x[:, start : start + sizes[i % len(sizes)]])
        start, i = start + sizes[i % len(sizes)], i + 1
    return found


def causal(**kwargs) -> Any:
    model: Any = mamba_zoo.create_model("semamba_mini", causal=True, dim=8, depth=1, hop=64, **kwargs).eval()
    for layer in (model.mask_out, model.phase_real, model.phase_imag):  # it begins as an identity
        torch.nn.init.normal_(layer.weight)
    return model


@pytest.mark.parametrize("options", [{}, {"k": 2, "reduce": "mean"}, {"ssm": False, "d_conv": 1}], ids=str)
def test_mixer_by_token_and_by_chunk(options, device):
    layer = Mamba(6, d_state=3, **options).to(device).eval()
    x = torch.randn(2, 23, 6, device=device)
    want = layer(x)
    state, tokens = layer.init_state(2), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        tokens.append(y)
    torch.testing.assert_close(torch.stack(tokens, 1), want, rtol=1e-4, atol=1e-5)
    whole = torch.cat(list(stream(layer, x.split(5, dim=1))), dim=1)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)


def test_the_memory_of_a_mixer_differentiates():
    layer = Mamba(4, d_state=2).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), x)[0]
    first, state = layer.extend(x[:, :4], layer.init_state(1))
    second, _ = layer.extend(x[:, 4:], state)
    got = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), x)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [[1], [50], [3, 17]], ids=str)
def test_sequence_model(sizes, device):
    model: Any = mamba_zoo.create_model("mamba_sequence", in_chans=2, out_chans=3, dim=16, depth=2).to(device)
    x = torch.randn(2, 60, 2, device=device)
    whole = torch.cat(list(stream(model, chunks(x, sizes))), dim=1)
    torch.testing.assert_close(whole, model(x), rtol=1e-4, atol=1e-5)
    y, _ = model.step(x[:, 0], model.init_state(2))
    torch.testing.assert_close(y, model(x)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1], [50], [3, 17]], ids=str)
def test_causal_model_of_series(sizes, device):
    model: Any = mamba_zoo.create_model("series_mamba", in_chans=2, dim=16, depth=2, scan="forward").to(device).eval()
    x = torch.randn(3, 60, 2, device=device)
    whole = torch.cat(list(stream(model, chunks(x, sizes))), dim=1)
    torch.testing.assert_close(whole, model(x), rtol=1e-4, atol=1e-5)
    y, _ = model.step(x[:, 0], model.init_state(3))
    torch.testing.assert_close(y, model(x)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"scan": "bidirectional"}, {"pred_len": 3}, {"num_classes": 2}, {"use_norm": True}]
)
def test_models_of_series_that_need_all_steps_refuse(options):
    model: Any = mamba_zoo.create_model("series_mamba", dim=8, depth=1, **{"scan": "forward", **options})
    with pytest.raises(ValueError, match="a stream needs scan='forward', pred_len=0"):
        model.init_state(1)


def test_sequence_model_contract():
    model: Any = mamba_zoo.create_model("mamba_sequence", dim=16, depth=2)
    x = torch.randn(1, 12, 1)
    want = model(x)
    model.set_grad_checkpointing()
    model(x).sum().backward()
    torch.testing.assert_close(model(x), want)
    assert all(p.grad is not None for p in model.parameters())
    assert "blocks.0.mixer.ssm.A_log" in model.no_weight_decay()
    x[:, 6] += 1
    torch.testing.assert_close(model(x)[:, :6], want[:, :6])
    with pytest.raises(ValueError, match="expected \\(b, l, c\\) with c = 1"):
        model(torch.randn(1, 12, 2))


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("samples", [1, 63, 640, 1001])
def test_enhancer(sizes, samples, device):
    if sizes == [1] and samples > 640:
        sizes = [2]
    model = causal().to(device)
    wave = torch.randn(2, samples, device=device)
    with torch.no_grad():
        want = model(wave)
    got = torch.cat(list(stream(model, chunks(wave, sizes))), dim=1)
    assert got.shape == wave.shape
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
def test_enhancer_with_another_mixer(mixer, device):
    model = causal(mixer=mixer).to(device)
    wave = torch.randn(2, 640, device=device)
    with torch.no_grad():
        want = model(wave)
    got = torch.cat(list(stream(model, chunks(wave, [64, 1, 300]))), dim=1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_an_enhancers_memory_does_not_grow_and_its_states_are_values():
    model = causal()
    state, sizes = model.init_state(1), []
    for _ in range(6):
        before = {name: value.clone() for name, value in state.items()}
        _, new = model.step(torch.randn(1, 512), state)
        assert all(torch.equal(state[name], value) for name, value in before.items()), "a step changed its input"
        state = new
        sizes.append(sum(value.numel() for value in state.values()))
    assert len(set(sizes[2:])) == 1


def test_delay_is_less_than_a_frame():
    model = causal()
    state, out = model.init_state(1), 0
    for i in range(1, 1200):
        y, state = model.step(torch.randn(1, 1), state)
        out += y.shape[1]
        assert i - out < model.spectrum.n_fft


def test_causal_enhancers_look_at_the_past_alone():
    model, wave = causal(), torch.randn(1, 2000)
    with torch.no_grad():
        before = model(wave)
        wave[:, 1200:] += 1
        after = model(wave)
    reach = 1200 - model.spectrum.n_fft
    torch.testing.assert_close(after[:, :reach], before[:, :reach])
    assert (after[:, 1200:] - before[:, 1200:]).abs().max() > 1e-4


def test_models_that_look_ahead_refuse():
    model: Any = mamba_zoo.create_model("semamba_mini", dim=8, depth=1)
    with pytest.raises(ValueError, match="built with causal=True"):
        model.init_state(1)
    with pytest.raises(ValueError, match="looks ahead"):
        causal(scan="bidirectional")
    with pytest.raises(ValueError, match="2 signals, but the state is of 1"):
        causal().step(torch.zeros(2, 4), causal().init_state(1))


@pytest.mark.parametrize("name", ["vim_mini", "spmamba_mini", "s_mamba"])
def test_models_without_a_memory_are_refused_before_the_first_chunk(name):
    model: Any = mamba_zoo.create_model(name, device="meta")
    with pytest.raises(TypeError, match=f"{type(model).__name__} cannot be streamed: it has no .*init_state"):
        stream(model, [])


def test_models_whose_settings_look_ahead_are_refused_before_the_first_chunk():
    with pytest.raises(ValueError, match="built with causal=True"):
        stream(mamba_zoo.create_model("semamba_mini", dim=8, depth=1), [])
    with pytest.raises(ValueError, match="a stream needs scan='forward'"):
        stream(mamba_zoo.create_model("series_mamba", dim=8, depth=1), [])


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3", "mamba3_mimo"])
def test_empty_chunks_are_passed_over(mixer):
    model: Any = mamba_zoo.create_model("mamba_sequence", dim=16, depth=1, mixer=mixer).eval()
    x = torch.randn(2, 9, 1)
    found = list(stream(model, [x[:, :0], x[:, :4], x[:, :0], x[:, 4:], x[:, :0]]))
    assert [y.shape[1] for y in found] == [4, 5]
    torch.testing.assert_close(torch.cat(found, 1), model(x), rtol=1e-4, atol=1e-5)
    assert list(stream(model, [x[:, :0]])) == []
    with pytest.raises(ValueError, match=r"\(2, 0, 1\), expected \(b, l, c\) with c = 1 values and l >= 1"):
        model.extend(x[:, :0], model.init_state(2))
    layer: Any = model.blocks[0].mixer
    with pytest.raises(ValueError, match=r"l >= 1"):
        layer.extend(torch.zeros(2, 0, 16), layer.init_state(2))


def test_a_layer_of_mamba3_takes_no_empty_chunk():
    layer: Any = mamba_zoo.create_model("mamba3", dim=16, head_dim=8)
    with pytest.raises(ValueError, match="l >= 1"):
        layer.extend(torch.zeros(2, 0, 16), layer.init_state(2))
    assert list(stream(layer, [torch.zeros(2, 0, 16)])) == []


def test_an_enhancer_passes_over_empty_chunks():
    model, wave = causal(), torch.randn(1, 900)
    found = list(stream(model, [wave[:, :0], wave[:, :500], wave[:, :0], wave[:, 500:]]))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found, 1), model(wave), rtol=1e-3, atol=1e-4)
    assert list(stream(model, [wave[:, :0]])) == []


def test_a_state_holds_no_more_than_it_shows():
    model = causal()
    _, state = model.step(torch.randn(1, 4096), model.init_state(1))
    kept = sum(value.untyped_storage().nbytes() for value in state.values())
    assert kept == sum(value.nbytes for value in state.values())
