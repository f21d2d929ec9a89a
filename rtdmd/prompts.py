"""Prompts with their metadata, and the samplers that walk through them.

Parquet and hub datasets are read through ``datasets``; text, json and tables here, line by line. Arrow gives
every row the union of all keys, fills the absent ones with None and refuses lists of mixed types, which
GenEval's metadata has (``"position": ["left of", 0]``); csv through pandas turns a prompt such as ``NA`` or
``1984`` into something else than text. Reading by line also lets a message name the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rtdmd.errors import UserError, nearest_hint
from rtdmd.randomness import Draws
from rtdmd.recipe.schema import PromptsSection

PROMPT_COLUMNS = ("prompt", "text", "caption")

# A row and where it stands, for messages.
_Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, for each, the other columns of its row as plain Python values."""

    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.metadata):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.metadata)} rows of metadata")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(cls, section: PromptsSection) -> PromptSet:
        """Read a text file (one prompt a line), jsonl, json, csv, tsv, parquet, a folder, or a hub dataset.

        The prompt column is ``section.column``, else the first of ``prompt``, ``text``, ``caption`` that
        the file's first row has, in upper or lower case, singular or plural. A json file is one list, of
        objects or of prompts. Blank lines of text files are skipped. Files of a folder are read in the
        order of their names, json left out: there it mostly describes the others. In parquet and hub
        datasets a null is an absent key.

        Raises:
            UserError: the source cannot be read, a row has no prompt, or there is none at all.
        """
        if section.limit is not None and section.limit < 1:
            raise UserError(f"limit must be at least 1, got {section.limit}")
        found = _samples(section)
        samples = list(islice(_first_of_each(found) if section.unique else found, section.limit))
        if not samples:
            raise UserError(f"{section.source}: there are no prompts in it")
        return cls([prompt for prompt, _ in samples], [metadata for _, metadata in samples])


def check_prompts(
    section: PromptsSection,
    key: str,
    accept: Mapping[str, Callable[[str, dict[str, Any]], object]] | None = None,
) -> list[str]:
    """What :meth:`PromptSet.load` would refuse, as messages that open with the recipe's ``key``.

    Local sources are read; a hub id is not looked up, so that no network is needed.

    Args:
        section: where the prompts are.
        key: of the section in the recipe.
        accept: by the name of whoever uses the prompts: raises UserError for a prompt (given with its
            metadata) that it cannot use. A message tells how many those are, and of the first.
    """
    faults = []
    if section.limit is not None and section.limit < 1:
        faults.append(f"{key}.limit = {section.limit}: must be at least 1")
    if not is_hub_id(section.source):
        limit = section.limit if not faults else None
        try:
            prompts = PromptSet.load(replace(section, limit=limit))
        except UserError as error:
            faults.append(f"{key}: {error}")
        else:
            for user, check in (accept or {}).items():
                refused = _refusals(prompts, check)
                if refused:
                    share = f"{len(refused)} of {len(prompts)} prompts"
                    faults.append(
                        f"{key}.source = {section.source!r}: {user} cannot use {share}: {refused[0]}"
                    )
    return faults


def _refusals(prompts: PromptSet, check: Callable[[str, dict[str, Any]], object]) -> list[UserError]:
    refused = []
    for prompt, metadata in zip(prompts.prompts, prompts.metadata, strict=True):
        try:
            check(prompt, metadata)
        except UserError as error:
            refused.append(error)
    return refused


class ShuffledPrompts:
    """An endless walk through the prompts: pass after pass, each in an order of its own.

    A pure function of (seed, stage, position); the order of the current pass is kept.
    """

    def __init__(self, num_prompts: int, seed: int, stage: str) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts = num_prompts
        self._draws = Draws(seed, stage)
        self._pass = -1
        self._order: list[int] = []

    def index(self, position: int) -> int:
        """Index of the prompt at ``position`` >= 0 of the walk."""
        if position < 0:
            raise ValueError(f"position must not be negative, got {position}")
        number, offset = divmod(position, self.num_prompts)
        if number != self._pass:
            self._order = self._draws.permutation(number, "prompts", self.num_prompts)
            self._pass = number
        return self._order[offset]


class GroupSampler:
    """The K-repeat sampler of RTDMD: every prompt of a sampling batch of all ranks appears exactly K times.

    With G = sample_batch_size · world_size and K = images_per_prompt, a global sampling batch holds G/K
    prompts; where G < K a group spans consecutive sampling batches. Samples are shuffled within a global
    sampling batch, so that a group spreads over ranks.

    Successive epochs walk through shuffled passes of the prompt set. A pass ends where the next epoch (if the
    set is smaller than an epoch: the next sampling batch) would run over its end, so the prompts of an epoch
    are distinct as far as the set allows; other prompts are left over in each pass.

    All is a function of (seed, epoch, global position): two ranks see what one rank with twice the batch
    sees.

    Raises:
        ValueError: a count below 1, G >= K is no multiple of K, G < K and the epoch's samples are no
            multiple of K, or a sampling batch needs more prompts than there are.
    """

    def __init__(
        self,
        num_prompts: int,
        images_per_prompt: int,
        sample_batch_size: int,
        num_sample_batches: int,
        world_size: int,
        seed: int,
    ) -> None:
        counts = (num_prompts, images_per_prompt, sample_batch_size, num_sample_batches, world_size)
        if min(counts) < 1:
            raise ValueError(f"every count must be at least 1, got {counts}")
        self.images_per_prompt = images_per_prompt
        self.sample_batch_size = sample_batch_size
        self.num_sample_batches = num_sample_batches
        self.world_size = world_size
        self.global_batch_size = sample_batch_size * world_size
        self.epoch_size = self.global_batch_size * num_sample_batches
        if self.global_batch_size >= images_per_prompt and self.global_batch_size % images_per_prompt:
            raise ValueError(
                f"a sampling batch of all ranks, {sample_batch_size} x {world_size}, "
                f"is not a multiple of images_per_prompt {images_per_prompt}"
            )
        if self.epoch_size % images_per_prompt:
            raise ValueError(
                f"an epoch of {self.epoch_size} samples is not a multiple of "
                f"images_per_prompt {images_per_prompt}"
            )
        batch_groups = max(1, self.global_batch_size // images_per_prompt)
        if batch_groups > num_prompts:
            raise ValueError(
                f"a sampling batch needs {batch_groups} distinct prompts, there are {num_prompts}"
            )
        self._epoch_groups = self.epoch_size // images_per_prompt
        # Passes are cut so that no epoch (or, in a small set, no sampling batch) straddles two of them.
        unit = self._epoch_groups if self._epoch_groups <= num_prompts else batch_groups
        self._groups_per_pass = num_prompts - num_prompts % unit
        self._shuffled = ShuffledPrompts(num_prompts, seed, "rtdmd")
        self._draws = Draws(seed, "rtdmd")

    def epoch(self, epoch: int) -> list[int]:
        """Prompt index at each global position of the epoch, sampling batch after sampling batch."""
        first = epoch * self._epoch_groups
        groups = [self._group_prompt(first + group) for group in range(self._epoch_groups)]
        samples = [prompt for prompt in groups for _ in range(self.images_per_prompt)]
        shuffled = []
        for batch in range(self.num_sample_batches):
            step = epoch * self.num_sample_batches + batch
            order = self._draws.permutation(step, "group positions", self.global_batch_size)
            shuffled += [samples[batch * self.global_batch_size + member] for member in order]
        return shuffled

    def rank_positions(self, rank: int, batch_index: int) -> range:
        """Global positions in an epoch of this rank's samples in sampling batch ``batch_index``."""
        if not (0 <= rank < self.world_size and 0 <= batch_index < self.num_sample_batches):
            raise ValueError(
                f"rank {rank} of {self.world_size}, sampling batch {batch_index} of {self.num_sample_batches}"
            )
        start = batch_index * self.global_batch_size + rank * self.sample_batch_size
        return range(start, start + self.sample_batch_size)

    def _group_prompt(self, group: int) -> int:
        number, offset = divmod(group, self._groups_per_pass)
        return self._shuffled.index(number * self._shuffled.num_prompts + offset)


def _samples(section: PromptsSection) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_hub_id(section.source):
        yield from _split_rows(_hub_rows(section), section.column, nulls_are_absent=True)
        return
    for path in _files(Path(section.source)):
        yield from _split_rows(_READERS[path.suffix](path), section.column, path.suffix == ".parquet")


def _first_of_each(samples: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    for prompt, metadata in samples:
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, metadata


def is_hub_id(source: str) -> bool:
    """``owner/name`` that is no local path; a name that ends like a prompt file is a missing file."""
    owner, slash, name = source.partition("/")
    is_id = bool(owner.strip(".~") and slash and name.strip(".")) and "/" not in name
    return is_id and Path(name).suffix not in _READERS and not Path(source).exists()


def _files(source: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if source.is_dir():
        suffixes = _READERS.keys() - {".json"}
        files = sorted(path for path in source.iterdir() if path.suffix in suffixes and path.is_file())
        files = [path for path in files if not path.name.startswith(".")]
        if not files:
            raise UserError(f"{source}: the folder has no prompt file ({known})")
        return files
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder, and it is no hub id (owner/name)")
    if source.suffix not in _READERS:
        raise UserError(f"{source}: prompts are read from {known}, not from {source.suffix or 'this'!r}")
    return [source]


def _split_rows(
    rows: Iterable[_Row], column: str | None, nulls_are_absent: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompt and metadata of each row; the first row decides which column holds the prompt."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    column = _prompt_column(*first, column)
    for place, row in chain([first], rows):
        prompt = row.pop(column, None)
        if prompt is None:
            raise UserError(f"{place}: no value for {column!r}")
        if not isinstance(prompt, str):
            raise UserError(f"{place}: {column!r} is {type(prompt).__name__}, not text")
        if not prompt.strip():
            raise UserError(f"{place}: {column!r} is blank")
        if not is_text(prompt):
            raise UserError(f"{place}: {column!r} holds half of a character (a lone surrogate); mend it")
        yield prompt, _without_nulls(row) if nulls_are_absent else row


def is_text(prompt: str) -> bool:
    """Whether it can be written as UTF-8, which tokenizers need: lone surrogates can't."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in prompt)


def _prompt_column(place: str, row: dict[str, Any], column: str | None) -> str:
    if column is None:
        # Benchmarks' tables have capitals and plurals.
        alike = {name.lower().removesuffix("s"): name for name in row}
        known = [name for name in PROMPT_COLUMNS if name in row]
        known += [alike[name] for name in PROMPT_COLUMNS if name in alike]
        found = known[0] if known else None
        if found is None:
            raise UserError(
                f"{place}: no column {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]} among "
                f"{', '.join(row)}; name the one with the prompts in `column`"
            )
        return found
    if column not in row:
        hint = nearest_hint(column, list(row))
        columns = "" if hint.startswith("; known") else f" (columns: {', '.join(row)})"
        raise UserError(f"{place}: no column {column!r}{hint}{columns}")
    return column


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Arrow filled in; a null inside a list is kept, since it has a place."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}, byte {error.start}: 0x{data[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error
    # Not splitlines(), which also splits at separators that may stand inside a prompt.
    return text.replace("\r\n", "\n").split("\n")


def _text_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"{path}: line {number}", {"text": line.strip()}


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}, column {error.colno}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
            raise UserError(f"{place}: not a row of prompts: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row


def _json_rows(path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads("\n".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a list of prompts: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected one JSON list, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        place = f"{path}: item {number}"
        if not isinstance(row, dict | str):
            raise UserError(f"{place}: expected an object or a prompt, found {type(row).__name__}")
        yield place, {"text": row} if isinstance(row, str) else row


def _tsv_rows(path: Path) -> Iterator[_Row]:
    return _csv_rows(path, delimiter="\t")


def _csv_rows(path: Path, delimiter: str = ",") -> Iterator[_Row]:
    lines = [line + "\n" for line in _lines(path)]
    _check_quotes(path, lines, delimiter)
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        for number, row in enumerate(reader, start=1):
            place = f"{path}: row {number} (line {reader.line_num})"
            if None in row or None in row.values():
                raise UserError(
                    f"{place}: the header names {len(reader.fieldnames or ())} columns, the row differs"
                )
            yield place, dict(row)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _check_quotes(path: Path, lines: list[str], delimiter: str) -> None:
    """UserError for one that is never closed, which would swallow all rows that follow."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 1
    try:
        for _ in reader:
            start = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise UserError(f"{path}: the row of line {start} opens a quote that is never closed") from error


def _parquet_rows(path: Path) -> Iterator[_Row]:
    # Streaming, so that nothing is copied into a cache folder that ranks would have to share.
    return _dataset_rows(str(path), "parquet", data_files=str(path), split="train", streaming=True)


def _hub_rows(section: PromptsSection) -> Iterator[_Row]:
    return _dataset_rows(section.source, section.source, split=section.split)


def _dataset_rows(source: str, *args: Any, **kwargs: Any) -> Iterator[_Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(*args, **kwargs)
        # Pictures and sound beside the prompts are never decoded.
        media = [name for name, kind in (dataset.features or {}).items() if hasattr(kind, "decode_example")]
        for number, row in enumerate(dataset.remove_columns(media), start=1):
            yield f"{source}: row {number}", dict(row)
    # What a damaged file, an unknown split or a missing network raises has no common base class.
    except Exception as error:
        raise UserError(f"{source}: cannot be read: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[_Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
