"""The Celery task around the pure grade: load, grade, write back, announce once.

| what happens                                   | the message                                                        |
|------------------------------------------------|--------------------------------------------------------------------|
| graded now, graded before, or gone             | acknowledged                                                       |
| Redis away, or the soft time limit passed      | put back at the end of the queue; nothing is lost                  |
| hard time limit, the process killed            | put back by Celery (late acknowledgement)                          |
| the whole worker killed, the machine gone      | delivered to another worker after the broker's visibility timeout  |
| the trajectory cannot be read, wrong arguments | one error line, then dropped: it would fail the same way for ever  |
"""

from __future__ import annotations

import logging
from functools import cached_property

import msgspec
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded

from services.contract.config import Config
from services.contract.grading import GRADE_TASK
from services.contract.groups import GroupStore
from services.contract.store import RedisAway, connect
from services.reward.grade import grade
from services.reward.health import NoticedRequest

logger = logging.getLogger("reward")


class Grader:
    """Grades stored trajectories. Connects on first use, so that each process of the pool has a connection of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def store(self) -> GroupStore:
        # Give up well before the soft limit, so that the message goes back to the queue by our own hand.
        patience = min(self.config.redis.retry_s, self.config.reward.soft_time_limit_s / 2)
        return GroupStore(connect(self.config.redis.model_copy(update={"retry_s": patience})), self.config.run.name)

    def grade(self, trajectory_id: str) -> bool:
        """Grade and announce a trajectory. False: there is nothing to do. Doing it twice changes nothing."""
        trajectory = self.store.load(trajectory_id)
        if trajectory is None or trajectory.reward is not None:
            logger.debug("%s: %s", trajectory_id, "gone, nothing to grade" if trajectory is None else "graded before")
            return False
        if not trajectory.golden_answers:
            logger.warning("%s has no golden answers: no answer can match", trajectory_id)
        result = grade(trajectory, self.config.reward)
        logger.debug("%s: reward %g %s", trajectory_id, result.reward, result.parts)
        return self.store.grade(trajectory, result.reward, result.parts)


def register(app: Celery, config: Config) -> None:
    """Give the app the task that rollout workers send."""
    grader = Grader(config)

    def task(trajectory_id: str) -> None:
        try:
            grader.grade(trajectory_id)
        except (RedisAway, SoftTimeLimitExceeded) as error:
            logger.warning("%s goes back to the queue: %s", trajectory_id, error or type(error).__name__)
            raise Reject(str(error), requeue=True) from None
        except msgspec.DecodeError as error:
            logger.error("%s cannot be read and stays ungraded: %s", trajectory_id, error)

    app.task(task, name=GRADE_TASK, Request=NoticedRequest)
