"""VideoMamba beyond parity: token order, frames, position embeddings, published weights of other sizes."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import mamba_zoo
from mamba_zoo.backbones.videomamba import checkpoint_filter_fn
from mamba_zoo.scans import list_scans

VIDEO: dict[str, Any] = {"dim": 32, "depth": 2, "img_size": 32, "num_frames": 4, "num_classes": 5}
IMAGE: dict[str, Any] = {**VIDEO, "num_frames": None}


def video(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("videomamba_tiny_video", **{**VIDEO, **kwargs}).eval()


def filled(model: Any) -> Any:
    """The model with class token and embeddings that are not zero."""
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "temporal_pos_embed"):
            torch.nn.init.normal_(parameter)
    return model


def test_tokens_are_the_class_token_then_frame_after_frame():
    model = filled(video(dim=8))
    x = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        tokens, order, grid = model.embed(x)
        assert grid == (4, 2, 2)
        torch.testing.assert_close(tokens[0, 0], (model.cls_token + model.pos_embed[:, :1])[0, 0])
        for t in range(4):
            patches = model.patch_embed(x[:, :, t]).flatten(1, 2)
            want = patches + model.pos_embed[:, 1:] + model.temporal_pos_embed[:, t : t + 1]
            torch.testing.assert_close(tokens[:, 1 + 4 * t : 5 + 4 * t], want)
    assert order.tolist() == [list(range(17)), list(range(17))[::-1]]
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])


def test_a_video_of_one_frame_is_an_image():
    model = video(num_frames=1)
    state = {name: value for name, value in model.state_dict().items() if name != "temporal_pos_embed"}
    image: Any = timm.create_model("videomamba_tiny", **IMAGE).eval()
    image.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :, None]), image(x), rtol=1e-5, atol=1e-6)


def test_the_order_of_frames_matters():
    model = video()
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_any_number_of_frames_and_any_size(frames):
    model = filled(video())
    x = torch.randn(1, 3, frames, 48, 32)
    with torch.no_grad():
        assert model(x).shape == (1, 5)
        tokens, _, grid = model.embed(x)
        (last,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert grid == (frames, 3, 2)
    assert last.shape == (1, 32, frames, 3, 2)
    times = F.interpolate(model.temporal_pos_embed.transpose(1, 2), frames, mode="linear", align_corners=False)
    places = F.interpolate(
        model.pos_embed[:, 1:].view(1, 2, 2, 32).permute(0, 3, 1, 2), (3, 2), mode="bicubic", align_corners=False
    )
    corner = model.patch_embed(x[:, :, -1])[:, 2, 1] + places[:, :, 2, 1] + times[:, :, -1]
    torch.testing.assert_close(tokens[:, -1], corner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [*list_scans(modality="video"), "transpose(spatial_first)", "none"])
def test_scans_of_videos(scan):
    model = video(scan=scan)
    x = torch.randn(1, 3, 4, 32, 48)
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_a_scan_decides_what_is_near():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 32, 32)
    outputs = []
    for scan in ("spatial_first", "temporal_first"):
        model = video(scan=scan)
        with torch.no_grad():
            outputs.append(model(x))
    assert not torch.allclose(*outputs, atol=1e-6)


def test_scans_of_images_do_not_fit_videos():
    with pytest.raises(ValueError, match=r"scan 'hilbert' orders a grid of \(height, width\)"):
        video(scan="hilbert")


def test_wrong_inputs_say_what_is_expected():
    with pytest.raises(ValueError, match=r"expected videos \(b, 3, t, h, w\)"):
        video()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"expected videos \(b, 3, t, h, w\)"):
        video()(torch.randn(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="one patch needs 16 x 16 pixels"):
        video()(torch.randn(1, 3, 2, 8, 32))
    with pytest.raises(ValueError, match=r"expected images \(b, 3, h, w\)"):
        timm.create_model("videomamba_tiny", **IMAGE)(torch.randn(1, 3, 2, 32, 32))
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        video(num_frames=0)


def test_a_tag_sets_frames_size_and_classes():
    model: Any = timm.create_model("videomamba_tiny_video.ssv2_f16_288", device="meta")
    assert (model.num_frames, model.grid, model.num_classes) == (16, (18, 18), 174)
    assert model.pretrained_cfg["url"].endswith("/videomamba_t16_ssv2_f16_res224to288.pth")
    model = timm.create_model("videomamba_middle_video.k400_mask_f64", device="meta")
    assert (model.num_frames, model.grid, model.num_classes) == (64, (14, 14), 400)
    assert model.pretrained_cfg["url"].endswith("/videomamba_m16_k400_mask_ft_f64_res224.pth")
    model = timm.create_model("videomamba_small.in1k_448", device="meta")
    assert model.grid == (28, 28)
    model = timm.create_model("videomamba_tiny_video", device="meta")
    assert (model.num_frames, model.grid, model.num_classes) == (8, (14, 14), 400)


def published(model: Any) -> dict[str, torch.Tensor]:
    """Weights of a video model under the published names, as far as these tests need them."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("temporal_pos_embed", "temporal_pos_embedding").replace("blocks.", "layers.")
        state[f"norm_f.{name[5:]}" if name.startswith("norm.") else name] = value
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, None]
    return state


def test_weights_for_other_frames_and_sizes_are_resampled(tmp_path):
    small, large = filled(video()), video(num_frames=6, img_size=48)
    torch.save({"module": published(small)}, tmp_path / "w.pth")
    loaded: Any = mamba_zoo.create_model(
        "videomamba_tiny_video", checkpoint_path=tmp_path / "w.pth", **{**VIDEO, "num_frames": 6, "img_size": 48}
    )
    assert loaded.temporal_pos_embed.shape == large.temporal_pos_embed.shape
    assert loaded.pos_embed.shape == large.pos_embed.shape
    want = F.interpolate(small.temporal_pos_embed.transpose(1, 2), 6, mode="linear", align_corners=False)
    torch.testing.assert_close(loaded.temporal_pos_embed, want.transpose(1, 2))
    assert torch.equal(loaded.pos_embed[:, 0], small.pos_embed[:, 0])


def test_heads_of_training_are_left_out():
    model = video()
    extra = {"distill_head.0.weight": torch.ones(32), "distill_head.1.bias": torch.ones(5)}
    extra |= {"clip_decoder.0.head.weight": torch.ones(3, 32)}
    state = checkpoint_filter_fn({f"backbone.{k}": v for k, v in {**published(model), **extra}.items()}, model)
    assert set(state) == set(model.state_dict())
    pretrained = {k.replace("norm_f.", "norm."): v for k, v in published(model).items() if not k.startswith("head.")}
    bare = video(num_classes=0)
    assert set(checkpoint_filter_fn({**pretrained, **extra}, bare)) == set(bare.state_dict())


def test_the_first_400_of_710_classes_are_those_of_kinetics_400():
    model = video(num_classes=400)
    wide = {"head.weight": torch.randn(710, 32), "head.bias": torch.randn(710)}
    state = checkpoint_filter_fn({**wide}, model)
    assert torch.equal(state["head.weight"], wide["head.weight"][:400])
    assert torch.equal(state["head.bias"], wide["head.bias"][:400])
    assert len(checkpoint_filter_fn({**wide}, video(num_classes=710))["head.bias"]) == 710


def test_decay_spares_the_temporal_embedding_which_belongs_to_the_stem():
    model = video()
    assert "temporal_pos_embed" in model.no_weight_decay()
    groups: Any = timm.models.group_parameters(model, model.group_matcher())
    assert "temporal_pos_embed" in groups[min(groups)]


def test_starts_as_published():
    model = video(dim=192)
    assert not model.cls_token.any()
    assert not model.temporal_pos_embed.any()
    ssm = model.blocks[0].mixer.ssm
    assert not ssm.dt_bias.any()
    assert ssm.x_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_videos_have_cards():
    assert mamba_zoo.list_models(modality="video") == [
        f"videomamba_{size}_video" for size in ("middle", "mini", "small", "tiny")
    ]
    card = mamba_zoo.model_card("videomamba_tiny_video", count=True)
    assert card.counted_params == card.params == 7_033_744
    assert card.input_size == (3, 8, 224, 224)
    assert card.commercial


def test_compiles_exports_and_traces():
    model = video(depth=1, scan="hilbert_video")
    x = torch.randn(2, 3, 3, 32, 32)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    features: Any = timm.create_model(
        "videomamba_tiny_video", features_only=True, feature_cls="fx", out_indices=(0, 1), **VIDEO
    )
    assert [m.shape[0] for m in features(x)] == [2, 2]
