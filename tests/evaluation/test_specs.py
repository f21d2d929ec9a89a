"""What a model's short text names, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdmd.errors import UserError
from rtdmd.evaluation.specs import ModelSpec, parse_model, parse_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("base", ModelSpec("base")),
        ("base:steps=8", ModelSpec("base", num_steps=8)),
        ("teacher", ModelSpec("teacher")),
        ("teacher:steps=50,guidance=4.5", ModelSpec("teacher", num_steps=50, guidance_scale=4.5)),
        ("run:runs/a", ModelSpec("run", run="runs/a")),
        ("run:runs/a@cold_start", ModelSpec("run", run="runs/a", stage="cold_start")),
        ("run:runs/a@rtdmd,steps=2", ModelSpec("run", run="runs/a", stage="rtdmd", num_steps=2)),
        ("lora:a.pt+b/c.pt", ModelSpec("lora", loras=("a.pt", "b/c.pt"))),
        ("lora:a,b=1.pt,steps=3", ModelSpec("lora", loras=("a,b=1.pt",), num_steps=3)),
    ],
)
def test_specs(text: str, spec: ModelSpec) -> None:
    assert parse_spec(text) == spec


def test_a_folder_may_have_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert parse_spec(f"run:{folder}") == ModelSpec("run", run=str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bass", "unknown kind 'bass'; did you mean 'base'?"),
        ("base:8", "'8' is no option; known: steps=N, guidance=W"),
        ("teacher:stps=50", "'stps=50' is no option"),
        ("run", "name what to load, such as run:runs/flux2_4b or lora:A.pt+B.pt"),
        ("run:runs/a@cold_stat", "no stage 'cold_stat'; did you mean 'cold_start'?"),
        ("base:steps=0", "steps=0: give at least 1"),
        ("teacher:guidance=nan", "guidance=nan: give at least 1"),
        ("base:steps=x", "steps=x is no number"),
        ("run:a,guidance=2", "guidance is the teacher's"),
    ],
)
def test_faults(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_spec(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "spec"),
    [
        ("base", "base", "base"),
        ("teacher:steps=50,guidance=4", "teacher", "teacher:steps=50,guidance=4"),
        ("four=teacher:steps=4", "four", "teacher:steps=4"),
        ("ours=lora:a=b.pt", "ours", "lora:a=b.pt"),
    ],
)
def test_names(text: str, name: str, spec: str) -> None:
    assert parse_model(text) == (name, spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:runs/a", "give it a name, such as cold=run:runs/flux2_4b@cold_start"),
        ("a/b=base", "name it with letters"),
        ("x=bse", "did you mean 'base'?"),
    ],
)
def test_faulty_names(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_model(text)
    assert message in str(error.value)
