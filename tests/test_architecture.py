"""The shape of the package: imports point downward, the public names are these, torch's privates stay out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dist_ema

PACKAGE = Path(dist_ema.__file__).parent

# A module may import from rows below its own only; see "The house" in docs/architecture.md.
LAYERS = [
    ["cli"],
    ["commands"],
    ["integrations.accelerate"],
    ["integrations.watch"],
    ["ema"],
    ["building", "storage", "distance", "swapping"],
    ["offline", "synthesis", "comparison", "plots", "background", "checkpoint", "loading", "state"],
    [
        "sharded",
        "gather",
        "replicas",
        "reading",
        "writing",
        "teacher",
        "exporting",
        "snapshots",
        "sources",
        "doubts",
        "unchanged",
    ],
    ["swap", "calls"],
    ["exchange", "update", "topology.planning", "integrations.transformers"],
    ["prepared", "arrival"],
    ["blocks", "guard", "workers", "groups", "notice", "infinities"],
    ["broadcasts"],
    ["averages", "streams", "whole"],
    ["topology.extra"],
    ["topology.names"],
    ["topology.plain", "topology.dtensor", "topology.fsdp1", "topology.values"],
    ["topology.placed", "topology.runs"],
    ["plan", "posthoc", "coverage"],
    ["saved", "strips", "options", "skipped"],
    ["manifest", "layout"],
    ["commit", "steady", "schedules.records"],
    ["standstill"],
    ["schedules.classic", "schedules.profiles", "schedules.combinators"],
    ["schedules.base"],
    ["carrying"],
    ["folders", "claims"],
    ["files", "mounts"],
    ["headers"],
    ["kinds", "sharing", "tensor_checksums"],
    ["checks", "checksums", "habits", "differences", "telling", "use"],
    ["errors", "_version"],
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "dist_ema" else [module]
    return names


def test_every_module_has_its_row() -> None:
    assert set(modules()) == set(ROW)


def test_imports_point_downward() -> None:
    for name, tree in modules().items():
        for imported in imports(tree):
            if imported.startswith("dist_ema."):
                target = imported.removeprefix("dist_ema.")
                assert ROW[target] > ROW[name], f"{name} imports {target}, which is not below it"
            assert imported != "dist_ema", f"{name} imports the package's own __init__"


def test_only_topology_knows_the_parallelisms() -> None:
    for name, tree in modules().items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if not name.startswith("topology."):
            assert not used & {"DTensor", "FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}, name


def test_only_exchange_and_topology_touch_process_groups() -> None:
    for name, tree in modules().items():
        uses_groups = any(imported.startswith("torch.distributed") for imported in imports(tree))
        assert not uses_groups or name in ("exchange", "groups", "broadcasts") or name.startswith("topology."), name


def test_private_torch_is_confined() -> None:
    """The few private names, each in one place; every other leading underscore of torch is refused."""
    allowed = {
        "_foreach_lerp_": {"update"},
        "_foreach_copy_": {"averages"},
    }
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in allowed:
                assert name in allowed[node.attr], f"{name} uses {node.attr}"
            of_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if of_torch and node.value.id in ("torch", "dist") and node.attr != "__version__":
                assert not node.attr.startswith("_") or node.attr in allowed, f"{name} uses torch.{node.attr}"
        for imported in imports(tree):
            if imported.startswith("torch"):
                assert not any(part.startswith("_") for part in imported.split(".")), f"{name} imports {imported}"


def test_public_names() -> None:
    assert set(dist_ema.__all__) == {
        "AnnealedSchedule",
        "AttachError",
        "CheckpointCorruptError",
        "CheckpointError",
        "CheckpointMismatchError",
        "CheckpointNotFoundError",
        "CommunicationError",
        "ConfigError",
        "ConstantSchedule",
        "CosineSchedule",
        "DistEMAError",
        "EqualSchedule",
        "HalfLifeSchedule",
        "InverseGammaSchedule",
        "ModelChangedError",
        "PowerSchedule",
        "RampSchedule",
        "RankMismatchError",
        "ShardedEMA",
        "SwapError",
        "UnsupportedModelError",
        "__version__",
        "after",
        "attach",
        "consolidate_checkpoint",
        "every",
        "scaled_batch",
        "synthesize",
    }
    for name in dist_ema.__all__:
        assert getattr(dist_ema, name) is not None


def test_every_error_is_exported_and_a_child_of_the_root() -> None:
    from dist_ema import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), dist_ema.DistEMAError)
        assert name in dist_ema.__all__


def test_importing_the_package_or_its_command_line_does_not_load_torch() -> None:
    code = "import sys, dist_ema, dist_ema.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_file_grows_beyond_one_idea() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
