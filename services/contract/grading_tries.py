"""How often a trajectory's grading was begun, so that one that can never be graded does not come back for ever.

| a try ends with                              | the count      | what the grader does                                        |
|----------------------------------------------|----------------|-------------------------------------------------------------|
| a grade (`GroupStore.grade`)                 | is forgotten   |                                                             |
| an error or the soft time limit              | stays          | notes the reason; tries again, or after the last try buries |
| the death of its process                     | stays          | the next delivery begins another try, or buries             |

`bury` takes the whole group to `dead`: one of its samples will never have a reward, and the trainer must not wait for it.
Like the moves of groups.py, each is one script that checks before it acts, so that it may be sent twice.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import redis

from services.contract.messages import DeadLetter, encode
from services.contract.store import Keys

KEPT_S = 24 * 3600
"""How long tries are remembered after the last one."""

# KEYS: trajectory, its reward, its grading. ARGV: most tries, seconds to remember them. A try is counted before it is made, so that
# one that kills its process counts too.
_BEGIN = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 'graded_before' end
local body = redis.call('GET', KEYS[1])
if not body then
  redis.call('DEL', KEYS[3])
  return 'gone'
end
local tries = tonumber(redis.call('HGET', KEYS[3], 'tries') or '0') + 1
local reason = redis.call('HGET', KEYS[3], 'reason') or ''
if tries <= tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[3], 'tries', tries, 'reason', '')
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
return {body, tries, reason}
"""

# KEYS: trajectory's grading. ARGV: reason.
_NOTE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'reason', ARGV[1])
return 1
"""

# KEYS: states, dead, counters, graded_samples, the ungradable trajectory, its reward, all of the group with rewards and gradings...
# ARGV: group id, its state, body of the ungradable trajectory, letter. Graded meanwhile, released or buried: nothing happens.
_BURY = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] or redis.call('GET', KEYS[5]) ~= ARGV[3] then return 0 end
if redis.call('EXISTS', KEYS[6]) == 1 then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('XADD', KEYS[2], '*', 'body', ARGV[4])
redis.call('HINCRBY', KEYS[3], 'dead', 1)
redis.call('HDEL', KEYS[4], ARGV[1])
for i = 5, #KEYS do redis.call('DEL', KEYS[i]) end
return 1
"""


class Try(msgspec.Struct, frozen=True):
    """A try to grade one trajectory. `number` counts from 1; one above the most allowed is not counted and not to be made."""

    trajectory_id: str
    body: bytes
    number: int
    last_reason: str
    """Why the try before this one failed; empty if it left no word."""

    @property
    def group_id(self) -> str:
        return self.trajectory_id.rpartition("/")[0]


class GradingTries:
    """Safe to use from many processes; every method may be repeated."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.keys = Keys(run)
        self._begin, self._note, self._bury = map(client.register_script, (_BEGIN, _NOTE, _BURY))

    def begin(self, trajectory_id: str, max_tries: int) -> Try | Literal["gone", "graded_before"]:
        """Count a try and get the trajectory's body. `gone`: it was released or never stored."""
        keys = self.keys
        names = [keys.trajectory(trajectory_id), keys.reward(trajectory_id), keys.grading(trajectory_id)]
        found = self._begin(names, [max_tries, KEPT_S])
        if isinstance(found, bytes):
            return "gone" if found == b"gone" else "graded_before"
        return Try(trajectory_id, found[0], found[1], found[2].decode(errors="replace"))

    def note(self, failed: Try, reason: str) -> None:
        """Remember why it failed, for whoever buries the group in the end."""
        self._note([self.keys.grading(failed.trajectory_id)], [reason])

    def bury(self, failed: Try, reason: str, tries: int) -> bool:
        """Move the trajectory's group to `dead`; what it had stored is deleted.

        False: the group is still being played, or the trajectory was graded, released or buried meanwhile.
        """
        keys, group_id = self.keys, failed.group_id
        state = self.client.hget(keys.states, group_id) or b""
        if not state.startswith(b"finished"):
            return False
        ids = [f"{group_id}/{sample}" for sample in range(int(state.split()[1]))]
        names = [keys.states, keys.dead, keys.counters, keys.graded_samples]
        names += [name(failed.trajectory_id) for name in (keys.trajectory, keys.reward)]
        names += [name(i) for i in ids for name in (keys.trajectory, keys.reward, keys.grading)]
        letter = encode(DeadLetter(group_id, None, reason, tries))
        return bool(self._bury(names, [group_id, state, failed.body, letter]))
