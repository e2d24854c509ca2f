"""Evaluation of language models: perplexity over whole documents, retrieval of needles, generated text."""

from longshort.extras import require

require("longshort.evaluation", "numpy", "tokenizers", "transformers")

from longshort.evaluation.attention_logits import measure_logits
from longshort.evaluation.generation import GeneratedText, GenerationStatistics, generate_text
from longshort.evaluation.needle import NeedleCell, NeedleResult, measure_needle
from longshort.evaluation.perplexity import Evaluation, PositionLoss, evaluate_documents

__all__ = [
    "Evaluation",
    "GeneratedText",
    "GenerationStatistics",
    "NeedleCell",
    "NeedleResult",
    "PositionLoss",
    "evaluate_documents",
    "generate_text",
    "measure_logits",
    "measure_needle",
]
