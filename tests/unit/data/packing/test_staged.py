"""Data stages against a simulation in plain code, and against the run left alone for every point of a resume."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomesh.config.data import DataConfig
from evomesh.config.data_stages import resolve_data_stages
from evomesh.data.packing.corpus import open_corpus
from evomesh.data.packing.mixture import MixtureSchedule
from evomesh.data.packing.staged import StagedCorpus, open_training_corpus
from evomesh.data.packing.staged_sampler import StagedPosition
from evomesh.errors import UserError
from evomesh.train.stored_state import _check_position
from tests.support.covers import covers
from tests.support.golden import write_bin

STEPS = 40
SEED = 7


def write_data(folder: Path, first_token: int, documents: int) -> None:
    """One document a pack of 8 tokens: "en" and "cn", of which "cn" has half as many."""
    for name, count in {"cn": documents // 2, "en": documents}.items():
        rows = [
            list(range(first_token + 8 * row, first_token + 8 * row + 8))
            for row in range(count)
        ]
        write_bin(folder / name / "a.bin", rows)
        first_token += 8 * count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    write_data(one, 1, 14)
    write_data(two, 10_001, 6)
    write_bin(two / "code/a.bin", [list(range(20_001, 20_033))])
    return str(one), str(two)


def open_data(
    folder: str, stages: list[dict[str, Any]], micro_num: int = 4, **values: Any
) -> StagedCorpus:
    options = dict(seq_len=8, micro_bsz=2, micro_num=micro_num, num_worker=0, seed=SEED)
    options |= {"total_steps": STEPS, "train_folder": folder, "stages": stages}
    corpus = open_training_corpus(DataConfig(**(options | values)), None)
    assert isinstance(corpus, StagedCorpus)
    return corpus


def steps_of(
    corpus: StagedCorpus, dp_size: int, steps: int = STEPS, state: Any = None
) -> list[list[list[int]]]:
    """Tokens of all ranks in each step: pack number ``rank + m * dp`` is micro-batch m of the rank."""
    streams = [corpus.stream(rank, dp_size, state) for rank in range(dp_size)]
    found = []
    for _ in range(steps):
        by_rank = [next(stream).tokens.tolist() for stream in streams]
        found.append([row for rows in zip(*by_rank, strict=True) for row in rows])
    return found


def numbers_of(corpus: StagedCorpus) -> dict[int, int]:
    """First token -> number of the pack; the documents of a file are shuffled before they are packed."""
    return {int(corpus.read(pack).tokens[0]): pack for pack in range(corpus.num_packs)}


def passes(packs: int, seed: int = SEED) -> Any:
    """Each pass of InternEvo's order over so many packs."""
    rng = np.random.RandomState(seed)
    while True:
        order = np.arange(packs)
        rng.shuffle(order)
        yield order.tolist()


@covers("data.stages")
@pytest.mark.parametrize("dp_size", [1, 2])
def test_growing_batches_go_on_in_one_permutation(
    folders: tuple[str, str], dp_size: int
) -> None:
    # 5 steps of one micro-batch, then the number falls inside the sixth step of two.
    stages = [
        dict(until=5, micro_num=1),
        dict(until_tokens=(5 * 8 + 6 * 16 - 15) * dp_size, micro_num=2),
        dict(),
    ]
    corpus = open_data(folders[0], stages, micro_bsz=1)
    found = steps_of(corpus, dp_size)
    sizes = [1] * 5 + [2] * 6 + [4] * 29
    assert [len(step) for step in found] == [size * dp_size for size in sizes]

    # A pass ends where it has less than a step left.
    numbers = passes(21)
    number_of = numbers_of(corpus)
    order: list[int] = []
    for step, size in zip(found, sizes, strict=True):
        if len(order) < size * dp_size:
            order = next(numbers)
        expected, order = order[: size * dp_size], order[size * dp_size :]
        assert [number_of[row[0]] for row in step] == expected


def test_a_new_mixture_takes_each_source_on_from_where_it_was(
    folders: tuple[str, str],
) -> None:
    stages = [
        dict(until=9, dataset_weights={"en/": 3.0, "cn/": 1.0}),
        dict(until=20, dataset_weights={"en/": 1.0, "cn/": 4.0}, micro_num=2),
        dict(dataset_weights={"cn/": 1.0}),
    ]
    corpus = open_data(folders[0], stages, micro_bsz=1)
    number_of = numbers_of(corpus)
    drawn = [[number_of[row[0]] for row in step] for step in steps_of(corpus, 1)]
    # Each mixture begins anew.
    for steps, weights in ((drawn[:9], [3, 1]), (drawn[9:20], [1, 4])):
        packs = functools.reduce(operator.iadd, steps, [])
        chosen = [0 if pack >= 7 else 1 for pack in packs]
        assert chosen == MixtureSchedule(weights).take(0, len(packs))
    assert max(functools.reduce(operator.iadd, drawn[20:], [])) < 7
    # "cn" is packs 0 to 6, "en" the other 14.
    for first, count in ((0, 7), (7, 14)):
        own = [
            pack - first
            for pack in functools.reduce(operator.iadd, drawn, [])
            if first <= pack < first + count
        ]
        numbers = passes(count)
        expected: list[int] = []
        while len(expected) < len(own):
            expected += next(numbers)
        assert own == expected[: len(own)]


@pytest.mark.parametrize("tokens", [400, 415, 416, 417, 447, 448, 449])
def test_the_table_has_the_steps_that_are_taken(
    folders: tuple[str, str], tokens: int
) -> None:
    stages = [
        dict(until=5, micro_num=1),
        dict(until_tokens=tokens, micro_num=2),
        dict(until=30),
        dict(),
    ]
    corpus = open_data(folders[0], stages)
    sizes = [len(step) for step in steps_of(corpus, 1)]
    expected = []
    consumed = 0
    for step in range(STEPS):
        size = 1 if step < 5 else 2 if consumed < tokens else 4
        consumed += 16 * size
        expected.append(size)
    assert sizes == expected
    table = resolve_data_stages(corpus.config, 1)
    assert [stage.end_step for stage in table] == [5, 5 + sizes.count(2), 30, STEPS]
    assert sum(stage.tokens for stage in table) == consumed
    assert [stage.tokens for stage in table][:2] == [5 * 16, sizes.count(2) * 32]


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lengths": [
        dict(until=7, seq_len=4, micro_bsz=2, micro_num=2),
        dict(until_tokens=700, micro_num=2),
        dict(until=33, seq_len=4, micro_bsz=2),
        dict(until=40),
    ],
    "weights": [
        dict(until=4),
        dict(until=11, dataset_weights={"en/": 0.7, "cn/": 0.3}, micro_num=2),
        dict(until_tokens=900, dataset_weights={"en/": 0.2, "cn/": 0.8}),
        dict(),
    ],
    "folders": [
        dict(until=10, dataset_weights={"en/": 0.7, "cn/": 0.3}),
        dict(until=17, train_folder="TWO", micro_num=2),
        dict(train_folder="TWO", dataset_weights={"code/": 1.0, "en/": 1.0}),
    ],
}


def variant(name: str, two: str) -> list[dict[str, Any]]:
    return [
        {key: two if value == "TWO" else value for key, value in stage.items()}
        for stage in VARIANTS[name]
    ]


@pytest.mark.parametrize("order", ["internevo", "xtuner"])
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_anywhere_and_in_another_layout_is_the_run_left_alone(
    folders: tuple[str, str], name: str, order: str
) -> None:
    stages = variant(name, folders[1])
    alone = open_data(folders[0], stages, order=order)
    expected = steps_of(alone, 1)
    sampler = alone.sampler(1)
    position: Any = sampler.start()
    halved = [
        stage | {"micro_num": stage["micro_num"] // 2}
        if "micro_num" in stage
        else stage
        for stage in stages
    ]
    for step in range(STEPS):
        sought = sampler.seek(step)
        assert isinstance(sought, StagedPosition)
        if (
            order == "internevo"
        ):  # in XTuner's, the end of a pass is the start of the next
            assert sampler.state(sought) == sampler.state(position)
        if step % 4 == 3 or step in (4, 7, 10, 17, 33):
            state = sampler.state(position) | {"manifest": alone.manifest["hash"]}
            _check_position(state)
            for dp_size, shared in ((1, stages), (2, halved)):
                corpus = open_data(
                    folders[0], shared, micro_num=4 // dp_size, order=order
                )
                found = steps_of(corpus, dp_size, STEPS - step, state)
                assert found == expected[step:], (step, dp_size)
        packs, position = sampler.take(position)
        assert sampler.take(sought)[0].tolist() == packs.tolist()


def test_layouts_of_one_global_batch_read_the_same(folders: tuple[str, str]) -> None:
    stages = variant("folders", folders[1])
    for stage in stages:
        stage.pop("micro_num", None)
    one = steps_of(open_data(folders[0], stages, micro_num=4), 1)
    assert steps_of(open_data(folders[0], stages, micro_num=2), 2) == one
    assert steps_of(open_data(folders[0], stages, micro_num=1), 4) == one


def test_types_of_all_folders_have_one_numbering(folders: tuple[str, str]) -> None:
    corpus = open_data(folders[0], variant("folders", folders[1]))
    assert corpus.types == ["cn", "en", "code"]
    stream = corpus.stream()
    names = set()
    for step in range(STEPS):
        batch = next(stream)
        kinds = {corpus.types[index] for index in batch.type_ids.unique().tolist()}
        if bool((batch.tokens > 20_000).any()):
            assert "code" in kinds
        names |= kinds if step > 17 else set()
    assert names == {"en", "code"}


CHANGED: list[dict[str, Any]] = [{"until": 10}, {"until": 20, "micro_num": 2}, {}]


class TestChangesOnResume:
    def state(self, folder: str, step: int) -> dict[str, Any]:
        corpus = open_data(folder, CHANGED)
        sampler = corpus.sampler(1)
        manifest = {"manifest": corpus.manifest["hash"]}
        return sampler.state(sampler.seek(step)) | manifest

    def test_later_stages_may_change(self, folders: tuple[str, str]) -> None:
        state = self.state(folders[0], 15)
        expected = steps_of(open_data(folders[0], CHANGED), 1)
        stages = [
            *CHANGED[:1],
            dict(until=18, micro_num=2),
            dict(train_folder=folders[1]),
        ]
        found = steps_of(open_data(folders[0], stages), 1, 6, state)
        assert found[:3] == expected[15:18]
        assert min(row[0] for row in found[3]) > 10_000

    @pytest.mark.parametrize(
        "stages, words",
        [
            (
                [dict(until=9), *CHANGED[1:]],
                "data stage 1: until: 10 in the checkpoint, 9",
            ),
            ([CHANGED[0], dict(until=14, micro_num=2), dict()], "steps: 15 in the ch"),
            ([dict(until=40)], "data stage 1: until: 10 in the checkpoint, 40"),
            (
                [CHANGED[0], dict(until=20, dataset_weights={"en/": 1.0}), dict()],
                "data stage 2: weights: None in the checkpoint",
            ),
        ],
    )
    def test_earlier_stages_may_not(
        self, folders: tuple[str, str], stages: list[dict[str, Any]], words: str
    ) -> None:
        state = self.state(folders[0], 15)
        with pytest.raises(UserError, match=words):
            open_data(folders[0], stages).stream(state=state)

    @pytest.mark.parametrize("step", [6, 10, 13])
    def test_a_run_without_stages_takes_them_up(
        self, folders: tuple[str, str], step: int
    ) -> None:
        values = {"seq_len": 8, "micro_bsz": 2, "micro_num": 4, "num_worker": 0}
        plain = open_corpus(
            DataConfig(train_folder=folders[0], seed=SEED, **values), None
        )
        sampler = plain.sampler(1)
        state = sampler.state(sampler.seek(step)) | {"manifest": plain.manifest["hash"]}
        stages = [
            dict(until_tokens=10 * 4 * 16),
            dict(until=max(step, 11), train_folder=folders[step < 11]),
            dict(train_folder=folders[1]),
        ]
        expected = steps_of(open_data(folders[0], stages), 1)
        found = steps_of(open_data(folders[0], stages), 1, STEPS - step, state)
        assert found == expected[step:]

    def test_a_run_does_not_lose_its_stages(self, folders: tuple[str, str]) -> None:
        state = self.state(folders[0], 15)
        plain = open_corpus(
            DataConfig(train_folder=folders[0], seq_len=8, micro_bsz=2), None
        )
        with pytest.raises(UserError, match=r"trained with data\.stages"):
            plain.stream(state=state)


def test_a_stage_without_enough_data_is_named(folders: tuple[str, str]) -> None:
    corpus = open_data(folders[0], [dict(until=3), dict(micro_num=64)])
    with pytest.raises(
        UserError, match=r"data stage 2: the data has .* one step needs"
    ):
        corpus.sampler(1)


def test_ends_by_tokens_must_fit_the_run(folders: tuple[str, str]) -> None:
    corpus = open_data(folders[0], [dict(until_tokens=10**6), dict()])
    with pytest.raises(UserError, match=r"ends at step 15625, after the last step"):
        corpus.sampler(1)
