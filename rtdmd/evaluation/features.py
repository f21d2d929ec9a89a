"""CLIP features of pictures, and of the reference set that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.rewards.clip import ClipEncoder
from rtdmd.rewards.clip_vision import ClipVision

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FEATURES = (".npz", ".safetensors")


def load_vision(weights: str, device: torch.device) -> ClipVision:
    """The vision tower of a CLIP (folder or hub id) in float32. Raises UserError."""
    return ClipEncoder.load(weights, device, torch.float32).vision


def reference_pictures(source: Path) -> list[Path]:
    """The pictures below a folder, in the order of their names. UserError if there are fewer than 2."""
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    if len(found) < 2:
        raise UserError(f"{source}: a reference set needs at least 2 pictures ({', '.join(PICTURES)})")
    return found


def check_reference(source: Path) -> None:
    """Raise UserError unless ``source`` is a folder of pictures or a file of features."""
    if source.is_dir():
        reference_pictures(source)
    elif source.suffix not in FEATURES or not source.is_file():
        raise UserError(f"{source}: give a folder of pictures, or features in a {' or '.join(FEATURES)} file")


@torch.no_grad()
def reference_features(source: Path, vision: ClipVision) -> Tensor:
    """Features [N, D] of a folder's pictures, or those that a file holds (``features``, or its one array).

    Raises:
        UserError: naming the file that can't be read, or features of another width than the model's.
    """
    if source.is_dir():
        device = vision.model.device
        return torch.cat(
            [vision.features(images.to(device)).cpu() for images in _batches(source, vision.chunk_size)]
        )
    features = _read_features(source)
    width = vision.model.config.projection_dim
    if features.ndim != 2 or len(features) < 2 or features.shape[1] != width:
        raise UserError(
            f"{source}: features are {list(features.shape)}, the model's [N, {width}] with N of at least 2; "
            "name the model they are of in --features"
        )
    return features.float()


def _batches(folder: Path, size: int) -> Iterator[Tensor]:
    """Images [B, 3, H, W] in [0, 1]; neighbours of one size go together."""
    waiting: list[Tensor] = []
    for path in reference_pictures(folder):
        try:
            with Image.open(path) as picture:
                levels = torch.from_numpy(np.array(picture.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: no picture: {error}") from error
        image = levels.permute(2, 0, 1).float() / 255
        if waiting and (len(waiting) == size or image.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    yield torch.stack(waiting)


def _read_features(source: Path) -> Tensor:
    try:
        if source.suffix == ".safetensors":
            arrays = load_file(source)
        else:
            with np.load(source, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: no features: {error}") from error
    if "features" in arrays:
        return arrays["features"]
    if len(arrays) != 1:
        raise UserError(f"{source}: holds {', '.join(sorted(arrays))}; name the one to read 'features'")
    return next(iter(arrays.values()))
