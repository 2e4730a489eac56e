"""The runner's interface to the code that runs the model: `native_model` on a CPU, `torch_model` otherwise.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from pedro.engine.modulation import ConditionedRow


class Logits(NamedTuple):
    """The model's output for the next token. `values` is valid until the runner's next call: copy it to keep it."""

    values: torch.Tensor  # [B, V] float32
    best: list[int] | None = None  # argmax of each row if already computed; -1 if not finite


class ModelExecutor(Protocol):
    """Runs the layers. Each prefill has its own state (`start`); one may be in progress between decode steps."""

    whole: bool  # whether a prefill cannot be split
    weight_bytes: int  # of the backbone's weights

    def start(self, rows: list[ConditionedRow], token_ids: list[list[int]]) -> Any:
        """Start a prefill of rows that the modulation has prepared."""
        ...

    def advance(self, state: Any, until: int) -> None:
        """Continue until at least `until` tokens' worth of the prefill, through all layers, is done."""
        ...

    def logits(self, state: Any, index: list[int]) -> Logits:
        """The logits after tokens `index` of the packed prompts, once the whole prefill ran."""
        ...

    def hidden(self, state: Any, index: list[int]) -> torch.Tensor:
        """The normed last hidden states [n, D] of tokens `index`, once the whole prefill ran."""
        ...

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Logits:
        """One step of every row: its slot, its last token and its position. Rows may share a slot (drafts)."""
        ...
