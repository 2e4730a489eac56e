"""The supply chain: `make sbom` writes a bill of materials with licences, `make audit` looks for known vulnerabilities.

Reads what is installed, following the requirements of `pedro-platform[all]`, and imports none of it. The bill is
CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), equal for equal installations; vulnerabilities come from https://osv.dev.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    import httpx

ROOT, EXTRAS = "pedro-platform", ("all",)
OSV = "https://api.osv.dev"
LONGEST_S = 15.0
UNTOLD = "not told"
ACCEPTED: Mapping[str, str] = {}
"""Ids of vulnerabilities that stay, each with the reason why it cannot be reached here."""
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EUPL|Mozilla|GNU)", re.IGNORECASE)
EXPRESSION = re.compile(
    r"(?:MIT|ISC|[\w.]+-[\w.+-]+|0BSD|Zlib)(?: (?:AND|OR|WITH) (?:MIT|ISC|[\w.]+-[\w.+-]+|0BSD|Zlib))*"
)
SPDX = {  # how metadata says it: the identifier
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "GPLv2": "GPL-2.0-only",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


@dataclass(frozen=True)
class Component:
    """One installed distribution, and the names of those that it needs here."""

    name: str
    version: str
    licence: str
    needs: tuple[str, ...]

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{self.name}@{self.version.replace('+', '%2B')}"


def components(root: str = ROOT, extras: Iterable[str] = EXTRAS) -> dict[str, Component]:
    """`root` with all that it needs, by name. Raises PackageNotFoundError for what is not installed."""
    asked: dict[str, frozenset[str]] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(root), frozenset(extras))]
    while waiting:
        name, more = waiting.pop()
        if name in asked and more <= asked[name]:
            continue
        asked[name] = asked.get(name, frozenset()) | more
        waiting += _needs(distribution(name), asked[name])
    found = {}
    for name in sorted(asked):
        installed = distribution(name)
        needs = sorted({needed for needed, _ in _needs(installed, asked[name])} - {name})
        found[name] = Component(name, installed.version, licence_of(installed), tuple(needs))
    return found


def licence_of(installed: Distribution) -> str:
    """Its SPDX expression where it tells one, else the name that it gives its licence."""
    about: Any = installed.metadata  # a Message; of importlib_metadata, once that is imported, a stricter one
    if expression := about.get("License-Expression"):
        return str(expression)
    named = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    lines = about.get("License", "").strip().splitlines()
    free = SPDX.get(lines[0], lines[0]) if lines else ""
    classified = " OR ".join(SPDX.get(name, name) for name in named if name != "OSI Approved")
    if EXPRESSION.fullmatch(free) or (not classified and 0 < len(free) <= 60):
        return free
    return classified or UNTOLD


def bill(found: Mapping[str, Component], root: str = ROOT) -> dict[str, Any]:
    """The bill of materials."""
    parts = {name: _entry(one, "application" if name == root else "library") for name, one in found.items()}
    edges = [{"ref": one.purl, "dependsOn": [found[name].purl for name in one.needs]} for one in found.values()]
    told: dict[str, Any] = {
        "metadata": {"component": parts[root]},
        "components": [part for name, part in parts.items() if name != root],
        "dependencies": edges,
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(told, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        **told,
    }


def vulnerabilities(found: Mapping[str, Component], client: httpx.Client) -> dict[str, list[str]]:
    """The ids of the known vulnerabilities of each; those of `ACCEPTED` left out. Raises httpx.HTTPError."""
    asked = [one for name, one in found.items() if name != ROOT]
    queries = [
        {"package": {"name": one.name, "ecosystem": "PyPI"}, "version": one.version.partition("+")[0]} for one in asked
    ]
    reply = client.post("/v1/querybatch", json={"queries": queries})
    reply.raise_for_status()
    answers = zip(asked, reply.json()["results"], strict=True)
    told = {one.name: [each["id"] for each in answer.get("vulns", ())] for one, answer in answers}
    left = {name: [each for each in ids if each not in ACCEPTED] for name, ids in told.items()}
    return {name: ids for name, ids in left.items() if ids}


def main(arguments: Sequence[str] | None = None) -> int:
    """`sbom` or `audit`."""
    parser = argparse.ArgumentParser("python -m jobs.supply_chain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("sbom", help="write the bill of materials, and say which licences there are")
    made.add_argument("--out", type=Path, default=Path("dist/sbom.cdx.json"))
    commands.add_parser("audit", help="ask osv.dev which versions have known vulnerabilities; 1 if any has")
    parsed = parser.parse_args(arguments)
    try:
        found = components()
    except PackageNotFoundError as error:
        print(f"error: {error.name} is not installed; make install", file=sys.stderr)
        return 2
    if parsed.command == "audit":
        return _audit(found)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(bill(found), indent=1) + "\n")
    counts = Counter(one.licence for one in found.values())
    print("\n".join(f"{count:5}  {licence}" for licence, count in counts.most_common()))
    bound = sorted(f"{one.name} ({one.licence})" for one in found.values() if COPYLEFT.search(one.licence))
    print(f"copyleft: {', '.join(bound)}\n{len(found)} packages; written to {parsed.out}")
    return 0


def _audit(found: Mapping[str, Component]) -> int:
    import httpx

    try:
        with httpx.Client(base_url=OSV, timeout=LONGEST_S) as client:
            known = vulnerabilities(found, client)
    except httpx.HTTPError as error:
        print(f"audit: skipped, since {OSV} does not answer: {error}", file=sys.stderr)
        return 0
    for name, ids in known.items():
        print(f"{name} {found[name].version}: {', '.join(f'https://osv.dev/{each}' for each in ids)}")
    print(f"{len(found)} packages, {len(known)} with known vulnerabilities", file=sys.stderr)
    return 1 if known else 0


def _needs(installed: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """What a distribution with these extras needs on this machine, each with the extras that it is needed with."""
    found: list[tuple[str, frozenset[str]]] = []
    for line in installed.requires or ():
        one = Requirement(line)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.append((canonicalize_name(one.name), frozenset(one.extras)))
    return found


def _entry(one: Component, kind: str) -> dict[str, Any]:
    told = {"expression": one.licence} if EXPRESSION.fullmatch(one.licence) else {"license": {"name": one.licence}}
    return {
        "type": kind,
        "bom-ref": one.purl,
        "name": one.name,
        "version": one.version,
        "licenses": [] if one.licence == UNTOLD else [told],
        "purl": one.purl,
    }


if __name__ == "__main__":
    sys.exit(main())
