"""Commands of the nnheads program."""
