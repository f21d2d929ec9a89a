"""What travels to a scorer in another process and back: a JSON header and raw pixels; scores as JSON.

    4 bytes   length of the header, big-endian
    header    UTF-8 JSON: reward, dtype (uint8 or float32), shape [B, 3, H, W], prompts, metadata
    pixels    B·3·H·W numbers in that order, little-endian; uint8 levels of 255, or float32 in [0, 1]

Nothing is pickled, and nothing is taken on trust: every field is checked before a pixel is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rtdmd.images import to_levels
from rtdmd.rewards.protocol import Metadata

PixelType = Literal["uint8", "float32"]
_BYTES = {"uint8": 1, "float32": 4}
_LENGTH_BYTES = 4
_MAX_SIDE = 16_384
_MAX_HEADER_BYTES = 16_000_000  # parsed, it takes many times that


class MalformedRequest(ValueError):
    """What came isn't what this format says."""


@dataclass(frozen=True)
class Batch:
    """Pictures to score: images [B, 3, H, W] in [0, 1], float32."""

    reward: str
    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]


def pack_batch(
    reward: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], pixels: PixelType
) -> bytes:
    """The bytes of a request. Raises TypeError for metadata that JSON cannot hold."""
    if pixels == "uint8":
        values = to_levels(images.detach()).cpu().numpy()
    else:
        values = images.detach().float().cpu().numpy().astype("<f4", copy=False)
    header = {
        "reward": reward,
        "dtype": pixels,
        "shape": list(images.shape),
        "prompts": list(prompts),
        "metadata": [dict(row) for row in metadata],
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + values.tobytes()


def unpack_batch(body: bytes, max_batch: int) -> Batch:
    """The batch in a request's bytes; MalformedRequest says what is wrong with it."""
    header, start = _header(body)
    fields = ("reward", "dtype", "shape", "prompts", "metadata")
    reward, pixels, shape, prompts, metadata = (header.get(name) for name in fields)
    if not isinstance(reward, str):
        raise MalformedRequest("'reward' is no text")
    if pixels not in _BYTES:
        raise MalformedRequest(f"'dtype' must be one of {', '.join(_BYTES)}")
    count = _check_shape(shape, max_batch)
    if not _is_list_of(prompts, str, count):
        raise MalformedRequest(f"'prompts' must be {count} texts")
    if not _is_list_of(metadata, dict, count):
        raise MalformedRequest(f"'metadata' must be {count} objects")
    expected, got = math.prod(shape) * _BYTES[pixels], len(body) - start
    if got != expected:
        raise MalformedRequest(f"{got} bytes of pixels, the shape {shape} in {pixels} needs {expected}")
    values = np.frombuffer(body, dtype="<f4" if pixels == "float32" else np.uint8, offset=start)
    images = torch.from_numpy(values.astype(np.float32)).view(*shape)
    return Batch(reward, images if pixels == "float32" else images / 255, prompts, metadata)


def _header(body: bytes) -> tuple[Any, int]:
    """The header, and where the pixels start."""
    start = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    if len(body) < _LENGTH_BYTES or start > len(body):
        raise MalformedRequest("shorter than its header says")
    if start > _MAX_HEADER_BYTES:
        raise MalformedRequest(f"the header is longer than {_MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(body[_LENGTH_BYTES:start])
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise MalformedRequest("the header is no JSON object")
    return header, start


def _check_shape(shape: Any, max_batch: int) -> int:
    if not (_is_list_of(shape, int, 4) and shape[1] == 3 and all(0 < n <= _MAX_SIDE for n in shape)):
        raise MalformedRequest(f"'shape' must be [B, 3, H, W], each up to {_MAX_SIDE}")
    if shape[0] > max_batch:
        raise MalformedRequest(f"{shape[0]} pictures, at most {max_batch} at once")
    return shape[0]


def _is_list_of(value: Any, kind: type, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(item) is kind for item in value)


def pack_scores(scores: Tensor) -> bytes:
    """The bytes of an answer; null stands for a score that isn't finite, which JSON has no word for."""
    values = scores.detach().float().cpu().tolist()
    return json.dumps({"scores": [value if math.isfinite(value) else None for value in values]}).encode()


def unpack_scores(answer: Any, count: int) -> Tensor:
    """Scores [count], float32, of a parsed answer; NaN for null. MalformedRequest for anything else."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise MalformedRequest(f"expected {count} scores")
    if not all(value is None or type(value) in (int, float) for value in scores):
        raise MalformedRequest("a score is neither a number nor null")
    return torch.tensor([math.nan if value is None else value for value in scores], dtype=torch.float32)
