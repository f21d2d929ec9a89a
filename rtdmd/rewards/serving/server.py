"""Scorers behind HTTP, for ``rtdmd serve-rewards``.

    GET  /health    {"rewards": {name: {weights, revision, mode}}, "max_batch": …, "max_bytes": …}
    POST /score     a request as in ``wire.py``; {"scores": [numbers or null]}

Errors are {"error": text}: 400 malformed, 401 wrong token, 404 no such reward, 411 or 413 without or beyond
a length, 422 the scorer refuses the pictures or prompts, 500 it fails, 503 too many wait (try again).
"""

from __future__ import annotations

import hmac
import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards.protocol import Reward
from rtdmd.rewards.serving.wire import Batch, MalformedRequest, pack_scores, unpack_batch

IDENTITY = ("weights", "revision", "mode")  # of a scorer, besides its name
_MEGABYTE = 1_000_000
_READ_TIMEOUT_SECONDS = 60.0
_DRAIN_TIMEOUT_SECONDS = 2.0
_CHUNK_BYTES = 65_536


@dataclass(frozen=True)
class ServingLimits:
    """What a request may be, and how many may be in memory at once."""

    max_batch: int = 64
    max_bytes: int = 256 * _MEGABYTE
    max_waiting: int = 128


class Refusal(Exception):
    """An answer other than scores."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves loaded scorers, one request at a time; the others wait.

    ``token``: what a client has to bring as ``Authorization: Bearer …``; None lets everyone in.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        loaded: Sequence[tuple[RewardSection, Reward]],
        device: torch.device,
        limits: ServingLimits | None = None,
        token: str | None = None,
    ) -> None:
        self._rewards = {section.name: reward for section, reward in loaded}
        self.described: Mapping[str, dict[str, Any]] = {
            section.name: {key: getattr(section, key) for key in IDENTITY} for section, _ in loaded
        }
        self.limits = limits or ServingLimits()
        self._device = device
        self._token = token
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(self.limits.max_waiting)
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def admits(self, authorization: str | None) -> bool:
        """Whether a client's Authorization header holds the token."""
        if self._token is None:
            return True
        given = (authorization or "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def enter(self) -> bool:
        """Take a place among those that are served or wait; False if there is none."""
        return self._places.acquire(blocking=False)

    def leave(self) -> None:
        self._places.release()

    def score(self, batch: Batch) -> bytes:
        """The answer to a request; Refusal says why there is none."""
        reward = self._rewards.get(batch.reward)
        if reward is None:
            known = ", ".join(sorted(self._rewards))
            raise Refusal(HTTPStatus.NOT_FOUND, f"no reward {batch.reward!r} here; there is {known}")
        try:
            with self._turn, torch.no_grad():
                return pack_scores(reward.score(batch.images.to(self._device), batch.prompts, batch.metadata))
        except (UserError, ValueError) as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error) or type(error).__name__) from error


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    server_version = "rtdmd"
    sys_version = ""
    timeout = _READ_TIMEOUT_SECONDS  # of each read from a client
    _is_read = False  # the request's body

    def do_GET(self) -> None:
        self._answer(self._health)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _answer(self, action: Callable[[], bytes]) -> None:
        try:
            if not self.server.admits(self.headers.get("Authorization")):
                raise Refusal(HTTPStatus.UNAUTHORIZED, "wrong or missing token")
            self._send(HTTPStatus.OK, action())
        except Refusal as refusal:
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode())
            self._drain()
        except (ConnectionError, TimeoutError):  # the client has gone
            self.close_connection = True

    def _health(self) -> bytes:
        if self.path != "/health":
            raise Refusal(HTTPStatus.NOT_FOUND, f"no {self.path} here; GET /health or POST /score")
        limits = self.server.limits
        state = {
            "rewards": self.server.described,
            "max_batch": limits.max_batch,
            "max_bytes": limits.max_bytes,
        }
        return json.dumps(state).encode()

    def _score(self) -> bytes:
        if self.path != "/score":
            raise Refusal(HTTPStatus.NOT_FOUND, f"no {self.path} here; GET /health or POST /score")
        length = self._length()
        if not self.server.enter():
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait; try again")
        try:
            body, self._is_read = self.rfile.read(length), True
            if len(body) < length:
                raise ConnectionResetError
            return self.server.score(unpack_batch(body, self.server.limits.max_batch))
        except MalformedRequest as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error
        finally:
            self.server.leave()

    def _drain(self) -> None:
        """Take what a refused client still sends: closing on it could lose the answer under way."""
        if self._is_read:
            return
        text = self.headers.get("Content-Length") or "0"
        left = min(int(text[:15]) if text.isdecimal() else 0, self.server.limits.max_bytes)
        self.connection.settimeout(_DRAIN_TIMEOUT_SECONDS)
        with suppress(OSError):
            while left > 0 and (chunk := self.rfile.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)

    def _length(self) -> int:
        text = self.headers.get("Content-Length")
        if text is None or not (text.isascii() and text.isdecimal()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "needs a Content-Length")
        limit = self.server.limits.max_bytes
        if len(text) > 15 or int(text) > limit:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{text[:15]} bytes are more than the {limit} allowed"
            )
        return int(text)

    def _send(self, status: HTTPStatus, body: bytes) -> None:
        # HTTP/1.0: each request has a connection of its own, so that what a refused client still sends is
        # never taken for its next request.
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Successes aren't worth a line."""

    def log_error(self, format: str, *args: object) -> None:
        print(f"rtdmd: {self.address_string()}: {format % args}", file=sys.stderr, flush=True)
