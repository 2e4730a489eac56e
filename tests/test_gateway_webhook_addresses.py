"""Webhooks lead nowhere that a tenant could not reach itself: what is refused when one is made, and when it is sent."""

from __future__ import annotations

import asyncio
import ssl
import threading

import openai
import pytest
from gateway_server import serve
from webhook_receiver import LOOPBACK, receiving

from pedro.gateway.app import GatewaySettings
from pedro.gateway.webhook_addresses import THREADS_PER_TENANT, Addresses, WebhookUrlError, read_url
from pedro.gateway.webhook_sending import NotSentError, WebhookSender, sample
from pedro.gateway.webhook_signing import WebhookSecrets
from pedro.store import PING

PUBLIC = "93.184.216.34"
INSIDE = [
    "https://127.0.0.1/",
    "https://127.0.0.1:8443/x",
    "https://[::1]/",
    "https://localhost/",
    "https://169.254.169.254/latest/meta-data/",
    "https://168.63.129.16/",
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[fe80::1]/",
    "https://[fd00::1]/",
    "https://[ff02::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:a9fe:a9fe]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://127.0.0.1./",
]
NO_URLS = [
    "",
    "example.com",
    "//example.com",
    "https://",
    "https:///x",
    "ftp://example.com/",
    "file:///etc/passwd",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://@example.com/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://example.com:x/",
    "https://example.com/#part",
    "https://exa mple.com/",
    "https://example.com/\n",
    "https://exämple.com/",
    "https://[fe80::1%25eth0]/",
    "https://exa%6dple.com/",
]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    with serve(folder, settings=GatewaySettings(webhook_key_file=folder / "webhook.key")) as running:
        yield running.client(running.key("acme", ("train",)))


def hook(client: openai.OpenAI, url: str):
    return client.webhooks.create(name="hook", url=url, event_types=["batch.failed"])


@pytest.mark.parametrize("url", INSIDE)
def test_an_address_inside_is_refused_however_it_is_written(client, url):
    with pytest.raises(
        openai.BadRequestError, match=r"not on the public network|has no address|is not a URL"
    ) as refused:
        hook(client, url)
    assert (refused.value.param, refused.value.code) == ("url", "invalid_webhook_url")


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url_of_a_webhook_is_refused(client, url):
    with pytest.raises(openai.BadRequestError) as refused:
        hook(client, url)
    assert (refused.value.param, refused.value.code) == ("url", "invalid_webhook_url")


def test_without_tls_nothing_public_is_sent_to(client):
    with pytest.raises(openai.BadRequestError, match="expected https://"):
        hook(client, f"http://{PUBLIC}/")


def test_a_public_address_is_taken_and_changed_to_no_other(client):
    made = hook(client, f"https://{PUBLIC}/hook?x=a@b")
    with pytest.raises(openai.BadRequestError, match="not on the public network"):
        client.webhooks.update(made.id, url="https://10.0.0.1/")
    assert client.webhooks.retrieve(made.id).url == f"https://{PUBLIC}/hook?x=a@b"


def allowed(url: str, addresses: Addresses) -> list[str]:
    return asyncio.run(addresses.of("acme", read_url(url)))


def test_a_name_means_all_of_its_addresses_and_one_inside_refuses_it():
    assert allowed("https://example.com/", Addresses(lookup=lambda *_: [PUBLIC, PUBLIC, "2606:2800:220:1::1"])) == [
        PUBLIC,
        "2606:2800:220:1::1",
    ]
    with pytest.raises(WebhookUrlError, match="not on the public network"):
        allowed("https://example.com/", Addresses(lookup=lambda *_: [PUBLIC, "127.0.0.1"]))


def test_an_operators_network_is_allowed_also_without_tls_and_nothing_beside_it():
    addresses = Addresses(["10.1.0.0/16", "fd00:1::/32"])
    for url in ("https://10.1.2.3/", "http://10.1.2.3:8080/", "http://[fd00:1::5]/"):
        assert len(allowed(url, addresses)) == 1
    for url in ("https://10.2.0.1/", "http://127.0.0.1/", "https://[fd00:2::5]/"):
        with pytest.raises(WebhookUrlError, match="not on the public network"):
            allowed(url, addresses)
    with pytest.raises(WebhookUrlError, match="expected https"):
        allowed("http://example.com/", Addresses(["10.1.0.0/16"], lookup=lambda *_: ["10.1.0.1", PUBLIC]))


def test_a_name_server_that_does_not_answer_holds_up_its_tenant_alone(monkeypatch):
    monkeypatch.setattr("pedro.gateway.webhook_addresses.LOOKUP_S", 0.2)
    answer = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        if host.startswith("slow"):
            answer.wait(60)
        return [PUBLIC]

    async def run() -> None:
        addresses = Addresses(lookup=lookup)
        slow = [addresses.of("acme", read_url(f"https://slow{number}.example/")) for number in range(6)]
        refused = [str(one) for one in await asyncio.gather(*slow, return_exceptions=True)]
        assert sum("has no address" in one for one in refused) == THREADS_PER_TENANT
        assert sum("still being looked up" in one for one in refused) == 6 - THREADS_PER_TENANT
        with pytest.raises(WebhookUrlError, match="still being looked up"):
            await addresses.of("acme", read_url("https://example.com/"))
        assert await addresses.of("globex", read_url("https://example.com/")) == [PUBLIC]
        answer.set()
        while True:
            try:
                assert await addresses.of("acme", read_url("https://example.com/")) == [PUBLIC]
                return
            except WebhookUrlError:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def send(folder, url: str, addresses: Addresses) -> int:
    secrets = WebhookSecrets(folder / "webhook.key")
    endpoint, _ = secrets.new_endpoint("acme", "hook", url, ("batch.failed",), 1.0)
    return asyncio.run(WebhookSender(secrets, addresses).send(endpoint, *sample(PING, 1.0)))


def test_a_name_that_leads_inside_by_the_time_of_sending_is_refused_then(tmp_path):
    with receiving() as inside:
        with pytest.raises(WebhookUrlError, match="not on the public network"):
            send(tmp_path, f"https://hooks.example:{inside.port}/", Addresses(lookup=lambda *_: ["127.0.0.1"]))
        assert inside.got == []


def test_the_connection_goes_to_the_address_that_was_looked_at_and_to_no_other(tmp_path):
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]  # hooks.example has no address but this one

    with receiving() as receiver:
        url = f"http://hooks.example:{receiver.port}/x?y=1"
        assert send(tmp_path, url, Addresses(LOOPBACK, lookup)) == 200
        assert asked == [("hooks.example", receiver.port)]
        assert receiver.got[0].headers["host"] == f"hooks.example:{receiver.port}"
        assert receiver.got[0].path == "/x?y=1"


def test_another_address_is_tried_where_one_does_not_connect(tmp_path):
    with receiving() as receiver:
        addresses = Addresses(LOOPBACK, lambda *_: ["127.0.0.2", "127.0.0.1"])  # it listens on the second alone
        assert send(tmp_path, receiver.url, addresses) == 200


def test_a_redirect_inside_is_not_followed(tmp_path):
    with receiving() as receiver, receiving() as inside:
        receiver.statuses, receiver.location = [307], inside.url
        assert send(tmp_path, receiver.url, Addresses(LOOPBACK)) == 307
        assert inside.got == []


def test_the_environments_proxy_is_not_asked(tmp_path, monkeypatch):
    with receiving() as receiver, receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert send(tmp_path, receiver.url, Addresses(LOOPBACK)) == 200
        assert proxy.got == []


def test_of_an_answer_that_never_ends_the_status_is_read_and_nothing_else(tmp_path):
    with receiving() as receiver:
        receiver.endless = True
        assert send(tmp_path, receiver.url, Addresses(LOOPBACK)) == 200


def test_an_endpoint_that_never_answers_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("pedro.gateway.webhook_sending.ATTEMPT_S", 0.3)
    with receiving() as receiver:
        receiver.open.clear()
        with pytest.raises(NotSentError, match="no response within the time limit"):
            send(tmp_path, receiver.url, Addresses(LOOPBACK))


def certificate(folder, name: str) -> ssl.SSLContext:
    """A server's TLS with a certificate of its own for `name`, which is also in `folder` as ca.pem."""
    from datetime import UTC, datetime, timedelta

    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(made.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + made.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


def test_a_certificate_must_be_that_of_the_name_and_of_an_authority_that_is_known(tmp_path, monkeypatch):
    addresses = Addresses(LOOPBACK, lambda *_: ["127.0.0.1"])
    with receiving(certificate(tmp_path, "hooks.example")) as receiver:
        with pytest.raises(NotSentError, match="certificate is not valid"):
            send(tmp_path, f"https://hooks.example:{receiver.port}/", addresses)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert send(tmp_path, f"https://hooks.example:{receiver.port}/", addresses) == 200
        with pytest.raises(NotSentError, match="certificate is not valid"):
            send(tmp_path, f"https://other.example:{receiver.port}/", addresses)
        assert len(receiver.got) == 1
