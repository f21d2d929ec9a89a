"""What pictures are like, whatever a reward says of them: edges, saturation, entropy, diversity.

Legend: B pictures, N pictures of all groups, D features. All on images [B, 3, H, W] in [0, 1], RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LEVELS = 256
_THUMBNAIL_SIDE = 16


def grey(images: Tensor) -> Tensor:
    """Luma of BT.601, [B, H, W], float32."""
    weights = torch.tensor(_LUMA, device=images.device)
    return (images.float() * weights.view(1, 3, 1, 1)).sum(1)


def edge_energy(images: Tensor) -> Tensor:
    """Mean over pixels of (∂x)² + (∂y)² of the grey picture, forward differences per pixel, [B]."""
    levels = grey(images)
    across, down = levels.diff(dim=2), levels.diff(dim=1)
    return across.square().mean((1, 2)) + down.square().mean((1, 2))


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of HSV's saturation (max − min)/max, 0 for black, in [0, 1], [B]."""
    low, high = images.float().aminmax(dim=1)
    return ((high - low) / torch.where(high > 0, high, torch.ones_like(high))).mean((1, 2))


def grey_entropy(images: Tensor) -> Tensor:
    """Entropy of the histogram of 256 grey levels, in bits, in [0, 8], [B]."""
    levels = (grey(images) * (_LEVELS - 1)).round().long().clamp(0, _LEVELS - 1).flatten(1)
    counts = torch.zeros(len(images), _LEVELS, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float32))
    shares = counts / levels.shape[1]
    return -torch.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0, device=images.device))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "edge_energy": edge_energy,
    "saturation": saturation,
    "entropy": grey_entropy,
}


def thumbnails(images: Tensor) -> Tensor:
    """Pictures averaged down to 16 × 16, flat, [B, 768], float32."""
    return F.adaptive_avg_pool2d(images.float(), _THUMBNAIL_SIDE).flatten(1)


def group_diversity(features: Tensor, group_ids: Tensor) -> float:
    """Mean over groups of the root mean square distance of two of a group's pictures, per feature.

    For a group of n: sqrt(2n/(n − 1) · mean over features of the population's variance), which is the mean
    over pairs without forming them. Groups of one don't count; 0 without others. Shapes: [N, D], [N].
    """
    _, group = torch.unique(group_ids, return_inverse=True)
    sizes = torch.bincount(group).double()
    values = features.double()
    sums = values.new_zeros(len(sizes), values.shape[1]).index_add_(0, group, values)
    centred = values - (sums / sizes[:, None])[group]
    variances = sizes.new_zeros(len(sizes)).index_add_(0, group, centred.square().mean(1)) / sizes
    several = sizes > 1
    if not several.any():
        return 0.0
    squares = 2 * sizes[several] / (sizes[several] - 1) * variances[several]
    return float(squares.sqrt().mean())
