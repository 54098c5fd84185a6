#!/usr/bin/env bash
# ZeRO stage 2 by DeepSpeed's own launcher, on GPUS GPUs of this machine.
cd "$(dirname "$0")/../.." && exec deepspeed --num_gpus "${GPUS:-8}" train_minimal.py \
    --engine deepspeed --deepspeed configs/deepspeed/zero2.json "$@"
