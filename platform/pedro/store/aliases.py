"""Moves the aliases of adapters: each move is one compare-and-set of one row, with its history and its audit.

A move takes the number of its change first, and with it its turn, so it decides by what is committed; the row is then
written where it still has the generation that was read. MLflow hears of it afterwards, from the registry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import ConflictError, NotFoundError, model_not_found
from pedro.refs import ModelRef, version_name
from pedro.store import schema, standings
from pedro.store.adapter_rows import adapter_row, parsed, same, standing_values, to_adapter, to_version, version_row
from pedro.store.changes import ADAPTER, acting, announce, audited, next_generation
from pedro.store.parents import refuse_parent
from pedro.store.records import CANDIDATE, CHAMPION, Actor, By, Move, Standing, Version
from pedro.store.standings import WHATEVER
from pedro.store.webhook_outbox import enter_moves

if TYPE_CHECKING:
    from pedro.store.database import Database

KEEP_MOVES = 1000  # of one adapter; the audit keeps them by age


class AliasTable:
    """Moves aliases, and tells how they were moved. Every move raises NotFoundError for what is not there."""

    _database: Database

    def promote(self, name: str, version: int, *, expected: int | None = WHATEVER, actor: By = None) -> Version:
        """Make a version champion; the champion until now becomes `previous`, a canary and a shadow end.

        Raises ConflictError if `expected` is given and the champion is another one by now (None: there is one).
        """
        with self._moving(name, "promote", actor, version) as move:
            move.to(standings.promoted(move.before, name, version, expected))
            return move.version(version)

    def rollback(self, name: str, *, expected: int | None = None, actor: By = None) -> Version:
        """Swap champion and previous; ConflictError if there is no previous version, or another than `expected`."""
        with self._moving(name, "rollback", actor) as move:
            move.to(standings.rolled_back(move.before, name, expected))
            return move.version(move.after.aliases[CHAMPION])

    def set_alias(self, name: str, alias: str, version: int, *, actor: By = None) -> Version:
        """Point `alias` at a version."""
        with self._moving(name, "alias", actor, version) as move:
            move.to(standings.aliased(move.before, alias, version))
            return move.version(version)

    def set_canary(self, name: str, version: int, weight: float, *, actor: By = None) -> Version:
        """Have a version answer a share of what is asked of the champion; 0 ends it.

        Raises ConflictError if there is no champion or it is the version, ConfigError for what is no share.
        """
        with self._moving(name, "canary", actor, version) as move:
            move.to(standings.split(move.before, name, version, weight))
            return move.version(version)

    def set_shadow(self, name: str, version: int, weight: float, *, actor: By = None) -> Version:
        """Have a version asked a share of what the champion answers, for nobody to see; 0 ends it.

        Raises ConflictError if there is no champion or it is the version, ConfigError for what is no share.
        """
        with self._moving(name, "shadow", actor, version) as move:
            move.to(standings.shadowed(move.before, name, version, weight))
            return move.version(version)

    def withdraw_canary(self, name: str, version: int, reason: str, *, generation: int, actor: By = None) -> bool:
        """End a canary because of its answers; False, and nothing is done, where aliases moved since `generation`."""
        try:
            with self._moving(name, "withdraw", actor, version) as move:
                if move.seen != generation:
                    raise ConflictError(f"{name}: its aliases were moved meanwhile")
                move.to(standings.split(move.before, name, version, 0), reason)
        except (ConflictError, NotFoundError):
            return False
        return True

    def judge(
        self, version: Version, passed: bool, reason: str, judged_against: int | None, *, actor: By = None
    ) -> tuple[str, str]:
        """Enter what the gate decided: the version becomes champion or candidate. Which of the two, and why.

        The decision holds against the champion that it was made against: beside another one it means nothing.
        """
        with self._moving(version.name, "gate", actor, version.version) as move:
            alias = CANDIDATE
            after = standings.aliased(move.before, CANDIDATE, version.version)
            if passed:
                try:
                    after = standings.promoted(move.before, version.name, version.version, judged_against)
                    alias = CHAMPION
                except ConflictError as error:
                    reason = error.message
            move.to(after, reason)
            move.write(version.version, gate=f"{'passed' if alias == CHAMPION else 'refused'}: {reason}")
        return alias, reason

    def set_gate(self, version: Version, gate: str, *, actor: By = None) -> None:
        """Record on a version what its gate decided and why."""
        with self._moving(version.name, "gate", actor, version.version) as move:
            move.to(move.before, gate)
            move.write(version.version, gate=gate)

    def delete_version(self, name: str, version: int, *, actor: By = None) -> None:
        """Delete one version; the champion, and one that a job goes on from, are refused (ConflictError)."""
        with self._moving(name, "delete", actor, version) as move:
            move.refuse_parent(version)
            move.to(standings.without(move.before, name, version), f"version {version}")
            move.write(version, deleted=move.at)

    def retire_version(self, name: str, version: int, promoted_before: float, *, actor: By = None) -> None:
        """Delete a version that no alias names; ConflictError where one does by now, it was champion since then, or a
        job goes on from it."""
        with self._moving(name, "retire", actor, version) as move:
            move.refuse_parent(version)
            promoted = move.promoted(version)
            before = move.before.to_dict()
            beside = [what for what in ("canary", "shadow") if before.get(what, {}).get("version") == version]
            names = [*move.before.names_of(version), *beside]
            if names:
                message = f"{version_name(name, version)} is {' and '.join(names)}; give that to another version first"
                raise ConflictError(message, param="version")
            if promoted is not None and promoted >= promoted_before:
                raise ConflictError(f"{version_name(name, version)} was champion not long ago", param="version")
            move.to(move.before, f"version {version}")
            move.write(version, deleted=move.at)

    def delete_adapter(self, name: str, *, actor: By = None) -> None:
        """Delete an adapter with all its versions; ConflictError where a job goes on from one of them."""
        with self._moving(name, "delete", actor) as move:
            move.refuse_parent()
            move.end()

    def alias_history(self, name: str, limit: int = 100) -> list[Move]:
        """The moves of an adapter's aliases, the last first; those of an earlier adapter of its name are not its."""
        ref, table = parsed(name), schema.alias_history
        with self._database.reading() as connection:
            row = adapter_row(connection, ref)
            if row is None:
                raise model_not_found(name)
            query = sa.select(table).where(same(table, ref), table.c.made == row.made)
            found = connection.execute(query.order_by(table.c.generation.desc()).limit(limit)).all()
        return [_move(row) for row in found]

    def recent_moves(self, since: float, limit: int = 1000) -> list[tuple[str, Move]]:
        """The moves of all adapters' aliases since a time (Unix seconds), with the adapters' names, the last first.

        Of the last `limit`, which are found by their order: there is no index of times.
        """
        table = schema.alias_history
        query = sa.select(table).order_by(table.c.generation.desc()).limit(limit)
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        return [(ModelRef(row.tenant, row.adapter).name, _move(row)) for row in found if row.at >= since]

    @contextmanager
    def _moving(self, name: str, action: str, actor: By, version: int | None = None) -> Iterator[_Moving]:
        """One move, of an adapter (and a version) that is there: all that it writes, or nothing of it."""
        ref = parsed(name)
        with self._database.writing() as connection:
            generation = next_generation(connection)
            row = adapter_row(connection, ref)
            if row is None:
                raise model_not_found(name)
            if version is not None and version_row(connection, ref, version) is None:
                raise model_not_found(str(ref.at(version)))
            move = _Moving(connection, ref, row, action, generation)
            yield move
            move.record(acting(actor))


def _move(row: sa.Row[Any]) -> Move:
    return Move(row.generation, row.at, row.actor, row.action, row.before, row.after, row.reason)


class _Moving:
    """One move under way in its transaction."""

    def __init__(
        self, connection: sa.Connection, ref: ModelRef, row: sa.Row[Any], action: str, generation: int
    ) -> None:
        self._connection, self._ref, self._row = connection, ref, row
        self._action, self._generation = action, generation
        self._reason, self._ended = "", False
        self.at = time.time()
        self.before = self.after = to_adapter(row).standing

    def to(self, after: Standing, reason: str = "") -> None:
        """Where the aliases stand afterwards. A new champion says when it became one."""
        self.after, self._reason = after, reason
        self._write_adapter(**standing_values(after))
        was, now = self.before.canary, after.canary
        if was is not None and (now is None or now.version != was.version):
            self._forget_answers(schema.canaries)
        shadow = after.shadow and after.shadow.version
        if self.before.shadow is not None and self.before.shadow.version != shadow:
            self._forget_answers(schema.shadows)
        champion = after.aliases.get(CHAMPION)
        if champion is not None and (self._action == "promote" or champion != self.before.aliases.get(CHAMPION)):
            self.write(champion, promoted=self.at)

    @property
    def seen(self) -> int:
        """The generation that the adapter had before the move."""
        return int(self._row.generation)

    def end(self) -> None:
        """Nothing is left but a row that says what the registry still has to hear."""
        self.after, self._ended = Standing(), True
        self._write_adapter(**standing_values(self.after), deleted=self.at)
        self._connection.execute(sa.delete(schema.versions).where(same(schema.versions, self._ref)))
        for table in (schema.canaries, schema.shadows):
            self._forget_answers(table)

    def write(self, version: int, **values: Any) -> None:
        """Columns of one of the adapter's versions."""
        table = schema.versions
        row = sa.update(table).where(same(table, self._ref), table.c.version == version)
        self._connection.execute(row.values(**values, generation=self._generation))

    def refuse_parent(self, number: int | None = None) -> None:
        """Raise ConflictError where a job that has not ended goes on from the version, or from any of the adapter."""
        refuse_parent(self._connection, self._ref, number)

    def promoted(self, number: int) -> float | None:
        """When a version last became champion."""
        row = version_row(self._connection, self._ref, number)
        return None if row is None else row.promoted

    def version(self, number: int) -> Version:
        """A version as it is after the move."""
        row = version_row(self._connection, self._ref, number)
        if row is None:
            raise model_not_found(str(self._ref.at(number)))
        return to_version(row, self.after)

    def record(self, actor: Actor) -> None:
        """The history, the audit and the announcement of the move."""
        name, before = self._ref.name, self.before.to_dict()
        after = None if self._ended else self.after.to_dict()
        entry = {
            "generation": self._generation,
            "tenant": self._ref.tenant,
            "adapter": self._ref.adapter,
            "made": self._row.made,
            "at": self.at,
            "actor": actor.name,
            "action": self._action,
            "before": before,
            "after": after,
            "reason": self._reason,
        }
        self._connection.execute(sa.insert(schema.alias_history).values(entry))
        self._forget_moves()
        withdrawn = self._reason if self._action == "withdraw" else ""
        told = {**(after or {}), "reason": withdrawn} if withdrawn else after
        audited(self._connection, actor, f"adapter.{self._action}", self._ref.tenant, name, before=before, after=told)
        announce(self._connection, self._generation, ADAPTER, name)
        enter_moves(self._connection, self._ref, self.before, self.after, self.at, withdrawn)

    def _forget_answers(self, table: sa.Table) -> None:
        """Another canary, or another shadow, begins with none."""
        self._connection.execute(sa.delete(table).where(same(table, self._ref)))

    def _forget_moves(self) -> None:
        """Of the adapter's history only the last moves are kept."""
        table = schema.alias_history
        kept = sa.select(table.c.generation).where(same(table, self._ref)).order_by(table.c.generation.desc())
        last = self._connection.execute(kept.offset(KEEP_MOVES).limit(1)).scalar()
        if last is not None:
            self._connection.execute(sa.delete(table).where(same(table, self._ref), table.c.generation <= last))

    def _write_adapter(self, **values: Any) -> None:
        table = schema.adapters
        unmoved = sa.and_(same(table, self._ref), table.c.generation == self._row.generation)
        written = sa.update(table).where(unmoved).values(**values, generation=self._generation)
        assert self._connection.execute(written).rowcount == 1, "another move came between, out of its turn"
