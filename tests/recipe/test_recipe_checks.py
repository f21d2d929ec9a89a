"""Cross-checks: ranges, arithmetic, names, files; each message names key and value and what to write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from rtdmd.errors import UserError
from rtdmd.recipe import check_recipe, load_recipe
from rtdmd.recipe.checks_arithmetic import FAMILY_SIGMAS, groups_fit

Write = Callable[..., Path]
BOTH = ("cold_start", "rtdmd")
ROLES = ("teacher", "generator", "fake_score")


def check(path: Path, *overrides: str, world_size: int = 4, stages: Sequence[str] = BOTH) -> None:
    """Load and check; 4 ranks suit the small recipe (sample batch 6, K = 24)."""
    check_recipe(load_recipe(path, overrides), "small.yaml", world_size=world_size, stages=stages)


def faults(path: Path, *overrides: str, world_size: int = 4, stages: Sequence[str] = BOTH) -> list[str]:
    """The lines of the error's list, without its heading."""
    with pytest.raises(UserError) as caught:
        check(path, *overrides, world_size=world_size, stages=stages)
    heading, *lines = str(caught.value).splitlines()
    assert f"small.yaml has {len(lines)} fault" in heading
    assert all(line.startswith("  small.yaml: ") for line in lines)
    return [line.removeprefix("  small.yaml: ") for line in lines]


def the_fault(path: Path, *overrides: str, world_size: int = 4, stages: Sequence[str] = BOTH) -> str:
    (line,) = faults(path, *overrides, world_size=world_size, stages=stages)
    return line


def test_a_sound_recipe_passes(write_recipe: Write) -> None:
    check(write_recipe())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=a/b", "name = 'a/b': write a folder name"),
        ("name=..", "write a folder name"),
        ("model.height=500", "model.height = 500: write a multiple of 16, such as 496 or 512"),
        ("model.width=0", "write a multiple of 16, such as 16 or 32"),
        ("model.guidance_scale=0.5", "model.guidance_scale = 0.5: write 1 (no guidance) or more"),
        ("model.max_sequence_length=0", "write at least 1"),
        ("lora.rank=0", "write at least 1"),
        ("lora.alpha=-1", "write a number above 0"),
        ("lora.targets=[]", "write at least one suffix"),
        ("lora.init_std.rtdmd=0", "write a number above 0"),
        (
            "schedule.timesteps=[900,500,250]",
            "schedule.timesteps = [900, 500, 250]: write strictly decreasing",
        ),
        ("schedule.timesteps=[1000,500,500]", "write strictly decreasing"),
        ("schedule.timesteps=[1000,500,0]", "write strictly decreasing"),
        ("schedule.eta=1.5", "write a number in [0, 1]"),
        ("rtdmd.generator.cooldown=1.5", "write a share of the stage's steps in [0, 1]"),
        ("schedule.shift=0", "write a number above 0"),
        ("cold_start.iterations=0", "write at least 1"),
        ("cold_start.batch_size=0", "write at least 1"),
        ("cold_start.ema_decay=1", "write a number in [0, 1)"),
        ("cold_start.consistency_weight=-0.1", "write 0 or more"),
        ("cold_start.consistency_max_timesteps=1001", "at most 1000"),
        ("cold_start.timestep_range=[980,20]", "write two timesteps in ascending order"),
        ("cold_start.timestep_range=[20]", "write two timesteps in ascending order"),
        (
            "cold_start.generator.learning_rate=0",
            "cold_start.generator.learning_rate = 0: write a number above 0",
        ),
        ("cold_start.fake_score.betas=[0.9]", "write two numbers in [0, 1)"),
        ("rtdmd.generator.betas=[0.9,1]", "rtdmd.generator.betas = [0.9, 1]: write two numbers"),
        ("rtdmd.fake_score.max_grad_norm=0", "write a number above 0"),
        ("rtdmd.generator.weight_decay=-1", "write 0 or more"),
        ("rtdmd.clip_range=0", "write a number above 0"),
        ("rtdmd.checkpoint_every=0", "write at least 1"),
        ("rtdmd.reward_backprop.micro_batch_size=0", "write at least 1"),
        ("rtdmd.min_interval_timesteps=0", "write a number above 0"),
        ("seed=-1", "write 0 or more"),
        ("timeout_seconds=0", "write a number above 0"),
        ("keep_checkpoints=0", "write at least 1"),
        ("preview.prompts=[' ']", "remove the empty prompts"),
        ("tracking.wandb_project=''", "write the project's name, or null"),
        ("stages=[]", "stages = []: write one or more of cold_start, rtdmd"),
        ("stages=[rtdmd,cold_start]", "each once, in this order"),
        ("stages=[rtdmd,rtdmd]", "each once, in this order"),
    ],
)
def test_ranges(write_recipe: Write, override: str, words: str) -> None:
    line = the_fault(write_recipe(), override)
    assert words in line
    assert line.startswith(override.partition("=")[0])


def test_the_documented_example_is_sound(write_recipe: Write) -> None:
    text = Path("docs/rewards_in_training.md").read_text(encoding="utf-8")
    example = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    overrides = [
        f"{key}={json.dumps(example[key])}" for key in ("rewards", "monitor_rewards", "reward_workers")
    ]
    overrides += [f"rtdmd.{key}={json.dumps(value)}" for key, value in example["rtdmd"].items()]
    check(write_recipe(), *overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.family=flux3", "unknown model family; did you mean 'flux2'?"),
        ("rewards.0.name=clipscor", "rewards.0.name = 'clipscor': unknown reward; did you mean 'clipscore'?"),
        ("rewards=[{name: clipscore},{name: clipscore}]", "also rewards.0; keep one"),
        ("rewards.0.weight=-1", "write 0 (only logged) or more"),
        (
            "rtdmd.stop_when=[{metric: reward/clipscor, drop: 0.1}]",
            "rtdmd.stop_when.0.metric = 'reward/clipscor': not logged; did you mean 'reward/clipscore'?",
        ),
        ("rtdmd.stop_when=[{metric: monitor/pickscore, drop: 0.1}]", "not logged"),
        ("rtdmd.stop_when=[{metric: image/diversity, drop: -1}]", "write 0 or more"),
        ("rtdmd.stop_when=[{metric: image/diversity, drop: 0, patience: -1}]", "write 0 or more epochs"),
        ("rtdmd.stop_when=[{metric: image/diversity, drop: 0, window: 0}]", "write at least 1"),
        ("monitor_rewards=[{name: clipscore}]", "also rewards.0; it is logged already"),
        ("monitor_rewards=[{name: pickscor}]", "monitor_rewards.0.name = 'pickscor': unknown reward"),
        ("monitor_rewards=[{name: pickscore, weight: 2}]", "never trained on; leave weight and clip out"),
        ("monitor_rewards=[{name: compressibility, weights: a/b}]", "monitor_rewards.0.weights = 'a/b'"),
        ("rtdmd.monitor_every=0", "write at least 1"),
        ("rewards.0.url=127.0.0.1:8123", "write http://HOST:PORT"),
        ("rewards.0.url=http://user:word@host:1", "write http://HOST:PORT"),
        ("rewards=[{name: clipscore, url: 'http://h:1', retries: -1}]", "write 0 or more"),
        ("rewards=[{name: clipscore, url: 'http://h:1', timeout_seconds: 0}]", "write a number above 0"),
        ("rewards=[{name: clipscore, url: 'http://h:1', token_file: /nowhere}]", "cannot be read"),
        (
            "rewards=[{name: clipscore, url: 'http://h:1', timeout_seconds: 600, retries: 2}]",
            "a request may take 1800 s, and the run is taken for stuck after timeout_seconds = 1800",
        ),
        ("rewards.0.token_file=/nowhere", "goes with a url; leave it out"),
        ("rewards.0.url=http://127.0.0.1:8123", "no reward that is trained on has a gradient"),
        ("reward_workers=-1", "write 0 or more"),
        ("rewards.0.clip=[1]", "rewards.0.clip = [1]: write [low, high]"),
        ("rewards.0.clip=[1,1]", "write [low, high] with low < high"),
        ("rtdmd.reward_backprop.statistics_decay=1", "write a number in [0, 1)"),
        ("rewards.0.weight=0", "at least one reward with a weight above 0"),
        (
            "rewards=[{name: clipscore, weight: 0}, {name: compressibility}]",
            "no reward that is trained on has a gradient",
        ),
        ("rtdmd.reward_backprop.rewards=[pickscore]", "not among the recipe's rewards"),
        ("rtdmd.reward_backprop.rewards=[clipscore,clipscore]", "named twice"),
        ("rtdmd.reward_backprop.rewards=[]", "choose from ['clipscore'], or set that weight to 0"),
        ("rewards=[{name: compressibility}]", "no reward that is trained on has a gradient"),
        ("rewards=[{name: clipscore},{name: compressibility, weights: a/b}]", "has no weights"),
        (
            "rewards=[{name: clipscore},{name: compressibility, mode: official}]",
            "rewards.1.mode = 'official': compressibility has no such mode",
        ),
    ],
)
def test_families_and_rewards(write_recipe: Write, override: str, words: str) -> None:
    assert any(words in line for line in faults(write_recipe(), override))


def test_a_reward_without_gradient_cannot_be_back_propagated(write_recipe: Write) -> None:
    rewards = "rewards=[{name: clipscore},{name: compressibility}]"
    line = the_fault(write_recipe(), rewards, "rtdmd.reward_backprop.rewards=[compressibility]")
    assert "rtdmd.reward_backprop.rewards.0 = 'compressibility': this reward has no gradient" in line
    check(write_recipe(), "rewards=[{name: compressibility}]", "rtdmd.reward_backprop.weight=0")
    remote = "rewards=[{name: clipscore},{name: pickscore, url: 'http://127.0.0.1:8123', weights: a/b}]"
    line = the_fault(write_recipe(), remote, "rtdmd.reward_backprop.rewards=[pickscore]")
    assert "a reward at a url has no gradient; choose from ['clipscore']" in line
    logged = "rewards=[{name: clipscore, weight: 0},{name: pickscore, weights: a/b}]"
    line = the_fault(write_recipe(), logged, "rtdmd.reward_backprop.rewards=[clipscore]")
    assert "its weight is 0, so that it is only logged; choose from ['pickscore']" in line
    check(write_recipe(), remote)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cold_start.micro_batch_size=4", "does not divide batch_size = 9; write 3 or 9"),
        ("cold_start.micro_batch_size=0", "does not divide batch_size = 9; write 1, or null"),
        ("rtdmd.micro_batch_size=4", "does not divide sample_batch_size = 6; write 3 or 6"),
        ("rtdmd.fake_score_micro_batch_size=12", "does not divide sample_batch_size = 6; write 6"),
        ("rtdmd.num_policy_steps=4", "only the first 3 of 4 steps are stochastic; write 1 to 3"),
        ("rtdmd.num_policy_steps=0", "write 1 to 3"),
        ("schedule.timesteps=[1000]", "write at least two timesteps"),
        ("rtdmd.images_per_prompt=1", "write 2 or more"),
    ],
)
def test_steps_and_micro_batches(write_recipe: Write, override: str, words: str) -> None:
    assert words in the_fault(write_recipe(), override)


def test_groups_that_do_not_fit_propose_numbers_that_do(write_recipe: Write) -> None:
    """7 ranks x 6 = 42 samples, and K = 24 does not divide 42; 21 does, and it divides 7 x 24 = 168."""
    line = the_fault(write_recipe(), world_size=7)
    assert "sample_batch_size 6 x 7 ranks = 42 samples" in line
    assert "sample_batch_size 3 or 24;" in line and "images_per_prompt 21 or 42;" in line
    assert "1-4, 8, 12, 16, 20," in line and ", 64 ranks" in line
    assert "num_sample_batches" not in line.partition("these work")[2]  # cannot help: 42 > 24
    recipe = write_recipe()
    check(recipe, "rtdmd.sample_batch_size=24", world_size=7)
    check(recipe, "rtdmd.images_per_prompt=21", world_size=7)


def test_a_group_over_several_sampling_batches(write_recipe: Write) -> None:
    """5 samples x 1 rank < K = 24: the epoch of 16 batches has 80 samples; 24 batches have 5 groups."""
    batch = "rtdmd.sample_batch_size=5"
    line = the_fault(write_recipe(), batch, world_size=1)
    assert "= 5 samples, x num_sample_batches 16 = 80, not a multiple" in line
    assert "num_sample_batches 24;" in line
    check(write_recipe(), batch, "rtdmd.num_sample_batches=24", world_size=1)


@pytest.mark.parametrize("world_size", range(1, 30))
def test_groups_fit_where_the_sampler_agrees(write_recipe: Write, world_size: int) -> None:
    from rtdmd.prompts import GroupSampler

    section = load_recipe(write_recipe()).rtdmd
    try:
        GroupSampler(
            1000,
            section.images_per_prompt,
            section.sample_batch_size,
            section.num_sample_batches,
            world_size,
            seed=0,
        )
        sampler_agrees = True
    except ValueError:
        sampler_agrees = False
    assert groups_fit(section, world_size) == sampler_agrees


def test_no_room_between_the_noisiest_stop_and_the_end(write_recipe: Write) -> None:
    """FLUX.2 at 512 px: the second sigma is 0.9581 (DESIGN's table), so 968 < 980 but 958 + 25 > 980."""
    check(write_recipe(), "cold_start.min_interval_timesteps=21")
    line = the_fault(write_recipe(), "cold_start.min_interval_timesteps=25")
    assert "states at sigma 0.9581 are matched" in line and "write at most 21, " in line
    check(write_recipe(), "cold_start.min_interval_timesteps=25", "cold_start.sub_interval=false")
    # SD3: 3·0.75/(1 + 2·0.75) = 0.9; a shift of 1 leaves 0.75.
    sd3 = ("model.family=sd3", "cold_start.timestep_range=[20, 800]")
    assert "sigma 0.9000" in the_fault(write_recipe(), *sd3)
    check(write_recipe(), *sd3, "schedule.shift=1")
    assert "rtdmd.min_interval" in the_fault(write_recipe(), "rtdmd.min_interval_timesteps=990")
    check(write_recipe(), "rtdmd.min_interval_timesteps=25")
    everywhere = ("rtdmd.matched_steps=trained", "rtdmd.min_interval_timesteps=25")
    assert "sigma 0.9581" in the_fault(write_recipe(), *everywhere)


def test_only_the_stages_to_run_need_their_ranks_prompts_and_rewards(write_recipe: Write) -> None:
    path = write_recipe()
    overrides = ("rewards=[]", "rtdmd.prompts.source=missing.txt")
    assert len(faults(path, *overrides, world_size=7)) >= 3
    check(path, *overrides, world_size=7, stages=["cold_start"])
    assert "--world-size = 0" in the_fault(path, world_size=0)
    assert "--stage = ['rtdm']" in the_fault(path, stages=["rtdm"])


def test_prompts(write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n")
    assert "cold_start.prompts" in the_fault(write_recipe(), f"cold_start.prompts.source={tmp_path}/no.txt")
    assert "rtdmd.prompts" in the_fault(write_recipe(), f"rtdmd.prompts.source={tmp_path}/none.txt")
    assert "rtdmd.prompts.limit" in the_fault(write_recipe(), "rtdmd.prompts.limit=0")


def test_prompts_that_a_reward_cannot_score(write_recipe: Write, tmp_path: Path) -> None:
    """Told before anything loads, with the number of such prompts and what is wrong with the first."""
    rows = [
        {"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]},
        {"prompt": "a cat", "tag": "single_object"},
        {"prompt": "a cow"},
        {"prompt": 'a sign that says "OPEN"'},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, rewards = f"rtdmd.prompts.source={source}", "rewards=[{name: clipscore},{name: %s}]"
    line = the_fault(write_recipe(), prompts, rewards % "geneval")
    assert f"rtdmd.prompts.source = '{source}': rewards.1 (geneval) cannot use 3 of 4 prompts" in line
    assert "'a cat'" in line and "'include'" in line
    line = the_fault(write_recipe(), prompts, rewards % "ocr, mode: official")
    assert "rewards.1 (ocr) cannot use 3 of 4 prompts: prompt 'a dog'" in line
    check(write_recipe(), prompts)
    check(write_recipe(), prompts, rewards % "geneval", "rtdmd.prompts.limit=1")
    assert "monitor_rewards.0 (ocr) cannot use 3 of 4" in the_fault(
        write_recipe(), prompts, "monitor_rewards=[{name: ocr}]"
    )
    # The cold start scores nothing, and a hub's prompts are not looked up.
    check(write_recipe(), rewards % "geneval", f"cold_start.prompts.source={source}")
    check(write_recipe(), prompts, rewards % "geneval", stages=["cold_start"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("./here", "there is no such folder"),
        ("/no/such", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("recipes/flux9", "there is no such folder"),
        ("adapter.safetensors", "there is no such folder"),
        ("build/tiny/flux9", "python -m rtdmd.models.tiny build/tiny"),
        ("ds_configs", "holds no model_index.json"),
        ("recipes/sd3m.yaml", "this is a file"),
        ("single", "neither an existing folder nor a hub id"),
        ("own er/name", "neither an existing folder nor a hub id"),
        ("owner/na..me", "neither an existing folder nor a hub id"),
    ],
)
def test_model_paths(write_recipe: Write, value: str, words: str) -> None:
    for key in ("model.pipeline", "roles.fake_score.weights"):
        assert f"{key} = '{value}': " in the_fault(write_recipe(), f"{key}={value}")
        assert words in the_fault(write_recipe(), f"{key}={value}")


def test_reward_weights(write_recipe: Write, tmp_path: Path) -> None:
    assert "no such folder" in the_fault(write_recipe(), "rewards.0.weights=build/nowhere/clip")
    check(write_recipe(), f"rewards.0.weights={tmp_path}")


@pytest.mark.parametrize("key", ["rtdmd.start_generator", "rtdmd.start_fake_score"])
def test_files_to_start_from(write_recipe: Write, tmp_path: Path, key: str) -> None:
    assert "this file is not there" in the_fault(write_recipe(), f"{key}=runs/nowhere/generator_ema.pt")
    assert "this file is a folder" in the_fault(write_recipe(), f"{key}={tmp_path}")
    file = tmp_path / "generator_ema.pt"
    file.write_bytes(b"no weights")
    assert f"{key} = '{file}': not a readable weights file" in the_fault(write_recipe(), f"{key}={file}")
    name = "transformer_blocks.0.attn.to_q"
    torch.save({f"{name}.lora_A.weight": torch.ones(8, 4), f"{name}.lora_B.weight": torch.ones(4, 8)}, file)
    check(write_recipe(), f"{key}={file}", "lora.rank=8")
    assert f"{key} = '{file}': its rank is 8" in the_fault(write_recipe(), f"{key}={file}", "lora.rank=4")
    torch.save({f"{name}.weight": torch.ones(4, 4)}, file)  # of a run that trained full weights
    check(write_recipe(), f"{key}={file}")
    check(write_recipe(), f"{key}=nowhere.pt", stages=["cold_start"])


def test_output(write_recipe: Write, tmp_path: Path) -> None:
    path = write_recipe()
    check(path, f"output={tmp_path}/new/folder")
    assert not (tmp_path / "new").exists()  # checking leaves nothing behind
    assert f"{path} is not a folder" in the_fault(path, f"output={path}/below")
    (tmp_path / "small").write_text("")
    assert "small is not a folder" in the_fault(path, f"output={tmp_path}")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "dangling is not a folder" in the_fault(path, f"output={tmp_path}/dangling")


ZERO3 = {"zero_optimization": {"stage": 3}}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("role", "content", "words"),
    [
        ("generator", None, "there is no such file"),
        ("generator", '{\n "zero_optimization": {,}}', "line 2 is not valid JSON"),
        ("generator", '{"a": 1, "a": 2}', "'a' is written twice"),
        ("generator", "[]", "holds no JSON object"),
        ("generator", b"\xff\xfe", "is not UTF-8"),
        ("generator", {}, 'add "zero_optimization": {"stage": 3}'),
        ("generator", {"zero_optimisation": {"stage": 3}}, "'zero_optimisation' is not that"),
        (
            "generator",
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage is 4; write 0, 1, 2 or 3",
        ),
        ("generator", {"zero_optimization": {"stage": True}}, "write 0, 1, 2 or 3"),
        ("generator", {"zero_optimization": {"stage": "3"}}, "write 0, 1, 2 or 3"),
        (
            "generator",
            {**ZERO3, "bf16": {"enabled": True}},
            "sets 'bf16', which follows from the recipe's dtype",
        ),
        ("fake_score", {**ZERO3, "train_batch_size": 8}, "sets 'train_batch_size'"),
        ("teacher", {**ZERO3, "gradient_clipping": 1.0}, "sets 'gradient_clipping'"),
        ("teacher", {"zero_optimization": {"stage": 2}}, "a frozen network has none; use stage 3 or 0"),
        ("generator", OFFLOAD, '"zero_force_ds_cpu_optimizer": false'),
        (
            "generator",
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs ZeRO stage 3",
        ),
        ("fake_score", {"zero_optimization": {"stage": 0}}, "keeps no float32 masters of bfloat16 weights"),
    ],
)
def test_engine_files(
    write_recipe: Write, tmp_path: Path, role: str, content: str | bytes | dict | None, words: str
) -> None:
    path = tmp_path / "engine.json"
    if content is not None:
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = the_fault(write_recipe(), f"roles.{role}.engine={path}")
    assert f"roles.{role}.engine = '{path}': " in line
    assert words in line


def test_a_shared_engine_file_is_reported_once(write_recipe: Write, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({**ZERO3, "amp": {}}))
    roles = [f"roles.{role}.engine={path}" for role in ROLES]
    assert "roles.teacher.engine" in the_fault(write_recipe(), *roles)


def test_text_encoders_that_are_freed_evaluate_nothing(write_recipe: Write) -> None:
    lines = faults(write_recipe(), "model.text_encoder=once", "evaluation.every=5")
    assert any("model.text_encoder" in line and "write offload, or 0 there" in line for line in lines)


def test_compiled_blocks_are_not_for_zero_3(write_recipe: Write) -> None:
    recipe = write_recipe()
    line = the_fault(recipe, "roles.generator.engine=ds_configs/zero3.json", "roles.generator.compile=blocks")
    assert "roles.generator.compile" in line and "use ZeRO 0 to 2" in line


SHARED = (
    "roles.engines=shared_base",
    *(f"roles.{role}.engine=ds_configs/zero0.json" for role in ROLES),
)


def test_a_shared_base_may_be_replicated_or_in_shards(write_recipe: Write) -> None:
    check(write_recipe(), *SHARED)
    zero3 = [item.replace("zero0", "frozen_zero3") for item in SHARED]
    check(write_recipe(), *zero3)
    for placed in (SHARED, zero3):
        check(write_recipe(), *placed, *(f"roles.{role}.compile=blocks" for role in ROLES))
    whole = faults(write_recipe(), *zero3, *(f"roles.{role}.compile=network" for role in ROLES))
    assert any("gathers a shared base block by block; write blocks" in line for line in whole)
    # A generator with weights of its own has a base of its own, placed and compiled as its section says.
    own = ("roles.generator.weights=owner/klein", "roles.generator.compile=blocks")
    check(write_recipe(), *zero3, *own, "roles.generator.engine=ds_configs/zero0.json")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "roles.fake_score.trains=full",
            "roles.fake_score.trains = 'full': a shared base stays as it is; write lora, or add with=",
        ),
        (
            "roles.generator.engine=ds_configs/frozen_zero3.json",
            "roles.generator.engine = 'ds_configs/frozen_zero3.json': roles.teacher.engine is "
            "ds_configs/zero0.json, but generator and teacher share the base owner/pipeline; write "
            "ds_configs/zero0.json",
        ),
        (
            "roles.fake_score.compile=blocks",
            "roles.teacher.compile is none, but fake_score and teacher share",
        ),
    ],
)
def test_what_roles_on_a_shared_base_must_agree_on(write_recipe: Write, override: str, words: str) -> None:
    assert words in the_fault(write_recipe(), *SHARED, override)


def test_engines_that_a_shared_base_cannot_have(write_recipe: Write, tmp_path: Path) -> None:
    def of_all(name: str) -> list[str]:
        return faults(write_recipe(), *(item.replace("zero0", name) for item in SHARED))

    assert all("a shared base has none; use stage 3 or 0, or add with=" in line for line in of_all("zero2"))
    assert all("offload_optimizer has nothing to offload" in line for line in of_all("zero3_offload"))
    check(write_recipe(), *(item.replace("zero0", "frozen_zero3_offload") for item in SHARED))
    content = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(content))
    lines = faults(write_recipe(), *(item.replace("ds_configs/zero0.json", str(file)) for item in SHARED))
    assert any('offload_param.device is "nvme": a shared base waits on the GPU' in line for line in lines)
    with pytest.raises(UserError, match=r"one of separate, shared_base, .*did you mean 'shared_base'"):
        check(write_recipe(), "roles.engines=shared-base")


def test_copies_are_of_shards_on_the_gpu(write_recipe: Write) -> None:
    def line(engine: str) -> str:
        placed = (item.replace("zero0", engine) for item in SHARED)
        return the_fault(write_recipe(), *placed, "roles.gather=copies")

    check(write_recipe(), *(item.replace("zero0", "frozen_zero3") for item in SHARED), "roles.gather=copies")
    assert "no engine has ZeRO 3" in line("zero0")
    assert "ds_configs/frozen_zero3_offload.json has the shards in host memory; write coll" in line(
        "frozen_zero3_offload"
    )
    assert "write roles.engines: shared_base, too" in the_fault(write_recipe(), "roles.gather=copies")


def test_whole_blocks_are_of_shards(write_recipe: Write) -> None:
    placed = [item.replace("zero0", "frozen_zero3") for item in SHARED]
    for count in ("0", "12", "null"):
        check(write_recipe(), *placed, f"roles.whole_blocks={count}")
    assert "write 0 or more" in the_fault(write_recipe(), *placed, "roles.whole_blocks=-1")
    assert "no engine has ZeRO 3" in the_fault(write_recipe(), *SHARED, "roles.whole_blocks=2")
    assert "or leave it out" in the_fault(write_recipe(), "roles.whole_blocks=2")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, "zero_hpz_partition_size is 3, which doesn't divide the 4 ranks; write 1 or 2 or 4"),
        (0, "zero_hpz_partition_size is 0; write the GPUs of a machine"),
        ("2", 'zero_hpz_partition_size is "2"; write'),
    ],
)
def test_parts_of_the_ranks_are_equal(write_recipe: Write, tmp_path: Path, size: object, words: str) -> None:
    path = tmp_path / "engine.json"
    placed = [item.replace("ds_configs/zero0.json", str(path)) for item in SHARED]
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    check(write_recipe(), *placed, world_size=4)
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}))
    lines = faults(write_recipe(), *placed, world_size=4)
    assert len(lines) == 1 and words in lines[0]


def test_a_misspelt_engine_file_gets_the_nearest(write_recipe: Write) -> None:
    line = the_fault(write_recipe(), "roles.generator.engine=ds_configs/zero_3.json")
    assert "did you mean 'ds_configs/zero3.json'?" in line


def test_five_faults_are_five_lines(write_recipe: Write) -> None:
    lines = faults(
        write_recipe(),
        "model.height=500",
        "cold_start.micro_batch_size=4",
        "rewards.0.name=clip",
        "roles.teacher.engine=nowhere.json",
        "model.pipeline=./nowhere",
        "rtdmd.reward_backprop.weight=0",
    )
    assert len(lines) == 5


def test_every_registered_family_has_its_schedule_here(tiny_flux2: Path, tiny_sd3: Path) -> None:
    import torch

    from rtdmd.models import FAMILIES, get_family

    assert set(FAMILIES) == set(FAMILY_SIGMAS)
    for name, folder in (("flux2", tiny_flux2), ("sd3", tiny_sd3)):
        family = get_family(name).load(str(folder), device=torch.device("cpu"), dtype=torch.float32)
        _, rows, columns = family.latent_shape(64, 64)
        expected = family.sigmas([1000, 750, 500, 250], 64, 64)
        assert FAMILY_SIGMAS[name]([1, 0.75, 0.5, 0.25], rows * columns) == pytest.approx(expected)
