"""Rows of uploaded files, in sqlite and PostgreSQL."""

from __future__ import annotations

import threading
import time

import pytest
from audit_entries import last_audit

from pedro.errors import NotFoundError, PedroError
from pedro.store import FileRecord, Store


def record(number: int, tenant: str = "acme", **fields) -> FileRecord:
    values = {
        "id": f"file-{number:024x}",
        "tenant": tenant,
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "bytes": 10,
        "digest": "sha256:0",
        "location": f"files/{tenant}/file-{number:024x}",
        "created": 1000.0 + number,
        "expires": None,
        "key_id": None,
    }
    return FileRecord(**{**values, **fields})


def said(store: Store, file_id: str, tenant: str) -> dict:
    with pytest.raises(NotFoundError) as error:
        store.get_file(file_id, tenant)
    return error.value.body()


def test_a_file_is_found_by_its_tenant_alone(store):
    store.add_file(record(1))
    assert store.get_file(record(1).id, "acme") == store.get_file(record(1).id) == record(1)
    unknown = record(2).id
    foreign = said(store, record(1).id, "globex")["error"]["message"].replace(record(1).id, unknown)
    assert foreign == said(store, unknown, "globex")["error"]["message"]
    assert not store.delete_file(record(1).id, "globex")
    assert store.delete_file(record(1).id, "acme")
    assert not store.delete_file(record(1).id, "acme")
    said(store, record(1).id, "acme")


@pytest.mark.parametrize("wrong", ["", "file-", "file-\0", "file-" + "g" * 24, "file-" + "0" * 25, "'; drop table x"])
def test_what_is_no_id_names_no_file(store, wrong):
    assert said(store, wrong, "acme")["error"]["param"] == "id"


def test_pages_hold_every_file_once_also_where_several_came_at_the_same_time(store):
    for number in range(9):
        store.add_file(record(number, created=1000.0 + number // 3))
    store.add_file(record(20, "globex"))
    store.add_file(record(21, purpose="batch"))
    for oldest_first in (False, True):
        pages, after = [], None
        while page := store.list_files("acme", purpose="fine-tune", after=after, limit=2, oldest_first=oldest_first):
            pages += page
            after = page[-1].id
        numbers = [int(one.id.removeprefix("file-"), 16) for one in pages]
        assert numbers == (list(range(9)) if oldest_first else list(range(8, -1, -1)))
    assert len(store.list_files()) == 11
    with pytest.raises(NotFoundError):
        store.list_files("acme", after=record(20, "globex").id)


def test_a_file_that_has_expired_is_gone_but_for_who_cleans_up(store):
    now = time.time()
    store.add_file(record(1, expires=now - 1))
    store.add_file(record(2, expires=now + 1000, bytes=3))
    said(store, record(1).id, "acme")
    assert [one.id for one in store.list_files("acme")] == [record(2).id]
    assert store.held_files("acme") == (1, 3)
    assert {one.id for one in store.stored_files("acme")} == {record(1).id, record(2).id}
    assert store.delete_file(record(1).id)
    assert {one.id for one in store.stored_files("acme")} == {record(2).id}


def test_of_uploads_that_end_together_no_more_get_in_than_fit(store, url):
    refused = []

    def add(number: int) -> None:
        own = Store(url)
        try:
            own.add_file(record(number), tenant_bytes=55)
        except PedroError as error:
            refused.append(error.code)
        finally:
            own.close()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["file_quota_exceeded"] * 7
    assert store.held_files("acme") == (5, 50)
    store.add_file(record(30, "globex"), tenant_bytes=55, tenant_files=1)
    with pytest.raises(PedroError, match="1 files, which is the most"):
        store.add_file(record(31, "globex"), tenant_files=1)


def test_the_audit_has_who_made_and_deleted_a_file(store):
    store.add_file(record(1), actor="key:acme/key_1")
    store.delete_file(record(1).id, actor="key:acme/key_2")
    entries = last_audit(store, "acme")
    assert [(one.actor, one.action, one.subject) for one in entries] == [
        ("key:acme/key_2", "file.delete", record(1).id),
        ("key:acme/key_1", "file.create", record(1).id),
    ]
    assert entries[0].before == entries[1].after
    assert entries[0].before["bytes"] == 10
