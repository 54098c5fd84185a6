#!/usr/bin/env bash
# A 7 B model on four GPUs of 40 GB, all of it sharded.
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-4}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/4x40gb.json \
    --preset 7b_transformer --activation_checkpointing all --batch_size 2 --gradient_accumulation 8 "$@"
