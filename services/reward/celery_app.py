"""The app for Celery's own tools, of the run that $FORAGE_CONFIG names: `celery -A services.reward.celery_app inspect ping`."""

from __future__ import annotations

import os

from services.contract.config import load_config
from services.contract.grading import grading_app

app = grading_app(load_config(os.environ.get("FORAGE_CONFIG")))
