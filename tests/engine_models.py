"""Small real backbones, adapters with a visible effect, and slow references, for the tests of the engine."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.engine import Engine, EngineConfig, Logprob, Output, Request, SamplingParams
from pedro.methods import get_method
from pedro.methods.adapter_files import save_adapter

if TYPE_CHECKING:
    from pedro.model_protocols import TokenDecoder, Tokenizer

DIGEST = "sha256:the-backbone"
VOCABULARY = 96
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "qwen2": {**GROUPED, **WINDOWED, "use_sliding_window": True},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **WINDOWED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, **WINDOWED, "query_pre_attn_scalar": 8},
    "phi3": {**GROUPED, "sliding_window": 6},
    "gpt2": {**BASE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**BASE, "intermediate_size": 48},
}


class Letters:
    """A tokenizer of one letter a token, for backbones that have none."""

    eos_token_id: int | None = None

    def decode(self, token_ids: list[int], /, **_options: Any) -> str:
        return "".join(chr(ord("A") + i) for i in token_ids)


def random_backbone(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A backbone of this architecture with random weights, large enough that tokens differ clearly."""
    options = {k: v for k, v in {**ARCHITECTURES[model_type], **changes}.items()}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def _launch(tuned: Any) -> None:
    """LoRA-Dash after its launch."""
    for layer in tuned.base_model.layers():
        layer.launch("default")


def _prune(tuned: Any) -> None:
    """AdaLoRA after its pruning: of each module other ranks are kept, of one none."""
    pattern = {}
    for number, (name, p) in enumerate((n, p) for n, p in tuned.base_model.model.named_parameters() if "lora_E" in n):
        kept = torch.arange(len(p)) < number % len(p)
        p.mul_(20 * kept[:, None])  # large enough to be seen
        pattern[name] = kept.tolist()
    tuned.peft_config["default"].rank_pattern = pattern


def _decide(tuned: Any) -> None:
    """A structure search that has ended: every third candidate is kept."""
    config = tuned.peft_config["default"]
    layers = list(tuned.base_model.layers())
    names = [f"{layer.index}.{part}.{t}" for layer in layers for part in ("lora", "shift") for t in config.targets]
    config.kept = tuple(names[::3])
    for layer in layers:
        layer.prune("default", config)


SETTLED = {"lora-dash": _launch, "adalora": _prune, "ssp": _decide}  # what the end of their training does


def make_adapter(
    model: nn.Module, directory: Path, seed: int, method: str = "pedro", digest: str = DIGEST, **options: Any
) -> nn.Module:
    """Save an adapter with random weights for `model`; gives the PEFT model that carries it, the slow reference."""
    torch.manual_seed(seed)
    tuned = get_method(method).apply(copy.deepcopy(model), options)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "pedro_up" in name else 0.05))
        SETTLED.get(method, lambda _tuned: None)(tuned)
    manifest = {"backbone": {"id": "test", "digest": digest}, "method": {"name": method, "options": options}}
    save_adapter(tuned, directory, manifest)
    return tuned.eval()


def make_engine(
    model: Any,
    tokenizer: TokenDecoder | None = None,
    load: Callable[[str], Path] | None = None,
    digest: str = DIGEST,
    **config: Any,
) -> Engine:
    """An engine over a copy of `model`, so that the original stays a reference."""

    def refuse(ref: str) -> Path:
        raise AssertionError(f"no adapter was expected, but {ref} was asked for")

    options = {"max_batch": 4, **config}
    return Engine(copy.deepcopy(model), tokenizer or Letters(), EngineConfig(**options), load or refuse, digest)


def stories() -> tuple[PreTrainedModel, Tokenizer, str]:
    """The embedded backbone: model, tokenizer, digest."""
    backbone = resolve_backbone("stories260K")
    return load_model(backbone), load_tokenizer(backbone), backbone.digest


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(2, VOCABULARY), k=length)


def request(name: str, prompt_ids: list[int], max_tokens: int = 8, **fields: Any) -> Request:
    """A request; fields of SamplingParams and of Request may be mixed."""
    own = {key: fields.pop(key) for key in list(fields) if key in Request.__dataclass_fields__}
    return Request(name, prompt_ids, params=SamplingParams(max_tokens=max_tokens, **fields), **own)


class Answer:
    """All outputs of one answer, joined."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[Logprob] = []
        self.last: Output | None = None
        self.outputs: list[Output] = []

    def take(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs or []
        self.last = output
        self.outputs.append(output)


Answers = dict[Any, Answer]
"""By request id, or by (id, index) where n > 1."""


def drain(engine: Engine, until: Callable[[Answers], object] | None = None, timeout_s: float = 60.0) -> Answers:
    """Step until nothing is left (or `until(answers)`)."""
    answers: Answers = {}
    end = time.monotonic() + timeout_s
    while engine.has_work() and not (until and until(answers)):
        assert time.monotonic() < end, "the engine did not finish in time"
        for output in engine.step():
            key = output.request_id if output.index == 0 else (output.request_id, output.index)
            answers.setdefault(key, Answer()).take(output)
        if engine.idle:
            time.sleep(0.002)
    return answers


def run(engine: Engine, *requests: Request) -> Answers:
    """Add the requests, run them to their ends; none may fail."""
    for one in requests:
        engine.add(one)
    answers = drain(engine)
    assert all(answer.last and answer.last.error is None for answer in answers.values())
    return answers


@torch.no_grad()
def reference_logits(model: Any, ids: list[int], prompt_length: int) -> torch.Tensor:
    """The logits of all positions [T, V] by one uncached forward, conditioned on the first `prompt_length` tokens."""
    conditioned = any(config.peft_type in ("PEDRO", "REFT") for config in getattr(model, "peft_config", {}).values())
    lens = {"prompt_lens": torch.tensor([prompt_length])} if conditioned else {}
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), **lens).logits[0]
    return logits


def reference_greedy(model: Any, prompt_ids: list[int], count: int, conditioning: int | None = None) -> list[int]:
    """Greedy tokens by a full recompute for each; stops early where the top two are too close to compare."""
    ids = list(prompt_ids)
    for _ in range(count):
        logits = reference_logits(model, ids, conditioning or len(prompt_ids))[-1]
        best = logits.topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            break
        ids.append(int(best.indices[0]))
    return ids[len(prompt_ids) :]
