#!/bin/sh
# All CPU results, in about 25 minutes on a quiet machine with two cores:
#
#     benches/run_cpu.sh [FOLDER]        default: benches/results/<date>-<machine>
#
# Builds quiver, makes adapters up, measures, and writes raw JSON, plots, summary.md and README.md into the folder, then the
# benchmark section of the project's README; a page of plots of each series goes to target/bench. LLAMA_SERVER=PATH saves
# building the peer.
set -eu
cd "$(dirname "$0")/.."
machine=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1 | tr 'A-Z' 'a-z' | sed 's/(r)//g; s/[^a-z0-9]\{1,\}/-/g; s/-$//')
out=${1:-benches/results/$(date +%Y-%m-%d)-$machine-$(nproc)cpu}
work=target/bench
quiver=target/release/quiver
model=${MODEL:-$HOME/.cache/quiver/SmolLM2-135M-Instruct.Q4_1.gguf}
port=8103
mkdir -p "$out" "$work"

cargo build --release
$quiver pull > /dev/null
rm -rf "$work/ranks" "$work/many"
# S-LoRA's second setting: ranks 8 to 64 on the attention. 200 of them do not fit the slots at once.
$quiver adapter dummy --model "$model" --count 200 --ranks 64,32,16,8 --targets q_proj,k_proj,v_proj,o_proj --out "$work/ranks"
$quiver adapter dummy --model "$model" --count 2000 --rank 8 --targets q_proj,v_proj --out "$work/many"

# name, server's arguments, generator's arguments
run() {
    name=$1
    server="$quiver serve --device cpu --model $model --port $port --log-level warn $2"
    shift 2
    echo "== $name"
    # A trial that finds faults still leaves its report.
    $quiver bench serve --url http://127.0.0.1:$port --start "$server" --name quiver --out "$out/$name.json" --page "$work/$name.html" "$@" ||
        echo "$name: FAULTS, see $out/$name.json"
}

$quiver bench engine --device cpu --model "$model" --adapters adapters --log-level warn --batch 1,4,8 --mix none,distinct --input 128 \
    --output 64 --out "$out/engine.json" | tee "$out/engine.md"
python3 benches/compare/compare.py --quiver $quiver --model "$model" ${LLAMA_SERVER:+--llama "$LLAMA_SERVER"} --rounds 3 --out "$out/compare.json"
run load "--adapters adapters" --rate 0.5,1,1.5,2,2.5,3 --duration 15 --adapters 3
run growth "--adapters $work/many --host-adapter-memory 4GiB" --grid growth --scale 0.15
run punica "--adapters $work/many --host-adapter-memory 4GiB" --grid punica --scale 0.06
run s-lora "--adapters $work/ranks" --grid s-lora --scale 0.04 --input 8..128 --output 8..128
run overload "--adapters adapters --max-waiting 32 --kv-memory 256MiB" --grid overload --scale 0.5 --duration 60 --adapters 3 --input 8..128 --output 8..128
run soak "--adapters adapters --kv-memory 256MiB" --grid soak --duration 60
$quiver bench page "$out"/load.json "$out"/growth.json --out "$out/page.html" --svg "$out"
python3 benches/readme.py summary "$out"
python3 benches/readme.py readme
