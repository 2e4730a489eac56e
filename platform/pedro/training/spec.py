"""The spec of a fine-tuning job: the YAML of `pedro submit`, validated and immutable.

Unknown keys are refused, and all mistakes reported together. Each method checks its options when a job is resolved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pedro.backbone import locate_backbone
from pedro.config import Settings, check_name
from pedro.errors import ConfigError
from pedro.refs import FILE_ID, ModelRef
from pedro.spec_reader import Frozen, load_spec
from pedro.training.allowed_files import check_allowed_backbones, check_allowed_files, typed_fields
from pedro.training.quantised_check import why_whole
from pedro.training.sharing import why_alone

Share = Annotated[float, Field(ge=0, lt=1)]
FILES = ("train", "theta", "validation", "test")
LATER = ("b_up_lr_ratio",)  # keys of `training` that earlier versions did not have; none is the default of each
PACKAGED = "pedro://"
ASSETS = Path(__file__).parents[1] / "assets"


class Section(Frozen):
    """Leaves out the keys of `since` if they have the defaults given there: digests of earlier specs lack them."""

    since: ClassVar[dict[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.since or value != self.since[key]}


class DataSpec(Frozen):
    """The tenant's files (JSONL, a JSON array, CSV or parquet): paths, relative to the spec's folder; ids of files that
    the tenant uploaded (`file-…`); or `pedro://demo/...` for packaged data.
    """

    train: str
    """Training rows."""
    theta: Share | str = 0.1
    """Rows of the Θ steps: a share of train or a file. Methods without Θ also train on it."""
    validation: Share | str = 0.1
    """Rows for early stopping and selecting the best checkpoint: a share of train or a file; 0 means none."""
    test: str | None = None
    """Rows of the gate and the reported metrics; default: validation."""
    special_tokens_in_content: bool = False
    """Whether `</s>` and the like in a row's text are parsed as special tokens, in training and serving; else they are
    plain text."""
    template: str | None = None
    """The text around each prompt of a file of prompts and completions, in training and serving: `Text: {prompt}`, a
    line break, `Intent:`. Every prompt then ends with the same token, which PEDRO reads."""
    fields: dict[str, str] = Field(default_factory=dict)
    """The files' column names, if they differ from the field names: {prompt: question}."""

    @field_validator("template")
    @classmethod
    def _has_a_slot(cls, value: str | None) -> str | None:
        from pedro.data.prompt_format import check_slot

        try:
            return value if value is None else check_slot(value)
        except ConfigError as error:
            raise ValueError(error.message.partition(": ")[2]) from error

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, value: dict[str, str]) -> dict[str, str]:
        from pedro.data.lines import check_fields

        try:
            return check_fields(value)
        except ConfigError as error:
            raise ValueError(error.message.partition(": ")[2]) from error

    @model_validator(mode="after")
    def _something_left(self) -> DataSpec:
        cut = sum(part for part in (self.theta, self.validation) if isinstance(part, float))
        if cut >= 1:
            raise ValueError(f"theta and validation together take {cut:g} of train; leave some rows to train on")
        return self

    def files(self) -> dict[str, str]:
        """The files by role."""
        return {name: value for name in FILES if isinstance(value := getattr(self, name), str)}

    def located(self, base: Path) -> DataSpec:
        """The same with absolute paths: relative ones start at `base`, `pedro://` ones at the package's assets."""
        return self.model_copy(update={name: _located(base, value) for name, value in self.files().items()})


class MethodSpec(BaseModel):
    """A method of `pedro.methods` and its options, side by side: `{name: pedro, r: 12}`.

    `{peft_type: VERA, r: 64}` means `{name: peft, peft_type: VERA, r: 64}`: any method of PEFT with its own options.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = "pedro"
    """A name listed by `pedro methods`; the method's options are given beside it."""

    @model_validator(mode="before")
    @classmethod
    def _by_peft_type(cls, value: Any) -> Any:
        return {"name": "peft", **value} if isinstance(value, dict) and "peft_type" in value else value

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class TrainingSpec(Section):
    """The optimisation; defaults are the paper's setup (section 4.3) where it names one."""

    since: ClassVar[dict[str, Any]] = {"packing": True, "backbone_dtype": None}

    epochs: float | None = Field(10.0, gt=0, le=100_000)
    """Passes over train; if null, or if only `max_steps` is given, `max_steps` ends training."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Maximum number of Ω steps; if `epochs` is also given, whichever ends first."""
    lr: float = Field(1e-4, gt=0, le=100)
    """Learning rate of Ω, and of Θ without `theta_lr`; small backbones need more than the paper's 1e-4."""
    batch_size: int = Field(16, ge=1, le=10**6)
    """Rows per optimizer step, over all workers."""
    gradient_accumulation: int = Field(1, ge=1, le=10**6)
    """Number of slices into which a worker splits its share of a batch, to save memory; the result is the same."""
    max_length: int | None = Field(None, ge=2, le=10**8)
    """Tokens of prompt and answer together; the backbone's context if not given."""
    packing: bool = True
    """On a CPU, pass no padding through the backbone, wherever that saves something and the method allows it. Each row
    keeps its own prompt and vectors, so that only rounding differs; false pads every batch."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the steps with linear warm-up of the learning rate, before linear decay to zero."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    """Decoupled weight decay (AdamW), on Ω only."""
    clip: float = Field(1.0, ge=0, le=10**6)
    """Maximum gradient norm; 0 disables clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the frozen backbone. The adapter's parameters are always float32."""
    backbone_dtype: Literal["int8", "nf4"] | None = None
    """Keep the projections' weights in 8 or 4 bit and restore them to `precision` for each use: less memory, slower."""
    bilevel: bool = True
    """Alternate Ω steps on train with Θ steps on theta (eq. 8); false trains both together on both."""
    theta_every: int = Field(1, ge=1, le=10**9)
    """Ω steps between Θ steps."""
    theta_lr: float | None = Field(None, gt=0, le=100)
    """Learning rate of Θ; default: `lr`. If `lr` is above 1e-4, set this to 1e-4: 1e-3 costs up to 11 points."""
    b_up_lr_ratio: float | None = Field(None, gt=0, le=1000)
    """Factor on the learning rate of b_up in equation 6, which is an (IA)³ by itself; default 1."""
    eval_every: int = Field(200, ge=0, le=10**9)
    """Ω steps between validations; 0 means once per epoch."""
    eval_rows: int = Field(2000, ge=1, le=10**9)
    """Maximum number of validation rows."""
    patience: int = Field(10, ge=1, le=10**9)
    """Validations without improvement after which training stops."""
    checkpoint_every: int = Field(0, ge=0, le=10**9)
    """Ω steps between checkpoints; 0 means at each validation."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the adapter's initial values, the order of rows and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, value: Any) -> Any:
        """With `max_steps`, the default of `epochs` must not end training earlier; resolved specs set it to None."""
        if isinstance(value, dict) and value.get("max_steps") is not None and "epochs" not in value:
            return {**value, "epochs": None}
        return value

    def to_dict(self) -> dict[str, Any]:
        """As JSON; keys added after the first results are omitted at their defaults, since ids are derived from it."""
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if value is not None or name not in LATER
        }

    @model_validator(mode="after")
    def _ends(self) -> TrainingSpec:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("epochs is null and max_steps not given, so training would never end; give one of them")
        return self


class ResourcesSpec(Section):
    """What the job takes of the cluster."""

    since: ClassVar[dict[str, Any]] = {"share": False}

    workers: int = Field(1, ge=1, le=4096)
    """Processes that share each batch."""
    cpus_per_worker: float = Field(1, gt=0, le=4096)
    """CPUs that Ray reserves per worker."""
    gpus_per_worker: float = Field(0, ge=0, le=64)
    """GPUs that Ray reserves per worker; 0 trains on the CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards: nothing, optimizer state, also gradients, also parameters."""
    max_failures: int = Field(3, ge=0, le=1000)
    """How often lost workers are replaced, resuming from the last checkpoint."""
    share: bool = False
    """Whether the job may train in one worker with others of its tenant that are queued at the same time, also share
    and have the same backbone, method and resources: one pass over the backbone serves the rows of all."""


class GateSpec(Section):
    """When a new version becomes champion: against the champion on the same rows, or the backbone if there is none."""

    since: ClassVar[dict[str, Any]] = {"evidence": "not_worse", "level": 0.05}

    metric: Literal["accuracy", "loss", "preference_accuracy"] = "accuracy"
    """The metric: exact match of generated answers, or the mean loss per answer token; with objective dpo the share of
    pairs whose better answer the adapter favours more than the backbone does (its default), or the mean loss per
    pair."""
    min_gain: float = Field(-0.005, ge=-1e6, le=1e6)
    """Minimum improvement over the champion; a small negative number accepts an equal version."""
    floor: float | None = None
    """Minimum value in any case (for loss: the maximum)."""
    max_rows: int = Field(1000, ge=1, le=10**9)
    """Maximum number of scored rows."""
    evidence: Literal["none", "not_worse", "better"] = "not_worse"
    """What a paired test on these rows must show besides the gain: nothing; that the version is not significantly worse
    than the champion; or that it is significantly better."""
    level: float = Field(0.05, gt=0, lt=0.5)
    """One-sided significance level of that test."""


class DPOSpec(Frozen):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

    beta: float = Field(0.1, gt=0, le=100)
    """Penalty on deviating from the backbone: the higher, the closer the adapter stays to it."""


class FineTuneSpec(Frozen):
    """One fine-tuning job."""

    tenant: str
    """The adapter's owner; the first part of its name."""
    adapter: str
    """The second part of its name, `tenant.adapter`."""
    backbone: str = "stories260K"
    """A name from `pedro backbones list`, a transformers directory, or a hub id."""
    data: DataSpec
    parent: str | None = None
    """A version of the tenant (`acme.voice`, `acme.voice:3`) whose weights and method training starts from; default: a
    fresh adapter."""
    objective: Literal["supervised", "dpo"] = "supervised"
    """What is trained: the rows' answers, or which of a row's two answers is better (dpo)."""
    dpo: DPOSpec = DPOSpec()
    """Of objective dpo."""
    method: MethodSpec = MethodSpec()
    training: TrainingSpec = TrainingSpec()
    resources: ResourcesSpec = ResourcesSpec()
    gate: GateSpec = GateSpec()

    @field_validator("tenant", "adapter")
    @classmethod
    def _name(cls, value: str, info: Any) -> str:
        try:
            return check_name(info.field_name, value)
        except ConfigError as error:
            raise ValueError(error.message.partition(": ")[2].partition(" is ")[2]) from error

    @model_validator(mode="before")
    @classmethod
    def _gate_of_preferences(cls, value: Any) -> Any:
        """With dpo, a gate without a metric compares the accuracy on preferences."""
        gate = (value.get("gate") or {}) if isinstance(value, dict) and value.get("objective") == "dpo" else None
        if isinstance(gate, dict) and "metric" not in gate:
            return {**value, "gate": {**gate, "metric": "preference_accuracy"}}
        return value

    @model_validator(mode="after")
    def _one_objective(self) -> FineTuneSpec:
        preferences = self.objective == "dpo"
        if not preferences and "dpo" in self.model_fields_set:
            raise ValueError("dpo: only for objective dpo; set objective: dpo, or leave it out")
        if preferences and self.parent:
            raise ValueError(
                "parent: objective dpo starts from a fresh adapter, since it compares with the backbone; leave it out"
            )
        if preferences and self.method.name == "full":
            raise ValueError(
                "objective: dpo compares an adapter with its backbone, which method full changes; use another method"
            )
        if self.gate.metric == ("accuracy" if preferences else "preference_accuracy"):
            known = "preference_accuracy or loss" if preferences else "accuracy or loss"
            raise ValueError(f"gate.metric: {self.gate.metric} is not measured with {self.objective}; use {known}")
        return self

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without keys added later at their defaults, since digests of earlier specs were made without them."""
        fields: dict[str, Any] = handler(self)
        silent = [*(() if self.objective == "dpo" else ("objective", "dpo")), *(() if self.parent else ("parent",))]
        return {name: value for name, value in fields.items() if name not in silent}

    @model_validator(mode="after")
    def _every_worker_has_rows(self) -> FineTuneSpec:
        slices = self.resources.workers * self.training.gradient_accumulation
        if self.training.batch_size < slices:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}, fewer rows than workers × gradient_accumulation "
                f"= {slices}; raise batch_size to at least {slices}"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> FineTuneSpec:
        if self.resources.share and (why := why_alone(self)):
            raise ValueError(f"resources.share: {why}")
        if why := why_whole(self):
            raise ValueError(f"training.backbone_dtype: {why}")
        return self

    @property
    def beta(self) -> float | None:
        """DPO's β, None with another objective."""
        return self.dpo.beta if self.objective == "dpo" else None

    @property
    def ref(self) -> ModelRef:
        """What it trains."""
        return ModelRef(self.tenant, self.adapter)

    @property
    def name(self) -> str:
        """`tenant.adapter`, the name in the registry."""
        return self.ref.name

    def located(self, base: Path) -> FineTuneSpec:
        """The same spec with absolute paths; a backbone may also be in the working directory."""
        backbone = locate_backbone(self.backbone, base, Path.cwd())
        return self.model_copy(update={"data": self.data.located(base), "backbone": backbone})

    def to_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON; `FineTuneSpec.model_validate` parses it."""
        return self.model_dump(mode="json")


def load_finetune_spec(path: str | Path, overrides: Iterable[str] = ()) -> FineTuneSpec:
    """Read a spec file; its relative paths are relative to its folder, those of overrides to the working directory.

    Raises one ConfigError that lists every mistake.
    """
    overrides, folder = list(overrides), Path(path).absolute().parent
    spec = load_spec(path, [_locate_override(override) for override in overrides], FineTuneSpec).located(folder)
    check_data_files(spec.data, folder, overrides)
    check_backbones({"backbone": spec.backbone}, folder, overrides)
    return spec


def check_data_files(data: DataSpec, folder: Path, overrides: Iterable[str] = (), section: str = "data") -> None:
    """Raise ConfigError for a file that the spec in `folder` may not name; files of overrides may be anywhere."""
    files = {f"{section}.{role}": file for role, file in data.files().items()}
    check_allowed_files(files, Settings.from_env(), [folder, ASSETS], typed_fields(files, overrides))


def check_backbones(named: Mapping[str, str], folder: Path, overrides: Iterable[str] = ()) -> None:
    """Raise ConfigError for a backbone's directory that the spec in `folder` may not name, except by an override."""
    check_allowed_backbones(named, Settings.from_env(), [folder, ASSETS], typed_fields(named, overrides))


def _located(base: Path, file: str) -> str:
    if file.startswith(PACKAGED):
        path = (ASSETS / file.removeprefix(PACKAGED)).resolve()
        if not path.is_relative_to(ASSETS.resolve()):
            raise ConfigError(f"data: {file!r} is outside the packaged data", param="data")
        return str(path)
    return file if "://" in file or FILE_ID.fullmatch(file) else str(base / Path(file).expanduser())


def _locate_override(word: str) -> str:
    key, _, value = word.partition("=")
    if key == "backbone":
        return f"{key}={locate_backbone(value, Path.cwd())}"
    if key not in {f"data.{name}" for name in FILES} or value in ("", "null"):
        return word
    try:
        float(value)
    except ValueError:
        return f"{key}={_located(Path.cwd(), value)}"
    return word
