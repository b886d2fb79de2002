"""The Celery queue between rollout workers and graders: both sides build their app here, so that they agree."""

from __future__ import annotations

import math

from celery import Celery

from services.contract.config import Config
from services.contract.store import broker_url

GRADE_TASK = "forage.grade"
RESTORE_EVERY_S = 2
"""How often a worker looks for messages whose worker has died."""
BROKER_SILENCE_S = 10
"""A broker that says nothing for so long is connected to anew; it answers even an idle worker every second."""


def grading_queue(run: str) -> str:
    return f"forage.{run}.grade"


def grading_app(config: Config) -> Celery:
    """A Celery app on its own Redis database: JSON only, tasks acknowledged late and re-delivered when a worker dies.

    There is no result backend: the reward is written onto the trajectory. Both senders and graders wait about
    `redis.retry_s` for a broker that is away.
    """
    app = Celery("forage", broker=broker_url(config))
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_acks_on_timeout=False,
        task_reject_on_worker_lost=True,
        task_publish_retry_policy={
            "max_retries": int(config.redis.retry_s),
            "interval_start": 0.2,
            "interval_step": 0.2,
            "interval_max": 1,
        },
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=60,
        worker_hijack_root_logger=False,
        task_soft_time_limit=config.reward.soft_time_limit_s,
        task_time_limit=config.reward.time_limit_s,
        task_default_queue=grading_queue(config.run.name),
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=_reconnections(config.redis.retry_s),
        broker_transport_options={
            # With a prefetch of one, a message is in hand no longer than one task may take.
            "visibility_timeout": math.ceil(2 * config.reward.time_limit_s),
            "unacked_restore_interval": RESTORE_EVERY_S,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 30,
            "socket_connect_timeout": 5,
            # A broker that falls silent without closing its connections (a machine that went, a network that drops everything)
            # would otherwise be waited for without end, in the middle of the event loop.
            "socket_timeout": BROKER_SILENCE_S,
            "health_check_interval": BROKER_SILENCE_S,
            "socket_keepalive": True,
        },
    )
    return app


def _reconnections(seconds: float) -> int:
    """How many of kombu's attempts, 2, 4, 6 … and then always 30 s apart, fill that many seconds."""
    attempts, waited = 0, 0.0
    while waited < seconds:
        attempts += 1
        waited += min(2 * attempts, 30)
    return attempts


def send_for_grading(app: Celery, *trajectory_ids: str) -> None:
    """Ask for trajectories to be graded, each by a task of its own; asking twice does no harm."""
    with app.producer_pool.acquire(block=True) as producer:
        for trajectory_id in trajectory_ids:
            app.send_task(GRADE_TASK, args=[trajectory_id], retry=True, producer=producer)
