"""Values that hold a password: which they are, how they are shown, and how they reach another process, by file.

Ray shows a job's environment variables and a training run's settings to whoever may see its pages, so a URL with a
password is never among them: `NAME_FILE` is, the path of a file that only its owner reads. Knows no setting by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pedro.errors import ConfigError

_IN_QUERY = re.compile(r"[?&][^=&]*(pass|pwd|secret|token|key|sig|credential)[^=&]*=", re.IGNORECASE)


def holds_secret(value: str) -> bool:
    """Whether a URL holds a password, or what may be one. In doubt it does."""
    scheme, _, rest = value.partition("://")
    if scheme.partition("+")[0] in ("sqlite", "file"):
        return False
    user, at, _ = rest.rpartition("@")
    named = bool(at) and (":" in user or not scheme.startswith("postgres"))  # elsewhere a user alone may be a token
    return named or bool(_IN_QUERY.search(rest))


def without_password(value: str) -> str:
    """The URL for people: whatever may be a secret in it is left out."""
    if not holds_secret(value):
        return value
    scheme, _, rest = value.partition("://")
    _, at, address = rest.rpartition("@")
    return f"{scheme}://{'…@' if at else ''}{address.partition('?')[0]}"


def read(env: Mapping[str, str], name: str) -> str | None:
    """The value of `name`: what the file of `NAME_FILE` holds where there is that file, else the variable itself.

    Raises ConfigError where the file is named and not there, and the variable is not set.
    """
    path = env.get(f"{name}_FILE")
    if not path:
        return env.get(name) or None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if env.get(name):
            return env[name]
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{name}_FILE: {path} cannot be read on this host ({reason}); on a cluster of several hosts set {name} on "
            "every node (on Kubernetes from a Secret), or put the file there",
            param=f"{name}_FILE",
        ) from error


def variables(name: str, value: str, folder: Path, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that hand `value` to another process; one with a secret goes by a file in `folder`.

    A file that the user named, and that holds just this, is handed on as it is.
    """
    if not holds_secret(value):
        return {name: value, f"{name}_FILE": ""}
    own = env.get(f"{name}_FILE")
    path = Path(own) if own and _content(Path(own)) == value else folder / name
    if _content(path) != value:
        _write(path, value)
    return {f"{name}_FILE": str(path.absolute())}


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _write(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(value)
    scratch.replace(path)
