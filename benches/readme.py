#!/usr/bin/env python3
"""Tables from raw results.

    python3 benches/readme.py summary FOLDER   summary.md and README.md of a folder that benches/run_cpu.sh filled
    python3 benches/readme.py readme           the benchmark section of the project's README, from the newest folder of each machine

A folder's summary.md is what the project's README shows of it. What stands under "Known gaps" in a folder's README.md is kept.
Standard library only.
"""

import glob, json, os, re, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEGIN, END = "<!-- written by benches/readme.py -->\n", "<!-- end of what benches/readme.py wrote -->"
GAPS = "## Known gaps, stated plainly\n"


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


def compare_table(compare):
    median = compare["median"]
    rows = [[name, f"{theirs:.1f}", f"{median['quiver'][name]:.1f}", f"{median['quiver'][name] / theirs:.2f}"]
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
    head = ["", "req/s", "out tok/s", "TTFT p50/p90/p99 ms", "between p50/p99 ms", "whole p50/p99 ms", "SLO", "Jain", "failed",
            "misses", "lag p99 ms"]
    return table(head, rows)


TITLES = {
    "load": "Latency over load: Poisson arrivals, 128 tokens in and out, three adapters",
    "growth": "Growth: 8 clients in a closed loop, 128 tokens in and out, uniform over so many adapters (rank 8 on q and v)",
    "punica": "Punica's four popularities, 32 clients, 128 tokens in and out",
    "s-lora": "S-LoRA's sweeps, scaled to the machine: 200 adapters of ranks 8 to 64, up to 128 tokens in and out",
    "overload": "Overload: twice the sustainable rate, at most 32 waiting",
    "soak": "Soak: adapters load, replace and unload every second; every reply is checked",
}


def full(reports):
    """Whether the soak ran as long as LENGTH=full has it."""
    soak = reports.get("soak")
    return bool(soak) and soak["command"][soak["command"].index("--duration") + 1] == "1800"


def summary(folder):
    reports = {name: load(folder, name) for name in TITLES}
    reports = {name: report for name, report in reports.items() if report}
    compare = load(folder, "compare")
    if not reports:
        sys.exit(f"{folder} has no report of `quiver bench serve`")
    some = next(iter(reports.values()))
    machine = some["machine"]
    where = f"{machine['threads']} threads of {machine['cpu']}, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}"
    short = [f"SmolLM2-135M-Instruct in Q4_1 (98 MB) on {where}; [everything]({os.path.relpath(folder, ROOT)}).\n"]
    if compare:
        short += [f"Beside llama.cpp's server (build 11434), the same file and adapters, {compare['threads']} threads, one run, alternating, "
                  f"medians of {len(compare['samples']['quiver'])}:\n", compare_table(compare)]
    for name, key in (("growth", "throughput-over-adapters"), ("load", "first-token-over-rate")):
        if os.path.exists(os.path.join(folder, key + ".svg")):
            short.append(f"![{TITLES[name]}]({os.path.relpath(folder, ROOT)}/{key}.svg)\n")
    with open(os.path.join(folder, "summary.md"), "w") as f:
        f.write("\n".join(short))

    describe = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    out = [f"# quiver on {where}\n", f"Model: SmolLM2-135M-Instruct, Q4_1, 98 MB. Commit {commit or 'unknown'}. Begun {some['date']}.\n",
           f"```\n{'LENGTH=full ' if full(reports) else ''}benches/run_cpu.sh\n```\n",
           "TTFT: from when a request was due, not from when it was sent, to the first text. SLO: share of all requests whose first text "
           "came within 6 s. Jain: index of the speed that requests of each adapter saw. Misses: adapters brought into a slot. Lag: how "
           "late the generator sent. `*.json` hold every request, `page.html` plots.\n"]
    if compare:
        same = ", ".join(f"{name} {count} of {len(compare['same_text']['prompts'])}" for name, count in compare["same_text"]["same"].items())
        out += ["## Beside llama.cpp\n", compare_table(compare),
                f"Prompts with the same greedy text on both servers: {same}. llama.cpp rounds activations to 8 bits, quiver to 16.\n"]
    engine = os.path.join(folder, "engine.md")
    if os.path.exists(engine):
        with open(engine) as f:
            out += ["## The engine without HTTP, 128 tokens in, 64 out\n", f.read(),
                    "MB a step: the base's matrices, each adapter of the batch once, keys and values. Bandwidth: of memory, read by all threads; "
                    "the processor's cache holds a part of so small a model.\n"]
    for name, report in reports.items():
        out.append(f"## {TITLES[name]}\n")
        if report["runs"]:
            out.append(runs_table(report))
        verdict = report["verdict"] or {"facts": [], "faults": []}
        lines = [f"- {fact}" for fact in verdict["facts"]] + [f"- FAULT: {fault}" for fault in verdict["faults"]]
        lines += [f"- {run['label']}: {run['summary']['warning']}" for run in report["runs"] if run["summary"]["warning"]]
        if lines:
            out.append("\n".join(lines) + "\n")
    readme = os.path.join(folder, "README.md")
    gaps = GAPS + "\n"
    if os.path.exists(readme):
        with open(readme) as f:
            gaps = GAPS + f.read().partition(GAPS)[2]
    with open(readme, "w") as f:
        f.write("\n".join(out) + "\n" + gaps)
    print(readme)


def readme():
    newest = {}
    for file in sorted(glob.glob(os.path.join(ROOT, "benches/results/*/summary.md"))):
        date, machine = re.match(r"(\d{4}-\d\d-\d\d)-(.*)", os.path.basename(os.path.dirname(file))).groups()
        newest[machine] = file
    parts = []
    for file in sorted(newest.values(), reverse=True):
        with open(file) as f:
            parts.append(f.read().strip())
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        text = f.read()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path} lacks the lines between which the benchmarks go:\n{BEGIN}{END}")
    with open(path, "w") as f:
        f.write(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after)
    print(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["summary"] and len(sys.argv) == 3:
        summary(os.path.abspath(sys.argv[2]))
    elif sys.argv[1:] == ["readme"]:
        readme()
    else:
        sys.exit(__doc__)
