"""A small tokenizer of the Qwen-VL kind."""

from __future__ import annotations

from transformers import Qwen2TokenizerFast

from rtdmd.models.tiny_tokenizers import WORDS, qwen_tokenizer

QWEN_WORDS = (*WORDS, "Yes", "yes", "No", "no", "Two", "Three", "2", "How", "many", "Are", "image", "Answer")


def qwen_vl_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE with Qwen-VL's markers."""
    tokenizer = qwen_tokenizer(QWEN_WORDS)
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    return tokenizer


def qwen_ids(tokenizer: Qwen2TokenizerFast) -> dict[str, int]:
    """The markers' ids as a Qwen-VL's configuration has them."""
    names = {"image": "image_pad", "video": "video_pad"}
    names |= {"vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
