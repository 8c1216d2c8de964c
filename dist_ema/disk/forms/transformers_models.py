"""Models of transformers carry their configuration, which is written beside their weights, with their own code.

With it `from_pretrained` reads a saved or exported folder as it is. The trap: beside the names of an adapter (PEFT), or
of a module around the model, `from_pretrained` would find none of its weights, and give a model of random ones without
an error. So the configuration is written only beside the names that it describes. Nothing of transformers is imported:
a model has a configuration if its `config` has a `model_type` and a `to_json_string`. No communication.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from dist_ema.disk.forms.form import CONFIG_NAME, GENERATION_NAME
from dist_ema.disk.forms.models import Model, dtype_text, files_written, json_text

__all__ = ["are_described", "config_with_dtype", "transformers_files"]

# The parts that PEFT's wrappers and layers add to the names of a model's own tensors. `parametrizations` is not among
# them, because models of transformers have that part too (Wav2Vec2).
_CHANGED_NAME = re.compile(
    r"^base_model\.|(^|\.)(base_layer|modules_to_save|original_module)\.|(^|[._])lora_(A|B|embedding|magnitude)"
)


def transformers_files(model: Model, dtype: torch.dtype) -> dict[str, bytes] | None:
    """File name -> content of the small files of a model; None for models of other libraries.

    Args:
        model: the model.
        dtype: the dtype of the floating-point tensors in the folder; the configuration has it for `from_pretrained`.
    """
    config: Any = getattr(model.module, "config", None)
    if not _is_own(model, config):
        return None
    if not isinstance(getattr(config, "model_type", None), str) or not hasattr(config, "to_json_string"):
        return None
    record = json.loads(config.to_json_string())
    record["architectures"] = [model.author_class.__name__]
    contents = _code(model, config, record)
    contents[CONFIG_NAME] = config_with_dtype(json_text(record), dtype)
    generation: Any = getattr(model.module, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        contents[GENERATION_NAME] = json_text(json.loads(generation.to_json_string()))
    return contents


def are_described(fqns: Iterable[str]) -> bool:
    """Whether a model's configuration describes tensors of these names: none belongs to an adapter."""
    return not any(_CHANGED_NAME.search(fqn) for fqn in fqns)


def _code(model: Model, config: Any, record: dict[str, Any]) -> dict[str, bytes]:
    """The files of classes that are not in transformers (`auto_map`), as `save_pretrained` copies them.

    The record gets the places of these classes.
    """
    library = sys.modules.get("transformers.dynamic_module_utils")
    if library is None:
        return {}
    contents: dict[str, bytes] = {}
    # The model's own class: under fully_shard an instance has a class of torch's module, whose file would be copied.
    custom = [kind for kind in (model.author_class, type(config)) if _is_custom(kind)]
    kind: Any
    for kind in custom:
        contents |= files_written(partial(_save_code, library, kind.__new__(kind), record))
    return contents


def _save_code(library: Any, of_class: Any, record: dict[str, Any], folder: str) -> None:
    library.custom_object_save(of_class, folder, config=record)


def _is_custom(kind: Any) -> bool:
    """Whether transformers takes the class for code that belongs to the folder (`register_for_auto_class`)."""
    return hasattr(kind, "is_remote_code") and bool(kind.is_remote_code())


def _is_own(model: Model, config: object) -> bool:
    """Whether `model.config` describes the names of this module, and not those of a module within it."""
    module = model.module
    if config is None or getattr(module, "peft_config", None):
        return False
    if any(type(inner).__module__.partition(".")[0] == "peft" for inner in module.modules()):
        return False
    if not are_described(name for name, _ in module.named_parameters()):
        return False
    # A model of transformers shares its configuration with the models within it. Any other module only forwards it, or
    # has one of its own around such a model, whose names have a prefix then.
    owns = isinstance(getattr(type(module), "config_class", None), type)
    return owns or not any(_is_configured(inner) for inner in module.modules() if inner is not module)


def _is_configured(module: torch.nn.Module) -> bool:
    return isinstance(getattr(getattr(module, "config", None), "model_type", None), str)


def config_with_dtype(content: bytes, dtype: torch.dtype) -> bytes:
    """The content of a config.json of transformers, for weights of another dtype.

    Raises:
        ValueError: the content is not a JSON object.
    """
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("config.json is no JSON object")
    key = "torch_dtype" if "torch_dtype" in record else "dtype"  # before and since transformers 4.56
    return json_text({**record, key: dtype_text(dtype)})
