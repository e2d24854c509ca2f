"""Studies: experiments as one command each."""

from longshort.extras import require

require(
    "longshort.studies",
    *("annotated-types", "jinja2", "matplotlib", "numpy", "scipy", "tokenizers", "transformers"),
)
