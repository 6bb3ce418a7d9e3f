"""Commands, files and numbers of the five documents, typed from top to bottom; one row each.

Keys of a config have their own table, ``config_keys.py``; what is different on purpose is in ``promises.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["works", "differs", "not here"]


@dataclass(frozen=True)
class DocumentRow:
    """One thing that a reader of a document types or expects.

    Attributes:
        document: "usage" (InternEvo's guide), "xtuner" (migration), "tokenized" (tokenized datasets), "tutorial".
        typed: the command, file or number.
        found: what happens here, where it is not what the document describes.
        test: the file of the test that types it; "": typed by hand.
    """

    document: str
    typed: str
    outcome: Outcome
    found: str = ""
    test: str = ""


COMMANDS = "tests/e2e/test_documents_commands.py"
LAYOUTS = "tests/e2e/test_layouts.py"
TUTORIAL = "tests/e2e/test_tutorial.py"
XTUNER = "tests/e2e/test_xtuner.py"
XTUNER_COMMANDS = "tests/unit/config/test_xtuner_commands.py"
BAD = "tests/unit/config/test_bad_configs.py"
STREAMING = "tests/unit/data/records/test_splits.py"
CONVERT = "tests/e2e/test_convert_hf.py"
RESUME = "tests/unit/checkpoint/test_resume.py"
CHAT = "tests/unit/data/test_chat.py"

ROWS: tuple[DocumentRow, ...] = (
    # data
    DocumentRow("usage", "install.md", "differs", "docs/install.md: nothing is built"),
    DocumentRow(
        "usage",
        "huggingface-cli download --repo-type dataset ...",
        "differs",
        "a command of huggingface_hub, whose newer versions call it hf download",
    ),
    DocumentRow(
        "usage",
        "streaming block, behind a config without folder",
        "works",
        "train and config check both ask for data.train_folder",
        BAD,
    ),
    DocumentRow(
        "usage",
        "streaming block, long form",
        "differs",
        "a comment of the document is broken in two; the error shows the line, and joined it loads",
    ),
    DocumentRow("usage", "TinyStories as it is on the hub", "works", "", STREAMING),
    DocumentRow("usage", "tokenizer folder with remote code", "works", "never run"),
    DocumentRow(
        "usage",
        "tools/tokenizer.py without V7_sft.model",
        "differs",
        "not shipped; the error says where it is found",
        COMMANDS,
    ),
    DocumentRow("usage", "tools/tokenizer.py with the model", "works", "", COMMANDS),
    DocumentRow("usage", "token lines and meta of the example", "works", "", CHAT),
    DocumentRow(
        "usage",
        "tools/tokenizer.py, the same output twice",
        "differs",
        "replaces the file; InternEvo appends",
    ),
    DocumentRow(
        "usage",
        "tools/alpaca_tokenizer.py",
        "differs",
        "ids of `<eoh>` and `<eoa>` are the tokenizer's own; the split differs",
        CHAT,
    ),
    DocumentRow(
        "usage",
        "tools/alpaca_tokenizer.py with another tokenizer",
        "works",
        "with --chat-template",
        COMMANDS,
    ),
    DocumentRow(
        "usage", "text in GB18030", "works", "with --encoding, which the error names"
    ),
    # configuration
    DocumentRow(
        "usage",
        "7B_sft.py as printed",
        "works",
        "values without effect are one warning; config check -v lists them",
        "tests/unit/config/test_cli.py",
    ),
    DocumentRow("usage", "7B_sft.py of the English guide", "works"),
    DocumentRow(
        "usage",
        "ckpt fragment alone",
        "differs",
        "CHECKPOINT_EVERY is not in the fragment; the error names it",
    ),
    DocumentRow("usage", "a config with a byte order mark", "works"),
    DocumentRow(
        "usage",
        'BOTO3_IP = os.environ["BOTO3_IP"]',
        "works",
        "unset: the error names the variable",
        "tests/unit/config/test_loader.py",
    ),
    DocumentRow("usage", "load_ckpt_info=dict(path=None)", "works"),
    DocumentRow(
        "usage",
        "from internlm.model.registry import model_initializer",
        "differs",
        "the error names evomesh.register_model",
    ),
    DocumentRow(
        "usage",
        "enable_feishu_alert, light_monitor_address",
        "works",
        "the light monitor's figures go to any URL, as JSON",
        "tests/unit/train/test_alerts.py",
    ),
    # checkpoints
    DocumentRow("usage", "oss_snapshot_freq on a local folder", "works"),
    DocumentRow(
        "usage",
        "auto_resume over InternEvo's folders",
        "works",
        "or stops and gives the setting that starts from the weights",
        RESUME,
    ),
    DocumentRow(
        "usage",
        "llm_ckpts/49, snapshot/1",
        "differs",
        "steps are counted from 1, so the first is 50; the error lists those there are",
        RESUME,
    ),
    DocumentRow(
        "usage",
        "ckpt_type of another name",
        "differs",
        "refused when training starts, with the list; config check does not know custom ones",
        RESUME,
    ),
    DocumentRow(
        "usage",
        "internlm/internlm-7b as a path",
        "differs",
        "looked up in the local cache; the error prints the hf download command",
        RESUME,
    ),
    DocumentRow(
        "usage",
        "a resume with another global batch",
        "works",
        "the log has both numbers",
        RESUME,
    ),
    # training
    DocumentRow("usage", "srun ... python train.py --config", "works", "", LAYOUTS),
    DocumentRow("usage", "torchrun ... --launcher torch", "works", "", LAYOUTS),
    DocumentRow(
        "usage",
        "--backend, --host, --world_size, --local_rank",
        "works",
        "accepted without effect",
        "tests/unit/cli/test_train.py",
    ),
    DocumentRow(
        "usage",
        "a mistake under torchrun",
        "works",
        "one error, the last of torchrun's summary",
        "tests/e2e/test_torchrun.py",
    ),
    DocumentRow(
        "usage",
        "the 7B config on a laptop",
        "differs",
        "refused before it is built: at least 122.7 GiB",
        "tests/unit/train/test_fitting_memory.py",
    ),
    DocumentRow(
        "usage",
        "float16 on a CPU",
        "works",
        "with a warning that has the measured ratio",
        "tests/unit/train/test_fitting_memory.py",
    ),
    DocumentRow("usage", "the 16 columns of a step", "works"),
    DocumentRow(
        "usage",
        "train.py:323 in record_current_batch...",
        "differs",
        "report.py in step",
    ),
    DocumentRow("usage", "lr=4e-07 in step 0", "differs", "2e-07, the rate it used"),
    DocumentRow("usage", "63.27 TFLOPS at 1424.64 tgs", "works", "the same formula"),
    DocumentRow(
        "usage",
        "generate.py with the document's config",
        "differs",
        "VALID_FOLDER is None there; the error asks for generation.data_folder",
    ),
    DocumentRow("usage", "web_demo", "works", "with --ckpt", "tests/e2e/test_serve.py"),
    # XTuner
    DocumentRow("xtuner", "model_tp{i}_pp{j}.pt in any layout", "works"),
    DocumentRow(
        "xtuner",
        "convert2hf.py on such a folder",
        "differs",
        "names evomesh convert from-internevo",
    ),
    DocumentRow(
        "xtuner", "data = dict(...)", "differs", "the document's ellipsis, not Python"
    ),
    DocumentRow(
        "xtuner", "xtuner train, xtuner copy-cfg", "works", "", XTUNER_COMMANDS
    ),
    DocumentRow(
        "xtuner",
        "both XTuner template configs",
        "works",
        "translated, checked, traced on 8 ranks and trained small",
        "tests/contract/test_xtuner_templates.py",
    ),
    DocumentRow("xtuner", "--deepspeed deepspeed_zero1, 2, 3", "works", "", XTUNER),
    DocumentRow("tokenized", "xtuner/tools/get_data_order.py", "works", "", XTUNER),
    DocumentRow(
        "tokenized",
        "config copy internlm2_7b_w_tokenized_dataset",
        "differs",
        "evomesh xtuner copy-cfg copies XTuner's configs",
        XTUNER_COMMANDS,
    ),
    DocumentRow("tokenized", "--work-dir with checkpoints", "works", "", XTUNER),
    DocumentRow(
        "tokenized",
        "pth_to_hf.py CONFIG SRC DST",
        "works",
        "with --tokenizer and --safe-serialization",
        XTUNER,
    ),
    DocumentRow("tokenized", "iter_500.pth", "works", "", XTUNER_COMMANDS),
    DocumentRow(
        "tokenized",
        "the optimizer in iter_500.pth",
        "differs",
        "AdamW's moments start anew, which the log reports",
        XTUNER,
    ),
    DocumentRow("tokenized", "Aliyun DLC's variables", "works"),
    DocumentRow("tokenized", "lmdeploy convert", "differs", "lmdeploy chat FOLDER"),
    # tutorial
    DocumentRow(
        "tutorial", "pip install -r requirements/torch.txt", "works", "", COMMANDS
    ),
    DocumentRow("tutorial", "flash-attention, Apex", "differs", "not needed"),
    DocumentRow("tutorial", "get_dataset.py to test.py", "works", "", TUTORIAL),
    DocumentRow("tutorial", "load_optimizer in 7b_pretrain_config.py", "works"),
    DocumentRow(
        "tutorial", "the stray backtick", "differs", "the error names the file"
    ),
    DocumentRow("tutorial", "tensorboard --logdir=logs", "works"),
    DocumentRow("tutorial", "convert2hf.py --src_folder ...", "works", "", CONVERT),
    DocumentRow("tutorial", "183 TFLOPS at 4103 TGS", "works", "182.2 by the formula"),
)
