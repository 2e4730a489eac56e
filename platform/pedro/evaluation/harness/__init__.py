"""EleutherAI's lm-eval over adapters, in process and over HTTP. Needs `pip install "pedro-platform[harness]"`.

    pedro eval acme.support --harness lm-eval --tasks arc_easy,pedro_snips           in process, by `local.py`
    python -m pedro.evaluation.harness --model pedro \\
        --model_args base_url=http://127.0.0.1:8000,model=acme.support --tasks ...   over HTTP, by `endpoint.py`

base.py      texts -> token ids, what conditions the vectors     local.py   a saved adapter or a bare backbone
endpoint.py  our /v1/completions with `conditioning_length`      run.py     what `pedro eval` calls
tasks/       tasks of ours in lm-eval's form (rows.py gives their rows)

lm-eval finds no models in other packages, so `register` must have run: `python -m pedro.evaluation.harness` is its
own command line with our two models known.
"""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
MODELS = {"pedro": "endpoint:EndpointModel", "pedro-local": "local:LocalModel"}


def register() -> None:
    """Make lm-eval know our models. Raises ConfigError if it is not installed; a second call changes nothing."""
    from importlib.util import find_spec

    from pedro.errors import ConfigError

    if find_spec("lm_eval") is None:
        remedy = 'install it with `pip install "pedro-platform[harness]"`'
        raise ConfigError(f"harness: lm-eval is not installed; {remedy}", param="harness")
    import lm_eval.models  # noqa: F401 (registers lm-eval's own, which it does not once the registry has an entry)
    from lm_eval.api.registry import model_registry

    for name, path in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=f"{__name__}.{path}")
