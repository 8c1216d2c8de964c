"""Files of torch.save are read for their tensors alone: no code of theirs runs, and a damaged one is an error."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_ema import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, ConstantSchedule, ShardedEMA

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([7.0, 8.0])}


def average() -> ShardedEMA:
    return ShardedEMA(nn.Linear(3, 2), ConstantSchedule(momentum=0.5))


def begun(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    ema = average()
    ema.start_from(path, **options)
    return ema.full_state_dict()


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "hacked"),)


def test_the_advice_for_a_module_that_was_pickled_whole_can_be_followed(tmp_path, monkeypatch) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2))[0], tmp_path / "module.pt")
    with pytest.raises(CheckpointCorruptError, match="those of a module") as refused:
        begun(tmp_path / "module.pt")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in str(refused.value).splitlines()[1:]), {"torch": torch})
    begun(tmp_path / "average.pt")


def test_a_folder_of_model_folders_says_which_it_has(tmp_path) -> None:
    for name in ("unet", "unet_ema"):
        (tmp_path / name).mkdir()
        save_file(WEIGHTS, tmp_path / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointCorruptError, match=r"has folders with weights \(unet, unet_ema\): give one of these"):
        begun(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_a_hostile_pickle_runs_no_code(tmp_path, zipped, beside) -> None:
    content = {"state_dict": WEIGHTS, "args": Hostile(tmp_path)} if beside else Hostile(tmp_path)
    torch.save(content, tmp_path / "average.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointCorruptError, match=r"(?s)mkdir.*pickle may run code.*weights_only=False"):
        begun(tmp_path / "average.pt")
    (tmp_path / "average.pt").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointCorruptError, match="mkdir"):
        begun(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        begun(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


def test_tensors_of_any_form_are_read_whole(tmp_path) -> None:
    """Transposed, expanded, parts of one storage, of another dtype, parameters; the old form of the file."""
    storage = torch.cat([torch.zeros(5), WEIGHTS["bias"], WEIGHTS["weight"].T.reshape(-1)])
    forms = {
        "views": {"bias": storage[5:7], "weight": storage[7:].reshape(3, 2).T},
        "half": {"bias": WEIGHTS["bias"].double(), "weight": WEIGHTS["weight"].bfloat16()},
        "parameters": {name: nn.Parameter(value) for name, value in WEIGHTS.items()},
        "reversed": {"bias": WEIGHTS["bias"], "weight": WEIGHTS["weight"]},
    }
    for name, state in forms.items():
        for zipped in (True, False):
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
            found = begun(tmp_path / name)
            assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items()), (name, zipped)
    torch.save({"weight": torch.ones(()).expand(2, 3), "bias": torch.ones(()).expand(2)}, tmp_path / "expanded")
    assert all(bool((value == 1.0).all()) for value in begun(tmp_path / "expanded").values())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weight": torch.ones(2, 3).to_sparse(), "bias": torch.ones(2)}, "sparse"),
        ({"weight": torch.ones(2, 3, device="meta"), "bias": torch.ones(2)}, "on meta"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}, "I64, expected floats"),
        ({"shadow_params": [torch.ones(2, 3)], "decay": 0.9}, "matched by name.*save_pretrained"),
        ([torch.ones(2, 3), torch.ones(2)], "no tensors by name.* it is a list"),
        ({"epoch": 3, "args": argparse.Namespace(lr=0.1)}, "with the keys epoch, args"),
        (torch.ones(3), "it is a Tensor"),
        ({"n_averaged": torch.tensor(0), "module.weight": WEIGHTS["weight"], "module.bias": WEIGHTS["bias"]}, "0 upd"),
    ],
)
def test_what_is_no_average_is_named_as_what_it_is(tmp_path, content, told) -> None:
    torch.save(content, tmp_path / "average.pt")
    with pytest.raises(CheckpointMismatchError, match=told):
        begun(tmp_path / "average.pt")


def test_slices_of_ranks_scripts_and_compressed_archives_are_named(tmp_path) -> None:
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(tmp_path / "slice.pt", "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content + b"ctorch.distributed.tensor\nDTensor\n" * name.endswith("data.pkl"))
    with pytest.raises(CheckpointCorruptError, match="compressed"):
        begun(tmp_path / "small.pt")
    with pytest.raises(CheckpointMismatchError, match=r"DTensors.*full_state_dict=True"):
        begun(tmp_path / "slice.pt")


def test_a_damaged_file_is_an_error_wherever_it_is_cut_or_changed(tmp_path) -> None:
    """Or it is read: there is no checksum, so a changed value stays unseen."""
    path, chance = tmp_path / "average.pt", random.Random(0)
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path)
    good = path.read_bytes()
    refused = 0
    for attempt in range(150):
        at = chance.randrange(len(good))
        if attempt % 3 == 0:
            path.write_bytes(good[:at])
        elif attempt % 3 == 1:
            path.write_bytes(good[:at] + bytes([chance.randrange(256) for _ in range(4)]) + good[at + 4 :])
        else:
            path.write_bytes(good + good[:at])
        try:
            begun(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error), error
    assert refused > 60


def test_several_files_and_their_index_are_one_model(tmp_path) -> None:
    torch.save({"weight": WEIGHTS["weight"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"bias": WEIGHTS["bias"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    places = '"weight": "pytorch_model-00001-of-00002.bin", "bias": "pytorch_model-0000%d-of-00002.bin"'
    index.write_text('{"weight_map": {%s}}' % (places % 2))
    for path in (tmp_path, index):
        assert torch.equal(begun(path)["bias"], WEIGHTS["bias"])
    index.write_text('{"weight_map": {%s}}' % (places % 1))
    with pytest.raises(CheckpointCorruptError, match="says that 'bias' is in"):
        begun(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([".metadata", "__0_0.distcp"], "torch's DCP.*dcp_to_torch"),
        (["_CHECKPOINT_METADATA", "d"], "orbax"),
        (["saved_model.pb"], "TensorFlow"),
        (["checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"], "TensorFlow"),
        (["config.json", "flax_model.msgpack"], "Flax"),
        (["model_index.json"], "pipeline of diffusers: give the folder"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed"),
        (["average.pt"], "it has average.pt: .*start_from"),
    ],
)
def test_a_folder_of_another_library_is_named(tmp_path, names, told) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(CheckpointCorruptError, match=told):
        begun(tmp_path)
