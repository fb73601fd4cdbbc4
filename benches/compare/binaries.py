#!/usr/bin/env python3
"""Compares two quiver binaries: the same bits, and the same speed.

    python3 benches/compare/binaries.py OLD NEW [--model FILE] [--rounds N] --out RESULT.json

Bits: both binaries serve the default model and the adapters of this repository on the CPU and answer the same requests (greedy and seeded
text, with log-probabilities of prompt and output; base, single adapters, a weighted sum, all at once), and train the same small jobs. Every
reply, every figure of the training and every byte of the trained adapters must be equal. Speed: `quiver bench engine` in alternating rounds.
Exits with 1 if any bits differ. Standard library only.
"""

import argparse, concurrent.futures, hashlib, json, os, shutil, statistics, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROMPTS = [
    "Water boils at", "def fibonacci(n):", "KING. What news from the north, my lord?", 'Define the noun "lantern".',
    "Once upon a time there was a", "The capital of France is Paris. The capital of Italy is", "x", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, " * 12,
]
ADAPTERS = [None, "qa", "writing", "code", [{"name": "writing", "weight": 0.8}, {"name": "qa", "weight": 0.2}]]
JOBS = {
    "lora": ["--r", "4"],
    "packed": ["--r", "4", "--packing", "--gradient-accumulation", "2", "--optim", "adamw_8bit"],
    "dora": ["--r", "4", "--use-dora"],
    "rslora": ["--r", "8", "--use-rslora", "--dropout", "0.1", "--target-modules", "q_proj,v_proj,down_proj"],
}


def requests():
    """Bodies with their routes, in a fixed order."""
    for adapter in ADAPTERS:
        for prompt in PROMPTS:
            base = {"adapter": adapter, "max_tokens": 24}
            yield "/v1/completions", base | {"prompt": prompt, "temperature": 0, "logprobs": 5, "echo": True}
            yield "/v1/completions", base | {"prompt": prompt, "temperature": 0.9, "top_p": 0.95, "seed": 7, "n": 2, "logprobs": 1}
            messages = [{"role": "user", "content": prompt}]
            yield "/v1/chat/completions", base | {"messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 3}


def ask(port, route, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{route}", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        answer = json.load(error)
    # What differs from one reply to the next by design; cached tokens depend on what came first.
    for key in ("id", "created"):
        answer.pop(key, None)
    answer.get("usage", {}).pop("prompt_tokens_details", None)
    return answer


def replies(binary, model, port):
    """Answers to all requests: one by one, then all at once in mixed batches."""
    command = [binary, "serve", "--device", "cpu", "--port", str(port), "--adapters", os.path.join(ROOT, "adapters"), "--log-level", "error",
               "--threads", "2", "--max-waiting", "1024"] + (["--model", model] if model else [])
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        one_by_one = [ask(port, route, body) for route, body in requests()]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            mixed = list(pool.map(lambda request: ask(port, *request), requests()))
        return {"one by one": one_by_one, "mixed": mixed}
    finally:
        server.terminate()
        server.wait()


def training(binary, model, folder):
    """Losses of every step and hashes of the adapters, job by job."""
    data = os.path.join(ROOT, "tests/fixtures/tasks/qa.jsonl")
    result = {}
    for name, flags in JOBS.items():
        out = os.path.join(folder, name)
        command = [binary, "train", "--file", data, "--validation-file", data, "--out", out, "--max-steps", "6", "--batch-size", "4", "--seed", "1",
                   "--device", "cpu", "--threads", "2", "--checkpoint-every", "3", "--eval-every", "3"] + flags + (["--model", model] if model else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        files = {}
        for where, _, names in os.walk(out):
            for file in names:
                path = os.path.join(where, file)
                if file == "training_metrics.csv":
                    with open(path) as f:
                        head, *rows = [line.strip().split(",") for line in f]
                    kept = [i for i, column in enumerate(head) if "second" not in column]
                    files[file] = [[row[i] for i in kept] for row in [head, *rows]]
                elif file.endswith(".safetensors"):
                    with open(path, "rb") as f:
                        files[os.path.relpath(path, out)] = hashlib.sha256(f.read()).hexdigest()
        result[name] = files
        shutil.rmtree(out)
    return result


def speed(binaries, model, rounds, folder):
    """Milliseconds a step and prompt tokens a second, medians over alternating rounds."""
    samples = {name: {} for name in binaries}
    for _ in range(rounds):
        for name, binary in binaries.items():
            out = os.path.join(folder, "engine.json")
            command = [binary, "bench", "engine", "--device", "cpu", "--log-level", "warn", "--threads", "2", "--batch", "1,8", "--input", "128",
                       "--output", "64", "--adapters", os.path.join(ROOT, "adapters"), "--mix", "none,one,distinct", "--registered", "3",
                       "--repeat", "2", "--out", out] + (["--model", model] if model else [])
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with open(out) as f:
                for case in json.load(f):
                    key = f"batch {case['batch']}, adapters {case['adapters']}"
                    samples[name].setdefault(key + ", ms a step", []).extend(case["step_ms"])
                    samples[name].setdefault(key + ", prompt s", []).extend(case["prompt_s"])
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of the speed comparison; 0 leaves it out")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    binaries = {"old": args.old, "new": args.new}
    result, differ = {"command": [os.path.basename(part) for part in sys.argv]}, []
    with tempfile.TemporaryDirectory() as folder:
        answers = {name: replies(binary, args.model, 8200 + i) for i, (name, binary) in enumerate(binaries.items())}
        for kind in answers["old"]:
            pairs = list(zip(requests(), answers["old"][kind], answers["new"][kind]))
            wrong = [{"request": request, "old": old, "new": new} for request, old, new in pairs if old != new]
            result[f"replies, {kind}"] = {"compared": len(pairs), "different": len(wrong)}
            differ += wrong
        alike = sum(a == b for a, b in zip(answers["new"]["one by one"], answers["new"]["mixed"]))
        result["replies of the new binary, mixed against one by one"] = {"compared": len(pairs), "different": len(pairs) - alike}
        trained = {name: training(binary, args.model, folder) for name, binary in binaries.items()}
        for job in JOBS:
            old, new = trained["old"][job], trained["new"][job]
            wrong = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
            result[f"training, {job}"] = {"files": sorted(old), "losses": old.get("training_metrics.csv"), "different": len(wrong)}
            differ += [{"job": job, "file": file, "old": old.get(file), "new": new.get(file)} for file in wrong]
        if args.rounds:
            result["speed"] = speed(binaries, args.model, args.rounds, folder)
    result["differences"] = differ[:20]
    with open(args.out, "w") as f:
        json.dump(result, f, indent=1)
    for key, value in result.items():
        if isinstance(value, dict) and "different" in value:
            print(f"{key}: {value['different']} different" + (f" of {value['compared']}" if "compared" in value else ""))
    for key in result.get("speed", {}).get("old", {}):
        old, new = (statistics.median(result["speed"][name][key]) for name in ("old", "new"))
        print(f"{key}: {old:.4g} -> {new:.4g} ({new / old - 1:+.1%})")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
