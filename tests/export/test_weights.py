"""Exported weights: what diffusers and peft make of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from rtdmd.cli import main
from rtdmd.export import merged as merging
from rtdmd.models.adapters import read_adapter
from rtdmd.models.lora import Adapter, stack_adapters
from rtdmd.sample import Painter
from tests.export.conftest import PROMPT, complete_run, painter_of, write_progress
from tests.lora_files import load_transformer, random_lora, write_stage
from tests.small_runs import TEXT_TOKENS, World, run_plain, save_noise


def export(run: Path, target: str, out: Path, *arguments: str) -> Path:
    assert main(["export", str(run), "--to", target, "--out", str(out), *arguments]) == 0
    return out


def velocity(painter: Painter, network: nn.Module) -> Tensor:
    x, text = painter.noise("initial", ["a", "b"]), painter.family.encode_prompts(["a", "b"])
    with torch.no_grad():
        return painter.family.predict_velocity(network, x, 0.8, text)


def test_stacking_by_hand() -> None:
    """ΔW = 3·[2]·[1, 1] + (4/2)·[[1, 0], [0, 1]]·[[0, 1], [5, 0]] on `both`; `one` is the second's alone."""
    first = Adapter({"both": (torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0]]))}, alpha=3.0)
    pair = (torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.eye(2))
    second = Adapter({"both": pair, "one": pair}, alpha=4.0)
    stacked = stack_adapters([first, second])
    assert (stacked.rank, stacked.alpha) == (3, 3.0)
    both = stacked.delta("both", 0, 2)
    one = stacked.delta("one", 0, 2)
    assert both is not None and one is not None
    assert both.tolist() == [[6.0, 8.0], [10.0, 0.0]]
    assert one.tolist() == [[0.0, 2.0], [10.0, 0.0]]
    assert stacked.factors["one"][0].tolist() == [[0.0, 0.0], [0.0, 1.0], [5.0, 0.0]]


def test_stacked_file(world: World, runs: dict[str, Path], tmp_path: Path) -> None:
    """Rank 64 and alpha 64 in the metadata; ΔW is the sum of the stages', to float32's rounding."""
    out = export(runs[world.family], "diffusers", tmp_path / "out")
    file = out / "pytorch_lora_weights.safetensors"
    with safe_open(str(file), framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (64, 64.0)
    stacked = read_adapter(file, alpha=1.0)
    parts = [read_adapter(out / stage, alpha=1.0, rank=32) for stage in ("cold_start", "rtdmd")]
    assert [part.alpha for part in parts] == [64.0, 64.0]
    for module, (_, b) in stacked.factors.items():
        wanted = [part.delta(module, 0, len(b)) for part in parts]
        assert wanted[0] is not None and wanted[1] is not None
        assert_close(stacked.delta(module, 0, len(b)), wanted[0] + wanted[1], atol=1e-6, rtol=1e-5)


def test_peft_folders(
    world: World, runs: dict[str, Path], painters: dict[str, Painter], tmp_path: Path
) -> None:
    """``stacked`` alone, and both stages as active adapters, are the sampler's network."""
    out = export(runs[world.family], "peft", tmp_path / "out")
    painter = painters[world.family]
    wanted = velocity(painter, painter.network)
    base = velocity(painter, load_transformer(world.pipeline, world.family))
    assert (wanted - base).abs().mean() > 0.05

    model = PeftModel.from_pretrained(load_transformer(world.pipeline, world.family), out / "stacked")
    assert_close(velocity(painter, model), wanted, atol=1e-4, rtol=1e-4)

    model = PeftModel.from_pretrained(
        load_transformer(world.pipeline, world.family), out / "cold_start", adapter_name="cold_start"
    )
    first = velocity(painter, model)
    model.load_adapter(out / "rtdmd", adapter_name="rtdmd")
    model.base_model.set_adapter(["cold_start", "rtdmd"])
    assert_close(velocity(painter, model), wanted, atol=1e-4, rtol=1e-4)
    assert (first - wanted).abs().mean() > 0.05


STOCK = """\
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r})
image = pipe(
    prompt={prompt!r}, num_inference_steps=4, height=64, width=64, **{more}
).images[0]
"""


def test_merged_pipelines_paint_in_plain_diffusers(
    runs: dict[str, Path], painters: dict[str, Painter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened as any pipeline: its own scheduler is our sampler at eta = 1. The transformer comes in shards.

    FLUX.2's pipeline needs no more than the number of steps: it is told that it is distilled, so that its
    default guidance does nothing. SD3's is given steps and guidance.
    """
    monkeypatch.setattr(merging, "MAX_SHARD_BYTES", 60_000)
    jobs, wanted = [], {}
    for family, run in runs.items():
        out = export(run, "merged", tmp_path / f"merged-{family}")
        assert len(list((out / "transformer").glob("*.safetensors"))) > 2
        painter = painter_of(run, "schedule.eta=1.0")
        wanted[family] = painter.paint([PROMPT])[0].permute(1, 2, 0).numpy()
        save_noise(painter, family, PROMPT, tmp_path / f"{family}.pt")
        more = painter.family.call_arguments(str(out), None, TEXT_TOKENS[family])
        if family == "sd3":
            more |= {"guidance_scale": 1.0, "sigmas": [1.0, 0.75, 0.5, 0.25]}
        blocks = [STOCK.format(folder=str(out), prompt=PROMPT, more=more)]
        noise, result = str(tmp_path / f"{family}.pt"), str(tmp_path / f"{family}.npy")
        jobs.append({"noise": noise, "blocks": blocks, "out": result})
    run_plain(jobs, tmp_path)
    for family in runs:
        assert np.abs(np.load(tmp_path / f"{family}.npy")[0] - wanted[family]).max() < 1 / 255


def test_merged_transformer(world: World, runs: dict[str, Path], tmp_path: Path) -> None:
    """W + ΔW1 + ΔW2 in float32, then cast; what wasn't adapted is the base's, and files may be linked."""
    out = export(runs[world.family], "merged", tmp_path / "out", "--link", "dtype=bfloat16")
    tensors = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = world.network(*world.states).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert_close(tensor, expected[name].bfloat16(), atol=0.0, rtol=2**-7)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (out / vae).samefile(world.pipeline / vae)


def full_run(world: World, folder: Path) -> Path:
    run = complete_run(world, folder)
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace(
            "generator: {engine: nowhere.json}", "generator: {engine: nowhere.json, trains: full}"
        )
    )
    for stage, states in {"cold_start": world.states[:1], "rtdmd": world.states}.items():
        shutil.rmtree(run / stage)
        (run / stage).mkdir()
        torch.save(world.network(*states).state_dict(), run / stage / "generator_ema.pt")
    return run


def test_full_weights(worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = worlds["sd3"]
    run = full_run(world, tmp_path / "run")
    out = export(run, "merged", tmp_path / "out")
    tensors = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = world.network(*world.states).state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for target in ("diffusers", "peft"):
        assert main(["export", str(run), "--to", target, "--out", str(tmp_path / target)]) == 2
        assert "full weights were trained" in capsys.readouterr().err
        assert not (tmp_path / target).exists() and not list(tmp_path.glob(".*"))


def spoil_name(run: Path) -> None:
    (run / "recipe.yaml").rename(run / "other.yaml")


def spoil_stage(run: Path) -> None:
    write_progress(run, "rtdmd", 7)


def spoil_start(run: Path) -> None:
    (run / "rtdmd" / "generator_ema.pt").unlink()


def spoil_tensor(run: Path) -> None:
    file = run / "cold_start" / "generator_ema.pt"
    state = torch.load(file, weights_only=True)
    torch.save({name: torch.zeros(0) for name in state}, file)


def spoil_all(run: Path) -> None:
    shutil.rmtree(run / "rtdmd")
    shutil.rmtree(run / "cold_start")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "run: no such run; give the folder"),
        (spoil_name, "run: has no recipe.yaml"),
        (
            spoil_stage,
            "run/rtdmd: the stage isn't finished, 7 of 20 steps are done; go on with training, or add",
        ),
        (spoil_start, "run/rtdmd: the stage isn't finished, it has left no generator_ema.pt; go on"),
        (spoil_tensor, "is empty; the adapter was saved without gathering its shards"),
        (spoil_all, "run: holds neither cold_start/generator_ema.pt nor rtdmd/generator_ema.pt"),
        (lambda run: (run.parent / "out").mkdir(), "out is there already"),
        (lambda run: (run / "metrics.jsonl").write_text("{"), None),
    ],
)
def test_refused_runs(
    worlds: dict[str, World],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    message: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One clear error, and nothing is left behind; damaged records matter to a model card alone."""
    run = complete_run(worlds["flux2"], tmp_path / "run")
    spoil(run)
    target = "hub-folder" if message is None else "diffusers"
    assert main(["export", str(run), "--to", target, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert (message or "metrics.jsonl:1 is no record of a step") in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob(".*"))


def test_a_stage_that_a_rule_has_ended(worlds: dict[str, World], tmp_path: Path) -> None:
    """It is finished at the step where it ended, and not if training went on from there."""
    run = complete_run(worlds["flux2"], tmp_path / "run")
    write_progress(run, "rtdmd", 7)
    (run / "rtdmd" / "ended.json").write_text('{"step": 7}')
    export(run, "diffusers", tmp_path / "ended")
    write_progress(run, "rtdmd", 8)
    assert main(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "on")]) == 2


def test_unfinished_stages_on_demand(worlds: dict[str, World], tmp_path: Path) -> None:
    """What a stage has trained so far; and the first stage alone, of a run whose second hasn't begun."""
    run = complete_run(worlds["flux2"], tmp_path / "run")
    spoil_stage(run)
    export(run, "diffusers", tmp_path / "both", "--unfinished")
    assert (tmp_path / "both" / "rtdmd").is_dir()
    shutil.rmtree(run / "rtdmd")
    out = export(run, "diffusers", tmp_path / "first")
    assert sorted(path.name for path in out.iterdir()) == ["cold_start", "pytorch_lora_weights.safetensors"]
    assert read_adapter(out, alpha=1.0, rank=32).alpha == 64.0


def test_a_recipe_of_another_model(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of a FLUX.2 beside a recipe for SD3, as LoRA and as full weights."""
    run = complete_run(worlds["sd3"], tmp_path / "run")
    write_stage(run / "rtdmd", random_lora(worlds["flux2"].pipeline, "flux2", 1), "flux2")
    assert main(["export", str(run), "--to", "peft", "--out", str(tmp_path / "out")]) == 2
    assert "adapter for another model" in capsys.readouterr().err
    torch.save({"odd.weight": torch.zeros(1)}, run / "rtdmd" / "generator_ema.pt")
    assert main(["export", str(run), "--to", "merged", "--out", str(tmp_path / "out")]) == 2
    assert "weights of another model: odd.weight is (1,), absent in" in capsys.readouterr().err


def test_a_base_that_is_not_to_be_had(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """Without a network, and with the folder that the recipe names gone."""
    arguments = ["export", str(runs["flux2"]), "--to", "peft", "--out", str(tmp_path / "out")]
    assert main([*arguments, "model.pipeline=someone/nothing"]) == 2
    assert "someone/nothing: no transformer/config.json to be had" in capsys.readouterr().err
    assert main([*arguments, "model.pipeline=/gone/away"]) == 2
    assert "model.pipeline = '/gone/away'" in capsys.readouterr().err
    assert main(["export", "--to", "peft", "a=1"]) == 2
    assert "rtdmd export: name one run" in capsys.readouterr().err
