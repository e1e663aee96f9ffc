"""Verifiers: did a response give the right answer? They never crash on model output and score it 0."""
