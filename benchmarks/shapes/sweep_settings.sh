#!/usr/bin/env bash
# Settings of the small world tried side by side on all GPUs:  bash benchmarks/shapes/sweep_settings.sh OUT [SECONDS SECONDS]
# The demo's, whole, first; then those of recipes/shapes.yaml for so many seconds a stage. Lines of JSON in OUT/sweep.jsonl;
# what the processes say is in build/sweep.
set -uo pipefail
out=$1
gpus=$(nvidia-smi -L | wc -l)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$out" build/sweep
number=0

try() { # NAME COLD_SECONDS RTDMD_SECONDS key=value …
  local name=$1 cold=$2 rtdmd=$3
  shift 3
  MASTER_PORT=$((29500 + number)) CUDA_VISIBLE_DEVICES=$((number % gpus)) \
    python3 -m benchmarks.shapes.sweep "$name" "$@" --seconds "$cold" "$rtdmd" >>"$out/sweep.jsonl" 2>"build/sweep/$name.txt" &
  number=$((number + 1))
}

rates() { echo "cold_start.generator.learning_rate=$1 cold_start.fake_score.learning_rate=$2"; }

wide="lora.init_std.cold_start=0.1"
# One process stands for the demo's two ranks.
demo="--recipe recipes/demo.yaml --every 1000 cold_start.batch_size=16 rtdmd.sample_batch_size=32 rtdmd.reward_backprop.micro_batch_size=32"
low="$(rates 3e-4 6e-4) cold_start.ema_decay=0.9"
middle="$(rates 5e-4 1e-3) cold_start.ema_decay=0.9"
try d-low 300 300 $demo $wide $low
try d-middle 300 300 $demo $wide $middle
try d-shift 300 300 $demo $wide $low schedule.shift=2.5
try d-guide 300 300 $demo $wide $low schedule.shift=2.0 model.guidance_scale=4
try d-large 300 300 $demo $wide $middle cold_start.batch_size=32 cold_start.iterations=45 cold_start.ema_decay=0.85
try d-half 300 300 $demo $wide $middle cold_start.iterations=120 cold_start.generator_every=2
try d-wider 300 300 $demo lora.init_std.cold_start=0.2 $(rates 2e-4 4e-4) cold_start.ema_decay=0.9
try d-both 300 300 $demo $wide $low lora.init_std.rtdmd=0.1 rtdmd.generator.learning_rate=2e-4 rtdmd.fake_score.learning_rate=6e-4
try d-rate 300 300 $demo $wide $low rtdmd.generator.learning_rate=6e-4
try d-reward 300 300 $demo $wide $low rtdmd.distribution_matching_weight=0.25 rtdmd.generator.learning_rate=5e-4
wait
# At length.
long="cold_start.batch_size=64 cold_start.generator_every=2 rtdmd.num_sample_batches=1 rtdmd.ema_decay=0.9 --every 50"
cold=${2:-190}
rtdmd=${3:-190}
tune() { echo "rtdmd.distribution_matching_weight=$1 rtdmd.reward_backprop.weight=$2 rtdmd.generator.learning_rate=$3"; }
try f-base "$cold" "$rtdmd" $long $middle schedule.shift=1.5 $(tune 0.5 2 3e-4)
try f-shift "$cold" "$rtdmd" $long $middle schedule.shift=3 $(tune 0.5 2 3e-4)
try f-wide "$cold" "$rtdmd" $long $wide $low schedule.shift=2 $(tune 0.5 2 3e-4)
try f-guide "$cold" "$rtdmd" $long $middle schedule.shift=2 model.guidance_scale=4 $(tune 0.5 1 3e-4)
try f-wide-fast "$cold" "$rtdmd" $long $wide $middle schedule.shift=2 $(tune 0.25 2 5e-4)
try f-all "$cold" "$rtdmd" $long $wide $middle schedule.shift=3 model.guidance_scale=4 cold_start.ema_decay=0.98 $(tune 1 4 3e-4)
try f-large "$cold" "$rtdmd" $long $middle cold_start.batch_size=128 schedule.shift=2 $(tune 0.5 2 5e-4) rtdmd.num_sample_batches=2
try f-policy "$cold" "$rtdmd" $long $wide $low schedule.shift=2.5 $(tune 0.2 0.5 3e-4)
wait
wc -l "$out/sweep.jsonl"
for file in build/sweep/*.txt; do [ "$(grep -c Error "$file")" = 0 ] || { echo "$file"; tail -n 4 "$file"; }; done
