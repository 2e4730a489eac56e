"""How chat templates write an assistant's calls of tools: by families, each known by what its templates spell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallSyntax:
    """A call is `before`, JSON with `name` and what `arguments` names, `after`; several are `listed` in one such frame,
    or stand below one another where `several`. `writable`: nothing of it is a special token."""

    name: str
    mark: str
    before: str
    after: str
    arguments: str = "arguments"
    listed: bool = False
    several: bool = True
    writable: bool = True


SYNTAXES = (
    CallSyntax("SmolLM2", "<tool_call>[", "<tool_call>[", "]</tool_call>", listed=True),
    CallSyntax("Mistral", "[TOOL_CALLS]", "[TOOL_CALLS][", "]", listed=True, writable=False),
    CallSyntax("Hermes", "<tool_call>", "<tool_call>\n", "\n</tool_call>"),  # Qwen's, too
    CallSyntax("Llama 3", '"parameters"', "", "", arguments="parameters", several=False),
)
OTHER_ARGUMENTS = "<function="  # within <tool_call>, in place of JSON: Qwen3-Coder's templates


def syntax_of(template: str) -> CallSyntax | None:
    """The family of a template; None where it is none that is known."""
    if OTHER_ARGUMENTS in template:
        return None
    return next((syntax for syntax in SYNTAXES if syntax.mark in template), None)
