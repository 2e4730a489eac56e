"""Messages become prompt text, and text becomes token ids. Training and serving both go through here.

The format is part of an adapter: an adapter learns prompts of one form and must be asked in the same. Knows
nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.data.shapes import Shape
from pedro.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATES = Path(__file__).parents[1] / "assets" / "formats"
RAW = "{% for message in messages %}{{ message.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"


@dataclass(frozen=True)
class PromptFormat:
    """How messages are written as a prompt: a Jinja template and the special tokens that it may name.

    `id` is raw, alpaca or chat. Adapter manifests hold `to_dict()`, so an adapter never depends on what the
    installed package would choose today.
    """

    id: str
    template: str
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the answer begins. Raises DataError when the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return _compile(self.template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(f"messages: the {self.id} prompt format refuses them: {error}", param="messages") from None

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, str]) -> PromptFormat:
        """The format that a manifest holds. Raises DataError naming a missing field."""
        missing = [name for name in ("id", "template") if not fields.get(name)]
        if missing:
            raise DataError(f"prompt_format: lacks {', '.join(missing)}", param="prompt_format")
        return cls(fields["id"], fields["template"], fields.get("bos_token") or "", fields.get("eos_token") or "")


FORMATS: dict[str, PromptFormat] = {
    "raw": PromptFormat("raw", RAW),
    "alpaca": PromptFormat("alpaca", (_TEMPLATES / "alpaca.jinja").read_text()),
    "chat": PromptFormat("chat", (_TEMPLATES / "chat.jinja").read_text()),
}
FORMAT_OF_SHAPE = {
    Shape.COMPLETION: "raw",
    Shape.ALPACA: "alpaca",
    Shape.MESSAGES: "chat",
    Shape.SHAREGPT: "chat",
}


def format_for_shape(shape: Shape | str, tokenizer: Any = None) -> PromptFormat:
    """The format in which a file of this shape trains: `chat` is the tokenizer's own template where it has one."""
    name = FORMAT_OF_SHAPE[Shape(shape)]
    if name != "chat" or tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return FORMATS[name]
    template = tokenizer.get_chat_template()
    return PromptFormat("chat", template, tokenizer.bos_token or "", tokenizer.eos_token or "")


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt: BOS once in front, where the tokenizer has one."""
    return encode_prompts(tokenizer, [text])[0]


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an answer, EOS at the end. Tokenised apart from the prompt, so no token spans the two."""
    return encode_completions(tokenizer, [text])[0]


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of many texts at once, which the tokenizer spreads over the cores."""
    bos = tokenizer.bos_token_id
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in rows]


def encode_completions(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode_completion` of many texts at once. Raises DataError where the tokenizer has no EOS."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("tokenizer: has no eos_token, so an answer could never end; set one", param="tokenizer")
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in rows]


@lru_cache(maxsize=256)
def _compile(source: str) -> Template:
    """A template as transformers compiles chat templates (utils/chat_template_utils.py), in Jinja's sandbox.

    `strftime_now` is left undefined on purpose: a prompt that holds today's date would differ from the trained one.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks answers for transformers; here it is just its content."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise DataError(f"prompt_format: the template cannot be read: {error}", param="prompt_format") from None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    import json

    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
