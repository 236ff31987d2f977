-- Runs inside Envoy, for what its own filters leave undone:
--   * a JSON body with a field that the method's message does not have is refused; the transcoder would drop the field
--   * a JSON call by another spelling of a method's path is refused; the transcoder would take one with a slash at the
--     end, which no rule by path knows
--   * a compressed gRPC message is refused: no limit holds for what it becomes (ADR 7)
--   * a service's bare "message larger than max" gets the details that the gateway's own refusal has; which of the two
--     sees the size first is a race
-- Only JSON bodies are read. Broken JSON passes, since the transcoder says better what is wrong with it.
-- strict.py puts the tables METHODS, MESSAGES, TOO_LARGE_MESSAGE and TOO_LARGE_DETAILS before this text.

local MAX_DEPTH = 64
local BACKSLASH = 92
local walk_value

-- Position after the string that opens at `at`; nil if it never ends. Finds quotes, so that 16 MiB of base64 cost little.
local function after_string(text, at)
  while true do
    local quote = string.find(text, '"', at + 1, true)
    if not quote then return nil end
    local before = quote - 1
    while string.byte(text, before) == BACKSLASH do before = before - 1 end
    if (quote - before) % 2 == 1 then return quote + 1 end
    at = quote
  end
end

-- Position and text of the next character that is no white space.
local function next_sign(text, at)
  return string.find(text, "([^ \t\r\n])", at)
end

local function kind_of(fields, key, path)
  if not fields then return nil end
  if fields["*"] then return fields["*"] end  -- a map: any key, one kind of value
  if fields[key] == nil then error({ unknown = path .. key }, 0) end
  return fields[key]
end

-- `at` is behind the opening brace; returns the position behind the closing one, or nil.
local function walk_object(text, at, message, path, depth)
  local fields = MESSAGES[message]
  while true do
    local place, _, sign = next_sign(text, at)
    if sign == "}" then return place + 1 end
    if sign == "," then place, _, sign = next_sign(text, place + 1) end
    if sign ~= '"' then return nil end
    local after = after_string(text, place)
    if not after then return nil end
    local key = string.sub(text, place + 1, after - 2)
    local colon, _, found = next_sign(text, after)
    if found ~= ":" then return nil end
    at = walk_value(text, colon + 1, kind_of(fields, key, path), path .. key .. ".", depth + 1)
    if not at then return nil end
  end
end

local function walk_array(text, at, message, path, depth)
  while true do
    local place, _, sign = next_sign(text, at)
    if sign == "]" then return place + 1 end
    if sign == "," then place = place + 1 end
    if not place then return nil end
    at = walk_value(text, place, message, path, depth + 1)
    if not at then return nil end
  end
end

walk_value = function(text, at, message, path, depth)
  if depth > MAX_DEPTH then return nil end
  local place, _, sign = next_sign(text, at)
  if sign == "{" then return walk_object(text, place + 1, message, path, depth) end
  if sign == "[" then return walk_array(text, place + 1, message, path, depth) end
  if sign == '"' then return after_string(text, place) end
  if not place then return nil end
  local stop = string.find(text, "[,}%]]", place)
  return stop ~= place and stop or nil
end

-- The first field of a JSON text that the message does not have, or nil.
local function unknown_field(text, message)
  local fine, problem = pcall(walk_value, text, 1, message, "", 0)
  if not fine and type(problem) == "table" then return problem.unknown end
  return nil
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local encoding = headers:get("grpc-encoding")
  if encoding and encoding ~= "identity" then
    handle:respond({ [":status"] = "415", ["grpc-accept-encoding"] = "identity" }, "")
    return
  end
  local kind = headers:get("content-type")
  if kind and string.find(kind, "application/grpc", 1, true) == 1 then return end
  local path = string.match(headers:get(":path") or "", "^[^?]*")
  if not string.find(path, "^/[%w_.]+/[%w_]+$") then
    handle:respond({ [":status"] = "404" }, "")
    return
  end
  local message = METHODS[path]
  local body = message and handle:body()
  if not body then return end
  local field = unknown_field(body:getBytes(0, body:length()), message)
  if field then
    handle:respond({ [":status"] = "400" }, message .. " has no field `" .. string.sub(field, 1, 200) .. "`")
  end
end

function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get("grpc-status") ~= "8" or headers:get("grpc-status-details-bin") then return end
  if string.find(headers:get("grpc-message") or "", "Received message larger than max", 1, true) then
    headers:replace("grpc-message", TOO_LARGE_MESSAGE)
    headers:replace("grpc-status-details-bin", TOO_LARGE_DETAILS)
  end
end
