"""The form of a model folder, as the manifest records it. It says how a library names the files and the tensors.

    kind            files                                               small files beside them
    plain           model.safetensors                                   none
    transformers    model.safetensors                                   config.json, generation_config.json, code
    diffusers       diffusion_pytorch_model.safetensors                 config.json
    timm, hub       model.safetensors, always one                       config.json
    peft            adapter_model.safetensors, one for each adapter     adapter_config.json, one for each adapter
    lora            pytorch_lora_weights.safetensors, as `peft`         none: the configuration lies in the header

The module loads no torch. No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dist_ema.checks import file_name, folder_name, json_object
from dist_ema.disk.folders.contents import ADAPTER_CONFIG_NAME, OWN_FILE
from dist_ema.disk.formats.file_names import ADAPTER_STEM, DIFFUSERS_STEM, LORA_STEM, MODEL_STEM, STEMS
from dist_ema.disk.formats.headers import METADATA

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "CARD_NAME",
    "CONFIG_NAME",
    "DIFFUSERS",
    "GENERATION_NAME",
    "HUB",
    "LORA",
    "PEFT",
    "PLAIN",
    "TIMM",
    "TOP",
    "TRANSFORMERS",
    "FolderForm",
    "adapter_at_top",
    "form_from_json",
    "form_to_json",
    "path_from_top",
]

PLAIN, TRANSFORMERS, DIFFUSERS, TIMM, HUB, PEFT, LORA = (
    "plain",
    "transformers",
    "diffusers",
    "timm",
    "hub",
    "peft",
    "lora",
)
_STEM_OF = {DIFFUSERS: DIFFUSERS_STEM, PEFT: ADAPTER_STEM, LORA: LORA_STEM}
# The libraries of these kinds read one file of weights, and know no index.
_ONE_FILE = (TIMM, HUB, PEFT, LORA)

CARD_NAME = "README.md"
CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
# Beside weights that they do not describe, a library would take the folder for something that it is not.
_CONFIG_NAMES = (CONFIG_NAME, GENERATION_NAME, ADAPTER_CONFIG_NAME)

# The folder of the form itself; several adapters have folders in it.
TOP = "."
# PEFT's own name of an only adapter.
_DEFAULT = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderForm:
    """The form of the folder of one track.

    Attributes:
        kind: the kind of folder, see above.
        names: fqn -> its name in the files, where that is another one.
        folders: fqn -> the sub-folder of its file, where it does not lie at the top.
        headers: sub-folder -> what the header of the file there has beside the tensors, for its library.
        small_files: the paths of the small files below the folder.
        base_model: the name on the hub of the model that training began with; "" if it is not known.
        is_described: whether a configuration file that a user adds may describe these tensors.
    """

    kind: str = PLAIN
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    small_files: tuple[str, ...] = ()
    base_model: str = ""
    is_described: bool = True

    @property
    def stem(self) -> str:
        """What the names of the files of weights begin with."""
        return _STEM_OF.get(self.kind, MODEL_STEM)

    @property
    def is_one_file(self) -> bool:
        """Whether the weights lie in one file, however large it is."""
        return self.kind in _ONE_FILE

    @property
    def unfit(self) -> tuple[str, ...]:
        """The names of small files that would be wrong beside these tensors."""
        fit = (CONFIG_NAME, GENERATION_NAME) if self.kind in (PLAIN, TRANSFORMERS) and self.is_described else ()
        return tuple(name for name in _CONFIG_NAMES if name not in fit)

    def check_names(self, fqns: Iterable[str]) -> None:
        """Refuse names of which a file could not hold all.

        Raises:
            ValueError: two of these tensors have one name in one file, or a name is reserved.
        """
        places: dict[tuple[str, str], str] = {}
        for fqn in fqns:
            place = self.folder_of(fqn), self.name_of(fqn)
            if place in places or place[1] == METADATA:
                raise ValueError(f"{fqn[:80]!r} is called {place[1][:80]!r} in its file, as another entry is")
            places[place] = fqn

    def name_of(self, fqn: str) -> str:
        """The name of a tensor in its file."""
        return self.names.get(fqn, fqn)

    def folder_of(self, fqn: str) -> str:
        """The sub-folder of a tensor's file; `TOP` for the folder itself."""
        return self.folders.get(fqn, TOP)

    def lifted(self, fqns: Collection[str]) -> str | None:
        """The adapter that lies in a sub-folder of an average, and at the top of an export; None if there is none.

        An average in a checkpoint of the Trainer has none at its top. An export is to be loaded, so it has one there.

        Args:
            fqns: the tensors of the average.
        """
        folders = {self.folder_of(fqn) for fqn in fqns}
        return None if self.kind not in (PEFT, LORA) or TOP in folders else adapter_at_top(folders)

    def with_at_top(self, lifted: str) -> FolderForm:
        """The form in which the files of a sub-folder lie at the top, which is empty."""
        return dataclasses.replace(
            self,
            folders={fqn: folder for fqn, folder in self.folders.items() if folder != lifted},
            headers={TOP if folder == lifted else folder: header for folder, header in self.headers.items()},
            small_files=tuple(path_from_top(path, lifted) for path in self.small_files),
        )


def adapter_at_top(adapters: Collection[str]) -> str | None:
    """The adapter whose files lie at the top: an only one; of several that which PEFT's save_pretrained puts there."""
    if len(adapters) == 1:
        return next(iter(adapters))
    return _DEFAULT if _DEFAULT in adapters else None


def path_from_top(path: str, lifted: str) -> str:
    """The path of a small file when the files of a sub-folder, `lifted`, lie at the top."""
    return path.removeprefix(f"{lifted}/")


def form_to_json(form: FolderForm | None) -> Any:
    """The form as JSON: what is not empty."""
    if form is None:
        return None
    record = {
        "kind": form.kind,
        "names": dict(form.names),
        "folders": dict(form.folders),
        "headers": {folder: dict(header) for folder, header in form.headers.items()},
        "small_files": list(form.small_files),
        "base_model": form.base_model,
        "stem": form.stem,
    }
    record = {key: value for key, value in record.items() if value}
    return record if form.is_described else {**record, "is_described": False}


def form_from_json(value: object) -> FolderForm | None:
    """The form, of what `form_to_json` returned.

    Raises:
        ValueError: it is not in order, or leads out of the folder.
    """
    if value is None:
        return None
    record = json_object(value)
    names, folders = _texts(record.get("names", {})), _texts(record.get("folders", {}))
    headers = {_folder(name): _texts(header) for name, header in json_object(record.get("headers", {})).items()}
    small_files = record.get("small_files", [])
    if not isinstance(small_files, list):
        raise ValueError("the small files of the form are no list")
    form = FolderForm(
        kind=_text(record["kind"]),
        names=names,
        folders={fqn: _folder(folder) for fqn, folder in folders.items()},
        headers=headers,
        small_files=tuple(_path(name) for name in small_files),
        base_model=_text(record.get("base_model", "")),
        is_described=record.get("is_described", True) is True,
    )
    if form.stem not in STEMS or record.get("stem") != form.stem:
        raise ValueError(f"the form {form.kind[:80]!r} is not known: a newer version of dist_ema wrote it")
    return form


def _texts(value: object) -> dict[str, str]:
    return {_text(key): _text(text) for key, text in json_object(value).items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__}")
    value.encode()  # half of a surrogate pair is a ValueError
    return value


def _folder(value: str) -> str:
    return value if value == TOP else folder_name("form", value)


def _path(value: object) -> str:
    """The path of a small file: a name, or a folder and a name."""
    *folders, name = _text(value).split("/")
    if len(folders) > 1:
        raise ValueError(f"a small file has the path {_text(value)[:80]!r}")
    for folder in folders:
        folder_name("form", folder)
    # What an export writes itself, or leaves to the user: a checkpoint must not put its own there.
    if OWN_FILE.fullmatch(file_name("form", name)) or name == CARD_NAME:
        raise ValueError(f"a small file is called {name[:80]!r}, which is no name of one")
    return _text(value)
