#!/usr/bin/env bash
# On a machine with a network, in the repository's root: what the GPU machine lacks goes into folders that git ignores.
# Usage: docs/benchmarks/gpu/wheels.sh [FOLDER_WITH_CIFAR10]
# The folder holds train.parquet and test.parquet (columns `img` and `label`), about 57 MB; only cifar10.py needs it.
set -euo pipefail
mkdir -p .gpu/wheels
rm -f .gpu/wheels/*.whl .gpu/newer/*.whl
platforms=()
for number in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 -d .gpu/wheels datasets==5.2.0 evaluate==0.4.6 multiprocess==0.70.19 dill==0.4.1 \
    parameterized==0.9.0
# DINOv2's layers take keywords from Transformers 5.18 on: for counted.py, in a folder of its own.
mkdir -p .gpu/newer
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d .gpu/newer transformers==5.24.0
if [ $# -gt 0 ]; then
    mkdir -p .gpu/cifar10
    cp -f "$1/train.parquet" "$1/test.parquet" .gpu/cifar10/
    chmod u+w .gpu/cifar10/*
fi
du -sh .gpu
