#!/usr/bin/env bash
# A real Slurm of one node on loopback, for tests: `cluster.sh start FOLDER`, `cluster.sh stop FOLDER`. Needs root and
# Debian's slurm-wlm and munge; everything that it writes lies in FOLDER, and SLURM_CONF=FOLDER/slurm.conf uses it.
set -euo pipefail
command=$1
folder=$(realpath -m "$2")
host=$(hostname -s)

start() {
    mkdir -p "$folder"/{state,spool,log,munge}
    # munged refuses folders that others could write to, and a key that others could read.
    chown root:root "$folder/munge" && chmod 755 "$folder" "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
    chmod 400 "$folder/munge/key"
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
ReturnToService=2
JobRequeue=1
MinJobAge=600
KillWait=60
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=60 State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        sinfo --noheader --format=%T 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    tail -n 20 "$folder"/log/* >&2
    return 1
}

stop() {
    for name in slurmd slurmctld munge/pid; do
        file="$folder/${name%.pid}"
        [ -f "$file.pid" ] && file="$file.pid"
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

"$command"
