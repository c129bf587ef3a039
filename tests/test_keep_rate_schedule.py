import math

import pytest
import torch
from conftest import tiny_config_with
from test_checkpoints import make_trainer

from evit_hf import EViTForImageClassification
from evit_hf.keep_rate_schedule import KeepRateCallback, KeepRateSchedule, rounded_keep_rate, scheduled_keep_rate


def official_keep_rate(iteration, epoch, start_epoch, shrink_epochs, steps_per_epoch, base):
    """The published formula (FACTS: 1.0 until the start, cosine, then constant), in the official code's own units."""
    if epoch < start_epoch:
        return 1.0
    if epoch >= start_epoch + shrink_epochs:
        return base
    share = (iteration - start_epoch * steps_per_epoch) / (shrink_epochs * steps_per_epoch)
    return base + (1 - base) * (math.cos(share * math.pi) + 1) * 0.5


def test_worked_example():
    rates = [scheduled_keep_rate(step, 0.5, dense_steps=2, shrink_steps=4) for step in range(8)]
    cosine = [0.5 + 0.5 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert rates == pytest.approx([1.0, 1.0, *cosine, 0.5, 0.5])
    assert rates[2:6] == pytest.approx([1.0, 0.9267767, 0.75, 0.5732233])


def test_the_papers_300_epochs_step_by_step():
    steps_per_epoch = 7
    for step in range(300 * steps_per_epoch):
        expected = official_keep_rate(step, step // steps_per_epoch, 10, 100, steps_per_epoch, 0.7)
        ours = scheduled_keep_rate(step, 0.7, 10 * steps_per_epoch, 100 * steps_per_epoch)
        assert ours == pytest.approx(expected, abs=1e-12)


def test_schedule_starts_at_one_never_rises_and_ends_at_the_target():
    rates = [scheduled_keep_rate(step, 0.6, 5, 20) for step in range(40)]
    assert rates[:5] == [1.0] * 5
    assert rates == sorted(rates, reverse=True)
    assert rates[25:] == [0.6] * 15


def test_each_layer_has_its_own_target():
    targets = [0.9, 0.7, 0.5]
    for step in range(12):
        expected = [scheduled_keep_rate(step, target, 2, 8) for target in targets]
        assert scheduled_keep_rate(step, targets, 2, 8) == expected


def test_without_phases_the_target_holds_from_the_first_step():
    assert scheduled_keep_rate(0, 0.7, 0, 0) == 0.7


def test_negative_phases_are_refused():
    with pytest.raises(ValueError, match="must not be negative, got 0, -1, 3: pass 0"):
        scheduled_keep_rate(0, 0.7, -1, 3)
    with pytest.raises(ValueError, match="must not be negative, got 1 and -2"):
        KeepRateCallback(1, -2)


# In transformers.Trainer: 24 images in batches of 4 are 6 steps an epoch


def spy_on_keep_rates(model):
    """Record the keep rates that forwards really use, in training and in evaluation."""
    seen = {True: [], False: []}
    original = model.vit.token_plan

    def spy(*asked):
        plan = original(*asked)
        seen[model.training].append(next(iter(plan.keep_rates.values())))
        return plan

    model.vit.token_plan = spy
    return seen


def test_trainer_follows_the_schedule_and_evaluates_at_the_target(tmp_path, tiny_config):
    trainer = make_trainer(tmp_path, tiny_config, [KeepRateCallback(1, 2)], eval_strategy="epoch", num_train_epochs=4)
    seen = spy_on_keep_rates(trainer.model)
    trainer.train()
    assert seen[True] == [scheduled_keep_rate(step, 0.6, 6, 12) for step in range(24)]
    assert set(seen[False]) == {0.6}
    assert trainer.model.config.keep_rate == 0.6
    assert trainer.model.vit.training_keep_rate is None
    saved = EViTForImageClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert saved.config.keep_rate == 0.6  # the schedule is at 0.8 there


def test_schedule_counts_optimizer_steps_under_gradient_accumulation(tmp_path, tiny_config):
    trainer = make_trainer(
        tmp_path, tiny_config, [KeepRateCallback(1, 2)], gradient_accumulation_steps=4, num_train_epochs=4
    )
    seen = spy_on_keep_rates(trainer.model)
    trainer.train()
    # 6 batches an epoch in windows of 4 and 2
    windows = [4, 2] * 4
    expected = [scheduled_keep_rate(step, 0.6, 2, 4) for step, size in enumerate(windows) for _ in range(size)]
    assert seen[True] == expected


def test_trainer_predictions_are_the_logits_alone(tmp_path, tiny_config):
    trainer = make_trainer(tmp_path, tiny_config)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (24, 5)


def test_other_models_are_refused(tmp_path, tiny_config):
    trainer = make_trainer(tmp_path, tiny_config)
    with pytest.raises(ValueError, match="KeepRateCallback needs an EViT model, got Linear"):
        KeepRateCallback(1, 2).on_train_begin(
            trainer.args, trainer.state, trainer.control, model=torch.nn.Linear(1, 1), train_dataloader=[1]
        )


def test_models_with_a_share_of_operations_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny_config_with(keep_rate=None, macs=1.0), [KeepRateCallback(0, 1)])
    with pytest.raises(ValueError, match=r"schedules a keep rate, but the model has `macs` 1\.0"):
        trainer.train()


def test_per_layer_targets_in_trainer(tmp_path):
    config = tiny_config_with(keep_rate=[0.9, 0.7, 0.5])
    trainer = make_trainer(tmp_path, config, [KeepRateCallback(0, 1)], num_train_epochs=1, save_strategy="no")
    trainer.train()
    rates = [entry["keep_rate"] for entry in trainer.state.log_history if "keep_rate" in entry]
    assert rates == [scheduled_keep_rate(step, [0.9, 0.7, 0.5], 0, 6) for step in range(6)]


def test_rounded_keep_rates_are_levels_at_or_above_the_scheduled_ones():
    rates = [scheduled_keep_rate(step, 0.6, 3, 50) for step in range(60)]
    rounded = [rounded_keep_rate(rate, 0.6, 4) for rate in rates]
    assert {round(rate, 9) for rate in rounded} == {0.6, 0.7, 0.8, 0.9, 1.0}
    assert all(low <= high + 1e-9 < low + 0.1 for low, high in zip(rates, rounded, strict=True))
    assert rounded_keep_rate(0.65, 0.6, 4) == pytest.approx(0.7)
    assert rounded_keep_rate([0.95, 0.65], [0.9, 0.5], 2) == pytest.approx([0.95, 0.75])
    assert rounded_keep_rate(1.0, [0.9, 1.0], 2) == [1.0, 1.0]


def test_a_schedule_counts_its_phases_in_epochs():
    schedule = KeepRateSchedule.in_epochs(0.7, 0.5, 1.25, steps_per_epoch=6)
    assert [schedule.at(step) for step in range(20)] == [scheduled_keep_rate(step, 0.7, 3, 8) for step in range(20)]
    assert schedule.highest_from(3) == schedule.at(3)
    rounded = KeepRateSchedule.in_epochs(0.6, 0, 5, steps_per_epoch=10, levels=4)
    assert rounded.at(20) == rounded_keep_rate(scheduled_keep_rate(20, 0.6, 0, 50), 0.6, 4)


def test_rates_of_a_range_are_drawn_for_each_step_and_never_above_the_highest():
    schedule = KeepRateSchedule(0.7, range=(0.5, 0.9), seed=1)
    rates = [schedule.at(step) for step in range(200)]
    assert rates == [KeepRateSchedule(0.7, range=(0.5, 0.9), seed=1).at(step) for step in range(200)]
    assert rates != [KeepRateSchedule(0.7, range=(0.5, 0.9), seed=2).at(step) for step in range(200)]
    assert 0.5 <= min(rates) < 0.51
    assert 0.89 < max(rates) <= 0.9 == schedule.highest_from(0)
    assert sum(rates) / 200 == pytest.approx(0.7, abs=0.02)
    shrinking = KeepRateSchedule(0.7, 3, 10, levels=4, range=(0.5, 0.9))
    assert all(shrinking.at(step) <= shrinking.highest_from(step) for step in range(20))
    assert {round(shrinking.at(step), 9) for step in range(13, 99)} == {0.5, 0.6, 0.7, 0.8, 0.9}
