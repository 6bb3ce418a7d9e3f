"""Runs tasks on a model and gives back the harness's table."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from evomesh.errors import UserError
from evomesh.evaluate.native import HarnessModel


def find_tasks(tasks: Sequence[str]) -> TaskManager:
    """What knows these tasks: files (.yaml, in the harness's form) and names of the harness's own tasks.

    Raises:
        UserError: no such task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it speaks of its own defaults at length
    manager = TaskManager(include_defaults=any(not _is_file(task) for task in tasks))
    for task in tasks:
        refuse_unknown(task, manager)
    return manager


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """The harness's results of the tasks.

    Args:
        num_fewshot: examples before each question; None: as the task says.
        limit: only so many questions of each task.
        chat: write questions, and examples as earlier turns, with the tokenizer's chat template.
        system: what stands before them: the system turn of a chat.
    Raises:
        UserError: the data of a task cannot be had.
    """
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be loaded ({str(error).splitlines()[0]})",
            where="--tasks",
            fix="name local files in the task's dataset_kwargs: data_files (relative to where the command runs)",
        ) from None
    assert results is not None  # None only on further ranks
    return results


def table(results: dict[str, Any]) -> str:
    """As the harness prints it."""
    return str(make_table(results))


def write(results: dict[str, Any], path: str) -> None:
    """All the harness says, as JSON."""
    text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
    Path(path).expanduser().write_text(text + "\n", encoding="utf-8")


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def refuse_unknown(task: str, manager: TaskManager) -> None:
    if _is_file(task):
        if not Path(task).expanduser().is_file():
            raise UserError(f"no task file {task}", where="--tasks")
        return
    if not manager.match_tasks([task]):
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        raise UserError(
            f"unknown task {task!r}",
            where="--tasks",
            expected="a task file (.yaml), or a task of lm-evaluation-harness",
            fix=f"did you mean {near[0]!r}?" if near else "",
        )
