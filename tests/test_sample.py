"""``rtdmd sample``, and the same pictures from stock diffusers with the files that training writes."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rtdmd import __version__
from rtdmd.cli import main
from rtdmd.recipe import dump_recipe, load_recipe
from rtdmd.sample import SampleOptions, build_painter, pick_device, run_files, schedule_notice
from tests.lora_files import open_pipeline, write_stage
from tests.small_runs import PROMPTS, TEXT_TOKENS, World, difference, run_plain, save_noise

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


def test_pictures_depend_neither_on_the_batch_nor_on_the_number_of_processes(
    world: World, tmp_path: Path
) -> None:
    alone = world.sample(tmp_path / "1", "--batch-size", "1")
    assert difference(world.sample(tmp_path / "7", "--batch-size", "7"), alone) <= 1
    assert difference(world.sample(tmp_path / "3", "--batch-size", "3"), alone) <= 1
    assert difference(world.sample(tmp_path / "two", "--gpus", "2", "--device", "cpu", "--grid"), alone) <= 1
    names = [sorted(path.name for path in (tmp_path / run).glob("0*")) for run in ("1", "two")]
    assert names[0] == names[1]
    grid = np.asarray(Image.open(tmp_path / "two" / "grid.png")).astype(int)
    assert np.abs(grid[64:128, 128:192] - alone[5]).max() <= 1
    assert difference(alone[:1] * 6, alone[1:]) > 20
    assert difference(world.sample(tmp_path / "seed", "--seed", "1"), alone) > 20


def test_stacking_is_merging(world: World, tmp_path: Path) -> None:
    """Given files, the run's own, all merged beforehand, and weights merged by the definition."""
    stacked = world.sample(tmp_path / "stacked", "--lora", *world.files)
    assert difference(world.sample(tmp_path / "merged", "--lora", *world.files, "--merge"), stacked) <= 1
    assert difference(world.sample(tmp_path / "run", "--run", str(world.run)), stacked) <= 1
    pipe = open_pipeline(world.pipeline)
    pipe.transformer = world.network(*world.states)
    pipe.save_pretrained(tmp_path / "pipeline")
    base = world.sample(tmp_path / "base", f"roles.generator.weights={tmp_path / 'pipeline'}")
    assert difference(base, stacked) <= 1
    first = world.sample(tmp_path / "first", "--lora", world.files[0])
    nothing = world.sample(tmp_path / "nothing")
    assert difference(first, stacked) > 20
    assert difference(first, nothing) > 20
    assert difference(nothing, stacked) > 20


def test_run_that_has_finished_one_stage(worlds: dict[str, World], tmp_path: Path) -> None:
    """And a run of stage 2 alone, which started from a file of another run."""
    world = worlds["flux2"]
    write_stage(tmp_path / "one" / "cold_start", world.states[0], "flux2")
    first = world.sample(tmp_path / "first", "--lora", world.files[0])
    assert difference(world.sample(tmp_path / "a", "--run", str(tmp_path / "one")), first) == 0
    write_stage(tmp_path / "two" / "rtdmd", world.states[1], "flux2")
    started = f"rtdmd.start_generator={world.files[0]}"
    both = world.sample(tmp_path / "b", "--run", str(tmp_path / "two"), started)
    assert difference(both, world.sample(tmp_path / "both", "--lora", *world.files)) == 0


def test_metadata_and_grid(worlds: dict[str, World], tmp_path: Path, capsys: Any) -> None:
    """Overrides that follow --lora are overrides all the same."""
    world, files = worlds["flux2"], worlds["flux2"].files
    options = ["--grid", "--seed", "5", "--steps", "2", "--lora", *files, "schedule.eta=0.5"]
    pictures = world.sample(tmp_path, *options)
    names = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert names[0] == "0000-two-red-circles.png" and names[2] == "0002-two-bergr-n-circles.png"
    text = Image.open(tmp_path / names[6]).text
    assert text == {
        "prompt": PROMPTS[6],
        "seed": "5",
        "steps": "2",
        "sigmas": text["sigmas"],
        "eta": "0.5",
        "guidance_scale": "1",
        "loras": json.dumps(files),
        "merged": "false",
        "weights": str(world.pipeline),
        "role": "generator",
        "dtype": "float32",
        "recipe": f"{world.recipe} schedule.eta=0.5",
        "rtdmd": __version__,
    }
    assert len(json.loads(text["sigmas"])) == 2
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (3 * 64, 3 * 64)
    assert json.loads(grid.text["prompts"]) == PROMPTS
    assert np.array_equal(np.asarray(grid)[64:128, 128:192], pictures[5])
    assert re.search(r"7 pictures in .*: \d+\.\d\d images per second", capsys.readouterr().out)


def test_prompts_from_a_file_and_from_standard_input(
    worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, file = worlds["flux2"], tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    # One a batch: pictures of batches of another size may differ in a last bit.
    arguments = ["sample", str(world.recipe), "--batch-size", "1", "--out"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[1]}\n\n {PROMPTS[2]}\n"))
    assert main([*arguments, str(tmp_path / "piped"), "--prompts", "-", "--prompt", PROMPTS[0]]) == 0
    assert main([*arguments, str(tmp_path / "read"), "--prompts", str(file)]) == 0
    piped, read = (sorted((tmp_path / name).iterdir()) for name in ("piped", "read"))
    assert [path.name for path in piped] == [path.name for path in read[:3]]
    for one, other in zip(piped, read[:3], strict=True):
        # A batch of another size rounds otherwise: a pixel here and there moves to the next of 256 levels.
        levels = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(levels).max() <= 1


def test_teacher_is_the_stock_pipeline_with_guidance(world: World, tmp_path: Path) -> None:
    """Euler's steps of the stock scheduler from the same noise, from weights of the teacher's own."""
    pipe = open_pipeline(world.pipeline)
    pipe.transformer = world.network(world.states[0])
    pipe.save_pretrained(tmp_path / "teacher")
    recipe = load_recipe(world.recipe, [f"roles.teacher.weights={tmp_path / 'teacher'}"])
    painter = build_painter(recipe, SampleOptions(teacher=True, num_steps=6, seed=4), CPU)
    extra: dict[str, Any] = {"text_encoder_out_layers": (1, 2, 3)} if world.family == "flux2" else {}
    images = pipe(
        prompt=PROMPTS,
        num_inference_steps=6,
        sigmas=[1 - i / 6 for i in range(6)],
        guidance_scale=3.0,
        height=64,
        width=64,
        max_sequence_length=TEXT_TOKENS[world.family],
        latents=painter.noise("initial", PROMPTS),
        output_type="np",
        **extra,
    ).images
    ours = painter.paint(PROMPTS).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - ours).max() < 1e-3
    unguided = build_painter(
        recipe, SampleOptions(teacher=True, num_steps=6, guidance_scale=1.0, seed=4), CPU
    )
    assert np.abs(unguided.paint(PROMPTS).permute(0, 2, 3, 1).numpy() - ours).max() > 0.05


def test_bfloat16_has_the_same_noise(worlds: dict[str, World]) -> None:
    world = worlds["flux2"]
    recipe = load_recipe(world.recipe, ["dtype=bfloat16"])
    painter = build_painter(recipe, SampleOptions(), CPU)
    assert painter.noise("initial", ["a"]).dtype == torch.float32
    exact = build_painter(load_recipe(world.recipe), SampleOptions(), CPU)
    assert torch.equal(painter.noise("transition2", PROMPTS), exact.noise("transition2", PROMPTS))
    assert (painter.paint(PROMPTS[:2]) - exact.paint(PROMPTS[:2])).abs().mean() < 0.03


def test_merging_in_bfloat16_loses_small_adapters(worlds: dict[str, World], tmp_path: Path) -> None:
    """ΔW of a thousandth of W is below half a unit of most weights; beside them it keeps 8 bits."""
    world, layer = worlds["flux2"], "transformer_blocks.0.attn.to_q"
    small = {name: tensor * (3e-3 if ".lora_B." in name else 1) for name, tensor in world.states[0].items()}
    lora = str(write_stage(tmp_path, small, "flux2") / "generator_ema.pt")
    recipe = load_recipe(world.recipe, ["dtype=bfloat16"])
    base, beside, merged_in = (
        build_painter(recipe, SampleOptions(loras=loras, merge=merge), CPU).network
        for loras, merge in (((), False), ((lora,), False), ((lora,), True))
    )
    a, b = (small[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    stored = base.get_parameter(f"{layer}.weight").float()
    kept = merged_in.get_parameter(f"{layer}.weight").float() - stored
    assert (kept - 2 * b @ a).norm() > 0.5 * (2 * b @ a).norm()
    a16, b16 = (beside.get_parameter(f"{layer}.lora_{factor}.default.weight") for factor in "AB")
    assert a16.dtype == b16.dtype == torch.bfloat16
    assert (2 * b16.float() @ a16.float() - 2 * b @ a).norm() < 0.01 * (2 * b @ a).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompts: give --prompt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--prompt", "a", "--teacher", "--lora", "x.pt"], "the teacher has no adapters"),
        (["--prompt", "a", "--run", "x", "--lora", "x.pt"], "leave out --lora or --run"),
        (["--prompt", "a", "--run", "nowhere"], "nowhere: holds neither cold_start/generator_ema.pt nor"),
        (["--prompt", "a", "--lora", "x.pt"], "x.pt: no such file"),
        (["--prompt", "a", "--lora", "x.pt", "lora.rnak=2"], "did you mean 'rank'"),
        (["--prompt", "a", "--guidance", "2"], "--guidance goes with --teacher"),
        (["--prompt", "a", "--teacher", "--guidance", "nan"], "--guidance nan: give 1 (none) or more"),
        (["--prompt", "a", "--teacher", "--guidance", "0.5"], "--guidance 0.5: give 1"),
        (["--prompt", "a", "--num-steps", "2"], "--num-steps are the teacher's"),
        (["--prompt", "a", "--teacher", "--steps", "2"], "--steps are the generator's"),
        (["--prompt", "a", "--steps", "0"], "0 steps: give at least 1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--prompt", "a", "--device", "toaster"], "--device toaster: "),
        (["--prompt", "a", "--gpus", "0"], "--gpus 0: give at least 1"),
        (["--prompt", "a", "model.height=60"], "model.height = 60: write a multiple of 16"),
        (["--prompt", "a", "schedule.eta=2"], "schedule.eta = 2"),
        (["--prompt", "a", "another.yaml"], "name one recipe"),
    ],
)
def test_mistakes(worlds: dict[str, World], arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["sample", str(worlds["flux2"].recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_finite_is_no_picture(worlds: dict[str, World], tmp_path: Path, capsys: Any) -> None:
    state = dict(worlds["flux2"].states[0])
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    lora = str(write_stage(tmp_path / "nan", state, "flux2") / "generator_ema.pt")
    command = ["sample", str(worlds["flux2"].recipe), "--prompt", "a red cube", "--lora", lora]
    assert main([*command, "--out", str(tmp_path / "pictures")]) == 2
    assert (
        "'a red cube' and what is painted with it come out as numbers that aren't" in capsys.readouterr().err
    )
    assert not list((tmp_path / "pictures").iterdir())
    (tmp_path / "file").touch()
    assert main([*command[:-2], "--out", str(tmp_path / "file")]) == 2
    assert f"{tmp_path}/file: no such folder can be made" in capsys.readouterr().err


def test_a_run_says_what_it_started_from(worlds: dict[str, World], tmp_path: Path) -> None:
    for stage in ("cold_start", "rtdmd"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "generator_ema.pt").touch()
    given, second = load_recipe(worlds["flux2"].recipe), tmp_path / "rtdmd/generator_ema.pt"
    assert run_files(tmp_path, given) == [tmp_path / "cold_start/generator_ema.pt", second]
    own = load_recipe(worlds["flux2"].recipe, ["rtdmd.start_generator=another/generator_ema.pt"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(own))
    assert run_files(tmp_path, given) == [Path("another/generator_ema.pt"), second]
    moved = load_recipe(worlds["flux2"].recipe, ["rtdmd.start_generator=moved/generator_ema.pt"])
    assert run_files(tmp_path, moved) == [Path("moved/generator_ema.pt"), second]


def test_another_schedule_than_the_runs_is_told(worlds: dict[str, World], tmp_path: Path) -> None:
    given = load_recipe(worlds["flux2"].recipe)
    assert schedule_notice(tmp_path, given) is None
    (tmp_path / "recipe.yaml").write_text(dump_recipe(given))
    assert schedule_notice(tmp_path, given) is None
    own = load_recipe(worlds["flux2"].recipe, ["schedule.eta=0.25", "model.height=128"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(own))
    notice = schedule_notice(tmp_path, given)
    assert notice is not None and "was trained with schedule.eta = 0.25, and" in notice
    assert f"give {tmp_path / 'recipe.yaml'} as the recipe" in notice


def test_a_full_disk_is_told(worlds: dict[str, World], tmp_path: Path, capsys: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "0000-a.png").symlink_to("/dev/full")
    arguments = ["sample", str(worlds["flux2"].recipe), "--prompt", "a", "--out", str(tmp_path)]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "No space left on device; free some" in told.replace("'", "") and "Traceback" not in told


def test_files_that_do_not_fit(worlds: dict[str, World], capsys: Any) -> None:
    """The other family's file, and another rank than the recipe's."""
    recipe = str(worlds["flux2"].recipe)
    assert main(["sample", recipe, "--prompt", "a", "--lora", worlds["sd3"].files[0]]) == 2
    assert "adapter for another model" in capsys.readouterr().err
    assert main(["sample", recipe, "--prompt", "a", "lora.rank=8", "--lora", worlds["flux2"].files[0]]) == 2
    assert "its rank is 32, the recipe's lora.rank 8" in capsys.readouterr().err
    assert pick_device(None).type in ("cpu", "cuda")


def test_loading_the_second_file_over_the_first_does_not_stack(world: World) -> None:
    """The usual loop loads both files under one adapter name: what is left is the second stage alone."""
    code = docs_block("def add_lora")
    scope: dict[str, Any] = {}
    exec(code[: code.index("model = ")], scope)  # the definitions alone
    painter = build_painter(load_recipe(world.recipe), SampleOptions(), CPU)
    x, text = painter.noise("initial", PROMPTS[:2]), painter.family.encode_prompts(PROMPTS[:2])

    @torch.no_grad()
    def velocity(network: nn.Module) -> Tensor:
        return painter.family.predict_velocity(network, x, 0.8, text)

    both, second = (velocity(world.network(*states)) for states in (world.states, world.states[1:]))
    assert (both - second).abs().mean() > 0.05

    network = world.network()
    scope["add_lora"](network, world.files[0])
    network.load_state_dict(torch.load(world.files[1], weights_only=True), strict=False)
    torch.testing.assert_close(velocity(network), second, atol=1e-4, rtol=1e-4)

    network = world.network()
    scope["add_lora"](network, world.files[0])
    network.fuse_lora()
    network.unload_lora()
    scope["add_lora"](network, world.files[1])
    torch.testing.assert_close(velocity(network), both, atol=1e-4, rtol=1e-4)


def docs_block(*words: str) -> str:
    """The Python block of docs/sampling.md in which all of ``words`` stand."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    found = [block for block in blocks if all(word in block for word in words)]
    assert len(found) == 1, words
    return found[0]


def fitted(block: str, world: World) -> str:
    """The block with the tiny model in place of the published one, in float32 on the CPU."""
    family = {"flux2": "Flux2KleinPipeline", "sd3": "StableDiffusion3Pipeline"}[world.family]
    tokens = TEXT_TOKENS[world.family]
    layers = ", text_encoder_out_layers=(1, 2, 3)" if world.family == "flux2" else ""
    replacements = {
        r'"(black-forest-labs|stabilityai)/[^"]*"': repr(str(world.pipeline)),
        r"(Flux2Klein|StableDiffusion3)Pipeline": family,
        r'\.to\("cuda"\)': "",
        "dtype=torch.bfloat16": "dtype=torch.float32",
        r"runs/(flux2_4b|sd35m)": str(world.run),
        "=512": "=64",
        r" *max_sequence_length=128,\n": "",
        r"guidance_scale=1\.0": f"guidance_scale=1.0, max_sequence_length={tokens}{layers}",
        r"image\.save\(.*\)\n": "",
    }
    for pattern, replacement in replacements.items():
        block = re.sub(pattern, lambda _, text=replacement: text, block)
    return block


def test_plain_diffusers_without_rtdmd(worlds: dict[str, World], tmp_path: Path) -> None:
    """Both ways of docs/sampling.md paint what ``rtdmd sample`` paints, to 1/255."""
    prompt, jobs = "a cute cat sitting on a windowsill", []
    painters = {
        name: build_painter(load_recipe(world.recipe), SampleOptions(run=world.run), CPU)
        for name, world in worlds.items()
    }
    for name, world in worlds.items():
        save_noise(painters[name], name, prompt, tmp_path / f"{name}.pt")
        for way, words in {"files": ("load_lora_weights", "CPS.from"), "states": ("def add_lora",)}.items():
            blocks = [docs_block("class CPS"), fitted(docs_block(*words), world)]
            out = str(tmp_path / f"{name}-{way}.npy")
            jobs.append({"noise": str(tmp_path / f"{name}.pt"), "blocks": blocks, "out": out})
    run_plain(jobs, tmp_path)
    for name in worlds:
        ours = painters[name].paint([prompt])[0].permute(1, 2, 0).numpy()
        for way in ("files", "states"):
            assert np.abs(np.load(tmp_path / f"{name}-{way}.npy")[-1] - ours).max() < 1 / 255


def test_documented_scheduler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks with CPSScheduler run as they stand, and paint the same picture each time."""
    block = docs_block("CPSScheduler", {"flux2": "FLUX.2", "sd3": "stabilityai"}[world.family])
    pictures = []
    for _ in range(2):
        scope: dict[str, Any] = {}
        exec(fitted(block, world), scope)
        pictures.append(np.asarray(scope["image"]).astype(int))
    assert difference(pictures[:1], pictures[1:]) == 0
    assert pictures[0].std() > 10


def test_documented_commands(
    worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ``rtdmd sample`` of docs/sampling.md, on the tiny model in a folder like a person's."""
    world = worlds["flux2"]
    monkeypatch.chdir(tmp_path)
    for name, source in {"recipes/flux2_4b.yaml": world.recipe, "runs/flux2_4b": world.run}.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(source)
    Path("prompts.txt").write_text("a red circle\ntwo dogs\n")
    lines = [line for line in DOCS.splitlines() if "rtdmd sample recipes/flux2_4b" in line]
    assert len(lines) == 7
    for number, line in enumerate(lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO(Path("prompts.txt").read_text()))
        _, _, command = line.rpartition("rtdmd ")
        command = command.replace("1024", "96").replace("--num-steps 50", "--num-steps 5")
        command = command.replace("--gpus 2", "--gpus 2 --device cpu")
        assert main([*shlex.split(command), "--out", f"out{number}"]) == 0
        assert len(list(Path(f"out{number}").glob("0*.png"))) == (1 if number == 0 else 2)
    assert Image.open("out6/0000-a-red-circle.png").size == (96, 96)


def test_without_deepspeed(worlds: dict[str, World], tmp_path: Path) -> None:
    script = "import sys; sys.modules['deepspeed'] = None; import rtdmd.cli; sys.exit(rtdmd.cli.main())"
    world = worlds["flux2"]
    arguments = ["sample", str(world.recipe), "--prompt", "a", "--run", str(world.run)]
    command = [sys.executable, "-c", script, *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0000-a.png").is_file()
