"""GenEval 2 on a small Qwen3-VL, against the benchmark's question-by-question generation."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen import qwen_vl_tokenizer
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rtdmd.errors import UserError
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS, load_rewards
from rtdmd.rewards.geneval2_rules import Question, questions

CPU = torch.device("cpu")
DIGITS = {"one": "1", "two": "2", "three": "3"}
ROWS = [
    {
        "prompt": "two red circles",
        "atom_count": 3,
        "vqa_list": [
            ["How many circles are in the image?", "two"],
            ["Are the circles red?", "Yes"],
            ["Are there any circles in the image?", "Yes"],
        ],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a cat",
        "vqa_list": [["Are there any cats, or animals of another kind, in the image?", "Yes"]],
    },
    {
        "prompt": "three birds",
        "vqa_list": [["How many birds are in the image?", "three"], ["Are there any birds?", "Yes"]],
    },
]
PROMPTS = [row["prompt"] for row in ROWS]


def _images(count, height=64, width=64, seed=0):
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def _load(weights, dtype=torch.float32, mode="default"):
    return load_rewards([RewardSection("geneval2", weights=str(weights), mode=mode)], CPU, dtype)[0]


def _score(reward, images, rows=ROWS):
    return reward.score(images, [row["prompt"] for row in rows[: len(images)]], rows[: len(images)])


def _inputs(tokenizer, image, question):
    """Qwen3-VL's own processor: 65,536 to 16,777,216 pixels, mean and std ½; its chat of one turn."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 65_536, "longest_edge": 16_777_216},
    )
    levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    inputs = dict(processor([levels], return_tensors="pt"))
    pads = "<|image_pad|>" * (int(inputs["image_grid_thw"].prod()) // 4)
    chat = (
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{question} Answer in one word.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs |= tokenizer(chat, return_tensors="pt")
    is_picture = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return inputs | {"mm_token_type_ids": is_picture.int()}


def _generated_score(folder, image, row, answer_ids):
    """The geometric mean of the probabilities of the first generated token."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = qwen_vl_tokenizer()
    log_scores = []
    for question, answer in row["vqa_list"]:
        output = model.generate(
            **_inputs(tokenizer, image, question),
            max_new_tokens=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        probabilities = output.scores[0].softmax(dim=-1)[0]
        ids = answer_ids(tokenizer, question, answer)
        log_scores.append(math.log(sum(probabilities[index].item() for index in ids)))
    return math.exp(sum(log_scores) / len(log_scores))


def _published_ids(tokenizer, question, answer):
    """evaluation.py's answer lists, the first token of each."""
    spelled = ["Yes", "yes", " yes", " Yes"]
    if question.startswith("How many"):
        digit = DIGITS.get(answer, "other")
        spelled = [answer, answer.capitalize(), " " + answer, " " + answer.capitalize(), digit, " " + digit]
    return [tokenizer(form)["input_ids"][0] for form in spelled]


def _whole_words(tokenizer, question, answer):
    """Each spelling that is a token, once."""
    spelled = {answer, answer.lower(), answer.capitalize(), DIGITS.get(answer, answer)}
    tokens = [tokenizer(blank + form)["input_ids"] for form in spelled for blank in ("", " ")]
    return {ids[0] for ids in tokens if len(ids) == 1}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 320)])
@pytest.mark.parametrize(("mode", "ids"), [("default", _whole_words), ("official", _published_ids)])
def test_score_is_the_generated_one(tiny_geneval2, height, width, mode, ids):
    images = _images(3, height, width)
    reward = _load(tiny_geneval2, mode=mode)
    assert reward.name == "geneval2" and reward.differentiable
    scores = _score(reward, images)
    expected = [
        _generated_score(tiny_geneval2, image, row, ids) for image, row in zip(images, ROWS, strict=True)
    ]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=0, rtol=1e-4)
    assert scores.std() > 1e-4


def test_modes_differ_where_a_blank_is_a_token(tiny_geneval2):
    """ " 3" is a blank and a 3 here, as in Qwen's vocabulary; so the published rule counts the blank."""
    tokenizer = qwen_vl_tokenizer()
    blank = tokenizer(" ")["input_ids"][0]
    assert tokenizer(" 3")["input_ids"][0] == blank
    question = Question("How many birds are in the image?", "three")
    ids = {
        mode: _load(tiny_geneval2, mode=mode)._answer_ids("", question) for mode in ("default", "official")
    }
    assert blank in ids["official"] and blank not in ids["default"]
    assert len(ids["official"]) == 6


def test_gradient_is_the_finite_difference(tiny_geneval2):
    """In float64 without roundings; Qwen3-VL computes its norms and angles in float32 all the same."""
    reward = _load(tiny_geneval2, torch.float64)
    reward.quantise = False
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(1, 3, 40, 32, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_score(reward, leaf).sum(), leaf)
    for _ in range(2):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 3e-4 * (noise + gradient / gradient.std())
        ahead, behind = (_score(reward, images + sign * step).sum().detach() for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-2, atol=0)


def test_each_picture_is_read_once_and_again_in_the_backward_pass(tiny_geneval2):
    reward = _load(tiny_geneval2)
    rows = {"Qwen3VLVisionBlock": [], "Qwen3VLTextDecoderLayer": []}
    for module in reward.model.modules():
        if type(module).__name__ in rows:
            calls = rows[type(module).__name__]
            module.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(len(inputs[0])))
    scores = _score(reward, _images(3).requires_grad_())
    # 64 pixels become 256, which are 256 patches; three pictures, six questions.
    assert rows == {"Qwen3VLVisionBlock": [3 * 256] * 3, "Qwen3VLTextDecoderLayer": [3] * 3}
    scores.sum().backward()
    assert rows == {"Qwen3VLVisionBlock": [3 * 256] * 6, "Qwen3VLTextDecoderLayer": [3] * 6}
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_chunks_company_and_bfloat16(tiny_geneval2):
    images = _images(3)
    reward = _load(tiny_geneval2)
    whole = _score(reward, images)
    reward.chunk_size = 2
    torch.testing.assert_close(_score(reward, images), whole)
    alone = [_score(reward, images[i : i + 1], ROWS[i:]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), whole)
    scores = _score(_load(tiny_geneval2, torch.bfloat16), images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, whole, atol=0, rtol=0.2)


@pytest.mark.parametrize(
    ("question", "default", "official"),
    [
        (
            Question("How many cows are in the image?", "four"),
            ["four", " four", "Four", " Four", "4", " 4"],
            ["four", "Four", " four", " Four", "4", " 4"],
        ),
        (
            Question("How many cows are in the image?", "zero"),
            ["zero", " zero", "Zero", " Zero", "0", " 0"],
            ["zero", "Zero", " zero", " Zero", "other", " other"],
        ),
        (
            Question("Are the cows red?", "Yes"),
            ["Yes", " Yes", "yes", " yes"],
            ["Yes", "yes", " yes", " Yes"],
        ),
        (Question("Are the cows red?", "No"), ["No", " No", "no", " no"], ["Yes", "yes", " yes", " Yes"]),
    ],
)
def test_spellings_of_an_answer(question, default, official):
    assert question.answer_forms("default") == default
    assert question.answer_forms("official") == official


def test_rows_of_the_benchmark():
    """As geneval2_data.jsonl has them."""
    row = json.loads(json.dumps(ROWS[0]))
    assert questions("two red circles", row) == [Question(*pair) for pair in ROWS[0]["vqa_list"]]
    assert questions("x", row)[1].instruction == "Are the circles red? Answer in one word."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"'a cat': geneval2 needs the metadata 'vqa_list', which this prompt hasn't"),
        ({"vqa_list": []}, r"'vqa_list' must list one \[question, answer\] at least, got \[\]"),
        ({"vqa_list": "Yes"}, "must list one .* got 'Yes'"),
        ({"vqa_list": [["Is it?"]]}, r"must hold \[question, answer\] in words, got \['Is it\?'\]"),
        ({"vqa_list": [["How many?", 2]]}, r"must hold .* got \['How many\?', 2\]"),
        ({"vqa_list": [["Is it?", " "]]}, "must hold"),
    ],
)
def test_metadata_that_are_missing_or_not_understood(tiny_geneval2, row, message):
    with pytest.raises(UserError, match=message):
        REWARDS["geneval2"].check_prompt("a cat", row)
    reward = _load(tiny_geneval2)
    reward.model = None  # nothing is computed
    with pytest.raises(UserError, match=message):
        reward.score(_images(2), ["two red circles", "a cat"], [ROWS[0], row])


def test_an_answer_that_is_no_token_is_refused(tiny_geneval2):
    row = {"prompt": "x", "vqa_list": [["What is it?", "antidisestablishmentarianism"]]}
    with pytest.raises(
        UserError, match=r"'x': geneval2 cannot judge the answer 'antidis.*' to 'What is it\?'"
    ):
        _score(_load(tiny_geneval2), _images(1), [row])


def test_unfit_files_are_refused(tiny_geneval2, tmp_path):
    folder = shutil.copytree(tiny_geneval2, tmp_path / "geneval2")
    weights = load_file(folder / "model.safetensors")
    del weights["model.visual.merger.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 weights of Qwen3-VL are not in it, such as .*visual\.merger\.norm"
    ):
        _load(folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="no Qwen3-VL weights"):
        _load(folder)
    shutil.copy(tiny_geneval2 / "model.safetensors", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no tokenizer of this model: it has no"):
        _load(folder)
    with pytest.raises(
        UserError, match=r"no Qwen3-VL weights.*hf download Qwen/Qwen3-VL-8B-Instruct model\."
    ):
        load_rewards([RewardSection("geneval2")], CPU, torch.float32)


def test_pictures_of_a_wrong_range_are_refused(tiny_geneval2):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got values from"):
        _score(_load(tiny_geneval2), _images(1) - 0.5)


def test_a_score_that_is_not_finite_is_handed_on(tiny_geneval2):
    reward = _load(tiny_geneval2)
    with torch.no_grad():
        reward.model.lm_head.weight.fill_(float("nan"))
    assert _score(reward, _images(1)).isnan().all()
