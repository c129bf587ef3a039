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


def count_slowly(attention, keys, sizes, num_attentive):
    """Who is kept, who counts each token, and the sizes, for one image and token by token.

    Args:
        attention: one number for each token.
        keys: (num_tokens, head_dim), mean over heads.
        sizes: one number for each token.
        num_attentive: how many are kept.

    Returns: positions of the kept tokens in descending order of score; for each token the position, among the kept
        ones, of the one that counts it; the sizes of the kept ones.
    """
    tokens = range(len(attention))

    unit = [key / key.norm() for key in keys]
    cosine = [[(one @ other).item() for other in unit] for one in unit]

    def comes_before(j, i):
        return (-attention[j], j) < (-attention[i], i)

    scores = []
    for i in tokens:
        highest = max((cosine[i][j] for j in tokens if comes_before(j, i)), default=-1.0)
        scores.append(attention[i] * (1 - highest))
    kept = sorted(tokens, key=lambda i: (-scores[i], -attention[i], i))[:num_attentive]
    counted_by = [
        kept.index(i) if i in kept else max(range(num_attentive), key=lambda n: cosine[i][kept[n]]) for i in tokens
    ]
    new_sizes = [sum(sizes[i] for i in tokens if counted_by[i] == n) for n in range(num_attentive)]
    return kept, counted_by, new_sizes


def average_slowly(tokens, kept, counted_by, sizes):
    """Rows of the kept tokens: half of themselves, half of the mean of what they count, with their own length."""
    rows = []
    for n, i in enumerate(kept):
        mine = [j for j in range(len(tokens)) if counted_by[j] == n]
        mean = sum(sizes[j] * tokens[j] for j in mine) / sum(sizes[j] for j in mine)
        mixed = (tokens[i] + mean) / 2
        rows.append(mixed * tokens[i].norm() / mixed.norm())
    return torch.stack(rows)


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
