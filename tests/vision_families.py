"""Tiny random models of every family that `reorganize` takes, and an independent reorganization, token by token."""

import math

import timm
import torch
import transformers
from packaging import version
from reference import average_slowly, count_slowly
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva


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
# Of these, what the installed version of Transformers can do: these families' layers take keywords from 5.18 on.
HAS_DINOV2 = version.parse(transformers.__version__) >= version.parse("5.18.0")
SINCE_5_18 = ("Dinov2", "Radio", "Tipsv2")
CASES = {
    case: (name, config)
    for case, (name, config) in CASES.items()
    if hasattr(transformers, name) and (HAS_DINOV2 or not name.startswith(SINCE_5_18))
}
# Where one family is tested for all.
EXAMPLE = "dinov2" if HAS_DINOV2 else "vit-msn"
# What is built in place of a case that the installed version cannot do.
STAND_INS = {} if HAS_DINOV2 else {"dinov2": "vit-msn", "dinov2-registers": "beit"}


def build(case, implementation="sdpa", **fields):
    """A model with random weights large enough that attention differs between tokens, in evaluation mode."""
    name, config = CASES[STAND_INS.get(case, case)]
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


VisionTransformer = timm.models.VisionTransformer
ROTARY = {"use_rot_pos_emb": True}
# Models of timm by the options that published ones use: name of a case: (class, its options).
TIMM_CASES = {
    "vit": (VisionTransformer, {}),
    "deit-distilled": (VisionTransformerDistilled, {}),
    "deit3": (VisionTransformer, {"init_values": 0.5, "no_embed_class": True}),
    "dinov2-registers": (VisionTransformer, {"init_values": 0.5, "reg_tokens": 3, "no_embed_class": True}),
    "clip": (VisionTransformer, {"dynamic_img_size": True, "pre_norm": True, "qkv_bias": False}),
    "qk-norm": (VisionTransformer, {"qk_norm": True}),
    "eva": (Eva, {"global_pool": "avg"}),
    "eva02": (Eva, {**ROTARY, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": 4}),
    "eva02-fused": (Eva, {**ROTARY, "swiglu_mlp": True, "scale_attn_inner": True, "init_values": 0.5}),
    "eva02-post-norm": (Eva, {"use_post_norm": True}),
    "dinov3": (
        Eva,
        {
            **ROTARY,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "num_reg_tokens": 4,
            "use_abs_pos_emb": False,
            "init_values": 0.5,
            "qkv_bias": False,
            "dynamic_img_size": True,
        },
    ),
    "pe": (
        Eva,
        {
            **ROTARY,
            "attn_type": "rope",
            "global_pool": "map",
            "rope_grid_indexing": "xy",
            "use_pre_transformer_norm": True,
        },
    ),
    "rope-mixed": (Eva, {**ROTARY, "rope_type": "mixed", "attn_type": "rope", "no_embed_class": True}),
    "beit": (Beit, {"global_pool": "avg", "use_rel_pos_bias": True, "init_values": 0.5, "use_abs_pos_emb": False}),
    "beit-shared": (Beit, {"use_shared_rel_pos_bias": True, "swiglu_mlp": True}),
}
# Before 1.0.23 timm could not build blocks that normalize afterwards, nor could Transformers load EVA's and BEiT's.
HAS_NEW_TIMM = version.parse(timm.__version__) >= version.parse("1.0.23")
if not HAS_NEW_TIMM:
    del TIMM_CASES["eva02-post-norm"]
TIMM_SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


def timm_model(case="vit", **options):
    """A model of timm with random weights, in evaluation mode."""
    model_class, of_case = TIMM_CASES[case]
    torch.manual_seed(0)
    model = model_class(**{**TIMM_SIZES, "global_pool": "token", **of_case, **options}).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def rotated(x, num_prefix, patches, cos, sin, pairs=False):
    """Queries or keys, (sequence_length, num_heads, head_dim), each turned by the position of its patch.

    Numbers 0 and 1, 2 and 3 ... are turned together, or with `pairs` False those of one half with those of the other.
    """
    x, half = x.clone(), x.shape[-1] // 2
    for i, patch in enumerate(patches, start=num_prefix):
        if patch is not None:
            old, turned = x[i].clone(), torch.empty_like(x[i])
            for j in range(half):
                a, b = (2 * j, 2 * j + 1) if pairs else (j, j + half)
                turned[:, a], turned[:, b] = -old[:, b], old[:, a]
            x[i] = old * cos[..., patch, :] + turned * sin[..., patch, :]
    return x


def projections(attention, normed):
    """Queries, keys and values, each (sequence_length, num_heads, head_dim)."""
    names = [f"{letter}_proj" for letter in "qkv"]
    if getattr(attention, names[0], None) is not None:
        rows = [getattr(attention, name)(normed) for name in names]
    else:
        rows = list((normed @ attention.qkv.weight.T).chunk(3, dim=-1))
        if getattr(attention, "q_bias", None) is not None:
            rows[0], rows[2] = rows[0] + attention.q_bias, rows[2] + attention.v_bias
        elif attention.qkv.bias is not None:
            rows = [row + bias for row, bias in zip(rows, attention.qkv.bias.chunk(3), strict=True)]
    heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
    return [row.view(len(normed), -1, rows[0].shape[-1] // heads) for row in rows]


def scaled(layer, branch, number):
    """The output of half a layer times its layer scale, by the names that families give it."""
    for name in (f"layer_scale{number}", f"ls{number}", f"lambda_{number}", f"gamma_{number}"):
        scale = getattr(layer, name, None)
        if scale is not None:
            return scale(branch) if isinstance(scale, torch.nn.Module) else scale * branch
    return branch


def reference(layer, tokens, num_prefix, num_scoring, num_kept, inattentive, patches, sizes, rotary=None, bias=None):
    """One layer for one image in float64, with loops over heads and tokens; reads weights, calls no attention.

    Args:
        layer: dense, in float64.
        tokens: (sequence_length, hidden_size).
        num_kept: image tokens to keep.
        inattentive: "fused", "dropped" or "counted".
        patches: patch of each image token, None for a fused one.
        rotary: (cos, sin), each ((num_heads,) num_patches, head_dim), or None.
        sizes: patches that each image token counts.
        bias: (num_heads, num_tokens, num_tokens) over all positions, or None.

    Returns: tokens, patches and sizes after the layer; the patches that were kept, in descending order of score; which
        of them counts each token, or None.
    """
    attention = next(getattr(layer, n) for n in ("attention", "self_attn", "attn") if hasattr(layer, n))
    norm = next(getattr(layer, n) for n in ("layernorm_before", "norm1", "layer_norm1") if hasattr(layer, n))
    is_post_norm, length = type(layer).__name__ == "EvaBlockPostNorm", len(tokens)
    q, k, v = projections(attention, tokens if is_post_norm else norm(tokens))
    heads, dim = q.shape[1:]
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        pairs = not getattr(attention, "rotate_half", True)
        q, k = (rotated(x, num_prefix, patches, *rotary, pairs) for x in (q, k))
    position = list(range(num_prefix)) + [None if p is None else p + num_prefix for p in patches]
    output, scores = torch.zeros(length, heads, dim, dtype=tokens.dtype), torch.zeros(length, dtype=tokens.dtype)
    for head in range(heads):
        key_head = head * k.shape[1] // heads
        for i in range(length):
            logits = k[:, key_head] @ q[i, head] / math.sqrt(dim)
            for j, size in enumerate(sizes, start=num_prefix):
                logits[j] += math.log(size)
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
    projection = next(getattr(attention, n) for n in ("o_proj", "out_proj", "proj") if hasattr(attention, n))
    output = output.reshape(length, -1)
    branch = projection(attention.norm(output) if hasattr(attention, "norm") else output)
    tokens = tokens + (norm(branch) if is_post_norm else scaled(layer, branch, 1))

    kept, counted_by, image_scores = None, None, scores[num_prefix:]
    if num_kept < len(patches) and inattentive == "counted":
        keys = k[num_prefix:].mean(dim=1)
        order, counted_by, new_sizes = count_slowly(image_scores.tolist(), keys, sizes, num_kept)
        rows = average_slowly(tokens[num_prefix:], order, counted_by, sizes)
        tokens, sizes, patches = torch.cat((tokens[:num_prefix], rows)), new_sizes, [patches[i] for i in order]
        kept = list(patches)
    elif num_kept < len(patches):
        order = sorted(range(len(patches)), key=lambda i: -image_scores[i].item())
        rows = [tokens[num_prefix + i] for i in order[:num_kept]]
        new_patches = [patches[i] for i in order[:num_kept]]
        kept = list(new_patches)
        if inattentive == "fused":
            rows.append(sum(image_scores[i] * tokens[num_prefix + i] for i in order[num_kept:]))
            new_patches.append(None)
        tokens, patches = torch.cat((tokens[:num_prefix], torch.stack(rows))), new_patches
        sizes = [1] * len(patches)
    norm = next(getattr(layer, n) for n in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, n))
    branch = norm(layer.mlp(tokens)) if is_post_norm else scaled(layer, layer.mlp(norm(tokens)), 2)
    return tokens + branch, patches, sizes, kept, counted_by
