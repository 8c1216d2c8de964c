"""The shape of the package: imports point downward, the public names are these, torch's privates stay out."""

from __future__ import annotations

import ast
import collections
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    "offline.merging",
    "offline",
    "checkpoint",
    "checkpoint.nodes",
    "checkpoint.snapshots",
    "checkpoint.tracks",
    "live.state_dicts",
    "live.elsewhere",
    "live",
    "live.holders",
    "averaging",
    "averaging.counting",
    "averaging.fused",
    "ranks",
    "ranks.wires",
    "ranks.store",
    "topology",
    "topology.seam",
    "disk",
    "disk.forms",
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
    "ema": "every public method stands in one place; none has more than a call of the rooms below",
    "averaging.state": "what updates, loads and tracks that come or go do to the same fields is read side by side",
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
        # The files of DCP are read there without a group.
        files = ("torch.distributed.checkpoint",) if name == "offline.merging.dcp" else ()
        uses_groups = any(
            imported.startswith("torch.distributed") and not imported.startswith(files) for imported in imports(tree)
        )
        assert not uses_groups or room_of(name).partition(".")[0] in ("ranks", "topology"), name


# Every private name of another library: module that may use it -> name -> test that fails when the library changes it.
# Private is what begins with an underscore, as an attribute, a keyword, in a string or in an import, and is neither
# Python's own nor defined by a class of the same module. Nothing else private may stand anywhere in the package.
OF_FSDP2 = "test_the_private_names_of_fsdp2_are_what_a_reshard_takes_them_for"
OF_FSDP1 = "test_the_private_names_of_fsdp1_are_what_a_flat_slice_takes_them_for"
OF_ZERO3 = "test_the_attributes_of_zero_3_are_what_a_run_takes_them_for"
OF_MASTERS = "test_the_masters_lie_where_these_attributes_say"
OF_WRAPPERS = "test_the_child_names_that_wrappers_reserve_are_these"
OF_FABRIC = "test_the_names_of_fabrics_wrapper_are_these"
OF_MODULES = "test_the_private_names_of_modules_are_these"
OF_TENSORS = "test_the_private_functions_of_tensors_do_this"
OF_FORMS = "test_the_private_names_of_libraries_are_what_their_folders_are_made_with"
OF_DCP = "test_the_private_names_in_a_record_of_dcp_are_these"
PRIVATE_NAMES = {
    "offline.merging.dcp": {"_get_layout": OF_DCP},
    "topology.dtensor": {
        "_get_fsdp_state": OF_FSDP2,
        "_fsdp_param_group": OF_FSDP2,
        "_fsdp_param_groups": OF_FSDP2,
        "_all_gather_result": OF_FSDP2,
        "_training_state": OF_FSDP2,
        "_parameters": OF_MODULES,
        "_buffers": OF_MODULES,
    },
    "topology.fsdp1": {
        "_handle": OF_FSDP1,
        "_inter_node_pg": OF_FSDP1,
        "_param_extensions": OF_FSDP1,
        "_training_state": OF_FSDP1,
        "_use_orig_params": OF_FSDP1,
        "_writeback_orig_params": OF_FSDP1,
        "_prefetched": OF_FSDP1,
        "_local_shard": OF_FSDP1,
        "_contiguities": OF_FSDP1,
        "_fqns": OF_FSDP1,
        "_param_infos": OF_FSDP1,
        "_shapes": OF_FSDP1,
        "_shard_param_infos": OF_FSDP1,
        "_shared_param_infos": OF_FSDP1,
        "_flat_param": OF_WRAPPERS,
    },
    "topology.names": {
        "_orig_mod": OF_WRAPPERS,
        "_checkpoint_wrapped_module": OF_WRAPPERS,
        "_fsdp_wrapped_module": OF_WRAPPERS,
        "_non_persistent_buffers_set": OF_MODULES,
        "_FabricModule": OF_FABRIC,
        "_forward_module": OF_FABRIC,
        "_original_module": OF_FABRIC,
    },
    "topology.zero3": {
        "_ds_z3_gathered_param_context_depth": OF_ZERO3,
        "_z3_optimizer": OF_ZERO3,
        "_parameters": OF_MODULES,
    },
    "topology.masters": {"_hp_mapping": OF_MASTERS, "_dp_group": OF_MASTERS, "_parameters": OF_MODULES},
    "topology.plain": {"_parameters": OF_MODULES, "_buffers": OF_MODULES},
    "topology.chunks": {"__create_chunk_list__": "test_every_layout_goes_through_dcp_exactly_or_is_refused_at_once"},
    "topology.values": {
        "__torch_dispatch__": "test_a_tensor_whose_bytes_are_not_its_values_is_refused_by_name_before_the_first_save",
        "__tensor_flatten__": "test_a_tensor_whose_bytes_are_not_its_values_is_refused_by_name_before_the_first_save",
    },
    "boxes.shards": {"_extra_state": "test_a_tensor_of_extra_state_is_in_the_files_so_that_a_strict_load_works"},
    "averaging.moves": {"_foreach_lerp_": OF_TENSORS},
    "averaging.averages": {"_foreach_copy_": OF_TENSORS},
    "averaging.standstill": {"_dynamo": "test_a_compiler_that_is_loaded_after_the_first_update_does_not_trace_updates"},
    "uninterrupted.jobs": {"_version": OF_TENSORS},
    "integrations.accelerate": {"_models": "test_detach_removes_the_hooks_and_frees_the_name"},
    "integrations.watch": {"_init_optim_state": "test_a_phantom_step_of_dcp_is_not_counted"},
    "integrations.trainer": {
        "_get_output_dir": "test_in_a_search_the_averages_lie_in_the_checkpoints_of_their_trials",
        "_trial": "test_in_a_search_the_averages_lie_in_the_checkpoints_of_their_trials",
    },
    "integrations.trainer_evaluation": {"_metrics": "test_trl_trains_as_without_and_measures_both_kinds_apart"},
    "integrations.lightning_saves": {
        "_save_distributed_checkpoint": "test_the_names_by_which_lightning_writes_folders_are_these",
        "_state_dict_type": "test_the_names_by_which_lightning_writes_folders_are_these",
    },
    "disk.forms.libraries": {
        "_class_name": OF_FORMS,
        "_hub": OF_FORMS,
        "_hub_mixin_config": OF_FORMS,
        "_save_pretrained": OF_FORMS,
    },
    "disk.forms.deciding": {"_name_or_path": OF_FORMS},
    # Of the file format: the key under which a safetensors file says what it is.
    "disk.formats.headers": {"__metadata__": "test_a_0_dim_float_and_an_integer_counter_and_the_pt_format_are_kept"},
}
# Our own mark on errors of any class.
OURS = {"errors": {"_agreed"}}
# Python's own: what every object, class, function and module has, and documented names of the standard library.
OF_PYTHON = {name for each in (object, type, len, test_imports_point_downward, sys) for name in dir(each)}
OF_PYTHON = {name for name in OF_PYTHON if name.startswith("__")} | {"__mro__", "__version__", "__post_init__"}
OF_PYTHON |= {"_getframe", "_replace", "_fields", "_thread", "_pickle"}


def own_names(tree: ast.Module) -> set[str]:
    """The private names that a module and its classes define: variables, methods, attributes."""
    own = {target.id for target in assigned_in(tree) if isinstance(target, ast.Name)}
    for made in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(made):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                own.add(node.attr)
        own |= {target.id for target in assigned_in(made) if isinstance(target, ast.Name)}
    return own


def assigned_in(made: ast.Module | ast.ClassDef) -> list[ast.expr]:
    """What is assigned in the body of a module or a class, outside its functions."""
    assigned = [node for node in made.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [target for node in assigned for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def is_self(node: ast.expr) -> bool:
    """Whether it is the object whose class the code belongs to."""
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def private_names(tree: ast.Module) -> Iterator[str]:
    """Every name that a module uses of something else than `self`: attributes, keywords, strings and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A name for getattr, or a path of modules for importlib; prose has blanks.
            if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", node.value):
                yield from node.value.split(".")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", None) or "").split(".")
            parts = [part for alias in node.names for part in alias.name.split(".")]
            if module[0] not in ("dist_ema", "__future__") and parts[0] != "dist_ema":
                yield from (*module, *parts)


def strange_names(module: str, tree: ast.Module) -> set[str]:
    """The private names of other libraries that a module uses."""
    # Within topology nothing private is ours but `self`: torch's `_handle` must not hide behind a `_handle` of our own.
    own = OURS.get(module, set()) | (set() if room_of(module).startswith("topology") else own_names(tree))
    return {
        name for name in private_names(tree) if name.startswith("_") and name.strip("_") and name not in OF_PYTHON | own
    }


def test_private_names_of_torch_are_each_in_one_place_and_guarded() -> None:
    known = modules()
    assert PRIVATE_NAMES.keys() <= known.keys()
    used = {module: strange_names(module, tree) for module, tree in known.items()}
    listed = {module: set(PRIVATE_NAMES.get(module, ())) for module in known}
    unlisted = {module: names - listed[module] for module, names in used.items() if names - listed[module]}
    assert unlisted == {}, "private names of other libraries without a row: use a public way, or add a row and a guard"
    unused = {module: names - used[module] for module, names in listed.items() if names - used[module]}
    assert unused == {}, "rows of names that are not used there any more"


def test_every_private_name_has_a_test_that_guards_it() -> None:
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)\(", tests, re.MULTILINE))
    assert {guard for names in PRIVATE_NAMES.values() for guard in names.values()} <= defined


def test_what_is_private_in_self_is_defined_by_a_class_of_the_package() -> None:
    """Not by a class of torch that a class of ours inherits from."""
    ours = set().union(*map(own_names, modules().values())) | OF_PYTHON
    for name, tree in modules().items():
        of_self = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
        assert {attr for attr in of_self if attr.startswith("_")} <= ours, name


@pytest.mark.parametrize(
    "line",
    [
        "torch._dynamo.reset()",
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from torch.distributed import _functional_collectives",
        "importlib.import_module('torch._dynamo')",
        "group._fsdp_param_group",
        "self._handle.flat_param._sizes",
        "getattr(handle, '_inter_node_pg', None)",
        "setattr(handle, '_prefetched', False)",
        "operator.attrgetter('_version')",
        "dtensor.__create_chunk_list__()",
        "torch._foreach_lerp_(one, other, 0.5)",
        "DTensor.from_local(values, _shape=shape)",
        "vars(module)['_parameters']",
    ],
)
def test_a_private_name_is_seen_however_it_is_reached(line) -> None:
    tree = ast.parse(f"class Ours:\n    def _ours(self):\n        self._own = 1\n        {line}\n")
    assert len(strange_names("averaging.update", tree)) == 1


def claims(node: ast.AST, above: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The docstring of everything in a module, with the docstrings of what it stands in."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        docstring = ast.get_docstring(node) or ""
        yield docstring, above
        above = (*above, docstring)
    for child in ast.iter_child_nodes(node):
        yield from claims(child, above)


def test_what_says_that_nothing_communicates_holds_nothing_that_does() -> None:
    """Of a folder, a module or a class, "No communication" is said of all that is in it."""
    collective, silent = re.compile(r"^(Collective|Point to point)|\. Collective\b"), "No communication."
    for name, tree in modules().items():
        folders = [PACKAGE.joinpath(*name.split(".")[:depth], "__init__.py") for depth in range(1, name.count(".") + 1)]
        around = tuple(ast.get_docstring(ast.parse(folder.read_text())) or "" for folder in folders)
        for docstring, above in claims(tree, around):
            if collective.search(docstring.split("\n\n")[0]):
                assert not any(silent in each for each in above), f"{name}: {docstring.splitlines()[0]}"
                assert silent not in docstring, f"{name}: {docstring.splitlines()[0]}"


def test_what_says_that_it_does_not_communicate_calls_nothing_that_does() -> None:
    """By name, of functions that are collective wherever one of that name is defined."""
    defined = collections.defaultdict(set)
    silent = []
    for name, tree in modules().items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            docstring = ast.get_docstring(node) or ""
            defined[node.name].add(docstring.startswith(("Collective", "Point to point")))
            if "No communication." in docstring:
                silent.append((name, node))
    collective = {name for name, kinds in defined.items() if kinds == {True}}
    assert {"agree", "arrive", "sum_integers", "save"} <= collective
    for name, function in silent:
        called = {getattr(node.func, "attr", getattr(node.func, "id", "")) for node in calls(function)}
        assert not called & collective, f"{name}.{function.name} calls {called & collective}"


def calls(function: ast.FunctionDef) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call)]


def test_what_docstrings_and_comments_refer_to_exists() -> None:
    """Modules by their file's name, tests by theirs, and notes, each of which is written once."""
    files = {path.name for path in PACKAGE.rglob("*.py")}
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    texts = {name: (PACKAGE / f"{name.replace('.', '/')}.py").read_text() for name in modules()}
    notes = collections.Counter(
        note for text in texts.values() for note in re.findall(r"^ *\[Note: ([^]]+)\]$", text, re.M)
    )
    assert set(notes.values()) == {1}
    for name, text in texts.items():
        # With a folder before it, the path is one of the repository: of the docs, of launch/.
        assert set(re.findall(r"(?<![\w/])\w+\.py\b", text)) <= files, name
        for path in re.findall(r"`((?:averaging|boxes|checkpoint|disk|live|offline|ranks|topology)/[\w/]+\.py)`", text):
            assert (PACKAGE / path).exists(), f"{name} names {path}"
        for module in re.findall(r"`dist_ema\.([a-z_.]+)`", text):
            assert module in modules() or (PACKAGE / module.replace(".", "/")).is_dir(), f"{name} names {module}"
        assert {note.strip() for note in re.findall(r"\[Note: ([^]]+)\]", text)} <= notes.keys(), name
        for test in re.findall(r"`(test_\w+)`", text):
            assert f"def {test}(" in tests, f"{name} names {test}"


def test_nothing_that_an_update_runs_imports_what_communicates() -> None:
    """The modules that `averaging` reaches, over any number of imports, know neither process groups nor their users."""
    known, below = modules(), collections.defaultdict(set)
    for name, imported in arrows():
        below[name].add(imported)
    reached: set[str] = set()
    ahead = {name for name in known if room_of(name) == "averaging"}
    while ahead:
        reached |= ahead
        ahead = {imported for name in ahead for imported in below[name]} - reached
    assert {
        name for name in reached if room_of(name) in ("ranks", "live", "checkpoint", "integrations", "cli")
    } == set()
    for name in reached:
        communicates = [imported for imported in imports(known[name]) if imported.startswith("torch.distributed")]
        assert communicates == [], name
        used = {ast.unparse(node) for node in ast.walk(known[name]) if isinstance(node, ast.Attribute)}
        assert not any(each.startswith("torch.distributed") for each in used), name


def test_public_names() -> None:
    """A schedule may come without a line here; no name may go, and nothing else may come."""
    pinned = {
        "AnnealedSchedule",
        "AttachError",
        "Bema",
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
        "Experts",
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
        "merge",
        "scaled_batch",
        "SnapshotWindow",
        "log_spaced",
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
    """A test of `dist_ema/disk/` is found in `tests/disk/`; `launch` and `crash` mirror launch/ and its sweeps.

    `everything` has what `launch/everything.sh` alone runs.
    """

    def folders(parent: Path) -> set[str]:
        return {path.parent.name for path in parent.glob("*/*.py")}

    assert folders(TESTS) - {"support", "fixtures", "golden", "launch", "crash", "everything"} == folders(PACKAGE)
    tests = [path for path in TESTS.rglob("*.py") if "def test_" in path.read_text()]
    assert [path for path in tests if not path.name.startswith("test_")] == [], "pytest does not collect these"


MOST_LINES_OF_A_PUBLIC_METHOD = 8


def test_public_methods_of_the_facade_hand_on() -> None:
    """Beside its docstring a public method of `ShardedEMA` has at most 8 lines."""
    (facade,) = (node for node in modules()["ema"].body if isinstance(node, ast.ClassDef))
    methods = [node for node in facade.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert len(methods) > 20 and not facade.bases
    for method in methods:
        first = method.body[1] if ast.get_docstring(method) is not None else method.body[0]
        assert (method.end_lineno or 0) - first.lineno < MOST_LINES_OF_A_PUBLIC_METHOD, method.name


def test_the_page_of_the_house_has_every_room_in_the_order_of_the_imports() -> None:
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \|", page.partition("## The house")[2].partition("\n## ")[0], re.MULTILINE)
    assert rows == ROOMS


MOST_WORDS_OF_THE_GLOSSARY = 25


def test_the_glossary_is_short_and_no_identifier_is_a_word_without_a_meaning() -> None:
    """What a thing was done to (told, found, chosen, each) is no name for it."""
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    words = re.findall(r"^\| \*([^*]+)\* \|", page.partition("## The words")[2], re.MULTILINE)
    assert 15 < len(words) <= MOST_WORDS_OF_THE_GLOSSARY and len(set(words)) == len(words)
    empty = {"told", "found", "chosen", "each", "settle", "settled"}
    for name, tree in modules().items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names -= {"found_inf"}  # torch's own: the flag of a GradScaler
        assert {known for known in names if empty.intersection(known.split("_"))} == set(), name
