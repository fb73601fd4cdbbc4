#!/usr/bin/env bash
# Drives a running server with clients that are too large for the gate, and keeps the results.
#
# Usage: heavy.sh URL, for a server with the adapters `qa` and `code` of this project.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../../target/clients-heavy
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q -r "$here/requirements-heavy.txt"
"$venv/bin/python" "$here/run.py" "$1" qa --out "$here/results-heavy.json" --modules \
  litellm_proxy lm_eval_tasks openai_agents openai_answers openai_tools openai_responses openai_files
python3 "$here/table.py" "$here/results.json" "$here/results-heavy.json" > "$here/../../docs/compatibility.md"
