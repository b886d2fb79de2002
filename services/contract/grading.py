"""The Celery queue between rollout workers and graders: both sides build their app here, so that they agree."""

from __future__ import annotations

from celery import Celery

from services.contract.config import Config
from services.contract.store import broker_url

GRADE_TASK = "forage.grade"


def grading_queue(run: str) -> str:
    return f"forage.{run}.grade"


def grading_app(config: Config) -> Celery:
    """A Celery app on its own Redis database: JSON only, tasks acknowledged late and re-delivered when a worker dies.

    There is no result backend: the reward is written onto the trajectory.
    """
    app = Celery("forage", broker=broker_url(config))
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        task_soft_time_limit=config.reward.soft_time_limit_s,
        task_time_limit=config.reward.time_limit_s,
        task_default_queue=grading_queue(config.run.name),
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": max(60, 4 * int(config.reward.time_limit_s))},
        worker_hijack_root_logger=False,
    )
    return app


def send_for_grading(app: Celery, trajectory_id: str) -> None:
    """Ask for a trajectory to be graded; asking twice does no harm."""
    app.send_task(GRADE_TASK, args=[trajectory_id], retry=True)
