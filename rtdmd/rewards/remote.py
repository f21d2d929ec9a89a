"""A scorer behind ``rtdmd serve-rewards``, in another process or on another machine."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rtdmd.errors import TrainingHalted, UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.serving.server import IDENTITY
from rtdmd.rewards.serving.tokens import read_token
from rtdmd.rewards.serving.wire import MalformedRequest, pack_batch, unpack_scores
from rtdmd.rewards.validation import check_batch

_FIRST_PAUSE_SECONDS = 0.5  # doubled before each further retry
_LONGEST_PAUSE_SECONDS = 30.0
_MAX_ANSWER_BYTES = 1_000_000


class Unreachable(Exception):
    """No answer from the server, or that it is too busy; worth another try."""


class RemoteReward:
    """The reward of ``section.name`` at ``section.url``, on pictures rounded to 256 levels; no gradient.

    A connection that fails, times out or is answered with 503 is tried again ``section.retries`` times, after
    pauses that double. Any other refusal raises at once, with the scorer's own words.

    Raises UserError if no server answers at first, or if it doesn't serve that reward.
    """

    differentiable = False

    def __init__(self, section: RewardSection) -> None:
        assert section.url is not None
        self.name = section.name
        self.url = section.url.rstrip("/")
        self._timeout_seconds = section.timeout_seconds
        self._retries = section.retries
        token = None if section.token_file is None else read_token(section.token_file)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._max_batch, self._max_bytes = self._agree(section)

    def _agree(self, section: RewardSection) -> tuple[int, int]:
        """The server's limits, once it has said that it serves what the recipe wants."""
        try:
            status, answer = self._patiently("GET", "/health", None)
        except Unreachable as error:
            raise UserError(f"{self._where}: {error}; {self._advice}") from error
        if status != HTTPStatus.OK:
            advice = "; name its file in token_file" if status == HTTPStatus.UNAUTHORIZED else ""
            raise UserError(f"{self._where}: {_words(status, answer)}{advice}")
        rewards, max_batch, max_bytes = (answer.get(key) for key in ("rewards", "max_batch", "max_bytes"))
        if not (isinstance(rewards, dict) and isinstance(max_batch, int) and isinstance(max_bytes, int)):
            raise UserError(f"{self._where}: what answers is no rtdmd serve-rewards")
        if self.name not in rewards:
            raise UserError(f"{self._where}: serves {', '.join(rewards)}, not {self.name}")
        for key in IDENTITY:
            wanted, there = getattr(section, key), rewards[self.name].get(key)
            if wanted is not None and wanted != there:
                raise UserError(f"{self._where}: has {key} = {there}, the recipe wants {wanted}")
        return max_batch, max_bytes

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B], float32, on the images' device, without gradient; images [B, 3, H, W] in [0, 1].

        Raises TrainingHalted if the server refuses, fails or is gone; ValueError for unfit images.
        """
        check_batch(images, prompts, metadata)
        room = self._max_bytes * 9 // 10  # the rest is for the header
        size = max(1, min(self._max_batch, room // images[0].numel()))
        scores = []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            body = pack_batch(self.name, images[part], prompts[part], metadata[part], "uint8")
            scores.append(self._score(body, len(prompts[part])))
        return torch.cat(scores).to(images.device)

    def _score(self, body: bytes, count: int) -> Tensor:
        try:
            status, answer = self._patiently("POST", "/score", body)
        except Unreachable as error:
            goes_on = "then the same command goes on after the last checkpoint"
            raise TrainingHalted(f"{self._where}: {error}; {self._advice}, {goes_on}") from error
        if status != HTTPStatus.OK:
            raise TrainingHalted(f"{self._where}: {_words(status, answer)}")
        try:
            return unpack_scores(answer, count)
        except MalformedRequest as error:
            raise TrainingHalted(f"{self._where}: an answer that can't be used: {error}") from error

    @property
    def _where(self) -> str:
        return f"reward {self.name!r} at {self.url}"

    @property
    def _advice(self) -> str:
        port = urlsplit(self.url).port or 80
        return f"start it (again) there with: rtdmd serve-rewards --reward {self.name} --port {port}"

    def _patiently(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, Any]]:
        """Status and parsed answer, after as many tries as it takes or the recipe allows."""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS))
            try:
                return self._once(method, path, body)
            except Unreachable as error:
                last = error
        tries = "1 try" if self._retries == 0 else f"{self._retries + 1} tries"
        raise Unreachable(f"no answer after {tries}: {last}") from last

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, Any]]:
        target = urlsplit(self.url)
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = kind(target.hostname or "", target.port, timeout=self._timeout_seconds)
        try:
            with suppress(BrokenPipeError):  # a server that refuses may answer before it has read all
                connection.request(method, target.path + path, body, self._headers)
            response = connection.getresponse()
            text = response.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise Unreachable(_words(response.status, answer))
        return response.status, answer if isinstance(answer, dict) else {}


def _words(status: int, answer: Any) -> str:
    """What a refusal says."""
    text = answer.get("error") if isinstance(answer, dict) else None
    return f"{text or 'no reason given'} (HTTP {status})"
