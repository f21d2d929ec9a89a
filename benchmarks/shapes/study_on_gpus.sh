#!/usr/bin/env bash
# The study on all GPUs, in the background, the main line first; call it again to go on waiting.
#   bash benchmarks/shapes/study_on_gpus.sh OUT SECONDS
# After SECONDS, or once everything is there, what has been found is in OUT/study.tar.gz: measurements, metrics, logs,
# and the main line's generators.
set -uo pipefail
out=$1
seconds=$2
runs=build/study
export PYTHONUNBUFFERED=1
mkdir -p "$out" "$runs"
study="python3 -m benchmarks.shapes.study"
common="--out $runs --seeds 0 1 2 --parallel 2"
steps="$study train $common --only ac_dmd rtdmd; $study measure $common --only rtdmd; $study train $common"
if [ ! -e "$runs/started" ]; then
  touch "$runs/started"
  setsid bash -c "$steps; $study measure $common; touch $runs/finished" >"$runs/progress.txt" 2>&1 </dev/null &
fi
until [ "$SECONDS" -ge "$seconds" ] || [ -e "$runs/finished" ]; do sleep 2; done
cat "$runs/progress.txt"
(cd "$runs" && find . -name '*.json' -o -name 'metrics.jsonl' -o -path './logs/*' -o -path './*ac_dmd-*/generator_ema.pt' \
  -o -path './rtdmd-*/rtdmd/generator_ema.pt' | grep -v checkpoints | tar czf - -T -) >"$out/study.tar.gz"
ls -l "$out/study.tar.gz"
