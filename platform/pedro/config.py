"""Where things live: the environment, read once as `Settings`. Needs the standard library alone.

Ray shows a job's environment variables and a training run's settings to whoever may see its pages, so a URL with a
password is never among them: it reaches another process by `NAME_FILE`, the path of a file that only its owner reads.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from pedro import log_lines
from pedro.errors import ConfigError
from pedro.refs import NAME

SHOWN = 200
"""Characters of a wrong value that an error repeats."""
BACKBONES = "backbones"
SERVER_RECORD = "serve.json"  # where this home serves, while it does
UPLOADS = "files"
"""The folder of the storage in which tenants' uploaded files lie."""
DATA_SCHEMES = ("s3", "gs", "hf")
LAUNCHERS = ("ray", "kuberay")
NOT_FOR_WORKERS = (  # what opens the platform, by MLflow's and PostgreSQL's own variables too
    *(
        f"{name}{end}"
        for end in ("", "_FILE")
        for name in (
            "MLFLOW_BACKEND_STORE_URI",
            "MLFLOW_TRACKING_URI",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "PEDRO_DATABASE_PASSWORD",
            "PEDRO_DATABASE_URL",
            "PEDRO_PROMETHEUS_URL",
        )
    ),
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_TOKEN",
    "PEDRO_API_KEY",
    "PEDRO_SEAL_KEY_FILE",
    "PEDRO_WEBHOOK_KEY_FILE",
    "PGPASSFILE",
    "PGPASSWORD",
)
_IN_QUERY = re.compile(r"[?&][^=&]*(pass|pwd|secret|token|key|sig|credential)[^=&]*=", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """The platform's environment. Every path is absolute, so that it means the same in every process."""

    home: Path
    """Databases, artifacts, files and Ray's storage (`PEDRO_HOME`, default `.pedro` in the working directory)."""
    tracking_uri: str = field(repr=False)
    """MLflow's store (`MLFLOW_TRACKING_URI` or `MLFLOW_TRACKING_URI_FILE`, default sqlite in the home)."""
    database_url: str = field(repr=False)
    """Keys and jobs, an SQLAlchemy URL (`PEDRO_DATABASE_URL` or `…_URL_FILE`, default sqlite in the home), to which the
    password may come from a file of its own (`PEDRO_DATABASE_PASSWORD_FILE`)."""
    storage: str
    """Data files and checkpoints, a path or fsspec URL (`PEDRO_STORAGE`, default a folder in the home)."""
    ray_address: str | None
    """A running Ray cluster (`RAY_ADDRESS`); none means the local head that belongs to this home."""
    data_roots: tuple[str, ...] = ()
    """Folders beside its own in which a spec may name files (`PEDRO_DATA_ROOTS`, parted as in PATH)."""
    data_schemes: tuple[str, ...] = ()
    """Schemes of URLs that a spec may name as data (`PEDRO_DATA_SCHEMES`, parted by commas)."""
    mlflow_database_url: str | None = field(default=None, repr=False)
    """The database behind MLflow's server (`MLFLOW_BACKEND_STORE_URI`, as the server itself reads it, or
    `…_URI_FILE`), where this host may reach it: erasing a tenant removes runs there that the server only hides."""
    own_seal_file: Path | None = None
    """The keys that versions are sealed with (`PEDRO_SEAL_KEY_FILE`); none: a file in the home."""
    launcher: str = "ray"
    """Where fine-tunes run (`PEDRO_LAUNCHER`): `ray`, on that cluster, or `kuberay`, each on one of its own."""
    own_webhook_key_file: Path | None = None
    """The keys that webhooks' secrets are made by (`PEDRO_WEBHOOK_KEY_FILE`); none: a file in the home."""
    webhook_networks: tuple[str, ...] = ()
    """Networks beside the public ones that webhooks may go to (`PEDRO_WEBHOOK_NETWORKS`, parted by commas)."""
    share_across_tenants: bool = False
    """Whether jobs of several tenants may train in one worker (`PEDRO_SHARE_ACROSS_TENANTS=1`)."""

    log_format: str = log_lines.TEXT
    """How servers and controllers log (`PEDRO_LOG_FORMAT`): `text`, or `json`, an object a line."""
    prometheus_url: str | None = field(default=None, repr=False)
    """A Prometheus that reads this platform's figures (`PEDRO_PROMETHEUS_URL` or `…_URL_FILE`): the dashboard asks it
    for what was served; none: the gateway's own history."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment; create nothing. Raises ConfigError for a file of a secret that is not there."""
        home = home_directory(env)
        storage = env.get("PEDRO_STORAGE") or str(home / "storage")
        if holds_secret(storage):
            raise ConfigError(
                "PEDRO_STORAGE: contains a password or a key, which would be written to specs and manifests; use the "
                "provider's own variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …) or fsspec's "
                "(FSSPEC_SFTP_PASSWORD, …) on every node",
                param="PEDRO_STORAGE",
            )
        if "://" not in storage:
            storage = str(Path(storage).expanduser().absolute())
        return cls(
            home=home,
            tracking_uri=_with_user(_read(env, "MLFLOW_TRACKING_URI"), env) or f"sqlite:///{home / 'mlflow.db'}",
            database_url=_with_password(_read(env, "PEDRO_DATABASE_URL"), env) or f"sqlite:///{home / 'pedro.db'}",
            storage=storage,
            ray_address=env.get("RAY_ADDRESS") or None,
            data_roots=tuple(
                str(Path(root).expanduser().absolute())
                for root in env.get("PEDRO_DATA_ROOTS", "").split(os.pathsep)
                if root
            ),
            data_schemes=_schemes(env.get("PEDRO_DATA_SCHEMES", "")),
            mlflow_database_url=_read(env, "MLFLOW_BACKEND_STORE_URI"),
            own_seal_file=_path(env.get("PEDRO_SEAL_KEY_FILE")),
            own_webhook_key_file=_path(env.get("PEDRO_WEBHOOK_KEY_FILE")),
            webhook_networks=_networks(env.get("PEDRO_WEBHOOK_NETWORKS", "")),
            share_across_tenants=_one_of("PEDRO_SHARE_ACROSS_TENANTS", ("0", "1"), env) == "1",
            launcher=_one_of("PEDRO_LAUNCHER", LAUNCHERS, env),
            log_format=_one_of("PEDRO_LOG_FORMAT", log_lines.FORMATS, env),
            prometheus_url=_http_address("PEDRO_PROMETHEUS_URL", env),
        )

    @property
    def seal_file(self) -> Path:
        """The keys that versions are sealed with, a line each."""
        return self.own_seal_file or self.home / "secrets" / "seal.key"

    @property
    def webhook_key_file(self) -> Path:
        """The keys that webhooks' secrets are made by, a line each."""
        return self.own_webhook_key_file or self.home / "secrets" / "webhook.key"

    @property
    def artifact_root(self) -> str:
        """Where a local MLflow store keeps artifacts; a tracking server decides for itself."""
        return str(self.home / "artifacts")

    @property
    def cache(self) -> Path:
        """This host's copies of what the registry and the data room made; safe to delete at any time."""
        return self.home / "cache"

    @property
    def requests_log(self) -> Path:
        """One line a request of the server, on the host of its gateway."""
        return self.home / "logs" / "requests.log"

    def env(self) -> dict[str, str]:
        """The environment variables that hand these settings to another process; what holds a password goes by file.

        Not Prometheus's address, which the dashboard alone reads, from its own environment.
        """
        folder = self.home / "secrets"
        return {
            "PEDRO_HOME": str(self.home),
            **_variables("MLFLOW_TRACKING_URI", self.tracking_uri, folder),
            **_variables("PEDRO_DATABASE_URL", self.database_url, folder),
            "PEDRO_STORAGE": self.storage,
            "PEDRO_DATA_ROOTS": os.pathsep.join(self.data_roots),
            "PEDRO_DATA_SCHEMES": ",".join(self.data_schemes),
            "PEDRO_SEAL_KEY_FILE": str(self.own_seal_file or ""),
            "PEDRO_LAUNCHER": self.launcher,
            "PEDRO_LOG_FORMAT": self.log_format,
            "PEDRO_WEBHOOK_KEY_FILE": str(self.own_webhook_key_file or ""),
            "PEDRO_WEBHOOK_NETWORKS": ",".join(self.webhook_networks),
            "PEDRO_SHARE_ACROSS_TENANTS": "1" if self.share_across_tenants else "0",
        }

    def env_of_workers(self) -> dict[str, str]:
        """The variables of a process that trains: where data and caches are. What opens the platform is emptied, lest
        it come from its host."""
        return {
            **dict.fromkeys(NOT_FOR_WORKERS, ""),
            "PEDRO_HOME": str(self.home),
            "PEDRO_STORAGE": self.storage,
            "PEDRO_DATA_ROOTS": os.pathsep.join(self.data_roots),
            "PEDRO_DATA_SCHEMES": ",".join(self.data_schemes),
        }

    @property
    def storage_in_home(self) -> bool:
        """Whether all is on one host's disk: whoever reaches the storage has the home, too."""
        return "://" not in self.storage and Path(self.storage).is_relative_to(self.home)

    def single_host(self) -> list[str]:
        """The settings that only work while all processes share one host's disk, as `NAME=value`."""
        local = []
        if self.tracking_uri.startswith("sqlite:") or "://" not in self.tracking_uri:
            local.append(f"MLFLOW_TRACKING_URI={self.tracking_uri}")
        if self.database_url.startswith("sqlite:"):
            local.append(f"PEDRO_DATABASE_URL={self.database_url}")
        if "://" not in self.storage or self.storage.startswith("file://"):
            local.append(f"PEDRO_STORAGE={self.storage}")
        return local


def home_directory(env: Mapping[str, str] = os.environ) -> Path:
    """`PEDRO_HOME`, or `.pedro` in the working directory; absolute, so that it means the same in every process."""
    return Path(env.get("PEDRO_HOME") or ".pedro").expanduser().absolute()


def backbones_folder(home: Path) -> Path:
    """The backbones that were pulled or added, a directory each."""
    return home / BACKBONES


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


def _read(env: Mapping[str, str], name: str) -> str | None:
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


def _variables(name: str, value: str, folder: Path, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that hand `value` to another process; one with a secret goes by a file in `folder`.

    A file that the user named, and that holds just this, is handed on as it is.
    """
    if not holds_secret(value):
        return {name: value, f"{name}_FILE": ""}
    own = env.get(f"{name}_FILE")
    path = Path(own) if own and _content_of(Path(own)) == value else folder / name
    if _content_of(path) != value:
        _write_secret(path, value)
    return {f"{name}_FILE": str(path.absolute())}


def _content_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _write_secret(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(value)
    scratch.replace(path)


def _one_of(variable: str, known: tuple[str, ...], env: Mapping[str, str]) -> str:
    """What the variable says; the first if it says nothing."""
    name = env.get(variable) or known[0]
    if name not in known:
        raise ConfigError(f"{variable}: {name[:SHOWN]!r}; use one of {', '.join(known)}", param=variable)
    return name


def _with_user(address: str | None, env: Mapping[str, str]) -> str | None:
    """MLflow's address, with the user and the password of MLflow's own variables (or their files) where it has none:
    so they reach jobs as a password in an address does, by file."""
    if address is None or not address.startswith(("http://", "https://")) or "@" in urlsplit(address).netloc:
        return address
    user, password = (_read(env, f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    if not user or not password:
        return address
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}"


def _with_password(url: str | None, env: Mapping[str, str]) -> str | None:
    """The database's URL, with the password of a file of its own where it has a user and none."""
    scheme, _, rest = (url or "").partition("://")
    user, at, address = rest.rpartition("@")
    if not at or ":" in user or not scheme.startswith("postgres"):
        return url
    password = _read(env, "PEDRO_DATABASE_PASSWORD")
    return f"{scheme}://{user}:{quote(password, safe='')}@{address}" if password else url


def _http_address(variable: str, env: Mapping[str, str]) -> str | None:
    address = _read(env, variable)
    if address is None:
        return None
    try:
        right = urlsplit(address).scheme in ("http", "https") and bool(urlsplit(address).hostname)
    except ValueError:  # half an IPv6 address
        right = False
    if not right:
        raise ConfigError(f"{variable}: expected an address such as http://prometheus:9090", param=variable)
    return address.rstrip("/")


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _networks(text: str) -> tuple[str, ...]:
    networks = tuple(word.strip() for word in text.split(",") if word.strip())
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ConfigError(
                f"PEDRO_WEBHOOK_NETWORKS: {network[:SHOWN]!r} is not a network ({error}); an example is 10.20.0.0/16",
                param="PEDRO_WEBHOOK_NETWORKS",
            ) from None
    return networks


def _schemes(text: str) -> tuple[str, ...]:
    schemes = tuple(word.strip() for word in text.split(",") if word.strip())
    if unknown := [scheme for scheme in schemes if scheme not in DATA_SCHEMES]:
        known = ", ".join(DATA_SCHEMES)
        raise ConfigError(
            f"PEDRO_DATA_SCHEMES: {unknown[0]!r} is not a scheme that data can be read from; choose from {known}",
            param="PEDRO_DATA_SCHEMES",
        )
    return schemes


def check_name(field: str, value: str) -> str:
    """`value` if it may name a tenant or an adapter: `[a-z0-9][a-z0-9_-]{0,62}`, no dots; ConfigError if not."""
    if not NAME.fullmatch(value):
        raise ConfigError(
            f"{field}: {value!r} is not a valid name; use 1 to 63 of a-z, 0-9, '_' and '-', a letter or digit first",
            param=field,
        )
    return value
