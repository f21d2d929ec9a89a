"""Measurements of a benchmark: taken on all ranks, printed as they come, kept in JSON, told as Markdown."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from benchmarks.gpus import alone
from benchmarks.model_flops import matrix_ceiling
from benchmarks.phases import REST, PhaseClock
from rtdmd.distributed.collectives import Ranks
from rtdmd.errors import UserError
from rtdmd.models.blocks import num_compiled_graphs
from rtdmd.recipe.schema import Recipe

Made = TypeVar("Made")

GIB = 2**30


class Bench:
    """What all measurements share; rank 0 prints and writes each row as soon as it is there."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe, ranks: Ranks) -> None:
        self.options = options
        self.recipe = recipe
        self.ranks = ranks
        self.rows: list[dict[str, Any]] = []
        dtype = getattr(torch, recipe.dtype)
        with alone():
            self.ceiling = matrix_ceiling(ranks.device, dtype, 256 if options.tiny else 8192)
        self.flops = 0  # F of one sample
        self.mapped = 0  # bytes on the device that torch's allocator doesn't count
        on_cuda = ranks.device.type == "cuda"
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(ranks.device) if on_cuda else "cpu",
            "ranks": ranks.world_size,
            "torch": torch.__version__,
            "recipe": options.recipe,
            "overrides": options.overrides,
            "stage": options.stage,
            "tiny": options.tiny,
            "ceiling_tflops": self.ceiling / 1e12,
            "ceilings_tflops": [each / 1e12 for each in ranks.gather_objects(self.ceiling)],
            "rows": self.rows,
            "summary": {},
            "notices": [],
            "error": None,
        }

    def write(self) -> None:
        """The JSON file, on rank 0, if one was asked for."""
        if self.ranks.is_main:
            write_json(self.options, self.result)

    def say(self, text: str) -> None:
        """A line on rank 0."""
        if self.ranks.is_main:
            print(text, flush=True)

    def report(self, row: dict[str, Any]) -> None:
        """Keep, print and write one measurement."""
        self.rows.append(row)
        self.say(json.dumps(row))
        self.write()

    def attempt(self, name: str, facts: dict[str, Any], run: Callable[[], Made]) -> Made | None:
        """What ``run`` returns; where it fails, None and a row that says why.

        Among several ranks the failure is raised, for the others may be waiting.
        """
        try:
            return run()
        except UserError:
            raise
        except Exception as error:
            self.result["error"] = self.result["error"] or f"{name}: {one_line(error)}"
            self.report({"case": name, **facts, "error": one_line(error)})
            if self.ranks.world_size > 1:
                raise
            traceback.print_exc()
            return None

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Collective: element-wise maximum over ranks."""
        together = torch.tensor(list(values), dtype=torch.float64, device=self.ranks.device)
        return self.ranks.max(together).tolist()

    def memory(self) -> tuple[float, float]:
        """GiB allocated and reserved at most since the last reset, on the fullest rank; 0 without CUDA."""
        if self.ranks.device.type != "cuda":
            return 0.0, 0.0
        device = self.ranks.device
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        allocated, reserved = self.slowest([peak + self.mapped for peak in peaks])
        return round(allocated / GIB, 2), round(reserved / GIB, 2)

    def measure(self, run: Callable[[int], None], samples: int, forwards: int) -> dict[str, Any]:
        """``run(k)`` for k = 0, 1, …, of which the first ``--warmup`` don't count.

        ``forwards`` evaluations in F for each of this rank's ``samples`` are what a step must compute.
        """
        warmup, steps = self.options.warmup, self.options.steps
        for number in range(warmup):
            run(number)
        graphs = num_compiled_graphs()
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)
        with alone():
            measured = self.slowest([self._seconds(partial(run, warmup + number)) for number in range(steps)])
        allocated, reserved = self.memory()
        model_flop = forwards * samples * self.flops
        return {
            "seconds": median(measured),
            "fastest": min(measured),
            "slowest": max(measured),
            "peak_gib": allocated,
            "reserved_gib": reserved,
            "model_tflop": model_flop / 1e12,
            "utilisation": model_flop / median(measured) / self.ceiling,
            "graphs_compiled_meanwhile": num_compiled_graphs() - graphs,
        }

    def _seconds(self, run: Callable[[], None]) -> float:
        self.ranks.barrier()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def phases(self, clock: PhaseClock, run: Callable[[int], None]) -> dict[str, dict[str, float]]:
        """Mean seconds and peak GiB of each phase of ``run``, this rank's, over ``--phase-steps``."""
        clock.phases.clear()
        clock.enabled = True
        count = self.options.phase_steps
        with alone():
            for number in range(count):
                with clock.phase(REST):
                    run(number)
        clock.enabled = False
        return {
            name: {"seconds": phase.seconds / count, "peak_gib": round((phase.peak + self.mapped) / GIB, 2)}
            for name, phase in sorted(clock.phases.items(), key=lambda item: -item[1].seconds)
        }


def one_line(error: Exception) -> str:
    """Kind and first line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write_json(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """To the file that was asked for."""
    output: Path | None = options.output
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        f"{result['device']} x {result['ranks']}, ceiling {result['ceiling_tflops']:.1f} TFLOP/s, "
        f"F = {result.get('forward_tflop_per_sample', 0):.4g} TFLOP a sample",
        "",
        "| case | seconds | utilisation | peak GiB | reserved GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "error" in row:
            cells = [f"error: {row['error']}".replace("|", "/"), "", "", ""]
        elif "utilisation" in row:
            gib = [f"{row[key]:.2f}" for key in ("peak_gib", "reserved_gib")]
            cells = [f"{row['seconds']:.3f}", f"{row['utilisation']:.1%}", *gib]
        else:
            cells = [f"{row['seconds']:.3f}", "", "", ""]
        lines.append(f"| {' | '.join([row['case'], *cells])} |")
    phases = [(row["case"], *phase) for row in result["rows"] for phase in row.get("phases", {}).items()]
    if phases:
        lines += ["", "| case | phase | seconds | peak GiB |", "|---|---|---:|---:|"]
        lines += [
            f"| {case} | {name} | {phase['seconds']:.3f} | {phase['peak_gib']:.2f} |"
            for case, name, phase in phases
        ]
    facts = [f"- {name}: {value:.3f}" for name, value in result["summary"].items()]
    notices = [f"- {notice}" for notice in result["notices"]]
    return "\n".join([*lines, *([""] if facts or notices else []), *facts, *notices])
