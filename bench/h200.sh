#!/usr/bin/env bash
# Measures figures of the whole system on a GPU ($CUDA_VISIBLE_DEVICES, or the first): client → scheduler → worker → client,
# Llama-3.1-8B's shape, random weights, greedy, stop tokens ignored. One service for all figures of a precision; the peer
# after it, if it is there.
#
#   bench/h200.sh [-r REPEATS] FIGURE …
#
#   A  32 × (256 + 1,024)      D  1 × (256 + 512)        start      from nothing to ready, twice
#   B  32 × (256 + 8,192)      E  256 × (256 + 512)      sync       A, C and E with lookahead 0
#   C  ragged, 512 at once     F  A in FP8               idle       gaps between kernels and which they are, by
#   small  256 × (256 + 512) of a model of 0.6B                     torch.profiler, under A, C, E, and E with 8 client
#                                                                   processes; idle-long: and B; idle-C: C alone
#   attention  the decode kernel back to back and in its place, in all its ways (no service)
#   products   a layer's products by each algorithm of cublasLt beside torch's (no service)
#   two    A on one worker, then twice its requests on two, one GPU each (needs two GPUs)
#   http   E through HTTP beside the SDK, from 8 client processes, with $GATEWAYS (default 1 and 2) gateways on a port
#   features   A with a tokenizer of 128,256 tokens: greedy, every sampling parameter on, half of it in structured output
#   invariant  A and E as they are and in batch-invariant mode, each with graphs and with --enforce-eager
#   peer-A peer-B peer-C peer-E  transformers' continuous batching, its best configuration found (needs $PEER, the script)
#
# Results go into $RESULTS (default bench/results), one JSON file a figure. $PYTHON (default python3) must find tandem.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RESULTS=${RESULTS:-bench/results}
PYTHON=${PYTHON:-python3}
PEER=${PEER:-}
GATEWAYS=${GATEWAYS:-1 2}
REPEATS=3
while getopts r: option; do
  case $option in r) REPEATS=$OPTARG ;; *) exit 2 ;; esac
done
shift $((OPTIND - 1))
(( $# )) || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2; }

tandem=("$PYTHON" -P -c 'import sys; from tandem.launch.cli import main; sys.exit(main())')
model=(--model bench/shapes/llama-3.1-8b --load-format dummy --dtype bfloat16 --max-model-len 16384
  --max-num-seqs 512 --max-num-batched-tokens 4096 --no-enable-prefix-caching)
prefix=$RESULTS/$(date +%F)-$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())')-8b
gpu=${CUDA_VISIBLE_DEVICES:-0}
gpu=${gpu%%,*}
home=$(mktemp -d)
chmod 700 "$home"
service=
trap stop_service EXIT
trap 'tail -n 30 "$home"/*log; exit 143' TERM  # whoever ran out of patience learns what it was doing

start_service() { # start_service FLAGS…: waits until it is ready
  stop_service
  rm -f "$home/log"  # the one before says that it serves
  "${tandem[@]}" serve --address "ipc://$home/service" "${http[@]}" "${model[@]}" "$@" \
    > >(while IFS= read -r line; do printf '%(%T)T %s\n' -1 "$line"; done >"$home/log") 2>&1 &
  service=$!
  until grep -qs '^[0-9:]* Serving ' "$home/log"; do
    kill -0 "$service" 2>/dev/null || { tail -n 30 "$home/log"; exit 1; }
    sleep 0.1
  done
  grep -m1 '^[0-9:]* Serving ' "$home/log"
}

stop_service() {
  [[ -n $service ]] && kill -TERM "$service" && wait "$service"
  service=
}

http=()
"${tandem[@]}" serve --help | grep -q -- --no-http && http=(--no-http)

offline() { # offline NAME FLAGS…
  local name=$1
  shift
  echo "--- $name"
  "${tandem[@]}" bench offline --connect "ipc://$home/service" --out "$prefix-$name.json" "$@" 2>&1 \
    | grep -E '^run |requests completed|^device|^HTTP|^client|rror' || echo "$name FAILED"
  nvidia-smi -i "$gpu" --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader
}

load() { # load FIGURE [SUFFIX]
  case $1 in
    A | F) offline "load-${1,,}-32x256+1024${2:-}" --repeats "$REPEATS" --num-prompts 32 --prompt-tokens 256 --output-tokens 1024 ;;
    B) offline "load-b-32x256+8192${2:-}" --num-prompts 32 --prompt-tokens 256 --output-tokens 8192 ;;
    C) offline "load-c-ragged-512${2:-}" --repeats "$REPEATS" --num-prompts 512 --workload ragged ;;
    D) offline "load-d-1x256+512${2:-}" --repeats "$REPEATS" --num-prompts 1 --prompt-tokens 256 --output-tokens 512 ;;
    E) offline "load-e-256x256+512${2:-}" --repeats "$REPEATS" --num-prompts 256 --prompt-tokens 256 --output-tokens 512 ;;
  esac
}

EVERY_FEATURE='{"temperature":0.8,"top_k":50,"top_p":0.95,"min_p":0.01,"repetition_penalty":1.1,"presence_penalty":0.2,
  "frequency_penalty":0.1,"min_tokens":1000,"stop_token_ids":[7,8],"logit_bias":{"300":1.5,"301":-1.5,"302":-100},
  "bad_words_token_ids":[[400],[401,402],[403,404,405]]}'
STRUCTURED='{"ignore_eos":false,"structured_outputs":{"json":{"type":"object","required":["names"],"properties":{"names":
  {"type":"array","minItems":2000,"items":{"type":"string","minLength":3,"maxLength":40}}}}}}'

with_sampling() { # with_sampling NAME PARAMETERS FLAGS…: load A with these sampling parameters
  local name=$1 parameters=$2
  shift 2
  offline "load-a-32x256+1024-$name" --repeats "$REPEATS" --num-prompts 32 --prompt-tokens 256 --output-tokens 1024 \
    --sampling-params "$parameters" "$@"
}

peer() { # peer FIGURE FLAGS…: the fast path with compilation, asynchronous
  local name=$1
  shift
  echo "--- transformers, load $name"
  if [[ ! -f $PEER ]]; then
    echo "no peer: set PEER to the script of its benchmark"
    return
  fi
  "$PYTHON" "$PEER" --attn torch-fa2-decode --mode async --compile-level 1 --skip-selftest \
    --json "$prefix-peer-${name,,}.jsonl" "$@" 2>&1 | tail -n 3
}

# One worker under torch.profiler's eyes, five seconds of each load; the loads' own files tell the live figures.
watch_idle() { # watch_idle LOADS
  stop_service; running=
  "${tandem[@]}" scheduler --address "ipc://$home/service" --no-enable-prefix-caching >"$home/scheduler.log" 2>&1 &
  local scheduler=$! number=0 name worker watched
  worker='{"name":"watched","scheduler":"ipc://'$home/service'","model":"bench/shapes/llama-3.1-8b","load_format":"dummy",
    "dtype":"bfloat16","max_model_len":16384,"max_num_seqs":512,"max_num_batched_tokens":4096}'
  "$PYTHON" -P -m tandem.bench.kernel_gaps "$home/profiled" 5 --config-json "$worker" >"$home/worker.log" 2>&1 &
  watched=$!
  until grep -q registered "$home/worker.log" || ! kill -0 $watched; do sleep 0.2; done
  for name in $1; do
    case $name in
      A) watch A 3 --num-prompts 32 --prompt-tokens 256 --output-tokens 1800 ;;
      B) watch B 30 --num-prompts 32 --prompt-tokens 256 --output-tokens 8192 ;;
      C) watch C 2 --num-prompts 512 --workload ragged ;;
      E) watch E 3.5 --num-prompts 256 --prompt-tokens 256 --output-tokens 768 ;;
      streams) watch streams 3.5 --num-prompts 256 --prompt-tokens 256 --output-tokens 768 --client-processes 8 ;;
    esac
  done
  kill -TERM $watched $scheduler
  wait $watched $scheduler
}

busy() { (( $(nvidia-smi -i "$gpu" --query-gpu=utilization.gpu --format=csv,noheader,nounits) > 50 )); }

watch() { # watch LOAD SECONDS FLAGS…: the profiler looks SECONDS after the device has got work, or after a minute
  local name=$1 after=$2
  shift 2
  number=$((number + 1))
  offline "idle-${name,,}-live" --num-warmups 0 "$@" &
  local load=$!
  for _ in $(seq 300); do busy && break; sleep 0.2; done
  sleep "$after"
  kill -USR1 $watched
  wait $load
  until [[ -s $home/profiled-$number.json ]] || ! kill -0 $watched; do sleep 0.2; done
  mv "$home/profiled-$number.json" "$prefix-idle-${name,,}-profiled.json"
  head -n 6 "$prefix-idle-${name,,}-profiled.json"
}

running= # which service runs
need() { # need FLAGS…; small, features: the other model
  [[ $running == "$*" && -n $service ]] || start_service $(printf "%s\n" "$@" | grep -vx -e small -e features)
  running="$*"
}

for figure in "$@"; do
  case $figure in
    A | B | C | D | E) need; load "$figure" ;;
    F) need --quantization fp8 --kv-cache-dtype fp8; load F ;;
    sync) need --lookahead 0; load A -lookahead-0; load C -lookahead-0; load E -lookahead-0 ;;
    features)
      big=${model[1]}
      [[ -d $home/made ]] || "$PYTHON" -P -m tandem.bench.vocabulary "$big" "$home/made"
      model[1]=$home/made
      need features
      model[1]=$big
      load A -with-tokenizer
      with_sampling every "$EVERY_FEATURE"
      with_sampling half-json "$STRUCTURED" --sampling-share 0.5
      ;;
    invariant)
      need; load A; load E
      need --enforce-eager; load A -eager; load E -eager
      need --batch-invariant; load A -invariant; load E -invariant
      need --batch-invariant --enforce-eager; load A -invariant-eager; load E -invariant-eager
      ;;
    small)
      big=${model[1]}
      model[1]=bench/shapes/llama-0.6b
      need small
      model[1]=$big
      load E -llama-0.6b
      ;;
    two)
      need; load A -one-worker
      need --data-parallel-size 2
      offline "load-a-64x256+1024-two-workers" --repeats "$REPEATS" --num-prompts 64 --prompt-tokens 256 --output-tokens 1024
      load A -two-workers
      ;;
    http)
      need
      for count in $GATEWAYS; do
        offline "load-e-http-$count" --repeats "$REPEATS" --num-prompts 256 --prompt-tokens 256 --output-tokens 512 \
          --client-processes 8 --backend sdk --backend openai --api-server-count "$count"
      done
      ;;
    start) need; stop_service; running=; need; offline start-first-token --num-warmups 0 --num-prompts 1 --prompt-tokens 16 --output-tokens 1 ;;
    attention)
      stop_service; running=
      for cache in bfloat16 fp8; do
        "$PYTHON" -P -m tandem.bench.attention --kv-cache-dtype $cache --out "$prefix-attention-$cache.json" \
          || echo "attention FAILED"
      done
      ;;
    products)
      stop_service; running=
      "$PYTHON" -P -m tandem.bench.products --out "$prefix-products.json" || echo "products FAILED"
      ;;
    idle) watch_idle 'A C E streams' ;;
    idle-long) watch_idle 'A C E streams B' ;;
    idle-[ABCE]) watch_idle "${figure#idle-}" ;;
    peer-A) stop_service; running=; peer A --batch 32 --prompt-len 256 --max-new-tokens 1024 --repeat 2 ;;
    peer-B) stop_service; running=; peer B --batch 32 --prompt-len 256 --max-new-tokens 8192 ;;
    peer-C) stop_service; running=; peer C --mixed --batch 512 ;;
    peer-E) stop_service; running=; peer E --batch 256 --prompt-len 256 --max-new-tokens 512 --repeat 2 ;;
    *) echo "no figure $figure"; exit 2 ;;
  esac
done
