#!/bin/sh
# An example: Cloud Hypervisor on a disk that vhost-user-blkmq serves.
#
#   qemu/cloud-hypervisor.sh SOCKET FIRMWARE [CLOUD-HYPERVISOR OPTIONS]
#
# FIRMWARE is what boots from the disk, e.g. rust-hypervisor-fw or Cloud Hypervisor's OVMF (CLOUDHV.fd).
# Needs KVM. VCPUS (4) and MEM (2G) may be set in the environment.
set -eu
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
socket=$1 firmware=$2
shift 2
[ -S "$socket" ] || { echo "$0: $socket is no socket: is the daemon running?" >&2; exit 2; }
[ -r "$firmware" ] || { echo "$0: $firmware cannot be read" >&2; exit 2; }

# shared=on because the daemon maps the guest's memory; a queue for each vCPU, and no more than vCPUs.
# Cloud Hypervisor comes back by itself, for a minute, when the daemon is restarted.
exec cloud-hypervisor \
    --cpus "boot=${VCPUS:=4}" \
    --memory "size=${MEM:-2G},shared=on" \
    --disk "vhost_user=true,socket=$socket,num_queues=$VCPUS,queue_size=256" \
    --kernel "$firmware" \
    --console off --serial tty \
    "$@"
