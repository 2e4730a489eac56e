"""Fabricates a busy platform: thousands of runs and jobs, hundreds of adapters, written straight into the databases.

The schemas are those that the real registry and store make; only the rows are made up, because MLflow would take an
hour to write as many. For benchmarks of what reads them.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedro.comparison.result_model import RunResult
from pedro.comparison.run_files import write_run
from pedro.registry import Registry
from pedro.registry.tags import RUN_NAME, stored
from pedro.store import Store
from pedro.training.job import flat
from pedro.training.spec import FineTuneSpec

if TYPE_CHECKING:
    from pedro.config import Settings

METHODS = ("pedro", "lora", "ia3", "bitfit", "red")
TENANTS = 50
FIRST = 100  # experiments before it are MLflow's own
POINTS = 10  # of a curve
MINUTE_MS = 60_000
WORKSPACE = {"workspace": "default"}

DatabaseRow = dict[str, Any]
DatabaseTables = Mapping[str, list[DatabaseRow]]


def fabricate(settings: Settings, runs: int, adapters: int, seed: int = 0) -> None:
    """Fill a new home: `runs` runs and jobs of `adapters` adapters, every second run a version; one comparison."""
    Registry.open(settings).connect()  # makes the schema
    Store(settings.database_url).close()
    rng = random.Random(seed)  # noqa: S311 - made-up numbers
    names = [(f"tenant{i % TENANTS:02d}", f"adapter{i // TENANTS:02d}") for i in range(adapters)]
    _insert(settings.tracking_uri, _registry(names, runs, rng))
    _insert(settings.database_url, _jobs(names, runs))
    Registry.open(settings).take_over()
    _comparison(settings, rng)


def _registry(names: list[tuple[str, str]], runs: int, rng: random.Random) -> DatabaseTables:
    now = int(time.time() * 1000)
    tables: DatabaseTables = defaultdict(list)
    for number, (tenant, adapter) in enumerate(names):
        _adapter(tables, FIRST + number, f"{tenant}.{adapter}", tenant, adapter, now)
    versions = [0] * len(names)
    for number in range(runs):
        which, turn = number % len(names), number // len(names)
        spec = _spec(*names[which], METHODS[turn % len(METHODS)], turn // len(METHODS), rng.choice((1e-3, 1e-2)))
        started, accuracy = now - (runs - number) * MINUTE_MS, 0.5 + 0.4 * rng.random()
        _run(tables, f"{number:032x}", FIRST + which, spec, started, accuracy)
        if number % 2 == 0 or not versions[which]:
            versions[which] += 1
            _version(tables, f"{number:032x}", versions[which], spec, started, accuracy)
    for (tenant, adapter), version in zip(names, versions, strict=True):
        row = {"alias": "champion", "version": version, "name": f"{tenant}.{adapter}", **WORKSPACE}
        tables["registered_model_aliases"].append(row)
    return tables


def _spec(tenant: str, adapter: str, method: str, seed: int, lr: float) -> FineTuneSpec:
    record = {
        "tenant": tenant,
        "adapter": adapter,
        "data": {"train": f"/data/{tenant}.{adapter}.jsonl"},
        "method": {"name": method, "r": 12},
        "training": {"seed": seed, "lr": lr},
    }
    return FineTuneSpec.model_validate(record)


def _adapter(tables: DatabaseTables, experiment: int, name: str, tenant: str, adapter: str, now: int) -> None:
    stamps = {"creation_time": now, "last_updated_time": now}
    tables["experiments"].append(
        {
            "experiment_id": experiment,
            "name": name,
            "artifact_location": f"file:///nowhere/{name}",
            "lifecycle_stage": "active",
            "creation_time": now,
            "last_update_time": now,
            **WORKSPACE,
        }
    )
    tables["registered_models"].append({"name": name, **stamps, **WORKSPACE})
    tables["registered_model_tags"] += [
        {"key": key, "value": value, "name": name, **WORKSPACE}
        for key, value in stored({"tenant": tenant, "adapter": adapter}).items()
    ]


def _run(tables: DatabaseTables, run: str, experiment: int, spec: FineTuneSpec, started: int, accuracy: float) -> None:
    job = f"ftjob-{run[-24:]}"
    tables["runs"].append(
        {
            "run_uuid": run,
            "name": job,
            "source_type": "UNKNOWN",
            **dict.fromkeys(("source_name", "entry_point_name", "user_id", "source_version"), ""),
            "status": "FINISHED",
            "start_time": started,
            "end_time": started + MINUTE_MS,
            "lifecycle_stage": "active",
            "artifact_uri": f"file:///nowhere/{run}",
            "experiment_id": experiment,
        }
    )
    tables["params"] += [{"key": k, "value": str(v), "run_uuid": run} for k, v in flat(spec.to_dict()).items()]
    tags = {**stored({"job": job, "model": spec.name}), RUN_NAME: job}
    tables["tags"] += [{"key": key, "value": value, "run_uuid": run} for key, value in tags.items()]
    loss = [(20 * point, 0.3 + 2 * math.exp(-3 * point / POINTS)) for point in range(1, POINTS + 1)]
    curves = {"train/loss": loss, "dev/loss": [(step, value + 0.1) for step, value in loss]}
    finals = {"accuracy": accuracy, "loss": 1 - accuracy, "validation_loss": 0.4, "seconds": 50.0}
    curves |= {f"final/{name}": [(200, value)] for name, value in finals.items()}
    for key, points in curves.items():
        for step, value in points:
            row = {"key": key, "value": value, "timestamp": started, "run_uuid": run, "step": step, "is_nan": 0}
            tables["metrics"].append(row)
        tables["latest_metrics"].append(row)


def _version(tables: DatabaseTables, run: str, version: int, spec: FineTuneSpec, started: int, accuracy: float) -> None:
    key_columns = {"name": spec.name, "version": version, **WORKSPACE}
    tables["model_versions"].append(
        {
            **key_columns,
            "creation_time": started + MINUTE_MS,
            "last_updated_time": started + MINUTE_MS,
            "current_stage": "None",
            "source": f"runs:/{run}/adapter",
            "storage_location": f"runs:/{run}/adapter",
            "run_id": run,
            "status": "READY",
            **dict.fromkeys(("user_id", "status_message", "run_link"), ""),
        }
    )
    tags = {
        "digest": f"sha256:{run}{run}",
        "backbone": spec.backbone,
        "backbone_digest": "sha256:" + "b" * 64,
        "method": spec.method.name,
        "trainable_parameters": "21320",
        "metrics": json.dumps({"accuracy": accuracy, "loss": 1 - accuracy}),
        "spec": json.dumps(spec.to_dict()),
        "gate": "passed: accuracy is better",
    }
    tables["model_version_tags"] += [{"key": k, "value": v, **key_columns} for k, v in stored(tags).items()]


def _jobs(names: list[tuple[str, str]], runs: int) -> DatabaseTables:
    now = time.time()
    rows = []
    for number in range(runs):
        tenant, adapter = names[number % len(names)]
        created = now - (runs - number) * 60
        job = f"ftjob-{f'{number:032x}'[-24:]}"
        result = {"model": f"{tenant}.{adapter}:1", "metrics": {"accuracy": 0.7}, "gate": "better"}
        rows.append(
            {
                "id": job,
                "tenant": tenant,
                "adapter": adapter,
                "spec": json.dumps({"tenant": tenant, "adapter": adapter}),
                "status": "failed" if number % 10 == 9 else "succeeded",
                "submission_id": job,
                "created": created,
                "finished": created + 50,
                "result": json.dumps(result),
                "message": "",
            }
        )
    return {"pedro_jobs": rows}


def _comparison(settings: Settings, rng: random.Random) -> None:
    """Ten methods on ten tasks with five seeds."""
    folder = settings.home / "comparisons" / "synthetic"
    folder.mkdir(parents=True)
    head = {"schema": 1, "name": "synthetic", "title": "Ten methods", "equal": "compute", "baseline": "method 0"}
    (folder / "comparison.json").write_text(json.dumps(head))
    for number in range(500):
        method, task, seed = number % 10, number // 10 % 10, number // 100
        right = [int(rng.random() < 0.5 + 0.03 * method) for _ in range(300)]
        value = sum(right) / len(right)
        score = {"task": f"task {task}", "metric": "accuracy", "value": value, "rows": 300, "per_row": right}
        record = {
            "id": f"{number:016x}",
            "stage": "final",
            "comparison": "synthetic",
            "method": METHODS[method % len(METHODS)],
            "label": f"method {method}",
            "task": f"task {task}",
            "backbone": "stories260K",
            "seed": seed,
            "state": "finished",
            "lr": 0.01,
            "scores": [{**score, "majority": 0.5}],
            "trainable_parameters": 10000 + 1000 * method,
            "adapter_bytes": 40000 + 4000 * method,
            "seconds": 20.0,
            "tokens_per_second": 4000.0,
            "peak_memory_bytes": 1 << 29,
            "curves": {"dev/loss": [[step, 1 - value + 20 / step] for step in range(20, 201, 20)]},
        }
        write_run(folder, RunResult.from_dict(record))


def _insert(url: str, tables: DatabaseTables) -> None:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    with connection:
        for table, rows in tables.items():
            columns, marks = ", ".join(rows[0]), ", ".join("?" * len(rows[0]))
            statement = f"insert into {table} ({columns}) values ({marks})"  # noqa: S608 - our own names
            connection.executemany(statement, (tuple(row.values()) for row in rows))
    connection.close()
