"""A process that scores for its parent:  python -m rtdmd.rewards.serving.worker SECTION-AS-JSON

Requests come on standard input, answers go to standard output, each after its length in 8 bytes. The
process ends when its parent does, because its input ends then; the signals that stop a run are the
parent's business.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import IO, Any

import torch

from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards.serving.wire import pack_scores, unpack_batch

LENGTH_BYTES = 8


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message, or None where the stream ends."""
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "big")
    body = stream.read(length)
    return body if len(body) == length else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Send a message."""
    stream.write(len(body).to_bytes(LENGTH_BYTES, "big"))
    stream.write(body)
    stream.flush()


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # What libraries print goes to standard error: standard output is the answers' alone.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    section = RewardSection(**json.loads(sys.argv[1]))
    try:
        module = import_module(f"rtdmd.rewards.{section.name}")
        reward = module.load(section, torch.device("cpu"), torch.float32)
    except Exception as error:  # the parent raises it
        write_frame(answers, _failure(error))
        return
    write_frame(answers, b"{}")
    while (body := read_frame(sys.stdin.buffer)) is not None:
        write_frame(answers, _answer(reward, body))


@torch.no_grad()
def _answer(reward: Any, body: bytes) -> bytes:
    try:
        batch = unpack_batch(body, sys.maxsize)
        return pack_scores(reward.score(batch.images, batch.prompts, batch.metadata))
    except Exception as error:  # the parent raises it
        return _failure(error)


def _failure(error: Exception) -> bytes:
    return json.dumps({"kind": type(error).__name__, "error": str(error)}).encode()


if __name__ == "__main__":
    main()
