"""Duplicates against brute force: equal contents in a dict, similar ones by sets of shingles."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from evomesh.data.survey.duplicates import (
    DuplicateFigures,
    ExactDuplicates,
    NearDuplicates,
)

Documents = list[np.ndarray]


def exact_of(documents: Documents, limit: int = 10**6) -> DuplicateFigures:
    found = ExactDuplicates(limit)
    for number, ids in enumerate(documents):
        found.add(number, ids.tobytes(), len(ids))
    return found.figures()


def near_of(documents: Documents, limit: int = 10**6) -> DuplicateFigures:
    found = NearDuplicates(limit)
    for number, ids in enumerate(documents):
        found.add(number, ids.tobytes(), ids)
    return found.figures()


def random_documents(count: int, seed: int = 0) -> Documents:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(40, 300, count)
    return [generator.integers(1, 500, length) for length in lengths]


def equal_groups(documents: Documents) -> list[list[int]]:
    places = defaultdict(list)
    for number, ids in enumerate(documents):
        places[tuple(ids.tolist())].append(number)
    return sorted(group for group in places.values() if len(group) > 1)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    sets = []
    for ids in (first, second):
        words = ids.tolist()
        sets.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_equal_documents_are_all_found() -> None:
    documents = random_documents(60)
    documents += [documents[3], documents[3], documents[17], np.array([], np.int64)]
    documents += [np.array([], np.int64)]
    order = np.random.default_rng(1).permutation(len(documents))
    documents = [documents[place] for place in order]
    figures = exact_of(documents)
    found = sorted(group.documents for group in figures.groups)
    assert found == equal_groups(documents)
    assert (figures.looked_at, figures.share) == (65, 1)
    assert figures.looked_at_tokens == sum(map(len, documents))
    assert figures.repeats == 4
    repeated = sum(len(documents[n]) for group in found for n in group[1:])
    assert figures.repeated_tokens == repeated
    tokens = [group.tokens for group in figures.groups]
    assert tokens == sorted(tokens, reverse=True)


def test_past_its_limit_whole_groups_are_kept() -> None:
    documents = random_documents(1000)
    documents += documents[:500]  # half of all have one copy
    figures = exact_of(documents, limit=600)
    assert figures.share < 1
    assert 50 < figures.looked_at <= 600
    # A group is kept or left out as a whole, so that the shares stay what they are.
    assert all(len(group.documents) == 2 for group in figures.groups)
    assert set(map(tuple, equal_groups(documents))) >= {
        tuple(group.documents) for group in figures.groups
    }
    assert abs(figures.repeats / figures.looked_at - 1 / 3) < 0.07


def test_similar_documents_are_those_of_brute_force() -> None:
    documents = random_documents(80)
    generator = np.random.default_rng(2)
    for original in documents[:30]:
        changed = original.copy()
        # From one changed token (very similar) to one in five (not similar).
        count = 1 + int(generator.integers(0, len(changed) // 5))
        places = generator.choice(len(changed), count, replace=False)
        changed[places] = 900
        documents.append(changed)
    for original in documents[30:40]:
        documents.append(np.append(original, 7))
    documents.append(documents[50])  # equal: not similar
    figures = near_of(documents)
    together = {
        pair
        for group in figures.groups
        for pair in combinations(sorted(group.documents), 2)
    }
    compared = 0
    for first, second in combinations(range(len(documents) - 1), 2):
        value = similarity(documents[first], documents[second])
        # Within 0.8 +- 0.13 an estimate of 128 samples may fall on either side.
        if value > 0.93:
            compared += 1
            assert (first, second) in together, value
        elif value < 0.67:
            assert (first, second) not in together, value
    assert compared >= 10
    assert figures.looked_at == len(documents) - 1


def test_a_long_document_is_hashed_in_parts() -> None:
    generator = np.random.default_rng(3)
    long = generator.integers(1, 10**6, 20_000)
    same_shingles = np.concatenate([long, long[:8000]])
    figures = near_of([long, random_documents(1)[0], same_shingles])
    assert [group.documents for group in figures.groups] == [[0, 2]]
    assert figures.repeated_tokens == 28_000


def test_past_its_limit_evenly_spaced_documents_are_compared() -> None:
    documents = random_documents(100)
    documents[64] = np.append(documents[0], 7)
    documents[65] = np.append(documents[1], 7)
    figures = near_of(documents, limit=40)
    assert (figures.share, figures.looked_at) == (0.25, 25)
    assert [group.documents for group in figures.groups] == [[0, 64]]


def test_nothing_and_short_documents() -> None:
    assert exact_of([]).groups == near_of([]).groups == []
    short = [np.array([1, 2]), np.array([1, 3]), np.array([], np.int64)]
    assert near_of(short).groups == []
