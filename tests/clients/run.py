"""Drives a running server with real clients and records what they get.

Usage: run.py URL ADAPTER [--out FILE] [--against FILE] [--only TEXT] [--modules NAME ...]

URL is such as http://127.0.0.1:8000. ADAPTER is the name of an adapter that the server has loaded. Exits with 1 if an
action fails, or if its result is not the one that the file of --against records.
"""

import argparse
import importlib
import json
import pathlib
import signal
import sys
import time
import urllib.request

import record

LIGHT = [
    "openai_answers",
    "openai_tools",
    "openai_responses",
    "openai_files",
    "anthropic_messages",
    "langchain_models",
    "agent_frameworks",
    "llamaindex_models",
    "huggingface_hub_client",
    "litellm_sdk",
]
SECONDS = 60
"""An action that takes longer fails, so that a client that waits for ever does not block the run."""


def attempt(action: record.Action, server: record.Server) -> dict:
    """Runs an action and returns its row of the table."""
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        note = action.run(server) or ""
        result = record.REFUSED if action.refused else record.WORKS
    except Exception as error:  # A client may raise anything.
        note, result = f"{type(error).__name__}: {error}", record.FAILS
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - started
    print(f"{seconds:6.1f} s  {result:15}  {action.client}: {action.what}", flush=True)
    if result == record.FAILS:
        print(f"          {note[:2000]}", flush=True)
    return {
        "client": action.client,
        "version": action.version,
        "action": action.what,
        "result": result,
        "note": note,
    }


def too_late(_signal, _frame):
    raise TimeoutError(f"not finished after {SECONDS} seconds")


def differences(rows: list[dict], known: list[dict]) -> list[str]:
    """Actions whose results are not the recorded ones. Versions and notes may differ."""
    key = lambda row: (row["client"], row["action"], row["result"])
    now, then = set(map(key, rows)), set(map(key, known))
    name = lambda row: f"{row[0]}: {row[1]}: {row[2]}"
    return [f"not recorded: {name(row)}" for row in sorted(now - then)] + [
        f"recorded: {name(row)}" for row in sorted(then - now)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("adapter")
    parser.add_argument("--out", type=pathlib.Path, help="where the results go, as JSON")
    parser.add_argument("--against", type=pathlib.Path, help="results that these must equal")
    parser.add_argument("--only", default="", help="only actions whose client or description contains this")
    parser.add_argument("--modules", nargs="+", default=LIGHT, help="modules with the actions")
    args = parser.parse_args()

    url = args.url.rstrip("/")
    with urllib.request.urlopen(url + "/v1/models") as reply:
        base = json.load(reply)["data"][0]["id"]
    server = record.Server(url, base, args.adapter)
    for module in args.modules:
        importlib.import_module(module)

    signal.signal(signal.SIGALRM, too_late)
    started = time.monotonic()
    chosen = [a for a in record.ACTIONS if args.only in f"{a.client}: {a.what}"]
    rows = [attempt(action, server) for action in chosen]
    failed = sum(row["result"] == record.FAILS for row in rows)
    print(f"{len(rows)} actions, {failed} fail, {time.monotonic() - started:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    known = json.loads(args.against.read_text()) if args.against else []
    if args.only or args.modules != LIGHT:
        # A part of the actions is compared with their records.
        ran = {(row["client"], row["action"]) for row in rows}
        known = [row for row in known if (row["client"], row["action"]) in ran]
    changed = differences(rows, known) if args.against else []
    for line in changed:
        print(line)
    return 1 if failed or changed else 0


if __name__ == "__main__":
    sys.exit(main())
