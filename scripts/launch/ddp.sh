#!/usr/bin/env bash
# A copy of the model on each of GPUS GPUs; DDP averages the gradients.
cd "$(dirname "$0")/../.." && \
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 exec torchrun --standalone --nproc-per-node "${GPUS:-8}" train_minimal.py "$@"
