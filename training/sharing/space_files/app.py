"""Demo of an EViT: upload a picture, move the slider, and see the answer, the kept patches and the cost.

Written by `evit space`. It also runs locally: pip install gradio -r requirements.txt && python app.py
"""

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from evit_hf import as_rgb, reorganize  # the import also makes EViT known to the Auto classes
from evit_hf.profiling import MacsFormula
from evit_hf.towers import tower_of
from evit_hf.visualization import blank_inattentive_patches, visualize


HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "space.json").read_text())
SOURCE = str(HERE / "model") if (HERE / "model").is_dir() else SETTINGS["model"]
BLANK = (0.45, 0.62, 0.85)  # colour of dropped patches
MIN_PIXELS = 224  # smaller pictures are shown enlarged
EXAMPLES = sorted((HERE / "examples").glob("*.*"))
STYLE = """
#title textarea, #title input { font-size: 1.6rem; font-weight: 600; background: none; border: none }
#picture img { image-rendering: pixelated; min-height: 200px; object-fit: contain }
.pictures .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important }
.pictures .caption-label { font-size: 0.7rem; max-width: 100%; padding: 2px 6px }
"""

torch.set_grad_enabled(False)
processor = AutoImageProcessor.from_pretrained(SOURCE)
model = reorganize(AutoModelForImageClassification.from_pretrained(SOURCE)).eval()
tower = tower_of(model)
if tower.config.macs is None:
    BUDGET, LABEL, VALUE = "keep_rate", "Keep rate (1.0 is the dense model)", 0.7
else:
    BUDGET, LABEL, VALUE = "macs", "Share of the dense model's operations", tower.config.macs
warm_up = torch.as_tensor(processor(Image.new("RGB", (64, 64)), return_tensors="pt").pixel_values)
model(warm_up)
macs = MacsFormula.of(model, tuple(warm_up.shape[-2:]))
statistics = getattr(processor, "data_config", None) or {"mean": processor.image_mean, "std": processor.image_std}


def classify(image: Image.Image | None, budget: float) -> tuple[dict[str, float], list[Any], str]:
    """Probabilities by class, pictures of the patches that are left after each layer, and the cost in words."""
    if image is None:
        raise gr.Error("Upload a picture first.")
    pixel_values = torch.as_tensor(processor(as_rgb(image), return_tensors="pt").pixel_values)
    start = time.perf_counter()
    try:
        outputs = model(pixel_values, **{BUDGET: float(budget)})
    except ValueError as error:  # a share that is out of reach
        raise gr.Error(str(error)) from None
    milliseconds = 1000 * (time.perf_counter() - start)
    several = model.config.problem_type == "multi_label_classification"
    scores = outputs.logits[0].sigmoid() if several else outputs.logits[0].softmax(-1)
    answer = {str(model.config.id2label[i]): score for i, score in enumerate(scores.tolist())}
    gmacs, dense = (macs(**{BUDGET: share}) / 1e9 for share in (float(budget), 1.0))
    cost = (
        f"{gmacs:.3f} GMACs, {100 * gmacs / dense:.0f} % of the dense model's {dense:.3f}. "
        f"{milliseconds:.1f} ms on this machine."
    )
    return answer, kept_patches(pixel_values, outputs.attentive_index), cost


def kept_patches(pixel_values: torch.Tensor, attentive_index: tuple[torch.Tensor, ...]) -> list[Any]:
    """The picture as the model sees it, and what is left of it after each reorganization layer, with captions."""
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (statistics["mean"], statistics["std"]))
    images = (pixel_values * std + mean).clamp(0, 1)
    height, width = tower.patch_size
    num_patches = (images.shape[-2] // height) * (images.shape[-1] // width)
    gallery = [(as_picture(images), f"all {num_patches} patches")]
    for layer, index in zip(tower.config.reorganization_layers, attentive_index, strict=True):
        left = (index >= 0).sum().item()
        blanked = blank_inattentive_patches(images, index, (height, width), BLANK)
        gallery.append((as_picture(blanked), f"after layer {layer}: {left} of {num_patches}"))
    return gallery


def as_picture(images: torch.Tensor) -> Image.Image:
    """Picture of the first image, (1, 3, height, width) in [0, 1]."""
    pixels = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    scale = max(1, -(-MIN_PIXELS // picture.height))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def compare(image: Image.Image, budget: float) -> tuple[dict[str, float], list]:
    """The dense model's probabilities by class, and the class token's attention in each layer, with captions."""
    budgets = {"keep_rate": "keep_rates", "macs": "macs"}[BUDGET]
    seen = visualize(model, processor, image, num_answers=5, **{budgets: [float(budget)]})
    view = seen.views[0] if seen.views else seen.dense  # at 1.0 the dense model is the only one
    layers = [(seen.attention(view, i), f"layer {stage.layer}") for i, stage in enumerate(view.trace.stages)]
    return dict(seen.dense.answers), layers


def show(image: Image.Image | None, budget: float) -> tuple[dict[str, float], dict[str, float], list, list, str]:
    """All that the page shows of a picture."""
    answer, patches, cost = classify(image, budget)
    dense_answer, attention = compare(image, budget)
    return answer, dense_answer, patches, attention, cost


settings = {"show_label": False, "height": "auto", "elem_classes": "pictures", "render": False}
gallery = gr.Gallery(elem_id="patches", **settings)
attention = gr.Gallery(elem_id="attention", **settings)

with gr.Blocks(title=SETTINGS["title"], analytics_enabled=False) as demo:
    # A text box, not Markdown: a title or label from outside is text and nothing else.
    gr.Textbox(SETTINGS["title"], show_label=False, container=False, interactive=False, elem_id="title")
    with gr.Row():
        with gr.Column(scale=1):
            picture = gr.Image(type="pil", image_mode=None, label="Picture", elem_id="picture", height=320)
            rate = gr.Slider(0.1, 1.0, value=VALUE, step=0.01, label=LABEL, elem_id="rate")
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(scale=1):
            with gr.Row():
                label = gr.Label(num_top_classes=5, label="EViT's answer", elem_id="answer", min_width=200)
                dense = gr.Label(num_top_classes=5, label="The dense model's answer", elem_id="dense", min_width=200)
            cost = gr.Textbox(label="Cost", interactive=False, elem_id="cost")
    inputs, outputs = [picture, rate], [label, dense, gallery, attention, cost]
    for event in (button.click, rate.release, picture.upload):
        event(show, inputs, outputs)
    if EXAMPLES:
        examples = gr.Examples([[str(path)] for path in EXAMPLES], [picture])
        examples.load_input_event.then(show, inputs, outputs)
    gr.Markdown("### Patches that are left after each layer")
    gallery.render()
    gr.Markdown(
        "### Where EViT looks\nThe class token's attention in these layers: black is none, light yellow the most."
    )
    attention.render()


if __name__ == "__main__":
    # Fonts of the system: the page asks no other server for anything.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    demo.launch(theme=theme, css=STYLE)
