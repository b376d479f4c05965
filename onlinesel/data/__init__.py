"""Rows on their way to a step: read, numbered, ordered, batched, padded."""
