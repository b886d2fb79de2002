"""From questions to batches: what is fed, collected and cut."""
