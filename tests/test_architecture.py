"""The shape of the package: imports point downward, the public names are these, torch's privates stay out."""

from __future__ import annotations

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import dist_ema
from dist_ema.schedules.records import SCHEDULES

PACKAGE = Path(dist_ema.__file__).parent
TESTS = Path(__file__).parent

# Rooms, from the top of the house to the bottom. A room is a folder, or a module that lies beside the folders. A
# module may import from rooms below its own, and within its room where no circle arises.
ROOMS = [
    "cli",
    "integrations",
    "ema",
    "construction",
    "offline",
    "checkpoint",
    "live",
    "averaging",
    "ranks",
    "topology",
    "disk",
    "disk.folders",
    "disk.formats",
    "options",
    "schedules",
    "boxes",
    "habits",
    "messages",
    "checks",
    "uninterrupted",
    "errors",
    "_version",
]
MOST_MODULES = 12
MOST_ENTRIES = 22

# Lines of code (no blank line, comment or docstring) of a module that may go beyond this need a reason.
MOST_CODE_LINES = 250
LONG_MODULES = {
    "averaging.update": "the fast path of an update and its three kinds of care are read side by side",
    "checkpoint.writing": "the two ways to write the same bytes, in place and exchanged, share every record",
}


def modules() -> dict[str, ast.Module]:
    """Name, without the package's own -> tree; all but the `__init__` and `__main__` of folders."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith(("__init__", "__main__")):
            found[name] = ast.parse(path.read_text())
    return found


def room_of(module: str) -> str:
    """The folder that a module lies in; a module beside the folders is a room of its own."""
    return module.rpartition(".")[0] or module


def imports(tree: ast.Module) -> list[str]:
    """Every module that is imported, in functions too; of the package's own the modules, never a folder."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            is_folder = (PACKAGE.parent / module.replace(".", "/")).is_dir() and module.startswith("dist_ema")
            names += [f"{module}.{alias.name}" for alias in node.names] if is_folder else [module]
    return names


def arrows() -> list[tuple[str, str]]:
    """(importing module, imported module), within the package."""
    return [
        (name, imported.removeprefix("dist_ema."))
        for name, tree in modules().items()
        for imported in imports(tree)
        if imported.startswith("dist_ema.")
    ]


def test_every_room_has_its_row() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_imports_point_downward() -> None:
    known = modules()
    for name, imported in arrows():
        assert imported in known, f"{name} imports {imported}, which is no module"
        if room_of(imported) != room_of(name):
            assert ROOMS.index(room_of(imported)) > ROOMS.index(room_of(name)), f"{name} imports {imported}, above it"


def test_no_circle_within_a_room() -> None:
    within: dict[str, set[str]] = {}
    for name, imported in arrows():
        if room_of(imported) == room_of(name):
            within.setdefault(name, set()).add(imported)
    tuple(graphlib.TopologicalSorter(within).static_order())  # raises CycleError


def test_a_room_holds_few_modules_and_the_house_few_rooms() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES
    in_room = collections.Counter(room_of(name) for name in modules())
    assert {room: number for room, number in in_room.items() if number > MOST_MODULES} == {}


def code_lines(path: Path) -> int:
    """Lines with code: no blank line, no comment, no docstring."""
    tree = ast.parse(path.read_text())
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(1 for at, line in lines if line.strip() and not line.strip().startswith("#") and at not in docstrings)


def test_no_module_grows_beyond_one_idea() -> None:
    lengths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): code_lines(path) for path in PACKAGE.rglob("*.py")
    }
    long = {name: length for name, length in lengths.items() if length > MOST_CODE_LINES}
    assert set(long) == set(LONG_MODULES), long


def test_only_topology_knows_the_parallelisms() -> None:
    for name, tree in modules().items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if not name.startswith("topology."):
            assert not used & {"DTensor", "FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}, name


def test_only_exchange_and_topology_touch_process_groups() -> None:
    for name, tree in modules().items():
        uses_groups = any(imported.startswith("torch.distributed") for imported in imports(tree))
        assert not uses_groups or room_of(name) in ("ranks", "topology"), name


def test_private_torch_is_confined() -> None:
    """The few private names, each in one place; every other leading underscore of torch is refused."""
    allowed = {
        "_foreach_lerp_": {"averaging.update"},
        "_foreach_copy_": {"averaging.averages"},
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
    """A schedule may come without a line here; no name may go, and nothing else may come."""
    pinned = {
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
    assert pinned <= set(dist_ema.__all__)
    assert set(dist_ema.__all__) - pinned <= set(SCHEDULES)
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


def test_tests_lie_in_the_folders_of_the_package() -> None:
    """A test of `dist_ema/disk/` is found in `tests/disk/`; `launch` and `crash` mirror launch/ and its sweeps."""

    def folders(parent: Path) -> set[str]:
        return {path.parent.name for path in parent.glob("*/*.py")}

    assert folders(TESTS) - {"support", "fixtures", "golden", "launch", "crash"} == folders(PACKAGE)
    tests = [path for path in TESTS.rglob("*.py") if "def test_" in path.read_text()]
    assert [path for path in tests if not path.name.startswith("test_")] == [], "pytest does not collect these"
