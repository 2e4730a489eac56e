"""Messages become prompt text, and text becomes token ids. Training and serving both go through here.

The format is part of an adapter: an adapter learns prompts of one form and must be asked in the same. Knows
nothing of files or models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.data import templates
from pedro.data.row_shapes import RowShape
from pedro.data.special_tokens import Prompt, as_text, encode_cut, marked, unmarked
from pedro.errors import BackboneError, ConfigError, DataError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Run = Callable[[str, Mapping[str, Any]], str]
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
LATER = ("pad_token", "unk_token", "special_tokens_in_content", "head_end")
_TEMPLATES = Path(__file__).parents[1] / "assets" / "formats"
RAW = "{% for message in messages %}{{ message.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"


@dataclass(frozen=True)
class PromptFormat:
    """How messages are written as a prompt: a Jinja template and the special tokens that it may name.

    `id` is raw, alpaca or chat. Adapter manifests hold `to_dict()`, so an adapter never depends on what the
    installed package would choose today. Content that spells special tokens is read as text, unless
    `special_tokens_in_content`. Where the system turn conditions the adapter, `head_end` are the token ids that end it
    (`conditioning.py`).
    """

    id: str
    template: str
    bos_token: str = ""
    eos_token: str = ""
    pad_token: str = ""
    unk_token: str = ""
    special_tokens_in_content: bool = False
    head_end: tuple[int, ...] = ()

    def prompt(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        run: Run = templates.render,
        tools: Tools = (),
        answer_follows: bool = True,
    ) -> Prompt:
        """The prompt for `encode_prompt`, up to where the answer begins, or all of a conversation that needs none.

        Raises DataError as `render` does.
        """
        if self.special_tokens_in_content:
            return Prompt(self.render(messages, run, tools, answer_follows))
        kept, told, marker = marked(tokenizer, messages, self.template, tools)
        return unmarked(tokenizer, self.render(kept, run, told, answer_follows), marker)

    def raw_prompt(self, text: str, tokenizer: Tokenizer) -> Prompt:
        """A prompt that its sender rendered, for `encode_prompt`.

        The packaged templates write no control tokens, so all of it is content, as in training. Another template may
        write some, so its sender has: they are read as such, as vLLM does.
        """
        packaged = any(self.template == form.template for form in FORMATS.values())
        return as_text(tokenizer, text) if packaged and not self.special_tokens_in_content else Prompt(text)

    def render(
        self, messages: Messages, run: Run = templates.render, tools: Tools = (), answer_follows: bool = True
    ) -> str:
        """The prompt's text alone. Raises DataError when the template refuses the messages.

        `run` runs the template: here without bounds, which suits those of whom this process is.
        """
        try:
            return run(self.template, self.variables(messages, tools, answer_follows))
        except DataError as error:
            error.message = error.message.replace("the prompt format", f"the {self.id} prompt format")
            error.args = (error.message,)
            raise

    def variables(self, messages: Messages, tools: Tools = (), answer_follows: bool = True) -> dict[str, Any]:
        """What the template is told, as transformers' `apply_chat_template` tells it."""
        return {
            "messages": [dict(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": answer_follows,
            **{name: getattr(self, name) for name in TOKENS},
        }

    def to_dict(self) -> dict[str, Any]:
        """As manifests hold it; what is at its default and came later than the first release is left out."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PromptFormat:
        """The format that a manifest holds. Raises DataError naming a field that is missing or of another type."""
        missing = [name for name in ("id", "template") if not fields.get(name)]
        if missing:
            raise DataError(f"prompt_format: lacks {', '.join(missing)}", param="prompt_format")
        given = {name: fields[name] for name in ("id", "template", *TOKENS) if fields.get(name) is not None}
        wrong = [name for name, value in given.items() if not isinstance(value, str)]
        plain = fields.get("special_tokens_in_content") or False
        if not isinstance(plain, bool):
            wrong.append("special_tokens_in_content")
        end = fields.get("head_end") or ()
        if not isinstance(end, list | tuple) or any(type(token) is not int for token in end):
            wrong.append("head_end")
        if wrong:
            raise DataError(f"prompt_format: {', '.join(wrong)}: of another type than expected", param="prompt_format")
        return cls(**given, special_tokens_in_content=plain, head_end=tuple(end))


_SYSTEM, _USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which card did I lose?"}
_TURN = (_USER, {"role": "assistant", "content": "The blue one."})
SAMPLES = ((_USER,), (_SYSTEM, _USER), (*_TURN, _USER), (_SYSTEM, *_TURN * 20, _USER))
FORMATS: dict[str, PromptFormat] = {
    "raw": PromptFormat("raw", RAW),
    "alpaca": PromptFormat("alpaca", (_TEMPLATES / "alpaca.jinja").read_text()),
    "chat": PromptFormat("chat", (_TEMPLATES / "chat.jinja").read_text()),
}
FORMAT_OF_SHAPE = {
    RowShape.COMPLETION: "raw",
    RowShape.ALPACA: "alpaca",
    RowShape.MESSAGES: "chat",
    RowShape.SHAREGPT: "chat",
    RowShape.PREFERENCE: "chat",
    RowShape.PREFERENCE_TEXT: "raw",
}


SLOT = "{prompt}"


def check_slot(text: str) -> str:
    """A text around prompts, if it has one place for them. Raises ConfigError."""
    if text.count(SLOT) != 1 or text.strip() == SLOT:
        raise ConfigError(
            f"data.template: expected text with {SLOT} in it once, such as 'Text: {SLOT}\\nIntent:', got {text!r:.80}",
            param="data.template",
        )
    return text


def around(form: PromptFormat, text: str) -> PromptFormat:
    """The raw format with `text` around each prompt, in training and in serving: `Text: {prompt}\\nIntent:`.

    Raises DataError for another format, whose template is around its prompts already.
    """
    if form.id != "raw":
        raise DataError(
            f"data.template: is for rows of prompt and completion; these have the {form.id} format, which brings its "
            "own; leave it out",
            param="data.template",
        )
    before, _, after = check_slot(text).partition(SLOT)
    return replace(form, template=f"{{{{ {json.dumps(before)} }}}}{RAW}{{{{ {json.dumps(after)} }}}}")


def format_for_shape(shape: RowShape | str, tokenizer: Tokenizer | None = None) -> PromptFormat:
    """The format in which a file of this shape trains: `chat` is the tokenizer's own template where it has one."""
    name = FORMAT_OF_SHAPE[RowShape(shape)]
    if name != "chat" or tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return FORMATS[name]
    template = _default_template(tokenizer)
    named = [name for name in TOKENS if name not in LATER or name in template]
    return PromptFormat.from_dict(
        {"id": "chat", "template": template, **{name: getattr(tokenizer, name) for name in named}}
    )


def _default_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template; of several named ones, `default`. Raises BackboneError where none is."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template or ()))
        raise BackboneError(
            f"chat_template: the tokenizer has templates named {names}, and none is named 'default'; "
            "name the one that chats use so",
            param="backbone",
        ) from None


def check_format(form: PromptFormat) -> PromptFormat:
    """The format, if its template keeps within bounds on conversations like any other.

    Raises TemplateBoundsError, or DataError for a template that cannot be read. One that refuses all of the
    conversations is taken: it may want others.
    """
    from pedro.data.template_worker import TemplateBoundsError, TemplateWorker

    if any(form.template == packaged.template for packaged in FORMATS.values()):
        return form
    worker = TemplateWorker()
    try:
        for messages in SAMPLES:
            try:
                form.render(messages, worker.render)
            except DataError as error:
                if isinstance(error, TemplateBoundsError) or error.param == "prompt_format":
                    raise
    finally:
        worker.close()
    return form


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt: BOS once in front, where the tokenizer has one."""
    return encode_prompts(tokenizer, [text])[0]


def encode_completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of an answer, EOS at the end. Tokenised apart from the prompt, so no token spans the two."""
    return encode_completions(tokenizer, [text])[0]


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of many texts at once, which the tokenizer spreads over the cores.

    A `Prompt` is read as it was made, special tokens in its content as text; in any other text they are themselves.
    """
    bos = tokenizer.bos_token_id
    return [ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in _encode(tokenizer, texts)]


def encode_completions(
    tokenizer: Tokenizer, texts: Sequence[str], special_tokens_in_content: bool = False
) -> list[list[int]]:
    """`encode_completion` of many texts at once. Raises DataError where the tokenizer has no EOS.

    An EOS that an answer spells at its very end is its EOS; any other special token that it spells is text. A `Prompt`
    is an answer that a format wrote: it is read as it was made.
    """
    eos, spelled = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is None:
        raise DataError("tokenizer: has no eos_token, so an answer could never end; set one", param="tokenizer")
    if not special_tokens_in_content:
        texts = [
            text if isinstance(text, Prompt) else as_text(tokenizer, text.removesuffix(spelled or "")) for text in texts
        ]
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in _encode(tokenizer, texts)]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text with nothing put in front or behind."""
    return _encode(tokenizer, [text])[0]


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [
        encode_cut(tokenizer, text, text.cuts) if isinstance(text, Prompt) and text.cuts else ids
        for text, ids in zip(texts, rows, strict=True)
    ]
