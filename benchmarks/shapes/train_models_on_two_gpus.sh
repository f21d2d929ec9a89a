#!/usr/bin/env bash
# The small world's models on two GPUs at once, then how long the study's steps take beside the teacher's training.
#   bash benchmarks/shapes/train_models_on_two_gpus.sh OUT [SECONDS until the teacher is trained]
set -uo pipefail
out=$1
seconds=${2:-600}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
mkdir -p "$out" build/world
(
  CUDA_VISIBLE_DEVICES=0 python3 -m benchmarks.shapes.train_models --part pipeline --out build/world \
    --teacher-until "$seconds" >"$out/pipeline.txt" 2>&1
  tar -C build/world -cf "$out/pipeline.tar" pipeline pipeline.json
  echo "pipeline done after $SECONDS s"
) &
(
  CUDA_VISIBLE_DEVICES=1 python3 -m benchmarks.shapes.train_models --part clips --out build/world >"$out/clips.txt" 2>&1
  tar -C build/world -cf "$out/clips.tar" clip monitor_clip clips.json
  echo "clips done after $SECONDS s"
  export CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=1
  python3 -m benchmarks.shapes.train_models --quick --part pipeline --out build/quick >"$out/quick.txt" 2>&1
  few=(model.pipeline=build/quick/pipeline rewards.0.weights=build/world/clip cold_start.iterations=60 rtdmd.epochs=6
    preview.num_images=0)
  python3 -m benchmarks.shapes.study train "${few[@]}" --out build/timing1 --seeds 0 --parallel 1 --only ac_dmd rtdmd
  python3 -m benchmarks.shapes.study train "${few[@]}" --out build/timing8 --seeds 0 1 2 3 4 5 6 7 --parallel 8 \
    --only ac_dmd rtdmd
  for run in build/timing1/ac_dmd-0 build/timing1/rtdmd-0 build/timing8/ac_dmd-0 build/timing8/rtdmd-0; do
    echo "$run: the last steps' seconds"
    tail -n 12 "$run/metrics.jsonl" | grep -o '"seconds": [0-9.]*' | tr '\n' ' '
    echo
  done
  tail -n 15 build/timing1/logs/*.txt
  tar -cJf "$out/timing.tar.xz" build/timing1/*/metrics.jsonl build/timing8/*/metrics.jsonl build/timing*/logs
  echo "timing done after $SECONDS s"
) &
wait
tail -n 60 "$out/pipeline.txt" "$out/clips.txt"
