#!/bin/sh
# Measures all CPU results. Run it on a quiet machine:
#
#     benches/run_cpu.sh [FOLDER]                  about 30 minutes on two cores
#     LENGTH=full benches/run_cpu.sh [FOLDER]      about 90 minutes: 5 minutes of overload, 30 of soak, longer series
#     LENGTH=smoke benches/run_cpu.sh /tmp/out     about 12 minutes: only checks that every part runs
#
# FOLDER defaults to benches/results/<date>-<machine>. The script builds quiver, generates random adapters, measures, and writes
# raw JSON, charts, summary.md and README.md into the folder. If the folder is in benches/results, it also updates the benchmark
# section of the project's README. HTML pages of the series go to target/bench. QUIVER=PATH and LLAMA_SERVER=PATH name existing
# binaries, which saves their builds. PARTS="overload soak" runs only these parts.
#
# Minutes of each part, short and full:
#
#     engine 4, 6      compare 7, 10      load 2, 7        growth 3, 6
#     punica 2, 8      s-lora 7, 13       overload 2, 6    soak 2, 31
set -eu
cd "$(dirname "$0")/.."
machine=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1 | tr 'A-Z' 'a-z' | sed 's/(r)//g; s/[^a-z0-9]\{1,\}/-/g; s/-$//')
out=${1:-benches/results/$(date +%Y-%m-%d)-$machine-$(nproc)cpu}
parts=${PARTS:-engine compare load growth punica s-lora overload soak}
work=target/bench
quiver=${QUIVER:-target/release/quiver}
model=${MODEL:-$HOME/.cache/quiver/SmolLM2-135M-Instruct.Q4_1.gguf}
port=8103
mkdir -p "$out" "$work"

# Measurements of the engine, rounds of the comparison, seconds per rate, scales of the series, seconds of overload and soak.
case ${LENGTH:-short} in
full) repeat=5 rounds=5 load=60 growth=0.5 punica=0.3 slora=0.1 overload=300 soak=1800 ;;
short) repeat=3 rounds=3 load=15 growth=0.15 punica=0.06 slora=0.04 overload=60 soak=60 ;;
smoke) repeat=1 rounds=1 load=2 growth=0.03 punica=0.01 slora=0.005 overload=10 soak=10 ;;
*) echo "LENGTH is full, short or smoke" >&2 && exit 1 ;;
esac

[ -n "${QUIVER:-}" ] || cargo build --release
$quiver pull > /dev/null

wanted() { case " $parts " in *" $1 "*) echo "== $1, $(date +%H:%M:%S)" ;; *) return 1 ;; esac }

# run NAME SERVER-ARGUMENTS GENERATOR-ARGUMENTS...
run() {
    name=$1
    wanted "$name" || return 0
    server="$quiver serve --device cpu --model $model --port $port --log-level warn $2"
    shift 2
    # A verdict with faults still writes its report.
    $quiver bench serve --url http://127.0.0.1:$port --start "$server" --name quiver --out "$out/$name.json" --page "$work/$name.html" "$@" ||
        echo "$name: FAULTS, see $out/$name.json"
}

# dummies FOLDER COUNT SHAPE-ARGUMENTS
dummies() {
    [ -d "$work/$1" ] || $quiver adapter dummy --model "$model" --out "$work/$1" --count "$2" $3
}

# S-LoRA's second setting: ranks 8 to 64 on the attention modules. The slots do not hold all 200 adapters at once.
dummies ranks 200 "--ranks 64,32,16,8 --targets q_proj,k_proj,v_proj,o_proj"
dummies many 2000 "--rank 8 --targets q_proj,v_proj"

if wanted engine; then
    $quiver bench engine --device cpu --model "$model" --log-level warn --batch 1,4,8 --input 128 --output 64 --adapters "$work/ranks" \
        --repeat $repeat --mix none,one,distinct --rank 8,16,32,64 --registered 8 --out "$out/engine.json" | tee "$out/engine.md"
fi
if wanted compare; then
    python3 benches/compare/compare.py --quiver $quiver --model "$model" ${LLAMA_SERVER:+--llama "$LLAMA_SERVER"} --rounds $rounds \
        --out "$out/compare.json"
fi
run load "--adapters adapters" --rate 0.5,1,1.5,2,2.5,3 --duration $load --adapters 3
run growth "--adapters $work/many --host-adapter-memory 4GiB" --grid growth --scale $growth
run punica "--adapters $work/many --host-adapter-memory 4GiB" --grid punica --scale $punica
run s-lora "--adapters $work/ranks" --grid s-lora --scale $slora --input 8..128 --output 8..128
# A KV cache that is full after seconds, so that later growth of memory is a leak.
run overload "--adapters adapters --max-waiting 32 --max-model-len 1024 --kv-memory 256MiB" --grid overload --scale 0.5 \
    --duration $overload --adapters 3 --input 8..128 --output 8..128
# Slots for two adapters and host memory for one more, so that adapters move between slots, host memory and disk.
run soak "--adapters adapters --max-model-len 1024 --kv-memory 64MiB --adapter-memory 24MiB --host-adapter-memory 12MiB" --grid soak \
    --duration $soak
if [ -e "$out/load.json" ] && [ -e "$out/growth.json" ]; then
    $quiver bench page "$out/load.json" "$out/growth.json" --out "$work/page.html" --svg "$out"
fi
python3 benches/readme.py summary "$out"
case $(realpath "$out") in "$PWD"/benches/results/*) python3 benches/readme.py readme ;; esac
