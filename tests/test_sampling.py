import itertools

import pytest
import torch

from evit_training.data.sampling import EvaluationBatches, StepPlan, TrainingBatches, epoch_order, seed_for


def test_seeds_differ_for_every_part_and_stay_the_same():
    seeds = {
        seed_for("image", seed, epoch, position) for seed in range(3) for epoch in range(3) for position in range(9)
    }
    assert len(seeds) == 81
    assert seed_for("order", 0, 1) == 8556750900509299915
    torch.Generator().manual_seed(max(seeds))  # accepts all of them


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_processes", "accumulation", "drop_last"),
    [(100, 8, 1, 1, True), (100, 8, 2, 2, True), (101, 8, 2, 2, False), (101, 12, 2, 3, False), (5, 8, 2, 1, True)],
)
def test_every_image_is_seen_once_in_an_epoch_and_every_step_is_shared_evenly(
    num_images, batch_size, num_processes, accumulation, drop_last
):
    plan = StepPlan(num_images, batch_size, num_processes, accumulation, drop_last)
    seen = []
    for step in range(plan.steps_per_epoch):
        shares = [plan.micro_batches(step, process) for process in range(num_processes)]
        sizes = [[len(micro_batch) for micro_batch in share] for share in shares]
        assert all(size == sizes[0] for size in sizes)
        assert sum(map(sum, sizes)) == plan.num_images_in_step(step)
        assert len(sizes[0]) == plan.num_micro_batches(step) <= accumulation
        seen += [position for share in shares for micro_batch in share for position in micro_batch]
    assert len(seen) == len(set(seen))
    left_out = num_images - len(seen)
    assert left_out < (batch_size if drop_last and num_images >= batch_size else num_processes)


def test_a_step_has_the_same_images_however_it_is_cut():
    def images(num_processes, accumulation):
        plan = StepPlan(50, 8, num_processes, accumulation, drop_last=False)
        shares = [plan.micro_batches(6, process) for process in range(num_processes)]
        return {position for share in shares for micro_batch in share for position in micro_batch}

    assert images(1, 1) == images(2, 2) == images(2, 1) == images(1, 4) == {48, 49}


def test_batches_go_on_from_any_step():
    plan = StepPlan(23, 4, accumulation_steps=2)
    everything = list(TrainingBatches(plan, 0, 0, 12))
    assert len(everything) == len(TrainingBatches(plan, 0, 0, 12)) == 24
    for step in range(12):
        assert list(TrainingBatches(plan, 0, step, 12)) == everything[2 * step :]
    epochs = [{epoch for batch in everything[10 * i : 10 * i + 10] for epoch, *_ in batch} for i in range(2)]
    assert epochs == [{0}, {1}]


def test_order_differs_between_epochs_and_seeds():
    orders = [tuple(epoch_order(20, seed, epoch).tolist()) for seed, epoch in itertools.product(range(2), range(3))]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("counts", [(9, 3, 1), (95, 5), (2, 2), (1, 1, 1, 7)])
def test_balanced_sampling_draws_classes_equally_often(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    for epoch in range(3):
        order = epoch_order(len(labels), 0, epoch, labels=labels).tolist()
        by_class = [[i for i in order if labels[i] == label] for label in range(len(counts))]
        assert len(order) == len(labels)
        assert max(map(len, by_class)) - min(map(len, by_class)) <= 1
        for label, drawn in enumerate(by_class):
            members = [i for i, other in enumerate(labels) if other == label]
            times = [drawn.count(i) for i in members]
            assert max(times) - min(times) <= 1
    seen = {i for epoch in range(99) for i in epoch_order(len(labels), 0, epoch, labels=labels).tolist()}
    assert seen == set(range(len(labels)))


def test_balanced_batches_start_at_any_step():
    plan = StepPlan(23, 4)
    labels = [0] * 20 + [1] * 3
    everything = list(TrainingBatches(plan, 0, 0, 12, labels=labels))
    assert list(TrainingBatches(plan, 0, 7, 12, labels=labels)) == everything[7:]
    assert everything != list(TrainingBatches(plan, 0, 0, 12))


def test_copies_of_repeated_augmentation_go_to_different_processes():
    plan = StepPlan(30, 6, num_processes=3)
    shares = [[key for batch in TrainingBatches(plan, 0, 0, 5, process, 3) for key in batch] for process in range(3)]
    for keys in zip(*shares, strict=True):
        assert len({index for _, _, index in keys}) == 1
        assert len({position for _, position, _ in keys}) == 3  # and are augmented differently
    assert len({index for share in shares for _, _, index in share}) == 10  # a third of the images in one epoch


@pytest.mark.parametrize(("num_images", "num_processes"), [(23, 1), (23, 2), (24, 2), (3, 2), (1, 2)])
def test_evaluation_counts_each_image_once_and_gives_every_process_as_many(num_images, num_processes):
    batches = [list(EvaluationBatches(num_images, 5, process, num_processes)) for process in range(num_processes)]
    counted = [index for share in batches for batch in share for index, is_counted in batch if is_counted]
    assert sorted(counted) == list(range(num_images))
    sizes = [[len(batch) for batch in share] for share in batches]
    assert all(size == sizes[0] for size in sizes)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="`--batch-size` 10 cannot be cut evenly for 2 processes .* a multiple of 8"):
        StepPlan(100, 10, num_processes=2, accumulation_steps=4)
    with pytest.raises(ValueError, match="1 training images are too few for 2 processes"):
        StepPlan(1, 8, num_processes=2)
