"""Lua scripts that put, peek and take one-time values. `broker.ephemeral.one_time` describes the
envelope that they read, and the terms that they compare.
"""

from __future__ import annotations

from broker.ephemeral.transport import Script

VERSION = b"\x02"  # not the first byte of any earlier format
TOLERANCE = 5000  # ms
TOMBSTONE = 600_000  # ms that a tombstone stays

# The server's term, nil unless it is the primary; and a value with a term. The last ARGV is the
# ledger's stamp instead of a term, '' without a ledger.
_STAMP = f"""
local known, read = ARGV[#ARGV], ARGV[#ARGV] ~= ''
local function term()
  if not read then
    local info = redis.call('INFO', 'replication')
    read, known = true, string.match(info, 'role:master\\r.-master_replid:({"%x" * 16})')
  end
  return known
end
local function stamped(value, term)
  return string.sub(value, 1, {len(VERSION)}) .. term .. string.sub(value, {len(VERSION)} + 1)
end
"""
READ_TERM = _STAMP + "return term() or ''"
# ARGV of every script but the puts: 1 now in ms, 2 grace in ms, 3 kinds, each between bars, 4
# opener, 5 digest. `judge` answers a verdict, the value and where its payload begins.
_JUDGE = (
    _STAMP
    + f"""
local function judge(key, kinds, opener, proof)
  local v = redis.call('GET', key)
  if not v then
    return 'unknown'
  end
  local stamp, kind, by, ends, state, at =
    string.match(v, '^{VERSION.decode()}(%x*)|([%w_]*)|([%w_]*)|(%d+)|([ls])|()')
  if not at or string.sub(v, at, at + #proof - 1) ~= proof then
    return 'unknown'
  elseif opener ~= '' and opener ~= by then
    return 'foreign'
  elseif state == 'l' and stamp ~= term() then
    return 'term_over'
  elseif kinds ~= '' and not string.find(kinds, '|' .. kind .. '|', 1, true) then
    return 'other_kind', v, at
  elseif state == 's' then
    return 'replayed', v, at, ends
  elseif ends + {TOLERANCE} <= tonumber(ARGV[1])
      or redis.call('PTTL', key) <= tonumber(ARGV[2]) then
    return 'expired'
  end
  return 'live', v, at, ends
end
"""
)
# ARGV: 6 what a tombstone puts before the content, or ''.
_SPEND = (
    _JUDGE
    + f"""
local function take(key)
  local verdict, v, at, ends = judge(key, ARGV[3], ARGV[4], ARGV[5])
  if verdict == 'other_kind' then
    return {{verdict}}
  elseif verdict == 'live' then
    redis.call('DEL', key)
    if ARGV[6] ~= '' then
      local tombstone = string.sub(v, 1, at - 3) .. 's|' .. ARGV[6] .. string.sub(v, at)
      redis.call('SET', key, tombstone, 'PX', {TOMBSTONE})
    end
  end
  return {{verdict, at and string.sub(v, at + #ARGV[5]), key, ends}}
end
"""
)

# KEYS: the value, groups. ARGV: 1 value, 2 life in ms, 3 now in ms, then of each group its limit,
# score and action. Answers `Counted`. SET is the first write: a full server refuses it, and would
# let later ones go on.
PUT = Script(
    _STAMP
    + """
local now, wait, members, ended = tonumber(ARGV[3]), 0, 0, 0
for i = 2, #KEYS do
  local limit = tonumber(ARGV[3 * i - 2])
  local count = redis.call('ZCOUNT', KEYS[i], '(' .. ARGV[3], '+inf')
  if (ARGV[3 * i] == 'refuse' or ARGV[3 * i] == 'cap') and count >= limit then
    local found = redis.call('ZRANGEBYSCORE', KEYS[i], '(' .. ARGV[3], '+inf', 'WITHSCORES',
      'LIMIT', count - limit, 1)
    wait = math.max(wait, tonumber(found[2]) - now)
  end
end
if wait > 0 then
  return {wait, 0, 0}
end
redis.call('SET', KEYS[1], stamped(ARGV[1], term() or ''), 'PX', ARGV[2])
for i = 2, #KEYS do
  local score, action = ARGV[3 * i - 1], ARGV[3 * i]
  local gone = redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', ARGV[3])
  local over = redis.call('ZCARD', KEYS[i])
  if i == 2 then
    members, ended = over + 1, gone
  end
  if action == 'evict' then
    over = over + 1 - tonumber(ARGV[3 * i - 2])
  end
  if (action == 'evict' or action == 'replace') and over > 0 then
    for _, key in ipairs(redis.call('ZRANGE', KEYS[i], 0, over - 1)) do
      redis.call('DEL', key)
    end
    redis.call('ZREMRANGEBYRANK', KEYS[i], 0, over - 1)
  end
  redis.call('ZADD', KEYS[i], score, KEYS[1])
  local life = score - now + (action == 'cap' and 600000 or 0)
  redis.call('PEXPIRE', KEYS[i], life, 'GT')
  redis.call('PEXPIRE', KEYS[i], life, 'NX')
end
return {0, members, ended}
"""
)

# KEYS: a value, the value to put beside it. ARGV: 6 the latter, 7 its life in ms, which ends with
# the former's.
PUT_BESIDE = Script(
    _JUDGE
    + """
local verdict, v, at = judge(KEYS[1], ARGV[3], ARGV[4], ARGV[5])
if verdict == 'live' then
  local life = math.min(ARGV[7], redis.call('PTTL', KEYS[1]))
  redis.call('SET', KEYS[2], stamped(ARGV[6], term()), 'PX', life)
end
return {verdict, at and string.sub(v, at)}
"""
)

# ARGV: 6 how many bytes stand before the msgpack.
PEEK = Script(
    _JUDGE
    + """
local verdict, v, at = judge(KEYS[1], ARGV[3], ARGV[4], ARGV[5])
return {verdict, at and string.sub(v, at + ARGV[6])}
"""
)

# KEYS: the value, and those to delete with it.
TAKE = Script(
    _SPEND
    + """
local reply = take(KEYS[1])
if reply[1] == 'live' and KEYS[2] then
  redis.call('DEL', KEYS[2])
end
return reply
"""
)

# KEYS: the value, the one that it was put beside and can't be taken without. The payload is the
# msgpack array of both. A full server refuses the SET, so it spends nothing that a finish, which
# must put a nonce, could not complete.
TAKE_BESIDE = Script(
    _JUDGE
    + """
local verdict, v, at, ends = judge(KEYS[1], ARGV[3], ARGV[4], ARGV[5])
if verdict ~= 'live' then
  return {verdict}
end
local beside, other, from = judge(KEYS[2], '', '', '')
if beside ~= 'live' then
  return {'unknown'}
end
redis.call('SET', KEYS[1], '', 'KEEPTTL')
redis.call('DEL', KEYS[1])
return {'live', '\\146' .. string.sub(v, at + #ARGV[5]) .. string.sub(other, from), KEYS[1], ends}
"""
)

# KEYS: the group, the values, of which the first that is there is taken.
TAKE_COUNTED = Script(
    _SPEND
    + """
local reply = {'unknown'}
for i = 2, #KEYS do
  reply = take(KEYS[i])
  if reply[1] ~= 'unknown' then
    redis.call('ZREM', KEYS[1], KEYS[i])
    break
  end
end
return reply
"""
)

# ARGV: 6 digest of the guess, which follows on the secret's. The msgpack is an array that begins
# with the guesses left, below 128. A guess is counted before it is compared, by a write: a server
# that refuses writes judges nothing.
GUESS = Script(
    _JUDGE
    + """
local verdict, v, at, ends = judge(KEYS[1], ARGV[3], ARGV[4], ARGV[5])
if verdict ~= 'live' then
  return {verdict}
end
local guess = at + #ARGV[5]
local content = guess + #ARGV[6]
local left = string.byte(v, content + 1) - 1
if left < 0 then
  return {'spent'}
end
v = string.sub(v, 1, content) .. string.char(left) .. string.sub(v, content + 2)
redis.call('SET', KEYS[1], v, 'KEEPTTL')
if string.sub(v, guess, content - 1) == ARGV[6] then
  redis.call('DEL', KEYS[1])
  return {'live', string.sub(v, content), KEYS[1], ends}
end
return {'wrong', string.sub(v, content)}
"""
)
