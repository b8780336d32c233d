#!/bin/sh
# Labels documents with a language model on several processes, each on a GPU of its own if there are any:
#   examples/capture_torchrun.sh MODEL OUT FILE...
# Stopped or killed, it resumes where it was, also with another number of PROCESSES.
set -eu
model=$1 out=$2
shift 2
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" --no-python \
  kdfast cache capture "$model" "$@" --out "$out" --max-length 512 --batch-size 8
