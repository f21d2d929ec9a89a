"""Environment and fixtures that all tests share. Nothing is seeded here: a test states its own seeds."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rtdmd.distributed.collectives import Ranks
    from tests.small_runs import World

# Before torch and the hub's client are imported, and inherited by the ranks that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that share cores otherwise wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once, everywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads before a fork only warn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Or a later test's can't begin: which one that is depends on how the workers share them out."""
    yield
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        from rtdmd.distributed.collectives import stop_ranks

        stop_ranks()
        pytest.fail("the test has left a process group")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """A process group of one."""
    import torch
    import torch.distributed as dist

    from rtdmd.distributed.collectives import Ranks, stop_ranks

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    stop_ranks()


def _build_tiny_pipeline(family: str, factory: pytest.TempPathFactory) -> Path:
    from rtdmd.models.tiny import build_tiny_pipeline

    folder = factory.mktemp(family)
    build_tiny_pipeline(family, folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny FLUX.2-klein pipeline. Tests don't write to it."""
    return _build_tiny_pipeline("flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def long_flux2(tiny_flux2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a transformer of ten blocks."""
    import torch
    from diffusers import Flux2Transformer2DModel

    folder = tmp_path_factory.mktemp("long") / "pipeline"
    shutil.copytree(tiny_flux2, folder)
    config = Flux2Transformer2DModel.load_config(folder, subfolder="transformer")
    torch.manual_seed(0)
    longer = Flux2Transformer2DModel.from_config({**config, "num_layers": 4, "num_single_layers": 6})
    longer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SD3 pipeline. Tests don't write to it."""
    return _build_tiny_pipeline("sd3", tmp_path_factory)


@pytest.fixture(scope="session")
def pipelines(tiny_flux2: Path, tiny_sd3: Path) -> dict[str, Path]:
    """Both families' folders, by family."""
    return {"flux2": tiny_flux2, "sd3": tiny_sd3}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP model with its processor. Tests don't write to it."""
    from rtdmd.models.tiny import build_tiny_clip

    folder = tmp_path_factory.mktemp("clip")
    build_tiny_clip(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory, pipelines: dict[str, Path]) -> dict[str, World]:
    """A small run of each family. Tests don't write to it."""
    from tests.small_runs import build_worlds

    return build_worlds({name: tmp_path_factory.mktemp(f"run_{name}") for name in pipelines}, pipelines)


@pytest.fixture(params=["flux2", "sd3"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    """Each family's small run in turn."""
    return worlds[request.param]
