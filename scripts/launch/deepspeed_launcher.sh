#!/usr/bin/env bash
# ZeRO stage 2 by DeepSpeed's own launcher, which does not set LOCAL_WORLD_SIZE, on GPUS GPUs of this machine.
cd "$(dirname "$0")/../.." && LOCAL_WORLD_SIZE="${GPUS:-8}" exec \
    deepspeed --no_local_rank --num_gpus "${GPUS:-8}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/zero2.json "$@"
