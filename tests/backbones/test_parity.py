"""Do our models compute what the published ones compute? Fixtures record runs of the published code.

Reads `fixtures/<family>/`, or the folder that the environment variable MAMBA_ZOO_PARITY names, and runs every fixture
in it: synthetic weights under the published names are written to a checkpoint as its authors publish them, and loaded
with `create_model(..., checkpoint_path=...)`, so that all of them must be used and none may be missing; those of a
fixture's probes are loaded from memory. A family joins by a module `parity_<family>.py`, which turns published
constructor arguments into ours, and one line in `FAMILIES`.
"""

import gzip
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_zoo

from . import (
    parity_audio,
    parity_graph,
    parity_language,
    parity_points,
    parity_series,
    parity_speech,
    parity_vision,
    synth,
)
from .parity_family import Family

ROOT = Path(os.environ.get("MAMBA_ZOO_PARITY") or Path(__file__).parent / "fixtures")
FIXTURES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.json.gz"))
TOLERANCE, PROBE_TOLERANCE = 2e-5, 1e-4
# LocalVim's probe multiplies what is rounded in its first layer by several hundred until the logits: the recorded
# float32 run is itself 1.6e-4 from our float64 run of it, so that 1e-4 is met by chance (0.9e-4 to 1.8e-4, measured).
PROBE_TOLERANCES = {"local_vim_tiny": 2e-4}

FAMILIES: dict[str, Family] = {
    **parity_audio.FAMILIES,
    **parity_graph.FAMILIES,
    **parity_language.FAMILIES,
    **parity_points.FAMILIES,
    **parity_series.FAMILIES,
    **parity_speech.FAMILIES,
    **parity_vision.FAMILIES,
}


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random initial values are NaN: none may be left once a checkpoint is loaded, and none takes time to draw."""
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(Tensor, name, lambda x, *args, **kwargs: x.detach().fill_(math.nan))


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize("name", FIXTURES)
def test_computes_what_was_published(name: str, tmp_path: Path) -> None:
    fixture = json.loads(gzip.decompress((ROOT / name).read_bytes()))
    folder, family = Path(name).parts[0], family_of(name)
    if not fixture.get("state"):
        assert family.check is not None, f"{folder} does not say how to check a fixture without weights"
        family.check(fixture)
        return
    architecture, arguments = family.arguments(fixture["kwargs"])
    inputs = made_inputs(fixture["inputs"])
    base = scaled(synth.synth_state(fixture["state"]), fixture.get("state_scale", {}))
    errors = {}
    for i, probe in enumerate([None, *fixture.get("probes", [])]):
        if probe is None:
            path = tmp_path / "published.pth"
            torch.save(family.container(base), path)
            model = mamba_zoo.create_model(architecture, checkpoint_path=path, **arguments).eval()
            path.unlink()
        else:
            overlay = {"state_dict": family.container(amplified(base, probe))}
            model = mamba_zoo.create_model(
                architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            ).eval()
        assert sum(p.numel() for p in model.parameters()) + dead_weights(family, fixture) == fixture["params"]
        with torch.inference_mode():
            outputs = family.run(model, inputs, fixture)
            if probe is None:
                errors |= extra_errors(family, model, fixture)
        expected = {**fixture["outputs"], **outputs_of_cases(fixture)} if probe is None else probe["outputs"]
        tolerance = TOLERANCE if probe is None else PROBE_TOLERANCES.get(fixture["model"], PROBE_TOLERANCE)
        for key, summary in expected.items():
            error = synth.relative_error(outputs[key].numpy(), summary)
            errors[f"{'' if probe is None else f'probe {i}: '}{key}"] = (error, tolerance)
    wrong = {key: f"{error:.1e}" for key, (error, tolerance) in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors too large: {wrong}"


def made_inputs(specs: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The inputs that follow from their names; others are stored as they are, and read by the family."""
    made = {key: spec for key, spec in specs.items() if "name" in spec}
    return {
        key: torch.from_numpy(synth.synth_input(spec["name"], spec["shape"], spec.get("scale", 1.0)))
        for key, spec in made.items()
    }


def extra_errors(family: Family, model: Any, fixture: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Errors of the fixture's further runs, which have inputs of their own, such as a batch of two."""
    errors = {}
    for i, case in enumerate(fixture.get("extra_cases", [])):
        outputs = family.run(model, made_inputs(case["inputs"]), {**fixture, **case})
        for key, summary in case["outputs"].items():
            errors[f"case {i}: {key}"] = (synth.relative_error(outputs[key].numpy(), summary), TOLERANCE)
    return errors


def family_of(name: str) -> Family:
    """The entry whose key begins the fixture's path: a folder, or "folder/model" where a folder holds several."""
    keys = [key for key in FAMILIES if name.startswith(f"{key}/" if "/" not in key else key)]
    assert keys, f"no model of the family of {name!r} is built; add it to FAMILIES"
    return FAMILIES[max(keys, key=len)]


def dead_weights(family: Family, fixture: dict[str, Any]) -> int:
    """Parameters of the published model that it never uses, and ours therefore does not have."""
    found = {key: spec for key, spec in fixture["state"].items() if family.dead and re.search(family.dead, key)}
    return sum(math.prod(shape) for shape, dtype in found.values() if dtype.startswith("float"))


def outputs_of_cases(fixture: dict[str, Any]) -> dict[str, Any]:
    """Outputs of further runs of the same weights, as "case: output"."""
    cases = fixture.get("cases", {}).items()
    return {f"{case}: {key}": summary for case, run in cases for key, summary in run["outputs"].items()}


def scaled(state: dict[str, Any], scales: dict[str, float]) -> dict[str, Tensor]:
    """The arrays as tensors; those of float whose key holds an entry of `scales` are multiplied by it."""
    found = {key: torch.from_numpy(value) for key, value in state.items()}
    for part, scale in scales.items():
        found |= {key: x * scale for key, x in found.items() if part in key and x.is_floating_point()}
    return found


def amplified(state: dict[str, Tensor], probe: dict[str, Any]) -> dict[str, Tensor]:
    """The state with the leaves named in `gain`, or matched by `gain_regex`, multiplied."""
    gains = probe.get("gain", {})
    patterns = probe.get("gain_regex", {})
    new = {}
    for key, value in state.items():
        factor = gains.get(key.rsplit(".", 1)[-1], 1.0)
        for pattern, gain in patterns.items():
            factor *= gain if re.search(pattern, key) else 1.0
        new[key] = value * factor if factor != 1.0 else value
    assert any(new[key] is not state[key] for key in state), "the probe changes no weight"
    return new


def test_there_are_fixtures() -> None:
    assert FIXTURES, f"{ROOT} holds no fixtures"
