"""Models of Hugging Face transformers carry their configuration, which is written beside their weights.

With it `from_pretrained` reads a saved or exported folder as it is. The trap: beside the names of an adapter (PEFT), or
of a module around the model, `from_pretrained` would find none of its weights, and give a model of random ones without
an error. So the configuration is written only beside the names that it describes. Nothing of transformers is imported:
a model has a configuration if its `config` has a `model_type` and a `to_json_string`. No communication.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["CONFIG_NAME", "CONFIG_NAMES", "are_described", "config_files", "config_with_dtype"]

CONFIG_NAME = "config.json"
_GENERATION_NAME = "generation_config.json"
CONFIG_NAMES = (CONFIG_NAME, _GENERATION_NAME)

# The parts that PEFT's wrappers and layers add to the names of a model's own tensors. `parametrizations` is not among
# them, because models of transformers have that part too (Wav2Vec2).
_CHANGED_NAME = re.compile(
    r"^base_model\.|(^|\.)(base_layer|modules_to_save|original_module)\.|(^|[._])lora_(A|B|embedding|magnitude)"
)


def config_files(model: nn.Module, class_name: str, dtype: torch.dtype) -> dict[str, bytes]:
    """File name -> content of the configuration files of a model; empty for models of other libraries.

    Args:
        model: the model without its wrappers.
        class_name: the name of the model's class, as its author wrote it.
        dtype: the dtype of the floating-point tensors in the folder; the configuration has it for `from_pretrained`.
    """
    config = getattr(model, "config", None)
    if not _is_own(model, config):
        return {}
    if not isinstance(getattr(config, "model_type", None), str) or not hasattr(config, "to_json_string"):
        return {}
    try:
        record = json.loads(config.to_json_string())  # type: ignore[union-attr]
        record["architectures"] = [class_name]
        contents = {CONFIG_NAME: config_with_dtype(_text(record), dtype)}
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None and hasattr(generation, "to_json_string"):
            contents[_GENERATION_NAME] = _text(json.loads(generation.to_json_string()))
    except (TypeError, ValueError, AttributeError) as error:  # a run must not end because it lacks a config.json
        warnings.warn(f"the configuration of the model is not written: {error!r}", UserWarning, stacklevel=2)
        return {}
    return contents


def are_described(fqns: Iterable[str]) -> bool:
    """Whether a model's configuration describes tensors of these names: none belongs to an adapter."""
    return not any(_CHANGED_NAME.search(fqn) for fqn in fqns)


def _is_own(model: nn.Module, config: object) -> bool:
    """Whether `model.config` describes the names of this module, and not those of a module within it."""
    if config is None or getattr(model, "peft_config", None):
        return False
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        return False
    if not are_described(name for name, _ in model.named_parameters()):
        return False
    # A model of transformers shares its configuration with the models within it; any other module only forwards it.
    owns = isinstance(getattr(type(model), "config_class", None), type)
    return owns or all(
        getattr(module, "config", None) is not config for module in model.modules() if module is not model
    )


def config_with_dtype(content: bytes, dtype: torch.dtype) -> bytes:
    """The content of a config.json, for weights of another dtype.

    Raises:
        ValueError: the content is not a JSON object.
    """
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("config.json is no JSON object")
    key = "torch_dtype" if "torch_dtype" in record else "dtype"  # before and since transformers 4.56
    return _text({**record, key: str(dtype).removeprefix("torch.")})


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, sort_keys=True).encode() + b"\n"
