#!/usr/bin/env bash
# A Cloud TPU VM slice: create it, run a command on every host, fetch the results, delete it.
#
#   scripts/pod/tpu_vm.sh create
#   scripts/pod/tpu_vm.sh run sweep --config vbvr_ensemble --checkpoint /mnt/runs/ckpt/vbvr_wan22 --out /mnt/runs/ensemble
#   scripts/pod/tpu_vm.sh fetch /mnt/runs/ensemble runs/ensemble
#   scripts/pod/tpu_vm.sh delete
#
# NAME, ZONE, TYPE and VERSION choose the slice. /mnt/runs must be one folder for all hosts (Filestore), and so the
# weights: --checkpoint /mnt/runs/ckpt/vbvr_wan22.
set -euo pipefail

NAME=${NAME:-videoreason}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-32}
VERSION=${VERSION:-v2-alpha-tpuv5}
here=$(cd "$(dirname "$0")/../.." && pwd)

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone "$ZONE" "${@:2}"; }

case "${1:-}" in
  create)
    tpu create --accelerator-type "$TYPE" --version "$VERSION"
    # tracked files alone: neither runs/ nor checkpoints travel
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$here" archive --format tar.gz -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:videoreason.tar.gz" --zone "$ZONE" --worker all
    tpu ssh --worker all --command \
      'sudo apt-get install -qy python3.11-venv && mkdir -p videoreason &&
       tar -xzf videoreason.tar.gz -C videoreason && python3.11 -m venv venv &&
       venv/bin/pip install -q -e ./videoreason "jax[tpu]"'
    ;;
  run)
    # JAX finds the other hosts by itself on Cloud TPU
    tpu ssh --worker all --command "cd videoreason && ../venv/bin/videoreason $(printf '%q ' "${@:2}")"
    ;;
  fetch)
    gcloud compute tpus tpu-vm scp --recurse "$NAME:$2" "$3" --zone "$ZONE" --worker 0
    ;;
  delete) tpu delete --quiet ;;
  *)
    sed -n '2,10p' "$0"
    exit 2
    ;;
esac
