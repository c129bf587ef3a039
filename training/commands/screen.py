"""What a command prints: results on standard output, remarks and progress where they do not get in the way."""

import json
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from ..settings import setting


@dataclass
class ScreenArguments:
    """What is printed, and how. Settings of a command inherit it.

    `remarks_on_stderr` keeps remarks off standard output without `--json` too, where results are printed row by row.
    """

    remarks_on_stderr: ClassVar[bool] = False

    json: bool = setting(False, "Print results as JSON on standard output, everything else on standard error.")
    quiet: bool = setting(False, "Print results and errors only.")

    def say(self, text: str) -> None:
        """Print a remark, unless `--quiet` is given."""
        if not self.quiet:
            print(text, file=sys.stderr if self.json or self.remarks_on_stderr else sys.stdout)

    def print_report(self, report: Any) -> None:
        """Print the results as one line of JSON, if `--json` is given."""
        if self.json:
            print(json.dumps(report))

    def progress(self, unit: str, total: int | None = None, items: Any = None) -> Any:
        """A progress bar on standard error, if that is a terminal and `--quiet` is not given.

        Args:
            unit: what is counted, in the singular.
            total: number of them; by default that of `items`.
            items: what to iterate over; None for a bar that is updated by hand.
        """
        from tqdm import tqdm

        return tqdm(items, total=total, unit=unit, file=sys.stderr, disable=self.quiet or None)
