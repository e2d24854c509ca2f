"""The split of a corpus into training and validation, a function of the seed and each document's name."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from longshort.data.corpus import Document


class Splitter:
    """Assigns documents, in order, to "train" or "validation".

    A document is used for validation if its hash, in [0, 1), is below the fraction. Until both splits have a
    document, the one whose hash is nearest to the empty split is held back, so that at the end neither is
    empty. Nothing else changes the order.

    Args:
        validation_fraction: between 0 and 1.
        seed: an integer.
        state: `state` of another one, to go on where it stood.
    """

    def __init__(self, validation_fraction: float, seed: int, state: dict[str, Any] | None = None) -> None:
        self._fraction = validation_fraction
        self._seed = seed
        self._filled: set[str] = set(state["filled"]) if state else set()
        self._held = Document(**state["held"]) if state and state["held"] else None
        self.documents: int = state["documents"] if state else 0

    @property
    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        held = asdict(self._held) if self._held is not None else None
        return {"filled": sorted(self._filled), "held": held, "documents": self.documents}

    def add(self, document: Document) -> list[tuple[Document, str]]:
        """Take the next document; return the documents that are assigned now, with their splits' names."""
        self.documents += 1
        split = self._split(document)
        self._filled.add(split)
        if len(self._filled) == 2:
            held, self._held = self._held, None
            return ([(held, self._split(held))] if held is not None else []) + [(document, split)]
        if self._held is None:
            self._held = document
            return []
        # All so far fell into one split; the held one is nearest to the other.
        here, there = self._hash(document), self._hash(self._held)
        if here < there if split == "train" else here > there:
            document, self._held = self._held, document
        return [(document, split)]

    def finish(self) -> list[tuple[Document, str]]:
        """Return the document that is still held back, in the split that would be empty without it."""
        held, self._held = self._held, None
        if held is None:
            return []
        return [(held, "validation" if self._split(held) == "train" else "train")]

    def _split(self, document: Document) -> str:
        return "validation" if self._hash(document) < self._fraction else "train"

    def _hash(self, document: Document) -> float:
        text = f"{self._seed}:{document.name}".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53
