"""How long the random draws of a step take the host, and a GPU where there is one.

    python -m benchmarks.draws [--device cuda]

For comparison: a NumPy generator of its own for each sample, with NumPy's ziggurat. Medians of repeated
calls, milliseconds. On a GPU "host" is the time until the call returns, "done" until the numbers are there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from rtdmd.randomness import Draws

# samples, shape of one: FLUX.2-klein at 512 pixels with its cold start's batch, the small world
SIZES = [(9, (128, 32, 32)), (128, (16, 8, 8))]
REPEATS = 20


def one_generator_per_sample(count: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What the draws are measured against."""
    rows = [
        np.random.Generator(np.random.Philox(key=index)).standard_normal(shape, dtype=np.float32)
        for index in range(count)
    ]
    return torch.from_numpy(np.stack(rows)).to(device)


def milliseconds(call: Callable[[], object], device: torch.device) -> str:
    """Medians over ``REPEATS`` calls after a first one."""
    host, done = [], []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append(time.perf_counter() - start)
    text = f"{1e3 * median(host[1:]):8.3f}"
    return f"host {text}, done {1e3 * median(done[1:]):8.3f}" if device.type == "cuda" else text


def main() -> None:
    """Print one line per draw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    draws = Draws(seed=0, stage="benchmark")
    for count, shape in SIZES:
        size = "×".join(map(str, (count, *shape)))
        plain = milliseconds(lambda c=count, s=shape: one_generator_per_sample(c, s, device), device)  # type: ignore[misc]
        ours = milliseconds(lambda c=count, s=shape: draws.normal(0, "noise", range(c), s, device), device)  # type: ignore[misc]
        print(f"normal {size}: a generator per sample {plain}, Draws {ours}")
    uniform = milliseconds(lambda: draws.uniform(0, "t", range(128), device), device)
    integers = milliseconds(lambda: draws.integers(0, "delta", range(128), 1, 200, device), device)
    print(f"128 uniform numbers {uniform}, 128 integers {integers}")


if __name__ == "__main__":
    main()
