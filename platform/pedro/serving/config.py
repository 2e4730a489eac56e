"""Arguments of a server: which backbone, how large, on which device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pedro.config import Frozen
from pedro.process import parse_memory


class ServeConfig(Frozen):
    """Arguments of `build_app`; the same on the command line, in a Serve config file and in k8s manifests."""

    backbone: str = "stories260K"
    """A name of `pedro backbones list`, a transformers directory, or a hub id."""
    served_name: str | None = None
    """How requests name the bare backbone; its id, or the directory's name, if not given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the backbone's weights; the CPU kernel wants float32."""
    weights: Literal["float32", "int8", "int4"] = "float32"
    """What the CPU kernel keeps the backbone in; int8 and int4 are quantised at the start. It computes in float32 all
    the same, and adapters stay as they are."""
    device: str = "cpu"
    """cpu or cuda."""
    replicas: int = Field(1, ge=1)
    """Engine replicas, one a device."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Processes of one replica, each with its part of every layer and of every adapter, on one machine: for a backbone
    that no GPU holds whole. Each has a GPU of its own, or on a CPU its share of the threads."""
    gateways: int = Field(1, ge=1)
    """Gateway processes, which share the quotas through the database. Every node's proxy sends requests to any."""
    gateway_num_cpus: float = Field(0, ge=0)
    """CPUs that Ray sets aside for a gateway. Above 0, none lands on a node without CPUs, as a cluster's head should
    be; a head that has other nodes beside it when the server starts gets none in any case."""
    num_cpus: float = Field(0, ge=0)
    """CPUs that Ray sets aside for an engine replica; 0 shares them with training, which suits a laptop."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that Ray sets aside for an engine replica."""
    threads: int | None = Field(None, ge=1)
    """The most threads of an engine replica; if not given, the cores that affinity and the cgroup's quota grant it.
    On a CPU it uses fewer while busy neighbours keep some from running."""
    max_batch: int = Field(32, ge=1)
    """Sequences decoded together, at most."""
    speculate: Literal["off", "ngram"] = "off"
    """ngram: on a CPU, an answer's next tokens are looked up in its prompt and in itself, and several are checked in a
    step. Answers stay the same; those that quote their prompt come sooner. It rests where it does not pay."""
    num_speculative_tokens: int = Field(8, ge=1)
    """The most tokens of one guess."""
    prompt_lookup_max: int = Field(3, ge=1)
    """How many last tokens are looked up, at most."""
    prompt_lookup_min: int = Field(2, ge=1)
    """And at least."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of prompt and answer together; the backbone's context if not given."""
    max_waiting: int = Field(1024, ge=1)
    """Requests that may queue at a replica; more are answered 503."""
    request_timeout_s: float = Field(600, gt=0, le=86_400)
    """How long an answer may take; a request's `x-request-timeout` header (seconds) can ask for less, not for more."""
    tenant_weights: dict[str, float] = Field(default_factory=dict)
    """Shares of a busy engine by tenant, 1 where not named: {acme: 2} gives acme two tokens for another's one."""
    adapter_budget_mb: float = Field(512, gt=0)
    """Memory for resident adapters of a replica."""
    kv_memory: str | int | float | None = None
    """Memory of a replica for keys and values of running requests: 4GiB, say, or a share, up to 1.0, of what is free
    beside the weights. If not given, the replicas of a machine have 0.5 between them on a CPU, 0.8 on a GPU. Requests
    that find no room wait; what could never fit is refused."""
    prefix_cache_mb: float = Field(512, ge=0)
    """Memory of a replica for what was read, so that prompts which begin alike are read once; 0 keeps nothing."""
    share_bare_prefixes: bool = False
    """Let tenants find what others' requests to the bare backbone left: then the time to a first token tells a tenant
    whether somebody sent the same text before. Without it nothing passes between tenants."""
    max_file_mb: float = Field(512, gt=0)
    """Size of one uploaded file (`/v1/files`)."""
    max_tenant_files_mb: float = Field(10_240, gt=0)
    """Size of all files that a tenant keeps."""
    max_open_jobs: int = Field(100, ge=1)
    """Fine-tuning jobs of a tenant that have not ended; one more over HTTP is a 429."""
    watch_interval_s: float = Field(0.5, gt=0, le=10)
    """How often the registry's aliases are read: the bound on how late a hot swap is seen."""

    @field_validator("kv_memory")
    @classmethod
    def _check_memory(cls, given: str | int | float | None) -> str | int | float | None:
        if given is not None:
            parse_memory(str(given))
        return given

    @model_validator(mode="after")
    def _check_speculation(self) -> ServeConfig:
        if self.speculate != "off" and self.device != "cpu":
            raise ValueError(f"speculate: {self.speculate} is for a CPU, not for {self.device}; use --speculate off")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max: expected at least prompt_lookup_min = {self.prompt_lookup_min}, "
                f"got {self.prompt_lookup_max}"
            )
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> ServeConfig:
        ranks = self.tensor_parallel_size
        if ranks > 1 and self.weights != "float32":
            raise ValueError(
                f"weights: {self.weights} needs the CPU kernel, which does not support ranks; use --weights float32 "
                f"with --tensor-parallel-size {ranks}"
            )
        if ranks > 1 and self.device == "cuda" and self.num_gpus not in (0, ranks):
            raise ValueError(f"num_gpus: expected tensor_parallel_size = {ranks}, a GPU a rank, got {self.num_gpus:g}")
        return self

    @property
    def model_name(self) -> str:
        """The bare backbone's name in `model` fields."""
        if self.served_name:
            return self.served_name
        return Path(self.backbone).name if Path(self.backbone).is_dir() else self.backbone
