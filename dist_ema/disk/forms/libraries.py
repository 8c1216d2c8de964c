"""The configurations that diffusers, timm and the mixin of huggingface_hub write beside the weights of a model.

A library whose model is in hand is imported already. No communication.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from dist_ema.disk.forms.form import CONFIG_NAME
from dist_ema.disk.forms.models import Model, files_written, json_text

__all__ = ["diffusers_files", "hub_files", "timm_files"]

# Keys by which other libraries recognise a config.json as theirs.
_OF_OTHERS = ("model_type", "_class_name", "pretrained_cfg", "architectures", "auto_map")


def diffusers_files(model: Model) -> dict[str, bytes] | None:
    """The small files of a model of diffusers; None for other models."""
    if not model.is_a("diffusers.models.modeling_utils", "ModelMixin"):
        return None
    module: Any = model.module
    record = json.loads(files_written(module.save_config)[CONFIG_NAME])
    # Under fully_shard the class has another name, which no pipeline would find.
    return {CONFIG_NAME: json_text({**record, "_class_name": model.author_class.__name__})}


def timm_files(model: Model) -> dict[str, bytes] | None:
    """The small files of a model of timm; None for other models."""
    library = sys.modules.get("timm.models._hub")
    if library is None or not (hasattr(model.module, "pretrained_cfg") and hasattr(model.module, "default_cfg")):
        return None
    return files_written(lambda folder: library.save_config_for_hf(model.module, f"{folder}/{CONFIG_NAME}"))


def hub_files(model: Model) -> dict[str, bytes] | None:
    """The small files of a model with huggingface_hub's mixin; None for models without, or with files of their own."""
    module: Any = model.module
    kind: Any = model.author_class
    mixin: Any = model.base("huggingface_hub.hub_mixin", "PyTorchModelHubMixin")
    if mixin is None or kind._save_pretrained is not mixin._save_pretrained:
        return None  # in the second case the class chooses its files
    config: Any = module._hub_mixin_config
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if config is None:
        return {}
    if any(key in config for key in _OF_OTHERS):
        raise ValueError(f"its keys are those of another library's configuration ({', '.join(sorted(config))})")
    return {CONFIG_NAME: json_text(config)}
