"""``evomesh convert``: convert checkpoints from and to the formats of other systems."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from evomesh.cli import convert_hf
from evomesh.cli.command_names import CommandGroup
from evomesh.errors import UserError

if TYPE_CHECKING:
    from evomesh.checkpoint.internevo.model import W2Role
    from evomesh.config.schema import Config

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)
app.command("to-hf")(convert_hf.to_hf)
app.command("from-hf")(convert_hf.from_hf)
app.command("check")(convert_hf.check)
app.command("push")(convert_hf.push)


@app.callback()
def convert() -> None:
    """Convert checkpoints from and to the formats of other systems."""


FolderArgument = Annotated[
    str,
    typer.Argument(
        help="One step of an InternEvo run: the folder with model_tp*_pp*.pt."
    ),
]
OutArgument = Annotated[
    str, typer.Argument(help="Save folder for the converted checkpoint.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        help="Config file of that run, used when there is no model_config.pt."
    ),
]
W2Option = Annotated[
    str,
    typer.Option(
        help="Role of w2 if its shape does not show it: down, or up (checkpoints of early 2023)."
    ),
]
WeightsOnlyOption = Annotated[
    bool,
    typer.Option(help="Skip the optimizer, the schedule and the data position."),
]


@app.command("from-internevo")
def from_internevo(
    folder: FolderArgument,
    out: OutArgument,
    config: ConfigOption = None,
    w2: W2Option = "auto",
    weights_only: WeightsOnlyOption = False,
) -> None:
    """Import an InternEvo checkpoint, saved in any layout."""
    from evomesh.checkpoint.hub_cache import local_folder
    from evomesh.checkpoint.internevo.model import HeadCounts, read_model
    from evomesh.checkpoint.internevo.optimizer import read_counters, read_optimizer
    from evomesh.checkpoint.native.commit import commit_tensors
    from evomesh.config.record import config_to_dict

    if w2 not in ("auto", "down", "up"):
        raise UserError(f"--w2 {w2!r}", expected="auto, down or up", code="EVO-CLI-002")
    role = cast("W2Role", w2)
    folder = str(local_folder(folder))
    resolved = _resolve_config(folder, config)
    heads = HeadCounts(resolved.model.num_attention_heads, resolved.model.kv_heads)
    tensors = dict(read_model(folder, heads, role))
    state: dict[str, Any] = {"source": "internevo"}
    files = sorted(path.name for path in Path(folder).iterdir())
    with_optimizer = not weights_only and any(
        name.startswith("optimizer_") for name in files
    )
    if with_optimizer:
        optimizer, scalars = read_optimizer(folder, heads, role)
        tensors |= optimizer
        state |= scalars | read_counters(folder)
    path = commit_tensors(
        out, _step_number(files), tensors, state, config_to_dict(resolved)
    )
    if with_optimizer:
        position = state["sampler"]["internevo"]
        print(
            f"wrote {path}: {len(tensors)} tensors, weights and optimizer; auto_resume continues from it"
        )
        print(
            f"data position: step {position['step']} with data.seed={position['seed']}, "
            f"{position['global_batch']} packs per step"
        )
    else:
        print(f"wrote {path}: {len(tensors)} tensors, weights only")


def _step_number(files: list[str]) -> int:
    """Return the number in the name of ``{number}.step``, 0 without such a file."""
    for name in files:
        number = name.removesuffix(".step")
        if number.isdigit():
            return int(number)
    return 0


def _resolve_config(folder: str, config: str | None) -> Config:
    """Return the run's config: from its file, else from model_config.pt and the names in the model files."""
    from evomesh.checkpoint.internevo.model import (
        family_of,
        find_model_files,
        read_model_section,
    )
    from evomesh.config.loader import load_config

    if config is not None:
        return load_config(config).config
    section = read_model_section(folder)
    if section is None:
        raise UserError(
            "no model_config.pt in the folder",
            where=folder,
            fix="give the config of that run: --config FILE",
            code="EVO-CKPT-018",
        )
    family = section.pop("model_type", None) or family_of(find_model_files(folder))
    text = f"model_type = {family!r}\nmodel = {section!r}\nckpt = dict(enable_save_ckpt=False)\n"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "model_config.py")
        path.write_text(text, encoding="utf-8")
        return load_config(str(path)).config


@app.command("to-internevo")
def to_internevo(
    ckpt: Annotated[
        str,
        typer.Argument(
            help="evomesh checkpoint: save folder, step in it, or step folder."
        ),
    ],
    out: Annotated[str, typer.Argument(help="New folder for the .pt files.")],
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    weight: Annotated[
        int | None,
        typer.Option(
            min=1, help="Weight-parallel size; writes the files of tensor mode isp."
        ),
    ] = None,
) -> None:
    """Export a checkpoint as InternEvo's model files. Takes the tensor, pipeline and weight sizes of the files."""
    from evomesh.checkpoint.internevo.export import write_model
    from evomesh.checkpoint.native.load import resolve
    from evomesh.config.record import config_from_dict

    checkpoint = resolve(ckpt, report=print)
    model = config_from_dict(checkpoint.config).model
    files = write_model(checkpoint, model, out, tensor, pipeline, weight)
    print(f"wrote {len(files)} model files to {out}")
