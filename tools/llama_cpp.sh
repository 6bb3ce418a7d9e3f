#!/usr/bin/env bash
# llama.cpp for tests/e2e/test_llama_cpp.py: a prebuilt engine from npm, 85 MB, no compiler and no GPU.
#   tools/llama_cpp.sh [FOLDER]      default: .venv/llama_cpp; the test also looks at $LLAMA_CPP_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv/llama_cpp}
version=3.22.1
mkdir -p "$folder"
cd "$folder"
[ -d node_modules/node-llama-cpp ] && exit 0
echo '{"private": true}' >package.json
# Left to itself, the package brings the engine in every variant, CUDA too: 725 MB.
npm install --silent --no-audit --no-fund --omit=optional "node-llama-cpp@$version" "@node-llama-cpp/linux-x64@$version" ||
  { rm -rf node_modules; exit 1; }
