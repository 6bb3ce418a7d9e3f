"""Loss beyond the trained length, with and without dynamic NTK (``use_dynamic_ntk_rope``).

    evomesh train configs/demo.py --set data.seq_len=256 --set data.micro_bsz=4 --set data.total_steps=700 \\
        --set model.max_position_embeddings=256 --set lr_scheduler.total_steps=700 --set ckpt.save_ckpt_folder=local:ntk
    python benchmarks/dynamic_ntk.py --ckpt ntk --data demo_data/valid --lengths 256 1024 2048

The documents of the validation folder are cut into windows of each length; documents shorter than a window follow one
another in it. Printed is the mean loss of all tokens of the windows, and of the tokens beyond the trained length.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from evomesh.checkpoint.restore import restore_model
from evomesh.data.prompts import find_tasks, read_prompts
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel, with_rotary_type


def windows(folder: str, vocab_size: int, length: int, count: int) -> list[Tensor]:
    """Up to ``count`` windows of ``length`` + 1 tokens."""
    tasks = find_tasks(folder, "--data", vocab_size)
    ids = [
        token
        for files in tasks.values()
        for prompt in read_prompts(files, vocab_size)
        for token in prompt.ids
    ]
    starts = range(0, len(ids) - length, length)[:count]
    return [torch.tensor(ids[start : start + length + 1]) for start in starts]


@torch.inference_mode()
def losses(model: LanguageModel, window: Tensor) -> Tensor:
    """[L] loss of each token of a window but its first."""
    logits = model.logits(model(window[:-1], single_sequence(len(window) - 1)))
    return torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", required=True, help="folder of token files")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument(
        "--tokens",
        type=int,
        default=65536,
        help="most tokens to look at for each length",
    )
    args = parser.parse_args()
    restored = restore_model(args.ckpt)
    model, config = restored.model, restored.config.model
    trained = config.max_position_embeddings
    print(f"{restored.source}, trained at {trained} tokens")
    for length in args.lengths:
        parts = windows(
            args.data, config.vocab_size, length, max(args.tokens // length, 1)
        )
        for rotary_type in ("origin", "dynamic"):
            rotated = with_rotary_type(model, rotary_type)
            found = torch.stack([losses(rotated, part) for part in parts])
            beyond = (
                f", after token {trained}: {found[:, trained:].mean():.3f}"
                if length > trained
                else ""
            )
            name = "dynamic NTK" if rotary_type == "dynamic" else "plain      "
            print(
                f"  {length:5d} tokens, {name}: {found.mean():.3f}{beyond}   ({len(parts)} windows)"
            )


if __name__ == "__main__":
    main()
