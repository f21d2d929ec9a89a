#!/usr/bin/env bash
# Settings of the small world tried side by side on all GPUs:  bash benchmarks/shapes/sweep_settings.sh OUT demo|shapes [SECONDS SECONDS]
# `demo`: recipes/demo.yaml, whole runs. `shapes`: recipes/shapes.yaml, so many seconds a stage. Lines of JSON in
# OUT/sweep.jsonl; what the processes say is in build/sweep.
set -uo pipefail
out=$1
what=$2
cold=${3:-420}
rtdmd=${4:-440}
gpus=$(nvidia-smi -L | wc -l)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
mkdir -p "$out" build/sweep
number=0

try() { # NAME key=value …
  local name=$1
  shift
  MASTER_PORT=$((29500 + number)) CUDA_VISIBLE_DEVICES=$((number % gpus)) \
    python3 -m benchmarks.shapes.sweep "$name" --seconds "$cold" "$rtdmd" "$@" >>"$out/sweep.jsonl" 2>"build/sweep/$name.txt" &
  number=$((number + 1))
}

rates() { echo "cold_start.generator.learning_rate=$1 cold_start.fake_score.learning_rate=$2"; }
tune() { # policy, distribution matching, back-propagation, learning rate
  echo "rtdmd.policy_weight=$1 rtdmd.distribution_matching_weight=$2 rtdmd.reward_backprop.weight=$3 rtdmd.generator.learning_rate=$4"
}
wide="lora.init_std.cold_start=0.1"

if [ "$what" = demo ]; then
  # One process stands for the demo's two ranks.
  set -- --recipe recipes/demo.yaml --every 1000 $wide cold_start.ema_decay=0.9 \
    cold_start.batch_size=16 rtdmd.sample_batch_size=32 rtdmd.reward_backprop.micro_batch_size=32
  low=$(rates 3e-4 6e-4)
  middle=$(rates 5e-4 1e-3)
  try d-low "$@" $low
  try d-middle "$@" $middle
  try d-shift "$@" $low schedule.shift=2.5
  try d-guide "$@" $low schedule.shift=2.0 model.guidance_scale=4
  try d-large "$@" $middle cold_start.batch_size=32 cold_start.iterations=45 cold_start.ema_decay=0.85
  try d-half "$@" $middle cold_start.iterations=120 cold_start.generator_every=2
  try d-wider "$@" $(rates 2e-4 4e-4) lora.init_std.cold_start=0.2
  try d-both "$@" $low lora.init_std.rtdmd=0.1 rtdmd.generator.learning_rate=2e-4 rtdmd.fake_score.learning_rate=6e-4
  try d-rate "$@" $low rtdmd.generator.learning_rate=6e-4
  try d-reward "$@" $low rtdmd.distribution_matching_weight=0.25 rtdmd.generator.learning_rate=5e-4
else
  # Longer than the recipe, to see where to stop.
  set -- --every 60 --captions 512 --keep "$out" cold_start.iterations=20000 rtdmd.epochs=20000
  try s-plain "$@" schedule.shift=2.5 model.guidance_scale=3 $(tune 1 0.2 0.4 3e-4)
  try s-guide "$@" schedule.shift=3 model.guidance_scale=4 $(tune 1 1 4 3e-4)
fi
wait
wc -l "$out/sweep.jsonl"
for file in build/sweep/*.txt; do [ "$(grep -c Error "$file")" = 0 ] || { echo "$file"; tail -n 4 "$file"; }; done
