#!/usr/bin/env bash
# A 7 B model on six V100 of 32 GB, all of it sharded and on the CPU (135 GB of host memory).
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-6}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/6x32gb.json \
    --preset 7b_transformer --activation_checkpointing all --batch_size 2 --gradient_accumulation 8 "$@"
