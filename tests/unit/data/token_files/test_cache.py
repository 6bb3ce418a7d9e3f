"""A cache that cannot be written leaves a message, not a killed process or a torn file."""

from __future__ import annotations

import os
import resource
from typing import Any

import numpy as np
import pytest

from evomesh.data.token_files.cache import cache_path, write_cache
from evomesh.errors import UserError


def test_a_cache_that_does_not_fit_is_refused_and_removed(write_bin: Any) -> None:
    documents = [[n, -n, 5] * 20 for n in range(1, 2000)]
    path = write_bin(documents)
    before = sorted(os.listdir(path.parent))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write: File too large") as caught:
            write_cache(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in caught.value.fix
    assert sorted(os.listdir(path.parent)) == before
    write_cache(path)
    cached = np.load(cache_path(path))
    assert cached.dtype == np.int32
    assert cached.tolist() == [token for document in documents for token in document]
