"""Adapters of PEFT: in PeftModel, and in models of transformers and diffusers by their `add_adapter`.

PEFT itself says how the tensors of an adapter are called in its file: it gets a tensor of no memory under each name,
and gives them back under the names of the file. A type of adapter that computes what it saves (prompt learning, AdaLoRA
with a rank pattern) gives back other tensors, and its folder has no form of PEFT. The same holds if an adapter is
written in part, or together with other tensors: PEFT would load such a file without an error, and wrong.

No communication: nothing of the sharded tensors is touched.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from functools import partial
from typing import Any

import torch

from dist_ema.disk.forms.form import ADAPTER_CONFIG_NAME, LORA, PEFT, TOP, FolderForm, adapter_at_top
from dist_ema.disk.forms.models import Model, Tensors, files_written, origin_of

__all__ = ["adapter_form", "has_adapters"]

_FOLDER = re.compile(r"[A-Za-z0-9_-]{1,200}")
# What transformers puts before the names in the file, so that they are those of a PeftModel.
_PREFIX = "base_model.model."
# The key by which diffusers finds the configuration of an adapter in the header of its file.
_LORA_CONFIG_KEY = "lora_adapter_metadata"


def has_adapters(model: Model) -> bool:
    """Whether the model, or a module in it, is one of PEFT's."""
    if getattr(model.module, "peft_config", None):
        return True
    return any(type(inner).__module__.partition(".")[0] == "peft" for inner in model.module.modules())


def adapter_form(model: Model, tensors: Tensors) -> tuple[FolderForm, dict[str, bytes]] | None:
    """The form of a folder with one or several adapters, and its small files.

    None if the tensors are not exactly those of adapters, under other names.
    """
    library = sys.modules.get("peft")
    configs = getattr(model.module, "peft_config", None)
    if library is None or not isinstance(configs, dict) or tensors.aliases:
        return None
    files = {}
    for adapter in configs:
        names = _names_in_file(library, model, adapter, tensors)
        if names is None:
            return None
        if any(fqn in tensors.written for fqn in names):
            files[adapter] = names
    together = [fqn for names in files.values() for fqn in names]
    if not files or len(together) != len(set(together)) or set(together) != set(tensors.written):
        return None
    # In a folder of PEFT a sub-folder with an adapter at its top is one of its adapters: a Trainer that resumes would
    # add it to the model.
    at_top = None if tensors.is_beside_adapters else adapter_at_top(files)
    folders = {adapter: TOP if adapter == at_top else adapter for adapter in files}
    if not all(folder == TOP or _FOLDER.fullmatch(folder) for folder in folders.values()):
        return None
    is_lora = model.is_a("diffusers.loaders.peft", "PeftAdapterMixin")
    small_files, headers, origins = {}, {}, []
    for adapter, folder in folders.items():
        content = _config_file(model, adapter)
        origins.append(origin_of(json.loads(content).get("base_model_name_or_path")))
        if is_lora:
            headers[folder] = {_LORA_CONFIG_KEY: _lora_text(configs[adapter])}
        else:
            small_files[_in(folder, ADAPTER_CONFIG_NAME)] = content
    form = FolderForm(
        kind=LORA if is_lora else PEFT,
        names={fqn: name for names in files.values() for fqn, name in names.items() if name != fqn},
        folders={fqn: folders[adapter] for adapter, names in files.items() for fqn in names if folders[adapter] != TOP},
        headers=headers,
        small_files=tuple(small_files),
        base_model=origins[0],
        is_described=False,
    )
    return form, small_files


def _names_in_file(library: Any, model: Model, adapter: str, tensors: Tensors) -> dict[str, str] | None:
    """Fqn -> name in the adapter's file; None if PEFT would write something else than tensors of the model."""
    shapes = {fqn: tensors.written.get(fqn, ((1,), torch.float32)) for fqn in tensors.names}
    empty = {fqn: torch.empty(shape, dtype=dtype, device="meta") for fqn, (shape, dtype) in shapes.items()}
    fqn_of = {id(tensor): fqn for fqn, tensor in empty.items()}
    # Without the embeddings: to decide about them PEFT would ask the hub for the configuration of the base model.
    in_file = library.get_peft_model_state_dict(
        model.module, state_dict=dict(empty), adapter_name=adapter, save_embedding_layers=False
    )
    if any(id(tensor) not in fqn_of for tensor in in_file.values()):
        return None
    names = {fqn_of[id(tensor)]: name for name, tensor in in_file.items()}
    if len(names) != len(in_file):
        return None
    if model.is_a("transformers.integrations.peft", "PeftAdapterMixin"):
        names = {fqn: _PREFIX + name for fqn, name in names.items()}
    return names


def _config_file(model: Model, adapter: str) -> bytes:
    """The configuration of an adapter for inference, written by PEFT's own means; the model's own stays as it is."""
    module: Any = model.module
    config = copy.deepcopy(module.peft_config[adapter])
    config.inference_mode = True
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = vars(base).get("name_or_path") or None
    mapping = None
    if config.task_type is None and base is not module:
        kind = model.class_of(base)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return files_written(partial(config.save_pretrained, auto_mapping_dict=mapping))[ADAPTER_CONFIG_NAME]


def _lora_text(config: Any) -> str:
    """The configuration of an adapter as diffusers writes it into a header."""
    record = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(record, indent=2, sort_keys=True)


def _in(folder: str, name: str) -> str:
    return name if folder == TOP else f"{folder}/{name}"
