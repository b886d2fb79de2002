"""Scores on held-out questions: beside a run, or of any model alone."""
