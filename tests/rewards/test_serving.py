"""Rewards over HTTP: the same numbers, and every way in which a request or a server can be wrong."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd.errors import TrainingHalted, UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.remote import RemoteReward
from rtdmd.rewards.serving.command import ServeOptions, choose_sections
from rtdmd.rewards.serving.server import RewardServer, ServingLimits
from rtdmd.rewards.serving.tokens import read_token
from rtdmd.rewards.serving.wire import MalformedRequest, pack_batch, pack_scores, unpack_batch, unpack_scores

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a \u201cdog\u201d", "rain"]
ROWS: list[dict[str, Any]] = [{"tag": "x"}, {}, {"include": [{"class": "cat", "count": 2}]}]
NAME = "compressibility"

Serve = Callable[..., RewardServer]


def images(count: int = 3) -> Tensor:
    """Pictures of 256 levels, as a decoder's become on the way."""
    levels = torch.randint(0, 256, (count, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    return levels / 255


class Fixed:
    """A scorer that does as it is told."""

    name, differentiable = NAME, False

    def __init__(self, action: Callable[[], Tensor]) -> None:
        self.action = action

    def score(self, *given: Any) -> Tensor:
        return self.action()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers on free ports; they end with the test."""
    running: list[RewardServer] = []

    def start(scorer: Any = None, port: int = 0, **options: Any) -> RewardServer:
        section = RewardSection(NAME)
        scorer = scorer or load_rewards([section], CPU, torch.float32)[0]
        server = RewardServer(("127.0.0.1", port), [(section, scorer)], CPU, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        stop(server)


def stop(server: RewardServer) -> None:
    server.shutdown()
    server.server_close()


def client(server: RewardServer, **options: Any) -> RemoteReward:
    (reward,) = load_rewards([RewardSection(NAME, url=server.url, **options)], CPU, torch.float32)
    assert isinstance(reward, RemoteReward)
    return reward


def request(
    server: RewardServer, body: bytes, headers: dict[str, str] | None = None, path: str = "/score"
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request("POST", path, body, headers or {})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def body(count: int = 3) -> bytes:
    return pack_batch(NAME, images(count), PROMPTS[:count], ROWS[:count], "uint8")


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_the_wire_returns_what_was_packed(pixels: Any) -> None:
    batch = unpack_batch(pack_batch("ocr", images(), PROMPTS, ROWS, pixels), 3)
    assert (batch.reward, batch.prompts, batch.metadata) == ("ocr", PROMPTS, ROWS)
    assert torch.equal(batch.images, images())


def test_scores_on_the_wire() -> None:
    """float32 survives JSON exactly; what isn't finite comes back as NaN, never as a number."""
    scores = torch.tensor([1 / 3, -1e-20, math.nan, math.inf, 12345.678])
    answer = json.loads(pack_scores(scores), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = unpack_scores(answer, 5)
    assert torch.equal(back[[0, 1, 4]], scores[[0, 1, 4]]) and back[2:4].isnan().all()
    for wrong in ({"scores": [1.0]}, {"scores": ["1"] * 5}, {"scores": [True] * 5}, {}, [1.0] * 5, None):
        with pytest.raises(MalformedRequest):
            unpack_scores(wrong, 5)


def header(**changes: Any) -> bytes:
    fields = {"reward": NAME, "dtype": "uint8", "shape": [1, 3, 2, 2], "prompts": ["a"], "metadata": [{}]}
    text = json.dumps(fields | changes).encode()
    return len(text).to_bytes(4, "big") + text


MALFORMED = {
    "nothing": (b"", "shorter than its header says"),
    "a length beyond the end": (b"\xff\xff\xff\xff{}", "shorter than its header says"),
    "a long header": ((17_000_000).to_bytes(4, "big") + bytes(17_000_000), "the header is longer than"),
    "no JSON": (b"\0\0\0\2}{", "no JSON"),
    "deep JSON": ((100_000).to_bytes(4, "big") + b"[" * 100_000, "no JSON"),
    "no object": (b"\0\0\0\2[]", "no JSON object"),
    "no name": (header(reward=1), "'reward' is no text"),
    "another dtype": (header(dtype="object"), "'dtype' must be one of"),
    "another shape": (header(shape=[1, 4, 2, 2]), "'shape' must be"),
    "a negative shape": (header(shape=[-1, 3, 2, 2]), "'shape' must be"),
    "a huge shape": (header(shape=[1, 3, 10**9, 10**9]), "'shape' must be"),
    "a fractional shape": (header(shape=[1.0, 3, 2, 2]), "'shape' must be"),
    "a prompt too few": (header(prompts=[]), "'prompts' must be 1 texts"),
    "a prompt that is none": (header(prompts=[3]), "'prompts' must be 1 texts"),
    "metadata that is none": (header(metadata=[[]]), "'metadata' must be 1 objects"),
    "too few pixels": (header() + bytes(11), "11 bytes of pixels, the shape"),
    "too many pixels": (header() + bytes(13), "13 bytes of pixels, the shape"),
    "too many pictures": (header(shape=[9, 3, 2, 2]), "9 pictures, at most 8 at once"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests(serve: Serve, case: str) -> None:
    content, words = MALFORMED[case]
    with pytest.raises(MalformedRequest, match=words.replace("[", r"\[")):
        unpack_batch(content, 8)
    if case in ("nothing", "no JSON", "too few pixels", "too many pictures"):
        status, answer = request(serve(limits=ServingLimits(max_batch=8)), content)
        assert status == 400 and words in answer["error"]


def test_equal_to_scoring_here(serve: Serve) -> None:
    (inline,) = load_rewards([RewardSection(NAME)], CPU, torch.float32)
    expected = inline.score(images(), PROMPTS, ROWS)
    assert torch.equal(client(serve()).score(images(), PROMPTS, ROWS), expected)
    # Two pictures a request, and one where a request has room for less than two.
    for limits in (ServingLimits(max_batch=2), ServingLimits(max_bytes=2000)):
        assert torch.equal(client(serve(limits=limits)).score(images(), PROMPTS, ROWS), expected)


def test_a_clip_reward_is_the_same_over_http(tiny_clip: Path) -> None:
    section = RewardSection("clipscore", weights=str(tiny_clip))
    (inline,) = load_rewards([section], CPU, torch.float32)
    server = RewardServer(("127.0.0.1", 0), [(section, inline)], CPU)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    remote = RemoteReward(RewardSection("clipscore", url=server.url, weights=str(tiny_clip)))
    got, expected = (reward.score(images(), PROMPTS, ROWS) for reward in (remote, inline))
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-6)
    assert not got.requires_grad
    with pytest.raises(UserError, match=r"has weights = .*, the recipe wants a/b"):
        RemoteReward(RewardSection("clipscore", url=server.url, weights="a/b"))
    stop(server)


def test_unfit_images_are_refused_before_they_are_sent(serve: Serve) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        client(serve()).score(images() + 0.5, PROMPTS, ROWS)


def test_a_score_that_is_not_finite_stays_none(serve: Serve) -> None:
    scores = client(serve(Fixed(lambda: torch.tensor([1.0, math.nan, 2.0])))).score(images(), PROMPTS, ROWS)
    assert scores.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("this prompt has no quotes"), 422),
        (ValueError("these pictures are grey"), 422),
        (TrainingHalted("the detector is broken"), 500),
        (RuntimeError("CUDA out of memory"), 500),
    ],
)
def test_a_scorer_that_raises_is_quoted(serve: Serve, error: Exception, status: int) -> None:
    def fail() -> Tensor:
        raise error

    server = serve(Fixed(fail))
    with pytest.raises(TrainingHalted) as halted:
        client(server).score(images(), PROMPTS, ROWS)
    assert str(halted.value) == f"reward {NAME!r} at {server.url}: {error} (HTTP {status})"


def test_tokens(serve: Serve, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("s3cret\n")
    wrong.write_text("s3cre\n")
    server = serve(token=read_token(str(right)))
    assert client(server, token_file=str(right)).score(images(), PROMPTS, ROWS).shape == (3,)
    for options in ({}, {"token_file": str(wrong)}):
        with pytest.raises(UserError, match=r"wrong or missing token \(HTTP 401\); name its file"):
            client(server, **options)
    for headers in ({}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cret\xe9"}):
        assert request(server, body(), headers)[0] == 401
    assert request(server, body(), {"Authorization": "Bearer s3cret"})[0] == 200
    for content in (b"", b" \n", b"\xff", b"two\nlines"):
        wrong.write_bytes(content)
        with pytest.raises(UserError, match="token"):
            read_token(str(wrong))


def test_sizes_and_paths(serve: Serve) -> None:
    server = serve(limits=ServingLimits(max_bytes=2000))
    assert request(server, body())[0] == 413
    assert request(server, bytes(100_000))[0] == 413
    assert request(server, b"", {"Content-Length": "9" * 30})[0] == 413
    assert request(server, b"", {"Content-Length": "-1"})[0] == 411
    assert request(server, body(1), path="/nowhere")[0] == 404
    assert request(server, pack_batch("ocr", images(1), ["a"], [{}], "uint8"))[0] == 404
    assert request(server, body(1))[0] == 200


def test_too_many_that_wait_are_told_to_try_again(serve: Serve) -> None:
    """With one place, a second request is answered 503 while the first is scored; a client tries again."""
    entered, go_on = threading.Event(), threading.Event()

    def slowly() -> Tensor:
        entered.set()
        assert go_on.wait(10)
        return torch.zeros(3)

    server = serve(Fixed(slowly), limits=ServingLimits(max_waiting=1))
    patient = client(server)
    first = threading.Thread(target=request, args=(server, body()))
    first.start()
    assert entered.wait(10)
    assert request(server, body())[0] == 503
    threading.Timer(0.2, go_on.set).start()
    assert patient.score(images(), PROMPTS, ROWS).tolist() == [0.0] * 3
    first.join()


def test_a_server_that_is_gone_halts_after_the_retries(serve: Serve) -> None:
    server = serve()
    reward = client(server, retries=1)
    url, port = server.url, server.server_address[1]
    stop(server)
    started = time.monotonic()
    with pytest.raises(TrainingHalted) as halted:
        reward.score(images(), PROMPTS, ROWS)
    assert 0.5 <= time.monotonic() - started < 5
    message = str(halted.value)
    assert f"reward {NAME!r} at {url}: no answer after 2 tries: " in message
    assert f"rtdmd serve-rewards --reward {NAME} --port {port}" in message
    assert "the same command goes on after the last checkpoint" in message
    with pytest.raises(UserError, match="no answer after 1 try"):
        client(server, retries=0)


def test_a_server_that_comes_back_in_time_is_used(serve: Serve) -> None:
    server = serve()
    reward = client(server)
    port = server.server_address[1]
    stop(server)
    threading.Timer(0.2, serve, kwargs={"port": port}).start()
    assert reward.score(images(), PROMPTS, ROWS).shape == (3,)


def test_a_server_that_hangs_is_given_up(serve: Serve) -> None:
    over = threading.Event()
    server = serve(Fixed(lambda: torch.zeros(3) if over.wait(10) else torch.ones(3)))
    with pytest.raises(TrainingHalted, match="no answer after 1 try: timed out"):
        client(server, retries=0, timeout_seconds=0.2).score(images(), PROMPTS, ROWS)
    over.set()


def test_a_server_of_other_rewards(serve: Serve) -> None:
    server = serve()
    with pytest.raises(UserError, match="serves compressibility, not ocr"):
        RemoteReward(RewardSection("ocr", url=server.url))
    with pytest.raises(UserError, match="has mode = default, the recipe wants official"):
        RemoteReward(RewardSection(NAME, url=server.url, mode="official"))


def test_what_is_served() -> None:
    here, there = RewardSection("clipscore"), RewardSection("ocr", url="http://h:1", mode="official")
    assert choose_sections([here, there], [], None) == [RewardSection("ocr", mode="official")]
    assert choose_sections([here], [], None) == [here]
    assert choose_sections([here, there], ["clipscore"], "a/b") == [RewardSection("clipscore", weights="a/b")]
    assert choose_sections([], ["ocr", "ocr"], None) == [RewardSection("ocr")]
    with pytest.raises(UserError, match="did you mean 'clipscore'"):
        choose_sections([here], ["clipscor"], None)
    with pytest.raises(UserError, match="name a recipe, or scorers"):
        choose_sections([], [], None)
    with pytest.raises(UserError, match="--weights goes with one scorer"):
        choose_sections([], ["ocr", "clipscore"], "a/b")


def test_an_open_door_is_refused() -> None:
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: others can reach this address"):
        ServeOptions("0.0.0.0", 8123, None, ServingLimits()).check()
    ServeOptions("0.0.0.0", 8123, "token", ServingLimits()).check()
