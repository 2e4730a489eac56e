"""A version that a job goes on from stays until that job has ended, whoever would delete it."""

from __future__ import annotations

import pytest
from store_moves import stub_version

from pedro.errors import ConflictError, NotFoundError
from pedro.store import JobStatus, Store

NAME = "acme.voice"


@pytest.fixture
def store(url):
    made = Store(url)
    for name in (NAME, "acme.voice-2"):
        for number in (1, 2, 12):
            made.add_version(stub_version(number, name), made.made_of(name))
    yield made
    made.close()


def going_on(store, parent=f"{NAME}:1"):
    return store.create_job("acme", "next", {"parent": parent}, queued=True)


def test_a_parent_is_deleted_only_after_its_job_has_ended_and_the_refusal_names_the_job(store):
    job = going_on(store)
    for delete in (
        lambda: store.delete_version(NAME, 1),
        lambda: store.retire_version(NAME, 1, float("inf")),
        lambda: store.delete_adapter(NAME),
    ):
        with pytest.raises(ConflictError, match=rf"acme\.voice:1: the job {job.id} goes on from it"):
            delete()
    assert [version.version for version in store.list_versions(NAME)] == [1, 2, 12]
    store.ask_of_job(job.id, JobStatus.PAUSED)
    with pytest.raises(ConflictError):
        store.delete_version(NAME, 1)
    store.ask_of_job(job.id, JobStatus.CANCELLED)
    store.delete_version(NAME, 1)
    store.delete_adapter(NAME)


def test_other_versions_and_adapters_of_like_names_are_not_held(store):
    going_on(store, f"{NAME}:1")
    store.delete_version(NAME, 12)
    store.delete_version(NAME, 2)
    store.delete_adapter("acme.voice-2")


def test_no_job_begins_or_is_tried_again_from_a_version_that_is_gone(store):
    job = going_on(store)
    store.update_job(job.id, status=JobStatus.FAILED, message="bad luck")
    store.delete_version(NAME, 1)
    with pytest.raises(NotFoundError, match="was deleted"):
        store.let_job_continue(job.id, [JobStatus.FAILED])
    assert store.get_job(job.id).status == JobStatus.FAILED
    for ask in (going_on, lambda _: store.ask_for_job("acme", "next", {"parent": f"{NAME}:1"}, key_id="key_1")):
        with pytest.raises(NotFoundError, match="was deleted"):
            ask(store)
    assert len(store.list_jobs("acme")) == 1
