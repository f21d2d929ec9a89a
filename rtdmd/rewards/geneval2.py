"""GenEval 2 by Soft-TIFA: how sure Qwen3-VL is of the right answers about a picture (arXiv 2512.16853).

score = (Π_q P(right answer to q))^(1/Q) in [0, 1], the geometric mean over the prompt's Q questions. P adds
up, over the spellings of the answer, the probability of the first token that the judge would say.

The benchmark generates that token question by question. Here one forward pass reads each picture once, and
the vocabulary's head sees only the places where the answers begin. All questions of a picture stand in one
sequence behind it, each sees the picture and itself, at the positions that it would have alone. Such masks
want torch's own attention (``sdpa``).

Legend: B batch, Q questions of all pictures, n tokens of a picture, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardMode, RewardSection
from rtdmd.rewards import REWARDS
from rtdmd.rewards.geneval2_rules import Question, questions
from rtdmd.rewards.protocol import Metadata
from rtdmd.rewards.qwen_vl import (
    PICTURE_END,
    PICTURE_START,
    QwenInput,
    load_qwen_tokenizer,
    picture_grid,
    right_padded,
)
from rtdmd.rewards.recomputation import recompute_in_backward
from rtdmd.rewards.sources import fetch_hint, first_line
from rtdmd.rewards.validation import check_batch, check_scores

_BEFORE = f"<|im_start|>user\n{PICTURE_START}"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class _Layout:
    """Where the questions of a batch stand behind the pictures."""

    ids: Tensor  # [B, longest], padded on the right
    branch: Tensor  # [B, longest]: the question that a token belongs to, from 1; 0 for padding
    offset: Tensor  # [B, longest]: the token's place in its question
    rows: Tensor  # [Q]: picture of each question
    ends: Tensor  # [Q]: place of its last token


class Geneval2Reward:
    """Soft-TIFA as a reward, frozen. Activations of both towers are recomputed in the backward pass.

    Args:
        model: the judge.
        tokenizer: of that model.
        image_input: how its vision tower wants pictures.
        mode: which spellings of an answer count, see ``Question.answer_forms``.
        chunk_size: pictures looked at at once.
        quantise: False leaves out the roundings of the preprocessing.
        checkpoint_layers: recompute activations in the backward pass.
    """

    name = "geneval2"
    differentiable = True

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        tokenizer: Any,
        image_input: QwenInput,
        mode: RewardMode = "default",
        *,
        chunk_size: int = 4,
        quantise: bool = True,
        checkpoint_layers: bool = True,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_input = image_input
        self.mode = mode
        self.chunk_size = chunk_size
        self.quantise = quantise
        if checkpoint_layers:
            recompute_in_backward(model.model.visual.blocks)
            recompute_in_backward(model.model.language_model.layers)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores [B] in [0, 1], float32, differentiable with respect to ``images`` [B, 3, H, W] in [0, 1].

        ``metadata``: rows of the benchmark, see ``geneval2_rules.questions``.

        Raises:
            ValueError: the batch has another shape or range.
            UserError: metadata are missing or not understood (before anything is scored).
        """
        check_batch(images, prompts, metadata)
        asked = [questions(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        answers = [
            [self._answer_ids(prompt, question) for question in row]
            for prompt, row in zip(prompts, asked, strict=True)
        ]
        starts = range(0, len(images), self.chunk_size)
        chunks = [slice(start, start + self.chunk_size) for start in starts]
        scores = torch.cat([self._chunk(images[chunk], asked[chunk], answers[chunk]) for chunk in chunks])
        return check_scores(self.name, scores, prompts)

    def _chunk(
        self, images: Tensor, asked: Sequence[Sequence[Question]], answers: Sequence[Sequence[list[int]]]
    ) -> Tensor:
        layout = self._layout(asked, images.device)
        hidden = self._hidden(images, layout)  # (Q, D)
        logits = self.model.lm_head(hidden)
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        right = [ids for row in answers for ids in row]
        log_right = torch.stack(
            [row[ids].logsumexp(dim=0) for row, ids in zip(log_probabilities, right, strict=True)]
        )
        sizes = [len(row) for row in asked]
        return torch.stack([part.mean() for part in log_right.split(sizes)]).exp()

    def _hidden(self, images: Tensor, layout: _Layout) -> Tensor:
        """The last hidden state at the last token of each question, [Q, D]."""
        count, device = len(images), images.device
        patches, (rows, columns) = self.image_input.patches(images, self.quantise)
        core, merge = self.model.model, self.image_input.merge_size
        seen = core.visual(patches.to(self.model.dtype), grid_thw=picture_grid(count, rows, columns, device))
        pictures = seen.pooler_output.unflatten(0, (count, -1))  # (B, n, D)
        embed = self.model.get_input_embeddings()
        before = embed(torch.tensor([self._ids(_BEFORE)], device=device)).expand(count, -1, -1)
        embeddings = torch.cat([before, pictures, embed(layout.ids)], dim=1)  # (B, T, D)
        first, after = before.shape[1], before.shape[1] + pictures.shape[1]
        is_picture = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=device)
        is_picture[:, first:after] = True
        hidden = core.language_model(
            inputs_embeds=embeddings,
            attention_mask=_visible(layout.branch, after),
            position_ids=_positions(layout.offset, first, rows // merge, columns // merge),
            visual_pos_masks=is_picture,
            deepstack_visual_embeds=seen.deepstack_features,
            use_cache=False,
        ).last_hidden_state
        return hidden[layout.rows, after + layout.ends]

    def _layout(self, asked: Sequence[Sequence[Question]], device: torch.device) -> _Layout:
        texts = [
            [self._ids(PICTURE_END + question.instruction + _AFTER) for question in row] for row in asked
        ]
        lengths = [[len(ids) for ids in row] for row in texts]
        branch = [[index for index, ids in enumerate(row, start=1) for _ in ids] for row in texts]
        offset = [[place for ids in row for place in range(len(ids))] for row in texts]
        ends = [sum(row[: index + 1]) - 1 for row in lengths for index in range(len(row))]
        return _Layout(
            ids=right_padded([[token for ids in row for token in ids] for row in texts], device),
            branch=right_padded(branch, device),
            offset=right_padded(offset, device),
            rows=torch.tensor([row for row, ids in enumerate(texts) for _ in ids], device=device),
            ends=torch.tensor(ends, device=device),
        )

    def _answer_ids(self, prompt: str, question: Question) -> list[int]:
        """Tokens whose probabilities are added up; in mode ``official`` the same one may occur twice."""
        spelled = [self._ids(form) for form in question.answer_forms(self.mode)]
        if self.mode == "official":
            return [ids[0] for ids in spelled]
        single = list(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))
        if not single:
            raise UserError(
                f"prompt {prompt!r}: geneval2 cannot judge the answer {question.answer!r} to "
                f"{question.text!r}: it is no single token of the judge's; use a shorter word"
            )
        return single

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def _visible(branch: Tensor, shared: int) -> Tensor:
    """Which token (third axis) sees which (fourth), [B, 1, T, T]: earlier ones of its or no question."""
    branch = torch.nn.functional.pad(branch, (shared, 0))
    length = branch.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    fits = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (earlier & fits)[:, None]


def _positions(offset: Tensor, before: int, rows: int, columns: int) -> Tensor:
    """Time, row and column of each token, [3, B, T], as Qwen3-VL counts one picture and one question.

    Text is numbered in order on all three axes; a picture's tokens share one time and have their own row and
    column; the text behind it goes on after the longer side.
    """
    device = offset.device
    start = torch.arange(before, device=device).expand(3, -1)
    axes = [torch.arange(size, device=device) for size in (1, rows, columns)]
    picture = torch.cartesian_prod(*axes).T + before  # (3, n)
    shared = torch.cat([start, picture], dim=1)[:, None].expand(-1, len(offset), -1)
    behind = (offset + before + max(rows, columns)).expand(3, -1, -1)
    return torch.cat([shared, behind], dim=2)


def load(section: RewardSection, device: torch.device, dtype: torch.dtype) -> Geneval2Reward:
    """Load the judge from ``section.weights`` (folder or hub id), by default the published one.

    Raises:
        UserError: files are missing or damaged, some of the model's weights aren't in them, or tokenizer or
            preprocessor aren't this model's.
    """
    (published,) = REWARDS["geneval2"].needs_files
    weights = section.weights or published.repo
    try:
        model, loaded = Qwen3VLForConditionalGeneration.from_pretrained(
            weights,
            revision=section.revision,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = fetch_hint(weights, published.files)
        raise UserError(f"{weights}: no Qwen3-VL weights: {first_line(error)}{hint}") from error
    absent = sorted(loaded["missing_keys"])
    if absent:
        # transformers would go on with random values in their place.
        raise UserError(f"{weights}: {len(absent)} weights of Qwen3-VL are not in it, such as {absent[0]}")
    tokenizer = load_qwen_tokenizer(weights, model.config.image_token_id, section.revision)
    image_input = QwenInput.load(weights, section.revision)
    return Geneval2Reward(model.to(device), tokenizer, image_input, section.mode)
