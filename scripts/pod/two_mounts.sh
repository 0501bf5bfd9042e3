#!/usr/bin/env bash
# As `two_hosts.sh`, each host with a mount of its own of one flat bucket (`bucket.py`), at /tmp/bucket.
#
#   scripts/pod/two_mounts.sh sweep --config seeds_mini:cases=2,seeds=2,unit=8 --out /tmp/bucket/two
#   LIMIT=1000000 scripts/pod/two_mounts.sh sample --mesh fsdp=2,context=2 --image ... --prompt ... --out /tmp/bucket/one
#
# LIMIT: files of a folder that is renamed. Needs root on Linux, FUSE and `pip install mfusepy`. The objects stay in
# STORE; MOUNTS holds the two mounts while it runs.
set -euo pipefail

STORE=${STORE:-/tmp/bucket.objects} MOUNTS=${MOUNTS:-/tmp/bucket.mounts} LIMIT=${LIMIT:-0}
here=$(cd "$(dirname "$0")" && pwd)
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=2

mkdir -p /tmp/bucket
trap 'umount -l "$MOUNTS"/0 "$MOUNTS"/1 2>/dev/null || true' EXIT
for host in 0 1; do
  mkdir -p "$MOUNTS/$host"
  python "$here/bucket.py" "$STORE" "$MOUNTS/$host" --rename-dir-limit "$LIMIT" &
done
for host in 0 1; do
  until mountpoint -q "$MOUNTS/$host"; do sleep .1; done
done

host() { # number, command: it sees that mount as /tmp/bucket, and no other process does
  JAX_PROCESS_ID=$1 unshare --mount bash -c 'mount --bind "$0" /tmp/bucket && exec videoreason "$@"' "$MOUNTS/$1" "${@:2}"
}

host 1 "$@" &
other=$!
host 0 "$@"
wait "$other"
