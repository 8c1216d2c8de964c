"""Every parameter and persistent buffer of a model, once, under the names that it has without wrappers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.boxes.plan import Remains
from dist_ema.errors import ModelChangedError, UnsupportedModelError
from dist_ema.options import Options
from dist_ema.topology.parts import Parts
from dist_ema.topology.seam.layout import Named, Where
from dist_ema.topology.seam.loaded import is_class_of_fsdp2

__all__ = [
    "canonical_prefix",
    "check_against_state_dict",
    "check_unchanged",
    "class_of",
    "named_tensors",
    "unchanged_names",
    "unwrapped",
]

# The child names that wrappers of torch reserve for their module: torch.compile, activation checkpointing, FSDP1.
_WRAPPED_CHILD = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# The wrappers that only the type tells: their child is called `module`, as a user's own module may be.
_WRAPPERS = (DistributedDataParallel, nn.DataParallel)
# Wrappers of other libraries, which are not imported: the module of the class, its name, and a child that it wraps; of
# several such children the outermost comes first.
_FOREIGN_WRAPPERS = (
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
)


def named_tensors(model: nn.Module, elsewhere: Mapping[Where, Any]) -> list[Named]:
    """Every parameter, then every persistent buffer, both in the order of the model. No communication.

    Args:
        model: the wrapped model.
        elsewhere: the sources of the tensors that the modules do not show as they are; see `Layout.find`.

    Raises:
        UnsupportedModelError: two different tensors have the same canonical name.
    """
    by_identity: dict[int, Named] = {}
    taken: dict[str, int] = {}
    for fqn, owner, attribute, source, is_buffer in (*_parameters(model, elsewhere), *_buffers(model)):
        if taken.setdefault(fqn, id(source)) != id(source):
            raise UnsupportedModelError(f"two different tensors of the model are called {fqn!r}: {_way_out(model)}")
        named = by_identity.get(id(source))
        if isinstance(source, torch.Tensor) and nn.parameter.is_lazy(source):
            raise UnsupportedModelError(f"{fqn} is not initialised yet: run one forward of the lazy modules first")
        if named is None:
            named = Named([], tuple(source.shape), source.dtype, source, is_buffer, owner, attribute)
            by_identity[id(source)] = named
        if fqn not in named.fqns:
            named.fqns.append(fqn)
    return list(by_identity.values())


def _way_out(model: nn.Module) -> str:
    if not isinstance(model, Parts):
        return "rename one"
    return (
        "if it is one tensor of the whole model, let these parts share it (second.name = first.name), or register a "
        "buffer that each of them computes with persistent=False; else give it the name that it has in the whole model"
    )


_Met = tuple[str, nn.Module, str, Any, bool]


def _parameters(model: nn.Module, elsewhere: Mapping[Where, Any]) -> Iterator[_Met]:
    further: dict[int, list[str]] = {}
    for module_id, attribute in elsewhere:
        further.setdefault(module_id, []).append(attribute)
    for prefix, module in _modules(model):
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for attribute in [*own, *(name for name in further.get(id(module), ()) if name not in own)]:
            source = elsewhere.get((id(module), attribute), own.get(attribute))
            if source is not None:
                yield prefix + attribute, module, attribute, source, False


def _buffers(model: nn.Module) -> Iterator[_Met]:
    for prefix, module in _modules(model):
        for attribute, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            # The only public way to know is a state_dict() of the whole model, which gathers under FSDP1.
            if attribute not in module._non_persistent_buffers_set:
                yield prefix + attribute, module, attribute, buffer, True


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Pairs of a canonical prefix with its dot and a module; a shared module comes under all of its names."""
    met: dict[str, tuple[str, nn.Module]] = {}  # canonical_prefix would begin at the root again for every module
    for raw_name, module in model.named_modules(remove_duplicate=False):
        prefix = ""
        if raw_name:
            above, _, name = raw_name.rpartition(".")
            outer, owner = met[above]
            prefix = outer if _wraps(owner, name) else f"{outer}{name}."
        met[raw_name] = prefix, module
        yield prefix, module


def canonical_prefix(model: nn.Module, raw_name: str) -> str:
    """The prefix of the names within a module, without the parts that wrappers add.

    The type of a wrapper tells it, or a child name that torch reserves. So a user's own attribute called `module` keeps
    its name.
    """
    owner: Any = model
    kept = []
    for part in raw_name.split(".") if raw_name else ():
        if not _wraps(owner, part):
            kept.append(part + ".")
        owner = owner.get_submodule(part)
    return "".join(kept)


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether this child of a module is one that it wraps."""
    return isinstance(module, Parts) or child in _WRAPPED_CHILD or child in _children_of(type(module))


def _children_of(kind: type) -> tuple[str, ...]:
    """The names of the children that a module of this type wraps, the outermost first."""
    if issubclass(kind, _WRAPPERS):
        return ("module",)
    classes = {(base.__module__, base.__name__) for base in kind.__mro__}
    return tuple(child for module, name, child in _FOREIGN_WRAPPERS if (module, name) in classes)


def check_against_state_dict(
    model: nn.Module, names: Collection[str], left_out: Collection[str], options: Options
) -> list[str]:
    """Refuse names that the model's own state dict does not have, and entries there that are no known tensor.

    The model could not read the files if a state-dict hook renames or adds entries. Entries that a hook adds
    (quantisation constants, say) are accepted if `exclude` names them, or with `averaged_only`; they are not written.

    Args:
        model: the wrapped model.
        names: the names of all tensors that the files will have.
        left_out: the names of the tensors that the files will not have.
        options: the options of the average; what `include` does not name is not accepted for that.

    Returns:
        The further names that were accepted.

    Raises:
        UnsupportedModelError: the error gives the first name that is not explained.
    """
    while (inner := _wrapped_in(model)) is not None:  # Fabric's wrapper gives the keys of the module in it
        model = inner
    entries = {_canonical_key(model, key): value for key, value in model.state_dict(keep_vars=True).items()}
    unknown = sorted(entries.keys() - {*names, *left_out})
    for fqn in unknown:
        if not options.averaged_only and not options.excludes([fqn]):
            raise UnsupportedModelError(
                f"the model's state_dict() has {fqn}, a {type(entries[fqn]).__name__}, none of its parameters and "
                f"persistent buffers: the files would lack it. Leave it out of them by choice with exclude={fqn!r}, or "
                "with averaged_only=True if files are to hold the averaged tensors alone"
            )
    for fqn in sorted(set(names) - entries.keys()):
        raise UnsupportedModelError(
            f"the model's state_dict() has no {fqn}, though it is a parameter or persistent buffer: files under its "
            "own names could not hold it. Remove the state-dict hook that renames it"
        )
    return unknown


def _canonical_key(model: nn.Module, key: str) -> str:
    *path, attribute = key.split(".")
    try:
        return canonical_prefix(model, ".".join(path)) + attribute
    except AttributeError:
        return key


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the outermost wrappers. It changes nothing (accelerate's `unwrap_model` may).

    Of a model in several parts it is the first of them that has a config, else the first one.
    """
    if isinstance(model, Parts):
        parts = [unwrapped(part) for part in model.children()]
        return next((part for part in parts if hasattr(part, "config")), parts[0])
    inner = _wrapped_in(model)
    return model if inner is None else unwrapped(inner)


def _wrapped_in(model: nn.Module) -> nn.Module | None:
    """The one module that this module wraps; None if it is no wrapper."""
    children = {} if isinstance(model, Parts) else dict(model.named_children())
    name = next((name for name in (*_children_of(type(model)), *children) if _wraps(model, name)), None)
    return None if name is None else children[name]


def check_unchanged(planned: Sequence[Named], now: Sequence[Named]) -> None:
    """Refuse a model whose tensors have other names, or lie in other modules, than when it was planned.

    Raises:
        ModelChangedError: the error gives the first tensor that came, went or moved.
    """
    before, after = ({tuple(named.fqns): named for named in tensors} for tensors in (planned, now))
    for fqns in [*before, *(fqns for fqns in after if fqns not in before)]:
        old, new = before.get(fqns), after.get(fqns)
        if old is None or new is None or old.owner is not new.owner or old.shape != new.shape:
            raise ModelChangedError(
                f"{fqns[0]} was added, removed, replaced, tied, reshaped or moved since the average was "
                "built: build a new ShardedEMA after changing a model; keep first what this one holds by save(path, "
                "only_unchanged=True)"
            )


def unchanged_names(planned: Sequence[Named], now: Sequence[Named]) -> Remains:
    """The planned tensors that remain in a model that has changed since.

    A tensor remains if its first name and shape are the same, and it lies in the same module, or is the same tensor in
    another module (`convert_sync_batchnorm`). A tensor in a new module of the same shape has other values: it does not
    remain.
    """
    present = {named.fqns[0]: named for named in now}
    names = {}
    for old in planned:
        new = present.get(old.fqns[0])
        if new is None or (old.shape, old.is_buffer) != (new.shape, new.is_buffer):
            continue
        if old.owner is new.owner or getattr(old.owner, old.attribute, None) is new.source:
            names[old.fqns[0]] = tuple(fqn for fqn in old.fqns if fqn in new.fqns)
    return Remains(names=names, others=tuple(fqn for fqn in present if fqn not in names))


def class_of(module: nn.Module) -> type:
    """The class of a module as its author wrote it: `fully_shard` puts a class of its own in that place."""
    return next(author_class for author_class in type(module).__mro__ if not is_class_of_fsdp2(author_class))
