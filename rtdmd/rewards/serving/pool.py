"""A scorer that needs the CPU alone, in several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtdmd.errors import TrainingHalted, UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.serving.wire import pack_batch, unpack_scores
from rtdmd.rewards.serving.worker import read_frame, write_frame
from rtdmd.rewards.validation import check_batch

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, TrainingHalted, ValueError, RuntimeError)
}
_GRACE_SECONDS = 5.0


class PooledReward:
    """``section``'s scorer in ``workers`` processes; each scores a part of every batch.

    The parts and their order depend on the numbers of pictures and workers alone. Raises what the scorer
    raises, with its own words; TrainingHalted if a process ends by itself.
    """

    differentiable = False

    def __init__(self, section: RewardSection, workers: int) -> None:
        self.name = section.name
        self._processes = [_start(section) for _ in range(workers)]
        try:
            for process in self._processes:
                self._receive(process)
        except BaseException:
            self.close()
            raise

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, on the images' device, without gradient; images [B, 3, H, W] in [0, 1]."""
        check_batch(images, prompts, metadata)
        size = -(-len(images) // len(self._processes))
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        busy = self._processes[: len(parts)]
        for process, part in zip(busy, parts, strict=True):
            self._send(process, pack_batch(self.name, images[part], prompts[part], metadata[part], "float32"))
        # All of them, even if one failed: an answer left unread would be taken for the next one's.
        answers = [self._read(process) for process in busy]
        scores = [
            unpack_scores(self._checked(answer), len(prompts[part]))
            for answer, part in zip(answers, parts, strict=True)
        ]
        return torch.cat(scores).to(images.device)

    def _send(self, process: subprocess.Popen[bytes], body: bytes) -> None:
        assert process.stdin is not None
        try:
            write_frame(process.stdin, body)
        except OSError as error:
            raise self._ended(process) from error

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        return self._checked(self._read(process))

    def _read(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        body = read_frame(process.stdout)
        if body is None:
            raise self._ended(process)
        return json.loads(body)

    def _checked(self, answer: Any) -> Any:
        if "error" in answer:
            raise _KINDS.get(answer["kind"], RuntimeError)(answer["error"])
        return answer

    def _ended(self, process: subprocess.Popen[bytes]) -> TrainingHalted:
        code = process.wait(_GRACE_SECONDS)
        return TrainingHalted(
            f"reward {self.name!r}: its process {process.pid} ended by itself (code {code}); standard error "
            "says why. If it ran out of memory, lower `reward_workers`"
        )

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended already
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(section: RewardSection) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    alone = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rtdmd.rewards.serving.worker", json.dumps(asdict(section))],
        env=os.environ | alone,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
