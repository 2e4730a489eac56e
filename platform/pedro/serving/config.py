"""Arguments of a server: backbone, sizes, device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pedro.process import parse_memory
from pedro.spec_reader import Frozen


class ServeConfig(Frozen):
    """Arguments of `build_app`, also used on the command line, in Serve config files and in k8s manifests."""

    backbone: str = "stories260K"
    """A name from `pedro backbones list`, a transformers directory, or a hub id."""
    served_name: str | None = None
    """The bare backbone's name in requests; default: its id, or the directory's name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the backbone's weights; the CPU kernel needs float32."""
    weights: Literal["float32", "int8", "int4"] = "float32"
    """Format of the backbone's weights in the CPU kernel; int8 and int4 are quantised at the start. Computation is in
    float32, and adapters are unchanged."""
    device: str = "cpu"
    """cpu or cuda."""
    replicas: int = Field(1, ge=1)
    """Engine replicas, one per device."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Processes per replica, on one machine, each with a part of every layer and adapter: for a backbone that does not
    fit on one GPU. Each uses one GPU, or on a CPU its share of the threads."""
    gateways: int = Field(1, ge=1)
    """Gateway processes, which share quotas through the database. Every node's proxy sends requests to any of them."""
    gateway_num_cpus: float = Field(0, ge=0)
    """CPUs that Ray reserves per gateway. Above 0, none is placed on a node without CPUs, which a cluster's head should
    be; if the cluster has other nodes at the start, none is placed on the head anyway."""
    num_cpus: float = Field(0, ge=0)
    """CPUs that Ray reserves per engine replica; 0 shares them with training, as suits a laptop."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that Ray reserves per engine replica."""
    threads: int | None = Field(None, ge=1)
    """Maximum threads of an engine replica; default: the cores that affinity and the cgroup's quota allow. On a CPU it
    uses fewer while other processes compete for them."""
    max_batch: int = Field(32, ge=1)
    """Maximum number of sequences decoded together."""
    prefill_stall: float = Field(1.25, gt=0)
    """How long a step may read prompts while others decode, in decode steps. Less keeps the time per token even beside
    long prompts; more serves more tokens per second where requests keep coming."""
    speculate: Literal["off", "ngram"] = "off"
    """ngram: on a CPU, an answer's next tokens are looked up in its prompt and in itself, and several are verified per
    step. Answers do not change; those that quote their prompt are faster. It pauses where it does not pay off."""
    num_speculative_tokens: int = Field(8, ge=1)
    """Maximum tokens per guess."""
    prompt_lookup_max: int = Field(3, ge=1)
    """Maximum number of trailing tokens that are looked up."""
    prompt_lookup_min: int = Field(2, ge=1)
    """And at least."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of prompt and answer together; default: the backbone's context."""
    max_waiting: int = Field(1024, ge=1)
    """Requests that may queue at a replica; further ones get 503."""
    request_timeout_s: float = Field(600, gt=0, le=86_400)
    """Time limit of an answer; a request's `x-request-timeout` header (seconds) can lower it."""
    tenant_weights: dict[str, float] = Field(default_factory=dict)
    """Shares of a busy engine by tenant, default 1: {acme: 2} gives acme twice the tokens of others."""
    adapter_budget_mb: float = Field(512, gt=0)
    """Memory for resident adapters, per replica."""
    kv_memory: str | int | float | None = None
    """Memory per replica for keys and values of running requests: a size such as 4GiB, or a share, up to 1.0, of the
    memory free after loading. By default the replicas of a machine share 0.5 of it on a CPU, 0.8 on a GPU. Requests
    that do not fit wait; those that could never fit are refused."""
    prefix_cache_mb: float = Field(512, ge=0)
    """Memory per replica for the prefix cache, so that common beginnings of prompts are read once; 0 disables it."""
    share_bare_prefixes: bool = False
    """Let tenants share cached prefixes of requests to the bare backbone: the time to the first token then reveals
    whether someone sent the same text before. Without it nothing passes between tenants."""
    max_file_mb: float = Field(512, gt=0)
    """Maximum size of an uploaded file (`/v1/files`)."""
    max_tenant_files_mb: float = Field(10_240, gt=0)
    """Maximum size of all files of a tenant."""
    max_open_jobs: int = Field(100, ge=1)
    """Maximum unfinished fine-tuning jobs per tenant; further ones over HTTP get 429."""
    watch_interval_s: float = Field(0.5, gt=0, le=10)
    """How often aliases are read, which limits the delay of a hot swap."""

    @field_validator("kv_memory")
    @classmethod
    def _check_memory(cls, given: str | int | float | None) -> str | int | float | None:
        if given is not None:
            parse_memory(str(given))
        return given

    @model_validator(mode="after")
    def _check_speculation(self) -> ServeConfig:
        if self.speculate != "off" and self.device != "cpu":
            raise ValueError(f"speculate: {self.speculate} needs a CPU, not {self.device}; use --speculate off")
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
            raise ValueError(
                f"num_gpus: expected tensor_parallel_size = {ranks}, one GPU per rank, got {self.num_gpus:g}"
            )
        return self

    @property
    def model_name(self) -> str:
        """The bare backbone's name in `model` fields."""
        if self.served_name:
            return self.served_name
        return Path(self.backbone).name if Path(self.backbone).is_dir() else self.backbone
