"""The doctor on this machine, on a machine with broken parts, and on sick models."""

import json
import subprocess
import sys

import pytest
import torch

from mamba_zoo import create_model, doctor, kernels
from mamba_zoo.__main__ import main as cli
from mamba_zoo.tasks import environment, selftest


def test_doctor_in_a_process_of_its_own():
    ended = subprocess.run(
        [sys.executable, "-m", "mamba_zoo", "doctor"], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "mamba_zoo works here" in ended.stdout
    for backend in kernels.BACKENDS[:3]:
        assert backend in ended.stdout
    for package in ("torch", "triton", "numba", "timm", "pytorch-lightning", "torch-geometric", "open3d", "soundfile"):
        assert package in ended.stdout
    assert ended.stderr == ""


def test_every_kernel_that_would_run_is_right(device):
    checks = list(selftest.check_kernels([device.type]))
    assert {c.op for c in checks} == {"selective_scan", "causal_conv1d", "ssd", "add_norm", "depthwise_conv2d"}
    assert {c.dtype for c in checks} == {"float32", "float16", "bfloat16"}
    for c in checks:
        assert c.passed, c
        assert c.error is not None
        assert c.error <= c.allowed
    assert selftest.unchecked() == []


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    right = kernels.selective_scan

    def wrong(*args, backend, **options):
        return right(*args, backend=backend, **options) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(kernels, "selective_scan", wrong)
    report = doctor.examine()
    assert not report.ok
    assert "selective_scan" in report.problems[0]
    assert "is off by" in report.problems[0]
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert cli(["doctor"]) == 1
    assert "does not work properly" in capsys.readouterr().out


def test_broken_packages_are_reported_not_raised(monkeypatch):
    def load(name):
        raise OSError("libusb-1.0.so.0: cannot open shared object file")

    monkeypatch.setattr(environment.importlib, "import_module", load)
    monkeypatch.setattr(
        environment, "PACKAGES", (("torch", "torch", True, "all"), ("nothing-such", "nothing", False, "x"))
    )
    found = {f.name: f for f in environment.packages()}
    assert found["torch"].state == "broken"
    assert "libusb" in found["torch"].detail
    assert found["nothing-such"].state == "broken"
    assert all(f.state != "ok" for f in environment.devices() if f.name in ("NVRTC", "CUDA driver"))


def test_json_is_complete(monkeypatch, capsys):
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert cli(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert {"machine", "packages", "checks", "caches", "problems", "warnings", "verdict"} <= set(found)
    assert found["checks"][0]["backend"] in kernels.BACKENDS


def test_sick_weights_are_found_from_the_command_line(tmp_path, capsys):
    model = create_model("vmamba_mini")
    name = next(n for n, _ in model.named_parameters() if n.endswith("A_log") or n.endswith("A_logs"))
    torch.save(model.state_dict(), tmp_path / "well.pth")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "sick.pth")
    assert cli(["doctor", "--model", "vmamba_mini", "--checkpoint", str(tmp_path / "well.pth")]) == 0
    assert "all values are finite" in capsys.readouterr().out
    assert cli(["doctor", "--model", "vmamba_mini", "--checkpoint", str(tmp_path / "sick.pth")]) == 1
    assert f"parameter {name}: 1 NaN" in capsys.readouterr().out


def test_a_sick_input_is_told_from_a_sick_model(tmp_path, capsys):
    x = torch.zeros(1, 3, 32, 32)
    x[0, 1, 2, 3] = float("nan")
    torch.save(x, tmp_path / "x.pt")
    assert cli(["doctor", "--model", "vmamba_mini", "--input", str(tmp_path / "x.pt"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"][0]["nan"] == 1
    assert found["weights"] == []
    assert found["finite"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x.png"], "give --model"),
        (["--model", "vmamba_mini", "--input", "missing.png"], "no input file missing.png"),
        (["--model", "vmamba_mni"], "vmamba_mini"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, capsys):
    assert cli(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err
