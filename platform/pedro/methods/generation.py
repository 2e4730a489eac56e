"""What generate() was called with: how wide its prompt is, and what no prompt-conditioned method can do in it."""

from __future__ import annotations

import warnings
from typing import Any

from pedro.errors import ConfigError

# options that read a prompt in another way than once and whole, and why that cannot be
REFUSED = {
    "prefill_chunk_size": "reads a prompt in one piece",
    "token_healing": "cannot tell a prompt that changes from its answer",
    "guidance_scale": "knows one prompt, and guidance reads a second one",
    "negative_prompt_ids": "knows one prompt, and guidance reads a second one",
    "cache_implementation": "takes one sequence a row, and a paged cache packs them",
}
HARMLESS: dict[str, tuple[Any, ...]] = {"guidance_scale": (1, 1.0), "token_healing": (False,)}


def prompt_width(given: dict[str, Any]) -> int:
    """Columns of the prompt, padding included, from the arguments of generate(); it makes a lone BOS if given none."""
    for name in ("inputs_embeds", "inputs", "input_ids"):
        if given.get(name) is not None:
            return int(given[name].shape[1])
    return 1


def check_generation(title: str, given: dict[str, Any], own: Any) -> None:
    """Raise ConfigError for an option of generate() that would let the answer condition the vectors.

    `given` are its arguments, `own` is the model's generation config. Warns where it continues from a filled cache.
    """
    for name, reason in REFUSED.items():
        value = _option(name, given, own)
        harmful = value == "paged" if name == "cache_implementation" else value not in (None, *HARMLESS.get(name, ()))
        if harmful:
            raise ConfigError(f"{name}: {title} {reason}; leave it out", param=name)
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0 and not _option("is_assistant", given, own):
        warnings.warn(
            "past_key_values: generation continues from a cache that was filled before, so the vectors stay those of "
            "its first prompt; leave it out to condition them on all of input_ids",
            stacklevel=2,
        )


def _option(name: str, given: dict[str, Any], own: Any) -> Any:
    """An option of generate(): given by itself, in a generation_config, or in the model's own."""
    for value in (given.get(name), getattr(given.get("generation_config"), name, None), getattr(own, name, None)):
        if value is not None:
            return value
    return None
