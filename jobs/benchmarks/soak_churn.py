"""What a soaked server is asked: everything that comes and goes, over HTTP, without end, by a seed."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from jobs.benchmarks.local_server import TENANT

if TYPE_CHECKING:
    from jobs.benchmarks.local_server import LocalServer

ANSWERS, LEFT = 8, 0.2  # so many are asked at once; of these so many are left in their middle
MOVE_S, RESIDE_S, OTHERS_S, SETTLED_S = 0.25, 0.5, 0.2, 120.0
FILE_BYTES, BATCH_ROWS = 64 * 2**10, 5
# Of no event that the soak makes: nothing is ever sent there
HOOK = {"url": "https://1.1.1.1/pedro", "name": "soak", "event_types": ["fine_tuning.job.succeeded"]}
ENDED = ("completed", "failed", "expired", "cancelled")


class Churn:
    """Asks while it is running; `done` counts requests by kind, `failures` are those that should have been answered."""

    def __init__(self, local: LocalServer, models: Sequence[str], backbone: str, asked: Sequence[list[int]]) -> None:
        self._local, self._models, self._backbone, self._prompts = local, models, backbone, asked
        tenant = local.key(TENANT, "infer", "train", "read")
        operator = local.key("operator", "admin")
        self._headers = {who: {"authorization": f"Bearer {key}"} for who, key in (("", tenant), ("operator", operator))}
        self._random = random.Random(0)  # noqa: S311
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For the time of the `with`."""
        async with self._client() as client:
            works: list[tuple[Callable[[httpx.AsyncClient], Awaitable[None]], float]] = [(self._answer, 0.0)] * ANSWERS
            works += [(self._move, MOVE_S), (self._reside, RESIDE_S)]
            works += [(work, OTHERS_S) for work in (self._file, self._batch, self._job, self._webhook, self._key)]
            going = asyncio.Event()
            going.set()
            tasks = [asyncio.create_task(self._again(work, client, pause, going)) for work, pause in works]
            try:
                yield
            finally:
                going.clear()
                await asyncio.gather(*tasks)

    async def delete_all(self) -> None:
        """Delete what may be deleted, once the batches have ended."""
        async with self._client() as client:
            async with asyncio.timeout(SETTLED_S):
                while any(each["status"] not in ENDED for each in (await self._get(client, "/v1/batches"))["data"]):
                    await asyncio.sleep(1)
            for each in (await self._get(client, "/v1/files"))["data"]:
                await self._ask(client, "DELETE", f"/v1/files/{each['id']}")
            for each in (await self._get(client, "/v1/webhook_endpoints"))["data"]:
                await self._ask(client, "DELETE", f"/v1/webhook_endpoints/{each['id']}")

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._local.url, timeout=SETTLED_S, limits=httpx.Limits(max_connections=64))

    async def _again(
        self,
        work: Callable[[httpx.AsyncClient], Awaitable[None]],
        client: httpx.AsyncClient,
        pause: float,
        going: asyncio.Event,
    ) -> None:
        while going.is_set():
            try:
                await work(client)
            except (httpx.HTTPError, KeyError, ValueError, TimeoutError) as error:
                self.failures.append(f"{work.__name__}: {type(error).__name__}: {error}"[:300])
            await asyncio.sleep(pause)

    async def _ask(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        who: str = "",
        right: Sequence[int] = (200,),
        **more: Any,
    ) -> Any:
        reply = await client.request(method, path, headers=self._headers[who], **more)
        self.done[f"{method} {path.split('/')[2]}"] += 1
        if reply.status_code not in right:
            raise ValueError(f"{method} {path}: {reply.status_code} {reply.text}")
        return reply.json() if reply.headers["content-type"] == "application/json" else reply.content

    async def _get(self, client: httpx.AsyncClient, path: str) -> Any:
        return await self._ask(client, "GET", path)

    async def _answer(self, client: httpx.AsyncClient) -> None:
        """One answer of any adapter; some are left before their first token, some after it."""
        body: dict[str, Any] = {"model": self._random.choice(self._models)}
        body |= {
            "prompt": self._random.choice(self._prompts),
            "max_tokens": self._random.randint(1, 48),
            "ignore_eos": True,
            "stream": self._random.random() < 0.5,
        }
        if self._random.random() < LEFT:
            self.done["left"] += 1
            with_first = self._random.random() < 0.5
            body |= {"stream": with_first, "max_tokens": 400}
            try:
                async with asyncio.timeout(SETTLED_S if with_first else self._random.uniform(0.001, 0.1)):
                    async with client.stream("POST", "/v1/completions", json=body, headers=self._headers[""]) as reply:
                        async for _ in reply.aiter_lines():
                            break
            except TimeoutError:
                pass
            return
        if body["stream"]:
            async with client.stream("POST", "/v1/completions", json=body, headers=self._headers[""]) as reply:
                lines = [line async for line in reply.aiter_lines() if line]
            self.done["streams"] += 1
            if reply.status_code != 200 or lines[-1] != "data: [DONE]":
                raise ValueError(f"a stream: {reply.status_code} {lines[-1:]}")
            return
        await self._ask(client, "POST", "/v1/completions", json=body)

    async def _move(self, client: httpx.AsyncClient) -> None:
        name, version = self._random.choice(self._models), self._random.randint(1, 2)
        await self._ask(client, "POST", f"/v1/adapters/{name}/promote", json={"version": version})

    async def _reside(self, client: httpx.AsyncClient) -> None:
        """Load one version, pin it, and have it leave."""
        ref = f"{self._random.choice(self._models)}:{self._random.randint(1, 2)}"
        for what in ("load", "pin", "unpin", "unload"):
            await self._ask(client, "POST", f"/v1/adapters/{ref}/{what}", "operator", right=(200, 404, 409, 503))

    async def _file(self, client: httpx.AsyncClient) -> None:
        made = await self._upload(client, self._random.randbytes(FILE_BYTES // 2).hex().encode(), "batch")
        await self._get(client, f"/v1/files/{made}/content")
        await self._ask(client, "DELETE", f"/v1/files/{made}")

    async def _batch(self, client: httpx.AsyncClient) -> None:
        """A batch, its answers, and none of its files left."""
        body = {"model": self._random.choice(self._models), "prompt": self._prompts[0], "max_tokens": 4}
        row = {"method": "POST", "url": "/v1/completions", "body": body}
        rows = [json.dumps({"custom_id": str(number), **row}) for number in range(BATCH_ROWS)]
        given = await self._upload(client, "\n".join(rows).encode(), "batch")
        asked = {"input_file_id": given, "endpoint": "/v1/completions", "completion_window": "24h"}
        made = await self._ask(client, "POST", "/v1/batches", json=asked)
        if self._random.random() < LEFT:
            await self._ask(client, "POST", f"/v1/batches/{made['id']}/cancel", right=(200, 409))
        async with asyncio.timeout(SETTLED_S):
            while made["status"] not in ENDED:
                await asyncio.sleep(0.2)
                made = await self._get(client, f"/v1/batches/{made['id']}")
        for file_id in (given, made["output_file_id"], made["error_file_id"]):
            if file_id is not None:
                await self._ask(client, "DELETE", f"/v1/files/{file_id}")

    async def _job(self, client: httpx.AsyncClient) -> None:
        """A job that waits, since there is no controller, and is cancelled."""
        row = {"messages": [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]}
        given = await self._upload(client, "\n".join([json.dumps(row)] * 20).encode(), "fine-tune")
        made = await self._ask(
            client, "POST", "/v1/fine_tuning/jobs", json={"model": self._backbone, "training_file": given}
        )
        for what in ("events", "checkpoints"):
            await self._get(client, f"/v1/fine_tuning/jobs/{made['id']}/{what}")
        await self._ask(client, "POST", f"/v1/fine_tuning/jobs/{made['id']}/cancel")
        await self._ask(client, "DELETE", f"/v1/files/{given}", right=(200, 409))

    async def _webhook(self, client: httpx.AsyncClient) -> None:
        made = await self._ask(client, "POST", "/v1/webhook_endpoints", json=HOOK)
        await self._ask(client, "POST", f"/v1/webhook_endpoints/{made['id']}/rotate_secret", json={})
        await self._ask(client, "DELETE", f"/v1/webhook_endpoints/{made['id']}")

    async def _key(self, client: httpx.AsyncClient) -> None:
        """A key that is made, used, and revoked."""
        key, secret = await asyncio.to_thread(self._local.store.create_key, TENANT, ("infer",), "soak")
        reply = await client.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
        self.done["keys"] += 1
        if reply.status_code != 200:
            raise ValueError(f"a new key: {reply.status_code} {reply.text}")
        await asyncio.to_thread(self._local.store.revoke_key, key.id)

    async def _upload(self, client: httpx.AsyncClient, content: bytes, purpose: str) -> str:
        form: dict[str, Any] = {"files": {"file": ("soak.jsonl", content)}, "data": {"purpose": purpose}}
        return str((await self._ask(client, "POST", "/v1/files", **form))["id"])
