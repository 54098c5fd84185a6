#!/usr/bin/env bash
# A 7 B model on eight GPUs of 80 GB, the optimizer and the gradients sharded.
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-8}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/8x80gb.json \
    --preset 7b_transformer --activation_checkpointing all --batch_size 8 --gradient_accumulation 1 "$@"
