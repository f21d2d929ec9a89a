"""What ``rtdmd serve-rewards`` does: choose scorers, load them, serve until it is told to stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rtdmd.errors import UserError, nearest_hint
from rtdmd.recipe.schema import RewardSection
from rtdmd.rewards import load_rewards
from rtdmd.rewards.serving.server import RewardServer, ServingLimits
from rtdmd.rewards.serving.tokens import read_token

_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, and to whom."""

    host: str
    port: int
    token_file: str | None
    limits: ServingLimits

    def check(self) -> None:
        """Raise UserError for options out of range, and for an open door."""
        if not 0 <= self.port <= 65_535:
            raise UserError(f"--port {self.port}: give 1 to 65535, or 0 for any that is free")
        if self.limits.max_batch < 1 or self.limits.max_bytes < 1:
            raise UserError("--max-batch and --max-megabytes: give at least 1")
        if self.host not in _LOOPBACK and self.token_file is None:
            raise UserError(f"--host {self.host}: others can reach this address; give --token-file too")


def choose_sections(
    sections: Sequence[RewardSection], names: Sequence[str], weights: str | None
) -> list[RewardSection]:
    """The scorers to load.

    ``sections`` are a recipe's, empty without one. Of these ``names`` choose; by default those that have a
    url, and if none has, all. Without a recipe ``names`` are the scorers. Raises UserError for other names.
    """
    known = {section.name: section for section in sections}
    if sections and not names:
        chosen = [section for section in sections if section.url is not None] or list(sections)
    elif sections:
        for name in names:
            if name not in known:
                raise UserError(f"--reward {name}: not in the recipe{nearest_hint(name, list(known))}")
        chosen = [known[name] for name in names]
    elif names:
        chosen = [RewardSection(name) for name in dict.fromkeys(names)]
    else:
        raise UserError("rtdmd serve-rewards: name a recipe, or scorers with --reward NAME")
    if weights is not None:
        if len(chosen) != 1:
            raise UserError("--weights goes with one scorer: give one --reward, or name them in a recipe")
        chosen = [replace(chosen[0], weights=weights)]
    return [replace(section, url=None, token_file=None) for section in chosen]


def serve(
    sections: Sequence[RewardSection], device: torch.device, dtype: torch.dtype, options: ServeOptions
) -> None:
    """Load the scorers and serve them until SIGINT or SIGTERM."""
    options.check()
    token = None if options.token_file is None else read_token(options.token_file)
    rewards = load_rewards(sections, device, dtype)
    try:
        loaded = list(zip(sections, rewards, strict=True))
        server = RewardServer((options.host, options.port), loaded, device, options.limits, token)
    except OSError as error:
        raise UserError(f"cannot listen at {options.host}:{options.port}: {error.strerror}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server:
        names = ", ".join(reward.name for reward in rewards)
        print(f"serving {names} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
