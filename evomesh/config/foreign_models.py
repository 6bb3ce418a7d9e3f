"""InternEvo's model types that evomesh does not have: why, and what to take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignModel:
    """Why a model type of InternEvo is refused, and what to take instead."""

    reason: str
    instead: str


_EXPERTS = ForeignModel(
    "it is a mixture of experts, and all layers here are dense",
    "take a dense model, such as QWEN3",
)
_IMAGES = ForeignModel(
    "it is multimodal, and evomesh trains on text",
    "take the language model alone, such as LLAMA2",
)
_FROM_FOLDER = ForeignModel(
    "model code of other packages is not run",
    'remove model_type and set model.from_hf="FOLDER", whose config.json gives the family',
)
_FOREIGN: dict[str, ForeignModel] = {
    "LLAVA": _IMAGES,
    "CHAMELEON": _IMAGES,
}


def foreign_model(name: str) -> ForeignModel | None:
    """Return why a model type is refused; None for a name that is not InternEvo's."""
    upper = name.upper()
    if "MOE" in upper or upper.startswith("MIXTRAL"):
        return _EXPERTS
    if upper.endswith("_HF"):
        return _FROM_FOLDER
    return _FOREIGN.get(upper)
