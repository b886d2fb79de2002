"""Grades trajectories: a Celery worker that writes a reward onto each stored trajectory and announces it to the trainer once."""
