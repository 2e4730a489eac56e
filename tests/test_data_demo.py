"""The packaged tenants: real rows, checked, never the same prompt in training and test."""

import json
from collections import Counter

import pytest

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import CHAT_TENANTS, DEMO_TENANTS, check_file, demo_tenant, encode_completion, scan
from pedro.errors import NotFoundError

TENANTS = pytest.mark.parametrize("tenant", DEMO_TENANTS, ids=lambda tenant: tenant.name)
EVERY = pytest.mark.parametrize(
    "tenant", [*DEMO_TENANTS, *CHAT_TENANTS[1:]], ids=lambda tenant: tenant.folder or tenant.name
)


def examples(path):
    return [example for line in scan(path) for example in line.examples]


def prompt(example):
    return " ".join(example.messages[-1]["content"].casefold().split())


@EVERY
def test_both_files_are_usable_and_share_no_prompt(tenant):
    tokenizer = load_tokenizer(resolve_backbone("pedro-nano"))
    train = check_file(tenant.train, tokenizer, 512, validation=tenant.test)
    test = check_file(tenant.test, tokenizer, 512)
    assert train.usable
    assert test.usable
    assert (train.leaked, train.duplicates, train.truncated, train.dropped, train.empty_answers) == (0, 0, 0, 0, 0)
    assert test.examples >= 100
    assert not {prompt(e) for e in examples(tenant.train)} & {prompt(e) for e in examples(tenant.test)}


@TENANTS
def test_the_labels_are_those_of_the_files_and_none_is_rare(tenant):
    for path in (tenant.train, tenant.test):
        counts = Counter(example.completion for example in examples(path))
        assert set(counts) == set(tenant.labels)
        assert max(counts.values()) / sum(counts.values()) < 0.2


@TENANTS
def test_the_first_token_of_an_answer_tells_the_labels_apart(tenant):
    tokenizer = load_tokenizer(resolve_backbone("stories260K"))
    first = {encode_completion(tokenizer, label)[0] for label in tenant.labels}
    assert len(first) == len(tenant.labels)


@EVERY
def test_rows_ship_with_their_licence_and_stay_small(tenant):
    folder = tenant.train.parent
    assert (folder / "LICENSE").stat().st_size > 1000
    assert "Source: https://github.com/" in (folder / "NOTICE").read_text()
    assert tenant.train.stat().st_size + tenant.test.stat().st_size < 300_000


def test_the_tenants_bring_different_shapes_and_labels():
    shapes = [json.loads(tenant.train.read_text().splitlines()[0]).keys() for tenant in DEMO_TENANTS]
    assert len({tuple(sorted(keys)) for keys in shapes}) == 3
    assert len({tenant.labels for tenant in DEMO_TENANTS}) == 3


def test_an_unknown_tenant_is_answered_with_the_names():
    assert demo_tenant("acme") is DEMO_TENANTS[0]
    with pytest.raises(NotFoundError, match="acme, globex, initech"):
        demo_tenant("hooli")
