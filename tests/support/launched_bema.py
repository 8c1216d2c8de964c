"""BEMA beside trl's own callback, over 50 steps of AdamW.

Not a test: `test_bema.py` runs it. TRL warns while it is imported.
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from trl import BEMACallback

from dist_ema import Bema, ShardedEMA

CONFIG = GPT2Config(
    n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=32, tie_word_embeddings=False, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip
NUM_STEPS = 50


def compare(constants: dict, update_freq: int, update_after: int, *, from_folder: bool) -> None:
    """Both follow the same steps; after each the weights that trl has for the user are those in our model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    names = {"eta": "bias_power", "kappa": "ema_power", "rho": "lag", "gamma": "multiplier"}
    names["floor"] = "min_ema_multiplier"
    theirs = BEMACallback(
        update_freq=update_freq, update_after=update_after, **{names[name]: value for name, value in constants.items()}
    )
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    theirs.on_train_begin(None, state, None, model=model)
    start = None
    if from_folder:
        assert update_after == 0
        start = tempfile.mkdtemp()
        model.save_pretrained(start)
    ours = Bema(**constants, update_after_step=update_after, start=start)
    ema = ShardedEMA(model, ours.schedules, interval=update_freq)
    ema.update()
    moved = 0.0
    for step in range(1, NUM_STEPS + 1):
        tokens = torch.randint(0, 32, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        theirs.on_step_end(None, state, None, model=model)
        ema.update()
        if step <= update_after or (step - update_after) % update_freq:
            continue  # trl's model is that of an earlier step
        with ema.average_parameters("ema", correct=ours):
            for (name, value), other in zip(model.named_parameters(), theirs.running_model.parameters(), strict=True):
                assert (value - other).abs().max() <= 1e-6, (step, name, (value - other).abs().max())
            corrected = model.transformer.wte.weight.detach().clone()
        with ema.average_parameters("ema"):
            moved = max(moved, (corrected - model.transformer.wte.weight).abs().max().item())
    print("agrees" if moved > 1e-3 else f"moved by {moved} only")


if __name__ == "__main__":
    compare({}, 1, 0, from_folder=True)
    compare({}, 1, 0, from_folder=False)
    compare({"eta": 0.4, "kappa": 0.7, "rho": 3, "gamma": 0.5, "floor": 0.15}, 1, 7, from_folder=False)
    compare({"eta": 0.1, "kappa": 0.3}, 5, 10, from_folder=False)
    compare({"eta": 0.0, "rho": 1}, 10, 0, from_folder=True)
