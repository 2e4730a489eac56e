"""Proves that a change of the code's structure changed no number: compares this checkout with an earlier one.

    python tests/equality.py EARLIER_CHECKOUT [--quick] [--only answers,tables,demo]

Each checkout runs in processes and PEDRO_HOMEs of its own, with the Python that runs this. Compared are

- answers: adapters of every method, made by the earlier checkout: their bytes, the logits under PEFT to the last bit,
  the engine's log-probabilities to the last bit, and its greedy answers to 200 prompts under 6 of the adapters at once;
- tables: what `pedro compare SPEC --out FOLDER --report` makes of every committed comparison, and what this checkout
  makes of the earlier one's folders;
- demo: digests of the small demo's three adapters, trained by `pedro submit` from the same seed.

It prints what it compared and ends with status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROBE = Path(__file__).with_name("equality_probe.py")
PARTS = ("answers", "tables", "demo")
PROMPTS, LOGIT_PROMPTS, ALONE = 200, 20, 10
DEMO_TENANTS = {"acme": ("voice", 100), "globex": ("assistant", 150), "initech": ("support", 100)}
DEMO_SPEC: dict[str, Any] = {  # as `pedro demo --small` trains; a test compares it with the demo's own
    "backbone": "pedro-nano",
    "method": {"name": "pedro", "r": 12},
    "training": {"lr": 1e-2, "theta_lr": 1e-4, "theta_every": 5, "batch_size": 16, "eval_every": 50},
    "gate": {"max_rows": 16},
}
TEMPLATES = {"acme": {"template": "Text: {prompt}\nIntent:"}}


def demo_spec(tenant: str, steps: int) -> dict[str, Any]:
    """The spec of a demo tenant's adapter, for `pedro submit`."""
    files = {part: f"pedro://demo/{tenant}/{part}.jsonl" for part in ("train", "test")}
    own = {"data": {**files, **TEMPLATES.get(tenant, {})}, "training": {**DEMO_SPEC["training"], "max_steps": steps}}
    return {**DEMO_SPEC, **own, "tenant": tenant, "adapter": DEMO_TENANTS[tenant][0]}


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: one line a leaf, with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = [*before, *(key for key in after if key not in before)]
        parts = [differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key)) for key in keys]
        return [line for part in parts for line in part]
    return [] if before == after else [f"{path}: {_shown(before)} → {_shown(after)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


class Checkout:
    """One working tree, and what it is asked to do."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root.resolve()
        self.home = scratch / "home"
        self.scratch = scratch
        scratch.mkdir(parents=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PEDRO_", "MLFLOW_", "RAY_"))}
        self.env = {
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(self.root / "platform"), str(self.root)]),
            "PEDRO_HOME": str(self.home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def probe(self, task: str, **asked: Any) -> Any:
        """What a task of the probe gives with this checkout's code."""
        result = self.scratch / f"{task}.json"
        command = [sys.executable, str(PROBE), str(self.root), task, str(result)]
        self._run(command, stdin=json.dumps(asked))
        return json.loads(result.read_text(encoding="utf-8"))

    def pedro(self, *words: str) -> Any:
        """What a command of `pedro` prints as JSON."""
        out = self._run([sys.executable, "-m", "pedro.cli", *words])
        return next((json.loads(line) for line in reversed(out.splitlines()) if line.startswith("{")), None)

    def comparisons(self, into: Path) -> list[tuple[str, str]]:
        """(spec, copy of the folder) of every committed comparison."""
        folders = sorted(path.parent for path in (self.root / "jobs" / "results").glob("*/table.md"))
        specs = {path.stem: path for path in (self.root / "jobs").rglob("*.yaml")}
        for folder in folders:
            shutil.copytree(folder, into / folder.name)
        return [(str(specs[folder.name]), str(into / folder.name)) for folder in folders]

    def committed(self, name: str) -> dict[str, str]:
        """A file of every committed comparison, as it lies in the tree."""
        files = sorted((self.root / "jobs" / "results").glob(f"*/{name}"))
        return {path.parent.name: path.read_text(encoding="utf-8") for path in files}

    def _run(self, command: list[str], stdin: str = "") -> str:
        done = subprocess.run(
            command, input=stdin, env=self.env, cwd=self.scratch, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nof {self.root} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout


class Report:
    """Prints what was compared, line by line, and remembers what differed."""

    def __init__(self) -> None:
        self.differ: list[str] = []
        self._began = time.monotonic()

    def compared(self, what: str, before: Any, after: Any) -> None:
        """One line: what, and whether it is equal; where it is not, the first few places."""
        found = differences(before, after)
        seconds = time.monotonic() - self._began
        print(f"{'DIFFERS' if found else 'equal':<8} {what}  [{seconds:.0f} s]", flush=True)
        for line in found[:5]:
            print(f"         {line}")
        if len(found) > 5:
            print(f"         … and {len(found) - 5} more")
        self.differ += [f"{what}: {line}" for line in found]


def compare_answers(earlier: Checkout, here: Checkout, report: Report, quick: bool) -> None:
    """Adapters of every method, made by the earlier checkout and answered with by both; and made again by this one."""
    lines = [
        line
        for tenant in DEMO_TENANTS
        for line in (earlier.root / "platform/pedro/assets/demo" / tenant / "test.jsonl").read_text().splitlines()
    ]
    prompts = [_prompt(json.loads(line)) for line in lines[:: len(lines) // PROMPTS]][: 12 if quick else PROMPTS]
    folder = str(earlier.scratch / "adapters")
    asked = {"prompts": prompts, "of_logits": 3 if quick else LOGIT_PROMPTS, "alone": 2 if quick else ALONE}
    before = earlier.probe("answers", make=folder, ask=folder, **asked)
    after = here.probe("answers", make=str(here.scratch / "adapters"), ask=folder, **asked)
    adapters, models = len(before["made"]), len(before["logits"])
    tokens, numbers = (sum(map(len, before[part].values())) for part in ("greedy", "logprobs"))
    served = len(before["greedy"]) // len(prompts)
    told = {
        "made": f"bytes of {adapters} fresh adapters, one of each method",
        "logits": f"logits of {asked['of_logits']} prompts under {models} models, to the bit",
        "greedy": f"greedy answers of {len(prompts)} prompts over {served} adapters, {tokens:,} tokens, mixed",
        "logprobs": f"the engine's log-probabilities, {numbers:,}, to the bit",
    }
    for part, what in told.items():
        report.compared(what, before[part], after[part])


def _prompt(row: dict[str, Any]) -> str:
    """What a row of any shape asks."""
    return str(row.get("prompt") or row.get("instruction") or row["messages"][0]["content"])


def compare_tables(earlier: Checkout, here: Checkout, report: Report, quick: bool) -> None:
    """Every committed comparison, reported by both checkouts; and the earlier one's folders by this one.

    A comparison that has got more runs since cannot have the same table: it is named, and only its earlier folder is
    compared.
    """
    most = 1 if quick else None
    was, now = earlier.committed("runs.jsonl"), here.committed("runs.jsonl")
    grown = {name for name, runs in was.items() if now.get(name) != runs}
    for name in sorted(grown):
        print(f"new runs {name}: {len(was[name].splitlines())} before, {len(now.get(name, '').splitlines())} now")
    tables = (
        {name: text for name, text in one.committed("table.md").items() if name in was and name not in grown}
        for one in (earlier, here)
    )
    report.compared(f"table.md as committed, of {len(was) - len(grown)} comparisons", *tables)
    old, new = (one.comparisons(one.scratch / "comparisons")[:most] for one in (earlier, here))
    before, after = earlier.probe("reports", asked=old), here.probe("reports", asked=new)
    for name in sorted(before.keys() - grown):
        kinds = ", ".join(before[name])
        report.compared(f"{name}: `pedro compare --report` makes the same {kinds}", before[name], after.get(name))
    specs = {Path(spec).stem: spec for spec, _ in new}
    copies = earlier.comparisons(here.scratch / "earlier")[:most]
    carried = here.probe("reports", asked=[(specs[Path(folder).name], folder) for _, folder in copies])
    report.compared(f"the earlier checkout's {len(carried)} folders, reported by this one", before, carried)


def compare_demo(earlier: Checkout, here: Checkout, report: Report, quick: bool) -> None:
    """The demo's adapters, trained by each checkout as jobs of a local Ray head."""
    digests: list[dict[str, str]] = []
    for checkout in (earlier, here):
        made = {}
        try:
            for tenant, (adapter, steps) in DEMO_TENANTS.items():
                spec = checkout.scratch / f"{tenant}.yaml"
                spec.write_text(json.dumps(demo_spec(tenant, 20 if quick else steps)))  # JSON is YAML
                result = checkout.pedro("submit", str(spec), "--wait", "--json")
                made[f"{tenant}.{adapter}"] = result["digest"]
        finally:
            checkout.pedro("down", "--yes")
        digests.append(made)
    for name, digest in digests[0].items():
        print(f"         {name} {digest}")
    report.compared("digests of the demo's three adapters", *digests)


def main() -> int:
    """Compare, print, and say by the status whether all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="the root of an earlier checkout")
    parser.add_argument("--quick", action="store_true", help="a few prompts, one comparison, 20 steps of training")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to compare, by commas")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if not (given.earlier / "platform" / "pedro" / "__init__.py").is_file():
        parser.error(f"{given.earlier} is no checkout: it has no platform/pedro")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="pedro-equality-", ignore_cleanup_errors=True) as scratch:
        earlier, here = Checkout(given.earlier, Path(scratch) / "earlier"), Checkout(HERE, Path(scratch) / "here")
        print(f"earlier: {earlier.root}\nhere:    {here.root}")
        parts = {"answers": compare_answers, "tables": compare_tables, "demo": compare_demo}
        for name in wanted:
            parts[name](earlier, here, report, given.quick)
    print(f"{len(report.differ)} differences" if report.differ else "nothing differs")
    return bool(report.differ)


if __name__ == "__main__":
    sys.exit(main())
