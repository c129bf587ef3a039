"""Token labelling and mix-token, the training of LV-ViT, as pure functions that follow tokens through reorganization.

Source: "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (arXiv 2104.10858) and its official
code, https://github.com/zihangJiang/TokenLabeling. With EViT the auxiliary classifier sees the tokens that are left at
the end; the fused token is made of many patches and takes no part, which is the EViT author's own recipe
(https://github.com/youweiliang/evit/issues/13). Where tokens are counted, every patch takes part through the token
that counts it.
"""

import math

import torch
from torch import nn


def mix_tokens(tokens: torch.Tensor, box: tuple[int, int, int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Replace the tokens inside a box by those of the image that mirrors this one in the batch.

    Args:
        tokens: (batch_size, num_patches, size), by patch of the original grid: embeddings or targets.
        box: (top, left, height, width) in patches.
        grid: (rows, columns) of patches.

    Returns: (batch_size, num_patches, size), mixed with `tokens.flip(0)`.

    Raises: ValueError if the box does not lie in the grid.
    """
    top, left, height, width = box
    rows, columns = grid
    if min(box) < 0 or top + height > rows or left + width > columns:
        raise ValueError(
            f"`mix_box` is (top, left, height, width) = {box}, which is not inside the grid of {rows}x{columns} "
            "patches: count in patches, not pixels."
        )
    inside = torch.zeros(rows, columns, dtype=torch.bool, device=tokens.device)
    inside[top : top + height, left : left + width] = True
    return torch.where(inside.view(1, -1, 1), tokens.flip(0), tokens)


def mix_targets(
    class_targets: torch.Tensor, token_targets: torch.Tensor, box: tuple[int, int, int, int], grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix labels as `mix_tokens` mixes tokens.

    Args:
        class_targets: (batch_size, num_labels), probabilities.
        token_targets: (batch_size, num_patches, num_labels), probabilities, by patch of the original grid.
        box: (top, left, height, width) in patches.
        grid: (rows, columns) of patches.

    Returns: both mixed; the class targets in proportion to the area of the box.
    """
    share = box[2] * box[3] / (grid[0] * grid[1])
    return (1 - share) * class_targets + share * class_targets.flip(0), mix_tokens(token_targets, box, grid)


def random_mix_box(grid: tuple[int, int], alpha: float = 1.0) -> tuple[int, int, int, int]:
    """Random box of mix-token, drawn as CutMix draws it, from PyTorch's generator.

    Args:
        grid: (rows, columns) of patches.
        alpha: parameter of the Beta distribution of the share that stays; 1.0 in LV-ViT.

    Returns: (top, left, height, width) in patches; it may be empty.
    """
    stays = torch.distributions.Beta(alpha, alpha).sample().item()
    extent = [math.sqrt(1 - stays) * size for size in grid]
    center = [torch.randint(size, ()).item() for size in grid]
    start = [max(int(c - e / 2), 0) for c, e in zip(center, extent, strict=True)]
    stop = [min(int(c + e / 2), size) for c, e, size in zip(center, extent, grid, strict=True)]
    return start[0], start[1], max(stop[0] - start[0], 0), max(stop[1] - start[1], 0)


def takes_part(patch_index: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Which tokens are patches that are not hidden.

    Args:
        patch_index: (batch_size, num_image_tokens_left), original patch position of each token, -1 for a fused token.
        patch_mask: (batch_size, num_patches), 0 or False where a patch is hidden; None for none.

    Returns: (batch_size, num_image_tokens_left), bool.
    """
    is_patch = patch_index >= 0
    return is_patch if patch_mask is None else is_patch & (patch_mask.gather(1, patch_index.clamp(min=0)) != 0)


def token_labelling_loss(
    cls_logits: torch.Tensor,
    aux_logits: torch.Tensor,
    patch_index: torch.Tensor,
    class_targets: torch.Tensor,
    token_targets: torch.Tensor | None = None,
    class_weight: float = 1.0,
    dense_weight: float = 1.0,
    counted_by: torch.Tensor | None = None,
    patch_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the class token plus the mean cross-entropy of the image tokens that are left.

    Args:
        cls_logits: (batch_size, num_labels).
        aux_logits: (batch_size, num_image_tokens_left, num_labels).
        patch_index: (batch_size, num_image_tokens_left), original patch position of each token, -1 for a fused token,
            which takes no part.
        class_targets: (batch_size,) class numbers, or (batch_size, num_labels) probabilities.
        token_targets: (batch_size, num_patches, num_labels), probabilities by patch of the original grid, from a
            stronger classifier; None takes the class targets for every patch.
        class_weight: of the first term.
        dense_weight: of the second term.
        counted_by: (batch_size, num_patches), which of the tokens left counts each patch, as in a model's output. The
            second term is then the mean over all patches, each answered by the token that counts it: a token learns
            the mean label of what it counts, with a weight in proportion to its size.
        patch_mask: (batch_size, num_patches), 0 or False where a patch is hidden and takes no part; None for none.

    Returns: scalar.
    """
    num_labels = cls_logits.shape[-1]
    if class_targets.ndim == 1:
        class_targets = nn.functional.one_hot(class_targets, num_labels).to(cls_logits.dtype)
    if counted_by is not None:
        aux_logits = aux_logits.gather(1, counted_by.unsqueeze(-1).expand(-1, -1, num_labels))
        patch_index = torch.arange(counted_by.shape[1], device=counted_by.device).expand_as(counted_by)
    if token_targets is None:
        targets = class_targets.unsqueeze(1).expand_as(aux_logits)
    else:
        index = patch_index.clamp(min=0).unsqueeze(-1).expand(-1, -1, num_labels)
        targets = token_targets.gather(1, index)
    class_loss = nn.functional.cross_entropy(cls_logits, class_targets)
    token_losses = -(targets * aux_logits.log_softmax(dim=-1)).sum(dim=-1)
    is_patch = takes_part(patch_index, patch_mask)
    dense_loss = token_losses.masked_fill(~is_patch, 0.0).sum() / is_patch.sum().clamp(min=1)
    return class_weight * class_loss + dense_weight * dense_loss


__all__ = ["mix_targets", "mix_tokens", "random_mix_box", "takes_part", "token_labelling_loss"]
