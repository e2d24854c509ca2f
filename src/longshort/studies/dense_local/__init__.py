"""The study `dense-local` (figure 2): queries and keys fitted to a dense band, without a language model."""
