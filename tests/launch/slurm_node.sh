#!/usr/bin/env bash
# One node of Debian's Slurm, for the time of one command, that leaves nothing behind: processes and mounts of its own
# over an overlay of this machine, where only FOLDER is shared. As root:
#   unshare --mount --pid --fork --mount-proc bash slurm_node.sh FOLDER COMMAND...
# Exit status 77: Slurm cannot be installed or started here.
set -u
folder=$1
shift

if [ "${INSIDE:-}" != 1 ]; then
  layer=$(mktemp -d) && mount -t tmpfs -o size=4g none "$layer" && mkdir "$layer"/{upper,work,root} || exit 77
  root=$layer/root
  mount -t overlay overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$root" || exit 77
  mount --rbind /dev "$root/dev" && mount --rbind /sys "$root/sys" && mount -t proc proc "$root/proc" || exit 77
  mount --bind "$folder" "$root$folder" || exit 77
  cp "$0" "$root/slurm_node.sh"
  INSIDE=1 chroot "$root" bash /slurm_node.sh "$folder" "$@"
  exit
fi

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck >/dev/null 2>&1 ||
    exit 77
fi
echo "127.0.0.1 tiny" >>/etc/hosts
mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd /run/munge
cat >/etc/slurm/slurm.conf <<EOF
ClusterName=tiny
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
NodeName=tiny NodeHostname=$(hostname) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
echo IgnoreSystemd=yes >/etc/slurm/cgroup.conf
[ -f /etc/munge/munge.key ] || head -c 1024 /dev/urandom >/etc/munge/munge.key
chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
chmod 400 /etc/munge/munge.key
setpriv --reuid=munge --regid=munge --clear-groups munged || exit 77
slurmctld && slurmd || exit 77
for _ in $(seq 60); do
  sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
  sleep 0.5
done
sinfo --noheader --format=%T | grep -q idle || { tail -5 /var/log/slurm/*.log >&2; exit 77; }
cd "$folder" && "$@"
