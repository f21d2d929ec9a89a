#!/usr/bin/env bash
# Training steps at true size, one GPU:  bash benchmarks/full_size_runs.sh OUT CASE…
# JSON and what the processes say in OUT/CASE.*; cases below. PROCESSES=2 starts a case on two GPUs; STEPS, WARMUP and
# STOPS say what is measured. benchmarks/lists has lists of cases for benchmarks/jobs.py.
set -uo pipefail
out=$1
shift
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
mkdir -p "$out"

separate=(with=recipes/layouts/separate_zero3.yaml)
replicated=("${separate[@]}" roles.teacher.engine=ds_configs/zero0.json roles.generator.engine=ds_configs/zero2.json
  roles.fake_score.engine=ds_configs/zero2.json)
shared=(with=recipes/layouts/shared_base.yaml) # compiled too
in_shards=(roles.whole_blocks=0) # nothing but the ends of a base stays whole; *_recipe keep what there is room for
compiled=(roles.teacher.compile=blocks roles.generator.compile=blocks roles.fake_score.compile=blocks)
offloaded=(model.text_encoder=offload roles.teacher.engine=ds_configs/frozen_zero3_offload.json
  roles.generator.engine=ds_configs/frozen_zero3_offload.json roles.fake_score.engine=ds_configs/frozen_zero3_offload.json)
in_pairs() { # every two GPUs have the base once
  sed 's/"stage": 3,/"stage": 3, "zero_hpz_partition_size": 2,/' ds_configs/frozen_zero3.json >"$out/pairs.json"
  for role in teacher generator fake_score; do echo "roles.$role.engine=$out/pairs.json"; done
}
recompute() { echo "roles.generator.activation_checkpointing=$1 roles.fake_score.activation_checkpointing=$1"; }
# The time of an iteration is linear in the stop index: 1 and 4 have the mean of 1 to 4.
steps=(--steps "${STEPS:-8}" --warmup "${WARMUP:-2}" --phase-steps 1 --no-save)
short=(--stops ${STOPS:-1 4} "${steps[@]}")
# 12 pictures in 2 batches of 6, clipscore alone: what the published code was timed with.
tuning=(--stage rtdmd "${steps[@]}" "rewards=[{name: clipscore}]")
recomputed=(rtdmd.reward_backprop.recompute_decoder=true)
rtdmd=("${tuning[@]}" rtdmd.micro_batch_size=2 rtdmd.reward_backprop.micro_batch_size=2 "${recomputed[@]}")
ones=(rtdmd.fake_score_micro_batch_size=1)
singly=(rtdmd.reward_backprop.micro_batch_size=1 "${recomputed[@]}")

run() { # NAME arguments of train_step …
  local name=$1 start=$SECONDS code
  shift
  if [ "${PROCESSES:-1}" = 1 ]; then
    python3 -m benchmarks.train_step "$@" --output "$out/$name.json" >"$out/$name.txt" 2>&1
  else
    python3 -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" -m benchmarks.train_step "$@" \
      --output "$out/$name.json" >"$out/$name.txt" 2>&1
  fi
  code=$?
  [ "$code" = 0 ] || failed=1
  echo "$name: exit code $code after $((SECONDS - start)) s"
  tail -n 30 "$out/$name.txt" | grep -v Warning | cut -c1-300
}

failed=0
for name in "$@"; do
  case $name in
    cold) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute none) cold_start.micro_batch_size=3 "${short[@]}" ;;
    cold_auto) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute auto) "${short[@]}" ;;
    cold_full) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute full) cold_start.micro_batch_size=3 model.text_encoder=offload "${short[@]}" ;;
    cold_eager) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" $(recompute none) cold_start.micro_batch_size=3 "${short[@]}" ;;
    cold_zero3) run "$name" recipes/flux2_4b.yaml "${separate[@]}" "${short[@]}" ;;
    baseline) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute none) cold_start.micro_batch_size=3 "${short[@]}" --baseline ;;
    rtdmd) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute none) "${rtdmd[@]}" rtdmd.fake_score_micro_batch_size=3 ;;
    rtdmd_full) run "$name" recipes/flux2_4b.yaml "${replicated[@]}" "${compiled[@]}" $(recompute full) "${rtdmd[@]}" rtdmd.fake_score_micro_batch_size=3 ;;
    cold_shared) run "$name" recipes/flux2_4b.yaml $(recompute none) "${shared[@]}" "${short[@]}" ;;
    cold_sharded) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" roles.gather=collective "${short[@]}" ;;
    cold_copied) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" "${short[@]}" ;;
    cold_recipe) run "$name" recipes/flux2_4b.yaml "${short[@]}" ;;
    cold_parts) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" $(in_pairs) "${short[@]}" ;;
    cold_zero1) run "$name" recipes/flux2_4b.yaml "${replicated[@]//zero2/zero1}" "${compiled[@]}" $(recompute none) cold_start.micro_batch_size=3 "${short[@]}" ;;
    cold_offload) run "$name" recipes/flux2_4b.yaml "${offloaded[@]}" $(recompute full) cold_start.micro_batch_size=1 "${short[@]}" ;;
    cold_1024) run "$name" recipes/flux2_4b.yaml "${shared[@]}" $(recompute full) model.height=1024 model.width=1024 cold_start.micro_batch_size=1 "${short[@]}" ;;
    cold_lean) run "$name" recipes/flux2_4b.yaml "${shared[@]}" $(recompute full) "${short[@]}" ;;
    rtdmd_shared) run "$name" recipes/flux2_4b.yaml $(recompute none) "${shared[@]}" "${tuning[@]}" "${recomputed[@]}" "${ones[@]}" ;;
    rtdmd_kept) run "$name" recipes/flux2_4b.yaml $(recompute none) "${shared[@]}" "${tuning[@]}" "${ones[@]}" ;;
    rtdmd_copied) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" "${tuning[@]}" "${ones[@]}" ;;
    rtdmd_recipe) run "$name" recipes/flux2_4b.yaml "${tuning[@]}" ;;
    rtdmd_ones) run "$name" recipes/flux2_4b.yaml $(recompute none) "${tuning[@]}" "${ones[@]}" ;;
    rtdmd_half) run "$name" recipes/flux2_4b.yaml $(recompute none) roles.whole_blocks=12 "${tuning[@]}" "${ones[@]}" ;;
    rtdmd_twos) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" "${tuning[@]}" ;;
    rtdmd_threes) run "$name" recipes/flux2_4b.yaml $(recompute none) "${in_shards[@]}" "${tuning[@]}" rtdmd.fake_score_micro_batch_size=3 ;;
    nine_sharded) run "$name" recipes/flux2_9b.yaml "${in_shards[@]}" $(recompute full) "${short[@]}" ;;
    nine_sharded_rtdmd) run "$name" recipes/flux2_9b.yaml "${in_shards[@]}" $(recompute full) "${tuning[@]}" "${singly[@]}" "${ones[@]}" ;;
    nine_threes_rtdmd) run "$name" recipes/flux2_9b.yaml "${in_shards[@]}" $(recompute full) "${tuning[@]}" ;;
    nine_recipe_rtdmd) run "$name" recipes/flux2_9b.yaml "${tuning[@]}" ;;
    nine_recipe) run "$name" recipes/flux2_9b.yaml "${short[@]}" ;;
    nine_full) run "$name" recipes/flux2_9b.yaml $(recompute full) "${short[@]}" ;;
    nine_full_rtdmd) run "$name" recipes/flux2_9b.yaml $(recompute full) "${tuning[@]}" ;;
    nine_ones) run "$name" recipes/flux2_9b.yaml $(recompute none) cold_start.micro_batch_size=1 "${short[@]}" ;;
    nine) run "$name" recipes/flux2_9b.yaml "${separate[@]}" "${short[@]}" ;;
    nine_rtdmd) run "$name" recipes/flux2_9b.yaml "${separate[@]}" "${tuning[@]}" "${singly[@]}" ;;
    nine_lean) run "$name" recipes/flux2_9b.yaml "${shared[@]}" $(recompute full) model.text_encoder=offload "${short[@]}" ;;
    nine_lean_rtdmd) run "$name" recipes/flux2_9b.yaml "${shared[@]}" $(recompute full) model.text_encoder=offload "${tuning[@]}" "${singly[@]}" "${ones[@]}" ;;
    sd35) run "$name" recipes/sd35m.yaml "${replicated[@]}" "${compiled[@]}" $(recompute none) "${short[@]}" ;;
    sd35_shared) run "$name" recipes/sd35m.yaml "${shared[@]}" $(recompute none) "${short[@]}" --baseline ;;
    sd35_rtdmd) run "$name" recipes/sd35m.yaml "${tuning[@]}" ;;
    sd3_rtdmd) run "$name" recipes/sd3m.yaml "${tuning[@]}" ;;
    sd3_shared) run "$name" recipes/sd3m.yaml "${shared[@]}" $(recompute selective) "${short[@]}" ;;
    sd3_recipe) run "$name" recipes/sd3m.yaml "${short[@]}" ;;
    sd3_full_rtdmd) run "$name" recipes/sd3m.yaml $(recompute full) "${tuning[@]}" "${recomputed[@]}" ;;
    *) failed=1; echo "$name: no such case" >&2 ;;
  esac
done
exit $failed
