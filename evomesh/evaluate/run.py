"""Run tasks of lm-evaluation-harness on a model, and show or write its results."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.evaluate.native import HarnessModel


def find_tasks(tasks: Sequence[str]) -> TaskManager:
    """Return a task manager that knows these tasks: files (.yaml, in the harness's format) or names of built-in tasks.

    Raises:
        UserError: a task does not exist.
    """
    # It logs its defaults verbosely.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The index of built-in tasks takes seconds to read: only where one of them is named.
    task_manager = TaskManager(
        include_defaults=any(not _is_file(task) for task in tasks)
    )
    for task in tasks:
        refuse_unknown(task, task_manager)
    return task_manager


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    task_manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Return the harness's results of the tasks.

    Args:
        num_fewshot: examples before each question; None: the default of the task.
        limit: maximum number of examples per task; None: all.
        chat: render questions as messages, and few-shot examples as earlier turns, with the tokenizer's chat template.
        system: text before every question; in a chat, the system message.
    Raises:
        UserError: the data of a task cannot be loaded.
    """
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=task_manager,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be loaded ({str(error).splitlines()[0]})",
            where="--tasks",
            fix="name local files in the task's dataset_kwargs: data_files (relative to the current folder)",
        ) from None
    assert results is not None  # None on other ranks only
    return results


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the harness's table."""
    return str(make_table(results))


def write_results(results: dict[str, Any], path: str) -> None:
    """Write everything the harness returned as JSON."""
    text = json.dumps(
        results, indent=2, ensure_ascii=False, default=handle_non_serializable
    )
    expand_home(path).write_text(text + "\n", encoding="utf-8")


def refuse_unknown(task: str, task_manager: TaskManager) -> None:
    """Refuse a task file that does not exist, or a name that the harness does not know.

    Raises:
        UserError: with the most similar name, if there is one.
    """
    if _is_file(task):
        if not expand_home(task).is_file():
            raise UserError(f"no task file {task}", where="--tasks")
        return
    if not task_manager.match_tasks([task]):
        similar = difflib.get_close_matches(task, task_manager.all_tasks, n=1)
        raise UserError(
            f"unknown task {task!r}",
            where="--tasks",
            expected="a task file (.yaml), or a task of lm-evaluation-harness",
            fix=f"did you mean {similar[0]!r}?" if similar else "",
        )


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
