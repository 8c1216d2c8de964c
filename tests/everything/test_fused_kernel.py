"""The kernel of `dist_ema.averaging.fused` in Triton's interpreter, on a CPU, against torch's own steps.

    PYTHONPATH=folder-with-triton pytest tests/everything/test_fused_kernel.py

The interpreter rounds a fused multiplication and addition twice, so averages are alike to a rounding unit here. On a
GPU they are the same bits (tests/test_gpu.py).
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_ema.averaging.fused.launches import Launch
from dist_ema.uninterrupted.jobs import Steps

os.environ["TRITON_INTERPRET"] = "1"
SHAPES = [(300, 7), (1,), (33,), (4096,), (4097,), (16384,), (16385,), (2, 20000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# The interpreter works with numpy, which warns of what is not a number.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]


def tensors(dtype: torch.dtype, num_rows: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    torch.manual_seed(0)
    live = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return live, [[torch.randn(shape) for shape in SHAPES] for _ in range(num_rows)]


def launch(live: list[torch.Tensor], rows: list[list[torch.Tensor]], num_tracks: int, *, skips: bool) -> Launch:
    kernel = importlib.import_module("dist_ema.averaging.fused.kernel")
    made = Launch(kernel, live, rows, num_tracks=num_tracks, skips=skips, counts=skips)
    made.make_ready(flagged=False)
    return made


def run(made: Launch, momenta: tuple[float, ...], **options: torch.Tensor | None) -> None:
    steps = Steps()
    made.add_to(steps, momenta, options.get("unless"), options.get("counter"))
    steps.run([])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momenta", [(0.001,), (0.7,), (1.0,), (0.0,), (0.001, 0.0, 0.9)], ids=str)
def test_every_element_moves_as_torch_lerps_it(dtype, momenta) -> None:
    live, rows = tensors(dtype, len(momenta))
    expected = [
        [old.lerp(new.float(), weight) if weight else old.clone() for old, new in zip(row, live, strict=True)]
        for row, weight in zip(rows, momenta, strict=True)
    ]
    run(launch(live, rows, len(momenta), skips=False), momenta)
    for value, right in zip(itertools.chain(*rows), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)


def test_a_launch_that_is_repeated_after_an_interrupt_moves_nothing_twice() -> None:
    live, rows = tensors(torch.float32, 1)
    made = launch(live, rows, 1, skips=False)
    steps = Steps()
    made.add_to(steps, (0.3,), None, None)
    steps.run([])
    once = [value.clone() for value in rows[0]]
    steps.calls[-1]()
    assert all(map(torch.equal, rows[0], once))
    steps.run([])
    assert not any(map(torch.equal, rows[0][:1], once[:1]))


def test_a_flag_that_is_set_keeps_everything_as_it_is() -> None:
    live, rows = tensors(torch.bfloat16, 1)
    former = [value.clone() for value in rows[0]]
    made, counter = launch(live, rows, 1, skips=True), torch.zeros((), dtype=torch.int64)
    live[0][0, 0] = float("nan")
    run(made, (0.5,), unless=torch.ones(1), counter=counter)
    assert all(map(torch.equal, rows[0], former)) and counter == 0
    run(made, (0.5,), unless=torch.zeros(()), counter=counter)
    assert not torch.equal(rows[0][1], former[1]) and counter == 1


@pytest.mark.parametrize("compensated", [False, True], ids=["", "compensated"])
def test_what_is_no_finite_number_is_left_out_and_counted_once(compensated) -> None:
    live, rows = tensors(torch.float16, 2)
    residuals = [[torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES] for _ in rows]
    for value, bad in zip(live, itertools.cycle([float("nan"), float("inf"), -float("inf")]), strict=False):
        value.view(-1)[-1] = bad
    former = [[value.clone() for value in row] for row in rows]
    counter = torch.zeros((), dtype=torch.int64)
    made = launch(live, rows + (residuals if compensated else []), 2, skips=True)
    run(made, (0.1, 0.2), counter=counter)
    assert counter == len(SHAPES)
    for row, old in zip(rows, former, strict=True):
        for value, before in zip(row, old, strict=True):
            assert value.isfinite().all() and value.view(-1)[-1] == before.view(-1)[-1]
            assert value.numel() == 1 or not torch.equal(value.view(-1)[:-1], before.view(-1)[:-1])


def test_residuals_keep_what_a_step_lost() -> None:
    live, rows = tensors(torch.float32, 1)
    rows = [[value * 1000 for value in row] for row in rows]
    residuals = [[torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES]]
    exact = [value.double() for value in rows[0]]
    made, weight = launch(live, rows + residuals, 1, skips=False), 1e-5
    plain = [value.clone() for value in rows[0]]
    for _ in range(30):
        run(made, (weight,))
        exact = [old.lerp(new.double(), weight) for old, new in zip(exact, live, strict=True)]
        plain = [old.lerp(new, weight) for old, new in zip(plain, live, strict=True)]
    for value, lost, right, without in zip(rows[0], residuals[0], exact, plain, strict=True):
        error = (value.double() + lost.double() - right).abs().mean()
        assert value.numel() == 1 or error < 0.2 * (without.double() - right).abs().mean()
    run(made, (1.0,))
    assert all(map(torch.equal, rows[0], live)) and not any(lost.any() for lost in residuals[0])


def test_tensors_at_odd_addresses_move_too() -> None:
    whole, row = torch.randn(50_001).bfloat16(), torch.randn(50_001)
    live, averaged = whole[1:], row[3:]
    live, averaged = live[: averaged.numel()], averaged
    expected = averaged.lerp(live.float(), 0.25)
    first = row[:3].clone()
    run(launch([live], [[averaged]], 1, skips=False), (0.25,))
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(row[:3], first)


@pytest.mark.parametrize("capability", [80, 90, 100], ids=["A100", "H100", "B200"])
def test_the_kernel_compiles_for_the_gpus_in_use(capability) -> None:
    """Without a GPU: vectors where addresses allow them, and one rounding where torch's lerp has one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compiled_kernel.py"), str(capability)]
    subprocess.run(command, env=environment, check=True, timeout=300)
