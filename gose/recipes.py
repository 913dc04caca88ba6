"""Named runs: a recipe is a function that returns a config; a variant is `config.override`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gose.config import SystemConfig


def quickstart() -> SystemConfig:
    """Recycle one teacher into experts and let three sites learn a stream of four image tasks."""
    return SystemConfig()


RECIPES: Mapping[str, Callable[[], SystemConfig]] = {"quickstart": quickstart}
