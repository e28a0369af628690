#!/usr/bin/env bash
# Everything on one GPU in under nine minutes: correctness, the sanitizer, kernel timings, the ladder. $OUT/results.tgz and the
# tuning table are renewed after every part, so that a run that is cut short leaves what it has.
# Kernels are read from CACHEQUANT_KERNELS (build/kernels) or built there; wheels in .whl are installed aside.
#   OUT=out bash scripts/gpu/run.sh [check] [time] [ladder] [ladder-compile] [bench] [bench-peers] [bench-pipeline]
# The bench parts are `cachequant bench` on random weights; each of their lines may be cut short alone.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-out}
export CACHEQUANT_KERNELS=${CACHEQUANT_KERNELS:-$PWD/build/kernels} PYTHONPATH=$PWD PYTHONUNBUFFERED=1
work=$(mktemp -d)
mkdir -p "$OUT"
if ls .whl/*.whl >/dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" .whl/*.whl
  export PYTHONPATH=$PWD:$work/site
fi
failed=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$work/card.txt"
python3 -m cachequant.kernels.cuda.build --arch 90 --jobs 4 2>&1 | tail -1

keep() {
  tar -C "$work" --exclude=./site -czf "$OUT/results.tgz" .
  cp "$CACHEQUANT_KERNELS"/tuning-*.json "$OUT/" 2>/dev/null
}

check() { # the parts share the GPU: correctness does not mind
  local status=0 pids=()
  for part in compiled triton norms pointwise feed-forward; do
    timeout 230 python3 scripts/gpu/check_kernels.py --part $part --json "$work/check-$part.json" \
      >"$work/check-$part.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  timeout 60 python3 scripts/gpu/check_kernels.py --part graphs >"$work/check-graphs.log" 2>&1 || status=1
  tail -n 40 "$work"/check-*.log
  if command -v compute-sanitizer >/dev/null; then
    timeout 100 compute-sanitizer --error-exitcode 9 python3 scripts/gpu/check_kernels.py --quick --part compiled \
      --part norms --part pointwise >"$work/sanitizer.log" 2>&1 || status=1
    tail -n 3 "$work/sanitizer.log"
  fi
  return $status
}

bench() { # seconds, name, arguments: one configuration in one process; its JSON grows mode by mode
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" python3 -m cachequant bench "$@" --device cuda --random-weights --json "$work/bench-$name.json" 2>&1 | tee "$work/bench-$name.log"
}
loops=fp16-graph,fp16-compile,fp16-compile-cache,int8,cachequant
whole=fp16,fp16-compile,fp16-compile-cache,cachequant

for part in ${*:-check time ladder}; do
  echo "== $part, $SECONDS s"
  case $part in
  check) check || failed=1 ;;
  time)
    timeout 150 python3 scripts/gpu/time_kernels.py --json "$work/kernels.json" 2>&1 | tee "$work/kernels.log" || failed=1
    ;;
  ladder)
    timeout 200 python3 scripts/gpu/ladder.py --json "$work/ladder.json" 2>&1 | tee "$work/ladder.log" || failed=1
    ;;
  ladder-compile)
    timeout 420 python3 scripts/gpu/ladder.py --compile --fp32 --json "$work/ladder.json" 2>&1 |
      tee "$work/ladder.log" || failed=1
    ;;
  bench)
    bench 230 sd configs/stable_diffusion.yaml --batch 1 --modes fp32,fp32-tf32,fp16,$loops || failed=1
    keep
    bench 110 imagenet configs/imagenet.yaml --batch 1 --modes fp32,fp16,$loops || failed=1
    keep
    bench 100 dit configs/dit.yaml --batch 8 --modes $loops --rounds 1 || failed=1
    keep
    bench 110 sd8 configs/stable_diffusion.yaml --batch 8 --modes $loops --rounds 1 || failed=1
    ;;
  bench-peers)
    bench 290 sd-peers configs/stable_diffusion.yaml --batch 1 --modes fp16-graph,deepcache,torchao || failed=1
    keep
    bench 200 dit-peers configs/dit.yaml --batch 8 --modes fp16-graph,cache-dit,torchao --rounds 1 || failed=1
    ;;
  bench-pipeline)
    bench 200 sd-pipeline configs/stable_diffusion.yaml --pipeline --batch 1 --modes $whole || failed=1
    keep
    bench 130 imagenet-pipeline configs/imagenet.yaml --pipeline --batch 1 --modes $whole || failed=1
    keep
    bench 130 dit-pipeline configs/dit.yaml --pipeline --batch 8 --modes $whole --rounds 1 || failed=1
    ;;
  *) echo "error: part $part, expected one of the parts at the top of this file" && failed=2 ;;
  esac
  keep
done
echo "== done, $SECONDS s, status $failed"
exit $failed
