"""Batches in the store, on sqlite and on PostgreSQL: leases with fences, answers that count once, ends as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pedro.errors import ConflictError, NotFoundError
from pedro.store import BatchRecord, BatchStatus, FileRecord, Store

FILE = FileRecord("file-1", "acme", "out.jsonl", "batch_output", 9, "sha256:1", "files/acme/1", 1.0, None, None)


def made(store: Store, batch_id: str, tenant: str = "acme", created: float = 0.0) -> BatchRecord:
    batch = BatchRecord(
        batch_id, tenant, "key_1", "/v1/completions", "file-0", "24h", BatchStatus.VALIDATING, created, created + 100.0
    )
    store.create_batch(batch, 10)
    return batch


def leased(store: Store, owner: str, now: float, most: int = 9) -> list[str]:
    return sorted(batch.id for batch in store.lease_batches(owner, now, now + 10.0, now, most))


def test_a_holder_that_slept_through_its_lease_changes_nothing_any_more(store):
    made(store, "b1")
    (first,) = store.lease_batches("a", 1.0, 11.0, 1.0, 9)
    assert leased(store, "b", 5.0) == []
    assert store.begin_batch(first, 3, 2.0)
    assert store.add_batch_answer(first, 1, 200, "one")
    (second,) = store.lease_batches("b", 12.0, 22.0, 12.0, 9)
    assert (second.status, second.fence) == ("in_progress", first.fence + 1)
    for change in (
        lambda: store.add_batch_answer(first, 2, 200, "two"),
        lambda: store.finalize_batch(first, 13.0),
        lambda: store.end_batch(first, BatchStatus.COMPLETED, 13.0, (FILE, None)),
    ):
        assert not change()
    assert store.add_batch_answer(second, 2, 400, "other")
    assert store.answered_lines("b1") == {1, 2}
    assert list(store.read_answers("b1", good=True)) == ["one"]
    assert store.list_files() == []
    now = store.get_batch("b1", "acme")
    assert (now.total, now.completed, now.failed) == (3, 1, 1)


def test_a_row_has_one_answer_and_is_counted_with_it(store):
    made(store, "b1")
    (batch,) = store.lease_batches("a", 1.0, 11.0, 1.0, 9)
    assert not store.add_batch_answer(batch, 1, 200, "too early")
    store.begin_batch(batch, 600, 2.0)
    for line in range(600):
        assert store.add_batch_answer(batch, line, 200, str(line))
    with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
        store.add_batch_answer(batch, 7, 200, "again")
    assert store.get_batch("b1", "acme").completed == 600
    assert list(store.read_answers("b1", good=True)) == [str(line) for line in range(600)]  # of more than one page


def test_an_end_enters_files_and_state_together_and_again_does_nothing(store):
    made(store, "b1")
    (batch,) = store.lease_batches("a", 1.0, 11.0, 1.0, 9)
    store.begin_batch(batch, 1, 2.0)
    store.add_batch_answer(batch, 1, 200, "one")
    assert store.finalize_batch(batch, 3.0)
    assert store.end_batch(batch, BatchStatus.COMPLETED, 4.0, (FILE, None))
    assert not store.end_batch(batch, BatchStatus.COMPLETED, 5.0, (replace(FILE, id="file-2"), None))
    now = store.get_batch("b1", "acme")
    assert (now.status, now.output_file_id, now.error_file_id) == ("completed", "file-1", None)
    assert now.moments == {"in_progress": 2.0, "finalizing": 3.0, "completed": 4.0}
    assert [file.id for file in store.list_files()] == ["file-1"]
    assert store.answered_lines("b1") == set()
    assert leased(store, "a", 6.0) == []
    with pytest.raises(ConflictError, match="is completed"):
        store.cancel_batch("b1", "acme", 6.0)
    with pytest.raises(NotFoundError):
        store.cancel_batch("b1", "globex", 6.0)
    assert store.count_ended_batches(4.0) == 0
    assert (store.count_ended_batches(4.5), store.forget_ended_batches(4.5)) == (1, 1)
    assert store.list_batches("acme") == []


def test_of_each_tenant_the_oldest_is_leased_and_what_only_has_to_be_ended(store):
    for number in range(3):
        made(store, f"b{number}", created=float(number))
    made(store, "other", tenant="globex", created=1.0)
    assert leased(store, "a", 5.0) == ["b0", "other"]
    store.cancel_batch("b2", "acme", 6.0)
    assert leased(store, "a", 6.0) == ["b0", "b2", "other"]
    assert leased(store, "a", 101.5) == ["b0", "b1", "b2", "other"]  # their time is over
    store.release_batches("a")
    assert leased(store, "b", 5.0) == ["b0", "b2", "other"]


def test_gateways_share_the_batches_and_each_keeps_what_it_has(store):
    for number in range(5):
        made(store, f"b{number}", tenant=f"tenant{number}", created=float(number))
    assert leased(store, "a", 5.0, most=2) == leased(store, "a", 6.0, most=2) == ["b0", "b1"]
    assert leased(store, "b", 6.0, most=2) == ["b2", "b3"]
    assert leased(store, "a", 7.0, most=3) == ["b0", "b1", "b4"]
    assert leased(store, "c", 7.0, most=3) == []
    assert leased(store, "c", 16.5, most=3) == ["b2", "b3"]  # of one that does not renew them


def test_batches_of_a_tenant_that_is_erased_are_over_where_they_stand(store):
    made(store, "b1")
    made(store, "b2", tenant="globex")
    mine, _ = sorted(store.lease_batches("a", 1.0, 11.0, 1.0, 9), key=lambda batch: batch.id)
    store.begin_batch(mine, 2, 2.0)
    store.add_batch_answer(mine, 1, 200, "one")
    store.begin_erasure("acme")
    assert not store.add_batch_answer(mine, 2, 200, "two")
    assert not store.end_batch(mine, BatchStatus.CANCELLED, 3.0, (FILE, None))
    with pytest.raises(ConflictError, match="is being erased"):
        made(store, "b3")
    assert (store.count_of("acme")["batches"], store.count_of("acme")["batch answers"]) == (1, 1)
    store.erase_rows("acme", "erased-1")
    assert (store.list_batches("acme"), store.answered_lines("b1")) == ([], set())
    assert [batch.id for batch in store.list_batches("globex")] == ["b2"]
