#!/usr/bin/env bash
# Runs bench/gpu.py where the project may not be installed and there may be no network: what the machine lacks is taken
# from .bundle/ (*.tar.xz and *.whl, unpacked into .bundle/site, again where one is newer), the project itself from this
# checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then
  python=.venv/bin/python
else
  python=${PYTHON:-python3}
  site=.bundle/site
  if [ ! -d "$site" ] || [ -n "$(find .bundle -maxdepth 1 -regex '.*\.\(tar\.xz\|whl\)' -newer "$site")" ]; then
    rm -rf "$site.new"
    mkdir -p "$site.new"
    for archive in .bundle/*.tar.xz; do
      [ -e "$archive" ] && tar -xJf "$archive" -C "$site.new"
    done
    for wheel in .bundle/*.whl; do
      [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site.new"
    done
    touch "$site.new" # an archive may hold a time of its folder
    rm -rf "$site"
    mv "$site.new" "$site"
  fi
  # The same package map as pyproject.toml, as links.
  package=.bundle/package/hsa_tl
  mkdir -p "$package"
  for entry in hsa_tl/* kernels_tilelang autotune model bench; do
    ln -sfn "$PWD/$entry" "$package/$(basename "$entry")"
  done
  export PYTHONPATH="$PWD/.bundle/package:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
  export PYTHONSAFEPATH=1 # or the folder hsa_tl here, a part of the package, would be found first
fi
# Checkouts of others' kernels, see bench/baselines.py.
for name in ramstorage hils moba; do
  variable=HSA_TL_${name^^}
  [ -d ".bundle/$name" ] && export "$variable=${!variable:-$PWD/.bundle/$name}"
done
# Kernels compiled by --prepare, on any machine with nvcc, are found here.
export TILELANG_CACHE_DIR="${TILELANG_CACHE_DIR:-$PWD/.bundle/tilelang-cache}"
exec "$python" -m hsa_tl.bench.gpu "$@"
