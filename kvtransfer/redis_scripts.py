"""The scripts that change the directory in Redis; its layout is told in redis_layout.py.

KEYS[1] is a shard's prefix. Each script takes at most a few milliseconds, because Redis does nothing else meanwhile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str


def _script(body: str) -> Script:
    text = _COMMON + body
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# Names are made inside the scripts; all of them lie in the slot of KEYS[1], which a Redis Cluster goes by.
_COMMON = """
local p = KEYS[1]
local entries = p .. 'entries'
local call, sub, find = redis.call, string.sub, string.find
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function bury(number, buckets)
  local worker = call('HGET', p .. 'owner', number)
  if worker and call('HGET', p .. 'node:' .. worker, 'number') == number then
    call('DEL', p .. 'node:' .. worker)
  end
  call('HDEL', entries, 'announced:' .. number)
  call('HDEL', p .. 'owner', number)
  call('HDEL', p .. 'record', number)
  call('ZREM', p .. 'live', number)
  call('HSET', p .. 'dead', number, buckets)
end

local function alive(number)
  local ends = number and call('ZSCORE', p .. 'live', number)
  return ends and tonumber(ends) > now
end
"""

JOIN = _script("""
local worker, epoch, address, record, ttl, acked, buckets = unpack(ARGV)
for _, number in ipairs(call('ZRANGEBYSCORE', p .. 'live', '-inf', now, 'LIMIT', 0, 64)) do bury(number, buckets) end
local node = p .. 'node:' .. worker
local known = call('HMGET', node, 'epoch', 'number', 'address')
local number, status = known[2], 'known'
if number and not alive(number) then
  bury(number, buckets)
  number = false
end
if number then
  if known[1] > epoch then return {'stale', known[1], 0} end
  if known[1] == epoch and known[3] ~= address then return {'taken', known[3], 0} end
  local announced = call('HGET', entries, 'announced:' .. number)
  if known[1] ~= epoch or not announced or tonumber(announced) < tonumber(acked) then
    bury(number, buckets)
    number = false
  end
end
if not number then
  status = 'new'
  number = tostring(call('INCR', p .. 'number'))
  call('DEL', node)
  call('HSET', node, 'epoch', epoch, 'number', number, 'address', address)
  call('HSET', entries, 'announced:' .. number, 0, 'about', 'who probably holds which block of KV' .. string.rep('.', 999))
  call('HSET', p .. 'owner', number, worker)
end
call('HSET', p .. 'record', number, record)
call('ZADD', p .. 'live', now + ttl, number)
-- Who ends later than anybody may was there before the clock went back; the dead among them shall not live on for hours.
local longest = math.max(tonumber(call('GET', p .. 'longest') or '0'), tonumber(ttl))
call('SET', p .. 'longest', longest)
for _, late in ipairs(call('ZRANGEBYSCORE', p .. 'live', '(' .. now + longest, '+inf', 'LIMIT', 0, 64)) do
  call('ZADD', p .. 'live', now + longest, late)
end
return {status, '', call('HLEN', p .. 'dead')}
""")

LEAVE = _script("""
local worker, epoch, buckets = unpack(ARGV)
local known = call('HMGET', p .. 'node:' .. worker, 'epoch', 'number')
if known[2] and known[1] == epoch then bury(known[2], buckets) end
return call('HLEN', p .. 'dead')
""")

# ARGV: worker, epoch, and nine bytes per key of: added to DRAM, to disk, removed from DRAM, from disk. Buckets are read and
# written many at a time, because a call from a script costs more than what it does.
ANNOUNCE = _script("""
local node = p .. 'node:' .. ARGV[1]
local known = call('HMGET', node, 'epoch', 'number')
if known[1] ~= ARGV[2] or not alive(known[2]) then return -1 end
local announced = call('HINCRBY', entries, 'announced:' .. known[2], 1)

local function position(bucket, record)
  local at = bucket ~= '' and find(bucket, record, 1, true)
  while at and at % 10 ~= 1 do at = find(bucket, record, at + 1, true) end
  return at
end

local function change(keys, word, added)
  for first = 1, #keys, 4608 do
    local last = math.min(first + 4607, #keys)
    local names, place, count = {}, {}, 0
    for i = first, last, 9 do
      local bucket = sub(keys, i, i + 2)
      if not place[bucket] then
        count = count + 1
        names[count], place[bucket] = bucket, count
      end
    end
    local buckets, changed = call('HMGET', entries, unpack(names)), {}
    for i = first, last, 9 do
      local n = place[sub(keys, i, i + 2)]
      local bucket, record = buckets[n] or '', sub(keys, i + 3, i + 8) .. word
      local at = position(bucket, record)
      if added and not at and #bucket < 16000 then
        buckets[n], changed[n] = bucket .. record, true
      elseif not added and at then
        buckets[n], changed[n] = sub(bucket, 1, at - 1) .. sub(bucket, at + 10), true
      end
    end
    local kept, emptied = {}, {}
    for n in pairs(changed) do
      if buckets[n] == '' then
        emptied[#emptied + 1] = names[n]
      else
        kept[#kept + 1] = names[n]
        kept[#kept + 1] = buckets[n]
      end
    end
    if #kept > 0 then call('HSET', entries, unpack(kept)) end
    if #emptied > 0 then call('HDEL', entries, unpack(emptied)) end
  end
end

for tier = 0, 1 do change(ARGV[5 + tier], struct.pack('>I4', known[2] * 2 + tier), false) end
for tier = 0, 1 do change(ARGV[3 + tier], struct.pack('>I4', known[2] * 2 + tier), true) end
return announced
""")

# ARGV: node numbers. The record of each that is alive, else nothing.
RECORDS = _script("""
local found = {}
for i, number in ipairs(ARGV) do found[i] = alive(number) and call('HGET', p .. 'record', number) or '' end
return found
""")

NODES = _script("""
local numbers = call('ZRANGEBYSCORE', p .. 'live', '(' .. now, '+inf', 'LIMIT', 0, 4000)
if #numbers == 0 then return {} end
return call('HMGET', p .. 'record', unpack(numbers))
""")

# ARGV: how many buckets to look at, how many there are. Returns how many dead nodes are left to be swept out.
SWEEP = _script("""
local count, buckets = tonumber(ARGV[1]), tonumber(ARGV[2])
local dead, left = {}, call('HGETALL', p .. 'dead')
if #left == 0 then return 0 end
for i = 1, #left, 2 do
  for tier = 0, 1 do dead[struct.pack('>I4', left[i] * 2 + tier)] = true end
end
local cursor = tonumber(call('GET', p .. 'cursor') or '0')
local names = {}
for n = cursor, cursor + count - 1 do
  local b = n % buckets
  names[#names + 1] = string.char(b % 256, math.floor(b / 256) % 256, math.floor(b / 65536))
end
for n, bucket in ipairs(call('HMGET', entries, unpack(names))) do
  if bucket then
    local kept = {}
    for i = 1, #bucket, 10 do
      if not dead[sub(bucket, i + 6, i + 9)] then kept[#kept + 1] = sub(bucket, i, i + 9) end
    end
    if #kept == 0 then call('HDEL', entries, names[n])
    elseif #kept * 10 < #bucket then call('HSET', entries, names[n], table.concat(kept)) end
  end
end
call('SET', p .. 'cursor', (cursor + count) % buckets)
for i = 1, #left, 2 do
  if tonumber(left[i + 1]) <= count then call('HDEL', p .. 'dead', left[i])
  else call('HINCRBY', p .. 'dead', left[i], -count) end
end
return call('HLEN', p .. 'dead')
""")

# Writes and reads as the others do, and leaves nothing behind.
CHECK = _script("""
call('HSET', p .. 'check', 'now', now)
call('HMGET', p .. 'check', 'now')
return call('DEL', p .. 'check')
""")
