"""Studies: experiments as one command each."""
