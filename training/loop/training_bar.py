"""How a run proceeds: a bar on a terminal; elsewhere, as in a file, a line whenever the log gets one."""

import datetime
from typing import Any

from evit_hf.keep_rate_schedule import KeepRate

from ..data.sampling import StepPlan
from ..screen import bar, say
from .metrics_log import LogWindow


class TrainingBar:
    """Bar over all images of a run, with epoch, time left, images per second, loss, keep rate and last score.

    Args:
        plan: how images are cut into steps.
        num_steps: optimizer steps of the run.
        first_step: those done before.
    """

    def __init__(self, plan: StepPlan, num_steps: int, first_step: int) -> None:
        self.plan, self.num_steps = plan, num_steps
        self.score = ""
        self.bar = bar(
            total=plan.num_images_until(num_steps),
            initial=plan.num_images_until(first_step),
            desc="training",
            unit="images",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left, {rate_fmt}{postfix}",
        )

    def update(self, step: int, window: LogWindow, keep_rate: KeepRate) -> None:
        """Count a step.

        Args:
            step: optimizer steps done, this one included.
            window: has the loss of the last ones.
            keep_rate: of this one.
        """
        if self.bar.disable:
            return
        num_epochs = -(-self.num_steps // self.plan.steps_per_epoch)
        epoch = -(-step // self.plan.steps_per_epoch)
        self.bar.set_description_str(f"epoch {epoch} of {num_epochs}", refresh=False)
        numbers = f"loss {window.mean_loss():.3f}, keep rate {in_words(keep_rate)}{self.score}"
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update(self.plan.num_images_in_step(step - 1))

    def log(self, entry: dict[str, Any]) -> None:
        """Say what the log has, where there is no bar."""
        if not self.bar.disable:
            return
        images_left = self.plan.num_images_until(self.num_steps) - self.plan.num_images_until(entry["step"])
        left = datetime.timedelta(seconds=round(images_left / max(entry["images_per_second"], 1e-9)))
        say(
            f"epoch {entry['epoch']:.4g}, step {entry['step']} of {self.num_steps}: loss {entry['loss']:.3f}, keep "
            f"rate {in_words(entry['keep_rate'])}, {entry['images_per_second']:.0f} images/s, {left} left"
        )

    def pause(self, score: str = "") -> None:
        """Leave out of the speed what was no training, and show the score of an evaluation from now on."""
        self.score = f", {score}" if score else self.score
        if not self.bar.disable:
            self.bar.unpause()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def in_words(keep_rate: KeepRate) -> str:
    """Keep rate, or one for each layer, with three digits."""
    rates = keep_rate if isinstance(keep_rate, list) else [keep_rate]
    return " ".join(f"{rate:.3f}" for rate in rates)
