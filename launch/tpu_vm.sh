#!/usr/bin/env bash
# 1 slice of v5p:4x4x8 (v5p-256) as Cloud TPU VMs: 32 VMs, one process each, mesh data 1 x fsdp 32 x seq 4 x tensor 1.
# Made by: jvgen launch tpu-vm configs/cogvideox_2b.py --topology v5p:4x4x8 --workdir gs://BUCKET/runs/cogvideox_2b --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/jvgen:tpu --zone ZONE --project PROJECT
# Change the names here; make everything else again by that command, because its numbers belong together.
#   bash tpu_vm.sh up        order the VMs, wait for them, start training
#   bash tpu_vm.sh keep      the same, and order again what is preempted, until training ends
#   bash tpu_vm.sh create | wait | start | stop | restart | status | logs | delete     one step
# On each VM a systemd unit runs the container and starts it again on the exit codes that allow it. `stop` saves.
set -euo pipefail

NAME=cogvideox-2b
PROJECT=PROJECT
ZONE=ZONE
IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/jvgen:tpu
WORKDIR=gs://BUCKET/runs/cogvideox_2b
SLICES=1
POLL_SECONDS=${POLL_SECONDS:-30}

UNIT=$(
  cat <<EOF
[Unit]
Description=jvgen
Requires=docker.service
After=docker.service network-online.target
Wants=network-online.target
StartLimitIntervalSec=30d
StartLimitBurst=51

[Service]
ExecStartPre=-/usr/bin/docker rm --force jvgen
# After a kill the chips stay busy for a while, and libtpu crashes on busy chips.
ExecStartPre=-/usr/bin/timeout 120 /bin/sh -c "while fuser -s /dev/vfio/[0-9]* /dev/accel[0-9]*; do sleep 1; done"
ExecStart=/usr/bin/docker run --rm --name jvgen --privileged --user root --network host --shm-size 16g \\
  --env "JVGEN_RESTART_CODE=75" \\
  --env "LIBTPU_INIT_ARGS=--xla_tpu_enable_sparse_core_collective_offload_all_gather=true --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true" \\
  $IMAGE "train" "configs/cogvideox_2b.py" "--workdir" "${WORKDIR//%/%%}"
ExecStop=/usr/bin/docker stop --time 120 jvgen
TimeoutStartSec=infinity
TimeoutStopSec=150
Restart=on-failure
RestartSec=10
# A restart does not help: docs/resume.md#exit-codes.
RestartPreventExitStatus=1 2 65 74

[Install]
WantedBy=multi-user.target
EOF
)

tpu() { gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT" --quiet; }

nodes() {
  if [ "$SLICES" -eq 1 ]; then echo "$NAME"; else seq -f "$NAME-%.0f" 0 $((SLICES - 1)); fi
}

# On every VM of every slice; fails if one of them does.
remote() {
  local node status=0
  for node in $(nodes); do tpu tpu-vm ssh "$node" --worker=all --command="$1" </dev/null || status=$?; done
  return "$status"
}

# ABSENT where Google Cloud says so; a call that failed otherwise says nothing of the machines.
state() {
  local answer
  if answer=$(tpu queued-resources describe "$NAME" --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

create() {
  local place=(--node-id="$NAME")
  [ "$SLICES" -gt 1 ] && place=(--node-count="$SLICES" --node-prefix="$NAME")
  tpu queued-resources create "$NAME" "${place[@]}" --accelerator-type=v5p-256 \
    --runtime-version=v2-alpha-tpuv5
}

wait_for_vms() {
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | ABSENT)
        echo "queued resource $NAME is $now" >&2
        return 1
        ;;
    esac
    echo "$(date +%T) $NAME is $now"
    sleep "$POLL_SECONDS"
  done
}

start() {
  remote "set -e
sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet
sudo docker pull --quiet $IMAGE
sudo tee /etc/systemd/system/jvgen.service >/dev/null <<'UNIT'
$UNIT
UNIT
sudo systemctl daemon-reload
sudo systemctl reset-failed jvgen 2>/dev/null || true
sudo systemctl enable --quiet jvgen
sudo systemctl restart --no-block jvgen"
}

stop() { remote 'sudo systemctl disable --quiet --now jvgen'; }

delete() { tpu queued-resources delete "$NAME" --force; }

# active, activating, inactive (finished) or failed, on the first VM.
training() {
  local node
  node=$(nodes)
  tpu tpu-vm ssh "${node%%$'\n'*}" --worker=0 --command='systemctl is-active jvgen || true' </dev/null
}

up() {
  case $(state) in
    ABSENT) create || return ;;
    UNKNOWN) return 1 ;;
  esac
  wait_for_vms && start
}

# Preempted VMs do not come back: they are deleted, which also frees their quota, and ordered again.
drop_lost() { case $(state) in FAILED | SUSPENDED) delete ;; esac }

keep() {
  while true; do
    # A VM on which nothing was started would look like one on which training has ended.
    up || { sleep "$POLL_SECONDS"; drop_lost; continue; }
    while [[ $(state) == @(ACTIVE|UNKNOWN) ]]; do
      case $(training 2>/dev/null || true) in
        inactive) echo "training ended"; return 0 ;;
        failed) echo "training failed; see: bash $0 logs" >&2; return 1 ;;
      esac
      sleep "$POLL_SECONDS"
    done
    drop_lost
    sleep "$POLL_SECONDS"
  done
}

case ${1:-} in
  up | keep | create | start | stop | delete) "$1" ;;
  wait) wait_for_vms ;;
  restart) stop; start ;;
  status) state; training ;;
  logs) remote 'sudo journalctl --unit=jvgen --lines=200 --no-pager' ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
