"""Text embeddings of a stage's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rtdmd.models.protocol import ModelFamily, TextEmbeddings

_BATCH = 32  # prompts encoded at once; an encoder holds the hidden states of all its layers


class PromptTexts:
    """Embeddings of prompts by their indices in ``prompts``.

    If those of all distinct prompts fit into ``limit_gib`` GiB they are encoded here, once, and kept on the
    device; else each call encodes what it is asked for. The batches in which a kept prompt is encoded depend
    on the prompts alone, so that ranks, micro-batches and resumed runs see the same rounding.
    ``further`` prompts, the previews', say, are encoded along with them; ``progress`` is called after each
    batch.
    """

    def __init__(
        self,
        family: ModelFamily,
        prompts: Sequence[str],
        limit_gib: float,
        progress: Callable[[], None],
        further: Sequence[str] = (),
    ) -> None:
        self._family = family
        self._prompts = prompts
        distinct = list(dict.fromkeys([*prompts, *further]))
        self._rows = {prompt: row for row, prompt in enumerate(distinct)}
        self._kept: TextEmbeddings | None = None
        self.gib = self._num_bytes(len(distinct)) / 2**30
        if self.gib <= limit_gib:
            self._kept = self._encode(distinct, progress)

    def _encode(self, prompts: Sequence[str], progress: Callable[[], None] = lambda: None) -> TextEmbeddings:
        parts = []
        for start in range(0, len(prompts), _BATCH):
            parts.append(self._family.encode_prompts(prompts[start : start + _BATCH]))
            progress()
        return TextEmbeddings.cat(parts)

    @property
    def are_kept(self) -> bool:
        """Whether the family's text encoders are needed no more."""
        return self._kept is not None

    def _num_bytes(self, count: int) -> int:
        """Of ``count`` prompts; all have the same shape, whatever their length."""
        one = self._family.encode_prompts([""]).tensors.values()
        return count * sum(tensor.nbytes for tensor in one)

    def __call__(self, indices: Sequence[int]) -> TextEmbeddings:
        """One row for each of ``indices``."""
        return self.of([self._prompts[index] for index in indices])

    def of(self, prompts: Sequence[str]) -> TextEmbeddings:
        """One row for each of ``prompts``, which are the stage's or among the further ones."""
        if self._kept is None:
            return self._encode(prompts)
        return self._kept[[self._rows[prompt] for prompt in prompts]]
