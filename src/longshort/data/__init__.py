"""Text corpora, tokenizers, token files and batches."""

from longshort.extras import require

require("longshort.data", "numpy", "tokenizers", "transformers")

from longshort.data.batches import Batch, Batches, TokenOrder, copying_windows, validation_windows
from longshort.data.corpora import open_corpus
from longshort.data.corpus import Corpus, Document, Skipped
from longshort.data.documents import DocumentStart, begins_with_end_of_text, document_segments
from longshort.data.prepare import Prepared, PreparedSplit, Progress, prepare
from longshort.data.token_files import DataFolder, TokenFile, TokenFileWriter
from longshort.data.tokenization import byte_tokenizer, load_tokenizer, tokenizer_hash, train_bpe
from longshort.data.workspace import interrupted_work

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataFolder",
    "Document",
    "DocumentStart",
    "Prepared",
    "PreparedSplit",
    "Progress",
    "Skipped",
    "TokenFile",
    "TokenFileWriter",
    "TokenOrder",
    "begins_with_end_of_text",
    "byte_tokenizer",
    "copying_windows",
    "document_segments",
    "interrupted_work",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "tokenizer_hash",
    "train_bpe",
    "validation_windows",
]
