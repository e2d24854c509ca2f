"""What a language model is worth: perplexity over whole documents, and the text that it writes."""

from longshort.evaluation.generation import generate_text
from longshort.evaluation.perplexity import Evaluation, PositionLoss, evaluate_documents

__all__ = ["Evaluation", "PositionLoss", "evaluate_documents", "generate_text"]
