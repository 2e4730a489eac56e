"""What tenants see of prompts that are read once: `cached_tokens` over HTTP, in the ledger and in metrics."""

import time

import httpx
import openai
import pytest
from dashboard_gateway import running
from prometheus_client.parser import text_string_to_metric_families as parsed
from serving_adapters import make_adapter, register, settings_at

from pedro.registry import Registry
from pedro.serving.config import ServeConfig

BACKBONE = "stories260K"
IDS = [1, *range(300, 340)]  # 41 tokens: two blocks of 16, and the rest
CHAT = [{"role": "system", "content": "Once there was a little girl who liked to play in the park. " * 3}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A gateway of its own with acme.faq and globex.faq, and keys of both tenants."""
    folder = tmp_path_factory.mktemp("prefixes")
    settings = settings_at(folder / "home")
    for seed, name in enumerate(("acme.faq", "globex.faq"), start=1):
        make_adapter(folder / name, seed)
        register(Registry.open(settings), folder / name, name)
    make_adapter(folder / "second", 7)
    with running(settings, ServeConfig(max_batch=4, prefix_cache_mb=64)) as gateway:
        keys = {"acme": gateway.acme, "globex": gateway.store.create_key("globex", ("infer",))[1]}
        yield gateway, keys, folder


@pytest.fixture
def client(served):
    """The official client of a tenant."""
    gateway, keys, _ = served
    return lambda tenant="acme": openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=keys[tenant], max_retries=0, timeout=120
    )


def complete(client, ids, model=BACKBONE, **fields):
    body = {"model": model, "prompt": ids, "max_tokens": 2, "temperature": 0, **fields}
    return client.completions.create(**body)


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def prompt(number):
    """A prompt that no other test asks."""
    return [1, 3 + number, *IDS]


def test_usage_says_how_many_tokens_of_a_completion_s_prompt_were_not_read_again(client):
    first, again, longer = (complete(client(), [*prompt(1), *rest]) for rest in ([], [], [5, 6, 7]))
    assert [cached(answer) for answer in (first, again, longer)] == [0, 32, 32]
    assert again.choices[0].text == first.choices[0].text
    assert (longer.usage.prompt_tokens, longer.usage.total_tokens) == (46, 48)
    both = complete(client(), [prompt(1), prompt(2)], n=2, temperature=1)
    assert (both.usage.prompt_tokens, cached(both)) == (2 * 43, 32), "a prompt counts once, however many answers it has"


def test_usage_of_streams_says_it_too_and_so_do_chats(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = []
    chat = list(CHAT)
    for said in ("Who was it?", "Who was it?", "And where?"):
        asked = [*chat, {"role": "user", "content": said}]
        whole = client().chat.completions.create(model=BACKBONE, messages=asked, max_tokens=4, temperature=0)
        chunks = list(
            client().chat.completions.create(
                model=BACKBONE, messages=asked, max_tokens=4, temperature=0, stream=True, stream_options=options
            )
        )
        assert {cached(chunk) for chunk in chunks} == {cached(chunks[-1])}
        found += [cached(whole), cached(chunks[-1])]
        assert found[-1] == whole.usage.prompt_tokens // 16 * 16 - 16 * (not whole.usage.prompt_tokens % 16)
    assert found[0] == 0
    assert found[1] == found[2] == found[3] > 32
    assert 0 < found[4] <= found[3]


def test_the_next_turn_of_a_chat_finds_the_turns_before_it(client):
    chat = [{"role": "system", "content": "You tell stories of animals. " * 4}]
    found = []
    for said in ("Tell one.", "Go on.", "Go on."):
        chat.append({"role": "user", "content": said})
        answer = client().chat.completions.create(model=BACKBONE, messages=chat, max_tokens=24, temperature=0)
        found.append((cached(answer), answer.usage.prompt_tokens))
        chat.append({"role": "assistant", "content": answer.choices[0].message.content})
    (none, first), (second_cached, second), (third_cached, _) = found
    assert none == 0
    assert first - 32 <= second_cached < second  # where the answer begins, tokens may be cut otherwise
    assert second - 32 <= third_cached


def test_an_adapter_s_vectors_let_the_same_prompt_alone_be_found(client):
    found = [cached(complete(client(), ids, "acme.faq")) for ids in (prompt(3), prompt(3), [*prompt(3), 5])]
    assert found == [0, 32, 0]
    head = {"conditioning_length": 20}
    found = [cached(complete(client(), [*prompt(4), n], "acme.faq", extra_body=head)) for n in (5, 6)]
    assert found == [0, 32]


def test_nobody_finds_what_another_tenant_asked_nor_by_another_salt(client):
    for tenant in ("acme", "globex"):
        assert cached(complete(client(tenant), prompt(5))) == 0, "the same text of another tenant"
        assert cached(complete(client(tenant), prompt(5))) == 32
    for salt in ("one", "two"):
        body = {"cache_salt": salt}
        assert [cached(complete(client(), prompt(5), extra_body=body)) for _ in range(2)] == [0, 32]


def test_the_version_that_an_alias_moves_to_finds_nothing_of_the_one_before(served, client):
    gateway, _, folder = served
    before = [complete(client(), prompt(6), "acme.faq") for _ in range(2)]
    version = register(gateway.registry, folder / "second", "acme.faq")
    end = time.monotonic() + 60
    while True:
        after = complete(client(), prompt(6), "acme.faq")
        if after.system_fingerprint != before[0].system_fingerprint:
            break
        assert time.monotonic() < end, "the alias's move was not heard of"
        time.sleep(0.05)
    assert f":{version.version}#" in after.system_fingerprint
    assert [cached(answer) for answer in (*before, after)] == [0, 32, 0]


def test_ledger_and_metrics_count_what_the_answers_said(served, client):
    gateway, keys, _ = served
    record, secret = gateway.store.create_key("initech", ("infer",))
    keys["initech"] = secret
    told = sum(cached(complete(client("initech"), prompt(7))) for _ in range(3))
    assert told == 64
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.admin}"}) as http:
        end = time.monotonic() + 60
        while sum(used.requests for used in gateway.store.usage("initech")) < 3:
            assert time.monotonic() < end, "the ledger was not written"
            time.sleep(0.05)
        (used,) = gateway.store.usage("initech")
        assert (used.key_id, used.cached_tokens, used.prompt_tokens) == (record.id, told, 3 * 43)
        found = {
            (sample.name, sample.labels.get("adapter")): sample.value
            for family in parsed(http.get("/metrics").text)
            for sample in family.samples
        }
    assert found["pedro_prefix_cache_hits_total", BACKBONE] >= told
    queried, prompts = (found[f"pedro_{name}_total", BACKBONE] for name in ("prefix_cache_queries", "prompt_tokens"))
    assert queried == prompts
    assert found["pedro_prefix_cache_budget_bytes", None] == 64 << 20
    held = sum(value for (name, _), value in found.items() if name == "pedro_prefix_cache_bytes")
    assert 0 < found["pedro_prefix_cache_bytes", BACKBONE] <= held <= 64 << 20
    assert found["pedro_prefix_cache_evictions_total", None] == 0


def test_a_salt_that_is_no_text_of_bounded_length_is_refused_by_name(client):
    for salt in (5, "x" * 300):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client(), prompt(8), extra_body={"cache_salt": salt})
        assert refused.value.param == "cache_salt"


@pytest.mark.parametrize(
    ("options", "expected"), [({"prefix_cache_mb": 0}, [0, 0, 0]), ({"share_bare_prefixes": True}, [0, 32, 32])]
)
def test_a_server_keeps_nothing_or_shares_bare_prompts_where_its_operator_says_so(tmp_path, options, expected):
    with running(settings_at(tmp_path / "home"), ServeConfig(max_batch=2, **options)) as gateway:
        keys = [gateway.acme, gateway.acme, gateway.store.create_key("globex", ("infer",))[1]]
        clients = [openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) for key in keys]
        assert [cached(complete(client, prompt(9))) for client in clients] == expected
