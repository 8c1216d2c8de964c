"""An average in the Trainer of transformers, and of TRL: nothing is lost, and training stays as it is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from trained import DATA, MOMENTUM, Naive, StopAt, assert_alike, folders, outcome, tiny_gpt2, trainer_of, whole
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from dist_ema import (
    AttachError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    ConstantSchedule,
    CosineSchedule,
    ShardedEMA,
)
from dist_ema.integrations import watch
from dist_ema.integrations.trainer import engine_of
from dist_ema.integrations.transformers import EMACallback

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
SCHEDULE = ConstantSchedule(momentum=MOMENTUM)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Trainers leave accelerate's state in the process."""
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if _ == 0:
            yield


def averaged(callback: EMACallback, track: str | None = None) -> dict[str, torch.Tensor]:
    assert callback.ema is not None
    tensors = callback.ema.full_state_dict(track)
    return {name: value for name, value in tensors.items() if name != "lm_head.weight"}


def test_a_run_in_a_trainer_loses_nothing(tmp_path) -> None:
    """The naive average with accumulated batches; resumed as never stopped; rotation takes averages along."""
    whole_run, naive = EMACallback(SCHEDULE), Naive()
    uncut = trainer_of(tmp_path / "uncut", whole_run, naive, save_total_limit=1)
    uncut.train()
    assert whole_run.ema is not None and whole_run.ema.num_updates == 8
    assert_alike(averaged(whole_run), naive.average.values)
    assert folders(tmp_path / "uncut") == {"checkpoint-8": True}

    first = EMACallback(SCHEDULE)
    trainer_of(tmp_path / "cut", first, StopAt(5)).train()
    assert first.ema is not None and first.ema.num_updates == 5
    assert folders(tmp_path / "cut") == {"checkpoint-2": True, "checkpoint-4": True}
    second = EMACallback(SCHEDULE)
    resumed = trainer_of(tmp_path / "cut", second, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert_alike(averaged(second), averaged(whole_run))
    assert_alike(outcome(resumed), outcome(uncut), without=("losses",))
    assert folders(tmp_path / "cut") == {"checkpoint-6": True, "checkpoint-8": True}
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("evaluated", ["averaged", "both"])
def test_training_is_bit_for_bit_what_it_is_without_the_callback(tmp_path, evaluated) -> None:
    plain = trainer_of(tmp_path / "plain", save_strategy="no")
    plain.train()
    without = outcome(plain)
    other = trainer_of(tmp_path / "other", EMACallback(SCHEDULE, evaluate=evaluated), save_strategy="no")
    other.train()
    assert_alike(outcome(other), without)
    losses = [[each["eval_loss"] for each in run.state.log_history if "eval_loss" in each] for run in (plain, other)]
    assert (losses[0] == losses[1]) == (evaluated == "both")


def loss_of(model: torch.nn.Module, folder: Path) -> float:
    return trainer_of(folder, model=model).evaluate()["eval_loss"]


def test_evaluate_and_predict_show_the_average_also_after_training_and_put_the_live_weights_back(tmp_path) -> None:
    callback = EMACallback(SCHEDULE)
    trainer = trainer_of(tmp_path, callback, save_strategy="no")
    assert trainer.evaluate()["eval_loss"] == loss_of(tiny_gpt2(), tmp_path)
    trainer.train()
    live, average = whole(trainer.model), tiny_gpt2()
    average.load_state_dict(averaged(callback), strict=False)
    expected, of_live = loss_of(average, tmp_path), loss_of(trainer.model, tmp_path)
    assert expected != of_live
    assert trainer.evaluate()["eval_loss"] == expected
    assert trainer.predict(DATA[:6]).metrics["test_loss"] == expected
    with mock.patch.object(trainer.model, "forward", side_effect=KeyError), pytest.raises(KeyError):
        trainer.evaluate()
    assert_alike(whole(trainer.model), live)
    trainer.remove_callback(callback)
    assert trainer.evaluate()["eval_loss"] == of_live
    assert "evaluation_loop" not in vars(trainer)


def test_with_both_one_record_has_live_and_averaged_metrics_of_every_dataset(tmp_path) -> None:
    seen: list[set[str]] = []

    class Sees(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **others) -> None:
            seen.append({key for key in metrics if key.endswith("loss")})

    trainer = trainer_of(
        *(tmp_path, EMACallback(SCHEDULE, evaluate="both"), Sees(), EarlyStoppingCallback(1)),
        beside={"eval_dataset": {"books": DATA[:4], "code": DATA[4:8]}},
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_books_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4  # the averaged loss falls, so the first evaluation stays the best
    assert seen[:2] == [{"eval_books_loss", "eval_ema_books_loss"}, {"eval_code_loss", "eval_ema_code_loss"}]
    assert len(seen) == 2 * 2
    records = [record for record in trainer.state.log_history if "eval_books_loss" in record]
    assert len(records) == 2 and all("eval_ema_books_loss" in record for record in records)
    assert set(trainer.predict(DATA[:4]).metrics) >= {"test_loss", "test_ema_loss"}


@pytest.mark.parametrize(
    ("evaluated", "metric", "is_averaged"),
    [("averaged", "loss", True), ("both", "eval_ema_loss", True), ("both", "loss", False), ("live", "loss", False)],
)
def test_the_best_weights_come_back_from_the_side_that_was_measured(tmp_path, evaluated, metric, is_averaged) -> None:
    callback, naive = EMACallback(SCHEDULE, evaluate=evaluated, consolidate=True), Naive()
    lived: dict[int, dict[str, torch.Tensor]] = {}

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **others) -> None:
            lived[state.global_step] = whole(model)

    trainer = trainer_of(
        *(tmp_path, callback, naive, Keeps()),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        max_steps=6,
        save_total_limit=1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best == 2
    assert_alike(whole(trainer.model), naive.at[best] if is_averaged else lived[best])
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "ema")
    assert_alike(whole(exported), naive.at[best if is_averaged else 6])
    metrics = trainer.evaluate()
    assert metrics[f"eval_{metric.removeprefix('eval_')}"] == pytest.approx(trainer.state.best_metric)
    assert folders(tmp_path) == {"checkpoint-2": True, "ema": False}


def test_a_further_train_and_one_begun_again_after_a_lack_of_memory_begin_a_new_average(tmp_path) -> None:
    steps: list[int] = []
    callback = EMACallback(lambda number: steps.append(number) or CosineSchedule(0.5, 0.1, total_steps=number))
    trainer = trainer_of(tmp_path, callback, auto_find_batch_size=True, save_strategy="no", max_steps=4)
    step, calls = trainer.training_step, []

    def short_of_memory(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:  # after two updates
            raise RuntimeError("CUDA out of memory.")
        return step(*args)

    with mock.patch.object(trainer, "training_step", short_of_memory):
        trainer.train()
    former = callback.ema
    assert former is not None and former.num_updates == 4 and trainer.state.train_batch_size == 1
    trainer.train()
    assert callback.ema is not former and callback.ema is not None and callback.ema.num_updates == 4
    assert former.num_updates == 4 and steps == [4, 4, 4]

    naive = Naive()
    trainer.remove_callback(callback)
    third = EMACallback(SCHEDULE)
    for added in (third, naive):
        trainer.add_callback(added)
    trainer.train()
    assert_alike(averaged(third), naive.average.values)
    assert callback.ema.num_updates == 4


def test_only_real_steps_count(tmp_path) -> None:
    """Those that a GradScaler skips never reach the torch optimizer."""
    callback = EMACallback(SCHEDULE)

    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **others) -> None:
            optimizer.gradient_state._set_sync_gradients(state.global_step % 2 == 0)

    trainer_of(tmp_path, callback, Skips(), save_strategy="no").train()
    assert callback.ema is not None and callback.ema.num_updates == 4


def saved_run(folder: Path, *callbacks: TrainerCallback) -> None:
    trainer_of(folder, *callbacks, max_steps=2, eval_strategy="no").train()


def test_a_checkpoint_without_the_average_stops_the_resume_unless_it_may_begin_anew(tmp_path, caplog) -> None:
    saved_run(tmp_path)

    def resume(callback: EMACallback) -> EMACallback:
        trainer_of(tmp_path, callback, max_steps=4, eval_strategy="no").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
        return callback

    with pytest.raises(CheckpointNotFoundError, match="on_missing='live'"):
        resume(EMACallback(SCHEDULE))
    ema = resume(EMACallback(SCHEDULE, on_missing="live")).ema
    assert ema is not None and ema.num_updates == 2 and "holds no average" in caplog.text
    (tmp_path / "checkpoint-2" / ".ema.staging-0123456789abcdef").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="cut off"):
        resume(EMACallback(SCHEDULE, on_missing="live"))


def test_a_checkpoint_of_other_tracks_stops_the_resume(tmp_path) -> None:
    tracks = {"fast": SCHEDULE, "slow": ConstantSchedule(momentum=0.01)}
    callback = EMACallback(tracks, consolidate=True, evaluate="live")
    saved_run(tmp_path, callback)
    for track in tracks:
        exported = GPT2LMHeadModel.from_pretrained(tmp_path / "ema" / track)
        assert_alike(whole(exported), averaged(callback, track))
    trainer = trainer_of(tmp_path, EMACallback(SCHEDULE), max_steps=4)
    with pytest.raises(CheckpointMismatchError, match="track"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_of_a_time_without_averages_stays_live(tmp_path) -> None:
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    trainer_of(tmp_path, max_steps=2, **best).train()
    resumed = trainer_of(tmp_path, EMACallback(SCHEDULE, on_missing="live"), max_steps=4, **best)
    with pytest.warns(UserWarning, match="has no average 'ema': the live weights"):
        resumed.train(resume_from_checkpoint=True)
    alone = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2")
    assert_alike(whole(resumed.model), whole(alone))


def test_a_resume_that_adds_a_track_ends_with_the_best_average_of_before(tmp_path) -> None:
    """The best checkpoint has one track, and the run has two by now: its end would have failed, after all the work."""
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    first = EMACallback(SCHEDULE)
    trainer_of(tmp_path, first, max_steps=2, **best).train()
    at_best = averaged(first)
    tracks = {"ema": SCHEDULE, "slow": ConstantSchedule(momentum=0.01)}
    second = EMACallback(tracks, on_load={"new_tracks": {"slow": "live"}}, consolidate=True)
    resumed = trainer_of(tmp_path, second, max_steps=4, **best)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 2
    assert_alike(whole(resumed.model), at_best)
    record = json.loads((tmp_path / "checkpoint-4" / "ema" / "manifest.json").read_text())
    assert (record["num_updates"], record["starts"]) == (4, {"slow": 2})
    assert_alike(whole(GPT2LMHeadModel.from_pretrained(tmp_path / "ema" / "ema")), at_best)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evaluate": "ema"}, "evaluate is 'ema', expected one of 'averaged', 'live', 'both'"),
        ({"on_missing": "skip"}, "on_missing is 'skip'"),
        ({"consolidate": "yes"}, "consolidate is 'yes'"),
        ({"on_load": {"tracks": {}}}, "expected keywords of ShardedEMA.load: .*new_tracks"),
        ({"background": True}, "EMACallback was given \\['background'\\], expected options of ShardedEMA"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": "optimizer"}, "the Trainer would take it for its own"),
        ({"schedule": 0.999}, "expected an object with momentum"),
        ({"schedule": CosineSchedule}, "expected an object with momentum"),
    ],
)
def test_what_is_wrong_with_a_callback_is_said_when_it_is_made(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EMACallback(**{"schedule": SCHEDULE, **arguments})


def test_a_trainer_that_cannot_be_served_is_refused_before_it_trains(tmp_path) -> None:
    with pytest.raises(AttachError, match=r"2 callbacks EMACallback.*track_name"):
        trainer_of(tmp_path, EMACallback(SCHEDULE), EMACallback(SCHEDULE, name="other"))
    late = EMACallback(SCHEDULE)
    trainer = trainer_of(tmp_path, late)
    trainer.add_callback(EMACallback(SCHEDULE))
    with pytest.raises(AttachError, match="2 callbacks EMACallback"):
        trainer.train()
    with pytest.raises(AttachError, match="by no Trainer that holds it"):
        late.on_train_begin(trainer.args, trainer.state, trainer.control)
    with pytest.raises(ConfigError, match=r"schedule of track .ema. is 0\.5"):
        trainer_of(tmp_path, EMACallback(lambda steps: 0.5)).train()

    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, **others) -> None:
            if state.global_step == 1:
                running.add_callback(EMACallback(SCHEDULE))

    running = trainer_of(tmp_path, Adds())
    with pytest.raises(AttachError, match="added to a Trainer that trains already"):
        running.train()


class Claims(Trainer):
    """A Trainer whose accelerator says that it runs on another engine."""

    engine: str

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._shared_state["distributed_type"] = DistributedType[self.engine]


def test_an_engine_with_its_own_weights_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(AttachError, match=r"runs under DistributedType\.XLA"):
        trainer_of(tmp_path, EMACallback(SCHEDULE), kind=type("OnXLA", (Claims,), {"engine": "XLA"}))


def test_a_trainer_that_says_deepspeed_without_its_engine_is_refused_when_it_trains(tmp_path) -> None:
    """The hook of the optimizer would average weights from before the step."""
    trainer = trainer_of(tmp_path, EMACallback(SCHEDULE), kind=type("OnDeepSpeed", (Claims,), {"engine": "DEEPSPEED"}))
    trainer.model_wrapped, trainer.optimizer = trainer.model, torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(AttachError, match=r"expected DeepSpeed's engine"):
        engine_of(trainer)


@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_on_deepspeeds_engine_nothing_is_lost_either(tmp_path) -> None:
    """The hook of the optimizer would have seen weights from before the step."""
    kinds = ("zero2_bf16", "zero3")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SUPPORT / "launched_engine.py"))
    ran = launched(sys.executable, *run, str(tmp_path), *kinds)
    for kind in kinds:
        assert f"nothing is lost: {kind}" in ran.stdout
    assert "the average" not in ran.stderr, ran.stderr


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_made_on_sigterm_has_the_average(tmp_path, event) -> None:
    """`enable_jit_checkpoint` saves without telling callbacks."""

    class Preempted(TrainerCallback):
        """Sets what the handler of SIGTERM sets three seconds later."""

        def on_substep_end(self, args, state, control, **others) -> None:
            if state.global_step == 3 and event == "on_pre_optimizer_step":
                jit.is_checkpoint_requested = True

        def on_optimizer_step(self, args, state, control, **others) -> None:
            if state.global_step == 3 and event == "on_step_end":
                jit.is_checkpoint_requested = True

        def on_save(self, args, state, control, **others) -> None:
            if event == "on_step_begin":
                jit.is_checkpoint_requested = True

    naive = Naive()
    trainer = trainer_of(tmp_path, EMACallback(SCHEDULE), naive, Preempted(), enable_jit_checkpoint=True, save_steps=3)
    (jit,) = [each.jit_manager for each in trainer.callback_handler.callbacks if hasattr(each, "jit_manager")]
    trainer.train()
    step = 4 if event == "on_step_end" else 3
    saved = ShardedEMA(tiny_gpt2(), SCHEDULE)
    saved.load(tmp_path / f"checkpoint-{step}" / "ema")
    assert saved.num_updates == step
    assert_alike(naive.at[step], {name: saved.full_state_dict()[name] for name in naive.at[step]})


def test_in_a_search_the_averages_lie_in_the_checkpoints_of_their_trials(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})
    callback = EMACallback(SCHEDULE, consolidate=True)
    trainer = trainer_of(tmp_path, callback, max_steps=2, eval_strategy="no")
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    trainer.train(trial=types.SimpleNamespace(number=7, params={}))
    assert folders(tmp_path / "run-7") == {"checkpoint-2": True, "ema": False}


def test_a_callback_that_is_done_with_keeps_no_trainer_alive(tmp_path) -> None:
    callback = EMACallback(SCHEDULE)
    trainer = trainer_of(tmp_path, callback, max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_post_hooks
    assert callback.ema is not None
    callback.ema.detach()
    assert "evaluation_loop" not in vars(trainer)


class ScheduleFree(torch.optim.SGD):
    """The weights of an evaluation are other ones than those of training, as in Meta's schedule-free optimizers."""

    trains = True

    def _turn(self, trains: bool, weight: float) -> None:
        if self.trains != trains:
            self.trains = trains
            with torch.no_grad():
                for parameter in (each for group in self.param_groups for each in group["params"]):
                    parameter.mul_(weight)  # a power of two: exact

    def eval(self) -> None:
        self._turn(False, 0.5)

    def train(self) -> None:
        self._turn(True, 2.0)


class FreeTrainer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = ScheduleFree(self.model.parameters(), lr=0.1)
        return self.optimizer


def test_an_optimizer_that_evaluates_other_weights_trains_as_without_the_callback(tmp_path) -> None:
    """Within the swap it changed the average, and afterwards the live weights back that it had never changed."""
    plain = trainer_of(tmp_path / "plain", kind=FreeTrainer, save_strategy="no")
    plain.train()
    without = outcome(plain)
    for evaluated in ("averaged", "both"):
        callback = EMACallback(SCHEDULE, evaluate=evaluated)
        other = trainer_of(tmp_path / evaluated, callback, kind=FreeTrainer, save_strategy="no")
        other.train()
        assert_alike(outcome(other), without)
        average = tiny_gpt2()
        average.load_state_dict(averaged(callback), strict=False)
        key = "eval_loss" if evaluated == "averaged" else "eval_ema_loss"
        assert other.evaluate()[key] == loss_of(average, tmp_path)


def test_a_callback_given_to_a_second_trainer_tells_that_the_first_evaluates_live_weights(tmp_path) -> None:
    callback = EMACallback(SCHEDULE)
    first = trainer_of(tmp_path / "first", callback, max_steps=2, save_strategy="no")
    first.train()
    second = trainer_of(tmp_path / "second", callback, max_steps=4, save_strategy="no")
    second.train()
    assert callback.ema is not None and callback.ema.num_updates == 4
    second.evaluate()
    with pytest.warns(UserWarning, match="averages the model of another Trainer"):
        live = first.evaluate()["eval_loss"]
    assert live == loss_of(first.model, tmp_path) == first.evaluate()["eval_loss"]
    third = trainer_of(tmp_path / "third", callback, max_steps=2, save_strategy="no")
    third.train()
    second.train()  # it has the average again, and nothing to tell
    second.evaluate()
    with pytest.warns(UserWarning, match="averages the model of another Trainer"):
        third.evaluate()


def test_an_average_of_another_name_is_named_where_none_of_this_name_is(tmp_path, caplog) -> None:
    saved_run(tmp_path, EMACallback(SCHEDULE))
    for on_missing in ("error", "live"):
        other = EMACallback(SCHEDULE, name="other", on_missing=on_missing)
        trainer = trainer_of(tmp_path, other, max_steps=4, eval_strategy="no")
        if on_missing == "live":
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert "The checkpoint has ema: if that is the average, give the name=" in caplog.text
            continue
        with pytest.raises(CheckpointNotFoundError, match=r"The checkpoint has ema: .* give the name="):
            trainer.train(resume_from_checkpoint=True)


def test_a_best_checkpoint_that_was_removed_is_told_as_that(tmp_path) -> None:
    class Removes(TrainerCallback):
        def on_step_end(self, args, state, control, **others) -> None:
            if state.global_step == 3:
                shutil.rmtree(tmp_path / "checkpoint-2")

    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    callback = EMACallback(SCHEDULE)
    trainer = trainer_of(tmp_path, callback, Removes(), max_steps=4, **best)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not there any more: the model keeps the last live weights"):
        trainer.train()
    assert callback.ema is not None and callback.ema.num_updates == 4


def test_full_evaluation_in_bfloat16_is_one_of_the_average(tmp_path) -> None:
    callback = EMACallback(SCHEDULE)
    trainer = trainer_of(tmp_path, callback, bf16_full_eval=True, save_strategy="no")
    trainer.train()
    live, average = whole(trainer.model), tiny_gpt2()
    average.load_state_dict(averaged(callback), strict=False)
    expected = trainer_of(tmp_path, model=average, bf16_full_eval=True).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    assert_alike(whole(trainer.model), {name: value.bfloat16() for name, value in live.items()})  # as without
    assert trainer.evaluate()["eval_loss"] == expected


def launched(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the package and the support of the tests."""
    paths = [str(ROOT), str(SUPPORT), str(ROOT / "launch" / "pretrain")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command], cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    return ran


def assert_healthy(ran: subprocess.CompletedProcess[str], name: str) -> None:
    """No rank has heard a warning of ours."""
    assert f"nothing is lost: {name}" in ran.stdout
    assert "average" not in ran.stderr and "dist_ema" not in ran.stderr, ran.stderr


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_on_two_ranks_nothing_is_lost_either(tmp_path, layout) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "launch" / "configs" / "cpu_gloo.yaml")]
    assert_healthy(launched(*command, str(SUPPORT / "launched_trainer.py"), layout, str(tmp_path)), layout)


def test_trl_trains_as_without_and_measures_both_kinds_apart(tmp_path) -> None:
    assert_healthy(launched(sys.executable, str(SUPPORT / "launched_trl.py"), str(tmp_path)), "trl")


@pytest.mark.ranks
def test_the_script_of_the_page_runs_on_two_ranks(tmp_path, monkeypatch) -> None:
    page = (ROOT / "docs" / "integrations" / "transformers.md").read_text()
    script = page.partition("```python\n")[2].partition("```")[0]
    assert len(script.splitlines()) <= 40
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py")
    launched(sys.executable, *run, folder=tmp_path)
    assert folders(tmp_path / "run") == {"checkpoint-4": True, "checkpoint-8": True, "ema": False}


def test_an_average_that_no_checkpoint_has_is_told_at_the_end_in_the_words_of_the_trainer(tmp_path) -> None:
    callback = EMACallback(SCHEDULE, evaluate="live")
    trainer_of(tmp_path, callback, save_strategy="no", max_steps=2).train()
    records = [record for record in watch._records if callback.ema is not None and record.use is callback.ema.use]
    with pytest.warns(UserWarning, match=r"'ema' \(2\).*EMACallback\(consolidate=True\)"):
        watch._tell_unused(records)


def test_the_average_is_blended_into_the_live_weights_of_a_trainer(tmp_path) -> None:
    """With a weight of 1 after every fourth of 8 steps the live weights at the end are the average."""
    callback = EMACallback(SCHEDULE, evaluate="live", blend_every=4, blend_weight=1.0)
    trainer = trainer_of(tmp_path, callback, save_strategy="no")
    trainer.train()
    assert callback.ema is not None and callback.ema.num_updates == 8
    assert_alike(whole(trainer.model), averaged(callback))
    with pytest.raises(ConfigError, match="blend_every"):
        EMACallback(SCHEDULE, blend_every=0)
