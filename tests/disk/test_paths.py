"""Paths that are none, and names that no file or folder can carry: refused before anything is written."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import fsspec
import pytest
import torch
from tiny import HALF, averaged_once
from torch import nn
from upgrades import TRACKS

from dist_ema import (
    ConfigError,
    DistEMAError,
    PowerSchedule,
    ShardedEMA,
    UnsupportedModelError,
    consolidate_checkpoint,
    synthesize,
)
from dist_ema.checkpoint.record import manifest_of
from dist_ema.checks import absolute
from dist_ema.cli import main
from dist_ema.disk import manifest
from dist_ema.disk.formats import headers
from dist_ema.disk.formats import model_files as files


class Cached:
    """A path of another library: a URL in its own eyes, a file in a cache in those of os.fspath."""

    def __str__(self) -> str:
        return "s3://bucket/run/ema"

    def __fspath__(self) -> str:
        return "cache/ema"


URLS = [
    "s3://bucket/run/ema",
    "S3://bucket",
    " gs://bucket/x",
    "hf://me/model",
    "https://huggingface.co/me/model",
    "file:///tmp/x",
    "memory://x",
    "abfss://container@account.dfs.core.windows.net/x",
    "simplecache::s3://bucket/x",
    "az+x://y",
    str(Path("s3://bucket/run/ema")),
    Path("s3://bucket/run/ema"),
    PurePosixPath("hf://me") / "model",
    Cached(),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, beside a saved average."""
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    ema.update()
    ema.save(tmp_path / "saved")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("url", URLS, ids=str)
def test_a_url_is_no_folder_and_nothing_is_written(here, url) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    ema.update()
    saved = here.parent / "saved"
    calls = {
        "save": lambda: ema.save(url),
        "save, background": lambda: ema.save(url, background=True),
        "snapshot": lambda: ema.snapshot(url),
        "consolidate": lambda: ema.consolidate(url),
        "load": lambda: ema.load(url),
        "start_from": lambda: ema.start_from(url),
        "consolidate_checkpoint to": lambda: consolidate_checkpoint(saved, url),
        "consolidate_checkpoint from": lambda: consolidate_checkpoint(url, "out"),
        "synthesize to": lambda: synthesize(saved, url, PowerSchedule(sigma_rel=0.1)),
        "synthesize from": lambda: synthesize(url, "out", PowerSchedule(sigma_rel=0.1)),
    }
    for name, call in calls.items():
        with pytest.raises(ConfigError, match="which is a URL") as caught:
            call()
        assert "upload" in str(caught.value) or "fsspec" in str(caught.value) or "without" in str(caught.value), name
        assert "ema.stateful()" in str(caught.value) or "without 'file://'" in str(caught.value), name
    assert list(here.iterdir()) == [] and ema.num_updates == 1


def test_the_refusal_of_a_url_has_the_line_that_uploads_to_the_hub() -> None:
    for url in ("hf://me/model/sub", Path("hf://me/model")):
        with pytest.raises(ConfigError, match=r"upload_folder\(folder_path=folder, repo_id='me/model'\)"):
            ShardedEMA(nn.Linear(3, 2), HALF).save(url)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_snippet_that_the_refusal_names_saves_to_a_url_and_loads_bit_for_bit(here) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "torch.md").read_text()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FsspecWriter" in code]
    memory = fsspec.filesystem("memory")  # that of the process: the page's own test has been there
    if memory.exists("/run"):
        memory.rm("/run", recursive=True)
    names: dict = {}
    exec(snippet, names)
    saved, loaded = names["ema"].full_state_dict(), names["again"].full_state_dict()
    assert names["url"].startswith("memory://") and saved.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    assert not torch.equal(names["model"].weight, loaded["weight"]), "the average, not the live weights"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("url", ["s3://bucket/x", "hf://me/model", "file:///x"])
def test_the_command_line_refuses_urls(here, capsys, url) -> None:
    saved = str(here.parent / "saved")
    for command in (
        ["inspect", url],
        ["verify", url],
        ["consolidate", url, "out"],
        ["consolidate", saved, url],
        ["diff", saved, url],
        ["diff", url, saved],
        ["plot", url],
        ["plot", saved, "--out", url + ".png"],
        ["plot", url, "--sigma-rel", "0.1"],
        ["synthesize", "--sigma-rel", "0.1", url, "out"],
        ["synthesize", "--sigma-rel", "0.1", saved, url],
    ):
        assert main(command) == 1, command
        assert "which is a URL" in capsys.readouterr().err, command
    assert list(here.iterdir()) == []


def refuses_alike(folder: str) -> str:
    before = os.getcwd()
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    ema.update()
    os.chdir(folder)
    try:
        with pytest.raises(ConfigError) as caught:
            ema.save("s3://bucket/x")
    finally:
        os.chdir(before)
    return str(caught.value)


def test_every_rank_refuses_a_url_in_the_same_words(here, world) -> None:
    told = world(2).run(refuses_alike, str(here))
    assert told[0] == told[1] and "which is a URL" in told[0] and list(here.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a:b/c", "./s3:x", "C:/models/x", "a:b", "s3:x/y", "x y/é", "10:30", "a/s3:/b", "-x", "a//b", "1s3:/x"]
)
def test_odd_names_of_local_folders_are_taken(here, name) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    ema.update()
    for given in (name, Path(name)):
        ema.save(given)
        ema.load(given)
    assert (here / name / "manifest.json").exists()
    ema.save(here / "s3:" / "bucket")  # by its absolute path, whatever its name
    assert absolute("~").is_absolute() and (here / "s3:" / "bucket" / "manifest.json").exists()


@pytest.mark.parametrize("path", [b"x", "", None, 7, "a\0b", "a\ud800b", ["x"]], ids=repr)
def test_what_is_no_path_is_refused(here, path) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    for call in (ema.save, ema.load, ema.consolidate, ema.start_from):
        with pytest.raises(ConfigError, match="expected the name of a folder"):
            call(path)
    assert list(here.iterdir()) == []


def test_a_name_too_long_for_what_is_staged_beside_it_is_refused_before_a_folder_is_made(here) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), HALF)
    saved = here.parent / "saved"
    for name in ("x" * 201, "x" * 255, "é" * 101, "x" * 5000):
        for call in (
            lambda name=name: ema.save(f"new/{name}"),
            lambda name=name: ema.consolidate(f"new/{name}"),
            lambda name=name: consolidate_checkpoint(saved, f"new/{name}"),
        ):
            with pytest.raises(ConfigError, match="expected at most 200"):
                call()
    assert list(here.iterdir()) == []
    ema.save(f"new/{'x' * 200}")


class Named(nn.Module):
    """A parameter of some name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))


def test_a_name_that_utf8_cannot_carry_is_refused_by_name_at_construction(here) -> None:
    for options in ({}, {"exclude": "half*"}):
        with pytest.raises(UnsupportedModelError, match=r"'half\\ud800', which UTF-8 cannot carry"):
            ShardedEMA(Named("ok", "half\ud800"), HALF, **options)
    tied = Named("a")
    tied.register_parameter("b\udfff", tied.a)
    with pytest.raises(UnsupportedModelError, match=r"'b\\udfff', which UTF-8"):
        ShardedEMA(tied, HALF)
    with pytest.raises(UnsupportedModelError, match="which safetensors reserves"):
        ShardedEMA(Named("__metadata__"), HALF)
    ema = ShardedEMA(Named("größe", "🙂", "a\nb", '"', "x" * 1000), HALF)
    ema.update()
    ema.save("odd")
    ema.load("odd")


def test_a_header_that_no_reader_takes_is_refused_at_construction(here, monkeypatch) -> None:
    model = Named(*(f"{index:02}" + "n" * 100 for index in range(50)))
    ema = ShardedEMA(model, HALF)
    monkeypatch.setattr(files, "LONGEST_HEADER_BYTES", 4000)
    with pytest.raises(
        UnsupportedModelError, match=r"50 tensors, and safetensors reads at most 4,000: .*smaller max_s"
    ):
        ShardedEMA(model, HALF)
    for call in (ema.save, ema.consolidate, ema.snapshot):
        with pytest.raises(UnsupportedModelError, match="smaller max_shard_size"):
            call("out")
        assert list(here.iterdir()) == []
    ema.save("out", max_shard_size=100)  # the way that is told
    ema.load("out")
    with pytest.raises(UnsupportedModelError, match="smaller max_shard_size"):
        consolidate_checkpoint("out", "export")
    assert [path.name for path in here.iterdir()] == ["out"]


@pytest.mark.parametrize("longer", [False, True])
def test_the_limit_of_a_header_is_that_of_the_reader_of_safetensors(tmp_path, longer) -> None:
    """One name, so long that the header has exactly as many bytes as may be, or 8 more."""
    (empty,) = files.lay_out_files([("", torch.float32, ())], max_shard_size="5GB", metadata={}).files
    name = "n" * (headers.LONGEST_HEADER_BYTES - len(empty.header.rstrip(b" ")) + 8 + longer)
    tensors = [(name, torch.float32, ())]
    if longer:
        with pytest.raises(UnsupportedModelError, match="at most 100,000,000"):
            files.lay_out_files(tensors, max_shard_size="5GB", metadata={})
        return
    (planned,) = files.lay_out_files(tensors, max_shard_size="5GB", metadata={}).files
    assert len(planned.header) == 8 + headers.LONGEST_HEADER_BYTES
    files.write_whole(tmp_path / "x.safetensors", planned.header, size_bytes=planned.size_bytes)
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert len(next(iter(opened.keys()))) == len(name)
    assert len(headers.read_header(tmp_path / "x.safetensors").tensors) == 1


def test_a_manifest_that_no_reader_would_take_is_refused_at_construction(monkeypatch) -> None:
    model = Named(*(f"{index:02}" + "n" * 100 for index in range(50)))
    ShardedEMA(model, TRACKS)
    size = len(manifest_of(ShardedEMA(model, TRACKS)._state, 1).to_bytes())
    monkeypatch.setattr(manifest, "LARGEST_RECORD_BYTES", size + 50 * 2 * 102)
    with pytest.raises(UnsupportedModelError, match=r"50 tensors in 2 tracks.*fewer tracks"):
        ShardedEMA(model, TRACKS)
    ShardedEMA(model, HALF)


def test_the_size_that_is_foretold_of_a_manifest_is_no_less_than_its_own(tmp_path, monkeypatch) -> None:
    ema = ShardedEMA(Named("a", "ü", "x" * 300), TRACKS)
    ema.update()
    ema.save(tmp_path / "ema")
    written = (tmp_path / "ema" / "manifest.json").stat().st_size
    files_bytes = 300  # of the names, sizes and checksums of the files
    monkeypatch.setattr(manifest, "LARGEST_RECORD_BYTES", written - files_bytes)
    with pytest.raises(DistEMAError, match=r"manifest\.json would have"):
        ShardedEMA(Named("a", "ü", "x" * 300), TRACKS)


def test_a_working_folder_that_was_removed_is_no_reason_not_to_save(tmp_path) -> None:
    averaged_once().save(tmp_path / "ema")
    (tmp_path / "gone").mkdir()
    former = os.getcwd()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        averaged_once().save(tmp_path / "ema")
        with pytest.raises(ConfigError, match="working folder was removed"):
            averaged_once().save("relative")
    finally:
        os.chdir(former)


def test_a_tensor_with_the_name_that_the_format_reserves_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(2)))
    with pytest.raises(UnsupportedModelError, match="reserves"):
        ShardedEMA(model, HALF)
