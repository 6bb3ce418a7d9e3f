"""A survey of a data folder as one JSON value: the figures of ``evomesh data report``."""

from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.data import DataConfig
from evomesh.data.survey.documents import (
    SurveyDocument,
    TextFolder,
    TokenFolder,
    utf8_size,
)
from evomesh.data.survey.duplicates import (
    DuplicateFigures,
    ExactDuplicates,
    NearDuplicates,
)
from evomesh.data.survey.frequencies import TokenCounts
from evomesh.data.survey.packing_loss import packing_losses, sources_of
from evomesh.data.survey.scripts import (
    CLASSIFIED_CHARACTERS,
    LanguageCounts,
    ScriptCounts,
)
from evomesh.data.token_files.fingerprint import (
    files_of_other_tokenizer,
    read_fingerprint,
)
from evomesh.data.tokenizer import Tokenizer

SAMPLES = 3  # documents of each type
SAMPLE_CHARACTERS = 1500
GROUPS_SHOWN = 15
PLACES_SHOWN = 6
EXCERPT_CHARACTERS = 240
DECODED_TOKENS = 2_000_000  # of token files, for scripts and languages
CLASSIFIED_TEXTS = 2000
SAMPLE_SEED = 1024
QUANTILES = (0, 5, 25, 50, 75, 95, 100)

Lengths = NDArray[np.int64]
Row = dict[str, Any]
NO_LENGTHS: Lengths = np.zeros(0, np.int64)


class _Reservoir:
    """A uniform sample of numbers of a stream whose length is not known."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = random.Random(SAMPLE_SEED)
        self._seen = 0
        self.kept: list[Any] = []

    def add(self, item: Any) -> None:
        self._seen += 1
        if len(self.kept) < self._size:
            self.kept.append(item)
            return
        place = self._random.randrange(self._seen)
        if place < self._size:
            self.kept[place] = item


class _Pass:
    """Everything that one pass over the documents counts."""

    def __init__(self, folder: TokenFolder | TextFolder, tokenizer: Tokenizer | None):
        self.exact = ExactDuplicates()
        self.near = NearDuplicates()
        self.tokens = TokenCounts()
        self.scripts = ScriptCounts()
        self.languages = LanguageCounts()
        self.lengths: dict[str, array[int]] = {}
        self.samples: dict[str, _Reservoir] = {}
        self.documents = 0
        self.units = 0
        self.decoded = 0  # tokens of the texts that scripts were counted in
        self.text_bytes = 0  # of these texts
        self._tokenizer = tokenizer
        self._beginnings = _Reservoir(CLASSIFIED_TEXTS)
        self._stride = 1
        if isinstance(folder, TokenFolder):
            read = folder.tokens * folder.share
            self._stride = max(1, round(read / DECODED_TOKENS))
        for number, document in enumerate(folder.documents()):
            self._add(number, document)
            if folder.has_tokens:
                self.tokens.add(document.units, document.masked)
        for text in self._beginnings.kept:
            self.languages.add(text)

    def _add(self, number: int, document: SurveyDocument) -> None:
        count = len(document.units)
        content = document.content
        self.documents += 1
        self.units += count
        self.exact.add(number, content, count)
        self.near.add(number, content, document.units)
        kind = document.type
        if kind not in self.lengths:
            self.lengths[kind] = array("q")
            self.samples[kind] = _Reservoir(SAMPLES)
        length = length_of(document)
        self.lengths[kind].append(length)
        self.samples[kind].add(number)
        if number % self._stride == 0:
            self._add_text(document)

    def _add_text(self, document: SurveyDocument) -> None:
        text = text_of(document, self._tokenizer)
        if text is None:
            return
        self.scripts.add(text)
        self._beginnings.add(text[:CLASSIFIED_CHARACTERS])
        self.decoded += len(document.units)
        self.text_bytes += utf8_size(text)


def length_of(document: SurveyDocument) -> int:
    """Return the tokens of a document of token files, the bytes of a text."""
    if document.text is None:
        return len(document.units)
    return utf8_size(document.text)


def text_of(document: SurveyDocument, tokenizer: Tokenizer | None) -> str | None:
    """Return the text of a document; None if it has only ids and there is no tokenizer."""
    if document.text is not None or tokenizer is None:
        return document.text
    known = document.units[document.units < tokenizer.vocab_size]
    return tokenizer.decode(known.tolist())


def survey_of(
    folder: TokenFolder | TextFolder,
    tokenizer: Tokenizer | None,
    config: DataConfig | None,
) -> Row:
    """Read a folder and return its figures.

    Args:
        tokenizer: decodes ids; None: no scripts, languages and samples of token files.
        config: packs of which the loss is shown, with its ``train_folder``; None: not shown.

    Raises:
        UserError: a document cannot be read.
    """
    counted = _Pass(folder, tokenizer)
    lengths = _lengths(folder, counted)
    everything = np.concatenate([NO_LENGTHS, *lengths.values()])
    is_text = isinstance(folder, TextFolder)
    survey: Row = {
        "unit": "bytes" if is_text else "tokens",
        "similar_unit": "tokens" if folder.has_tokens else "words",
        "read": _read(folder, counted, everything),
        "files": folder.files,
        "other_tokenizer": _of_other_tokenizer(folder, tokenizer),
        "types": _types(lengths),
        "lengths": histogram_of(everything),
        "exact": _duplicates(counted.exact.figures(), folder, tokenizer),
        "near": _duplicates(counted.near.figures(), folder, tokenizer),
        "scripts": counted.scripts.rows(),
        "script_texts": counted.scripts.texts,
        "languages": counted.languages.rows(),
        "has_languages": counted.languages.is_available,
        "samples": _samples(counted, folder, tokenizer),
    }
    if folder.has_tokens:
        survey["tokens"] = counted.tokens.figures(tokenizer)
        survey["tokens"]["fertility"] = _fertility(folder, counted)
    if config is not None and isinstance(folder, TokenFolder):
        survey["packing"] = packing_losses(sources_of(config), config)
    return survey


def _lengths(folder: TokenFolder | TextFolder, counted: _Pass) -> dict[str, Lengths]:
    """Return the lengths of documents by type: of token files all, from the meta."""
    if isinstance(folder, TextFolder):
        return {kind: np.array(values) for kind, values in counted.lengths.items()}
    return {kind: folder.lengths_of(kind) for kind in set(folder.types)}


def _read(folder: TokenFolder | TextFolder, counted: _Pass, everything: Lengths) -> Row:
    return {
        "documents": counted.documents,
        "units": counted.units,
        "of_documents": len(everything),
        "of_units": int(everything.sum()),
        "share": folder.share,
        "is_complete": folder.is_complete,
    }


def _types(lengths: dict[str, Lengths]) -> list[Row]:
    total = sum(int(values.sum()) for values in lengths.values())
    rows = []
    for kind in sorted(lengths):
        values = lengths[kind]
        units = int(values.sum())
        quantiles = np.percentile(values, QUANTILES, method="lower")
        row = {
            "type": kind,
            "documents": len(values),
            "units": units,
            "share": units / max(1, total),
            "mean": units / len(values),
            "quantiles": quantiles.astype(int).tolist(),
        }
        rows.append(row)
    return rows


def histogram_of(lengths: Lengths) -> Row:
    """Return documents and units by length: of 0, then of each power of two up to below the next."""
    if not len(lengths):
        return {"starts": [], "documents": [], "units": []}
    longest = int(lengths.max())
    powers = np.arange(longest.bit_length())
    starts = np.append(0, 2**powers)
    places = np.searchsorted(starts, lengths, side="right")
    places -= 1
    documents = np.bincount(places)
    units = np.bincount(places, weights=lengths)
    units = units.astype(np.int64)
    return {
        "starts": starts.tolist(),
        "documents": documents.tolist(),
        "units": units.tolist(),
    }


def _duplicates(
    figures: DuplicateFigures,
    folder: TokenFolder | TextFolder,
    tokenizer: Tokenizer | None,
) -> Row:
    shown = figures.groups[:GROUPS_SHOWN]
    wanted: list[int] = []
    for group in shown:
        wanted += group.documents[:PLACES_SHOWN]
    picked = folder.pick(sorted(set(wanted)))
    rows = []
    for group in shown:
        members = [picked[number] for number in group.documents[:PLACES_SHOWN]]
        rows.append(
            {
                "size": len(group.documents),
                "units": group.tokens,
                "places": [document.place for document in members],
                "text": _excerpt(members[0], tokenizer, EXCERPT_CHARACTERS),
            }
        )
    return {
        "looked_at": figures.looked_at,
        "looked_at_units": figures.looked_at_tokens,
        "share": figures.share,
        "groups": len(figures.groups),
        "repeats": figures.repeats,
        "repeated_units": figures.repeated_tokens,
        "rows": rows,
    }


def _excerpt(
    document: SurveyDocument, tokenizer: Tokenizer | None, characters: int
) -> str:
    """Return the beginning of a document's text, or of its ids."""
    # No token stands for fewer characters than none, so a long document is not decoded.
    beginning = document
    if document.text is None:
        beginning = SurveyDocument(
            document.type, document.place, document.units[:characters]
        )
    text = text_of(beginning, tokenizer)
    if text is None:
        text = " ".join(map(str, beginning.units.tolist()))
    return text if len(text) <= characters else f"{text[:characters]} …"


def _samples(
    counted: _Pass, folder: TokenFolder | TextFolder, tokenizer: Tokenizer | None
) -> list[Row]:
    numbers: list[int] = []
    for reservoir in counted.samples.values():
        numbers += reservoir.kept
    rows = []
    for document in folder.pick(sorted(numbers)).values():
        row = {
            "type": document.type,
            "place": document.place,
            "units": length_of(document),
            "text": _excerpt(document, tokenizer, SAMPLE_CHARACTERS),
        }
        rows.append(row)
    return rows


def _of_other_tokenizer(
    folder: TokenFolder | TextFolder, tokenizer: Tokenizer | None
) -> list[str]:
    """Return the token files that another tokenizer made."""
    if tokenizer is None or isinstance(folder, TextFolder):
        return []
    paths = [source.path for source in folder.sources]
    others = files_of_other_tokenizer(paths, tokenizer.hash)
    found = []
    for source in folder.sources:
        if source.path in others:
            found.append(source.name)
    return found[:10]


def _fertility(folder: TokenFolder | TextFolder, counted: _Pass) -> Row | None:
    """Return bytes of text per token: of all documents where their fingerprints have it, else of those decoded."""
    if isinstance(folder, TokenFolder):
        recorded = _recorded_bytes(folder)
        if recorded is not None:
            value = recorded / max(1, folder.tokens)
            return {"value": value, "is_exact": True}
    if not counted.decoded:
        return None
    value = counted.text_bytes / counted.decoded
    is_text = isinstance(folder, TextFolder)
    return {
        "value": value,
        "is_exact": is_text and folder.is_complete,
    }


def _recorded_bytes(folder: TokenFolder) -> int | None:
    total = 0
    for source in folder.sources:
        record = read_fingerprint(source.path) or {}
        if "text_bytes" not in record:
            return None
        total += int(record["text_bytes"])
    return total
