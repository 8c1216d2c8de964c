"""The one place that decides the form of a folder: by what the model is, and by which of its tensors are written.

A folder that a library's loader would take for something that it is not is never written: what no library describes
exactly has the plain form, without a configuration. No communication; nothing of the model is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dist_ema.disk.forms.adapters import adapter_form, has_adapters
from dist_ema.disk.forms.form import DIFFUSERS, HUB, TIMM, TRANSFORMERS, FolderForm
from dist_ema.disk.forms.libraries import diffusers_files, hub_files, timm_files
from dist_ema.disk.forms.models import Model, Tensors, origin_of
from dist_ema.disk.forms.transformers_models import are_described, transformers_files

__all__ = ["PLAIN_FORM", "Decided", "FormOf", "decide"]

# Kind -> gives the small files of a model of that kind; None for others.
_LIBRARIES: Mapping[str, Callable[[Model, Tensors], dict[str, bytes] | None]] = {
    TRANSFORMERS: lambda model, tensors: transformers_files(model, tensors.dtype),
    DIFFUSERS: lambda model, tensors: diffusers_files(model),
    TIMM: lambda model, tensors: timm_files(model),
    HUB: lambda model, tensors: hub_files(model),
}
# Libraries that tie no weights by themselves: a tensor that the file has under another name they would leave random.
_NO_TIES = (DIFFUSERS, TIMM)


class Decided(NamedTuple):
    """A form, and the content of its small files by their paths."""

    form: FolderForm
    texts: Mapping[str, bytes]


PLAIN_FORM = Decided(FolderForm(), {})

# Gives the form in which tensors of a model are written.
FormOf = Callable[[Tensors], Decided]


def decide(model: Model, tensors: Tensors) -> Decided:
    """The form in which these tensors of a model are written. A failure of a library is a warning: the form is plain.

    Args:
        model: the model.
        tensors: its tensors that are written.
    """
    of_adapters = has_adapters(model)
    described = not (of_adapters or tensors.is_part) and are_described(tensors.written)
    try:
        adapters = adapter_form(model, tensors) if of_adapters else None
        if adapters is not None:
            return Decided(*adapters)
        for kind, files_of in _LIBRARIES.items() if described else ():
            texts = files_of(model, tensors)
            if texts is not None and not (tensors.aliases and kind in _NO_TIES):
                return Decided(FolderForm(kind=kind, small_files=tuple(texts), base_model=_origin(model)), texts)
    except Exception as error:  # a run must not end because it lacks a config.json
        warnings.warn(f"the configuration of the model is not written: {error!r}", UserWarning, stacklevel=2)
    return Decided(FolderForm(is_described=described), {})


def _origin(model: Model) -> str:
    """The name on the hub of what the model was made from."""
    config = getattr(model.module, "config", None)
    for owner in (config, model.module):
        origin = origin_of(getattr(owner, "name_or_path", None))
        if origin:
            return origin
    return origin_of(config.get("_name_or_path")) if isinstance(config, Mapping) else ""
