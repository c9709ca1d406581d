#!/bin/sh
# On a GPU with Nsight Compute's ncu: everything that flashlib.cost, the profiler and autoselect are held against, into one folder.
#
#   sh benchmarks/counting.sh benchmarks/h200
#
# Each step writes its record when it ends and has a limit of its own, so that one that hangs or fails does not cost the others.
out=${1:?name the folder of the records}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit

step() {
  echo "== $*"
  started=$(date +%s)
  timeout "$@" || echo "FAILED ($?): $*"
  echo "== $(($(date +%s) - started)) s"
}

step 150 "$python" benchmarks/cost_points.py --out "$out"
step 100 "$python" benchmarks/cost_points.py --out "$out" --bytes
step 60 "$python" benchmarks/cost_points.py --out "$out" --profiler
step 120 "$python" benchmarks/cost_points.py --out "$out" --choices
step 90 "$python" -m flashlib.measure.racing.bench "length=4096 tokens=4096 head_dim=64,128 mask=full direction=forward,backward" \
  --counters --topic training --peers triton torch_sdpa_cudnn torch_sdpa_flash naive --out "$out"
step 90 "$python" -m flashlib.measure.racing.bench decode --counters --peers flashlib torch_sdpa_cudnn naive --out "$out"
