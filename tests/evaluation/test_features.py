"""Features of reference pictures and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rtdmd.errors import UserError
from rtdmd.evaluation.features import check_reference, load_vision, reference_features
from rtdmd.rewards.clip_vision import ClipVision


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> ClipVision:
    return load_vision(str(tiny_clip), torch.device("cpu"))


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Random pictures 0.png, 1.png, …, also as images [1, 3, H, W]."""
    folder.mkdir()
    images = []
    for number, (height, width) in enumerate(sizes):
        levels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        images.append(torch.from_numpy(levels).permute(2, 0, 1)[None] / 255)
    return images


def test_pictures_of_several_sizes(tmp_path: Path, vision: ClipVision) -> None:
    """In the order of their names, each as if it were alone; what is no picture is passed over."""
    images = write_pictures(tmp_path / "a", [(32, 32), (32, 32), (40, 32), (32, 32)])
    (tmp_path / "a" / "notes.txt").write_text("none")
    features = reference_features(tmp_path / "a", vision)
    alone = torch.cat([vision.features(image) for image in images])
    torch.testing.assert_close(features, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_grey_and_transparent_pictures_are_taken_as_rgb(tmp_path: Path, vision: ClipVision) -> None:
    for number, mode in enumerate(("L", "RGBA")):
        Image.new(mode, (32, 32)).save(tmp_path / f"{number}.png")
    features = reference_features(tmp_path, vision)
    torch.testing.assert_close(features[0], features[1])


def test_files_of_features(tmp_path: Path, vision: ClipVision) -> None:
    width = vision.model.config.projection_dim
    features = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "one.npz", anything=features.numpy())
    np.savez(tmp_path / "two.npz", features=features.numpy(), names=np.arange(5))
    save_file({"features": features, "other": features + 1}, tmp_path / "three.safetensors")
    for name in ("one.npz", "two.npz", "three.safetensors"):
        check_reference(tmp_path / name)
        assert torch.equal(reference_features(tmp_path / name, vision), features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two.npz", "holds a, b; name the one to read 'features'"),
        ("objects.npz", "no features: Object arrays cannot be loaded"),
        ("broken.npz", "no features"),
        ("broken.safetensors", "no features"),
        ("width.npz", r"features are \[4, 3\], the model's"),
        ("one.npz", r"features are \[1, "),
        ("pictures", r"1\.png: no picture"),
    ],
)
def test_faults(tmp_path: Path, vision: ClipVision, name: str, message: str) -> None:
    width = vision.model.config.projection_dim
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 3)), b=np.zeros(2))
    np.savez(tmp_path / "objects.npz", a=np.array([{}, None], dtype=object))
    np.savez(tmp_path / "width.npz", a=np.zeros((4, 3)))
    np.savez(tmp_path / "one.npz", a=np.zeros((1, width)))
    for ending in ("npz", "safetensors"):
        (tmp_path / f"broken.{ending}").write_bytes(b"nothing")
    write_pictures(tmp_path / "pictures", [(32, 32), (32, 32)])
    (tmp_path / "pictures" / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=message):
        reference_features(tmp_path / name, vision)


def test_what_is_no_reference(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"")
    for name in ("a.npy", "none.npz"):
        with pytest.raises(UserError, match="give a folder of pictures, or features"):
            check_reference(tmp_path / name)
    with pytest.raises(UserError, match="needs at least 2 pictures"):
        check_reference(tmp_path)
