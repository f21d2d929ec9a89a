"""Scores of one model on one set, batch by batch: finished ones survive whatever ends the process.

MODEL/SET/identity.json                   what the scores depend on
          000000-000004.safetensors …     of pictures 0 to 3: a tensor per reward, perhaps features
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from rtdmd.errors import UserError
from rtdmd.evaluation.identity import Identity, as_json, differences
from rtdmd.files import read_json, replace_file

_BATCH = re.compile(r"(\d{6,})-(\d{6,})\.safetensors")


class Store:
    """The folder of a model's scores on a set of ``num_pictures`` pictures."""

    def __init__(self, folder: Path, num_pictures: int) -> None:
        self.folder = folder
        self._num_pictures = num_pictures

    def check(self, identity: Identity) -> None:
        """Raise UserError if the folder holds scores of something else, naming what differs."""
        path = self.folder / "identity.json"
        if not path.is_file():
            return
        before = read_json(path, f"remove {self.folder}")
        changed = differences(before, identity)
        if changed:
            raise UserError(
                f"{self.folder}: holds scores of another evaluation: {'; '.join(changed)}. "
                f"Change it back, choose another --out, or remove {self.folder}"
            )

    def claim(self, identity: Identity) -> None:
        """Write down what the scores depend on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "identity.json", as_json(identity), shared=True)

    def missing(self, batch_size: int, has_picture: Callable[[int], bool]) -> list[range]:
        """The batches to do, in order; ``has_picture`` says which pictures are kept, where they shall be.

        Batches begin at multiples of ``batch_size``: with the same one, a resumed evaluation has the batches
        of the straight one, and so its scores to the last bit.
        """
        scored = {number for batch in self._batches() for number in batch}
        todo = []
        for start in range(0, self._num_pictures, batch_size):
            batch = range(start, min(start + batch_size, self._num_pictures))
            if all(has_picture(number) for number in batch):
                todo += _runs([number for number in batch if number not in scored])
            else:
                todo.append(batch)
        return todo

    def write(self, batch: range, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was measured of the pictures of ``batch``, one row each."""
        name = f"{batch.start:06d}-{batch.stop:06d}.safetensors"
        rows = {key: value.contiguous() for key, value in tensors.items()}
        replace_file(self.folder / name, to_bytes(rows), shared=True)

    def read(self) -> dict[str, Tensor]:
        """Everything, one row a picture. UserError if a file can't be read or pictures are missing."""
        rows: dict[str, list[Tensor | None]] = {}
        for batch in self._batches():
            path = self.folder / f"{batch.start:06d}-{batch.stop:06d}.safetensors"
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it and start again") from error
            for key, values in tensors.items():
                place = rows.setdefault(key, [None] * self._num_pictures)
                place[batch.start : batch.stop] = values.unbind()
        return {key: torch.stack([_there(value, self.folder) for value in rows[key]]) for key in sorted(rows)}

    def _batches(self) -> list[range]:
        found = [_BATCH.fullmatch(path.name) for path in sorted(self.folder.glob("*.safetensors"))]
        return [range(int(match[1]), int(match[2])) for match in found if match]


def _there(value: Tensor | None, folder: Path) -> Tensor:
    if value is None:
        raise UserError(f"{folder}: not every picture has been scored; start again")
    return value


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as ranges of consecutive ones."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
