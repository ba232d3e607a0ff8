"""What importing the package costs and brings along, and which part of it may import which."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mamba_zoo

PACKAGE = Path(mamba_zoo.__file__).parent
# A file imports only from its own layer and from those before it.
LAYERS = ["kernels", "scans", "blocks", "backbones", "factory", "analysis", "tasks", "main"]
HEAVY = [
    "cuda",
    "lightning",
    "matplotlib",
    "numba",
    "open3d",
    "pandas",
    "pytorch_lightning",
    "rich",
    "scipy",
    "sklearn",
    "soundfile",
    "torch._dynamo",
    "torch._inductor",
    "torch_geometric",
    "torchaudio",
    "torchmetrics",
    "triton",
]
LATER = {"pytorch_lightning", "torchmetrics", "matplotlib", "sklearn", "numba", "llvmlite", "triton", "torch._dynamo"}
MEASURE = """
import json, sys, time
import timm
before, start = set(sys.modules), time.process_time()
import mamba_zoo
seconds = time.process_time() - start
new = sorted(set(sys.modules) - before)
import mamba_zoo.kernels, mamba_zoo.tasks.registry as tasks
from mamba_zoo.__main__ import main
codes = [main(["list", "--names"]), main(["--help"])]
later = sorted(set(sys.modules) - before - set(new))
print(json.dumps({"seconds": seconds, "new": new, "later": later, "codes": codes, "tasks": len(tasks.TASKS)}))
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


def measured() -> tuple[dict[str, Any], str]:
    """What a process of its own found, and what it printed before."""
    done = run(MEASURE, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text, _, found = done.stdout.strip().rpartition("\n")
    return json.loads(found), text


def test_import_and_light_commands():
    found, text = measured()
    assert [name for name in found["new"] for heavy in HEAVY if name == heavy or name.startswith(f"{heavy}.")] == []
    assert found["tasks"]
    assert found["codes"] == [0, 0]
    assert "\nvmamba_tiny\n" in text
    assert LATER & set(found["later"]) == set()
    # Other processes only ever add to the time.
    seconds = [found["seconds"]]
    while min(seconds) > 0.3 and len(seconds) < 4:
        seconds.append(measured()[0]["seconds"])
    assert min(seconds) <= 0.3, "processor time over timm's own import"


def test_import_without_optional_packages():
    blocked = [name for name in HEAVY if not name.startswith("torch.") and name not in ("triton", "rich", "scipy")]
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
    done = run(block + "import mamba_zoo\nprint(len(mamba_zoo.list_models()))", "-W", "error")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(mamba_zoo.list_models())


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name below `mamba_zoo`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> str:
    top, _, rest = module.partition(".")
    if top == "backbones":
        return "blocks" if rest.startswith("_") else "backbones"
    if top in ("", "_capture", "_counting", "_factory"):
        return "factory"
    return top if top in LAYERS else "main"


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without those that only type checkers see."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from running(child)


def imported(module: str, path: Path, known: dict[str, Path]) -> list[str]:
    """Modules of the package that `module` imports when it runs, also inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "mamba_zoo"]
            found += [name.removeprefix("mamba_zoo").removeprefix(".") for name in names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = [part for part in package.split(".") if part]
                base = ".".join(parts[: len(parts) - node.level + 1])
                if node.level - 1 > len(parts):
                    raise ValueError(f"{path}: import leaves the package")
                target = ".".join(part for part in (base, node.module or "") if part)
            elif (node.module or "").split(".")[0] == "mamba_zoo":
                target = (node.module or "").removeprefix("mamba_zoo").removeprefix(".")
            else:
                continue
            inner = [f"{target}.{alias.name}".removeprefix(".") for alias in node.names]
            found += [name if name in known else target for name in inner]
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "mamba_zoo")
def test_imports_go_one_way(module):
    mine = LAYERS.index(layer(module))
    targets = imported(module, MODULES[module], MODULES)
    wrong = {target for target in targets if LAYERS.index(layer(target)) > mine}
    assert wrong == set(), f"{module or 'mamba_zoo'} is in {LAYERS[mine]} and must not import these"


def test_the_rule_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "core.py"
    path.write_text(
        "import mamba_zoo.tasks.fit\ndef f():\n    from ..backbones import vmamba\n    from .. import tasks\n"
        "if TYPE_CHECKING:\n    from .. import doctor\n"
    )
    known = {"tasks.fit": path, "backbones.vmamba": path, "tasks": path, "doctor": path}
    assert imported("scans.core", path, known) == ["tasks.fit", "backbones.vmamba", "tasks"]


def test_submodules_are_there_when_asked_for():
    assert callable(mamba_zoo.kernels.selective_scan)
    assert callable(mamba_zoo.scans.build_scan)
    assert {"analysis", "kernels", "scans", "tasks", "compare"} <= set(dir(mamba_zoo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mamba_zoo.nothing


def test_version_is_the_one_of_the_distribution():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{mamba_zoo.__version__}"' in text
