"""Every method that can be trained, by name: one entry each. Knows nothing of data, optimizers or files."""

from __future__ import annotations

import difflib
from functools import partial

from torch import nn

from pedro.errors import ConfigError
from pedro.methods import builders, by_name
from pedro.methods.adalora import AdaLora
from pedro.methods.method import Method
from pedro.methods.sparse_search import SparseSearch

PEDRO_PAPER = "Zhu et al. 2024, arXiv 2409.17834"
BIASES = (".pedro_bias.", ".bottleneck_down_bias.", ".bottleneck_up_bias.")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: trainable, trainable without bias vectors (as the paper counts), and total."""
    sizes = [(name, p.requires_grad, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    return {
        "trainable": sum(size for _, trained, size in sizes if trained),
        "trainable_without_bias": sum(size for name, trained, size in sizes if trained and not _is_bias(name)),
        "total": sum(size for _, _, size in sizes),
    }


def get_method(name: str) -> Method:
    """The method called `name`. Raises ConfigError with a suggestion for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"method.name: unknown method {name!r}; {hint}use one of {', '.join(METHODS)}", param="method"
        )
    return METHODS[name]


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") or any(part in f"{name}." for part in BIASES)


def _pedro_entry(variant: int | None, title: str) -> Method:
    return Method(
        name=f"pedro-{variant}" if variant else "pedro",
        title=title,
        source=PEDRO_PAPER,
        equation="y ← l ⊙ y, l = R(pool(x) W_down) W_up + b",
        build=partial(builders.pedro, variant),
        engine=True,
        mergeable=False,
        identity_at_init=True,
        conditions_on_prompt=True,
        theta=(".pedro_a.", ".pedro_b."),
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _pedro_entry(None, "PEDRO"),
        _pedro_entry(1, "PEDRO-1: mean pooling"),
        _pedro_entry(2, "PEDRO-2: max pooling"),
        _pedro_entry(3, "PEDRO-3: q, k, v, gate and up, r = 8"),
        _pedro_entry(4, "PEDRO-4: q and v, r = 24"),
        _pedro_entry(5, "PEDRO-5: ReLU"),
        _pedro_entry(6, "PEDRO-6: GELU"),
        _pedro_entry(7, "PEDRO-7: ReLU in the first half of the layers, GELU in the rest"),
        Method(
            name="para",
            title="PARA",
            source="arXiv 2502.01033",
            equation="PEDRO's with a fixed activation",
            build=builders.para,
            engine=True,
            mergeable=False,
            identity_at_init=True,
            conditions_on_prompt=True,
        ),
        Method(
            name="lora",
            title="LoRA",
            source="Hu et al. 2021, arXiv 2106.09685",
            equation="y ← y + (α/r) B A x",
            build=builders.lora,
            engine=True,
            mergeable=True,
            identity_at_init=True,
            paper={"r": 4},
        ),
        Method(
            name="ia3",
            title="(IA)³",
            source="Liu et al. 2022, arXiv 2205.05638",
            equation="y ← l ⊙ y; with r: l = 1 + z P",
            build=builders.ia3,
            engine=True,
            mergeable=True,
            identity_at_init=True,
            paper={"r": 16},
        ),
        Method(
            name="bitfit",
            title="BitFit",
            source="Ben Zaken et al. 2021, arXiv 2106.10199",
            equation="y ← y + b; with r: b = z P",
            build=builders.bitfit,
            engine=True,
            mergeable=False,
            identity_at_init=True,
            paper={"r": 8},
        ),
        Method(
            name="red",
            title="RED",
            source="Wu et al. 2024, arXiv 2402.15179",
            equation="h ← s ⊙ h + b, on the feed-forward's output",
            build=builders.red,
            engine=True,
            mergeable=False,
            identity_at_init=True,
        ),
        Method(
            name="adalora",
            title="AdaLoRA",
            source="Zhang et al. 2023, arXiv 2303.10512",
            equation="y ← y + (α/r) P Λ Q x, half of Λ pruned",
            build=builders.adalora,
            engine=False,
            mergeable=True,
            identity_at_init=True,
            accompany=lambda model, steps, options: AdaLora(model, steps, options["start"], options["end"]),
        ),
        Method(
            name="ssp",
            title="SSP: sparse structure search",
            source="Hu et al. 2022, arXiv 2206.07382",
            equation="y ← y + z₁ (α/r) B A x + z₂ b, gates z at a budget",
            build=builders.ssp,
            engine=False,
            mergeable=False,
            identity_at_init=True,
            theta=(".sparse_search_gates.",),
            accompany=lambda model, steps, options: SparseSearch(model, steps),
        ),
        Method(
            name="houlsby",
            title="Houlsby adapter",
            source="Houlsby et al. 2019, arXiv 1902.00751",
            equation="h ← h + σ(h W_down) W_up, two a layer",
            build=builders.houlsby,
            engine=False,
            mergeable=False,
            identity_at_init=True,
        ),
        Method(
            name="learned-adapter",
            title="Learned-Adapter",
            source="Zhang et al. 2023, Findings of ACL",
            equation="h ← h + σ(h W_down) W_up, σ a learned mixture",
            build=builders.learned_adapter,
            engine=False,
            mergeable=False,
            identity_at_init=True,
            theta=(".bottleneck_mix.",),
        ),
        Method(
            name="p-tuning-v2",
            title="P-tuning v2",
            source="Liu et al. 2021, arXiv 2110.07602",
            equation="K ← [P_K; K], V ← [P_V; V] in every layer",
            build=builders.p_tuning_v2,
            engine=False,
            mergeable=False,
            identity_at_init=False,
        ),
        Method(
            name="lpt",
            title="LPT: late prompt tuning",
            source="Liu et al. 2022, arXiv 2210.11292",
            equation="H ← [relu(pool(H W_down)) W_up; H] at the middle layer",
            build=builders.lpt,
            engine=False,
            mergeable=False,
            identity_at_init=False,
            conditions_on_prompt=True,
        ),
        by_name.PeftByName(
            name="peft",
            title="Any method of PEFT by its peft_type",
            source="huggingface/peft",
            equation="as peft_type says",
            build=by_name.build,
            engine=None,
            mergeable=None,
            identity_at_init=None,
            accompany=by_name.accompany,
        ),
        Method(
            name="full",
            title="Full fine-tuning",
            source="every weight of the backbone",
            equation="W ← W + ΔW",
            build=builders.full,
            engine=False,
            mergeable=True,
            identity_at_init=True,
        ),
    )
}
