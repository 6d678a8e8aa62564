"""What searching, training and growing cost beside their peers; ``nnheads bench``."""
