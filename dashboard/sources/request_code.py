"""A request to the gateway as text that a reader can run: curl, and the official Python client. No key is in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pprint import pformat
from typing import Any

KEY = "PEDRO_API_KEY"
OURS = ("top_k", "repetition_penalty")  # which the official client has no parameters for
CALLS = {"/v1/chat/completions": "chat.completions", "/v1/completions": "completions"}


def as_curl(url: str, path: str, body: Mapping[str, Any]) -> str:
    """For a shell; the key is not among the arguments, which everybody on a machine sees."""
    return "\n".join(
        [
            f"curl {shlex.quote(url + path)} \\",
            f'  -H @- -H "Content-Type: application/json" <<< "Authorization: Bearer ${KEY}" \\',
            f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False, indent=1))}",
        ]
    )


def as_python(url: str, path: str, body: Mapping[str, Any]) -> str:
    """For `pip install openai`."""
    given = {name: value for name, value in body.items() if name not in OURS}
    extra = {name: body[name] for name in OURS if name in body}
    arguments = [f"    {name}={pformat(value, width=100)},".replace("\n", "\n    ") for name, value in given.items()]
    if extra:
        arguments.append(f"    extra_body={extra!r},")
    answer = "answer.choices[0].message.content" if "chat" in path else "answer.choices[0].text"
    return "\n".join(
        [
            "import os",
            "",
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url={url + "/v1"!r}, api_key=os.environ["{KEY}"])',
            f"answer = client.{CALLS[path]}.create(",
            *arguments,
            ")",
            f"print({answer})",
        ]
    )
