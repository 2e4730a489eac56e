"""`pedro chat`: talk to a served model, to see what a tenant's users see."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, printable

if TYPE_CHECKING:
    from pedro.serving.deploy import Served

OPERATOR = "pedro-chat"  # the tenant whose usage a chat without a key is
DAY_S = 86_400.0


def chat(
    model: Annotated[str, typer.Argument(help="A model name, for instance acme.support")],
    message: Annotated[str | None, typer.Argument(help="One message; without it, type messages until Ctrl-D.")] = None,
    url: Annotated[str | None, typer.Option(help="The server's address [PEDRO_URL, else the local server].")] = None,
    key: Annotated[str | None, typer.Option(envvar="PEDRO_API_KEY", help="An API key.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Chat with a model; the answer is streamed.

    Where the server runs, its backbone answers without a key: the command makes one of tenant pedro-chat, and revokes
    it when it ends.

    Example: `PEDRO_API_KEY=sk-pedro-… pedro chat acme.intents "play some jazz"`
    """
    from pedro.config import Settings
    from pedro.errors import ConfigError
    from pedro.serving.deploy import find

    address = url or os.environ.get("PEDRO_URL")
    server = None if address else find(Settings.from_env())
    with nullcontext(key) if key else _short_lived_key(model, server) as secret:
        base = address or (server and server.url)
        if not base:
            raise ConfigError(
                "no server runs for this PEDRO_HOME; start one with `pedro serve`, or give --url", param="url"
            )
        _talk(base, secret, model, message, max_tokens, temperature, as_json)


def _talk(
    base: str, key: str, model: str, message: str | None, max_tokens: int, temperature: float, as_json: bool
) -> None:
    history: list[dict[str, str]] = []
    while True:
        text = message if message is not None else _ask()
        if text is None:
            return
        history.append({"role": "user", "content": text})
        body = {
            "model": model,
            "messages": history,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        answer = ""
        for piece in _stream(base, key, body):
            answer += piece
            if not as_json:
                typer.echo(printable(piece), nl=False)
        emit({"model": model, "message": answer}, as_json, typer.echo)
        history.append({"role": "assistant", "content": answer})
        if message is not None:
            return


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


@contextmanager
def _short_lived_key(model: str, server: Served | None) -> Iterator[str]:
    """A key for the backbone of this home's own server while a chat lasts, a day at most.

    Whoever can do this can make keys anyhow. Raises ConfigError for adapters, whose tenants would pay for it.
    """
    from pedro.config import Settings
    from pedro.errors import ConfigError
    from pedro.store import Store

    if server is None or server.backbone != model:
        raise ConfigError(
            "no API key; give --key, or set PEDRO_API_KEY (`pedro keys create TENANT` makes one)", param="key"
        )
    store = Store(Settings.from_env().database_url)
    key, secret = store.create_key(OPERATOR, name="a chat without a key", expires=time.time() + DAY_S)
    try:
        yield secret
    finally:
        store.revoke_key(key.id)


def _stream(base: str, key: str, body: dict[str, Any]) -> Iterator[str]:
    """Pieces of the answer; an error body of the server is raised as it stands."""
    import httpx

    from pedro.errors import PedroError, UnavailableError

    try:
        with httpx.stream(
            "POST",
            f"{base.rstrip('/')}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(120, connect=5),
        ) as reply:
            if reply.status_code != 200:
                reply.read()
                raise PedroError(_message(reply.text, reply.status_code))
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise PedroError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise UnavailableError(f"{base} does not answer ({type(error).__name__}); is `pedro serve` running?") from error


def _message(text: str, status: int) -> str:
    try:
        message: str = json.loads(text)["error"]["message"]
        return message
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"
