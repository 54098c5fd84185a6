#!/usr/bin/env bash
# On each of two machines that share runs/: MASTER=FIRST_MACHINE:29500 NAME=my_run two_nodes.sh; survives failures.
cd "$(dirname "$0")/../.." && exec torchrun --nnodes 2 --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:?is host:port of one of the machines}" \
    --rdzv-id "${NAME:?is the name of the run}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/zero2.json --resume auto --name "$NAME" "$@"
