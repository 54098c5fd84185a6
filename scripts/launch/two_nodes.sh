#!/usr/bin/env bash
# On each of two machines that share runs/: MASTER=FIRST_MACHINE:29500 NAME=my_run two_nodes.sh
# A machine that fails is started again by the same command: the other one waits for it, up to an hour, and both go on
# from the last checkpoint. If MASTER's fails, which holds the meeting point, so does the other: start both again.
# The variable: a store that torchrun shares with its processes keeps a machine out that was not there from the start.
cd "$(dirname "$0")/../.." && TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    PET_RDZV_CONF="${PET_RDZV_CONF:-join_timeout=3600}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 \
    exec torchrun --nnodes 2 --nproc-per-node "${GPUS:-8}" --max-restarts 3 --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER:?is host:port of one of the machines}" --rdzv-id "${NAME:?is the name of the run}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/zero2.json --resume auto --name "$NAME" "$@"
