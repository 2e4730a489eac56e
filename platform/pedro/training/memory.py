"""How many bytes a worker's tensors take while it trains. Plain arithmetic on counts.

Counts of parameters, gradients and optimizer state are exact; what activations take is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Sizes:
    """The widths of a backbone that activations depend on."""

    hidden_size: int
    num_layers: int
    vocab_size: int


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
) -> dict[str, int]:
    """Bytes on each worker by part; ZeRO 1 shards optimizer state, 2 gradients as well.

    Stage 3 is not counted as sharding parameters: each worker loads the whole backbone before it gives its share away,
    and on two ranks it takes more memory than stage 0.

    `frozen` and `trainable` count parameters; `tokens` are those of one slice, padding included, and `answer_tokens`
    those that have logits; `full` says that the backbone itself is trained. Activations: per layer and token about 34
    widths without attention scores (Korthikanti et al. 2022, section 4, for 16 bit; twice that in 32), one width with
    gradient checkpointing, and a slice's logits.
    """
    size = BYTES[precision]
    full16 = full and precision == "bf16"
    trained_size = 2 if full16 else 4
    per_layer = (1 if gradient_checkpointing else 17) * size * sizes.hidden_size
    logits = 2 * 4 * sizes.vocab_size
    share = {part: workers if zero_stage >= least else 1 for part, least in (("gradients", 2), ("optimizer", 1))}
    return {
        "backbone": frozen * size,
        "adapter": trainable * trained_size,
        "gradients": trainable * trained_size // share["gradients"],
        "optimizer": trainable * (12 if full16 else 8) // share["optimizer"],
        "activations": int(tokens * sizes.num_layers * per_layer + answer_tokens * logits),
    }
