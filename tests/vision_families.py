"""Tiny random models of every family that `reorganize` takes, and an independent reorganization, token by token."""

import math

import torch
import transformers


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 8,
}
LAYERS = [1, 2, 3]
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}


def _clip(name):
    vision = _config(f"{name}VisionConfig").to_dict()
    config = getattr(transformers, f"{name}Config")
    return config(vision_config=vision, text_config=TEXT, projection_dim=16, num_labels=5)


def _config(name, **fields):
    return getattr(transformers, name)(**{**SIZES, **fields})


# Name of a case: (class, its configuration when called).
CASES = {
    "vit": ("ViTModel", lambda: _config("ViTConfig")),
    "vit-classifier": ("ViTForImageClassification", lambda: _config("ViTConfig", num_labels=5)),
    "vit-msn": ("ViTMSNForImageClassification", lambda: _config("ViTMSNConfig", num_labels=5)),
    "deit": ("DeiTForImageClassificationWithTeacher", lambda: _config("DeiTConfig", num_labels=5)),
    "vivit": (
        "VivitForVideoClassification",
        lambda: _config("VivitConfig", num_frames=4, tubelet_size=[2, 8, 8], image_size=24, num_labels=5),
    ),
    "ast": (
        "ASTForAudioClassification",
        lambda: _config("ASTConfig", num_mel_bins=48, max_length=48, frequency_stride=8, time_stride=8, num_labels=5),
    ),
    "pixio": ("PixioModel", lambda: _config("PixioConfig", mlp_ratio=2, n_cls_tokens=3)),
    "dinov2": (
        "Dinov2ForImageClassification",
        lambda: _config("Dinov2Config", mlp_ratio=2, num_labels=5, layerscale_value=0.7),
    ),
    "dinov2-swiglu": ("Dinov2Model", lambda: _config("Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        lambda: _config("Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=3, num_labels=5),
    ),
    "dinov3": ("DINOv3ViTModel", lambda: _config("DINOv3ViTConfig", num_register_tokens=2)),
    "sapiens2": ("Sapiens2Model", lambda: _config("Sapiens2Config", num_key_value_heads=2)),
    "tipsv2": ("Tipsv2VisionModel", lambda: _config("Tipsv2VisionConfig", mlp_ratio=2)),
    "radio": ("RadioModel", lambda: _config("RadioConfig", mlp_ratio=2.0, max_img_size=48)),
    "clip": ("CLIPVisionModel", lambda: _config("CLIPVisionConfig")),
    "clip-projection": ("CLIPVisionModelWithProjection", lambda: _config("CLIPVisionConfig")),
    "clip-classifier": ("CLIPForImageClassification", lambda: _clip("CLIP")),
    "metaclip2": ("MetaClip2ForImageClassification", lambda: _clip("MetaClip2")),
    "chinese-clip": ("ChineseCLIPVisionModel", lambda: _config("ChineseCLIPVisionConfig")),
    "altclip": ("AltCLIPVisionModel", lambda: _config("AltCLIPVisionConfig")),
    "beit": (
        "BeitForImageClassification",
        lambda: _config("BeitConfig", num_labels=5, use_relative_position_bias=True, layer_scale_init_value=0.5),
    ),
    "beit-shared": ("BeitModel", lambda: _config("BeitConfig", use_shared_relative_position_bias=True)),
}


def build(case, implementation="sdpa", **fields):
    """A model with random weights large enough that attention differs between tokens, in evaluation mode."""
    name, config = CASES[case]
    config = config()
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(case, batch_size=2):
    """Random inputs: images of 6 x 6 patches, two tubes of 3 x 3 for videos, a spectrogram of 6 x 6 for audio."""
    generator = torch.Generator().manual_seed(2)
    if case == "vivit":
        return {"pixel_values": torch.randn(batch_size, 4, 3, 24, 24, generator=generator)}
    if case == "ast":
        return {"input_values": torch.randn(batch_size, 48, 48, generator=generator)}
    return {"pixel_values": torch.randn(batch_size, 3, 48, 48, generator=generator)}


def rotated(x, num_prefix, patches, cos, sin):
    """Queries or keys, (sequence_length, num_heads, head_dim), each turned by the position of its patch."""
    x, half = x.clone(), x.shape[-1] // 2
    for i, patch in enumerate(patches, start=num_prefix):
        if patch is not None:
            x[i] = x[i] * cos[patch] + torch.cat((-x[i][:, half:], x[i][:, :half]), dim=-1) * sin[patch]
    return x


def reference(layer, tokens, num_prefix, num_scoring, keep_rate, fuse, patches, rotary=None, bias=None):
    """One layer for one image in float64, with loops over heads and tokens; reads weights, calls no attention.

    Args:
        layer: dense, in float64.
        tokens: (sequence_length, hidden_size).
        patches: patch of each image token, None for a fused one.
        rotary: (cos, sin), each (num_patches, head_dim), or None.
        bias: (num_heads, num_tokens, num_tokens) over all positions, or None.

    Returns: tokens and patches after the layer; the patches that were kept, in descending order of score.
    """
    attention = getattr(layer, "attention", None) or layer.self_attn
    norm = next(getattr(layer, n) for n in ("layernorm_before", "norm1", "layer_norm1") if hasattr(layer, n))
    heads, dim = getattr(attention, "num_attention_heads", None) or attention.num_heads, attention.head_dim
    normed, length = norm(tokens), len(tokens)
    q, k, v = (getattr(attention, f"{x}_proj")(normed).view(length, -1, dim) for x in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        q, k = (rotated(x, num_prefix, patches, *rotary) for x in (q, k))
    position = list(range(num_prefix)) + [None if p is None else p + num_prefix for p in patches]
    output, scores = torch.zeros(length, heads, dim, dtype=tokens.dtype), torch.zeros(length, dtype=tokens.dtype)
    for head in range(heads):
        key_head = head * k.shape[1] // heads
        for i in range(length):
            logits = k[:, key_head] @ q[i, head] / math.sqrt(dim)
            if bias is not None:
                for j in range(length):
                    a, b = position[i], position[j]
                    if a is not None and b is not None:
                        logits[j] += bias[head, a, b]
                    elif i < num_prefix or j < num_prefix:  # any patch has this bias with the class token
                        logits[j] += bias[head, num_prefix if a is None else a, num_prefix if b is None else b]
                    elif i == j:  # the fused token itself: no distance
                        logits[j] += bias[head, num_prefix, num_prefix]
            probabilities = logits.softmax(0)
            output[i, head] = probabilities @ v[:, key_head]
            if i < num_scoring:
                scores += probabilities / (heads * num_scoring)
    projection = getattr(attention, "o_proj", None) or attention.out_proj
    branch = projection(output.reshape(length, -1))
    branch = layer.layer_scale1(branch) if hasattr(layer, "layer_scale1") else branch
    tokens = tokens + (layer.lambda_1 * branch if hasattr(layer, "lambda_1") else branch)

    kept, image_scores = None, scores[num_prefix:]
    num_kept = math.ceil(keep_rate * len(patches)) if keep_rate is not None else len(patches)
    if num_kept < len(patches):
        order = sorted(range(len(patches)), key=lambda i: -image_scores[i].item())
        rows = [tokens[num_prefix + i] for i in order[:num_kept]]
        new_patches = [patches[i] for i in order[:num_kept]]
        kept = list(new_patches)
        if fuse:
            rows.append(sum(image_scores[i] * tokens[num_prefix + i] for i in order[num_kept:]))
            new_patches.append(None)
        tokens, patches = torch.cat((tokens[:num_prefix], torch.stack(rows))), new_patches
    norm = next(getattr(layer, n) for n in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, n))
    branch = layer.mlp(norm(tokens))
    branch = layer.layer_scale2(branch) if hasattr(layer, "layer_scale2") else branch
    return tokens + (layer.lambda_2 * branch if hasattr(layer, "lambda_2") else branch), patches, kept
