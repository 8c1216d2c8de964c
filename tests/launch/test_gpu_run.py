"""`launch/gpu.sh` may have one chance: what fails in it must neither stop the rest nor be missing from its table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "launch" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a file of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCH))

    def imported(name: str):
        if name in sys.modules and Path(sys.modules[name].__file__ or "").parent == BENCH:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return imported


@pytest.fixture
def run(bench, tmp_path):
    """What came of a part that is this code of Python."""
    Part, gpu_run = bench("gpu_parts").Part, bench("gpu_run")

    def result(code: str, *, limit_seconds: float = 60, device: str = "cpu", command=()) -> dict:
        with (tmp_path / "log").open("w") as log:
            part = Part("part", "what it shows", command or ("-c", code), limit_seconds)
            return gpu_run.run(part, limit_seconds, tmp_path, log.fileno(), device)

    return result


def test_a_dry_run_shows_what_failed_and_what_hung_and_runs_the_rest(tmp_path) -> None:
    command = ["bash", ROOT / "launch" / "gpu.sh", "--dry-run", "--only", "fails,hangs,tests,files", "out"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # two parts are at fault on purpose
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    outcomes = {part["part"]: (part["outcome"], part["result"]) for part in told["parts"]}
    assert outcomes["fails"] == ("failed", "RuntimeError: fails on purpose")
    assert outcomes["hangs"] == ("failed", "ended after 2 s")
    assert outcomes["files"] == ("ok", "")
    assert outcomes["tests"][0] == "ok" and outcomes["tests"][1].endswith(" skipped")
    assert {"card", "driver", "versions", "date", "commit"} <= told.keys()
    page = (tmp_path / "out" / "results.md").read_text()
    for name, (outcome, result) in outcomes.items():
        assert any(f"| {name} |" in line and f"| {outcome} |" in line and result in line for line in page.splitlines())
    assert "## files: small, fsdp2, 1 ranks, cpu" in page and "| ShardedEMA.save |" in page
    assert "time.sleep(600)" not in page
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "fails on purpose" in log and "Fatal Python error: Aborted" in log  # where it hung


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_has_options_that_its_benchmark_knows(monkeypatch, bench, tmp_path, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_and_stop(parser, arguments) -> None:
        parse(parser, arguments)
        raise Parsed

    of_files = [part for part in bench("gpu_parts").parts(device, small=device == "cpu") if part.command[0][0] != "-"]
    modules = [bench(Path(part.command[0]).stem) for part in of_files]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for part, module in zip(of_files, modules, strict=True):
        with pytest.raises(Parsed):
            module.main([argument.replace("{json}", str(tmp_path / "told.json")) for argument in part.command[1:]])
    assert len(of_files) == 10 and "--device" in of_files[0].command


def test_the_limits_of_the_parts_leave_time_for_the_most_important_ones(bench) -> None:
    parts = bench("gpu_parts").parts("cuda", small=False)
    assert (
        sum(part.limit_seconds for part in parts[:6]) <= 470
    )  # all tests, updates and steps, should each take longest


def test_what_cannot_be_imported_is_told_apart_from_what_fails(run) -> None:
    assert run("import nowhere_to_be_found")["outcome"] == "not importable"
    assert run("1 / 0")["outcome"] == "failed"
    result = run("", command=("-c", "open('{json}', 'w').write('{')"))
    assert result["outcome"] == "failed" and result["result"].startswith("JSONDecodeError")


def test_no_part_begins_when_time_is_up(run, tmp_path) -> None:
    result = run(f"open({str(tmp_path / 'begun')!r}, 'w')", limit_seconds=0)
    assert (result["outcome"], result["result"]) == ("not run", "no time was left")
    assert not (tmp_path / "begun").exists()


def test_the_children_of_a_part_that_hangs_are_ended_with_it(run, tmp_path) -> None:
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    assert run(code, limit_seconds=2)["outcome"] == "failed"
    size = beat.stat().st_size
    time.sleep(0.3)
    assert size and beat.stat().st_size == size


def test_on_a_gpu_tests_that_were_all_skipped_have_failed(bench, tmp_path) -> None:
    gpu_run, parts = bench("gpu_run"), bench("gpu_parts").parts
    record = tmp_path / "record.xml"
    record.write_text("<testsuites><testsuite><testcase name='a'><skipped/></testcase></testsuite></testsuites>")
    (part,) = (part for part in parts("cuda", small=False) if part.is_of_tests)
    assert gpu_run.judged(part, 0, record, "", "cuda")["outcome"] == "failed"
    assert gpu_run.judged(part, 0, record, "", "cpu")["outcome"] == "ok"


def test_a_failed_test_is_in_the_table_with_its_error(bench, tmp_path) -> None:
    gpu_run, parts = bench("gpu_run"), bench("gpu_parts").parts
    record = tmp_path / "record.xml"
    record.write_text(
        "<testsuite><testcase name='good'/><testcase name='bad'><failure message='AssertionError: late&#10;x'/>"
        "</testcase></testsuite>"
    )
    (part,) = (part for part in parts("cuda", small=False) if part.is_of_tests)
    found = gpu_run.judged(part, 1, record, "1 failed, 1 passed", "cuda")
    assert found["outcome"] == "failed"
    assert found["result"] == "1 passed, 1 failed, 0 skipped; bad: AssertionError: late"
