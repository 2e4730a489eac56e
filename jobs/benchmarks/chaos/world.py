"""The tenants and adapters of a chaos run, how large it is, and what each adapter must answer.

Answers are made in this process by an engine of its own, from the directories that are registered: so a served answer
of another version, another tenant or the bare model is told by its text.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.demo_server import adapted, backbone_with_words
from jobs.benchmarks.model_sizes import MODEL_SIZES, ModelSize, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from pedro.backbone import Backbone, load_tokenizer, resolve_backbone
from pedro.errors import PedroError
from pedro.refs import ModelRef, version_name
from pedro.store import Inherited

if TYPE_CHECKING:
    from pedro.registry import Registry

PROMPT_TOKENS = (8, 40, 150)
LENGTHS = (8, 16, 32)  # of answers
CANARY_WEIGHT = 0.3
IDLE_S = 0.002
STRENGTH = 2.0  # of adapters, so that hardly two answer alike
BARE = ""
CUT, NAN, DIGEST, FOREIGN = "cut", "nan", "wrong-digest", "other-backbone"
DAMAGES = (CUT, NAN, DIGEST, FOREIGN)


@dataclass(frozen=True)
class Scale:
    """How large a run is."""

    clients: int
    tenants: int
    adapters: int
    resident: int  # how many adapters an engine has room for
    gateways: int
    moving: int = 4
    versions: int = 5  # of each that moves
    registered: int = 50  # of the steady adapters, which takes a second each
    canaries: int = 2
    calm_s: float = 5.0  # between a fault's end and the next one
    think_s: float = 1.0  # in the mean, between an answer and the same client's next request


@dataclass(frozen=True)
class Adapter:
    """One name with its versions, whose numbers are those of `directories` from 1 on. The first is champion."""

    tenant: str
    name: str  # tenant.adapter
    directories: tuple[Path, ...]
    damage: str = ""
    prompts: tuple[int, ...] = tuple(range(len(PROMPT_TOKENS)))
    """Which prompts it is asked: the answers to these are known."""

    def ref(self, version: int) -> str:
        return version_name(self.name, version)


@dataclass
class World:
    """Adapters of a run, by what happens to them, and the words of every answer, by `ref` and prompt."""

    backbone: Backbone
    prompts: list[list[int]]
    steady: list[Adapter] = field(default_factory=list)
    moving: list[Adapter] = field(default_factory=list)
    canaries: list[Adapter] = field(default_factory=list)
    broken: list[Adapter] = field(default_factory=list)
    words: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    resident_mb: float = 0.0
    """What as many adapters take as an engine has room for."""

    @property
    def bare(self) -> str:
        """How requests name the backbone itself."""
        return Path(self.backbone.directory).name

    @property
    def adapters(self) -> list[Adapter]:
        return [*self.steady, *self.moving, *self.canaries, *self.broken]

    @property
    def tenants(self) -> list[str]:
        return sorted({adapter.tenant for adapter in self.adapters})

    def whose(self, prompt: int, words: Sequence[str]) -> list[str]:
        """The refs whose answer to a prompt begins with these words; BARE is the bare model."""
        known = ((ref, said) for (ref, number), said in self.words.items() if number == prompt)
        return [ref for ref, said in known if said[: len(words)] == list(words)]

    def told_apart(self) -> float:
        """The share of answers, at their shortest, that nobody else would give."""
        first = [(prompt, *said[: min(LENGTHS)]) for (_, prompt), said in self.words.items()]
        times = Counter(first)
        return sum(times[one] == 1 for one in first) / len(first)


def make_world(size_name: str, scale: Scale, home: Path) -> World:
    """Adapter directories in `home`, and what each answers."""
    size = MODEL_SIZES[size_name]
    backbone = resolve_backbone(str(backbone_with_words(size)))
    asked = [prompts(size, 1, length, seed=number)[0] for number, length in enumerate(PROMPT_TOKENS)]
    world = World(backbone, asked)
    plain = scale.adapters - scale.moving - scale.canaries
    versions = [1] * plain + [scale.versions] * scale.moving + [2] * scale.canaries + [1] * len(DAMAGES)
    made = iter(adapter_directories(size, "pedro", sum(versions)))
    for number, count in enumerate(versions):
        tenant = f"tenant{number % scale.tenants:03d}"
        directories = tuple(adapted(next(made), backbone, home, STRENGTH) for _ in range(count))
        place = number - scale.adapters
        damage = DAMAGES[place] if place >= 0 else ""
        adapter = Adapter(tenant, ModelRef(tenant, f"{damage or 'a'}-{number}").name, directories, damage)
        if number < plain:
            adapter = replace(adapter, prompts=(number % len(asked),))  # there are many
        group = world.broken if damage else world.steady if number < plain else world.canaries
        (world.moving if plain <= number < plain + scale.moving else group).append(adapter)
    world.resident_mb = scale.resident * _answer(world, size) / 2**20
    for adapter in (*world.moving, *world.canaries):
        for prompt in range(len(asked)):
            said = {
                tuple(world.words[adapter.ref(n), prompt][: min(LENGTHS)])
                for n in range(1, len(adapter.directories) + 1)
            }
            if len(said) < len(adapter.directories):
                raise PedroError(f"{adapter.name}: two of its versions answer alike, so a wrong one could not be seen")
    return world


def _answer(world: World, size: ModelSize) -> float:
    """Fill `words`; gives the bytes of one resident adapter."""
    from jobs.benchmarks.bench_engine import BenchEngine

    tokenizer = load_tokenizer(world.backbone)
    engine = BenchEngine(size, digest=world.backbone.digest, max_length=size.context, max_batch=32)
    refs: list[tuple[str, str | None, Sequence[int]]] = [(BARE, None, range(len(world.prompts)))]
    refs += [
        (adapter.ref(number), str(directory), adapter.prompts)
        for adapter in world.adapters
        for number, directory in enumerate(adapter.directories, start=1)
    ]
    nbytes = 0.0
    try:
        waiting: dict[str, tuple[str, int]] = {}
        for ref, directory, asked in refs:
            for prompt in asked:
                request = engine.request(world.prompts[prompt], directory, max(LENGTHS))
                waiting[request.id] = (ref, prompt)
                engine.engine.add(request)
        said: dict[str, list[int]] = {name: [] for name in waiting}
        while engine.engine.has_work():
            outputs = engine.engine.step()
            for output in outputs:
                if output.error is not None:
                    raise output.error
                said[output.request_id] += output.token_ids
            if not outputs:
                time.sleep(IDLE_S)  # adapters are loading
        for name, key in waiting.items():
            world.words[key] = tokenizer.decode(said[name], skip_special_tokens=True).split()
        nbytes = max(entry.nbytes for entry in engine.engine.adapters.residents().values())
    finally:
        engine.close()
    return nbytes


def register(world: World, registry: Registry, scale: Scale) -> None:
    """Every adapter with its versions, champions and canaries. Those that are to be broken are whole until `break_`.

    Steady ones beyond those that are to be registered are entered as a host knows them that has fetched them already.
    """
    rest = world.steady[scale.registered :]
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for adapter in world.adapters:
        if adapter in rest:
            continue
        for directory in adapter.directories:
            run = registry.start_run(experiment=adapter.tenant, name="chaos", params={}, tags={})
            registry.register(run, directory, adapter.tenant, ModelRef.parse(adapter.name).adapter)
            registry.finish_run(run)
        registry.promote(adapter.name, 1)
    for adapter in world.canaries:
        registry.canary(adapter.name, 2, CANARY_WEIGHT)

    registry.store.take_over(_fetched(adapter, registry) for adapter in rest)


def _fetched(adapter: Adapter, registry: Registry) -> Inherited:
    """An adapter of which this host has a copy, and nobody else."""
    from pedro.adapter_directory import manifest_digest, read_manifest
    from pedro.registry import Version, utc

    manifest, run = (
        read_manifest(adapter.directories[0]),
        f"made{adapter.name}".translate({ord("."): None, ord("-"): None}),
    )
    digest, backbone = str(manifest["digest"]), manifest["backbone"]
    shutil.copytree(adapter.directories[0], registry.cached(digest, run))
    version = Version(
        adapter.tenant,
        ModelRef.parse(adapter.name).adapter,
        1,
        digest,
        backbone["id"],
        backbone["digest"],
        "pedro",
        1,
        {},
        {},
        "",
        run,
        utc(0),
        manifest_digest=manifest_digest(manifest),
    )
    return Inherited(adapter.name, 0.0, {"champion": 1}, (version,))


def break_(world: World, artifacts: Iterable[Path], registry: Registry) -> None:
    """Damage the artifacts of `world.broken` behind the registry's back, each in its own way."""
    from pedro.adapter_directory import MANIFEST, WEIGHTS

    roots = list(artifacts)
    for adapter in world.broken:
        run = registry.get(adapter.name, 1).run_id
        (folder,) = [found.parent for root in roots for found in root.glob(f"**/{run}/**/{MANIFEST}")]
        weights = folder / WEIGHTS
        if adapter.damage == CUT:
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        elif adapter.damage == NAN:
            weights.write_bytes(_with_nan(weights))
        elif adapter.damage == DIGEST:
            text = (folder / MANIFEST).read_text()
            digest = registry.get(adapter.name, 1).digest
            (folder / MANIFEST).write_text(text.replace(digest, "sha256:" + "0" * 64))
        else:
            _of_another_backbone(folder)


def _with_nan(weights: Path) -> bytes:
    from safetensors.torch import load_file, save

    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(float("nan"))
    return save(tensors, metadata={"format": "pt"})


def _of_another_backbone(folder: Path) -> None:
    """Another adapter altogether, whole and with digests in order, trained on a backbone that is not served."""
    from pedro.adapter_directory import MANIFEST, write_manifest

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["backbone"] = {"id": "another", "digest": "sha256:" + "1" * 64}
    write_manifest(folder, manifest)


def users(seed: int, count: int) -> list[str]:
    """Names of end users, to whom a canary must stay the same."""
    rng = random.Random(seed)  # noqa: S311
    return [f"user{rng.randrange(10**9)}" for _ in range(count)]


def clear(home: Path) -> None:
    """Nothing is left of a run before."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
