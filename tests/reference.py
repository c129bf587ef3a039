"""The paper's step written down token by token, without a thought for speed: what the fast code is tested against."""

import math

import torch


def reorganize_slowly(hidden_states, attention, keep_rate, fuse=True, num_prefix_tokens=1):
    """Return the new sequence, and the kept positions among the image tokens, image by image and token by token."""
    sequences, kept = [], []
    for tokens, weights in zip(hidden_states, attention, strict=True):
        prefix, image_tokens = list(tokens[:num_prefix_tokens]), list(tokens[num_prefix_tokens:])
        num_attentive = math.ceil(keep_rate * len(image_tokens))
        by_falling_score = sorted(range(len(image_tokens)), key=lambda i: -weights[i].item())
        attentive, inattentive = by_falling_score[:num_attentive], by_falling_score[num_attentive:]
        sequence = prefix + [image_tokens[i] for i in attentive]
        if num_attentive == len(image_tokens):
            sequence = prefix + image_tokens
        elif fuse:
            fused = torch.zeros_like(prefix[0])
            for i in inattentive:
                fused = fused + weights[i] * image_tokens[i]
            sequence.append(fused)
        sequences.append(torch.stack(sequence))
        kept.append(torch.tensor(attentive))
    return torch.stack(sequences), torch.stack(kept)


def class_token_attention_slowly(query, key, scaling, num_prefix_tokens=1):
    """Mean over the heads of the softmax of the class token's dot products, without the prefix tokens' share."""
    batch_size, num_heads, num_tokens, _ = query.shape
    rows = []
    for image in range(batch_size):
        heads = []
        for head in range(num_heads):
            products = [torch.dot(query[image, head, 0], key[image, head, t]) * scaling for t in range(num_tokens)]
            exponentials = [math.exp(product.item()) for product in products]
            heads.append([e / sum(exponentials) for e in exponentials][num_prefix_tokens:])
        rows.append([sum(column) / num_heads for column in zip(*heads, strict=True)])
    return torch.tensor(rows)
