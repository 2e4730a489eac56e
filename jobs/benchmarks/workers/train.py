"""A few steps of fine-tuning: our training loop, or transformers' Trainer with peft's LoRA, on the same encoded rows.

Both validate and write a checkpoint at the end, and then the adapter; loading the backbone is not timed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pedro.backbone import quiet
from pedro.methods import get_method
from pedro.training.batches import RowStream
from pedro.training.checkpoints import write_checkpoint
from pedro.training.context import build_context
from pedro.training.loop import train
from pedro.training.spec import FineTuneSpec
from pedro.training.worker import save_model

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine
    from pedro.training.loop import TrainState
    from pedro.training.worker_group import WorkerGroup

MANY = 1_000_000  # epochs, so that steps end a run


def spec_of(setup: Mapping[str, Any], method: str) -> FineTuneSpec:
    """The set-up's job with this method; steps on Θ count as steps."""
    steps = setup["steps"] // 2 if get_method(method).theta else setup["steps"]
    return FineTuneSpec.model_validate(
        {
            "tenant": "bench",
            "adapter": "speed",
            "backbone": setup["backbone"],
            "data": {"train": setup["train"], "validation": setup["validation"]},
            "method": {"name": method},
            "training": {
                "batch_size": setup["batch"],
                "max_steps": steps,
                "eval_every": steps,
                "patience": MANY,
                "lr": 1e-4,
                "packing": setup.get("packing", True),
            },
        }
    )


class OurTrainer:
    """Set-up: backbone, method, train and validation (files), batch, steps (to a run), threads, perhaps packing."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        quiet()
        self._folder = Path(tempfile.mkdtemp())
        self._context = build_context(spec_of(setup, setup["method"]), self._folder / "cache")

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One run from its first step to the adapter on disk."""
        context, folder = self._context, self._folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        outcome = train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        save_model(context, {}, folder / "adapter")
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "steps": outcome.optimizer_steps, "tok_s": outcome.all_tokens / seconds}

    def padding(self, steps: int) -> float:
        """Which share of the cells of so many padded batches is padding."""
        plan = self._context.plan
        stream = RowStream(self._context.data.train, plan.batch_size, plan.seed)
        sizes = [[len(row["input_ids"]) for row in stream.batch(k)] for k in range(steps)]
        return 1 - sum(map(sum, sizes)) / sum(max(batch) * len(batch) for batch in sizes)


class LocalCheckpoints:
    """A reporter that keeps checkpoints in a folder and says nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def resume(self, engine: StepEngine, group: WorkerGroup) -> None:
        """There is nothing to resume."""

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        write_checkpoint(self._folder / str(state.step), engine, group, state, best)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nobody reads them."""

    def line(self, text: str) -> None:
        """Nobody reads it."""


class HfTrainer:
    """Transformers' Trainer with peft, as their documentation has it; the set-up is ours, the method always LoRA."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from peft import get_peft_model

        from pedro.backbone import load_config, load_model, load_tokenizer, resolve_backbone
        from pedro.training.prepare import prepare_data

        torch.set_num_threads(setup["threads"])
        quiet()
        self._setup, self._folder, self._tokens = setup, Path(tempfile.mkdtemp()), 0
        backbone = resolve_backbone(setup["backbone"])
        self._tokenizer: Any = load_tokenizer(backbone)
        spec = spec_of(setup, "lora")
        train_rows, _, validation = prepare_data(spec, backbone, self._tokenizer, self._folder / "cache").splits(False)
        self._rows = [_labelled(rows) for rows in (train_rows, validation)]
        config = get_method("lora").config(load_config(backbone), {})
        assert config is not None, "LoRA has a config"
        self._model: Any = get_peft_model(load_model(backbone), config)
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One run from its first step to the adapter on disk."""
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        steps, batch = self._setup["steps"], self._setup["batch"]
        arguments = TrainingArguments(
            output_dir=str(self._folder / "run"),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=steps,
            learning_rate=1e-4,
            warmup_steps=round(0.06 * steps),
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=steps,
            save_steps=steps,
            prediction_loss_only=True,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=self._model,
            args=arguments,
            train_dataset=self._rows[0],
            eval_dataset=self._rows[1],
            data_collator=DataCollatorForSeq2Seq(self._tokenizer, label_pad_token_id=-100),
        )
        shutil.rmtree(self._folder / "run", ignore_errors=True)
        self._tokens = 0
        began = time.perf_counter()
        trainer.train()
        trainer.save_model(str(self._folder / "run" / "adapter"))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "steps": steps, "tok_s": self._tokens / seconds}

    def _count(self, model: torch.nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if model.training:
            self._tokens += int(given["attention_mask"].sum())


def _labelled(rows: Any) -> Any:
    """The rows as the Trainer reads them: prompts are no labels."""
    return rows.map(
        lambda row: {
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": [-100] * row["prompt_len"] + row["input_ids"][row["prompt_len"] :],
        },
        remove_columns=[name for name in rows.column_names if name != "input_ids"],
    )
