from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_ema import (
    AnnealedSchedule,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    EqualSchedule,
    HalfLifeSchedule,
    InverseGammaSchedule,
    LinearSchedule,
    MergeSchedule,
    PowerSchedule,
    RampSchedule,
    ShardedEMA,
    after,
    chain,
    every,
    scaled_batch,
)
from dist_ema.schedules.base import rebuilding
from dist_ema.schedules.records import SCHEDULES, schedule_from_json, schedule_to_json

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "cosine_ema.json").read_text())
GOLDEN_MOMENTA = json.loads((GOLDEN_FOLDER / "schedules.json").read_text())  # written by make_schedules.py beside it
NAMES = {name: each.call for name, each in SCHEDULES.items()}


@pytest.mark.parametrize("case", GOLDEN_MOMENTA, ids=lambda case: f"{case['tool']}-{case['float']}-{case['ours']}")
def test_momentum_is_that_of_the_tool_the_schedule_is_from(case) -> None:
    schedule = eval(case["ours"], {"__builtins__": {}}, NAMES)
    ours = [schedule.momentum(step) for step in case["steps"]]
    tolerance = {"float64": 1e-12, "float32": 1e-7}[case["float"]]
    assert ours == pytest.approx(case["momentum"], rel=0, abs=tolerance)


def test_cosine_begins_at_momentum_and_ends_at_end_momentum() -> None:
    schedule = CosineSchedule(0.3, 0.02, total_steps=11)
    assert schedule.momentum(0) == pytest.approx(0.3, abs=1e-15)
    assert schedule.momentum(11) == pytest.approx(0.02, abs=1e-15)


def test_cosine_does_not_rise_again_beyond_total_steps() -> None:
    schedule = CosineSchedule(0.004, total_steps=10)
    assert schedule.momentum(12) == schedule.momentum(20) == schedule.momentum(10) == 0.0


def test_sign_of_the_published_formula_is_not_copied() -> None:
    assert CosineSchedule(0.004, 0.0, total_steps=10).momentum(0) == 0.004


def test_decay_is_one_minus_momentum() -> None:
    assert ConstantSchedule(decay=0.75) == ConstantSchedule(momentum=0.25)
    assert ConstantSchedule(decay=0.999).momentum(7) == pytest.approx(0.001)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineSchedule(0.0, total_steps=10),
        lambda: CosineSchedule(1.0, total_steps=10),
        lambda: CosineSchedule(math.nan, total_steps=10),
        lambda: CosineSchedule("0.1", total_steps=10),
        lambda: CosineSchedule(0.1, -0.1, total_steps=10),
        lambda: CosineSchedule(0.1, 1.1, total_steps=10),
        lambda: CosineSchedule(0.1, total_steps=0),
        lambda: CosineSchedule(0.1, total_steps=2.5),
        lambda: CosineSchedule(0.1, total_steps=True),
        lambda: ConstantSchedule(),
        lambda: ConstantSchedule(decay=0.9, momentum=0.1),
        lambda: ConstantSchedule(decay=1.0),
        lambda: ConstantSchedule(momentum=0.0),
    ],
)
def test_values_out_of_range_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_momentum_that_looks_like_a_decay_warns() -> None:
    with pytest.warns(UserWarning, match=r"did you mean momentum=0\.001") as caught:
        ConstantSchedule(momentum=0.999)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"did you mean decay=0\.999"):
        ConstantSchedule(decay=0.001)
    with pytest.warns(UserWarning, match=r"did you mean momentum=0\.004"):
        CosineSchedule(0.996, total_steps=10)


@pytest.mark.parametrize("schedule", [CosineSchedule(0.1, 0.01, total_steps=5), ConstantSchedule(decay=0.9)])
def test_schedules_survive_json(schedule) -> None:
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule


def test_schedules_are_frozen_and_hashable() -> None:
    schedule = CosineSchedule(total_steps=5)
    with pytest.raises(AttributeError):
        schedule.total_steps = 6
    assert hash(schedule) == hash(CosineSchedule(total_steps=5))
    assert eval(repr(schedule)) == schedule


def test_unknown_schedule_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="rebuilt"):
        schedule_from_json({"type": "os.system"})


class _Golden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"interval{case['interval']}-buffers{case['update_buffers']}")
def test_golden_trajectories_of_the_reference(case) -> None:
    model = _Golden()
    ema = ShardedEMA(
        model,
        CosineSchedule(case["momentum"], case["end_momentum"], total_steps=case["total_steps"]),
        interval=case["interval"],
        update_buffers=case["update_buffers"],
        dtype=torch.float64,
    )
    for live, averaged in zip(case["source"], case["averaged"], strict=True):
        with torch.no_grad():
            model.w.copy_(torch.tensor(live["w"], dtype=torch.float64))
            model.running.copy_(torch.tensor(live["running"], dtype=torch.float64))
            model.count.fill_(live["count"])
        ema.update()
        state = ema.full_state_dict()
        for name in ("w", "running"):
            expected = torch.tensor(averaged[name], dtype=torch.float64)
            torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-7)
        # The reference freezes integer buffers after the first call when it averages buffers (its bug); ours follow.
        assert state["count"].item() == live["count"]


def test_published_values_of_warm_ups() -> None:
    """From the documentation of diffusers and timm: what a power reaches after how many steps."""
    told = [(2 / 3, 31_600, 0.999), (2 / 3, 10**6, 0.9999), (3 / 4, 10_000, 0.999), (3 / 4, 215_400, 0.9999)]
    for power, step, decay in told:
        schedule = InverseGammaSchedule(power=power, max_decay=0.999999)
        assert 1 - schedule.momentum(step) == pytest.approx(decay, rel=2e-6)


# Computed from the cubic with 50 digits; 0.05 and 0.10 are the profiles that the paper tracks.
GAMMAS = {0.05: 16.97219, 0.075: 10.28912, 0.10: 6.93723, 0.15: 3.55789, 0.20: 1.82623, 0.25: 0.71984}


@pytest.mark.parametrize("sigma_rel", GAMMAS)
def test_power_functions_have_the_width_they_are_given(sigma_rel) -> None:
    schedule = PowerSchedule(sigma_rel=sigma_rel)
    assert schedule.gamma == pytest.approx(GAMMAS[sigma_rel], abs=1e-4)
    assert schedule.sigma_rel == pytest.approx(sigma_rel, rel=1e-13)
    gamma = schedule.gamma
    assert gamma**3 + 7 * gamma**2 + (16 - sigma_rel**-2) * gamma + 12 - sigma_rel**-2 == pytest.approx(0, abs=1e-9)
    assert schedule.momentum(0) == 1.0 and schedule.momentum(1) == pytest.approx(1 - 0.5 ** (gamma + 1), rel=1e-12)


def weights_after(schedule, num_steps: int) -> list[float]:
    """Weight of each update's observation in the average after `num_steps` of them."""
    weights = [1.0]
    for step in range(1, num_steps):
        momentum = schedule.momentum(step)
        weights = [weight * (1 - momentum) for weight in weights] + [momentum]
    return weights


def test_profiles_are_what_they_promise() -> None:
    steps = 2000
    power = weights_after(PowerSchedule(gamma=6.94), steps)
    for step in (500, 1000, 1900):
        assert power[step] / power[-1] == pytest.approx(((step + 1) / steps) ** 6.94, rel=0.02)
    mean = sum((step + 0.5) * weight for step, weight in enumerate(power)) / steps
    variance = sum(((step + 0.5) / steps - mean) ** 2 * weight for step, weight in enumerate(power))
    assert math.sqrt(variance) == pytest.approx(PowerSchedule(gamma=6.94).sigma_rel, rel=0.01)
    assert weights_after(EqualSchedule(), 50) == pytest.approx([1 / 50] * 50, rel=1e-12)
    assert PowerSchedule(gamma=0).momentum(41) == pytest.approx(EqualSchedule().momentum(41), rel=1e-12)
    half_life = weights_after(ConstantSchedule(half_life_steps=20), 100)
    assert half_life[79] / half_life[99] == pytest.approx(0.5, rel=1e-12)


def test_half_life_of_a_fraction_is_that_of_torchtitan_and_the_ramp_of_edm2() -> None:
    schedule = HalfLifeSchedule(fraction=0.05)
    assert schedule.momentum(999) == pytest.approx(1 - 2 ** (-1 / 50), rel=1e-12)
    ramp = HalfLifeSchedule(fraction=0.09, max_half_life_steps=30)
    assert ramp.momentum(99) == pytest.approx(1 - 0.5 ** (1 / 9), rel=1e-12)
    assert ramp.momentum(10**6) == pytest.approx(1 - 0.5 ** (1 / 30), rel=1e-12)


def test_equal_weights_are_those_of_torch() -> None:
    values = torch.randn(7, 3, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    theirs = torch.optim.swa_utils.AveragedModel(model)
    ours = ShardedEMA(model, EqualSchedule(), dtype=torch.float64)
    for value in values:
        with torch.no_grad():
            model.weight.copy_(value)
        theirs.update_parameters(model)
        ours.update()
    expected = theirs.module.weight.detach()
    torch.testing.assert_close(ours.full_state_dict()["weight"], expected, rtol=0, atol=1e-12)


def test_a_chain_asks_the_schedule_of_the_part_with_a_count_of_its_own() -> None:
    warm_up, rest = LinearSchedule(0.4, 0.0, total_steps=4), CosineSchedule(0.3, 0.1, total_steps=10)
    schedule = chain((0, warm_up), (4, rest))
    momenta = [schedule.momentum(step) for step in range(20)]
    expected = [warm_up.momentum(step) for step in range(4)] + [rest.momentum(step) for step in range(16)]
    assert momenta == expected and momenta[4] == 0.3 and schedule.total_steps == 14
    assert chain((0, rest), (9, EqualSchedule())).total_steps is None


def test_a_half_life_in_tokens_is_that_in_updates() -> None:
    assert ConstantSchedule(half_life=2e9, per_step=4e6) == ConstantSchedule(half_life_steps=500)
    with pytest.raises(ConfigError, match="expected per_step beside it"):
        ConstantSchedule(half_life=2e9)
    in_images = HalfLifeSchedule(fraction=0.05, max_half_life=500_000, per_step=250)
    assert in_images == HalfLifeSchedule(fraction=0.05, max_half_life_steps=2000)


def test_a_repr_shows_what_was_given() -> None:
    """0.999 as a momentum is 0.0010000000000000009, which nobody has written."""
    assert repr(ConstantSchedule(decay=0.999)) == "ConstantSchedule(decay=0.999)"
    assert repr(ConstantSchedule(half_life=50, per_step=2)) == "ConstantSchedule(half_life=50.0, per_step=2.0)"
    assert repr(PowerSchedule(sigma_rel=0.1)) == "PowerSchedule(sigma_rel=0.1)"
    assert repr(after(5, PowerSchedule(gamma=2))) == "after(5, PowerSchedule(gamma=2.0))"


def test_a_decay_without_its_name_is_told_apart_from_a_momentum() -> None:
    with pytest.raises(ConfigError, match=r"was given 0\.999 without a name, .*decay=0\.999 .*momentum=0\.001"):
        ConstantSchedule(0.999)


def test_a_large_momentum_that_nobody_takes_for_a_decay_gives_no_warning(recwarn) -> None:
    """A reference model that follows in steps of 0.6, and a hard copy on every n-th update."""
    schedules = [ConstantSchedule(momentum=0.6), ConstantSchedule(momentum=1.0), LinearSchedule(0.8, total_steps=3)]
    assert [schedule.momentum(1) for schedule in schedules[:2]] == [0.6, 1.0] and not recwarn.list
    live = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(live, ConstantSchedule(momentum=1.0), interval=3)
    seen = []
    for step in range(7):
        with torch.no_grad():
            live.weight.fill_(float(step))
        ema.update()
        seen.append(ema.full_state_dict()["weight"].item())
    assert seen == [0, 0, 0, 3, 3, 3, 6] and not recwarn.list


def test_after_copies_until_its_step_and_counts_anew() -> None:
    schedule = after(10, EqualSchedule())
    assert [schedule.momentum(step) for step in (0, 9, 10, 11, 12)] == [1, 1, 1, 1 / 2, 1 / 3]


def test_every_forgets_as_much_as_the_updates_it_stands_for() -> None:
    constant = every(10, ConstantSchedule(decay=0.9999))
    assert constant.momentum(15) == 0.0 and constant.momentum(20) == pytest.approx(1 - 0.9999**10, rel=1e-12)
    inner = HalfLifeSchedule(fraction=0.5)
    kept = math.prod(1 - inner.momentum(step) for step in range(37, 41))
    assert every(4, inner).momentum(40) == pytest.approx(1 - kept, rel=1e-12)
    assert every(4, EqualSchedule()).momentum(0) == 1.0


def test_a_scaled_batch_raises_the_decay_to_its_power() -> None:
    schedule = scaled_batch(8, ConstantSchedule(decay=0.9995))
    assert schedule.momentum(5) == pytest.approx(1 - 0.9995**8, rel=1e-12)
    assert scaled_batch(2, EqualSchedule()).momentum(0) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantSchedule(half_life_steps=0),
        lambda: ConstantSchedule(decay=0.5, half_life_steps=3),
        lambda: AnnealedSchedule(gamma=0),
        lambda: InverseGammaSchedule(power=-1),
        lambda: InverseGammaSchedule(max_decay=1.0),
        lambda: RampSchedule(min_decay=0.9, max_decay=0.5),
        lambda: RampSchedule(update_after_step=1.5),
        lambda: PowerSchedule(),
        lambda: PowerSchedule(sigma_rel=0.1, gamma=3),
        lambda: PowerSchedule(sigma_rel=0.3),
        lambda: PowerSchedule(sigma_rel=0.0),
        lambda: PowerSchedule(gamma=-1),
        lambda: ConstantSchedule(half_life=5),
        lambda: ConstantSchedule(half_life=5, per_step=0),
        lambda: ConstantSchedule(decay=0.5, per_step=2),
        lambda: ConstantSchedule(momentum=1.5),
        lambda: HalfLifeSchedule(max_half_life=5),
        lambda: HalfLifeSchedule(max_half_life=5, per_step=1, max_half_life_steps=3),
        lambda: LinearSchedule(1.1, total_steps=5),
        lambda: chain(),
        lambda: chain(EqualSchedule()),
        lambda: chain((1, EqualSchedule())),
        lambda: chain((0, EqualSchedule()), (0, EqualSchedule())),
        lambda: chain((0, EqualSchedule()), (5, 0.9)),
        lambda: chain((False, EqualSchedule())),
        lambda: MergeSchedule("quadratic", num_steps=5),
        lambda: MergeSchedule("linear", num_steps=0),
        lambda: MergeSchedule("linear", num_steps=5, start_step=-1),
        lambda: HalfLifeSchedule(fraction=0),
        lambda: HalfLifeSchedule(max_half_life_steps=-1),
        lambda: after(0, EqualSchedule()),
        lambda: after(5, EqualSchedule),
        lambda: every(2.5, EqualSchedule()),
        lambda: scaled_batch(0, EqualSchedule()),
        lambda: scaled_batch(2, 0.99),
    ],
)
def test_values_out_of_range_of_the_further_schedules_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


FURTHER = [
    AnnealedSchedule(0.001, gamma=50),
    ConstantSchedule(half_life_steps=1000),
    EqualSchedule(),
    HalfLifeSchedule(fraction=0.1, max_half_life_steps=500),
    InverseGammaSchedule(inv_gamma=2.0, power=0.7, update_after_step=4),
    PowerSchedule(sigma_rel=0.1),
    RampSchedule(max_decay=0.99),
    after(100, every(10, EqualSchedule())),
    chain((0, LinearSchedule(0.3, 0.1, total_steps=5)), (5, after(3, EqualSchedule())), (150, PowerSchedule(gamma=2))),
    ConstantSchedule(half_life=2e9, per_step=4e6),
    ConstantSchedule(momentum=1.0),
    MergeSchedule("cosine", num_steps=90, start_step=12),
    PowerSchedule(gamma=-0.5),
    scaled_batch(4.0, CosineSchedule(0.1, total_steps=9)),
]


@pytest.mark.parametrize("schedule", FURTHER, ids=repr)
def test_further_schedules_survive_json_and_repr_and_stay_within_0_and_1(schedule) -> None:
    again = schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule))))
    assert again == schedule == eval(repr(schedule)) and hash(again) == hash(schedule)
    assert all(0.0 <= schedule.momentum(step) <= 1.0 for step in (0, 1, 2, 3, 10, 99, 100, 101, 10**9))
    assert [again.momentum(step) for step in range(200)] == [schedule.momentum(step) for step in range(200)]
    with pytest.raises(AttributeError):
        schedule.schedule = None


def test_a_record_that_is_too_deep_or_incomplete_is_refused() -> None:
    record: dict = {"type": "EqualSchedule"}
    for _ in range(50):
        record = {"type": "every", "num_steps": 2, "schedule": record}
    for bad in (record, {"type": "every", "num_steps": 2}, {"type": ["every"]}, {"type": "PowerSchedule", "x": 1}):
        with pytest.raises(ConfigError):
            schedule_from_json(bad)


def test_a_schedule_that_could_not_be_read_back_is_refused_when_it_is_made() -> None:
    """A checkpoint of it would be refused at the resume, when it is too late."""
    for arguments in ({"decay": 1e-300}, {"half_life_steps": 1e-3}):
        with pytest.raises(ConfigError, match="in float64"):
            ConstantSchedule(**arguments)
    deepest = ConstantSchedule(momentum=0.1)
    for _ in range(20):
        deepest = after(1, deepest)
    assert schedule_from_json(schedule_to_json(deepest)) == deepest
    with pytest.raises(ConfigError, match="more than 20 schedules"):
        scaled_batch(2.0, deepest)
    with pytest.raises(ConfigError, match="at most 1,000,000"):
        every(10**6 + 1, ConstantSchedule(momentum=0.1))
    for build in (lambda: CosineSchedule(total_steps=10**400), lambda: RampSchedule(update_after_step=10**5000)):
        with pytest.raises(ConfigError, match=r"below 2\^63"):
            build()


def test_after_an_interrupt_while_a_record_was_read_schedules_warn_as_before() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuilding(interrupted)
    with pytest.warns(UserWarning, match="usually small"):
        ConstantSchedule(momentum=0.999)


def test_a_reader_is_not_warned_of_what_the_user_was_warned_of(recwarn) -> None:
    with pytest.warns(UserWarning, match="usually small"):
        large = ConstantSchedule(momentum=0.9)
    recwarn.clear()
    assert schedule_from_json(schedule_to_json(large)) == large
    assert schedule_from_json({"type": "CosineSchedule", "momentum": 0.6, "total_steps": 1e9}).total_steps == 10**9
    assert not recwarn.list
