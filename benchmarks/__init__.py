"""Streams, runs, comparisons and studies."""
