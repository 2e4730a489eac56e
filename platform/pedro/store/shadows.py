"""Counts how a shadow answers beside the champion: one row an adapter, for as long as the two stand together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.adapter_rows import adapter_row, parsed, same, to_adapter
from pedro.store.records import CHAMPION

if TYPE_CHECKING:
    from pedro.store.database import Database


@dataclass(frozen=True)
class ShadowCounts:
    """What a shadow did with the requests that it was to be asked too."""

    same: int = 0
    """Answers that were the champion's, token by token."""
    different: int = 0
    errors: int = 0
    skipped: int = 0
    """Not asked, since as many as may wait did."""
    seconds: float = 0.0
    """Its answers took, errors left out."""
    champion_seconds: float = 0.0
    """The champion's answers to the same requests took."""

    def to_dict(self) -> dict[str, float | None]:
        """For people: what answers took is told in the mean."""
        counts = {name: getattr(self, name) for name in ("same", "different", "errors", "skipped")}
        compared = self.same + self.different
        sums = {"mean_seconds": self.seconds, "champion_mean_seconds": self.champion_seconds}
        return {**counts, **{name: round(total / compared, 4) if compared else None for name, total in sums.items()}}

    def __add__(self, other: ShadowCounts) -> ShadowCounts:
        return ShadowCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class ShadowTable:
    """Answers of shadows. Counting raises for no adapter that is not there: answers may come late."""

    _database: Database

    def add_shadow_answers(self, name: str, shadow: int, champion: int, counts: ShadowCounts) -> bool:
        """Add to what was counted; False, and nothing is, where the two do not stand together any more."""
        ref, table = parsed(name), schema.shadows
        with self._database.writing() as connection:
            held = sa.select(schema.adapters.c.made).where(same(schema.adapters, ref)).with_for_update()
            connection.execute(held)  # no alias of it moves meanwhile
            row = adapter_row(connection, ref)
            standing = None if row is None else to_adapter(row).standing
            if row is None or standing is None or standing.shadow is None:
                return False
            if (standing.shadow.version, standing.aliases.get(CHAMPION)) != (shadow, champion):
                return False
            pair = {"made": row.made, "shadow": shadow, "champion": champion}
            first = {"tenant": ref.tenant, "adapter": ref.adapter, **pair}
            connection.execute(self._database.insert_missing(table).values(first))
            kept = connection.execute(sa.select(table).where(same(table, ref))).one()
            before = _read(kept) if {key: kept._mapping[key] for key in pair} == pair else ShadowCounts()
            connection.execute(sa.update(table).where(same(table, ref)).values(**pair, **asdict(before + counts)))
        return True

    def shadow_answers(self, name: str) -> ShadowCounts | None:
        """What was counted of the shadow that stands; None where there is none."""
        ref, table = parsed(name), schema.shadows
        with self._database.reading() as connection:
            row = adapter_row(connection, ref)
            standing = None if row is None else to_adapter(row).standing
            if standing is None or standing.shadow is None:
                return None
            counted = connection.execute(sa.select(table).where(same(table, ref))).one_or_none()
        pair = (standing.shadow.version, standing.aliases.get(CHAMPION))
        return ShadowCounts() if counted is None or (counted.shadow, counted.champion) != pair else _read(counted)


def _read(row: sa.Row[Any]) -> ShadowCounts:
    return ShadowCounts(**{each.name: row._mapping[each.name] for each in fields(ShadowCounts)})
