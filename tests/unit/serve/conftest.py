from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from evomesh.models.language_model import LanguageModel
from evomesh.serve.service import ServiceLimits
from tests.support.serving import Served, serving, tiny_model, tiny_service

LIMITS = ServiceLimits(
    context_length=512, slots=4, queue=4, body_bytes=20_000, page_call_bytes=15_000
)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def served(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(
        tiny_service(tmp_path_factory.mktemp("tokenizer"), model, LIMITS)
    ) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    # The server speaks plain HTTP: without `verify`, no client reads the certificates.
    with httpx.Client(base_url=served.url, timeout=30, verify=False) as client:
        yield client
