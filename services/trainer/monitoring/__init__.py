"""What people see of a run: figures, curves, warnings, transcripts."""
