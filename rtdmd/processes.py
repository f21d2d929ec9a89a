"""The same work in several processes, each on a device of its own; results come back in order."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from rtdmd.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tells the parent that so many more items are done.
Report = Callable[[int], None]


def environment_world_size() -> int:
    """The launcher's number of ranks, 1 without one. UserError if WORLD_SIZE is no number."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal():
        raise UserError(
            f"WORLD_SIZE={value!r} in the environment is no number of ranks; mend it, or give --world-size N"
        )
    return int(value)


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def devices_for(count: int, name: str | None = None) -> list[str]:
    """``count`` devices of the kind ``name`` (``cuda`` where there is a GPU, else ``cpu``), one a process.

    GPUs are ``cuda:0``, ``cuda:1``, …; processes on a CPU share it. UserError if there are fewer, or if
    ``name`` picks a single one of them for several processes.
    """
    import torch

    if count < 1:
        raise UserError(f"--gpus {count}: give at least 1")
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if count == 1 or kind == "cpu":
        return [kind] * count
    if ":" in kind:
        raise UserError(
            f"--device {kind} is one device, --gpus {count} asks for {count}: leave out one of them"
        )
    found = torch.cuda.device_count() if kind == "cuda" else 0
    if found < count:
        raise UserError(f"--gpus {count}: there are {found} devices of kind {kind!r} here")
    return [f"{kind}:{index}" for index in range(count)]


def shares(items: Sequence[Item], count: int) -> list[list[Item]]:
    """``items`` dealt out to ``count`` processes: the sizes differ by at most 1, and none is empty."""
    return [list(items[first::count]) for first in range(min(count, len(items)))]


def unshare(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """One result an item of :func:`shares`, back in the order of the items."""
    total = sum(len(part) for part in parts)
    return [parts[index % len(parts)][index // len(parts)] for index in range(total)]


def run_processes(
    work: Callable[[Any, Report], Result], arguments: Sequence[Any], report: Report | None = None
) -> list[Result]:
    """``work(argument, report)`` for each of ``arguments``, each in a process of its own, all at once.

    ``work`` is a module's function; arguments and results can be pickled. What processes report arrives
    at ``report`` here. One argument alone is worked on in this process. The first failure ends all
    processes: a UserError is raised here as it was there, anything else as RuntimeError with its
    traceback.
    """
    report = report or (lambda done: None)
    if len(arguments) == 1:
        return [work(arguments[0], report)]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    workers: dict[Connection, _Worker] = {}
    try:
        for index, argument in enumerate(arguments):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(work, argument, sender, len(arguments)), daemon=True
            )
            process.start()
            sender.close()  # the child's copy is the last, so that its end is noticed here
            workers[receiver] = _Worker(index, process)
        results = _collect(workers, report)
    finally:
        for worker in workers.values():
            worker.process.terminate()  # nothing, for one that has ended
            worker.process.join()
    return [results[index] for index in range(len(arguments))]


@dataclass(frozen=True)
class _Worker:
    index: int
    process: Any


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a process: the message of a UserError, or a whole traceback."""

    text: str
    is_users: bool


@dataclass(frozen=True)
class _Done:
    result: Any


def _collect(workers: dict[Connection, _Worker], report: Report) -> dict[int, Any]:
    results: dict[int, Any] = {}
    while len(results) < len(workers):
        for receiver in wait([pipe for pipe, worker in workers.items() if worker.index not in results]):
            assert isinstance(receiver, Connection)
            worker = workers[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                worker.process.join()
                raise RuntimeError(
                    f"process {worker.index + 1} of {len(workers)} ended with exit code "
                    f"{worker.process.exitcode} before its work was done"
                ) from None
            if isinstance(message, _Failure):
                if message.is_users:
                    raise UserError(message.text)
                raise RuntimeError(f"process {worker.index + 1} of {len(workers)} failed:\n{message.text}")
            if isinstance(message, _Done):
                results[worker.index] = message.result
            else:
                report(message)
    return results


def _serve(work: Callable[[Any, Report], Any], argument: Any, sender: Connection, num_processes: int) -> None:
    """What a process does: its work, with its share of the CPU's cores."""
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // num_processes)))
    try:
        message: Any = _Done(work(argument, sender.send))
    except UserError as error:
        message = _Failure(str(error), is_users=True)
    except Exception:  # the parent raises it
        message = _Failure(traceback.format_exc(), is_users=False)
    sender.send(message)
    sender.close()
