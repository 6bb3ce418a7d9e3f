"""Run tasks of lm-evaluation-harness on a model, and show or write its results."""

from __future__ import annotations

import difflib
import json
import logging
import random
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import UndefinedError
from lm_eval import evaluator as harness
from lm_eval.api import task as harness_task
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.evaluate.native import HarnessModel

# The harness's own.
RANDOM_SEED = 0
OTHER_SEED = 1234
DEFAULT_FILTER = "none"


def find_tasks(tasks: Sequence[str], where: str = "--tasks") -> TaskManager:
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
        refuse_unknown(task, task_manager, where)
    return task_manager


@dataclass
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        manager: what has loaded them.
        roots: the tasks and groups that were asked for, as the harness takes them.
        tasks, groups: all of them by name, those of the groups too.
    """

    manager: TaskManager
    roots: list[Any] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Load what has this name: a task, or a group of tasks."""
        loaded = self.manager.load([name])
        tasks = loaded["tasks"]
        groups = loaded["groups"]
        self.tasks.update(tasks)
        self.groups.update(groups)
        group_items = groups.values()
        below = _names_below(group_items)
        self.roots += _without(groups, below)
        self.roots += _without(tasks, below)


def _without(items: Mapping[str, Any], names: set[str]) -> list[Any]:
    return [item for name, item in items.items() if name not in names]


def _names_below(groups: Iterable[Any]) -> set[str]:
    """Return the names of all tasks and groups that are part of one of the groups."""
    names: set[str] = set()
    for group in groups:
        names.update(group.child_names)
        for task in group.get_all_tasks():
            names.add(task.task_name)
    return names


def load_tasks(names: Sequence[str], where: str = "--tasks") -> LoadedTasks:
    """Return the tasks with their data, each tried on its first example.

    Raises:
        UserError: a task does not exist, or its data cannot be loaded or lacks a column that it names.
    """
    loaded = LoadedTasks(find_tasks(names, where))
    for name in names:
        with _refuses_wrong_data(name, where):
            loaded.add(name)
    for task in loaded.tasks.values():
        check_columns(task)
    return loaded


def check_columns(task: Task) -> None:
    """Refuse a task that names a column which its data lacks.

    Raises:
        UserError: names the column, and those that there are.
    """
    where = f"task {task.config.task}"
    doc = next(iter(task.eval_docs), None)
    if doc is None:
        raise UserError("the data has no example", where=where, code="EVO-EVAL-002")
    expected = f"a column of its data: {', '.join(doc)}"
    is_choice = task.OUTPUT_TYPE == "multiple_choice"
    fields = ["doc_to_text", "doc_to_target"] + ["doc_to_choice"] * is_choice
    for name in fields:
        given = getattr(task.config, name)
        # The harness would take such a word for the text itself.
        is_word = isinstance(given, str) and given.isidentifier()
        if is_choice and is_word and given not in doc:
            raise UserError(
                f"{name} is {given!r}",
                where=where,
                expected=expected,
                code="EVO-EVAL-002",
            )
        try:
            getattr(task, name)(doc)
        except (UndefinedError, KeyError) as error:
            raise UserError(
                f"{name}: {error}", where=where, expected=expected, code="EVO-EVAL-002"
            ) from None


@contextmanager
def _refuses_wrong_data(task: str, where: str) -> Iterator[None]:
    """Turn errors of the harness, which tries a task on its first example when it loads it, into a message."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"the data of {task} cannot be loaded ({str(error).splitlines()[0]})",
            where=where,
            fix="name local files in the task's dataset_kwargs: data_files (relative to the current folder)",
            code="EVO-EVAL-002",
        ) from None
    except (UndefinedError, LookupError, ValueError, TypeError) as error:
        columns = ", ".join(_example_in(error))
        raise UserError(
            f"the task does not fit its data: {error}",
            where=f"{where} ({task})",
            expected=f"a column of its data: {columns}" if columns else "",
            code="EVO-EVAL-002",
        ) from None


def _example_in(error: Exception) -> Mapping[str, object]:
    """Return the example that the harness tried when it raised the error; empty if there was none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("doc", "test_doc"):
            example = frame.f_locals.get(name)
            if isinstance(example, Mapping):
                return example
    return {}


def run_tasks(
    model: HarnessModel,
    tasks: LoadedTasks,
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
    """
    results: dict[str, Any] | None = harness.simple_evaluate(
        model=model,
        tasks=tasks.roots,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=tasks.manager,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        system_instruction=system,
    )
    assert results is not None  # None on other ranks only
    return results


def score_tasks(
    model: HarnessModel, tasks: LoadedTasks, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Return the results of tasks as ``run_tasks`` does, without standard errors and facts of the machine.

    Sets the seeds of Python, numpy and torch, as the harness's own command does.
    """
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    for task in tasks.tasks.values():
        default = task.get_config("num_fewshot")
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    task_dict = {"tasks": tasks.tasks, "groups": tasks.groups, "group_map": {}}
    with _no_progress_bars():
        results: dict[str, Any] = harness.evaluate(
            lm=model,
            task_dict=task_dict,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return results


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the harness's bars, which it has no switch for, out of a run's output."""
    bar = harness_task.tqdm
    harness_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        harness_task.tqdm = bar


def task_figures(results: dict[str, Any]) -> dict[str, float]:
    """Return the scores of the harness's results as figures ``eval/TASK/METRIC``, without standard errors.

    A filter other than the default is part of the name: ``eval/gsm8k/exact_match.strict-match``.
    """
    figures: dict[str, float] = {}
    for task, scores in results["results"].items():
        figures |= _figures_of_task(task, scores)
    return figures


def _figures_of_task(task: str, scores: dict[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        # Keys without a filter are no scores: alias, sample_len.
        if not filter_name:
            continue
        if metric.endswith("_stderr"):
            continue
        name = figure_name(
            task,
            metric,
            filter_name,
        )
        figures[name] = float(value)
    return figures


def figure_name(task: str, metric: str, filter_name: str) -> str:
    suffix = "" if filter_name == DEFAULT_FILTER else f".{filter_name}"
    return f"eval/{task}/{metric}{suffix}"


def figures_of(tasks: Iterable[Task]) -> dict[str, bool]:
    """Return the figures that the tasks give, and whether a higher value is better."""
    figures: dict[str, bool] = {}
    for task in tasks:
        config = task.config
        filters = [DEFAULT_FILTER]
        if config.filter_list:
            filters = [entry["name"] for entry in config.filter_list]
        better = task.higher_is_better()
        for metric, is_higher in better.items():
            for filter_name in filters:
                name = figure_name(config.task, metric, filter_name)
                figures[name] = bool(is_higher)
    return figures


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the harness's table."""
    return str(make_table(results))


def write_results(results: dict[str, Any], path: str) -> None:
    """Write everything the harness returned as JSON."""
    text = json.dumps(
        results, indent=2, ensure_ascii=False, default=handle_non_serializable
    )
    expand_home(path).write_text(text + "\n", encoding="utf-8")


def refuse_unknown(
    task: str, task_manager: TaskManager, where: str = "--tasks"
) -> None:
    """Refuse a task file that does not exist, or a name that the harness does not know.

    Raises:
        UserError: with the most similar name, if there is one.
    """
    if _is_file(task):
        if not expand_home(task).is_file():
            raise UserError(f"no task file {task}", where=where, code="EVO-EVAL-001")
        return
    if not task_manager.match_tasks([task]):
        similar = difflib.get_close_matches(task, task_manager.all_tasks, n=1)
        raise UserError(
            f"unknown task {task!r}",
            where=where,
            expected="a task file (.yaml), or a task of lm-evaluation-harness",
            fix=f"did you mean {similar[0]!r}?" if similar else "",
            code="EVO-EVAL-001",
        )


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))
