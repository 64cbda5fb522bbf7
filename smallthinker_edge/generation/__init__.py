"""One answer: the loop of decoding and sampling, what is reused, guessed or dropped on the way."""
