"""The Celery task around the pure grade: begin a try, grade, write back, announce once.

| what happens                                     | the message                   | the trajectory                        |
|--------------------------------------------------|-------------------------------|---------------------------------------|
| graded now, graded before, or gone               | acknowledged                  | has its reward, announced once        |
| Redis away                                       | back to the queue             | waits                                 |
| an error, a value that is no reward              | back to the queue after `reward.retry_pause_s` | has one try less     |
| soft limit                                       | back to the queue             | has one try less                      |
| hard limit, process killed (out of memory, ...)  | back to the queue, by Celery  | has one try less                      |
| whole worker killed, machine gone                | to another, after the broker's visibility timeout | has one try less  |
| the last of `reward.max_tries` tries failed      | acknowledged                  | its group is buried, with the reason  |
| it cannot be read, or never be graded            | acknowledged                  | its group is buried at once           |
| to be buried while its group is still played     | acknowledged                  | the sweep asks again afterwards       |
| wrong arguments, another task, not a message     | an error line, then dropped   | the sweep asks again, if it was one   |
| Redis refuses a command (out of memory, ...)     | an error line, then dropped   | the sweep asks again                  |

A try is counted in Redis before it is made (grading_tries.py), so that what kills the grader is counted too.
"""

from __future__ import annotations

import logging
import time
from functools import cached_property

import msgspec
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded

from services.contract.config import Config
from services.contract.grading import GRADE_TASK
from services.contract.grading_tries import GradingTries, Try
from services.contract.groups import GroupStore
from services.contract.messages import Reward, Trajectory, decode_trajectory
from services.contract.store import RedisAway, connect
from services.reward.function import load_function
from services.reward.grade import Grade, grade
from services.reward.legacy import UngradableTrajectory
from services.reward.metrics import Failure, Metrics, Outcome
from services.reward.request import CountedRequest

logger = logging.getLogger("reward")

KILLED = "the grading process died or was killed at reward.time_limit_s"


class TryFailed(Exception):
    """There are tries left."""


class Grader:
    """Grades stored trajectories. Connects on first use, so that each process of the pool has a connection of its own.

    Raises ConfigError when `reward.function` cannot be used.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.function = load_function(config.reward.function) if config.reward.function else None

    @cached_property
    def store(self) -> GroupStore:
        # Give up well before the soft limit, so that the message goes back to the queue by our own hand.
        patience = min(self.config.redis.retry_s, self.config.reward.soft_time_limit_s / 2)
        return GroupStore(connect(self.config.redis.model_copy(update={"retry_s": patience})), self.config.run.name)

    @cached_property
    def tries(self) -> GradingTries:
        return GradingTries(self.store.client, self.config.run.name)

    def grade(self, trajectory_id: str) -> Outcome:
        """Grade and announce a trajectory; doing it twice changes nothing. Raises TryFailed and RedisAway."""
        attempt = self.tries.begin(trajectory_id, self.config.reward.max_tries)
        if isinstance(attempt, str):
            logger.debug("%s: %s, nothing to grade", trajectory_id, attempt)
            return attempt
        if attempt.number > self.config.reward.max_tries:
            return self._give_up(attempt, attempt.last_reason or KILLED)
        try:
            trajectory = decode_trajectory(attempt.body)
            result = self._grade(trajectory)
        except msgspec.DecodeError as error:
            return self._give_up(attempt, f"cannot be read: {error}", "unreadable")
        except UngradableTrajectory as error:
            return self._give_up(attempt, str(error), "ungradable")
        except SoftTimeLimitExceeded:
            reason = f"took longer than reward.soft_time_limit_s ({self.config.reward.soft_time_limit_s:g} s)"
            return self._try_again(attempt, reason, "soft_time_limit")
        except Exception as error:  # a reward function of one's own raises whatever it likes
            logger.debug("%s", trajectory_id, exc_info=True)
            return self._try_again(attempt, f"{type(error).__name__}: {error}", "error")
        if not self.store.grade(trajectory_id, attempt.body, Reward(*result)):
            return "graded_before"
        self.metrics.count_reward(trajectory.source, result.reward)
        logger.debug("%s: reward %g %s", trajectory_id, *result)
        return "graded"

    def _grade(self, trajectory: Trajectory) -> Grade:
        if not trajectory.golden_answers and self.function is None:
            logger.warning("%s has no golden answers: no answer can match", trajectory.id)
        return grade(trajectory, self.config.reward, self.function, self.config.rollout.layout)

    def _try_again(self, attempt: Try, reason: str, failure: Failure) -> Outcome:
        if attempt.number >= self.config.reward.max_tries:
            return self._give_up(attempt, reason, failure)
        self.metrics.count_failure(failure)
        self.tries.note(attempt, reason)
        if failure == "error":  # the soft limit may end the pause early: the message goes back to the queue all the same
            time.sleep(self.config.reward.retry_pause_s * 2 ** (attempt.number - 1))
        raise TryFailed(f"try {attempt.number} of {self.config.reward.max_tries} failed, {reason}")

    def _give_up(self, attempt: Try, reason: str, failure: Failure | None = None) -> Outcome:
        """Bury the group; while it is still being played, leave it and remember the reason."""
        if failure:
            self.metrics.count_failure(failure)
        tries = min(attempt.number, self.config.reward.max_tries)
        told = f"{attempt.trajectory_id} cannot be graded ({tries} of {self.config.reward.max_tries} tries): {reason}"
        if self.tries.bury(attempt, told, tries):
            logger.error("group %s given up: %s", attempt.group_id, told)
            self.store.announce(f"group {attempt.group_id} given up: {told}")
            return "buried"
        self.tries.note(attempt, reason)
        logger.error("%s; not buried now: its group is still being played, or it was graded meanwhile", told)
        return "left"


def register(app: Celery, config: Config, metrics: Metrics) -> None:
    """Give the app the task that rollout workers send. Raises ConfigError when `reward.function` cannot be used."""
    grader = Grader(config, metrics)

    def task(trajectory_id: str) -> None:
        started = time.monotonic()
        outcome: Outcome = "requeued"
        try:
            outcome = grader.grade(trajectory_id)
        except (RedisAway, SoftTimeLimitExceeded, TryFailed) as error:
            if isinstance(error, RedisAway):
                metrics.count_failure("redis_away")
            logger.warning("%s goes back to the queue: %s", trajectory_id, error or type(error).__name__)
            raise Reject(str(error), requeue=True) from None
        except Exception:
            outcome = "dropped"  # by Celery, with a traceback
            raise
        finally:
            metrics.count(outcome, time.monotonic() - started)

    app.task(task, name=GRADE_TASK, Request=CountedRequest, metrics=metrics)
