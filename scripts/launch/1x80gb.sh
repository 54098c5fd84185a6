#!/usr/bin/env bash
# A 7 B model on one GPU of 80 GB, the optimizer on the CPU (135 GB of host memory).
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-1}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/1x80gb.json \
    --preset 7b_transformer --activation_checkpointing all --batch_size 8 --gradient_accumulation 8 "$@"
