"""``evomesh convert``: checkpoints of other systems into ours and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomesh.cli import convert_hf
from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.config.schema import Config

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("to-hf")(convert_hf.to_hf)
app.command("from-hf")(convert_hf.from_hf)
app.command("check")(convert_hf.check)


@app.callback()
def convert() -> None:
    """Convert checkpoints of other systems into ours and back."""


@app.command("from-internevo")
def from_internevo(
    folder: Annotated[
        str, typer.Argument(help="One step of an InternEvo run: the folder with model_tp*_pp*.pt.")
    ],
    out: Annotated[str, typer.Argument(help="Save folder for the result.")],
    config: Annotated[
        str | None, typer.Option(help="Config of that run, for what model_config.pt lacks.")
    ] = None,
    w2: Annotated[
        str, typer.Option(help="What w2 is where shapes are equal: down, or up (early 2023).")
    ] = "auto",
    weights_only: Annotated[
        bool, typer.Option(help="Leave optimizer, schedule and data position out.")
    ] = False,
) -> None:
    """Read InternEvo's checkpoint of any tensor x pipeline (x weight) size."""
    from evomesh.checkpoint.hub_cache import local_folder
    from evomesh.checkpoint.internevo import model as internevo
    from evomesh.checkpoint.internevo import optimizer as internevo_state
    from evomesh.checkpoint.native.manager import CheckpointManager
    from evomesh.config.record import config_to_dict

    if w2 not in ("auto", "down", "up"):
        raise UserError(f"--w2 {w2!r}", expected="auto, down or up")
    folder = str(local_folder(folder))
    resolved = _config(folder, config)
    model = resolved.model
    heads = internevo.HeadCounts(model.num_attention_heads, model.kv_heads)
    tensors = dict(internevo.read_model(folder, heads, w2))  # type: ignore[arg-type]
    left = [p.name for p in sorted(Path(folder).iterdir())]
    step = next((int(name.removesuffix(".step")) for name in left if name.removesuffix(".step").isdigit()), 0)
    state: dict[str, Any] = {"source": "internevo"}
    whole = not weights_only and any(name.startswith("optimizer_") for name in left)
    if whole:
        optimizer, scalars = internevo_state.read_optimizer(folder, heads, w2)  # type: ignore[arg-type]
        tensors |= optimizer
        state |= scalars | internevo_state.read_counters(folder)
    manager = CheckpointManager(out)
    path = manager.save(step, tensors, state, config_to_dict(resolved), final=True)
    manager.close()
    if whole:
        place = state["sampler"]["internevo"]
        print(
            f"wrote {path}: {len(tensors)} tensors, weights and optimizer; a run with auto_resume goes on from it"
        )
        print(
            f"data position: step {place['step']} of data.seed={place['seed']}, {place['global_batch']} packs a step"
        )
    else:
        print(f"wrote {path}: {len(tensors)} tensors, weights only")


def _config(folder: str, config: str | None) -> Config:
    """The run's config from its own file, or from model_config.pt and the names in the model files."""
    from evomesh.checkpoint.internevo import model as internevo
    from evomesh.config.loader import load_config

    if config is not None:
        return load_config(config).config
    section: dict[str, Any] | None = internevo.model_section(folder)
    if section is None:
        raise UserError(
            "no model_config.pt in the folder", where=folder, fix="give that run's config: --config FILE"
        )
    family = section.pop("model_type", None) or internevo.family_of(internevo.find_folder(folder))
    text = f"model_type = {family!r}\nmodel = {section!r}\nckpt = dict(enable_save_ckpt=False)\n"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "model_config.py")
        path.write_text(text, encoding="utf-8")
        return load_config(str(path)).config


@app.command("to-internevo")
def to_internevo(
    ckpt: Annotated[str, typer.Argument(help="Checkpoint of ours: save folder, step in it, or step folder.")],
    out: Annotated[str, typer.Argument(help="New folder for the .pt files.")],
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline size.")] = 1,
    weight: Annotated[int | None, typer.Option(min=1, help="Weight-parallel size: files of isp.")] = None,
) -> None:
    """Write InternEvo's model files of a tensor x pipeline (x weight) size."""
    from evomesh.checkpoint.internevo.export import write_model
    from evomesh.checkpoint.native.find import resolve
    from evomesh.checkpoint.native.retention import check
    from evomesh.config.record import config_from_dict

    found = resolve(ckpt, lambda choice: check(choice, data=False), print)
    files = write_model(found, config_from_dict(found.config).model, out, tensor, pipeline, weight)
    print(f"wrote {len(files)} model files to {out}")
