"""Licences of the published base models; what is derived from them is bound by them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's metadata has it: an id of the hub's list, or ``other`` with name and link."""

    id: str
    name: str | None = None
    link: str | None = None
    title: str = ""


_HUB = "https://huggingface.co"
_APACHE = Licence("apache-2.0", title="Apache License 2.0")


def _flux(model: str) -> Licence:
    link = f"{_HUB}/black-forest-labs/{model}/blob/main/LICENSE.md"
    return Licence("other", "flux-non-commercial-license", link, "FLUX Non-Commercial License")


def _stability(model: str) -> Licence:
    link = f"{_HUB}/stabilityai/{model}/blob/main/LICENSE.md"
    return Licence("other", "stabilityai-ai-community", link, "Stability AI Community License")


# By hub id, as the models' own cards state them.
LICENCES = {
    "black-forest-labs/FLUX.2-klein-4B": _APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": _APACHE,
    "black-forest-labs/FLUX.2-klein-9B": _flux("FLUX.2-klein-9B"),
    "black-forest-labs/FLUX.2-klein-base-9B": _flux("FLUX.2-klein-base-9B"),
    "black-forest-labs/FLUX.1-dev": Licence(
        "other",
        "flux-1-dev-non-commercial-license",
        f"{_HUB}/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        "FLUX.1 [dev] Non-Commercial License",
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _stability("stable-diffusion-3-medium-diffusers"),
    "stabilityai/stable-diffusion-3.5-medium": _stability("stable-diffusion-3.5-medium"),
}


def licence_of(base: str | None, given: str | None) -> Licence:
    """The licence ``given`` (an id of the hub's list), else the base model's, else ``unknown``."""
    if given is not None:
        return Licence(given, title=given)
    return LICENCES.get(base or "", Licence("unknown"))
