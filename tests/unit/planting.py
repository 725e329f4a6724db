"""How a bug is planted into what we ship, to see that a simulation finds it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

NUM_SEEDS = 60

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Bug:
    """`plant` changes the code; one of `NUM_SEEDS` runs from `first_seed` on must fail."""

    name: str
    simulate: Callable[[int], object]
    plant: Callable[[Patch], None]
    first_seed: int = 0

    def id_of(self) -> str:
        return self.name.replace(" ", "-")

    def must_be_found(self, patch: Patch) -> None:
        """Raises `Failed` where no run notices it."""
        logging.disable(logging.CRITICAL)  # there is much to say
        self.plant(patch)
        try:
            with pytest.raises((AssertionError, LookupError)):
                for seed in range(self.first_seed, self.first_seed + NUM_SEEDS):
                    self.simulate(seed)
        finally:
            logging.disable(logging.NOTSET)


def instead(owner: object, name: str, new: Any) -> Callable[[Patch], None]:
    """Plants `new` in the place of an attribute."""
    return lambda patch: patch.setattr(owner, name, new)


def around(owner: type, name: str, new: Callable[..., Any]) -> Callable[[Patch], None]:
    """Plants a method that calls `new(old method, self, ...)`."""
    old = getattr(owner, name)
    return instead(owner, name, lambda self, *args, **named: new(old, self, *args, **named))
