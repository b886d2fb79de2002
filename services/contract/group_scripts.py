"""The moves of a group as Lua scripts: each checks before it acts, in one step, so that it may be sent twice. See groups.py."""

# KEYS: states, prompts, counters. ARGV: group id, body.
FEED = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
local id = redis.call('XADD', KEYS[2], '*', 'body', ARGV[2])
redis.call('HSET', KEYS[1], ARGV[1], 'fed ' .. id)
redis.call('HINCRBY', KEYS[3], 'fed', 1)
return 1
"""

# Whether a pending entry is this worker's. Another worker may have claimed it, or Redis may have lost the stream.
_HOLDS = """
local function holds(prompts, consumers, id, worker)
  local reply = redis.pcall('XPENDING', prompts, consumers, id, id, 1)
  return not reply.err and reply[1] and reply[1][2] == worker
end
local function take_off(prompts, consumers, id, worker)
  if not holds(prompts, consumers, id, worker) then return false end
  redis.call('XACK', prompts, consumers, id)
  redis.call('XDEL', prompts, id)
  return true
end
"""

# KEYS: prompts. ARGV: consumer group, worker, entry ids... Returns those that are still the worker's.
REFRESH = (
    _HOLDS
    + """
local held = {}
for i = 3, #ARGV do
  if holds(KEYS[1], ARGV[1], ARGV[i], ARGV[2]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    table.insert(held, ARGV[i])
  end
end
return held
"""
)

# KEYS: states, trajectories... ARGV: for each its body, its group id and the state that the group must be in ('' for any).
# A trajectory that came after its group was released, buried or handed on would never be deleted by anyone.
STORE = """
local stored = {}
for i = 2, #KEYS do
  local body, group, state = ARGV[3 * i - 5], ARGV[3 * i - 4], ARGV[3 * i - 3]
  local played = state == '' or redis.call('HGET', KEYS[1], group) == state
  table.insert(stored, played and redis.call('SET', KEYS[i], body, 'NX') and 1 or 0)
end
return stored
"""

# KEYS: prompts, states. ARGV: consumer group, entry id, worker, new body, group id. Only the holder of an entry may move it.
REQUEUE = (
    _HOLDS
    + """
if not take_off(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
local id = redis.call('XADD', KEYS[1], '*', 'body', ARGV[4])
redis.call('HSET', KEYS[2], ARGV[5], 'fed ' .. id)
return 1
"""
)

# KEYS: prompts, states. ARGV: consumer group, entry id, worker, group id, samples.  The time is noted for those who watch.
FINISH = (
    _HOLDS
    + """
if not take_off(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[4], 'finished ' .. ARGV[5] .. ' ' .. redis.call('TIME')[1])
return 1
"""
)

# KEYS: prompts, states, dead, counters, graded_samples, trajectories and rewards...
# ARGV: consumer group, entry id, worker, group id, letter.
DIE = (
    _HOLDS
    + """
if not take_off(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end
redis.call('HDEL', KEYS[2], ARGV[4])
redis.call('HDEL', KEYS[5], ARGV[4])
redis.call('XADD', KEYS[3], '*', 'body', ARGV[5])
redis.call('HINCRBY', KEYS[4], 'dead', 1)
for i = 6, #KEYS do redis.call('DEL', KEYS[i]) end
return 1
"""
)

# KEYS: trajectory, its reward, graded, graded_samples, its grading. ARGV: SHA-1 of the body that was graded, reward, notice,
# group id. Another body stands there when the group was released and fed once more under the same name.
GRADE = """
local body = redis.call('GET', KEYS[1])
if not body or redis.sha1hex(body) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('XADD', KEYS[3], '*', 'body', ARGV[3])
redis.call('HINCRBY', KEYS[4], ARGV[4], 1)
redis.call('DEL', KEYS[5])
return 1
"""

# All samples may be stored and graded before the worker gets to `finish`: then its lease is ended here.
_END_LEASE = """
local function end_lease(states, prompts, consumers, group)
  local id = string.match(redis.call('HGET', states, group) or '', '^fed (.+)$')
  if id then
    redis.call('XACK', prompts, consumers, id)
    redis.call('XDEL', prompts, id)
  end
end
"""

# KEYS: states, prompts. ARGV: consumer group of prompts, group id.
COLLECT = (
    _END_LEASE
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
end_lease(KEYS[1], KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[1], ARGV[2], 'collected')
return 1
"""
)

# KEYS: states, counters, graded, graded_samples, prompts, trajectories and rewards...
# ARGV: consumer group of graded, group id, consumer group of prompts, graded entry ids...
RELEASE = (
    _END_LEASE
    + """
for i = 4, #ARGV do
  redis.call('XACK', KEYS[3], ARGV[1], ARGV[i])
  redis.call('XDEL', KEYS[3], ARGV[i])
end
for i = 6, #KEYS do redis.call('DEL', KEYS[i]) end
end_lease(KEYS[1], KEYS[5], ARGV[3], ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[2])
if redis.call('HDEL', KEYS[1], ARGV[2]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'released', 1)
return 1
"""
)

# KEYS: states, prompts, counters, graded_samples. ARGV: rollout consumer group. One instant's picture of all groups.
ACCOUNTS = """
local out = {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local graded = redis.call('HGET', KEYS[4], flat[i]) or '0'
  table.insert(out, flat[i]); table.insert(out, flat[i + 1]); table.insert(out, graded)
end
local pending = redis.call('XPENDING', KEYS[2], ARGV[1])[1]
local counters = {}
for _, name in ipairs({'fed', 'dead', 'released'}) do
  table.insert(counters, redis.call('HGET', KEYS[3], name) or '0')
end
return {out, pending, redis.call('XLEN', KEYS[2]), counters}
"""
