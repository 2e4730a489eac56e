"""What the demo can show: which backbone, which tenants, how long their adapters train. No cluster, no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pedro.data.demo import CHAT_TENANTS, DEMO_TENANTS, DemoTenant
from pedro.data.lines import shape_of
from pedro.data.row_shapes import RowShape
from pedro.refs import ModelRef
from pedro.spec_reader import validate_spec
from pedro.training.spec import FineTuneSpec


@dataclass(frozen=True)
class StoryPart:
    """A tenant's part: its adapter has a version for each number of `steps`, trained as `training` says."""

    tenant: DemoTenant
    steps: tuple[int, ...]
    training: Mapping[str, Any]
    rows: int
    """How many of the tenant's test rows are asked."""
    shots: int | str = 0
    """Worked examples that the bare backbone sees when it is asked a second time; "label" is one of each label."""

    @property
    def name(self) -> str:
        """`tenant.adapter`."""
        return ModelRef(self.tenant.name, self.tenant.adapter).name


@dataclass(frozen=True)
class Story:
    """Parts in the order in which they start to train: the longest first."""

    backbone: str
    parts: tuple[StoryPart, ...]
    margin: float
    """How far every adapter is to be above the bare backbone and the most frequent answer."""
    threads: int | None = None
    """Of the server's engine; None takes what is free."""

    @property
    def swapped(self) -> StoryPart:
        """The part with two versions, of which the second takes the place of the first."""
        return next(part for part in self.parts if len(part.steps) == 2)


_SMALL: dict[str, Any] = {"lr": 1e-2, "theta_lr": 1e-4, "theta_every": 5, "batch_size": 16, "eval_every": 50}
_CHAT: dict[str, Any] = {"lr": 1e-2, "theta_lr": 1e-4, "theta_every": 10, "eval_every": 20, "eval_rows": 24}
ACME, GLOBEX, INITECH = DEMO_TENANTS
_, READER, SUPPORT = CHAT_TENANTS
SMALL = Story(
    "pedro-nano",
    (
        StoryPart(GLOBEX, (150,), _SMALL, 80),
        StoryPart(ACME, (15, 100), _SMALL, 80),
        StoryPart(INITECH, (100,), _SMALL, 80),
    ),
    margin=0.20,
    threads=1,
)
FULL = Story(
    "smollm2-135m",
    (
        StoryPart(SUPPORT, (60,), {**_CHAT, "batch_size": 16}, 24, shots=4),  # each prompt lists 77 labels
        StoryPart(ACME, (10, 30), {**_CHAT, "batch_size": 8}, 40, shots="label"),
        StoryPart(READER, (24,), {**_CHAT, "batch_size": 8}, 40, shots=2),
    ),
    margin=0.05,
)


def demo_spec(story: Story, part: StoryPart, steps: int) -> FineTuneSpec:
    """The spec that trains an adapter of the story for `steps`."""
    tenant = part.tenant
    data: dict[str, Any] = {"train": str(tenant.train), "test": str(tenant.test)}
    if shape_of(tenant.train) is RowShape.COMPLETION:  # the other shapes' formats end every prompt alike by themselves
        data["template"] = tenant.template
    spec = {
        "tenant": tenant.name,
        "adapter": tenant.adapter,
        "backbone": story.backbone,
        "data": data,
        "method": {"name": "pedro", "r": 12},
        "training": {"max_steps": steps, **part.training},
        "gate": {"max_rows": 16},  # every row that is asked is scored over HTTP
    }
    return validate_spec(spec, FineTuneSpec, source=f"demo tenant {tenant.name}")
