from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from longshort.data import TokenFile, TokenFileWriter

WriteTokens = Callable[..., TokenFile]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Writes documents of given lengths (or ids) and opens the file; the ids are 0, 1, 2 … throughout it."""

    def write(documents: Sequence[int | Sequence[int]], vocab_size: int = 50_000) -> TokenFile:
        number = len(list(tmp_path.glob("*.bin")))
        path = tmp_path / f"tokens{number}"
        position = 0
        with TokenFileWriter(path, vocab_size, "hash", "source") as writer:
            for document in documents:
                ids = range(position, position + document) if isinstance(document, int) else document
                writer.add(np.array(ids, dtype=np.int64), text_bytes=3 * len(ids))
                position += len(ids)
        return TokenFile.open(path)

    return write
