"""What the runner asks of whatever runs the model: `native_model` on a CPU, `torch_model` everywhere else.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from pedro.engine.modulation import ConditionedRow


class Logits(NamedTuple):
    """What the model says comes next. `values` is valid until the runner's next call: copy what must stay."""

    values: torch.Tensor  # [B, V] float32
    best: list[int] | None = None  # argmax of each row where it was computed on the way; -1 where not finite


class ModelExecutor(Protocol):
    """Runs the layers. A prefill's state (`start`) is its own; one prefill may be in progress between decode steps."""

    whole: bool  # whether a prefill cannot be cut
    weight_bytes: int  # of the backbone's weights

    def start(self, rows: list[ConditionedRow], token_ids: list[list[int]]) -> Any:
        """Start a prefill whose rows the modulation has begun."""
        ...

    def advance(self, state: Any, until: int) -> None:
        """Continue until at least `until` tokens' worth of the prefill, through all layers, is done."""
        ...

    def logits(self, state: Any, index: list[int]) -> Logits:
        """What comes after the tokens `index` of the packed prompts, once all of it ran."""
        ...

    def hidden(self, state: Any, index: list[int]) -> torch.Tensor:
        """The last hidden states [n, D], as the head reads them, of the tokens `index`, once all of the prefill ran."""
        ...

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Logits:
        """One step of every row: its slot, its last token, and where that stands. Rows may share a slot (drafts)."""
        ...
