"""The training loop, top to bottom.

Build data, model, optimizer and schedules (`parts.py`); resume from a checkpoint if there is one (`run_folder.py`,
`checkpoints.py`); then for each optimizer step: keep rate, forward, backward, step (`steps.py`), log; for each epoch:
checkpoint, evaluate; at the end: save, compare with the dense model, draw. Settings: `arguments.py`.
"""

import datetime
import itertools
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from evit_hf.keep_rate_schedule import KeepRate
from evit_hf.towers import tower_of

from ..arguments import TrainArguments
from ..data.augmentation import training_transform
from ..data.loaders import ImageLoader, evaluation_loader, training_loader
from ..data.sampling import epoch_order
from ..learning.models import load_classifier
from ..learning.optimization import learning_rate_schedule, warmup_steps
from ..learning.sources import name_of
from ..measuring.evaluation import (
    compare_keep_rates,
    comparison_table,
    draw_tradeoff,
    evaluate,
    main_score,
)
from ..measuring.machine import device_name, end_training, memory_gib
from ..screen import say, show_result
from ..sharing.card import render_run_card
from ..sharing.datasets import hub_id_of, licence_of
from ..sharing.hub import PushError
from ..sharing.push import BackgroundPush
from .checkpoints import CheckpointError, NoCheckpointError, checkpoint_path, read_checkpoint, replace_durably
from .interruption import Interruption
from .metrics_log import LogWindow, MetricsLog
from .parts import Parts, build_accelerator, build_parts
from .run_folder import (
    RUN_FILES,
    draw_kept_patches,
    export,
    prepare_output_dir,
    resume,
    run_folder,
    run_record,
    saying_what_is_safe,
)
from .state import TrainingState
from .steps import Batch, StepGradients, count_bad_images, images_of_step, report_skipped_step, update_weights
from .training_bar import TrainingBar, in_words


def train(arguments: TrainArguments) -> list[dict[str, Any]]:
    """Train a model and leave it in `arguments.run.output_dir`.

    The folder then holds `model/` (weights, configuration, image processor, code for `trust_remote_code`),
    `checkpoints/`, `metrics.jsonl` (one line for each log and each epoch), `results.json` (this function's result),
    `class_report.json`, `arguments.yaml` (all settings, again a recipe) and `kept_patches.png`.

    Returns: accuracy, GMACs and images per second of the dense and of the reorganized model, see `compare_keep_rates`;
        nothing for a dry run.

    Raises:
        ValueError: settings or data that cannot work, a folder that is in use.
        CheckpointError: no intact checkpoint to resume from, or the end of the run could not be saved.
        TrainingInterruptedError: SIGTERM or SIGINT; the run was saved.
        TrainingDivergedError: `--max-skipped-steps` steps in a row were not finite.
        NotEnoughMemoryError: one image at a time is too much.
    """
    accelerator = build_accelerator(arguments)
    if arguments.hub.push_to_hub and accelerator.is_main_process and not arguments.run.dry_run:
        check_hub(arguments)
    with run_folder(accelerator, arguments) as resume_from:
        parts, state = build_parts(arguments, accelerator)
        if arguments.run.dry_run:
            results = dry_run(parts, state)
        else:
            if resume_from is not None:
                resume(state, resume_from, arguments, parts.num_steps)
            results = run_training(parts, state, is_resumed=resume_from is not None)
    end_training(accelerator)
    return results


def run_training(parts: Parts, state: TrainingState, is_resumed: bool) -> list[dict[str, Any]]:
    """Train from the step that `state` is at to the end; any error says what is saved, and how to resume."""
    arguments, accelerator, progress = parts.arguments, state.accelerator, state.progress
    output_dir = Path(arguments.run.output_dir)
    with ExitStack() as stack:
        stack.enter_context(saying_what_is_safe(state, output_dir, parts.num_steps))
        if accelerator.is_main_process:  # nothing was written before all of the above worked
            prepare_output_dir(output_dir, arguments, keeps_files=is_resumed)
        accelerator.wait_for_everyone()
        say(describe(parts, state))
        pusher = pusher_of(arguments) if arguments.hub.push_to_hub and accelerator.is_main_process else None
        if pusher is not None:  # after an error nobody waits for a push that is under way; at the end `finish` does
            stack.push(lambda kind, *_: pusher.close() if kind is not None else None)
        train_loader, eval_loader = loaders(parts, state)
        stack.callback(train_loader.close)
        stack.callback(eval_loader.close)
        interruption = stack.enter_context(Interruption(accelerator, progress, parts.num_steps))
        evaluation_batches = InterruptibleBatches(eval_loader, interruption)
        with closing(TrainingBar(parts.plan, parts.num_steps, progress.step)) as training_bar:
            train_steps(parts, state, iter(train_loader), evaluation_batches, interruption, pusher, training_bar)
        results = finish(parts, state, evaluation_batches)
    if pusher is not None:
        pusher.finish(output_dir, f"EViT after {progress.step} optimizer steps")
        say(f"Pushed to {arguments.hub.push_to_hub}.")
    return results


def train_steps(
    parts: Parts,
    state: TrainingState,
    micro_batches: Iterator[Batch],
    evaluation_batches: "InterruptibleBatches",
    interruption: Interruption,
    pusher: BackgroundPush | None,
    training_bar: TrainingBar,
) -> None:
    """Take the optimizer steps that are left."""
    arguments, plan, num_steps = parts.arguments, parts.plan, parts.num_steps
    accelerator, progress, run = state.accelerator, state.progress, parts.arguments.run
    log = MetricsLog(Path(run.output_dir) / "metrics.jsonl", accelerator, arguments)
    log.drop_after(progress.step, keeps_evaluation=progress.evaluated_step == progress.step)
    learning_rate = learning_rate_schedule(
        state.optimizer.optimizer,  # the schedule itself is not prepared: it would step once for each process
        arguments.optimization,
        plan.steps_per_epoch,
        num_steps,
        progress.schedule_step,
    )
    gradients = StepGradients(state, parts.objective, plan, run.seed)
    start_of_run = time.perf_counter() - progress.seconds
    window = LogWindow(accelerator.device)
    is_probed = accelerator.num_processes == 1
    while True:
        # Data of the next step
        is_last = progress.step == num_steps
        start = time.perf_counter()
        batches = next_batches(micro_batches, 0 if is_last else plan.num_micro_batches(progress.step), interruption)
        pause = time.perf_counter()
        window.data_seconds += pause - start

        # Checkpoint, before anything can go wrong in the evaluation
        ends_epoch = is_due(progress.step, plan.steps_per_epoch)
        is_evaluated = progress.evaluated_step != progress.step and (
            is_last or is_due(progress.step, run.eval_steps or plan.steps_per_epoch)
        )
        must_end = interruption.agreed()
        is_saved = must_end or ends_epoch or is_evaluated or is_last or is_due(progress.step, run.checkpoint_steps)
        progress.seconds = time.perf_counter() - start_of_run
        if is_saved:
            state.save(must_succeed=must_end)

        # Evaluate, at the target keep rate
        if is_evaluated and not must_end:
            training_bar.pause(evaluate_weights(parts, state, evaluation_batches, log))
            progress.seconds = time.perf_counter() - start_of_run
        if is_saved:
            state.rotate(run.keep_checkpoints)
        if must_end:
            raise interruption.error()
        if is_last or stops_early(parts, state):
            break
        push_weights(parts, state, pusher, ends_epoch)
        window.start += time.perf_counter() - pause

        # Keep rate, forward, backward
        if arguments.data.on_bad_image == "skip":
            count_bad_images(state, batches, plan, arguments.data.max_bad_images)
        keep_rate = parts.keep_rates.at(progress.schedule_step)
        if not is_probed:
            gradients.fit_into_memory(batches[0], parts.keep_rates.highest_from(progress.schedule_step))
            is_probed = True
        loss = gradients.backward(batches, keep_rate)

        # Step
        window.num_images += plan.num_images_in_step(progress.step)
        rate_used = learning_rate.get_last_lr()[-1]
        if update_weights(state, learning_rate, loss, arguments.optimization.max_grad_norm):
            window.add(loss)
        else:
            report_skip(parts, state)
        training_bar.update(progress.step, window, keep_rate)

        # Log
        if (
            is_due(progress.step, run.log_steps)
            or is_due(progress.step, plan.steps_per_epoch)
            or progress.step == num_steps
        ):
            training_bar.log(log_step(parts, state, log, window, rate_used, keep_rate))
            window = LogWindow(accelerator.device)


def is_due(step: int, interval: int | None) -> bool:
    """Whether what comes every `interval` optimizer steps comes after `step` of them; never for None."""
    return interval is not None and step > 0 and step % interval == 0


def next_batches(micro_batches: Iterator[Batch], num_batches: int, interruption: Interruption) -> list[Batch]:
    """Take the micro-batches of the next step; a failure ends the run when all processes know and all is saved."""
    try:
        return [next(micro_batches) for _ in range(num_batches)]
    except Exception as error:  # whatever data and transforms may raise
        interruption.failure = error
        return []


def stops_early(parts: Parts, state: TrainingState) -> bool:
    """Whether the last evaluations, the one at this step included, were too many without a better one."""
    patience, progress = parts.arguments.run.early_stopping_patience, state.progress
    if patience is None or progress.evaluated_step != progress.step or progress.evaluations_since_best < patience:
        return False
    say(
        f"Stopped early after step {progress.step} of {parts.num_steps}: no evaluation was better than that of step "
        f"{progress.best['step']}."
    )
    return True


def report_skip(parts: Parts, state: TrainingState) -> None:
    """Say that the last step was skipped, see `report_skipped_step`; no images are known of streamed data."""
    arguments, splits, plan, step = parts.arguments, parts.splits, parts.plan, state.progress.step - 1
    images = []
    if not splits.is_streamed:
        labels = splits.train[splits.label_column][:] if arguments.data.balanced_sampling else None
        repeats = arguments.augmentation.repeated_augmentation
        order = epoch_order(plan.num_images, arguments.run.seed, step // plan.steps_per_epoch, repeats, labels)
        images = images_of_step(plan, order.tolist(), step)
    report = Path(arguments.run.output_dir) / "non_finite.json"
    report_skipped_step(state, arguments.optimization.max_skipped_steps, report, images)


def log_step(
    parts: Parts, state: TrainingState, log: MetricsLog, window: LogWindow, learning_rate: float, keep_rate: KeepRate
) -> dict[str, Any]:
    """Write a line of the log about the steps since the last one, and return it."""
    progress = state.progress
    entry = {
        "step": progress.step,
        "epoch": progress.step / parts.plan.steps_per_epoch,
        "learning_rate": learning_rate,
        "keep_rate": keep_rate,
        "gmacs": parts.macs(keep_rate) / 1e9,
        "skipped_steps": progress.skipped_steps,
        "bad_images": progress.bad_images,
        **window.summarize(state.accelerator),
    }
    log.write(entry)
    return entry


def evaluate_weights(parts: Parts, state: TrainingState, batches: "InterruptibleBatches", log: MetricsLog) -> str:
    """Evaluate the weights, and their averages; remember which were the best.

    Nothing is remembered of an evaluation that was interrupted: it is repeated on resuming. Weights of which the
    checkpoint could not be written are not the best.

    Returns: the main score in words, of the averages where there are any.
    """
    accelerator, progress, average = state.accelerator, state.progress, state.average
    entry: dict[str, Any] = {"step": progress.step, "epoch": progress.step / parts.plan.steps_per_epoch}
    best = progress.best
    summary = []
    for kind, prefix in (("raw", "eval_"), ("ema", "ema_eval_")):
        if kind == "ema" and average is None:
            continue
        with average.in_model() if kind == "ema" else nullcontext():
            metrics = evaluate(accelerator, state.model, batches, oracle=parts.objective.evaluation_oracle)
        name, score = main_score(metrics)
        if state.saved_step == progress.step and (not best or score > best["score"]):
            best = {"step": progress.step, "weights": kind, "score": score, "metric": name}
        entry.update({f"{prefix}{key}": x for key, x in metrics.items() if isinstance(x, (int, float))})
        label = "" if kind == "raw" else "averaged weights: "
        second = ("top5", "top-5") if name == "top1" else ("macro_f1", "macro F1")
        first = f"{'top-1' if name == 'top1' else 'micro F1'} {100 * score:.2f} %"
        summary.append(f"{label}{first}, {second[1]} {100 * metrics[second[0]]:.2f} %, loss {metrics['loss']:.3f}")
    progress.evaluations_since_best = 0 if best is not progress.best else progress.evaluations_since_best + 1
    progress.best, progress.evaluated_step = best, progress.step
    log.write(entry)
    state.save_evaluation()
    say(f"epoch {entry['epoch']:.4g}, step {progress.step}: {'; '.join(summary)}")
    return first


class InterruptibleBatches:
    """The batches of a loader, as often as they are wanted, see `until_interrupted`."""

    def __init__(self, loader: ImageLoader, interruption: Interruption) -> None:
        self.loader = loader
        self.interruption = interruption

    def __len__(self) -> int:
        """Number of batches; streamed data has none."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        return until_interrupted(self.loader, self.interruption)


def until_interrupted(loader: ImageLoader, interruption: Interruption) -> Iterator[Batch]:
    """Yield the batches, as long as no process is to end.

    Raises: TrainingInterruptedError, or what went wrong with the batches, on all processes after the same batch.
    """
    batches = itertools.chain.from_iterable([loader])  # starts the loader below
    while True:
        batch = None
        try:
            batch = next(batches, None)
        except Exception as error:  # whatever data and transforms may raise
            interruption.failure = error
        if interruption.agreed():
            raise interruption.error()
        if batch is None:
            return
        yield batch


def finish(parts: Parts, state: TrainingState, batches: InterruptibleBatches) -> list[dict[str, Any]]:
    """Save the final weights as a model, compare it with the dense one, draw.

    Raises: CheckpointError if something cannot be saved.
    """
    arguments, accelerator = parts.arguments, state.accelerator
    output_dir = Path(arguments.run.output_dir)
    which = load_final_weights(parts, state)
    weights = state.weights()
    timed_model = None
    if accelerator.is_main_process:
        export(state.network, parts.processor, weights, output_dir / "model")
        timed_model = load_classifier(str(output_dir / "model")).to(accelerator.device)
    keep_rate = parts.keep_rates.target
    keep_rates = [1.0, *(arguments.optimization.keep_rate_range or [])[::-1], keep_rate]
    keep_rates += arguments.run.compare_keep_rates or []
    keep_rates = [rate for i, rate in enumerate(keep_rates) if rate not in keep_rates[:i]]
    results = compare_keep_rates(accelerator, state.model, batches, keep_rates, timed_model)
    report = {"label_names": parts.splits.label_names, "keep_rate": keep_rate}
    by_class = ("by_class", "confusion_matrix")
    own = next(result for result in results if result.keep_rate == keep_rate)
    report |= {name: own.metrics[name] for name in by_class}
    rows = [{name: x for name, x in result.as_json().items() if name not in by_class} for result in results]
    if accelerator.is_main_process:
        try:
            draw_tradeoff(results, output_dir / "tradeoff.png")
            for name, values, indent in (
                ("run.json", record_of(parts, state), 2),
                ("results.json", rows, 2),
                ("class_report.json", report, None),
            ):
                replace_durably(output_dir / name, f"{json.dumps(values, indent=indent)}\n".encode())
            if arguments.run.num_pictures and not parts.splits.is_streamed:
                draw_kept_patches(timed_model, parts.processor, parts.splits, arguments.run.num_pictures, output_dir)
            write_card(output_dir, arguments.hub.push_to_hub)
        except OSError as error:
            raise CheckpointError(
                f"The model is saved in {output_dir / 'model'}, but not all that belongs to it: {error}."
            ) from None
    show_result(comparison_table(results), rows)
    saved = ", ".join(name for name in RUN_FILES if (output_dir / name).exists())
    say(f"Saved in {output_dir}: {saved}. The model has the {which}.")
    for failure in state.failures:
        say(failure)
    return rows


def loaders(parts: Parts, state: TrainingState) -> tuple[ImageLoader, ImageLoader]:
    """Loaders of this process's micro-batches from the next optimizer step on, and of its evaluation batches."""
    arguments, accelerator = parts.arguments, state.accelerator
    augment = training_transform(arguments.augmentation, parts.image_size, parts.processor)
    train = training_loader(
        parts.splits, augment, parts.plan, arguments, accelerator, parts.num_steps, state.progress.step
    )
    data, batch_size = arguments.data, arguments.optimization.eval_batch_size
    return train, evaluation_loader(
        parts.splits, parts.processor, batch_size, data.num_workers, accelerator, data.on_bad_image
    )


def write_card(output_dir: Path, repo_id: str | None) -> None:
    """Write the model card; one that would have blanks is left out with a message, so that the run still ends well."""
    try:
        replace_durably(output_dir / "README.md", render_run_card(output_dir, repo_id).encode())
    except ValueError as error:
        sys.stderr.write(f"No model card was written: {error}\n")


def record_of(parts: Parts, state: TrainingState) -> dict[str, Any]:
    """Facts about the run for its card, see `run_record`."""
    train, accelerator, tower = parts.splits.train, state.accelerator, tower_of(state.network)
    model = parts.arguments.model.model
    return run_record(
        started_from=None if model is None else name_of(model),
        base_model=None if model is None or Path(model).exists() else model,
        tower={
            "model_type": state.network.config.model_type,
            "num_hidden_layers": len(tower.layers),
            "hidden_size": tower.hidden_size,
            "image_size": parts.image_size,
            "reorganization_layers": tower.config.reorganization_layers,
            "inattentive_tokens": tower.config.inattentive_tokens,
        },
        num_parameters=sum(parameter.numel() for parameter in state.network.parameters()),
        num_train_images="streamed" if parts.splits.is_streamed else len(train),
        num_steps=state.progress.step,
        num_epochs=None if parts.splits.is_streamed else state.progress.step / parts.plan.steps_per_epoch,
        learning_rate=parts.arguments.learning_rate,
        seconds=state.progress.seconds,
        hardware=f"{accelerator.num_processes} x {device_name(accelerator.device)}",
        dataset_licence=getattr(train.info, "license", None) or licence_of(parts.arguments.data.dataset),
        dataset_id=hub_id_of(parts.arguments.data.dataset),
    )


def check_hub(arguments: TrainArguments) -> None:
    """Find out before training whether the Hub will take the model.

    Raises: ValueError with the reason.
    """
    try:
        pusher_of(arguments).check()
    except PushError as error:
        raise ValueError(f"`--push-to-hub` cannot work: {error}.") from None


def pusher_of(arguments: TrainArguments) -> BackgroundPush:
    """Pushes of the run to the Hub, in the background."""
    hub = arguments.hub
    log = Path(arguments.run.output_dir) / "push.log"
    return BackgroundPush(hub.push_to_hub, hub.push_private, hub.push_revision, 60 * hub.push_minutes, log)


def push_weights(parts: Parts, state: TrainingState, pusher: BackgroundPush | None, ends_epoch: bool) -> None:
    """Push the weights in the background, if that is wanted and the previous push is done."""
    hub, progress = parts.arguments.hub, state.progress
    is_best = progress.step > 0 and progress.best.get("step") == progress.step
    if not hub.push_to_hub or not {"end": False, "best": is_best, "epoch": ends_epoch}[hub.push_when]:
        return
    weights = state.weights(averaged=state.average is not None)  # gathered from all processes
    if pusher is None or pusher.is_running():
        return
    folder = Path(parts.arguments.run.output_dir) / "export"
    try:
        export(state.network, parts.processor, weights, folder)
    except CheckpointError as error:
        say(f"Not pushed: {error}")
        return
    pusher.start(folder, f"EViT after {progress.step} of {parts.num_steps} optimizer steps")


def load_final_weights(parts: Parts, state: TrainingState) -> str:
    """Put the weights to be saved into the model, and return in words which they are.

    Raises: CheckpointError if they are in a checkpoint that is no longer intact.
    """
    best = state.progress.best
    if parts.arguments.run.final_weights == "last":
        if state.average is None:
            return "last weights"
        state.average.exchange()
        return "averages of the last weights (EMA)"
    path = checkpoint_path(state.folder, best["step"])
    try:
        tensors = read_checkpoint(path)[1]
    except NoCheckpointError as error:
        raise CheckpointError(f"The best weights cannot be saved as the model: {error}") from None
    state.load_weights(tensors["ema" if best["weights"] == "ema" else "model"])
    kind = "averaged (EMA) " if best["weights"] == "ema" else ""
    return f"{kind}weights of step {best['step']}, the best: {best['metric']} {100 * best['score']:.2f} %"


def dry_run(parts: Parts, state: TrainingState) -> list[Any]:
    """Train two steps and evaluate one batch, report what the whole run would take, and leave no files."""
    arguments, plan, accelerator, progress = parts.arguments, parts.plan, state.accelerator, state.progress
    say(describe(parts, state))
    train_loader, eval_loader = loaders(parts, state)
    micro_batches = iter(train_loader)
    gradients = StepGradients(state, parts.objective, plan, arguments.run.seed)
    seconds = []
    for step in range(min(2, parts.num_steps)):
        batches = [next(micro_batches) for _ in range(plan.num_micro_batches(step))]
        start = time.perf_counter()
        keep_rate = parts.keep_rates.at(step)
        if accelerator.num_processes > 1 and step == 0:
            gradients.fit_into_memory(batches[0], parts.keep_rates.highest_from(0))
        loss = gradients.backward(batches, keep_rate)
        state.optimizer.step()
        state.optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        progress.step += 1
    train_loader.close()
    start = time.perf_counter()
    evaluate(accelerator, state.model, [next(iter(eval_loader))])
    num_evaluations = math.ceil(parts.num_steps / (arguments.run.eval_steps or plan.steps_per_epoch))
    try:
        eval_seconds = (time.perf_counter() - start) * len(eval_loader) * num_evaluations
    except TypeError:
        eval_seconds = 0.0  # streamed data has no length
    eval_loader.close()
    total = seconds[-1] * parts.num_steps + eval_seconds
    target = parts.keep_rates.target
    say(
        f"Dry run: loss {loss.item():.3f}, {memory_gib(accelerator.device):.2f} GiB at the peak, "
        f"{parts.macs(1.0) / 1e9:.4f} GMACs dense and {parts.macs(target) / 1e9:.4f} at keep rate "
        f"{in_words(target)}, {seconds[-1]:.3f} s for a step of {plan.batch_size} images at keep rate "
        f"{in_words(keep_rate)}. {parts.num_steps} steps and {num_evaluations} evaluations would take "
        f"{datetime.timedelta(seconds=round(total))} or less, plus the time to load images. Nothing was saved."
    )
    return []


def describe(parts: Parts, state: TrainingState) -> str:
    """Settings of the run other than the defaults, and what they come to, as text."""
    arguments, accelerator, target = parts.arguments, state.accelerator, parts.keep_rates.target
    tower, num_labels = tower_of(state.network), state.network.config.num_labels
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    num_trained = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    frozen = "" if num_trained == num_parameters else f" ({num_trained / 1e6:.2f} M trained)"
    settings = shlex.join(arguments.as_flags()) or "all settings have their defaults"
    settings = textwrap.fill(f"Settings: {settings}", 100, subsequent_indent="  ", break_on_hyphens=False)
    start = (
        ""
        if arguments.model.model is not None
        else "No `--model`: training starts from RANDOM WEIGHTS, which takes many images and epochs. `--model "
        "google/vit-base-patch16-224`, or a folder, starts from trained ones.\n"
    )
    counts = (
        "streamed images"
        if parts.splits.is_streamed
        else f"{len(parts.splits.train)} training and {len(parts.splits.evaluation)} evaluation images"
    )
    passes = parts.plan.accumulation_steps * state.progress.accumulation_factor
    unreached = "".join(f"\n{sentence}" for sentence in never_reached(parts))
    return (
        f"{settings}\n{start}"
        f"{counts}, {num_labels} classes, {num_parameters / 1e6:.2f} M parameters{frozen}, layers "
        f"{tower.config.reorganization_layers} of {len(tower.layers)} reorganize at keep rate "
        f"{in_words(target)}, inattentive tokens {tower.config.inattentive_tokens}, "
        f"{parts.macs(target) / 1e9:.4f} GMACs ({parts.macs(1.0) / 1e9:.4f} dense), learning rate "
        f"{arguments.learning_rate:g}, {parts.num_steps} steps of {parts.plan.batch_size} images on "
        f"{accelerator.num_processes} x {accelerator.device.type}, {passes} forward passes for each"
        f"{unreached}"
    )


def never_reached(parts: Parts) -> list[str]:
    """Sentences about schedules that would end only after the run."""
    optimization, num_steps, schedule = parts.arguments.optimization, parts.num_steps, parts.keep_rates
    sentences = []
    if warmup_steps(optimization, parts.plan.steps_per_epoch, num_steps) >= num_steps:
        sentences.append(
            f"The learning rate never reaches its peak: `--warmup-epochs {optimization.warmup_epochs:g}` is no less "
            "than the whole training."
        )
    if 0 < parts.arguments.learning_rate < optimization.min_learning_rate:
        sentences.append(
            f"The learning rate rises after its peak of {parts.arguments.learning_rate:g}: `--min-learning-rate` "
            f"{optimization.min_learning_rate:g} is above it."
        )
    last, target = (
        schedule.highest_from(num_steps - 1),
        schedule.highest_from(schedule.dense_steps + schedule.shrink_steps),
    )
    if last != target:
        sentences.append(
            f"The keep rate never reaches {in_words(target)}, at which the model is evaluated and saved: the training "
            f"ends at {in_words(last)}, as `--keep-rate-dense-epochs` and `--keep-rate-shrink-epochs` are longer."
        )
    return sentences
