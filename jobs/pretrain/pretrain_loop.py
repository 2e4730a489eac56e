"""Next-token training on packed windows: step, look at held-out text, checkpoint.

Every batch is a function of (seed, step), so a run that was stopped and resumed is the uninterrupted one as long as
the clock does not decide when the decay begins. A checkpoint is one safetensors file: parameters, what the
optimizers remember, and the state as JSON in its header.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from jobs.pretrain.atomic_files import replacing
from jobs.pretrain.optimizer import Muon
from pedro.errors import TrainingError

if TYPE_CHECKING:
    from jobs.pretrain.schedule import Schedule
    from jobs.pretrain.token_windows import Stream

CHECKPOINT = "checkpoint.safetensors"
BETAS = (0.9, 0.95)
SPEED_OVER = 30  # steps that the speed is taken over


@dataclass(frozen=True)
class PretrainSettings:
    """A step is `rows` windows, `micro_rows` at a time. The schedule's rate is Muon's; AdamW's is a share of it."""

    schedule: Schedule
    rows: int
    micro_rows: int
    adamw_ratio: float = 0.15
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 10
    look_every: int = 100
    checkpoint_seconds: float = 120.0
    compiled: bool = False


@dataclass
class PretrainState:
    """Where a run stands. `losses` and `looks` are [tokens, value(s)]; `seconds` counts training alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings and norms; both follow one schedule."""

    def __init__(self, model: torch.nn.Module, weight_decay: float) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        matrices = [p for p, name in self.names.items() if p.ndim == 2 and "embed" not in name]
        others = [p for p, name in self.names.items() if p.ndim != 2 or "embed" in name]
        self.all = (
            Muon(matrices, weight_decay=weight_decay),
            torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0),
        )
        self.owner = {**dict.fromkeys(matrices, self.all[0]), **dict.fromkeys(others, self.all[1])}

    def step(self, *rates: float) -> None:
        """One update at these learning rates, Muon's first; the gradients are gone after it."""
        for optimizer, rate in zip(self.all, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the optimizers remember, as `<key>|<parameter>`."""
        remembered = {}
        for parameter, name in self.names.items():
            for key, value in self.owner[parameter].state[parameter].items():
                remembered[f"{key}|{name}"] = value.detach().cpu().contiguous()
        return remembered

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up again what `tensors` gave; other entries are left alone."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for entry, value in tensors.items():
            key, bar, name = entry.partition("|")
            if bar:
                parameter = parameters[name]
                device = "cpu" if key == "step" else parameter.device  # as AdamW keeps it
                self.owner[parameter].state[parameter][key] = value.to(device)


def pretrain(
    model: torch.nn.Module,
    stream: Stream,
    settings: PretrainSettings,
    folder: Path,
    look: Callable[[torch.nn.Module], dict[str, float]],
    *,
    decay_now: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = print,
) -> PretrainState:
    """Train until the schedule is over or `stopped` says so; the state that is also in `folder`'s checkpoint.

    Raises TrainingError for a loss of NaN or infinity and for a checkpoint that cannot be read.
    """
    optimizers = Optimizers(model, settings.weight_decay)
    state = read_checkpoint(folder, model, optimizers)
    run: Any = torch.compile(model) if settings.compiled else model
    schedule, recent = settings.schedule, deque([(state.tokens, state.seconds)], maxlen=SPEED_OVER)
    if schedule.is_over(state.tokens, state.decay_from):
        log(f"the run in {folder} is over after {state.tokens:,} tokens; for another one use a new --out")
        return state
    saved = time.monotonic()
    while not schedule.is_over(state.tokens, state.decay_from) and not stopped():
        speed = _speed(recent)
        if state.decay_from is None and (decay_now or schedule.decay_is_due(state.tokens, state.seconds, speed)):
            state.decay_from = state.tokens
            log(f"decay from {state.tokens:,} tokens for {schedule.decay_tokens(state.tokens):,}")
        began = time.monotonic()
        rate = schedule.rate(state.tokens, state.decay_from)
        loss = _step(run, optimizers, stream, settings, state.step, rate)
        state.step += 1
        state.tokens += settings.rows * stream.context
        state.seconds += time.monotonic() - began
        recent.append((state.tokens, state.seconds))
        if state.step % settings.log_every == 0:
            state.losses.append((state.tokens, round(loss, 4)))
            done = f"step {state.step}  {state.tokens:,} tokens  {_speed(recent):,.0f} tok/s"
            log(f"{done}  loss {loss:.3f}  lr {rate:.2e}")
        if state.step % settings.look_every == 0:
            state.looks.append((state.tokens, look(model)))
            log(
                "held out, bits/char: " + "  ".join(f"{name} {value:.3f}" for name, value in state.looks[-1][1].items())
            )
        if time.monotonic() - saved > settings.checkpoint_seconds:
            write_checkpoint(folder, model, optimizers, state)
            saved = time.monotonic()
    write_checkpoint(folder, model, optimizers, state)
    return state


def _step(
    model: torch.nn.Module, optimizers: Optimizers, stream: Stream, settings: PretrainSettings, step: int, rate: float
) -> float:
    """One update; its mean loss in nats a token."""
    model.train()
    device = next(model.parameters()).device
    batch = stream.batch(step * settings.rows, settings.rows).to(device)  # [B, T+1]
    total = 0.0
    for ids in batch.split(settings.micro_rows):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [b, T, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()) * (len(ids) / len(batch))
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise TrainingError(
            f"loss: it is {total} at step {step + 1}; start again with a lower --lr and a new --out", param="lr"
        )
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizers.step(rate, rate * settings.adamw_ratio)
    return total


def write_checkpoint(folder: Path, model: torch.nn.Module, optimizers: Optimizers, state: PretrainState) -> None:
    """Replace the folder's checkpoint, whole or not at all."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CHECKPOINT) as scratch:
        save_file({**tensors, **optimizers.tensors()}, str(scratch), {"state": json.dumps(asdict(state))})


def read_checkpoint(folder: Path, model: torch.nn.Module, optimizers: Optimizers) -> PretrainState:
    """Load the folder's checkpoint; a fresh state where there is none. Raises TrainingError if it is damaged."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return PretrainState()
    try:
        with safe_open(str(path), framework="pt") as file:
            state = PretrainState(**json.loads(file.metadata()["state"]))
        tensors = load_file(str(path))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"checkpoint: {str(path)!r} is damaged ({error}); delete it to begin again", param="out"
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    optimizers.restore(tensors)
    return state


def _speed(recent: deque[tuple[int, float]]) -> float:
    """Tokens a second over the last steps; 0 before the first."""
    (tokens, seconds), (tokens_now, seconds_now) = recent[0], recent[-1]
    return (tokens_now - tokens) / (seconds_now - seconds) if seconds_now > seconds else 0.0
