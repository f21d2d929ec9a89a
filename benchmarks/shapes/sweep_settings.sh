#!/usr/bin/env bash
# Settings of the small world tried side by side, eight processes a GPU:  bash benchmarks/shapes/sweep_settings.sh OUT [SECONDS SECONDS]
# Lines of JSON in OUT/sweep.jsonl; what the processes say in build/sweep.
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

small="cold_start.batch_size=16 rtdmd.sample_batch_size=32 rtdmd.num_sample_batches=1 rtdmd.images_per_prompt=8
  rtdmd.score_batch_size=32 rtdmd.reward_backprop.micro_batch_size=32 cold_start.ema_decay=0.8 rtdmd.ema_decay=0.7"
large="cold_start.batch_size=64 rtdmd.num_sample_batches=1 cold_start.ema_decay=0.95"
cold=${2:-110}
rtdmd=${3:-110}

# As the demo: small batches, few updates.
try d-base "$cold" "$rtdmd" $small $(rates 1e-3 1e-3) cold_start.generator_every=2 schedule.shift=1.5
try d-fast "$cold" "$rtdmd" $small $(rates 2e-3 2e-3) cold_start.generator_every=2 schedule.shift=1.5 \
  rtdmd.generator.learning_rate=1e-3
try d-each "$cold" "$rtdmd" $small $(rates 1e-3 2e-3) cold_start.generator_every=1 schedule.shift=1.5 \
  rtdmd.generator.learning_rate=5e-4
try d-shift "$cold" "$rtdmd" $small $(rates 1e-3 1e-3) cold_start.generator_every=2 schedule.shift=2.5 \
  rtdmd.generator.learning_rate=5e-4 rtdmd.reward_backprop.weight=0.5
# At length.
try f-base "$cold" "$rtdmd" $large $(rates 5e-4 5e-4) schedule.shift=1.5
try f-slow "$cold" "$rtdmd" $large $(rates 2e-4 2e-4) schedule.shift=1.5 rtdmd.generator.learning_rate=5e-4
try f-fast "$cold" "$rtdmd" $large $(rates 1e-3 1e-3) schedule.shift=1.5 rtdmd.distribution_matching_weight=0.5
try f-often "$cold" "$rtdmd" $large $(rates 5e-4 1e-3) cold_start.generator_every=2 schedule.shift=1.5 \
  rtdmd.reward_backprop.weight=0.5
try f-shift1 "$cold" "$rtdmd" $large $(rates 5e-4 1e-3) cold_start.generator_every=2 schedule.shift=1.0 \
  rtdmd.distribution_matching_weight=0.5 rtdmd.reward_backprop.weight=0.5
try f-shift3 "$cold" "$rtdmd" $large $(rates 5e-4 1e-3) cold_start.generator_every=2 schedule.shift=3.0 \
  rtdmd.distribution_matching_weight=0.5 rtdmd.reward_backprop.weight=2
try f-guide4 "$cold" "$rtdmd" $large $(rates 5e-4 1e-3) cold_start.generator_every=2 schedule.shift=1.5 \
  model.guidance_scale=4 rtdmd.distribution_matching_weight=0.5 rtdmd.policy_weight=0.1
try f-rate "$cold" "$rtdmd" $large $(rates 5e-4 1e-3) cold_start.generator_every=2 schedule.shift=1.5 \
  rtdmd.generator.learning_rate=1e-3 rtdmd.distribution_matching_weight=0.5
wait
wc -l "$out/sweep.jsonl"
for file in build/sweep/*.txt; do [ "$(grep -c Error "$file")" = 0 ] || { echo "$file"; tail -n 4 "$file"; }; done
