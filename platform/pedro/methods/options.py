"""Checks of a method's options, and the projections they name.

Each check raises ConfigError with the option's name, what was expected and what was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.errors import ConfigError
from pedro.methods.architectures import projection_paths

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

Targets = list[str] | tuple[str, ...] | None
LARGEST = 1_000_000  # of any count: more than any backbone is wide, and still a number that tensors can have


def expect(good: bool, name: str, expected: str, got: object) -> None:
    """Raise ConfigError unless `good`."""
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}", param=name)


def is_count(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def expect_count(name: str, value: object) -> None:
    """A whole number > 0, and none that no tensor could have."""
    expect(is_count(value) and value > 0, name, "a whole number > 0", value)  # type: ignore[operator]
    expect(value <= LARGEST, name, f"at most {LARGEST:,}", value)  # type: ignore[operator]


def expect_share(name: str, value: object) -> None:
    """A number in [0, 1)."""
    expect(isinstance(value, (int, float)) and 0 <= value < 1, name, "a number in [0, 1)", value)


def names_in(name: str, value: object) -> tuple[str, ...]:
    """A list of names as a tuple; whether they are known is another check."""
    good = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    expect(good, name, "a list of names", value)
    return tuple(value)  # type: ignore[arg-type]


def expect_names(name: str, value: object, known: tuple[str, ...]) -> None:
    """A tuple of at least one of the known names, none twice."""
    good = isinstance(value, tuple) and len(value) > 0 and all(n in known and value.count(n) == 1 for n in value)
    expect(good, name, f"distinct names of {', '.join(known)}", value)


def targets_of(model_config: ModelConfig, targets: Targets) -> tuple[str, ...]:
    """`targets`, or all linears of the backbone. Raises BackboneError for an unsupported architecture."""
    paths = projection_paths(model_config)
    chosen = tuple(paths) if targets is None else names_in("targets", targets)
    good = len(chosen) > 0 and all(target in paths for target in chosen)
    expect(good, "targets", f"a list of {', '.join(paths)}", targets)
    return chosen


def paths_of(model_config: ModelConfig, targets: Targets) -> list[str]:
    """The module paths inside a block of `targets`, or of all linears."""
    paths = projection_paths(model_config)
    return sorted({paths[target] for target in targets_of(model_config, targets)})
