"""Where things live and how a spec is read; free of Ray, MLflow and torch.

`Settings` is the environment, read once; `load_spec` turns YAML and `key=value` overrides into a frozen pydantic
model and reports every mistake at once. Precedence: defaults < YAML < `key=value`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from pedro import log_lines, secret_files
from pedro.errors import ConfigError
from pedro.home import home_directory
from pedro.refs import NAME
from pedro.yaml_reader import MAX_DEPTH, parse_yaml, read_yaml

SHOWN = 200
"""Characters of a wrong value that an error repeats."""
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
PLAIN_WORDS = {  # pydantic's words: ours
    r"^Value error, ": "",
    r"Input should be": "expected",
    r"a valid tuple": "a list",
    r"a valid dictionary( or instance of \w+)?": "a mapping (key: value)",
    r"^(Tuple|List|Dictionary) should have at least (\d+) items? after validation, not \d+": r"expected at least \2",
}


class Frozen(BaseModel):
    """The base of every specification: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Spec = TypeVar("Spec", bound=BaseModel)


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
        if secret_files.holds_secret(storage):
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
            tracking_uri=_with_user(secret_files.read(env, "MLFLOW_TRACKING_URI"), env)
            or f"sqlite:///{home / 'mlflow.db'}",
            database_url=_with_password(secret_files.read(env, "PEDRO_DATABASE_URL"), env)
            or f"sqlite:///{home / 'pedro.db'}",
            storage=storage,
            ray_address=env.get("RAY_ADDRESS") or None,
            data_roots=tuple(
                str(Path(root).expanduser().absolute())
                for root in env.get("PEDRO_DATA_ROOTS", "").split(os.pathsep)
                if root
            ),
            data_schemes=_schemes(env.get("PEDRO_DATA_SCHEMES", "")),
            mlflow_database_url=secret_files.read(env, "MLFLOW_BACKEND_STORE_URI"),
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
            **secret_files.variables("MLFLOW_TRACKING_URI", self.tracking_uri, folder),
            **secret_files.variables("PEDRO_DATABASE_URL", self.database_url, folder),
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
    user, password = (secret_files.read(env, f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
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
    password = secret_files.read(env, "PEDRO_DATABASE_PASSWORD")
    return f"{scheme}://{user}:{quote(password, safe='')}@{address}" if password else url


def _http_address(variable: str, env: Mapping[str, str]) -> str | None:
    address = secret_files.read(env, variable)
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


def load_spec(path: str | Path, overrides: Iterable[str], kind: type[Spec]) -> Spec:
    """Read YAML at `path`, lay `a.b=value` overrides over it, and validate it as `kind`.

    Raises one ConfigError that lists every mistake with its field, value and remedy.
    """
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(fields).__name__}", param=str(path))
    for override in overrides:
        _override(fields, override)
    return validate_spec(fields, kind, source=str(path))


def validate_spec(fields: dict[str, Any], kind: type[Spec], source: str = "spec") -> Spec:
    """`fields` as `kind`, or one ConfigError that lists every mistake."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = mistakes(error, kind)
        head = f"{source}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([head, *problems]), param=str(error.errors()[0]["loc"])) from error


def mistakes(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """What is wrong with what should have been a `kind`: one line a mistake, with field, value and remedy."""
    items = error.errors(include_url=False)
    locations = [item["loc"] for item in items]

    def follows(item: Any) -> bool:
        """Whether a list is too short only because what stands in it is wrong."""
        at = item["loc"]
        return item["type"] == "too_short" and any(len(p) > len(at) and p[: len(at)] == at for p in locations)

    return [_explain(item, kind) for item in items if not follows(item)]


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, for instance training.lr=1e-3", param=override)
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"{override[:SHOWN]!r}: nested more than {MAX_DEPTH} deep", param=key[:SHOWN])
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{override!r}: {parent!r} is not a section, so nothing can be set inside it", param=key)
    fields[leaf] = _scalar(value)


def _scalar(text: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{text[:SHOWN]!r}: not a YAML value: {error}", param=text[:SHOWN]) from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text; everybody means the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(item: Any, kind: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "spec"
    if item["type"] == "extra_forbidden":
        known = _fields(kind, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: required, but not given"
    message: str = item["msg"]
    for theirs, ours in PLAIN_WORDS.items():
        message = re.sub(theirs, ours, message)
    if not item["loc"]:  # of the whole: its message names the fields
        return message
    if isinstance(item["input"], dict):  # of a whole section: its message says which values do not go together
        return f"{path}: {message}"
    given = repr(item["input"])
    return f"{path}: {message}, got {given if len(given) <= SHOWN else given[:SHOWN] + '…'}"


def _fields(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `path` takes; a number in a path is a place in a list."""
    for part in path:
        if isinstance(part, str):
            field = kind.model_fields.get(part) if hasattr(kind, "model_fields") else None
            kind = field.annotation if field else None
        while kind is not None and not hasattr(kind, "model_fields"):  # X of tuple[X, ...] and of X | None
            kind = next(iter(get_args(kind)), None)
    return list(kind.model_fields) if hasattr(kind, "model_fields") else []
