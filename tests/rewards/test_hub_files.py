"""The files that ``rtdmd rewards`` tells one to fetch are enough, without a network and without others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import REWARDS, load_rewards
from rtdmd.rewards.clip import load_tokenizer
from rtdmd.rewards.listing import fetch_commands
from rtdmd.rewards.qwen_vl import load_qwen_tokenizer

CPU = torch.device("cpu")
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def _fetch(cache: Path, repo: str, files: tuple[str, ...], source: Path) -> None:
    """What ``hf download repo files`` leaves behind, from a folder with a small model."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shards = [name for name in files if "-of-" in name]
    if shards:
        _write_shards(snapshot, source, shards)
    for name in set(files) - set(shards) - {"model.safetensors.index.json"}:
        if (source / name).is_file():
            shutil.copy(source / name, snapshot)
        else:  # transformers 5 writes a processor's parts into one file
            settings = json.loads((source / "processor_config.json").read_text())
            (snapshot / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    assert {path.name for path in snapshot.iterdir()} >= set(files)


def _write_shards(snapshot: Path, source: Path, shards: list[str]) -> None:
    state = load_file(source / "model.safetensors")
    places = {name: shards[index % len(shards)] for index, name in enumerate(state)}
    for shard in shards:
        part = {name: tensor for name, tensor in state.items() if places[name] == shard}
        save_file(part, snapshot / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "aesthetic", "geneval", "geneval2"])
def test_a_scorer_loads_from_what_was_fetched(cache, tiny_weights, tiny_clip, name):
    spec = REWARDS[name]
    assert len(fetch_commands(spec)) == len(spec.needs_files)
    for place, needed in enumerate(spec.needs_files):
        _fetch(cache, needed.repo, needed.files, tiny_weights[name] if place == 0 else tiny_clip)
    assert fetch_commands(spec) == []
    (reward,) = load_rewards([RewardSection(name)], CPU, torch.float32)
    assert reward.name == name


def test_tokenizers_of_scorers_whose_size_is_fixed(cache, tiny_clip, tiny_hpsv3):
    """hpsv2, imagereward and hpsv3 describe their networks themselves: too large for here."""
    clip, qwen = REWARDS["hpsv2"].needs_files[1], REWARDS["hpsv3"].needs_files[1]
    _fetch(cache, clip.repo, clip.files, tiny_clip)
    _fetch(cache, qwen.repo, qwen.files, tiny_hpsv3)
    config = json.loads((tiny_clip / "config.json").read_text())
    load_tokenizer(clip.repo, None, config["text_config"]["vocab_size"])
    image_token = json.loads((tiny_hpsv3 / "config.json").read_text())["image_token_id"]
    assert len(load_qwen_tokenizer(qwen.repo, image_token)("<|image_pad|>")["input_ids"]) == 1
