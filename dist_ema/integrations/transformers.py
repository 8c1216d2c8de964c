"""Models of Hugging Face transformers carry their configuration; it is written beside their weights.

So that `from_pretrained` takes a saved or exported folder as it is. Nothing of transformers is imported: a model has a
configuration if its `config` has a `model_type` and a `to_json_string`. No communication.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_ema.topology.names import class_of, unwrapped

__all__ = ["CONFIG_NAME", "CONFIG_NAMES", "config_files", "config_with_dtype"]

CONFIG_NAME = "config.json"
_GENERATION_NAME = "generation_config.json"
CONFIG_NAMES = (CONFIG_NAME, _GENERATION_NAME)


def config_files(model: nn.Module, dtype: torch.dtype) -> dict[str, bytes]:
    """File name -> content of the configuration files of a model; empty for models of other kinds.

    Args:
        model: the wrapped model.
        dtype: of the floating-point tensors in the folder; the configuration names it, as `from_pretrained` obeys it.
    """
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    if not isinstance(getattr(config, "model_type", None), str) or not hasattr(config, "to_json_string"):
        return {}
    try:
        record = json.loads(config.to_json_string())  # type: ignore[union-attr]
        record["architectures"] = [class_of(inner).__name__]
        found = {CONFIG_NAME: config_with_dtype(_text(record), dtype)}
        generation: Any = getattr(inner, "generation_config", None)
        if generation is not None and hasattr(generation, "to_json_string"):
            found[_GENERATION_NAME] = _text(json.loads(generation.to_json_string()))
    except (TypeError, ValueError, AttributeError) as error:  # a run must not end for want of a config.json
        warnings.warn(f"the configuration of the model is not written: {error!r}", UserWarning, stacklevel=2)
        return {}
    return found


def config_with_dtype(content: bytes, dtype: torch.dtype) -> bytes:
    """The content of a config.json, for weights of another dtype.

    Raises:
        ValueError: it is not a JSON object.
    """
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("config.json is no JSON object")
    key = "torch_dtype" if "torch_dtype" in record else "dtype"  # before and since transformers 4.56
    return _text({**record, key: str(dtype).removeprefix("torch.")})


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2, sort_keys=True).encode() + b"\n"
