"""Which of a transformer's blocks are recomputed in backward, and how many have to be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def spread(count: int, total: int) -> set[int]:
    """``count`` of the indices 0 … total − 1, evenly spread; for half of them every other, from the first."""
    return {index for index in range(total) if index * count % total < count}


def predicted_peak(
    peak: float, kept: Sequence[float], while_measured: Collection[int], recomputed: Collection[int]
) -> float:
    """Bytes at the peak if the blocks ``recomputed`` are, and the others keep their activations.

    peak − Σ_{i in while_measured} kept_i + Σ_{i not in recomputed} kept_i

    ``kept`` [n]: what block i keeps beyond what it keeps when it is recomputed. ``peak`` was measured while
    the blocks ``while_measured`` kept theirs. An upper bound where the peak is in backward: one recomputed
    block's activations are in it, even if none is recomputed any more.
    """
    changed = sum(size for index, size in enumerate(kept) if index not in recomputed)
    return peak - sum(kept[index] for index in while_measured) + changed


def fewest_recomputed(
    peak: float, kept: Sequence[float], while_measured: Collection[int], available: float
) -> int:
    """The smallest k such that, with k blocks recomputed, the predicted peak is at most ``available``.

    All n blocks where no k is enough. The arguments are those of :func:`predicted_peak`, in bytes.
    """
    total = len(kept)
    for count in range(total):
        if predicted_peak(peak, kept, while_measured, spread(count, total)) <= available:
            return count
    return total


class _Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        # A leaf as it is, since ZeRO-3 exchanges a parameter's data; another would hold its own graph.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Of nested sequences."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class SavedBytes:
    """Bytes that autograd keeps of a block's forwards, all that are alive together.

    Each storage counts once. Parameters don't count, nor do the block's arguments: a recomputed block keeps
    those too. ``most`` is the largest sum so far.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._references: dict[int, int] = {}

    @contextmanager
    def counting(self, block: nn.Module, arguments: Sequence[Any]) -> Iterator[None]:
        """Count what the forward in this context saves."""
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors(arguments)}

        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor)
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            # Asked for now: ZeRO-3 gathers a layer's parameters when it runs.
            parameters = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
            if key not in given and key not in parameters:
                self._add(key, storage.nbytes())
                weakref.finalize(saved, self._drop, key, storage.nbytes())
            return saved

        with saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield

    def _add(self, key: int, size: int) -> None:
        self._references[key] = self._references.get(key, 0) + 1
        if self._references[key] == 1:
            self._now += size
            self.most = max(self.most, self._now)

    def _drop(self, key: int, size: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self._now -= size


class Recomputation:
    """Drops blocks' activations in forward and computes them once more in backward; at first all blocks'.

    Not reentrant: under ZeRO-3 reentrant checkpoints give wrong gradients with several forwards before one
    backward. Blocks may be chosen anew between updates, on all ranks alike. ``bind`` makes of a block what
    computes the same in backward, whichever role the network serves then.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        bind: Callable[[nn.Module], Callable[..., Any]] = lambda block: block,
    ) -> None:
        self.blocks = list(blocks)
        self._bind = bind
        self._recomputed = set(self.blocks)
        self._counters: dict[nn.Module, SavedBytes] = {}

    def run(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``, for diffusers' ``enable_gradient_checkpointing``."""
        if block in self._recomputed:
            return checkpoint(self._bind(block), *args, use_reentrant=False)
        counter = self._counters.get(block)
        if counter is None:
            return block(*args)
        with counter.counting(block, args):
            return block(*args)

    def choose(self, count: int) -> None:
        """Recompute ``count`` of the blocks, evenly spread, and measure none."""
        chosen = spread(count, len(self.blocks))
        self._recomputed = {block for index, block in enumerate(self.blocks) if index in chosen}
        self._counters = {}

    def measure(self) -> None:
        """Recompute all blocks but the first of each kind, and count what those keep."""
        first: dict[Any, nn.Module] = {}
        for block in self.blocks:
            first.setdefault(_kind(block), block)
        self._counters = {block: SavedBytes() for block in first.values()}
        self._recomputed = set(self.blocks) - set(self._counters)

    @property
    def measured(self) -> set[int]:
        """Indices of the blocks that are measured."""
        return {index for index, block in enumerate(self.blocks) if block in self._counters}

    def kept_bytes(self) -> list[int]:
        """What each block keeps if it isn't recomputed, after the block of its kind that was measured."""
        by_kind = {_kind(block): counter.most for block, counter in self._counters.items()}
        return [by_kind[_kind(block)] for block in self.blocks]


def _kind(block: nn.Module) -> Any:
    """Blocks of one kind have parameters of the same shapes, whole ones also where they are sharded."""
    shapes = (tuple(getattr(weight, "ds_shape", weight.shape)) for weight in block.parameters())
    return type(block), tuple(shapes)
