"""What `pedro backbones show` and `remove` say of a backbone: sizes, memory, chat template, kernel, adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, load_config, load_tokenizer, resolve_backbone
from pedro.backbones.facts import Facts, read_facts
from pedro.backbones.kept import Origin, read_origin
from pedro.cli.output import printable

if TYPE_CHECKING:
    from pedro.config import Settings

ROWS, TOKENS, ANSWER = 16, 128, 16  # of the batch whose memory is told
RANK = 12
FLOAT32 = 4  # bytes
MESSAGES = ({"role": "user", "content": "What is the capital of France?"},)
SHOWN = 2_000  # characters of a rendered prompt


@dataclass(frozen=True)
class BackboneReport:
    """All that is told of a backbone."""

    name: str
    directory: str
    digest: str
    tokenizer_digest: str
    facts: Facts
    origin: Origin | None
    training_bytes: dict[str, int]
    """Of one worker with PEDRO on a batch of ROWS rows, by part."""
    serving_bytes: dict[str, int]
    """Of one replica: weights, keys and values of a token and of a full batch of the whole context, kept prompts."""
    kernel: str
    """native or torch, and why not native."""
    prompt: str | None
    """An example as its chat template writes it; None where it has none."""
    adapters: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        facts, origin = self.facts, self.origin
        source = f"{origin.kind} {origin.source}" if origin else "packaged, or a directory of yours"
        shape = f"{facts.layers} layers of width {facts.width}, {facts.heads} heads ({facts.kv_heads} of keys), "
        lines = [
            f"{self.name}: {facts.architecture}, {facts.parameters:,} parameters",
            f"directory    {self.directory}",
            f"source       {source}",
        ]
        if origin:
            notes = [("file", origin.file), ("sha256", origin.sha256), ("revision", origin.revision)]
            notes += [("quantised", origin.quantisation), ("licence", origin.licence), ("made", origin.created)]
            lines += [f"  {label:<11}{value}" for label, value in notes if value]
        train, serve = self.training_bytes, self.serving_bytes
        lines += [
            f"digest       {self.digest}",
            f"tokenizer    {self.tokenizer_digest}",
            f"shape        {shape}feed-forward {facts.ffn}, vocabulary {facts.vocabulary:,}"
            + (", tied embeddings" if facts.tied_embeddings else ""),
            f"weights      {_size(facts.bytes)} on disk ({facts.dtype})",
            f"context      {facts.context:,} tokens",
            f"to train     about {_size(sum(train.values()))}: PEDRO r={RANK} in float32, batches of {ROWS} rows of "
            f"{TOKENS} tokens, the worker's process included",
            f"to serve     {_size(serve['weights'])} of weights in float32, {_size(serve['token'])} for each token of "
            f"running requests (at most {_size(serve['full_batch'])}, 32 of the whole context, and half of what is "
            f"then free: --kv-memory) and of what is kept of others (at most {_size(serve['prefix_cache'])}: "
            "--prefix-cache-mb)",
            f"kernel       {self.kernel}",
            "adapters     " + (", ".join(self.adapters) or "none registered for it"),
        ]
        if self.prompt is None:
            lines.append("chat         no template of its own; chats are written by pedro's")
        else:
            lines.append("chat         its own template; an example:")
            lines += [f"  | {line}" for line in printable(self.prompt[:SHOWN]).splitlines()]
        return "\n".join(lines)


def make_report(name: str, settings: Settings) -> BackboneReport:
    """The report on any backbone that a spec may name. Raises BackboneError for one that cannot be used."""
    backbone = resolve_backbone(name)
    facts = read_facts(backbone.directory)
    config = load_config(backbone)
    return BackboneReport(
        name=name,
        directory=str(backbone.directory),
        digest=backbone.digest,
        tokenizer_digest=backbone.tokenizer_digest,
        facts=facts,
        origin=read_origin(backbone.directory),
        training_bytes=_training_bytes(config),
        serving_bytes=_serving_bytes(config, facts),
        kernel=_kernel(config),
        prompt=_example(backbone),
        adapters=adapters_of(settings, backbone.digest),
    )


def adapters_of(settings: Settings, digest: str) -> list[str]:
    """Names of the registered adapters with a version that was trained on the backbone of this digest."""
    from pedro.registry import Registry

    # A home without a registry stays without one: looking creates nothing.
    database = settings.tracking_uri.removeprefix("sqlite:///")
    if database != settings.tracking_uri and not Path(database).is_file():
        return []
    return Registry.open(settings).store.adapters_of_backbone(digest)


def _training_bytes(config: Any) -> dict[str, int]:
    """By part, as the dry run estimates it."""
    import torch
    from transformers import AutoModelForCausalLM

    from pedro.methods.registry import count_parameters, get_method
    from pedro.training.estimate import PROCESS_BYTES
    from pedro.training.memory import Sizes, training_memory

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        counts = count_parameters(get_method("pedro").apply(model, {"r": RANK}))
    parts = training_memory(
        Sizes(config.hidden_size, config.num_hidden_layers, config.vocab_size),
        frozen=counts["total"] - counts["trainable"],
        trainable=counts["trainable"],
        precision="fp32",
        full=False,
        tokens=ROWS * TOKENS,
        answer_tokens=ROWS * ANSWER,
        gradient_checkpointing=False,
    )
    return {**parts, "process": PROCESS_BYTES}


def _serving_bytes(config: Any, facts: Facts) -> dict[str, int]:
    from pedro.serving.config import ServeConfig

    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    served = ServeConfig()
    token = 2 * config.num_hidden_layers * kv_heads * width * FLOAT32
    return {
        "weights": facts.parameters * FLOAT32,
        "token": token,
        "full_batch": token * (facts.context or 0) * served.max_batch,
        "prefix_cache": int(served.prefix_cache_mb * 2**20),
    }


def _kernel(config: Any) -> str:
    from pedro.engine import native_model

    if why := native_model.unfit(config):
        return f"torch ({why})"
    return "native, on a CPU in float32; torch elsewhere"


def _example(backbone: Backbone) -> str | None:
    from pedro.data.prompt_format import format_for_shape
    from pedro.data.row_shapes import RowShape
    from pedro.data.template_worker import TemplateWorker

    tokenizer = load_tokenizer(backbone)
    if not tokenizer.chat_template:
        return None
    worker = TemplateWorker()
    try:
        return format_for_shape(RowShape.MESSAGES, tokenizer).render(MESSAGES, worker.render)
    finally:
        worker.close()


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
