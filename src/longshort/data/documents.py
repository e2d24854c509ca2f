"""The borders of documents in a stream of tokens a b E c d E, with E the end-of-text token.

Training on separate documents, evaluation and generation all use this module, so that they agree on what the
first token of a document sees.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

DocumentStart = Literal["at-end-of-text", "after-end-of-text"]
"""The segment that an end-of-text token belongs to if documents are kept separate.

- "at-end-of-text": that of the next document: `[a b] [E c d] [E`. The first token of a document is predicted
  from E alone, as in evaluation and generation, which put an E before each document.
- "after-end-of-text": that of the document that it ends: `[a b E] [c d E]`. The first token of a document is
  predicted from the whole document before it. Only runs that earlier versions started train like this.
"""


def begins_with_end_of_text(document_start: DocumentStart) -> bool:
    """Return whether a document's segment begins with the end-of-text token before it.

    Raises:
        ValueError: `document_start` is neither of the two.
    """
    if document_start not in get_args(DocumentStart):
        raise ValueError(
            f"document_start must be one of {', '.join(get_args(DocumentStart))}, got {document_start!r}"
        )
    return document_start == "at-end-of-text"


def document_segments(
    document_offsets: NDArray[np.int64], positions: NDArray[np.int64], document_start: DocumentStart
) -> NDArray[np.int64]:
    """Return the number of the segment that each position of a token file is part of.

    Args:
        document_offsets: (documents + 1,), as in `TokenFile`.
        positions: any shape; -1 is the position of an end-of-text token before the first document.
        document_start: see `DocumentStart`.
    """
    ahead = 1 if begins_with_end_of_text(document_start) else 0  # an E is the token before an offset
    return np.searchsorted(document_offsets, positions + ahead, side="right")
