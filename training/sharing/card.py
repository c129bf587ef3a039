"""The model card of a run, rendered from what the run wrote down and from nothing else."""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig

from evit_hf import EViTConfig
from evit_hf.profiling import num_macs

from .hub import check_card, render_card


TEMPLATE = Path(__file__).with_name("run_card_template.md")
FOLDER_TEMPLATE = Path(__file__).with_name("folder_card_template.md")
BEGIN, END = "<!-- evit:begin -->", "<!-- evit:end -->"
MAX_CLASS_ROWS = 50


def render_run_card(run: Path, repo_id: str) -> str:
    """Card of a finished run.

    Args:
        run: its folder, with `model/config.json`, `arguments.yaml`, `results.json`, `class_report.json`, `run.json`.
        repo_id: name of the model on the Hub, for the code to paste.

    Returns: the card; what a person had added to `README.md` outside of the rendered part is kept, and so is metadata
        that is not rendered.

    Raises: ValueError if something is missing or blank.
    """
    try:
        config, results, report, record = (
            json.loads((run / name).read_text())
            for name in ("model/config.json", "results.json", "class_report.json", "run.json")
        )
        settings = yaml.safe_load((run / "arguments.yaml").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"`{run}` is no finished run: {error.filename} is missing.") from None
    names = report["label_names"]
    # Of local data the name alone: where it lay is nobody's business.
    dataset = " ".join(Path(name).name if Path(name).exists() else name for name in settings["dataset"])
    target = next(result for result in results if result["keep_rate"] == report["keep_rate"])
    metric = "top1" if "top1" in target else "micro_f1"
    columns = {"top1": "top-1 %", "top5": "top-5 %"} if metric == "top1" else {"micro_f1": "micro F1 %"}
    header = f"| keep rate | {' | '.join(columns.values())} | GMACs | images/s |"
    rows = [
        f"| {result['keep_rate']}{' (dense)' if result['keep_rate'] == 1.0 else ''} | "
        f"{' | '.join(f'{100 * result[column]:.2f}' for column in columns)} | {result['gmacs']:.4f} | "
        f"{result['images_per_second']:.0f} |"
        for result in sorted(results, key=lambda result: -result["gmacs"])
    ]
    by_class = sorted(zip(names, report["by_class"], strict=True), key=lambda row: row[1]["f1"])
    score, count = target[metric], target["num_images"]
    model_name = repo_id.split("/")[-1]
    metadata = ModelCardData(
        license=settings["model_license"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["evit", "vision", "token-reduction", "image-classification"],
        model_name=model_name,
        metrics=["accuracy" if metric == "top1" else "f1"],
        base_model=settings["model"] if settings["model"] and not Path(settings["model"]).exists() else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w./-]", "-", dataset),
                dataset_name=dataset,
                metric_type="accuracy" if metric == "top1" else "f1",
                metric_name=f"{columns[metric].removesuffix(' %')} at keep rate {report['keep_rate']}",
                metric_value=round(100 * score, 2),
            )
        ],
    )
    architecture = config["architectures"][0]
    text = render_card(
        TEMPLATE,
        metadata=metadata.to_yaml().strip(),
        title=model_name,
        repo_id=repo_id,
        label_names=names,
        architecture=f"{architecture} of {config['num_hidden_layers']} layers, {config['hidden_size']} wide",
        layers=config["reorganization_layers"],
        num_layers=config["num_hidden_layers"],
        keep_rate=report["keep_rate"],
        fuse=config["fuse_inattentive_tokens"],
        gmacs=target["gmacs"],
        dense_gmacs=results[0]["gmacs"],
        image_size=config["image_size"],
        millions_of_parameters=record["num_parameters"] / 1e6,
        num_images=count,
        dataset=dataset,
        eval_split=settings["eval_split"] or "evaluation split",
        header=header,
        rule="|---" * (3 + len(columns)) + "|",
        rows=rows,
        speed_note=f"Speed: {target['device']}, {target['dtype']}, batches of {target['batch_size']} images, medians.",
        figures=[
            (name, text)
            for name, text in (
                ("tradeoff.png", "Accuracy against operations, one point for each keep rate"),
                ("kept_patches.png", "Evaluation images and the patches that are left of them at each layer"),
            )
            if (run / name).exists()
        ],
        class_rows=by_class[:MAX_CLASS_ROWS],
        num_hidden_classes=max(0, len(by_class) - MAX_CLASS_ROWS),
        command=record["command"].replace("`", "'").replace("\n", " "),
        recipe=(
            f"{settings['epochs']} epochs in batches of {settings['batch_size']}, AdamW, peak learning rate "
            f"{record['learning_rate']:g}, weight decay {settings['weight_decay']:g}; keep rate 1.0 for "
            f"{settings['keep_rate_dense_epochs']:g} epochs, then down to the target over "
            f"{settings['keep_rate_shrink_epochs']:g}."
        ),
        start=f"It started from {settings['model']}." if settings["model"] else "It started from random weights.",
        num_train_images=record["num_train_images"],
        dataset_licence=record["dataset_licence"] or "not stated by the data set",
        hardware=record["hardware"],
        hours=record["seconds"] / 3600,
        num_steps=record["num_steps"],
        seed=settings["seed"],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        main_metric=columns[metric].removesuffix(" %"),
        error_points=200 * math.sqrt(max(score * (1 - score), 1e-9) / count),
    )
    card = run / "README.md"
    text = keep_what_was_added(card.read_text(), text) if card.exists() else text
    check_card(text)
    return text


def render_folder_card(folder: Path, repo_id: str) -> str:
    """Card of a model folder of which no more is known than its files tell.

    Args:
        folder: with config.json, and evaluation.json if `evit evaluate` was run.
        repo_id: name of the model on the Hub, for the code to paste.

    Returns: the card.

    Raises: ValueError if something is missing or blank.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, EViTConfig):
        raise ValueError(f"`{folder}` holds a model of type '{config.model_type}', not an EViT.")
    report = {}
    if (folder / "evaluation.json").exists():
        report = json.loads((folder / "evaluation.json").read_text())
    metadata = ModelCardData(
        library_name="transformers",
        license="other",
        pipeline_tag="image-classification",
        tags=["evit", "vision", "token-reduction", "image-classification"],
        model_name=repo_id.split("/")[-1],
    )
    text = render_card(
        FOLDER_TEMPLATE,
        metadata=metadata.to_yaml().strip(),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        config=config,
        architecture=(config.architectures or ["EViT"])[0],
        gmacs=num_macs(config) / 1e9,
        costs=[(rate, num_macs(config, rate) / 1e9) for rate in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)],
        label_names=[str(name) for _, name in sorted(config.id2label.items())][:MAX_CLASS_ROWS],
        dataset=" ".join(Path(name).name for name in report.get("dataset", [])),
        results=[result for result in report.get("results", []) if "top1" in result],
        version=version("evit-hf"),
    )
    check_card(text)
    return text


def keep_what_was_added(old: str, new: str) -> str:
    """The new card with what a person had added to the old one.

    Args:
        old: a card that may have text outside of the marks, and metadata of its own.
        new: a card as rendered.

    Returns: the old card with its rendered part replaced and with the new metadata laid over its own; the new card
        with the whole old text below it, if the old one has no marks.
    """
    split = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)
    (new_metadata, new_body) = split.match(new).groups()
    match = split.match(old)
    old_metadata, old_body = match.groups() if match else ("", old)
    merged = {**(yaml.safe_load(old_metadata) or {}), **yaml.safe_load(new_metadata)}
    part = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    if BEGIN in old_body and END in old_body[old_body.index(BEGIN) :]:
        start = old_body.index(BEGIN)
        body = old_body[:start] + part + old_body[old_body.index(END, start) + len(END) :]
    else:
        body = f"{new_body.rstrip()}\n\n{old_body.lstrip()}"
    return f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()}\n---\n{body}"


def written_by_hand(card: str) -> str:
    """What a person wrote into a card outside of the rendered part; all of it, if there is no rendered part."""
    match = re.match(r"---\n.*?\n---\n(.*)", card, re.DOTALL)
    body = match.group(1) if match else card
    if BEGIN in body and END in body:
        body = body[: body.index(BEGIN)] + body[body.index(END) + len(END) :]
    return re.sub(r"<!-- What stands between these marks .*? -->", "", body).strip()


__all__ = ["keep_what_was_added", "render_folder_card", "render_run_card", "written_by_hand"]
