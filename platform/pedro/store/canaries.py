"""Counts how a canary and the champion beside it answer, and withdraws a canary that is worse (`canary_rule.py`).

One row an adapter, for as long as one canary stands beside one champion. Counting is one transaction and the withdrawal
another, which compares and sets: of several gateways one withdraws. What was found is kept in the row, so that a
withdrawal which a process did not live to make is made by the next count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.adapter_rows import adapter_row, parsed, same, to_adapter
from pedro.store.aliases import AliasTable
from pedro.store.canary_rule import AnswerCounts, judge_errors, judge_scores
from pedro.store.records import CHAMPION, Actor

RULE = Actor("platform:canary")
SIDES = ("canary", "champion")


class CanaryTable(AliasTable):
    """Answers of canaries. No method raises for an adapter that is not there: its answers may come late."""

    def add_answers(self, name: str, counts: Mapping[int, AnswerCounts]) -> tuple[bool, bool]:
        """Count answers by version. Whether any of them is the canary's or its champion's, and whether that had the
        canary withdrawn by this very call."""
        ref, table = parsed(name), schema.canaries
        with self._database.writing() as connection:
            held = sa.select(schema.adapters.c.made).where(same(schema.adapters, ref)).with_for_update()
            connection.execute(held)  # no alias of it moves meanwhile
            row = adapter_row(connection, ref)
            standing = None if row is None else to_adapter(row).standing
            if row is None or standing is None or standing.canary is None:
                return False, False
            versions = standing.canary.version, standing.aliases.get(CHAMPION, 0)
            if not any(version in counts for version in versions):
                return False, False
            whose = dict(zip(SIDES, versions, strict=True))
            first = {"tenant": ref.tenant, "adapter": ref.adapter, "made": row.made, **whose}
            connection.execute(self._database.insert_missing(table).values(first))
            kept = connection.execute(sa.select(table).where(same(table, ref))).one()
            same_pair = (kept.made, kept.canary, kept.champion) == (row.made, *versions)
            canary, champion = (
                (_read(kept, side) if same_pair else AnswerCounts()) + counts.get(version, AnswerCounts())
                for side, version in zip(SIDES, versions, strict=True)
            )
            error_looks, failing = judge_errors(canary, champion, kept.error_looks if same_pair else 0)
            score_looks, disliked = judge_scores(canary, champion, kept.score_looks if same_pair else 0)
            verdict = (kept.verdict if same_pair else "") or failing or disliked
            values = {
                **{"made": row.made, **whose, "verdict": verdict},
                **{"error_looks": error_looks, "score_looks": score_looks},
                **_columns("canary", canary),
                **_columns("champion", champion),
            }
            connection.execute(sa.update(table).where(same(table, ref)).values(values))
        withdrawn = verdict != "" and self.withdraw_canary(
            name, versions[0], verdict, generation=row.generation, actor=RULE
        )
        return True, withdrawn


def _read(row: sa.Row[Any], side: str) -> AnswerCounts:
    return AnswerCounts(*(row._mapping[f"{side}_{each.name}"] for each in fields(AnswerCounts)))


def _columns(side: str, counts: AnswerCounts) -> dict[str, Any]:
    return {f"{side}_{name}": value for name, value in asdict(counts).items()}
