"""Random draws: functions of their arguments alone, with the promised distributions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from rtdmd.randomness import Draws
from rtdmd.randomness.normals import normals, philox_words, sample_words

DRAWS = Draws(seed=0, stage="cold_start")

# every kind of draw as one signature: (draws, step, purpose) -> list
KINDS: dict[str, Callable[[Draws, int, str], list]] = {
    "normal": lambda draws, step, purpose: draws.normal(step, purpose, [0, 5], (4, 2)).flatten().tolist(),
    "uniform": lambda draws, step, purpose: draws.uniform(step, purpose, [0, 5, 6]).tolist(),
    "integers": lambda draws, step, purpose: draws.integers(step, purpose, range(8), 1, 200).tolist(),
    "integer": lambda draws, step, purpose: [draws.integer(step, purpose, 1, 10**12)],
    "subset": lambda draws, step, purpose: draws.subset(step, purpose, 1000, 6),
    "permutation": lambda draws, step, purpose: draws.permutation(step, purpose, 20),
}


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_nothing_but_their_arguments(kind: str) -> None:
    """Not on earlier draws, nor on the state of torch's global generator, nor on the object."""
    draw = KINDS[kind]
    first = draw(DRAWS, 3, "noise")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    DRAWS.normal(9, "other", [1], (3,))
    assert draw(DRAWS, 3, "noise") == first == draw(Draws(seed=0, stage="cold_start"), 3, "noise")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_key_matters(kind: str) -> None:
    """Seed, stage, step and purpose: changing one changes the draw, and no two changes agree."""
    draw = KINDS[kind]
    variants = [
        draw(DRAWS, 3, "noise"),
        draw(Draws(1, "cold_start"), 3, "noise"),
        draw(Draws(0, "rtdmd"), 3, "noise"),
        draw(DRAWS, 4, "noise"),
        draw(DRAWS, 30, "noise"),
        draw(DRAWS, 3, "prompt"),
    ]
    assert len({tuple(variant) for variant in variants}) == len(variants)


def test_keys_that_differ_in_one_part_are_uncorrelated() -> None:
    """Independent samples of n = 20,000 pairs correlate as N(0, 1/n): |r| < 4/√n for all pairs."""
    count = 20_000
    rows = torch.cat(
        [
            DRAWS.normal(3, "noise", [0, 1, 10, "0 ", "a cat", "a hat"], (count,)),
            DRAWS.normal(4, "noise", [0], (count,)),
            DRAWS.normal(3, "prompt", [0], (count,)),
            Draws(1, "cold_start").normal(3, "noise", [0], (count,)),
            Draws(0, "rtdmd").normal(3, "noise", [0], (count,)),
        ]
    )
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max().item() < 4 / math.sqrt(count)


@pytest.mark.parametrize("indices", [range(5000), [f"prompt {i}" for i in range(5000)]])
def test_first_draws_of_neighbouring_indices_are_independent(indices: list) -> None:
    """One number per index: the series over indices has no autocorrelation at lags 1 to 4, and its
    mean and variance are those of U(0, 1): 1/2 and 1/12 within four standard errors."""
    series = DRAWS.uniform(0, "t", indices).double()
    assert series.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 5000))
    assert series.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / 5000))
    for lag in range(1, 5):
        pair = torch.stack([series[:-lag], series[lag:]])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(5000)


def test_order_and_batching_of_indices_do_not_matter() -> None:
    """A row belongs to its index: reversed, split into micro-batches or dealt to two ranks alike."""
    indices: list[int | str] = [7, 0, 12, "a cat", 3, 1]
    whole = DRAWS.normal(2, "noise", indices, (3, 4))
    assert torch.equal(DRAWS.normal(2, "noise", indices[::-1], (3, 4)), whole.flip(0))
    halves = [DRAWS.normal(2, "noise", half, (3, 4)) for half in (indices[:2], indices[2:])]
    assert torch.equal(torch.cat(halves), whole)
    for rank in range(2):
        assert torch.equal(DRAWS.normal(2, "noise", indices[rank::2], (3, 4)), whole[rank::2])
        assert torch.equal(DRAWS.uniform(2, "t", indices[rank::2]), DRAWS.uniform(2, "t", indices)[rank::2])
        assert torch.equal(
            DRAWS.integers(2, "d", indices[rank::2], 1, 200), DRAWS.integers(2, "d", indices, 1, 200)[rank::2]
        )


def test_shapes_and_dtypes() -> None:
    """Rows first, then the shape; float32 and int64 on the CPU."""
    normal = DRAWS.normal(0, "noise", [4, 5, 6], (2, 3, 1))
    assert (normal.shape, normal.dtype) == ((3, 2, 3, 1), torch.float32)
    uniform = DRAWS.uniform(0, "t", [4, 5])
    assert (uniform.shape, uniform.dtype) == ((2,), torch.float32)
    integers = DRAWS.integers(0, "t", [4, 5], 0, 9)
    assert (integers.shape, integers.dtype) == ((2,), torch.int64)
    assert type(DRAWS.integer(0, "k", 1, 4)) is int
    assert {normal.device.type, uniform.device.type, integers.device.type} == {"cpu"}


def test_normal_is_standard_normal() -> None:
    """n = 200,000: mean within 4/√n, variance within 4·√(2/n), third and fourth moments 0 and 3
    within 4·√(15/n) and 4·√(96/n), and the largest distance between the empirical distribution
    function and Φ below 1.95/√n (Kolmogorov's 0.1 % quantile)."""
    count = 200_000
    x = DRAWS.normal(1, "noise", range(200), (1000,)).double().flatten()
    moments = [x.pow(order).mean().item() for order in range(1, 5)]
    for moment, expected, variance in zip(moments, [0, 1, 0, 3], [1, 2, 15, 96], strict=True):
        assert moment == pytest.approx(expected, abs=4 * math.sqrt(variance / count))
    ordered = torch.special.ndtr(x.sort().values)
    ranks = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum(ordered - ranks / count, (ranks + 1) / count - ordered).max().item()
    assert distance < 1.95 / math.sqrt(count)


def test_uniform_stays_in_its_half_open_interval() -> None:
    """[0, 1), and close to both ends among 20,000 draws."""
    x = DRAWS.uniform(1, "t", range(20_000))
    assert 0 <= x.min().item() < 1e-3 and 1 - 1e-3 < x.max().item() < 1


def test_integers_include_both_ends_uniformly() -> None:
    """4000 draws of {1, …, 4}: each value 1000 times, give or take four standard deviations
    √(4000·¼·¾) = 27; an interval of one value has only that one."""
    counts = Counter(DRAWS.integers(0, "stop", range(4000), 1, 4).tolist())
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(abs(count - 1000) < 4 * 27.4 for count in counts.values())
    assert {DRAWS.integer(step, "stop", 1, 4) for step in range(60)} == {1, 2, 3, 4}
    assert DRAWS.integers(0, "one", range(5), 3, 3).tolist() == [3] * 5


def test_subset_is_sorted_distinct_and_uniform_over_pairs() -> None:
    """Two of {0, 1, 2} over 3000 epochs: each pair 1000 times ± 4·√(3000·⅓·⅔) = 4·25.8."""
    counts = Counter(tuple(DRAWS.subset(epoch, "steps", 3, 2)) for epoch in range(3000))
    assert sorted(counts) == [(0, 1), (0, 2), (1, 2)]
    assert all(abs(count - 1000) < 4 * 25.8 for count in counts.values())
    assert DRAWS.subset(0, "steps", 3, 3) == [0, 1, 2]
    assert DRAWS.subset(0, "steps", 3, 0) == []


def test_permutation_is_a_uniform_permutation() -> None:
    """All members once; over 3000 steps the six orders of three come 500 times ± 4·√(3000·5/36)."""
    assert sorted(DRAWS.permutation(0, "order", 100)) == list(range(100))
    counts = Counter(tuple(DRAWS.permutation(step, "order", 3)) for step in range(3000))
    assert len(counts) == 6
    assert all(abs(count - 500) < 4 * 20.4 for count in counts.values())


@pytest.mark.parametrize("purpose", ["t", "delta"])
def test_kinds_of_one_purpose_are_independent(purpose: str) -> None:
    """A uniform number and an integer that share everything but their kind would otherwise be one number."""
    uniform = DRAWS.uniform(3, purpose, range(2000))
    integers = DRAWS.integers(3, purpose, range(2000), 1, 1000).float()
    assert abs(float(torch.corrcoef(torch.stack([uniform, integers]))[0, 1])) < 4 / 2000**0.5


def philox4x64(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> list[int]:
    """Philox4x64 as Salmon et al. 2011 define it, on Python's integers."""
    word = 2**64
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, word)
        high1, low1 = divmod(0xCA5A826395121157 * c2, word)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return [c0, c1, c2, c3]


# counter, key, words: Random123's kat_vectors
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (
        "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
        "ffffffffffffffff ffffffffffffffff",
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
        "452821e638d01377 be5466cf34e90c6c",
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    """The definition in this file, against which the package's words are compared below."""

    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    assert philox4x64(words(counter), words(key)) == words(expected)


def test_words_are_philox_of_key_and_sample() -> None:
    """Block i = 1, 2, … of a sample is Philox of the counter (i, sample's words)."""
    key = (2**64 - 3, 0x123456789ABCDEF)
    indices = (0, 7, 2**40, -1, "a cat", "")
    samples = sample_words(indices)
    words = philox_words(key, samples, 10)
    for row, sample in zip(words, samples, strict=True):
        blocks = [philox4x64([block, *map(int, sample)], key) for block in (1, 2, 3)]
        assert row.tolist() == [word for block in blocks for word in block][:10]
    assert samples[:4].tolist() == [[0, 0, 0], [7, 0, 0], [2**40, 0, 0], [2**64 - 1, 0, 0]]
    assert len({tuple(sample) for sample in samples.tolist()}) == len(indices)


def test_a_word_makes_two_normals() -> None:
    """z = √(−2·ln u)·(cos 2πv, sin 2πv) with u, v = (lower, upper half + ½)/2^32, rounded to float32."""
    key, sample = (5, 6), (3, 0, 0)
    expected = []
    for word in philox4x64([1, *sample], key):
        u, v = ((half + 0.5) / 2**32 for half in (word % 2**32, word >> 32))
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    for count in (1, 5, 8):
        got = normals(key, (3,), count, torch.device("cpu"))
        torch.testing.assert_close(got, torch.tensor([expected[:count]]), atol=0, rtol=1e-7)


def test_a_sample_begins_alike_in_every_shape() -> None:
    """Number j of a sample is a function of j: a longer sample goes on where a shorter one ends, and samples
    too many for one chunk are what they are alone."""
    whole = DRAWS.normal(2, "noise", range(40), (3001,))
    assert torch.equal(DRAWS.normal(2, "noise", range(40), (7, 11)).flatten(1), whole[:, :77])
    alone = torch.cat([DRAWS.normal(2, "noise", [index], (3001,)) for index in range(40)])
    assert torch.equal(whole, alone)
    assert DRAWS.normal(2, "noise", [], (3,)).shape == (0, 3)
    assert DRAWS.normal(2, "noise", [1], (0,)).shape == (1, 0)


def test_neighbouring_numbers_of_a_sample_are_independent() -> None:
    """Also the two of one word, and their squares: |r| < 4/√n at lags 1 to 8."""
    count = 100_000
    series = DRAWS.normal(5, "noise", [3], (count,)).double()[0]
    for values in (series, series.square()):
        for lag in range(1, 9):
            pair = torch.stack([values[:-lag], values[lag:]])
            assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(count)


KERNEL_AGAINST_HOST = """
import torch
from rtdmd.randomness.normals import normals_on_host
from rtdmd.randomness.normals_gpu import normals_on_gpu
for key in ((0, 0), (2**64 - 1, 2**63), (3, 2**40)):
    for indices, count in (((0, 2**40, -3, "a cat"), 37), ((3,), 1), ((2, 3), 2409)):
        got = normals_on_gpu(key, indices, count, torch.device("cpu"))
        assert torch.equal(got, normals_on_host(key, indices, count)), (key, indices, count)
"""


def test_the_kernel_equals_the_host_in_tritons_interpreter() -> None:
    """Word for word and number for number; needs Triton, which CPU builds of torch come without."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL_AGAINST_HOST], env=environment, check=True, timeout=300)


@pytest.mark.gpu
def test_a_gpu_draws_the_hosts_numbers() -> None:
    """Equal but for a last place where float64's last place decides a rounding: at most 1 in 10^6 here."""
    for indices, shape in (
        ([0, 2**40, "a cat"], (3, 5)),
        (range(9), (128, 32, 32)),
        (range(128), (16, 8, 8)),
    ):
        host = DRAWS.normal(3, "noise", indices, shape)
        device = DRAWS.normal(3, "noise", indices, shape, "cuda")
        assert device.is_cuda
        torch.testing.assert_close(device.cpu(), host, atol=1e-7, rtol=2.4e-7)
        assert (device.cpu() != host).double().mean().item() < 1e-6
    assert DRAWS.uniform(3, "t", [0, 7], "cuda").tolist() == DRAWS.uniform(3, "t", [0, 7]).tolist()
    assert (
        DRAWS.integers(3, "t", [0, 7], 1, 9, "cuda").tolist() == DRAWS.integers(3, "t", [0, 7], 1, 9).tolist()
    )


def test_streams_are_pinned() -> None:
    """Not derived but recorded: a change of hash, key text, generator or of NumPy's algorithms would
    silently change every run and every resumed run, and shows here first."""
    expected = [[-0.2696966, -1.5878047, 0.4198117], [0.6741486, 0.5171025, -0.3326937]]
    torch.testing.assert_close(DRAWS.normal(3, "noise", [0, 1], (3,)), torch.tensor(expected))
    expected = [[-0.5430692, 1.8002157]]
    torch.testing.assert_close(DRAWS.normal(3, "noise", ["a cat"], (2,)), torch.tensor(expected))
    torch.testing.assert_close(DRAWS.uniform(3, "t", [0, 7]), torch.tensor([0.0098985, 0.1216904]))
    assert DRAWS.integers(3, "delta", [0, 1, 2, 3], 1, 200).tolist() == [158, 173, 32, 26]
    assert DRAWS.integer(3, "stop", 1, 4) == 1
    assert DRAWS.subset(3, "steps", 3, 2) == [0, 1]
    assert DRAWS.permutation(3, "order", 6) == [5, 1, 4, 2, 3, 0]
