"""Recognises rows made for another purpose, and says which."""

from __future__ import annotations

from typing import Any

from pedro.data.mistakes import LineError, blank, kind_of

BATCH = "a file of OpenAI's batch API {what}, not of training rows; send it to a batch endpoint, or train on messages"
UNSUPPORTED = ("functions", "documents", "images", "image", "videos", "video", "audios", "audio")


def refuse_foreign(row: dict[str, Any], line: int) -> None:
    """Raise LineError for a row of another kind of file, or with a field that would change what is learnt."""
    if "custom_id" in row and ("body" in row or "response" in row):
        raise LineError(line, "custom_id", BATCH.format(what="(requests)" if "body" in row else "(results)"))
    if isinstance(row.get("label"), bool) and "prompt" in row:
        reason = (
            "true or false beside a prompt marks wanted and unwanted answers (KTO), which are not learnt apart here"
        )
        raise LineError(line, "label", f"{reason}; keep the wanted ones, without label")
    weight = row.get("weight")
    if not blank(weight) and (isinstance(weight, bool) or weight not in (1, "1", "1.0")):
        reason = f"a row's weight other than 1 is not supported, got {kind_of(weight, show=True)}"
        raise LineError(
            line, "weight", f"{reason}; leave the field out, repeat the row, or give its turns weight 0 or 1"
        )
    for field in UNSUPPORTED:
        if not blank(row.get(field)):
            raise LineError(line, field, "not supported yet, and leaving it out would train another task; remove it")
