"""What one checkout makes of given inputs, for `equality.py`: it runs with that checkout first on its path.

It calls what is public: the command line, PEFT and transformers on saved adapters, and the names that `pedro.engine`
and `pedro.methods` export. One helper, whose file has moved before, is looked for by name.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BACKBONE = "stories260K"
ANSWER_TOKENS = 16
SERVED: dict[str, tuple[str, dict[str, Any]]] = {  # adapters that the engine answers with: method and options
    "pedro": ("pedro", {}),
    "pedro-mean": ("pedro", {"r": 8, "pool": "mean"}),
    "lora": ("lora", {}),
    "ia3": ("ia3", {}),
    "red": ("red", {}),
    "lorta": ("lorta", {}),
}
WHOLE = ("full", "peft")  # trains the backbone itself; needs options to mean anything


def main(task: str, asked: dict[str, Any]) -> Any:
    """Run one task of this file with the arguments of a JSON object, and give what is to be compared."""
    tasks: dict[str, Callable[..., Any]] = {"answers": answers, "reports": reports}
    return tasks[task](**asked)


def answers(make: str, ask: str, prompts: list[str], of_logits: int, alone: int) -> dict[str, Any]:
    """Make adapters in the folder `make`, then answer with those in `ask`: all that one process can be asked."""
    made = make_adapters(make)
    return {"made": made, "logits": logits(ask, prompts[:of_logits]), **engine_answers(ask, prompts, alone)}


def make_adapters(folder: str) -> dict[str, str]:
    """An adapter of every method, with weights far from a fresh one's; gives the digest of each one's weights."""
    import torch

    from pedro.backbone import load_model, resolve_backbone
    from pedro.methods import METHODS, get_method

    save_adapter = _find("pedro.methods", "save_adapter")
    backbone = resolve_backbone(BACKBONE)
    bare = load_model(backbone)
    kinds = SERVED | {name: (name, {}) for name in METHODS if name not in WHOLE and name not in SERVED}
    digests = {}
    for seed, (name, (method, options)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        tuned = get_method(method).apply(copy.deepcopy(bare), options)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        manifest = {
            "backbone": {"id": backbone.id, "digest": backbone.digest, "tokenizer_digest": backbone.tokenizer_digest},
            "method": {"name": method, "options": options},
        }
        save_adapter(tuned, Path(folder) / name, manifest)
        digests[name] = _digest((Path(folder) / name / "adapter_model.safetensors").read_bytes())
    return digests


def engine_answers(folder: str, prompts: list[str], alone: int) -> dict[str, Any]:
    """Greedy answers to every prompt under every served adapter, all in one mixed batch; and, for the first `alone`
    prompts asked one at a time, the log-probabilities of prompt and answer, which are compared to the last bit."""
    from pedro.engine import SamplingParams

    with _engine(lambda name: Path(folder) / name) as asker:
        greedy = asker.greedy(list(SERVED), prompts)
        scores = {}
        for name in SERVED:
            for place, prompt in enumerate(prompts[:alone]):
                params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=0)
                [outputs] = asker.ask([asker.request(name, prompt, params)]).values()
                entries = [e for output in outputs for e in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))]
                scores[f"{name}/{place}"] = [[e.token_id, e.logprob.hex()] for e in entries if e is not None]
    return {"greedy": greedy, "logprobs": scores}


def greedy_answers(load: Callable[[str], Path], names: Sequence[str], prompts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of the greedy answers, by `adapter/number of the prompt`; `load` gives an adapter's directory."""
    with _engine(load) as asker:
        return asker.greedy(names, prompts)


class _Asker:
    """An engine over the backbone, and its tokenizer."""

    def __init__(self, load: Callable[[str], Path]) -> None:
        from pedro.backbone import load_model, load_tokenizer, resolve_backbone
        from pedro.engine import Engine, EngineConfig

        backbone = resolve_backbone(BACKBONE)
        self._tokenizer = load_tokenizer(backbone)
        config = EngineConfig(max_batch=16, threads=1, max_waiting=10**6, max_waiting_per_tenant=10**6)
        self.engine = Engine(load_model(backbone), self._tokenizer, config, load, backbone.digest)
        self._ids = itertools.count()

    def request(self, name: str, prompt: str, params: Any) -> Any:
        from pedro.engine import Request

        return Request(str(next(self._ids)), self._tokenizer(prompt)["input_ids"], adapter=name, params=params)

    def ask(self, batch: Sequence[Any]) -> dict[str, list[Any]]:
        """The outputs of each request, by its id."""
        outputs: dict[str, list[Any]] = {request.id: [] for request in batch}
        for request in batch:
            self.engine.add(request)
        while self.engine.has_work():
            for output in self.engine.step():
                assert output.error is None, f"{output.request_id}: {output.error}"
                outputs[output.request_id].append(output)
            if self.engine.idle:
                time.sleep(0.002)
        return outputs

    def greedy(self, names: Sequence[str], prompts: Sequence[str]) -> dict[str, list[int]]:
        """Answers in one mixed batch, by `adapter/number of the prompt`."""
        from pedro.engine import SamplingParams

        for name in names:  # resident before the batch, so that every checkout mixes it alike
            self.ask([self.request(name, prompts[0], SamplingParams(max_tokens=1))])
        params = SamplingParams(max_tokens=ANSWER_TOKENS)
        asked = {
            f"{name}/{place}": self.request(name, prompt, params)
            for place, prompt in enumerate(prompts)
            for name in names
        }
        outputs = self.ask(list(asked.values()))
        return {key: [token for output in outputs[one.id] for token in output.token_ids] for key, one in asked.items()}


@contextmanager
def _engine(load: Callable[[str], Path]) -> Iterator[_Asker]:
    asker = _Asker(load)
    try:
        yield asker
    finally:
        asker.engine.close()


def logits(folder: str, prompts: list[str]) -> dict[str, str]:
    """The digest of all logits of the prompts, under PEFT, for each adapter in the folder and the bare backbone."""
    import torch
    from peft import PeftModel

    from pedro.backbone import load_model, load_tokenizer, resolve_backbone
    from pedro.methods import get_method

    backbone = resolve_backbone(BACKBONE)
    tokenizer, bare = load_tokenizer(backbone), load_model(backbone).eval()
    torch.set_num_threads(1)
    made = {}
    for directory in [None, *sorted(path for path in Path(folder).iterdir() if path.is_dir())]:
        model, conditioned = bare, False
        if directory is not None:
            method = json.loads((directory / "pedro_adapter.json").read_text())["method"]["name"]
            model = get_method(method).wrap(PeftModel.from_pretrained(copy.deepcopy(bare), str(directory))).eval()
            conditioned = True  # every wrapped model takes the length of the prompt
        digest = hashlib.sha256()
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor([tokenizer(prompt)["input_ids"]])
                lens = {"prompt_lens": torch.tensor([ids.shape[1]])} if conditioned else {}
                digest.update(model(input_ids=ids, **lens).logits.contiguous().numpy().tobytes())
        made[directory.name if directory else "no adapter"] = digest.hexdigest()
    return made


def reports(asked: list[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """`pedro compare SPEC --out FOLDER --report` for each (spec, folder): the digests of the tables in the folder."""
    from pedro.cli import main as pedro

    made = {}
    for spec, folder in asked:
        for table in Path(folder).glob("table.*"):
            table.unlink()  # what is compared is what was written now
        sys.argv = ["pedro", "compare", spec, "--out", folder, "--report", "--json"]
        try:
            pedro()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{sys.argv} ended with {end.code}") from end
        tables = {path.name: path for path in Path(folder).glob("table.*") if path.suffix != ".png"}
        made[Path(folder).name] = {name: _digest(path.read_bytes()) for name, path in sorted(tables.items())}
    return made


def _find(package: str, name: str) -> Callable[..., Any]:
    """A function by its name, wherever in `package` it is defined."""
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        found: Callable[..., Any] | None = getattr(importlib.import_module(module.name), name, None)
        if found is not None and found.__module__ == module.name:
            return found
    raise LookupError(f"{package} has no {name} any more; name what took its place in {Path(__file__).name}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    import pedro

    checkout, task, result = sys.argv[1:]
    assert Path(pedro.__file__).is_relative_to(checkout), f"{pedro.__file__} is not of {checkout}"
    Path(result).write_text(json.dumps(main(task, json.load(sys.stdin))), encoding="utf-8")
