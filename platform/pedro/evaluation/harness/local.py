"""lm-eval on a saved adapter, or a bare backbone, in this process: `--model pedro-local`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pedro.backbone import context_length, load_model, load_tokenizer, resolve_backbone
from pedro.data.prompt_format import FORMATS, encode_completions
from pedro.errors import ConfigError
from pedro.evaluation import scoring
from pedro.evaluation.harness.base import (
    GenerationRequest,
    HarnessModel,
    ScoringRequest,
    check_generation_prompt,
    whole,
)
from pedro.evaluation.saved import load_saved, open_saved


class LocalModel(HarnessModel):
    """`adapter` is an adapter's directory, or `backbone` the name of a backbone without one.

    Raises ConfigError for neither or both, AdapterError or BackboneError for what cannot be loaded.
    """

    def __init__(
        self,
        adapter: str | None = None,
        backbone: str | None = None,
        batch_size: int | str = 32,
        dtype: str = "float32",
        device: str | None = None,
        answers: str = "joined",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(answers)
        if (adapter is None) == (backbone is None):
            raise ConfigError("adapter: give the directory of one, or backbone=NAME for none", param="adapter")
        self.batch_size = whole(batch_size, "batch_size")
        at = device or "cpu"
        if adapter is not None:
            directory = Path(adapter)
            resolved, manifest, self.format = open_saved(directory)
            self.model = load_saved(directory, manifest, resolved, dtype, at)
        else:
            resolved = resolve_backbone(str(backbone))
            self.model, self.format = load_model(resolved, dtype, at), FORMATS["raw"]
        self.tokenizer = load_tokenizer(resolved)
        self.bos, self.max_length = self.tokenizer.bos_token_id, context_length(resolved)
        self._name = f"{resolved.id} {resolved.tokenizer_digest}"

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_completions(self.tokenizer, texts) if texts else []

    def score(self, rows: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
        """Rows of like length share a batch."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        ready = [{"input_ids": rows[i].ids, "prompt_len": rows[i].conditioning_length} for i in order]
        scores = scoring.answer_logprobs(self.model, self.tokenizer, ready, self.batch_size)
        placed = dict(zip(order, scores, strict=True))
        return [placed[index] for index in range(len(rows))]

    def generate(self, rows: Sequence[GenerationRequest]) -> list[str]:
        ready = [{"input_ids": row.ids, "prompt_len": len(row.ids)} for row in rows]
        limit, stops = rows[0].max_tokens, rows[0].stops
        return scoring.generate(self.model, self.tokenizer, ready, limit, self.batch_size, stops=stops)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the adapter was trained to read them."""
        check_generation_prompt(add_generation_prompt)
        return self.format.render(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.format.template

    @property
    def tokenizer_name(self) -> str:
        return self._name
