"""The model card of a run or of a model folder, rendered from its files and from nothing else."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..settings import Macs, budget_in_words, budget_of, rate_in_words
from .command import public_command, without_paths
from .hub import CARD, check_card, render_card, split_card


if TYPE_CHECKING:
    from transformers import PreTrainedModel


BEGIN, END = "<!-- evit:begin -->", "<!-- evit:end -->"
MAX_CLASS_ROWS = 50
FIGURES = {
    "tradeoff.png": "Accuracy against operations, one point for each keep rate",
    "kept_patches.png": "Evaluation images and the patches that are left of them at each layer",
}


@dataclass(frozen=True)
class FinishedRun:
    """What a run wrote down, and what its card says of that.

    Args:
        folder: of the run.
        config: `model/config.json`.
        results: `results.json`, one entry for each keep rate, the dense model first.
        report: `class_report.json`.
        record: `run.json`.
        settings: `arguments.yaml`, without paths of this machine.
    """

    folder: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]
    report: dict[str, Any]
    record: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Read the files of a run.

        Raises: ValueError naming the file that is missing or damaged.
        """
        name = ""
        try:
            values = []
            for name in ("model/config.json", "results.json", "class_report.json", "run.json", "arguments.yaml"):
                text = (folder / name).read_text("utf-8")
                values.append(yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text))
                kind = list if name == "results.json" else dict
                if not isinstance(values[-1], kind) or not all(isinstance(x, (dict, str)) for x in values[-1]):
                    raise ValueError("it does not hold what a run writes")
        except FileNotFoundError:
            raise ValueError(f"`{folder}` is not a finished run: {name} is missing.") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"`{folder / name}` cannot be read: {' '.join(str(error).split())}") from None
        config, results, report, record, settings = values
        return cls(folder, config, results, report, record, without_paths(settings))

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, by number."""
        return self.report["label_names"]

    @property
    def keep_rate(self) -> float | list[float]:
        """Keep rate of the model."""
        return self.report["keep_rate"]

    @cached_property
    def target(self) -> dict[str, Any]:
        """Result at the model's own keep rate."""
        return next(result for result in self.results if result["keep_rate"] == self.keep_rate)

    @property
    def metric(self) -> str:
        """Key of the main score in a result."""
        return "top1" if "top1" in self.target else "micro_f1"

    @property
    def columns(self) -> dict[str, str]:
        """Headings of the scores in the table of results."""
        return {"top1": "top-1 %", "top5": "top-5 %"} if self.metric == "top1" else {"micro_f1": "micro F1 %"}

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the accuracy, in percent; None for an F1 score, which is not a proportion."""
        return wilson_interval(self.target["top1"], self.target["num_images"]) if self.metric == "top1" else None

    @property
    def by_class(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and scores of the classes, in ascending order of F1."""
        return sorted(zip(self.label_names, self.report["by_class"], strict=True), key=lambda row: row[1]["f1"])

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return " ".join(self.settings["dataset"])

    @property
    def tower(self) -> dict[str, Any]:
        """Sizes and settings of the layers; runs of earlier versions have them only in their configuration."""
        tower = self.record.get("tower") or self.config
        inattentive_tokens = "fused" if tower.get("fuse_inattentive_tokens", True) else "dropped"  # the old name
        return {"inattentive_tokens": inattentive_tokens, **tower}

    @property
    def architecture(self) -> str:
        """Class and size of the model."""
        name, tower = self.config["architectures"][0], self.tower
        return f"{name} of {tower['num_hidden_layers']} layers, {tower['hidden_size']} wide"

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Pictures of the run with what they show."""
        return [(name, text) for name, text in FIGURES.items() if (self.folder / name).exists()]

    @property
    def command(self) -> str:
        """Command line of the run."""
        return public_command(self.record["command"]).replace("`", "'").replace("\n", " ")

    @property
    def duration(self) -> str:
        """Epochs that were trained, and those that were planned if the run ended earlier."""
        planned, done = self.settings["epochs"], self.record.get("num_epochs")
        if done is None:  # streamed data has no epochs
            return f"{self.record['num_steps']} steps"
        return _epochs(done) if done == planned else f"{_epochs(done)} (of {planned:g} planned)"

    @property
    def budget(self) -> float | list[float] | Macs:
        """What the training was asked for: keep rate of the model, or share of operations."""
        macs = self.settings.get("macs")
        return self.keep_rate if macs is None else Macs(macs)

    @property
    def kept(self) -> str:
        """Share of the patches that the model keeps, or one for each layer."""
        shares = f"the share{'s' * isinstance(self.keep_rate, list)} {rate_in_words(self.keep_rate)}"
        return f"{shares} ({self.budget})" if isinstance(self.budget, Macs) else shares

    @property
    def schedule(self) -> str:
        """Keep rates of the training, in words."""
        dense, shrink = self.settings["keep_rate_dense_epochs"], self.settings["keep_rate_shrink_epochs"]
        rates, done = self.settings.get("keep_rate_range"), self.record.get("num_epochs")
        drawn = rates and f"a rate drawn between {rates[0]:g} and {rates[1]:g} in each step"
        target = drawn or budget_in_words(self.budget)
        phases = [f"keep rate 1.0 for {_epochs(dense)}"] if dense else []
        phases += [f"a cosine over {_epochs(shrink)}"] if shrink else []
        if not phases:
            return drawn or f"{target} from the first step on"
        is_cut = done is not None and done < dense + shrink
        end = f"; the training ended after {_epochs(done)}, before that" if is_cut else ""
        return f"{', '.join(phases)}, then {target}{end}"

    def row_name(self, result: dict[str, Any]) -> str:
        """What a row of the table of results was measured at."""
        rate = result["keep_rate"]
        return f"{rate_in_words(self.budget if rate == self.keep_rate else rate)}{' (dense)' * (rate == 1.0)}"

    @property
    def base_model(self) -> str | None:
        """Hub id of the model that the training started from; None for random weights and for one of this machine."""
        if "base_model" in self.record:
            return self.record["base_model"]
        model = self.settings["model"]  # runs of earlier versions
        return model if model and "/" in model else None

    @property
    def start(self) -> str:
        """What the training started from."""
        return self.record.get("started_from") or self.settings["model"] or "random weights"

    @property
    def versions(self) -> str:
        """Versions of the packages."""
        return ", ".join(f"{name} {number}" for name, number in self.record["versions"].items())

    def metadata(self, model_name: str) -> str:
        """Return the metadata of the card as YAML."""
        from huggingface_hub import EvalResult, ModelCardData

        kind = "accuracy" if self.metric == "top1" else "f1"
        dataset_id = self.record.get("dataset_id")
        data = ModelCardData(
            license=self.settings["model_license"],
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["evit", "vision", "token-reduction", "image-classification"],
            datasets=[dataset_id] if dataset_id else None,
            model_name=model_name,
            metrics=[kind],
            base_model=self.base_model,
            eval_results=[
                EvalResult(
                    task_type="image-classification",
                    dataset_type=dataset_id or re.sub(r"[^\w./-]", "-", self.dataset),
                    dataset_name=self.dataset,
                    metric_type=kind,
                    metric_name=f"{self.columns[self.metric].removesuffix(' %')} at {budget_in_words(self.budget)}",
                    metric_value=round(100 * self.target[self.metric], 2),
                )
            ],
        )
        return data.to_yaml().strip()


def _epochs(number: float) -> str:
    return f"{number:.4g} epoch{'s' * (number != 1)}"


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, in percent.

    Args:
        share: what was observed, in [0, 1].
        count: number of observations.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959964
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def render_run_card(run: Path, repo_id: str | None) -> str:
    """Card of a finished run.

    Args:
        run: its folder, with `model/config.json`, `arguments.yaml`, `results.json`, `class_report.json`, `run.json`.
        repo_id: name of the model on the Hub, for the code to paste; None for a run that is only here.

    Returns: the card; what a person had added to `README.md` outside of the rendered part is kept, and so is metadata
        that is not rendered.

    Raises: ValueError if something is missing or blank, or if `README.md` there cannot be read.
    """
    name = repo_id.split("/")[-1] if repo_id else run.resolve().name
    finished = FinishedRun.read(run)
    with _values_of(run):
        text = render_card(
            "run_card_template.md",
            metadata=finished.metadata(name),
            title=name,
            location=repo_id or f"{name}/model",
            family=family_of(finished.tower["model_type"]),
            is_multi_label=finished.metric != "top1",
            at=budget_in_words(finished.budget),
            run=finished,
            max_class_rows=MAX_CLASS_ROWS,
        )
    check_card(text)
    card = run / CARD
    return keep_what_was_added(read_card(card.read_bytes()), text) if card.exists() else text


def render_folder_card(folder: Path, repo_id: str) -> str:
    """Card of a model folder of which no more is known than its files tell.

    Args:
        folder: with config.json, and evaluation.json if `evit evaluate` was run.
        repo_id: name of the model on the Hub, for the code to paste.

    Returns: the card.

    Raises: ValueError if something is missing or blank, or if the model is not a classifier that reorganizes.
    """
    from huggingface_hub import ModelCardData

    from evit_hf.profiling import MacsFormula
    from evit_hf.towers import tower_of

    model = _empty_model(folder)
    config, tower, macs = model.config, tower_of(model), MacsFormula.of(model)
    report = json.loads((folder / "evaluation.json").read_text()) if (folder / "evaluation.json").exists() else {}
    results = [result for result in report.get("results", []) if "top1" in result]
    share = tower.config.macs
    budget = tower.config.keep_rate if share is None else Macs(share)
    kept = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if share is None else (1.0, budget)
    name = repo_id.split("/")[-1]
    metadata = ModelCardData(
        library_name="transformers",
        license="other",
        pipeline_tag="image-classification",
        tags=["evit", "vision", "token-reduction", "image-classification"],
        model_name=name,
    )
    with _values_of(folder):
        text = render_card(
            "folder_card_template.md",
            metadata=metadata.to_yaml().strip(),
            title=name,
            location=repo_id,
            family=family_of(config.model_type),
            is_multi_label=config.problem_type == "multi_label_classification",
            config=config,
            tower=tower,
            num_layers=len(tower.layers),
            architecture=(config.architectures or [type(model).__name__])[0],
            budget=budget_in_words(budget),
            costs=[(str(one), macs(**budget_of(one)) / 1e9) for one in kept],
            label_names=[str(name) for _, name in sorted(config.id2label.items())][:MAX_CLASS_ROWS],
            dataset=" ".join(without_paths(report.get("dataset", []))),
            results=[(_row_name(result), result) for result in results],
            version=version("evit-hf"),
        )
    check_card(text)
    return text


def _row_name(result: dict[str, Any]) -> str:
    """What `evit evaluate` measured."""
    return rate_in_words(Macs(result["macs"]) if "macs" in result else result["keep_rate"])


def family_of(model_type: str) -> str | None:
    """The family of a model that is not of EViT's own classes, as its model type; None for EViT."""
    return None if model_type in ("evit", "evit_lv") else model_type


def _empty_model(folder: Path) -> "PreTrainedModel":
    """The classifier of a folder without its weights, which are on the meta device.

    Raises: ValueError if the folder holds none that reorganizes.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageClassification

    from evit_hf import EViTConfig, reorganize
    from evit_hf.towers import tower_of

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many kinds, for a model of a different library or a damaged file
        raise ValueError(f"config.json is not that of an EViT: {' '.join(str(error).split())[:200]}") from None
    name = (config.architectures or [""])[0]
    with init_empty_weights():  # what a model computes when it is made needs a device with numbers
        if isinstance(config, EViTConfig):
            if name and "ForImageClassification" not in name:
                raise ValueError(f"config.json is of an {name}, which has no classifier.")
            return AutoModelForImageClassification.from_config(config)
        model_class = getattr(transformers, name, None)
        if model_class not in AutoModelForImageClassification._model_mapping.values():
            raise ValueError(f"config.json is of a model of type '{config.model_type}', not an EViT.")
        model = model_class(config)
    if not hasattr(tower_of(model).config, "keep_rate"):
        raise ValueError("config.json has no keep rate: the model is dense")
    return reorganize(model)


@contextmanager
def _values_of(folder: Path) -> Iterator[None]:
    """Name the folder whose files lack a value that its card needs.

    Raises: ValueError.
    """
    from jinja2 import UndefinedError

    try:
        yield
    except (AttributeError, LookupError, StopIteration, TypeError, ZeroDivisionError, UndefinedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the files in `{folder}` lack a value ({reason})") from None


def card_to_push(source: Path, export: Path, repo_id: str, there: bytes | None) -> tuple[str | None, str | None]:
    """Card for a push, which names this repository and keeps what people wrote into the existing one.

    A run's card is rendered again, for this name. A model folder without card gets one of what its files tell.

    Args:
        source: the run or model folder; the run's own README.md is renewed too.
        export: see `export_folder`; with the folder's own README.md, if it has one.
        repo_id: where it goes.
        there: the card on the Hub, None if it has none.

    Returns: the card, None to leave the one on the Hub as it is; and what there is to say, None if nothing.
    """
    where = f"The card in {source}"
    try:
        if (source / "run.json").exists():
            here = render_run_card(source, repo_id)
            (source / CARD).write_text(here, "utf-8")
        elif (source / CARD).exists():
            here = read_card((source / CARD).read_bytes())
        else:
            here = render_folder_card(export, repo_id)
        where = f"The card of `{repo_id}` on the Hub"
        there_text = None if there is None else read_card(there)
        if there_text is None or written_by_hand(there_text) == written_by_hand(here):
            return here, None
        if not written_by_hand(here):
            return keep_what_was_added(there_text, here), None
        return here, "The card on the Hub had its own text: it stays in the repository's history."
    except ValueError as error:
        return None, f"{where} was left as it is: {error}"
    except OSError as error:  # of this machine: what the Hub has was read before
        return None, f"{where} was left as it is: {error.strerror} ({error.filename})."


def read_card(content: bytes) -> str:
    """Text of a card that can be merged.

    Raises: ValueError if it is not UTF-8, or if its metadata is not a YAML mapping.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    split_card(text)
    return text


def keep_what_was_added(old: str, new: str) -> str:
    """The new card with what a person had added to the old one.

    Args:
        old: a card that may have text outside of the marks, and its own metadata.
        new: a card as rendered.

    Returns: the old card with its rendered part replaced and with the new metadata laid over its own; the new card
        with the whole old text below it, if the old one has no marks.

    Raises: ValueError if the old metadata is not a YAML mapping.
    """
    metadata, body = split_card(new)
    old_metadata, old_body = split_card(old)
    before, rendered, after = split_at_marks(old_body)
    if rendered:
        body = before + split_at_marks(body)[1] + after
    else:
        body = f"{body.rstrip()}\n\n{old_body.lstrip()}"
    merged = {**(old_metadata or {}), **(metadata or {})}
    return f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()}\n---\n{body}"


def written_by_hand(card: str) -> str:
    """What a person wrote into a card outside of the rendered part; all of it, if there is no rendered part."""
    before, _, after = split_at_marks(split_card(card)[1])
    return re.sub(r"<!-- (The text|What stands) between these marks .*? -->", "", before + after).strip()


def split_at_marks(body: str) -> tuple[str, str, str]:
    """Text before, inside and after the marks; all of it before, if there are none."""
    start = body.find(BEGIN)
    end = body.find(END, start)
    if start < 0 or end < 0:
        return body, "", ""
    end += len(END)
    return body[:start], body[start:end], body[end:]


__all__ = ["card_to_push", "keep_what_was_added", "render_folder_card", "render_run_card", "written_by_hand"]
