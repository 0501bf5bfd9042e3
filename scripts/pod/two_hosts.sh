#!/usr/bin/env bash
# Two processes on this machine stand in for two hosts, with two forced CPU devices each.
#
#   scripts/pod/two_hosts.sh sweep --config seeds_mini:cases=2,seeds=2,unit=8 --out runs/two
#   scripts/pod/two_hosts.sh sample --mesh fsdp=2,context=2 --image ... --prompt ... --out runs/one
set -euo pipefail

export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=2

JAX_PROCESS_ID=1 videoreason "$@" &
other=$!
trap 'kill "$other" 2>/dev/null || true' EXIT
JAX_PROCESS_ID=0 videoreason "$@"
wait "$other"
trap - EXIT
