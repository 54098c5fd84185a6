#!/usr/bin/env bash
# One process: a GPU, or the CPU where there is none.
cd "$(dirname "$0")/../.." && exec python train_minimal.py "$@"
