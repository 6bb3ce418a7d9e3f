"""XTuner's scripts that turn folders of conversations into token files; ``xtuner/tools`` runs them by their paths."""

from __future__ import annotations

from pathlib import Path

from evomesh.cli.usage import ExplainedParser
from evomesh.config.reading.xtuner.raw_data import TEMPLATES
from evomesh.errors import UserError

# --dataset-format -> evomesh tokenize --format.
FORMATS = {"openai": "messages", "alpaca": "alpaca", None: "xtuner"}
FTDP_LENGTH = 32 * 1024  # tokens of a conversation that XTuner's script keeps
FTDP_FOLDER = "chatml_llamav13_32k/train/cn"


def process_untokenized_datasets() -> None:
    """Tokenize each file below a folder into a token file of the same name."""
    options = _untokenized_parser().parse_args()
    files = _files_below(options.data_folder, options.file_type)
    if options.data_order_path is not None:
        from evomesh.data.token_files.folders import read_order

        files = [
            options.data_folder / name for name in read_order(options.data_order_path)
        ]
    record_format = "messages" if options.is_ftdp else FORMATS[options.dataset_format]
    template = TEMPLATES.get(options.prompt_template, "tokenizer")
    for file in files:
        name = file.relative_to(options.data_folder).with_suffix(".bin")
        # Token files are in folders of a type.
        inside = name if len(name.parts) > 1 else Path("raw") / name
        _tokenize(
            file,
            options.save_folder / inside,
            options.tokenizer_path,
            record_format,
            template,
            options.max_length,
        )
    print(
        f"{len(files)} files: train on them with load_intern_repo_tokenized_dataset(folder={options.save_folder})"
    )


def _untokenized_parser() -> ExplainedParser:
    parser = ExplainedParser(
        description="Tokenize folders of conversations, one token file for each file."
    )
    parser.add_argument("--data-folder", required=True, type=Path)
    parser.add_argument(
        "--save-folder", required=True, type=Path, help="folder of the token files"
    )
    parser.add_argument("--tokenizer-path", required=True)
    formats = [name for name in FORMATS if name]
    parser.add_argument(
        "--dataset-format",
        choices=formats,
        help="default: conversations of input and output",
    )
    parser.add_argument(
        "--prompt-template",
        help=f"{', '.join(TEMPLATES)}; others: the tokenizer's template",
    )
    parser.add_argument("--max-length", default=FTDP_LENGTH, type=int)
    parser.add_argument(
        "--pack-to-max-length",
        action="store_true",
        help="accepted: packing is done in training",
    )
    parser.add_argument("--file-type", default=".json")
    parser.add_argument(
        "--is-ftdp", action="store_true", help="each line is a list of role and content"
    )
    parser.add_argument("--data-order-path", type=Path)
    return parser


def tokenize_ftdp_datasets() -> None:
    """Tokenize the ``processed`` files of each dataset with InternLM2's template."""
    parser = ExplainedParser(
        description="Tokenize DATASET/processed/*.jsonl with InternLM2's chat template."
    )
    parser.add_argument("--processed-dir", required=True, type=Path)
    parser.add_argument("--tokenized-dir", required=True, type=Path)
    parser.add_argument("--tokenizer-path", required=True)
    parser.add_argument(
        "--tokenizer-w-special-tokens-save-dir", help="accepted: no token is ever added"
    )
    options = parser.parse_args()
    processed = [
        file
        for file in _files_below(options.processed_dir, ".jsonl")
        if "/processed/" in file.as_posix()
    ]
    if not processed:
        raise UserError(
            "no processed/*.jsonl below the folder",
            where=f"--processed-dir {options.processed_dir}",
            code="EVO-DATA-002",
        )
    for file in processed:
        dataset = file.relative_to(options.processed_dir).parts[0]
        output = options.tokenized_dir / FTDP_FOLDER / dataset / f"{file.stem}.bin"
        if output.exists():
            print(f"{output} exists already, and is left as it is")
            continue
        _tokenize(
            file, output, options.tokenizer_path, "messages", "chatml", FTDP_LENGTH
        )


def _tokenize(
    source: Path,
    output: Path,
    tokenizer: str,
    record_format: str,
    template: str,
    max_length: int,
) -> None:
    from evomesh.cli.xtuner_data import run_tokenize

    command = [
        "tokenize",
        str(source),
        "--output",
        str(output),
        "--tokenizer",
        tokenizer,
    ]
    command += [
        "--format",
        record_format,
        "--chat-template",
        template,
        "--max-length",
        str(max_length),
    ]
    run_tokenize(command)


def _files_below(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder in the order of their paths.

    Raises:
        UserError: there is none.
    """
    files = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    if not files:
        raise UserError(
            f"no file ending in {suffix!r} below the folder",
            where=str(folder),
            code="EVO-DATA-002",
        )
    return files
