#!/usr/bin/env bash
# One run over two machines with 8 GPUs each: the same line on both, NODE_RANK 0 on the first and 1 on the second.
# HEAD is the address of the first machine. --output_dir must lie on storage that both machines share.
#
#   HEAD=10.0.0.1 NODE_RANK=0 bash examples/two_nodes.sh ...the flags of the run...
#   HEAD=10.0.0.1 NODE_RANK=1 bash examples/two_nodes.sh ...the same flags...
#
# A machine or process that dies is noticed within a minute; everybody starts again from the last checkpoint, up to
# three times. Ctrl-C or SIGTERM saves once and ends; ten minutes are given for that.
set -euo pipefail

# Every restart gets a store of its own; a store that outlives one still holds the addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes 2 --node_rank "${NODE_RANK:?0 on the first machine, 1 on the second}" \
  --nproc_per_node "${GPUS_PER_NODE:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:?address of the first machine}:${PORT:-29500}" --rdzv_id "${RUN_ID:-vflora}" \
  --max_restarts 3 --shutdown_timeout 600 \
  train.py --resume_from_checkpoint auto "$@"
