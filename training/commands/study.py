"""The command `evit study`: settings times seeds, trained and summed up in one table.

evit study digits                                    # a packaged study
evit study my_study.yaml --jobs 2 --output-dir runs/my_study
evit study cifar10 -- --dataset CIFAR/train.parquet CIFAR/test.parquet
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..screen import say, screen, show_result
from ..settings import AT_LEAST_ONE, FlagParser, json_setting, quiet_setting, setting
from ..sharing.command import public_command
from .errors import command


@dataclass
class StudyArguments:
    """How to carry out a study."""

    output_dir: str | None = setting(
        None, "Folder for the runs, study.md, study.json and study.png; by default runs/ and the study's name."
    )
    jobs: int | None = setting(
        None, "Runs at a time; by default one for each GPU, or one. On CPUs they share the threads.", AT_LEAST_ONE
    )
    batch_size: int = setting(64, "Images for each forward in the measurement of speed.", AT_LEAST_ONE)
    no_speed: bool = setting(False, "Leave out the measurement of speed, as on a machine that does other work.")
    json: bool = json_setting()
    quiet: bool = quiet_setting()


class RunsFailedError(RuntimeError):
    """Some runs of a study failed; its message names them."""

    status, is_table = 1, True


@command("study")
def main(argv: list[str]) -> None:
    """Carry out a study; the same command resumes it.

    Exit status: 0 done; 1 a run failed, the table has the others; 2 a study that cannot work; 143 and 130 stopped by
    SIGTERM and SIGINT, all runs saved.
    """
    parser = FlagParser(
        "study",
        [StudyArguments],
        usage="evit study STUDY [--jobs 2] [--flag value ...] [-- --flag-of-train value ...]",
        description="Train several settings with several seeds and compare them: mean and standard error over seeds, "
        "differences within seeds, operations and speed, as a table, JSON and a figure. STUDY is a YAML file or the "
        "name of a packaged study. Started again, the command resumes: no run is trained twice. What follows `--` "
        "are flags of `evit train` for all runs, such as --dataset with your own copy of the data.",
    )
    parser.add_argument("study", help="YAML file, or the name of a packaged study.")
    end = argv.index("--") if "--" in argv else len(argv)
    (arguments,), rest, _ = parser.parse(argv[:end])
    with screen(arguments.quiet, arguments.json):
        carry_out(rest.study, arguments, argv[end + 1 :])


def carry_out(name: str, arguments: StudyArguments, train: Sequence[str] = ()) -> None:
    """Train the runs of a study, and write and show its table.

    Args:
        name: YAML file, or name of a packaged study.
        arguments: see `StudyArguments`.
        train: further words of `evit train` for all runs.

    Raises: ValueError for a study that cannot work; RunsFailedError if runs failed.
    """
    from ..studies.study import read_study

    study = read_study(name, train)
    output_dir = Path(arguments.output_dir or Path("runs") / study.name)

    import torch

    from ..studies.report import as_json, as_markdown, draw, measure_speed, summarize
    from ..studies.runner import check_record, run_all

    check_record(study, output_dir)
    num_gpus = torch.cuda.device_count()
    runs = study.runs(output_dir)
    failed = run_all(runs, arguments.jobs or max(1, num_gpus), num_gpus)
    if any(run.is_done for run in runs):
        batch_size = None if arguments.no_speed else arguments.batch_size
        speeds = None if batch_size is None else measure_speed(runs, batch_size)
        rows = summarize(study, runs, speeds)
        table = as_markdown(
            study,
            rows,
            batch_size,
            public_command(shlex.join(["evit", "study", name, *(["--", *train] if train else [])])),
        )
        report = as_json(study, rows, batch_size)
        (output_dir / "study.md").write_text(table, "utf-8")
        (output_dir / "study.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        draw(study, rows, output_dir / "study.png")
        show_result(table, report)
        say(f"Saved in {output_dir}: study.md, study.json, study.png, and a folder for each run.")
    if failed:
        raise RunsFailedError(
            "\n".join(["runs failed:", *(f"{run.name}: {reason}" for run, reason in failed.items())])
        )
