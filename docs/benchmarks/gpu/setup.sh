# On the GPU machine, in the repository's root: `. docs/benchmarks/gpu/setup.sh [newer]`. Installs the wheels of wheels.sh
# in front of the packages that are there, with `newer` Transformers too, and this package as it is in the working tree.
# Nothing is fetched.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OUT="${OUT:-runs/gpu}"
site="${GPU_SITE:-/tmp/evit-gpu-site}${1:+-$1}"
mkdir -p "$site" "$OUT"
wheels=(.gpu/wheels/*.whl)
if [ "${1:-}" = newer ]; then wheels+=(.gpu/newer/*.whl); fi
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}" || return 1
ln -sfn "$PWD/evit_hf" "$site/evit_hf"
ln -sfn "$PWD/training" "$site/evit_training"
export PYTHONPATH="$site"
python3 -c "import torch, transformers, timm, accelerate, datasets, evit_hf, evit_training.cli" || return 1
