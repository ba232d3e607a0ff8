"""AuM and SSAMBA beyond parity: what timm may expect of them, unequal lengths, scans, waveforms, other files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import group_parameters

import mamba_zoo
from mamba_zoo.backbones._fbank import FRONT_ENDS, FilterBank
from mamba_zoo.scans import list_scans

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("aum_tiny", {"dim": 24}),
    "separate": ("aum_small", {"dim": 24, "global_pool": "avg"}),
    "forward": ("aum_small", {"dim": 24, "scan": "raster"}),
    "stem": ("aum_mini", {"mel_bins": 32, "patch_size": (16, 8), "stem": 8, "dim": 24, "depth": 2}),
    "ssamba": ("ssamba_tiny", {"dim": 24, "patch_size": 8, "stride": (6, 4)}),
    "ssamba token": ("ssamba_tiny_pretrain", {"dim": 24, "patch_size": 8, "global_pool": "token", "num_classes": 5}),
}
NAMES = mamba_zoo.list_models("aum*") + mamba_zoo.list_models("ssamba*")
STATE_SPACE = ("A_log", "D", "dt_bias")


def build(name: str, **kwargs: Any) -> Any:
    architecture, options = SMALL[name]
    defaults = {"mel_bins": 32, "frames": 48, "depth": 4, "num_classes": 5, "d_state": 4}
    defaults |= {"patch_size": 8} if architecture.startswith("aum") else {}
    torch.manual_seed(0)
    return mamba_zoo.create_model(architecture, **{**defaults, **options, **kwargs}).eval()


@pytest.fixture(params=SMALL)
def small(request) -> Any:
    return build(request.param)


def sounds(*frames: int, bands: int = 32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(t, bands) for t in frames]


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_model(name):
    model: Any = mamba_zoo.create_model(name, device="meta", dtype=torch.bfloat16)
    card = mamba_zoo.model_card(name)
    parameters = dict(model.named_parameters())
    assert card.modality == "audio"
    assert sum(p.numel() for p in parameters.values()) == card.params
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters.values())
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (model.in_chans, model.mel_bins, model.frames)
    assert cfg["num_classes"] == model.num_classes
    assert f"{cfg['first_conv']}.weight" in parameters
    assert model.no_weight_decay() >= {key for key in parameters if key.rsplit(".", 1)[-1] in STATE_SPACE}
    groups: Any = group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(parameters)
    x = torch.empty(2, *model.input_shape(model.mel_bins, model.frames), device="meta", dtype=torch.bfloat16)
    features, maps = model.forward_intermediates(x)
    assert model.forward_head(features).shape == (2, model.num_classes or model.num_features)
    assert len(maps) == len(model.feature_info)
    assert all(m.shape == (2, model.num_features, *model.grid) for m in maps)
    with pytest.raises(TypeError, match=f"{name} takes no argument 'mel_bin' \\(did you mean mel_bins"):
        mamba_zoo.create_model(name, mel_bin=64)


def test_every_published_variant_has_its_number_of_parameters():
    """Those of AuM for each data set it was published for, of SSAMBA before and after, and of the models of speech."""
    counts = json.loads((Path(__file__).parent / "published" / "audio.json").read_text())
    found = {}
    for name in counts:
        model: Any = mamba_zoo.create_model(name, device="meta")
        # SSAMBA's files hold a classifier of 1000 classes, which nothing uses.
        dead = 1000 * (model.num_features + 1) if name.startswith("ssamba") else 0
        found[name] = sum(p.numel() for p in model.parameters()) + dead
    assert found == counts


@pytest.mark.parametrize(
    ("name", "classes", "frames"),
    [("aum_base.vggsound", 309, 1024), ("aum_small.speechcommands", 35, 128), ("ssamba_tiny.esc50", 50, 512)],
)
def test_tags_set_classes_and_frames(name, classes, frames):
    model: Any = mamba_zoo.create_model(name, device="meta")
    assert (model.num_classes, model.frames) == (classes, frames)
    data = FRONT_ENDS[name.partition(".")[2]]
    assert model.pretrained_cfg["mean"] == (data["mean"],)
    assert model.pretrained_cfg["std"] == (2 * data["std"],)


def test_classifiers_are_made_anew(small):
    x = torch.stack(sounds(48, 48))
    features = small.forward_features(x)
    torch.testing.assert_close(small.forward_head(features), small(x))
    for classes in (9, 0, 3):
        small.reset_classifier(classes)
        assert small(x).shape == (2, classes or 24)
    small.reset_classifier(0, "")
    assert small(x).shape == features.shape


def test_every_parameter_learns_and_recomputation_changes_nothing(small):
    x, gradients = torch.stack(sounds(48, 48)), []
    for recompute in (False, True):
        small.zero_grad()
        small.set_grad_checkpointing(recompute)
        small(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in small.named_parameters() if p.grad is not None})
    # The mask, and what patches are predicted by, only serve pretraining.
    unused = {name for name, _ in small.named_parameters() if name.startswith(("mask_token", "match", "restore"))}
    assert set(gradients[0]) == {name for name, _ in small.named_parameters()} - unused
    torch.testing.assert_close(gradients[1], gradients[0])


def test_bfloat16_stays_close(small, device):
    x = torch.stack(sounds(48, 48)).to(device)
    with torch.no_grad():
        want = small.to(device)(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = small(x)
        half = small.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (mixed.float() - want).norm() < 0.05 * want.norm()
    assert (half.float() - want).norm() < 0.05 * want.norm()


def test_padded_and_packed_recordings_are_what_each_is_alone(small, device):
    # At 8 x 8 patches: as many frames as the positions are made for, fewer, more, and one patch; none fills its last.
    recordings = [x.to(device) for x in sounds(48, 21, 67, 8)]
    small = small.to(device)
    alone = torch.cat([small(x[None]) for x in recordings])
    lengths = torch.tensor([len(x) for x in recordings], device=device)
    padded = torch.full((4, 80, 32), 7.0, device=device)
    for row, x in zip(padded, recordings, strict=True):
        row[: len(x)] = x
    bounds = torch.tensor([0, *lengths.cumsum(0).tolist()], device=device)
    packed = torch.cat(recordings)[None]
    torch.testing.assert_close(small(padded, lengths=lengths), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(packed, cu_seqlens=bounds), alone, rtol=1e-4, atol=1e-5)
    # Both directions see all of their own recording and nothing of the others.
    packed[0, 50:60] += 1.0
    changed = small(packed, cu_seqlens=bounds)
    torch.testing.assert_close(changed[[0, 2, 3]], alone[[0, 2, 3]], rtol=1e-4, atol=1e-5)
    assert (changed[1] - alone[1]).abs().max() > 1e-3


def test_gradients_of_padded_and_packed_recordings_agree(small):
    recordings = sounds(48, 21, 30)
    lengths = torch.tensor([48, 21, 30])
    found = []
    for call in (
        lambda: small(torch.nn.utils.rnn.pad_sequence(recordings, batch_first=True), lengths=lengths),
        lambda: small(torch.cat(recordings)[None], cu_seqlens=torch.tensor([0, 48, 69, 99])),
        lambda: torch.cat([small(x[None]) for x in recordings]),
    ):
        small.zero_grad()
        call().square().sum().backward()
        found.append({name: p.grad for name, p in small.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["shared", "separate", "ssamba"])
@pytest.mark.parametrize("scan", list_scans(modality="audio"))
def test_every_scan_of_spectrograms(name, scan):
    model, recordings = build(name, scan=scan, depth=2), sounds(48, 24)
    alone = torch.cat([model(x[None]) for x in recordings])
    padded = torch.nn.utils.rnn.pad_sequence(recordings, batch_first=True)
    together = model(padded, lengths=torch.tensor([48, 24]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    together.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_scans_with_empty_steps_cannot_be_packed():
    model = build("separate", scan="window(3)")
    with pytest.raises(ValueError, match="empty steps"):
        model(torch.cat(sounds(48, 24))[None], cu_seqlens=torch.tensor([0, 48, 72]))


@pytest.mark.parametrize("name", ["shared", "separate", "ssamba"])
def test_without_a_scan_the_rest_stays(name):
    model, control = build(name), build(name, scan="none")
    assert set(control.state_dict()) == {key for key in model.state_dict() if ".ssm." not in key}
    assert control(sounds(48)[0][None]).isfinite().all()


def test_directions_share_all_but_their_decay():
    model = build("shared")
    mixer = model.blocks[0].mixer
    assert mixer.ssm.A_log.shape[0] == 2
    assert len(mixer.conv.weight) == len(mixer.ssm.D) == len(mixer.ssm.dt_bias) == len(mixer.ssm.x_proj.weight) == 1


@pytest.mark.parametrize("name", ["aum_mini", "ssamba_tiny"])
def test_waveforms_go_through_the_front_end(name):
    front = {"sample_rate": 8000, "mel_bins": 32, "frames": 48, "mean": -6.0, "std": 3.0}
    options: dict[str, Any] = {"mel_bins": 32, "frames": 48, "num_classes": 5, "dim": 24, "depth": 2}
    options |= {"patch_size": (16, 8)} if name == "aum_mini" else {"patch_size": 8, "stride": 6}
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model(name, front_end=front, **options).eval()
    wave = 0.1 * torch.randn(2, 4000)
    lengths = torch.tensor([4000, 2500])
    spectrogram, _ = FilterBank(**front)(wave, lengths=lengths)
    want = model.forward_head(model.forward_features(spectrogram))
    torch.testing.assert_close(model(wave, lengths=lengths), want)
    # A slow tone at twice the rate sounds the same.
    time = torch.arange(4000) / 8000
    tone = 0.1 * torch.sin(2 * torch.pi * 440 * time)[None]
    want, model.sample_rate = model(tone), 16000
    tone = 0.1 * torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 16000)[None]
    torch.testing.assert_close(model(tone), want, rtol=0.1, atol=0.1)
    assert not [key for key in model.state_dict() if "front_end" in key]


def test_waveforms_of_any_length_without_a_fixed_number_of_frames():
    front = {"sample_rate": 8000, "mel_bins": 32}
    model = build("separate", front_end=front)
    waves = 0.1 * torch.randn(2, 6000)
    lengths = torch.tensor([6000, 3000])
    together = model(waves, lengths=lengths)
    alone = torch.cat([model(waves[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_inputs_that_cannot_work():
    model = build("separate")
    with pytest.raises(ValueError, match=r"expected spectrograms \(b, frames, 32\).*front_end="):
        model(torch.randn(2, 32, 48))
    with pytest.raises(ValueError, match="one patch needs 8"):
        model(torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match="lengths run from 3 to 48 frames, but must lie between 8 and the 48"):
        model(torch.randn(2, 48, 32), lengths=torch.tensor([48, 3]))
    with pytest.raises(ValueError, match="not both"):
        model(torch.randn(1, 48, 32), lengths=torch.tensor([48]), cu_seqlens=torch.tensor([0, 48]))
    with pytest.raises(ValueError, match="must rise from 0 to the 48 frames"):
        model(torch.randn(1, 48, 32), cu_seqlens=torch.tensor([0, 24]))
    with pytest.raises(ValueError, match="smaller than a patch"):
        build("separate", frames=4)
    with pytest.raises(ValueError, match="front_end gives 128 bands"):
        build("separate", front_end="audioset")
    with pytest.raises(ValueError, match="depth=3 must be even"):
        build("ssamba", depth=3)
    with pytest.raises(ValueError, match="multiples of 4 after a stem"):
        build("stem", patch_size=6)


def test_imagenet_weights_of_vim_are_converted(tmp_path):
    options: dict[str, Any] = {"dim": 24, "depth": 2, "d_state": 4}
    vim: Any = mamba_zoo.create_model("vim_tiny", **options)
    path = tmp_path / "vim.pth"
    torch.save({"model": vim.state_dict()}, path)
    model: Any = mamba_zoo.create_model("aum_small", checkpoint_path=path, num_classes=7, frames=224, **options)
    torch.testing.assert_close(model.patch_embed.proj.weight[:, 0], vim.patch_embed.proj.weight.mean(1))
    torch.testing.assert_close(model.pos_embed[:, 0], vim.pos_embed[:, 98])
    torch.testing.assert_close(model.blocks[1].mixer.ssm.A_log, vim.blocks[1].mixer.ssm.A_log)
    assert model.pos_embed.shape == (1, 8 * 14 + 1, 24)


def test_a_pretrained_file_becomes_a_classifier(tmp_path):
    options: dict[str, Any] = {"dim": 24, "depth": 4, "d_state": 4}
    masked: Any = mamba_zoo.create_model("ssamba_tiny_pretrain", **options)
    path = tmp_path / "ssamba.pth"
    torch.save(masked.state_dict(), path)
    model: Any = mamba_zoo.create_model("ssamba_tiny", checkpoint_path=path, num_classes=35, frames=128, **options)
    assert model.grid == (12, 12)
    torch.testing.assert_close(model.pos_embed[:, 0], masked.pos_embed[:, 0])
    torch.testing.assert_close(model.blocks[1].back.mixer.in_proj.weight, masked.blocks[1].back.mixer.in_proj.weight)


def test_weights_for_other_lengths_and_patches_are_resized(tmp_path):
    model, path = build("separate"), tmp_path / "aum.pth"
    torch.save(model.state_dict(), path)
    longer = build("separate", frames=80, checkpoint_path=path)
    x = torch.randn(1, 80, 32)
    torch.testing.assert_close(longer(x), model(x))
    larger = build("separate", patch_size=16, checkpoint_path=path)
    assert larger.patch_embed.proj.weight.shape == (24, 1, 16, 16)
    assert larger.pos_embed.shape == (1, 2 * 3 + 1, 24)


def test_masked_patches_are_learnt():
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim": 24, "depth": 2, "mel_bins": 32, "frames": 64, "patch_size": 8, "d_state": 4}
    model: Any = mamba_zoo.create_model("ssamba_tiny_pretrain", **options)
    x = torch.randn(4, 1, 32) + torch.sin(torch.arange(64.0) / 3)[None, :, None]
    masked = model.random_masks(4, 12, torch.Generator().manual_seed(0))
    assert masked.shape == (4, 12)
    assert all(len(row.unique()) == 12 for row in masked)
    assert int(masked.max()) < 32
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.pretrain(x, masked)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    with pytest.raises(ValueError, match="count=33 must lie between 1 and the 32 patches"):
        model.random_masks(1, 33)


def test_masked_patches_are_hidden():
    options: dict[str, Any] = {"dim": 24, "depth": 2, "mel_bins": 32, "frames": 64, "patch_size": 8, "d_state": 4}
    model: Any = mamba_zoo.create_model("ssamba_tiny_pretrain", **options).eval()
    x, masked = torch.randn(1, 64, 32), torch.tensor([[9]])  # band 1, frames 8 to 15
    seen = []
    hook = model.restore.register_forward_hook(lambda _, __, output: seen.append(output))
    for change in (0.0, 5.0):
        y = copy.deepcopy(x)
        y[:, 8:16, 8:16] += change
        model.pretrain(y, masked)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1])
