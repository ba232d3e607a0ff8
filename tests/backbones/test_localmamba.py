"""LocalVim and LocalVMamba: the mixer against its definition, directions by name, and what published columns mean."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_zoo.backbones._local import DirectionMerge, LocalVimMixer, block_scans
from mamba_zoo.backbones.localvim import LocalVim, checkpoint_filter_fn, rotation

DIRECTIONS = ("h", "v_flip", "w3", "w3_flip")
VIM: dict[str, Any] = {"dim": 24, "depth": 2, "img_size": 64, "d_state": 3, "num_classes": 7, "directions": DIRECTIONS}
VMAMBA: dict[str, Any] = {"dims": 16, "depths": (1, 1), "d_state": 3, "num_classes": 7, "directions": DIRECTIONS}


def walk(name: str, height: int, width: int) -> list[tuple[int, int]]:
    """Places in the order of a direction, those of the padding among them."""
    kind, _, flip = name.partition("_")
    if kind == "h":
        places = [(h, w) for h in range(height) for w in range(width)]
    elif kind == "v":
        places = [(h, w) for w in range(width) for h in range(height)]
    else:
        side = int(kind[1:])
        places = [
            (top + h, left + w)
            for top in range(0, height, side)
            for left in range(0, width, side)
            for h in range(side)
            for w in range(side)
        ]
    return places[::-1] if flip else places


def by_definition(mixer: LocalVimMixer, x: Tensor, grid: tuple[int, int], names: tuple[str, ...]) -> Tensor:
    """LocalVim's mixer, one direction and one step after another; the class token, if any, comes halfway."""
    height, width = grid
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    ssm, total = mixer.ssm, torch.zeros_like(x)
    assert ssm is not None
    assert mixer.conv.bias is not None
    middle = height * width // 2
    for i, name in enumerate(names):
        tokens: list[int | None] = [
            h * width + w if h < height and w < width else None for h, w in walk(name, height, width)
        ]
        if mixer.class_token:
            tokens = [t if t is None or t < middle else t + 1 for t in tokens]
            tokens.insert(middle, middle)
        blank = torch.zeros_like(x[:, 0])
        path = torch.stack([blank if t is None else x[:, t] for t in tokens], dim=-1)
        taps = mixer.conv.weight.shape[-1]
        u = F.conv1d(F.pad(path, (taps - 1, 0)), mixer.conv.weight[i][:, None], groups=x.shape[-1])
        u = F.silu(u + mixer.conv.bias[i][:, None]).transpose(1, 2)
        low, B, C = (u @ ssm.x_proj.weight[i].T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        dt = F.softplus(low @ ssm.dt_proj.weight[i].T + ssm.dt_bias[i])
        A, y = -ssm.A_log[i].exp(), torch.zeros_like(x)
        state = x.new_zeros(len(x), *A.shape)
        for step, token in enumerate(tokens):
            state = torch.exp(dt[:, step, :, None] * A) * state + (dt * u)[:, step, :, None] * B[:, step, None]
            if token is not None:
                out = (state * C[:, step, None]).sum(-1) + ssm.D[i] * u[:, step]
                y[:, token] = out * F.silu(z[:, token])
        gate = mixer.merge.gate
        hidden = F.gelu(gate.reduce(gate.norm(y).mean(1)))
        total = total + y * torch.sigmoid(gate.select(hidden))[:, None]
    return mixer.out_proj(total)


@pytest.mark.parametrize("token", [False, True])
def test_mixer_is_its_definition_with_padding_that_takes_part(token, device):
    # With a token, windows that fill the grid: where they do not, a reversed direction visits it as late as the
    # direction that it reverses visits it early.
    grid, names = ((2, 4), ("h", "v_flip", "w2", "w2_flip")) if token else ((4, 5), DIRECTIONS)
    torch.manual_seed(0)
    scan = block_scans(1, names, None, False)[0]
    mixer = LocalVimMixer(6, scan, d_state=3, class_token=token, device=device, dtype=torch.float64)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, math.prod(grid) + token, 6, dtype=torch.float64, device=device)
    torch.testing.assert_close(mixer(x, grid), by_definition(mixer, x, grid, names), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("token", [None, 6])
def test_published_columns_go_back_by_going_forth(token):
    height, width = 3, 4
    torch.manual_seed(0)
    y = torch.randn(1, height * width + (token is not None), 3, 8)
    misplaced = y.clone()
    places = [t for t in range(y.shape[1]) if t != token]
    for i in (0, 2):
        steps = [y[0, places[h * width + w], i] for h, w in walk("v", height, width)]
        again = [steps[h * width + w] for h, w in walk("v", height, width)]
        misplaced[0, places, i] = torch.stack(again)
    published, right = DirectionMerge(8, columns=(0, 2)), DirectionMerge(8)
    right.load_state_dict(published.state_dict())
    torch.testing.assert_close(published(y, (height, width), token), right(misplaced, (height, width)))
    assert not torch.allclose(published(y, (height, width), token), right(y, (height, width)))


@pytest.mark.parametrize(("name", "settings"), [("local_vim_tiny", VIM), ("local_vmamba_tiny", VMAMBA)])
def test_published_columns_matter_on_oblong_images_only(name, settings):
    torch.manual_seed(0)
    right: Any = timm.create_model(name, **settings).eval()
    published: Any = timm.create_model(name, **settings, published_columns=True).eval()
    published.load_state_dict(right.state_dict())
    with torch.inference_mode():
        for size, same in (((64, 64), True), ((64, 96), False)):
            x = torch.randn(1, 3, *size)
            assert torch.equal(right(x), published(x)) is same


@pytest.mark.parametrize(("name", "settings"), [("local_vim_tiny", VIM), ("local_vmamba_tiny", VMAMBA)])
def test_other_scans_take_the_place_of_the_directions(name, settings):
    def count(**changes: Any) -> int:
        model: Any = timm.create_model(name, **settings, **changes, device="meta")
        return sum(p.numel() for p in model.parameters())

    assert count() == count(scan="hilbert") == count(scan="local(['v', 'v', 'w2', 'w2'])")
    assert count(scan="none") < count()
    assert count(scan="raster") < count(scan="bidirectional") < count()
    torch.manual_seed(0)
    named: Any = timm.create_model(name, **settings).eval()
    other: Any = timm.create_model(name, **settings, scan=f"local({DIRECTIONS})").eval()
    other.load_state_dict(named.state_dict())
    x = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        assert torch.equal(named(x), other(x))


def test_every_block_may_have_its_own_directions():
    lists = [("h",), ("w2", "w2_flip", "v")]
    model: Any = timm.create_model("local_vim_tiny", **{**VIM, "directions": lists}, device="meta")
    assert [block.mixer.conv.weight.shape[0] for block in model.blocks] == [1, 3]
    scans = block_scans(2, lists, None, published_columns=True)
    assert [(scan.k, scan.columns) for scan in scans] == [(1, ()), (3, (2,))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": [("h",)] * 3}, "directions has 3 lists for 2 blocks"),
        ({"directions": ("h", "x")}, "direction 'x' is unknown"),
        ({"published_columns": True, "scan": "hilbert"}, "published_columns is about directions by name"),
        ({"global_pool": "token"}, "global_pool='token' needs class_token=True"),
        ({"class_token": True}, "rope=True goes with neither class_token"),
        ({"dim": 30}, "a dim=30 that 4 does not divide"),
        ({"img_size": 8}, "img_size=8 is smaller than a patch"),
    ],
)
def test_arguments_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("local_vim_tiny", **{**VIM, **changes})


def test_reset_classifier_refuses_a_token_that_is_not_there():
    model: Any = timm.create_model("local_vim_tiny", **VIM, device="meta")
    with pytest.raises(ValueError, match="needs class_token=True"):
        model.reset_classifier(5, "token")
    assert model.global_pool == "avg"
    assert model.num_classes == 7


def test_rotation_keeps_lengths_and_turns_with_the_place():
    x = torch.zeros(1, 1, 24)
    sine, cosine = rotation(x, (4, 6), (4, 6)).chunk(2, dim=-1)
    torch.testing.assert_close(sine.square() + cosine.square(), torch.ones(24, 24))
    rows = torch.arange(4).repeat_interleave(6) * 14 / 4
    columns = torch.arange(6).repeat(4) * 14 / 6
    torch.testing.assert_close(sine[:, 0], rows.sin())
    torch.testing.assert_close(sine[:, 12], columns.sin())
    torch.testing.assert_close(sine[:, 2], (rows / 10000 ** (1 / 6)).sin())


@pytest.mark.parametrize("token", [False, True])
def test_published_positions_are_resampled_to_the_grid_of_the_model(token):
    settings: dict[str, Any] = {**VIM, "class_token": token, "rope": not token}
    state = LocalVim(**settings).state_dict()
    larger = LocalVim(**{**settings, "img_size": (96, 80)})
    found = checkpoint_filter_fn({**state, "rope.freqs_cos": torch.zeros(16, 24)}, larger)
    assert found.keys() == state.keys()
    assert found["pos_embed"].shape == (1, 6 * 5 + token, 24)
    larger.load_state_dict(found)
    if token:
        assert torch.equal(found["pos_embed"][:, 15], state["pos_embed"][:, 8])


def test_out_norms_belong_to_evenly_spaced_blocks_and_norm_what_the_mixer_put_out():
    torch.manual_seed(0)
    model: Any = timm.create_model("local_vim_tiny", **{**VIM, "depth": 5}, out_norm=True).eval()
    assert list(model.out_norms) == ["0", "1", "2", "4"]
    x, outputs = torch.randn(1, 3, 32, 48), []
    hook = model.blocks[2].mixer.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.inference_mode():
        normed, summed = model.forward_intermediates(x, indices=[2, 3], intermediates_only=True, output_fmt="NLC")
        hook.remove()
        torch.testing.assert_close(normed, F.layer_norm(outputs[0], (24,)))
        plain = copy.deepcopy(model)
        plain.out_norms = None
        assert torch.equal(summed, plain.forward_intermediates(x, [3], intermediates_only=True, output_fmt="NLC")[0])
