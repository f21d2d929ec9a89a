"""A run that training itself has written, exported and painted with by stock diffusers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rtdmd.cli import main
from tests.distributed.launch import run_ranks
from tests.export.conftest import painter_of
from tests.small_runs import run_plain, save_noise
from tests.training.test_resume import arguments


@pytest.mark.slow
def test_the_files_of_a_dry_run(tiny_flux2: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Two ranks, both stages; the card's code, where rtdmd can't be imported, paints the sampler's picture.

    Checkpoints, records and grids are training's own, the state dicts those that its stages left.
    """
    run = tmp_path / "runs" / "trained"
    run_ranks(arguments(run, tiny_flux2, tiny_clip), 2)
    words = ["export", str(run), "--to", "hub-folder", "--out", str(tmp_path / "trained"), "--no-paint"]
    assert main(words) == 0
    card = (tmp_path / "trained" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| cold_start \| 4 \| 2 \|", card) and re.search(r"\| rtdmd \| 2 \| 2 \|", card)
    prompt = re.search(r'prompt="(.*)"', card)
    assert prompt is not None
    painter = painter_of(run)
    save_noise(painter, "flux2", prompt[1], tmp_path / "noise.pt")
    job = {
        "noise": str(tmp_path / "noise.pt"),
        "blocks": re.findall(r"```python\n(.*?)```", card, re.DOTALL)[:2],
        "out": str(tmp_path / "picture.npy"),
        "as_written": True,
    }
    run_plain([job], tmp_path)
    ours = np.round(painter.paint([prompt[1]])[0].permute(1, 2, 0).numpy() * 255)
    assert np.abs(np.load(job["out"]) * 255 - ours).max() <= 1.001
