"""The names of the files of weights that libraries look for in a folder. No communication.

    library                        stem                       one file               several files, and their index
    transformers, timm, the hub    model                      {stem}.safetensors     {stem}-00001-of-00002.safetensors
    diffusers                      diffusion_pytorch_model                           {stem}.safetensors.index.json
    PEFT                           adapter_model
    diffusers, of an adapter       pytorch_lora_weights

A new library's files are known everywhere once their stem is listed here. The module loads no torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = [
    "ADAPTER_STEM",
    "DIFFUSERS_STEM",
    "LORA_STEM",
    "MODEL_STEM",
    "STEMS",
    "WEIGHTS_FILE",
    "index_name",
    "one_file_name",
    "stem_in",
]

MODEL_STEM = "model"
DIFFUSERS_STEM = "diffusion_pytorch_model"
ADAPTER_STEM = "adapter_model"
LORA_STEM = "pytorch_lora_weights"
# A folder with files of several stems is read as the first of them.
STEMS = (MODEL_STEM, DIFFUSERS_STEM, ADAPTER_STEM, LORA_STEM)

# A file of weights, or the index of several.
WEIGHTS_FILE = re.compile(rf"({'|'.join(STEMS)})(\.safetensors(\.index\.json)?|-\d{{5,}}-of-\d{{5,}}\.safetensors)")


def one_file_name(stem: str) -> str:
    """The name of the file where one has all tensors."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """The name of the index of several files."""
    return f"{stem}.safetensors.index.json"


def stem_in(folder: Path) -> str | None:
    """What the names of the files of weights in a folder begin with; None if it has no such files."""
    for stem in STEMS:
        if any(os.path.lexists(folder / name) for name in (index_name(stem), one_file_name(stem))):
            return stem
    return None
