"""The memory of a worker's tensors during training, by arithmetic on counts.

Parameters, gradients and optimizer state are exact; activations are an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"fp32": 4, "bf16": 2}
IN_BLOCK = 17  # numbers that a block keeps of a token for its backward pass, in widths of the model
KEPT_ON_GPU = 1_000_000_000  # DeepSpeed's default stage3_max_live_parameters


class Footprint(NamedTuple):
    """Bytes of a backbone in fewer bits, and of its largest projection while that is whole."""

    total: int
    whole: int


@dataclass(frozen=True)
class Sizes:
    """The widths of a backbone on which activations depend, and its largest tensor for ZeRO-3."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    largest: int = 0
    """Parameters of the largest tensor; 0 if workers cannot load pieces of the backbone."""
    block: int = 0
    """Parameters of the largest block, which is whole while gradient checkpointing computes it again."""


def training_memory(  # noqa: PLR0913
    sizes: Sizes,
    *,
    frozen: int,
    trainable: int,
    precision: str,
    full: bool,
    tokens: int,
    answer_tokens: int,
    gradient_checkpointing: bool,
    workers: int = 1,
    zero_stage: int = 0,
    on_gpu: bool = False,
    held: Footprint | None = None,
) -> dict[str, int]:
    """Bytes on each worker by part; ZeRO 1 shards optimizer state, 2 gradients as well, 3 the parameters.

    With stage 3 a worker has one whole tensor at a time, with gradient checkpointing one block, on a GPU as many
    parameters as DeepSpeed keeps resident. If workers cannot load pieces, the whole backbone is counted, which each of
    them loads once.

    `frozen` and `trainable` count parameters; `tokens` are those of one slice, including padding, `answer_tokens` those
    with logits; `full` means that the backbone itself is trained; `held` is the size of a backbone in 8 or 4 bit, of
    which one projection at a time is whole, counted with the activations. Activations: per layer and token about 34
    widths without attention scores (Korthikanti et al. 2022, section 4, for 16 bit; twice that in 32), with gradient
    checkpointing so many in one layer alone and the input of each, and a slice's logits.
    """
    size = BYTES[precision]
    full16 = full and precision == "bf16"
    trained_size = 2 if full16 else 4
    widths = sizes.num_layers + IN_BLOCK if gradient_checkpointing else sizes.num_layers * IN_BLOCK
    logits = 2 * 4 * sizes.vocab_size
    share = {part: workers if zero_stage >= least else 1 for part, least in (("gradients", 2), ("optimizer", 1))}
    cut = workers if zero_stage == 3 and sizes.largest else 1
    whole = max(sizes.largest, sizes.block if gradient_checkpointing else 0, KEPT_ON_GPU if on_gpu else 0)
    gathered = min(frozen + trainable, whole) * size if cut > 1 else 0
    return {
        "backbone": held.total if held else -(-frozen // cut) * size,
        **({"gathered": gathered} if gathered else {}),
        "adapter": -(-trainable // cut) * trained_size,
        "gradients": trainable * trained_size // share["gradients"],
        "optimizer": trainable * (12 if full16 else 8) // share["optimizer"],
        "activations": int(tokens * widths * sizes.hidden_size * size + answer_tokens * logits)
        + (held.whole if held else 0),
    }
