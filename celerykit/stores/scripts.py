"""
What runs inside Redis or Valkey: scripts, each atomic and with a single key.

They ask the server for the time, so that the clocks of workers do not
matter, and count in microseconds: milliseconds would let a slot end early.
"""

from __future__ import annotations

__all__ = ["ADD", "MARK", "READ", "RENEW", "SUBTRACT", "SWAP", "TAKE"]

ADD = """
local count = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return count
"""

SUBTRACT = """
local count = tonumber(redis.call('GET', KEYS[1]) or 0)
if count > 1 then redis.call('DECR', KEYS[1]) else redis.call('DEL', KEYS[1]) end
"""

#: `SET … NX GET` in one command needs Redis 7.
MARK = """
local before = redis.call('GET', KEYS[1])
if not before then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return before
"""

_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
-- Lua itself would write so large a number with an exponent.
local function whole(number) return string.format('%.0f', number) end
"""

#: Answers nothing, or version, data, and the rest of the lease if there is one.
READ = f"""{_CLOCK}
local found = redis.call('HMGET', KEYS[1], 'version', 'data', 'lease')
if not found[1] then return false end
return {{found[1], found[2], found[3] and whole(found[3] - now) or nil}}
"""

#: Takes what must be there ('nothing', 'version' or 'lapsed') and which version; then, unless it shall be
#: forgotten, the new version, data, ttl in milliseconds, and lease or ''. Answers 1, or as READ does.
SWAP = f"""{_CLOCK}
local found = redis.call('HMGET', KEYS[1], 'version', 'lease')
local version, ends = found[1], tonumber(found[2])
local fits
if ARGV[1] == 'nothing' then
    fits = not version
else
    fits = version == ARGV[2] and (ARGV[1] == 'version' or not ends or ends <= now)
end
if not fits then
    if not version then return false end
    return {{version, redis.call('HGET', KEYS[1], 'data'), ends and whole(ends - now) or nil}}
end
redis.call('DEL', KEYS[1])
if ARGV[3] then
    redis.call('HSET', KEYS[1], 'version', ARGV[3], 'data', ARGV[4])
    if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'lease', whole(now + ARGV[6])) end
    redis.call('PEXPIRE', KEYS[1], ARGV[5])
end
return 1
"""

#: Takes version, lease, and ttl in milliseconds.
RENEW = f"""{_CLOCK}
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'lease', whole(now + ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

#: A sorted set: each holder, and when its slot ends. Takes holder, limit and ttl. Answers 0, or how long to wait.
TAKE = f"""{_CLOCK}
local limit = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', whole(now))
local taken = redis.call('ZCARD', KEYS[1])
if taken >= limit and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    -- More than the limit when that was higher before.
    local next = redis.call('ZRANGE', KEYS[1], taken - limit, taken - limit, 'WITHSCORES')
    return whole(next[2] - now)
end
redis.call('ZADD', KEYS[1], whole(now + ARGV[3]), ARGV[1])
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')
redis.call('PEXPIREAT', KEYS[1], whole(math.ceil(last[2] / 1000)))
return '0'
"""
