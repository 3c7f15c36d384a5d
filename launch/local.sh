#!/usr/bin/env bash
# 2 processes of 2 CPU devices on this machine, for trying: mesh data 1 x fsdp 4 x seq 1 x tensor 1.
# Made by: jvgen launch local configs/demo_image_vae.py --topology cpu:2x2 --workdir runs/local
# Start it in the repository. Ctrl-C or SIGTERM saves and ends it; the same command continues.
set -u

CONFIG=configs/demo_image_vae.py
WORKDIR=runs/local
PROCESSES=2
DEVICES=2
MAX_RESTARTS=50
LOGS=$WORKDIR/processes

export PATH="$PWD/.venv/bin:$PATH" JAX_PLATFORMS=cpu
# The last of two equal flags counts.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
export JVGEN_RESTART_CODE=75
mkdir -p "$LOGS"
stopping=
pids=()
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

for ((attempt = 0; ; attempt++)); do
  pids=()
  port=$((20000 + RANDOM % 20000))
  for ((id = 0; id < PROCESSES; id++)); do
    (
      export JVGEN_COORDINATOR=127.0.0.1:$port JVGEN_PROCESSES=$PROCESSES JVGEN_PROCESS_ID=$id
      # `exec`: signals and exit codes are those of the program.
      exec jvgen train "$CONFIG" --workdir "$WORKDIR" >>"$LOGS/$id.log" 2>&1
    ) &
    pids+=("$!")
  done
  echo "attempt $attempt: $PROCESSES processes ${pids[*]}, logs in $LOGS"

  codes=()
  for pid in "${pids[@]}"; do
    # A signal to this script ends `wait` early.
    until wait "$pid"; code=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
    codes+=("$code")
  done
  echo "exit codes ${codes[*]}"

  worst=0
  for code in "${codes[@]}"; do
    case $code in
      # A restart does not help: docs/resume.md#exit-codes.
      1 | 2 | 65 | 74) exit "$code" ;;
      0) ;;
      *) worst=$code ;;
    esac
  done
  [ "$worst" -eq 0 ] && exit 0
  [ -n "$stopping" ] && exit "$worst"
  if [ "$attempt" -ge "$MAX_RESTARTS" ]; then
    echo "gave up after $MAX_RESTARTS restarts" >&2
    exit "$worst"
  fi
done
