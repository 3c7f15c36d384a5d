#!/usr/bin/env bash
# In the node of slurm_node.sh: submit `job`, tell it to stop after some steps, let it continue, wait for its end.
set -eu
rows() { cat run/metrics.jsonl 2>/dev/null | wc -l; }
state() { squeue --noheader --jobs="$job" --states=all --format=%T; }
until_true() {
  for _ in $(seq 1500); do
    "$@" && return
    case $(state) in FAILED | CANCELLED | TIMEOUT | NODE_FAIL) return 1 ;; esac
    sleep 0.2
  done
  return 1
}
has_rows() { [ "$(rows)" -ge "$1" ]; }
is() { [ "$(state)" = "$1" ]; }

shellcheck --shell=bash job ./*.shell
sbatch --test-only job
job=$(sbatch --parsable job)
until_true has_rows 6
scancel --signal=TERM "$job"
until_true is PENDING
echo "requeued after $(rows) steps"
# Slurm holds a requeued job for two minutes.
scontrol update JobId="$job" StartTime=now
until_true is COMPLETED
scontrol show job "$job"
