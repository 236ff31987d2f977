-- Who calls, and whether they may: runs inside Envoy before every other look at a call, once keys are set.
--   * the key of `authorization: Bearer KEY` is looked up by its SHA-256; no key is known here
--   * the names of the key and of its role become metadata, for the rate limit and the access log
--   * the key goes no further, but for the administrative methods, where the service looks at it again
--   * a call that it lets in is marked as admitted; without the mark, the next filter refuses. Envoy passes a call on when a
--     script fails, and a failure here must not open the door
-- admission.py puts the tables KEYS (hash -> name, role), ADMIN_METHODS, OPEN and ROUNDS before this text.

local bit = require("bit")
local band, bnot, bor, bxor, ror = bit.band, bit.bnot, bit.bor, bit.bxor, bit.ror
local lshift, rshift, tobit, tohex = bit.lshift, bit.rshift, bit.tobit, bit.tohex
local byte, char, rep = string.byte, string.char, string.rep

local SPACE = "usagi.keys"
local MAX_KEY = 128
local words = {}
local seen = {}  -- keys that were known once, with what they are: as many as there are keys

-- The 64 words of one block of SHA-256 (FIPS 180-4, 6.2.2).
local function expand(text, at)
  for i = 0, 15 do
    local a, b, c, d = byte(text, at + 4 * i, at + 4 * i + 3)
    words[i] = bor(lshift(a, 24), lshift(b, 16), lshift(c, 8), d)
  end
  for i = 16, 63 do
    local x, y = words[i - 15], words[i - 2]
    local small = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
    local large = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
    words[i] = tobit(words[i - 16] + small + words[i - 7] + large)
  end
end

-- SHA-256 in hex.
local function sha256(text)
  local bits = #text * 8
  local padded = text .. "\128" .. rep("\0", (55 - #text) % 64) .. rep("\0", 6) .. char(rshift(bits, 8), band(bits, 255))
  local s0, s1, s2, s3 = 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a
  local s4, s5, s6, s7 = 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19
  for at = 1, #padded, 64 do
    expand(padded, at)
    local a, b, c, d, e, f, g, h = s0, s1, s2, s3, s4, s5, s6, s7
    for i = 0, 63 do
      local large = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
      local first = h + large + bxor(band(e, f), band(bnot(e), g)) + ROUNDS[i + 1] + words[i]
      local small = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
      local second = small + bxor(band(a, b), band(a, c), band(b, c))
      h, g, f, e, d, c, b, a = g, f, e, tobit(d + first), c, b, a, tobit(first + second)
    end
    s0, s1, s2, s3 = tobit(s0 + a), tobit(s1 + b), tobit(s2 + c), tobit(s3 + d)
    s4, s5, s6, s7 = tobit(s4 + e), tobit(s5 + f), tobit(s6 + g), tobit(s7 + h)
  end
  return tohex(s0) .. tohex(s1) .. tohex(s2) .. tohex(s3) .. tohex(s4) .. tohex(s5) .. tohex(s6) .. tohex(s7)
end

-- The key of the header, or nil. More than one header, or a key of another length than any, is none.
local function presented(headers)
  local value = headers:get("authorization")
  if not value or headers:getNumValues("authorization") ~= 1 then return nil end
  local key = string.match(value, "^[Bb][Ee][Aa][Rr][Ee][Rr] (%S+)$")
  if key and #key <= MAX_KEY then return key end
  return nil
end

local function refuse(handle, status, reason)
  handle:streamInfo():dynamicMetadata():set(SPACE, "refused", reason)
  handle:respond({ [":status"] = status, ["www-authenticate"] = "Bearer" }, "")
end

local function admit(handle)
  handle:streamInfo():dynamicMetadata():set(SPACE, "admitted", "yes")
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = string.match(headers:get(":path") or "", "^[^?#]*")
  local key = presented(headers)
  headers:remove("authorization")
  if string.find(path, OPEN, 1, true) == 1 then return admit(handle) end
  if not key then return refuse(handle, "401", "KEY_MISSING") end
  local known = seen[key]
  if not known then
    known = KEYS[sha256(key)]
    if known then seen[key] = known end
  end
  if not known then return refuse(handle, "401", "KEY_UNKNOWN") end
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set(SPACE, "name", known.name)
  -- gRPC's paths have no escapes: one that has some is another spelling, and no role is looked up by spelling
  local admin = ADMIN_METHODS[path] or string.find(path, "%", 1, true)
  if admin then
    if known.role ~= "admin" then return refuse(handle, "403", "ADMIN_ONLY") end
    headers:add("authorization", "Bearer " .. key)
  end
  admit(handle)
end
