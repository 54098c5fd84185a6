#!/usr/bin/env bash
# ZeRO stage 1 on GPUS GPUs: the optimizer is sharded.
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-8}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/zero1.json "$@"
