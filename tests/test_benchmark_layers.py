"""What `benchmarks.layers` counts, checks and writes; its times need a GPU."""

import csv

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import layers
from benchmarks.kernels import write_csv
from benchmarks.layers import Case, chosen, floor_bytes, main, measure

SMALL = [
    Case("add_norm", "plain", (17, 3, 5, 24)),
    Case("add_norm", "branch", (17, 3, 5, 24), True),
    Case("add_norm", "vim", (2, 37, 16), True, torch.float32, "rms"),
    Case("mlp", "map", (2, 9, 8, 16)),
    Case("depthwise_conv2d", "map", (2, 7, 9, 16)),
]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        # Bytes a number of the tokens: read and written. Those of weights follow.
        ("add_norm/vmamba_t1", (2 + 2, 2 * 4), (2 + 2 + 2, 2 * 4)),
        ("add_norm/vmamba_t1_branch", (2 + 2 + 2 + 2, 2 * 4), (2 + 2 + 2 + 2, 2 * 4)),
        ("add_norm/vim_s_branch", (4 + 2 + 4 + 2, 4), (4 + 2 + 4 + 4 + 2, 4)),
        ("depthwise_conv2d/vmamba_b1", (2 + 2, 9 * 4), (2 + 2 + 2, 9 * 4)),
    ],
)
def test_floor(name, forward, backward):
    [case] = chosen([name])
    d = case.tokens[-1]
    n = torch.empty(case.tokens, device="meta").numel()
    passes = [n * tokens + d * weights for tokens, weights in (forward, backward)]
    assert floor_bytes(case) == (passes[0], sum(passes))


def test_shapes_are_those_of_the_models():
    assert len(chosen(["*"])) == 19
    assert [case.tokens for case in chosen(["mlp"])] == [
        (128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768)
    ]  # fmt: skip
    assert {case.op for case in chosen(["vmamba_t4"])} == {"add_norm", "mlp", "depthwise_conv2d"}
    with pytest.raises(ValueError, match="'vmamba_t5' is no op"):
        chosen(["mlp", "vmamba_t5"])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case.shape}")
def test_a_line_is_measured_checked_and_written(case, monkeypatch, tmp_path):
    def graph_ms(run):
        results = run()
        for result in results if isinstance(results, tuple) else (results,):
            assert result.isfinite().all()
        return 0.5

    def peak_bytes(run):
        return sum(gradient.nbytes for gradient in run())

    monkeypatch.setattr(layers, "graph_ms", graph_ms)
    monkeypatch.setattr(layers, "peak_bytes", peak_bytes)
    row = {"op": case.op} | measure(case, "torch", 1e6, "cpu")
    gradients = sum(t.nbytes for t in layers.make_inputs(case, "cpu").values() if torch.is_tensor(t))
    assert row["peak_mb"] == gradients / 2**20
    assert row["fwd_us"] == row["fwdbwd_us"] == 500
    least = floor_bytes(case)
    assert (row["fwd_floor"], row["fwdbwd_floor"]) == ((None, None) if least is None else least)

    path = tmp_path / "folder" / "layers.csv"
    write_csv(path, [row, {"op": case.op, "wrong": "all of it"}], "a device, versions", "layers")
    first, *lines = path.read_text().splitlines()
    assert first.startswith("# a device, versions; python -m benchmarks.layers")
    read = list(csv.DictReader(lines))
    assert read[0]["fwdbwd_us"] == "500.0"
    assert read[0]["fwd_floor"] == ("" if least is None else str(float(least[0])))
    assert (read[1]["fwdbwd_us"], read[1]["wrong"]) == ("", "all of it")


@pytest.mark.parametrize("wrong", ["output 0", "gradient of x", "nan"])
def test_nothing_is_timed_that_is_wrong(wrong, monkeypatch):
    right = layers.OPS["mlp"]

    def off(x, *arguments, backend, **others):
        y = right(x, *arguments, backend=backend, **others)
        if x.dtype == torch.float64:
            return y
        if wrong == "nan":
            return y * float("nan")
        return 1.05 * y if wrong == "output 0" else y + 0.05 * (x - x.detach())

    monkeypatch.setitem(layers.OPS, "mlp", off)
    monkeypatch.setattr(layers, "graph_ms", lambda run: pytest.fail("timed"))
    row = measure(SMALL[3], "torch", 1e6, "cpu")
    assert list(row) == ["wrong"]
    assert row["wrong"].startswith("output 0" if wrong == "nan" else wrong)


def test_bad_arguments_are_named(capsys):
    for arguments, message in ((["--only", "conv9"], "'conv9' is no op"), (["--backends", "cpu"], "invalid choice")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--only", "depthwise_conv2d", "--backends", "triton"])
    assert "no backend of triton" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_times_of_the_last_stage(tmp_path):
    main(["--only", "*/vmamba_t4", "--backends", "cuda", "torch", "--out", str(tmp_path / "layers.csv")])
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()[1:]))
    assert len(rows) == 6
    assert all(0 < float(row["fwd_us"]) < float(row["fwdbwd_us"]) for row in rows)
