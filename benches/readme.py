#!/usr/bin/env python3
"""Tables and pictures from raw results.

    python3 benches/readme.py summary FOLDER   summary.md of a folder; README.md too, if benches/run_cpu.sh filled the folder
    python3 benches/readme.py readme           the comparison in the project's README and the results in docs/benchmarks.md,
                                               from the newest folder of each machine; needs matplotlib

The text under "Known gaps" in a folder's README.md is kept. Figures of peers that were not measured in the same run are in
benches/peers.json.
"""

import glob, json, os, re, statistics, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEGIN, END = "<!-- written by benches/readme.py -->\n", "<!-- end of what benches/readme.py wrote -->"
with open(os.path.join(ROOT, "benches/peers.json")) as f:
    PEERS = json.load(f)
GAPS = "## Known gaps\n"


def load(folder, name):
    try:
        with open(os.path.join(folder, name + ".json")) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def ms(value):
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


LONG = {"pp512": "prompt of 512 tokens", "tg128": "128 tokens of output"}


def compare_table(compare):
    median = compare["median"]
    rows = [[LONG.get(name, name), f"{theirs:.1f}", f"{median['quiver'][name]:.1f}", f"{median['quiver'][name] / theirs:.2f}"]
            for name, theirs in median["llama.cpp"].items()]
    return table(["tok/s", "llama.cpp", "quiver", "ratio"], rows)


def runs_table(report):
    rows = []
    for run in report["runs"]:
        s = run["summary"]
        first, between, whole = s["first_ms"], s["between_ms"], s["whole_ms"]
        rows.append([run["label"], f"{s['requests_per_s']:.2f}", f"{s['output_per_s']:.0f}",
                     f"{ms(first['p50'])}/{ms(first['p90'])}/{ms(first['p99'])}", f"{ms(between['p50'])}/{ms(between['p99'])}",
                     f"{ms(whole['p50'])}/{ms(whole['p99'])}", f"{s['slo_attained']:.0%}", f"{s['fairness']['jain_speed']:.2f}",
                     ", ".join(f"{n} {kind}" for kind, n in s["failed"].items()) or 0,
                     "" if s["adapter_misses"] is None else s["adapter_misses"], ms(s["lag_ms"]["p99"])])
    head = ["", "req/s", "out tok/s", "TTFT p50/p90/p99 ms", "ITL p50/p99 ms", "request p50/p99 ms", "SLO", "Jain", "failed",
            "misses", "lag p99 ms"]
    return table(head, rows)


TITLES = {
    "load": "Latency over load: Poisson arrivals, 128 tokens in and out, three adapters",
    "growth": "Growth: 8 clients in a closed loop, 128 tokens in and out, adapters drawn uniformly (rank 8 on q and v)",
    "punica": "Punica's four popularity distributions, 32 clients, 128 tokens in and out",
    "s-lora": "S-LoRA's sweeps, scaled to the machine: 200 adapters of ranks 8 to 64, up to 128 tokens in and out",
    "overload": "Overload: twice the sustainable rate, at most 32 requests waiting",
    "soak": "Soak: adapters are loaded, replaced and unloaded every second; every reply is checked",
}


def full(reports):
    """Whether the soak ran as long as LENGTH=full has it."""
    soak = reports.get("soak")
    return bool(soak) and soak["command"][soak["command"].index("--duration") + 1] == "1800"


def summary(folder):
    if load(folder, "load") or load(folder, "compare"):
        cpu_summary(folder)
    elif load(folder, "engine"):
        gpu_summary(folder)
    else:
        sys.exit(f"{folder} has no load.json, compare.json or engine.json")


def engine_steps(cases):
    """Medians of milliseconds a step and of prompt tokens a second: {adapters: {batch: figure}}."""
    steps, prompts = {}, {}
    for case in cases:
        steps.setdefault(case["adapters"], {})[case["batch"]] = statistics.median(case["step_ms"])
        rate = case["batch"] * case["input"] / statistics.median(case["prompt_s"])
        prompts.setdefault(case["adapters"], {})[case["batch"]] = rate
    return steps, prompts


def gpu_summary(folder):
    """summary.md of a run of `quiver bench engine` on a GPU, with vLLM's figures."""
    steps, prompts = engine_steps(load(folder, "engine"))
    peer = PEERS["gpu"]
    kinds = [("none", "no adapter"), ("one", "one adapter"), ("distinct", "all distinct")]
    rows = []
    for batch in sorted(steps["none"]):
        row = [f"batch {batch}" + (", 64 adapters" if batch > 64 else "")]
        for kind, _ in kinds:
            theirs, ours = peer["step_ms"][kind].get(str(batch)), steps.get(kind, {}).get(batch)
            row += [theirs or "", f"{ours:.2f}" if ours else ""]
        rows.append(row)
    row = ["prefill, tok/s"]
    for kind, _ in kinds:
        best = max(prompts.get(kind, {0: 0}).values())
        row += [f"{peer['prompt_tok_s'][kind]:,}", f"{round(best, -2):,.0f}" if best else ""]
    rows.append(row)
    head = ["ms a step"] + [f"{name}: {who}" for _, name in kinds for who in (peer["name"], "quiver")]
    gpu = os.path.basename(folder)[11:].upper()
    text = [f"### Llama-3.1-8B shape on one {gpu}\n",
            f"4 bits (quiver: NF4), rank 16 on all seven linears, 512 tokens in, 128 steps, engine without HTTP. {peer['name']}: {peer['setting']}. "
            "[Raw runs](.).\n", table(head, rows)]
    write(os.path.join(folder, "summary.md"), "\n".join(text))


def cpu_summary(folder):
    """summary.md and README.md of a folder that benches/run_cpu.sh filled."""
    reports = {name: load(folder, name) for name in TITLES}
    reports = {name: report for name, report in reports.items() if report}
    compare = load(folder, "compare")
    if not reports:
        sys.exit(f"{folder} has no report of `quiver bench serve`")
    some = next(iter(reports.values()))
    machine = some["machine"]
    where = f"{machine['threads']} threads of {machine['cpu']}, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}"
    short = [f"### SmolLM2-135M-Instruct on {machine['threads']} threads of {machine['cpu']}\n",
             "Q4_1, 98 MB. [Raw runs](.).\n"]
    if compare:
        short += [f"llama.cpp's server (build 11434) and quiver with the same file and adapters, {compare['threads']} threads, in alternating rounds; "
                  f"medians of {len(compare['samples']['quiver'])}:\n", compare_table(compare)]
    for name, key in (("growth", "throughput-over-adapters"), ("load", "first-token-over-rate")):
        if os.path.exists(os.path.join(folder, key + ".svg")):
            short.append(f"![{TITLES[name]}]({key}.svg)\n")
    write(os.path.join(folder, "summary.md"), "\n".join(short))

    readme = os.path.join(folder, "README.md")
    kept = open(readme).read() if os.path.exists(readme) else ""
    # Written again later, a page still names the commit that was measured.
    commit = re.search(r"Commit (.*?)\. Started", kept)
    describe = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    commit = commit[1] if commit else subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    out = [f"# quiver on {where}\n",
           f"Model: SmolLM2-135M-Instruct, Q4_1, 98 MB. Commit {commit or 'unknown'}. Started {some['date']}.\n",
           f"```\n{'LENGTH=full ' if full(reports) else ''}benches/run_cpu.sh\n```\n",
           table(["column", "meaning"],
                 [["TTFT", "time from when a request was due (not from when it was sent) to its first text"],
                  ["ITL", "inter-token latency"],
                  ["SLO", "share of all requests whose first text came within 6 s"],
                  ["Jain", "Jain's fairness index of the speed that the requests of each adapter saw"],
                  ["misses", "adapters that had to be brought into a slot"],
                  ["lag", "how late the load generator sent requests"],
                  ["rate", "requests a second that the Poisson process aims at; a short run reaches another rate"],
                  ["alpha", "exponent of the power law over adapters"],
                  ["cv", "coefficient of variation of the times between arrivals"]]),
           "The JSON files hold every request. `quiver bench page FOLDER/*.json --out page.html` makes a page of plots from them.\n"]
    if compare:
        same = table(["adapter", "prompts with the same greedy text on both servers"],
                     [[name, f"{count} of {len(compare['same_text']['prompts'])}"] for name, count in compare["same_text"]["same"].items()])
        out += ["## llama.cpp and quiver\n", compare_table(compare), same, "llama.cpp rounds activations to 8 bits, quiver to 16.\n"]
    engine = os.path.join(folder, "engine.md")
    if os.path.exists(engine):
        with open(engine) as f:
            out += ["## The engine without HTTP, 128 tokens in, 64 out\n", f.read(),
                    "MB a step: the base's matrices, each adapter of the batch once, and the KV cache. Bandwidth: of memory, read by all threads. "
                    "The processor's cache holds part of so small a model.\n"]
    for name, report in reports.items():
        out.append(f"## {TITLES[name]}\n")
        if report["runs"]:
            out.append(runs_table(report))
        verdict = report["verdict"] or {"facts": [], "faults": []}
        lines = [f"- {fact}" for fact in verdict["facts"]] + [f"- FAULT: {fault}" for fault in verdict["faults"]]
        lines += [f"- {run['label']}: {run['summary']['warning']}" for run in report["runs"] if run["summary"]["warning"]]
        if lines:
            out.append("\n".join(lines) + "\n")
    write(readme, "\n".join(out) + "\n" + GAPS + (kept.partition(GAPS)[2] or "\n"))


def folders_with(name):
    """The folders that have NAME.json, the newest last."""
    folders = sorted(glob.glob(os.path.join(ROOT, "benches/results/*/" + name + ".json")))
    return [os.path.dirname(path) for path in folders]


def picture(path, cpu, gpu):
    """Throughput over the number of adapters in a batch, quiver and a rival, on a GPU and on a CPU."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "quiver", "font.size": 10})
    import matplotlib.pyplot as plt

    peer = PEERS["gpu"]
    batch, kinds = 64, [("none", "none"), ("one", "1"), ("distinct", "64")]
    cases = {case["adapters"]: case["step_ms"] for case in load(gpu, "engine") if case["batch"] == batch and case["rank"] in (None, 16)}
    rate = lambda step: 1000 * batch / step
    left = [(name, rate(peer["step_ms"][kind][str(batch)]), sorted(rate(step) for step in cases[kind])) for kind, name in kinds]
    samples = load(cpu, "compare")["samples"]
    right = [(name, sorted(run[key] for run in samples["llama.cpp"]), sorted(run[key] for run in samples["quiver"]))
             for name, key in (("none", "clients 8"), ("3", "adapters 3, clients 8"))]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), gridspec_kw={"width_ratios": [3, 2]})
    panels = ((axes[0], left, peer["name"], f"Llama-3.1-8B shape, one H200, batch {batch}"),
              (axes[1], right, "llama.cpp", "SmolLM2-135M, 2 CPU cores, 8 clients"))
    for axis, rows, rival, title in panels:
        for i, (_, theirs, ours) in enumerate(rows):
            for offset, values, colour in ((-0.2, theirs, "#9aa5b1"), (0.2, ours, "#d9572b")):
                values = values if isinstance(values, list) else [values]
                middle = statistics.median(values)
                axis.bar(i + offset, middle, 0.38, color=colour, label=(rival if offset < 0 else "quiver") if i == 0 else None)
                axis.errorbar(i + offset, middle, [[middle - values[0]], [values[-1] - middle]], color="#333", capsize=3, lw=1)
                axis.annotate(f"{middle:,.0f}", (i + offset, values[-1]), ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(rows)), [row[0] for row in rows])
        axis.set_xlabel("different adapters in the batch")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
        axis.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("output tokens per second")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(path)


def between(path, text):
    """Replaces what stands between the markers of a page."""
    with open(path) as f:
        before, begin, rest = f.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path} lacks the lines between which the benchmarks go:\n{BEGIN}{END}")
    write(path, before + BEGIN + "\n" + text.strip() + "\n\n" + END + after)


def write(path, text):
    with open(path, "w") as f:
        f.write(text)
    print(path)


def readme():
    cpu, gpu = folders_with("compare")[-1], [folder for folder in folders_with("engine") if folder.endswith("-h200")][-1]
    picture(os.path.join(ROOT, "docs/throughput-over-adapters.svg"), cpu, gpu)
    median, steps, peer = load(cpu, "compare")["median"], engine_steps(load(gpu, "engine"))[0], PEERS["gpu"]
    link = lambda folder: f"[{os.path.basename(folder)}](benches/results/{os.path.basename(folder)})"
    rows = []
    for batch, kind, name in ((64, "distinct", "64 adapters"), (64, "none", "no adapter"), (1, "one", "one adapter")):
        theirs, ours = peer["step_ms"][kind].get(str(batch)), steps[kind][batch]
        rows.append([f"output, Llama-3.1-8B shape, one H200, batch {batch}, {name}", f"{peer['name']}: {1000 * batch / theirs:,.0f} tok/s",
                     f"{1000 * batch / ours:,.0f} tok/s", link(gpu)])
    for key, name in (("adapters 3, clients 8", "output, SmolLM2-135M, two CPU cores, 8 clients, 3 adapters"),
                      ("tg128", "output, SmolLM2-135M, two CPU cores, one client"), ("pp512", "prompts, SmolLM2-135M, two CPU cores")):
        rows.append([name, f"llama.cpp: {median['llama.cpp'][key]:,.0f} tok/s", f"{median['quiver'][key]:,.0f} tok/s", link(cpu)])
    rows += [[row["row"], row["rival"], row["quiver"], link(row["folder"])] for row in PEERS["training"]]
    between(os.path.join(ROOT, "README.md"),
            "![Output tokens per second over the number of different adapters in a batch: quiver and vLLM on an H200, quiver and llama.cpp on two CPU "
            "cores](docs/throughput-over-adapters.svg)\n\n" + table(["", "rival", "quiver", "raw runs"], rows) +
            f"\nThe figures of {peer['name']} and of PEFT on the H200 are from such a card, but not from the same run; the CPU rows are from alternating runs.\n")
    latest = {}
    for path in sorted(glob.glob(os.path.join(ROOT, "benches/results/*/summary.md"))):
        latest[os.path.basename(os.path.dirname(path))[11:]] = path
    parts = [["folder", "date"], *sorted(([f"[{os.path.basename(f)}](../benches/results/{os.path.basename(f)})", os.path.basename(f)[:10]]
             for f in glob.glob(os.path.join(ROOT, "benches/results/*"))), reverse=True)]
    texts = [table(parts[0], parts[1:])]
    for path in sorted(latest.values(), reverse=True):
        folder = "../" + os.path.relpath(os.path.dirname(path), ROOT)
        with open(path) as f:
            # Links of a folder's own page, from here.
            texts.append(re.sub(r"\]\((?!http)([^)]*)\)", lambda link: f"]({folder}/{link[1]})".replace("/.)", ")"), f.read().strip()))
    between(os.path.join(ROOT, "docs/benchmarks.md"), "\n\n".join(texts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["summary"] and len(sys.argv) == 3:
        summary(os.path.abspath(sys.argv[2]))
    elif sys.argv[1:] == ["readme"]:
        readme()
    else:
        sys.exit(__doc__)
