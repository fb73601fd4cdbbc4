#!/usr/bin/env python3
"""Time of decode steps with and without a JSON schema: python3 benches/structured.py URL [ROWS] [ADAPTER...]

Starts ROWS streams (default 64), waits until all decode, and reads the time and the number of steps from /metrics twice. The schema
has about 100 lines of open strings, so that outputs do not end within the window. Alternates plain and structured rounds, and prints
one JSON object. Standard library only.
"""
import json
import sys
import threading
import time
import urllib.request

URL, ROWS = sys.argv[1].rstrip("/"), int(sys.argv[2]) if len(sys.argv) > 2 else 64
ADAPTERS = sys.argv[3:] or [None]
ROUNDS, WINDOW_S = 4, 2.0

properties = {f"field_{i}": {"type": "string", "description": f"Field {i}"} for i in range(12)}
properties["items"] = {"type": "array", "items": {"type": "object", "properties": {
    "id": {"type": "integer"}, "name": {"type": "string"}, "kind": {"enum": ["a", "b", "c"]}}, "required": ["id", "name", "kind"]}}
SCHEMA = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def counters():
    page = urllib.request.urlopen(URL + "/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
    served = next(v for k, v in values.items() if k.startswith("quiver_engine_busy_seconds_total") and '"serve"' in k)
    return float(served), float(values["quiver_steps_total"])


def one(row, structured, first, stop):
    body = {"prompt": f"Row {row}:", "max_tokens": 4000, "temperature": 1, "seed": row, "stream": True}
    adapter = ADAPTERS[row % len(ADAPTERS)]
    if adapter:
        body["adapter"] = adapter
    if structured:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    else:
        body["ignore_eos"] = True
    request = urllib.request.Request(URL + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        for count, _ in enumerate(reply):
            if count == 8:
                first.release()
            if stop.is_set():
                return


def measure(structured):
    first, stop = threading.Semaphore(0), threading.Event()
    rows = [threading.Thread(target=one, args=(row, structured, first, stop), daemon=True) for row in range(ROWS)]
    [row.start() for row in rows]
    [first.acquire() for _ in rows]
    before = counters()
    time.sleep(WINDOW_S)
    after = counters()
    stop.set()
    [row.join() for row in rows]
    return 1000 * (after[0] - before[0]) / (after[1] - before[1])


result = {"rows": ROWS, "adapters": len([a for a in ADAPTERS if a]), "schema_lines": len(json.dumps(SCHEMA, indent=2).splitlines()),
          "plain_ms": [], "structured_ms": []}
measure(False), measure(True)
for _ in range(ROUNDS):
    result["plain_ms"].append(round(measure(False), 3))
    result["structured_ms"].append(round(measure(True), 3))
median = lambda values: sorted(values)[len(values) // 2]
result["growth_percent"] = round(100 * (median(result["structured_ms"]) / median(result["plain_ms"]) - 1), 2)
print(json.dumps(result))
