"""`pedro gc`: walks the home by its rules, removes what may go and says why the rest stays.

One collector at a time. Each removal decides by what is true at its moment, not by what was seen; killed anywhere,
the next one finds what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pedro.errors import ConflictError, PedroError
from pedro.retention import rules_files, rules_records
from pedro.retention.view import View
from pedro.store import PLATFORM, exclusive

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Registry
    from pedro.retention.finding import Finding
    from pedro.retention.policy import Retention
    from pedro.training.job_status import ClusterJobs

RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (  # who names something goes before what is named
    rules_files.leftovers,
    rules_records.jobs,
    rules_records.job_logs,
    rules_records.versions,
    rules_records.runs,
    rules_files.adapter_cache,
    rules_files.data_cache,
    rules_files.checkpoints,
    rules_files.uploads,
    rules_files.datasets,
    rules_files.backbone_copies,
    rules_files.logs,
    rules_records.batches,
    rules_records.webhook_deliveries,
    rules_records.keys_and_usage,
)


@dataclass
class KindTotal:
    """Of one kind: how many went, or would go, and their bytes; how many stayed."""

    removed: int = 0
    bytes: int = 0
    kept: int = 0


@dataclass
class Collected:
    """What a run did, or would do."""

    dry_run: bool
    kinds: dict[str, KindTotal] = field(default_factory=dict)
    findings: list[tuple[Finding, bool]] = field(default_factory=list)
    """Each thing, and whether it went (or would)."""
    problems: list[str] = field(default_factory=list)

    def to_dict(self, verbose: bool) -> dict[str, Any]:
        told = [
            {"kind": one.kind, "name": one.name, "bytes": one.bytes, "goes": went, "reason": one.reason}
            for one, went in self.findings
            if verbose or went
        ]
        kinds = {kind: asdict(total) for kind, total in self.kinds.items()}
        return {"dry_run": self.dry_run, "kinds": kinds, "things": told, "problems": self.problems}


def collect(
    settings: Settings,
    registry: Registry,
    policy: Retention,
    cluster: ClusterJobs,
    *,
    dry_run: bool = False,
    log: Callable[[str], None] = lambda _line: None,
) -> Collected:
    """Remove what may go, or only look. Raises ConflictError where another one is at it, UnavailableError where the
    database does not answer."""
    done = Collected(dry_run)
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(only_collector(settings))
        view = View(settings, registry, policy, cluster)
        for rule in RULES:
            log(f"looking at {rule.__name__.replace('_', ' ')}")
            try:
                for finding in rule(view):
                    _settle(finding, done)
            except PedroError as error:  # the storage or MLflow is away: the other rules can do without
                done.problems.append(f"{rule.__name__.replace('_', ' ')}: {error.message}")
        removed = {kind: {"removed": total.removed, "bytes": total.bytes} for kind, total in done.kinds.items()}
        if not dry_run and any(total.removed for total in done.kinds.values()):
            view.store.audit("gc", PLATFORM, "", after={kind: of for kind, of in removed.items() if of["removed"]})
    return done


@contextmanager
def only_collector(settings: Settings, wait_s: float = 0.0) -> Iterator[None]:
    """Nobody else collects or erases meanwhile, on this host or another. Raises ConflictError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(settings.home / "gc.lock", timeout=wait_s))
        except Timeout as error:
            raise ConflictError(
                "another `pedro gc` or `pedro tenants erase` is at this home; let it end and try again"
            ) from error
        if not settings.database_url.startswith("sqlite"):  # whose file and home belong to one host
            held.enter_context(exclusive(settings.database_url, "gc"))
        yield


def _settle(finding: Finding, done: Collected) -> None:
    total = done.kinds.setdefault(finding.kind, KindTotal())
    went = finding.goes
    if finding.remove is not None and not done.dry_run:
        try:
            went = finding.remove()
        except (PedroError, OSError) as error:
            done.problems.append(f"{finding.kind} {finding.name}: {error}")
            went = False
    if went:
        total.removed, total.bytes = total.removed + 1, total.bytes + finding.bytes
    else:
        total.kept += 1
    done.findings.append((finding, went))
