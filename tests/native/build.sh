#!/usr/bin/env bash
# build.sh OUT [COMPILER [FLAGS...]]: compile compare_kernels with every instruction set of the compiler's target.
set -euo pipefail
out="$1"; compiler="${2:-${CXX:-c++}}"; shift; [ $# -gt 0 ] && shift
root="$(cd "$(dirname "$0")/../.." && pwd)"
objects="$(mktemp -d)"
trap 'rm -rf "$objects"' EXIT
avx512="-O3 -mavx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized"
compile() { "$compiler" -std=c++17 -O1 -Wall -Wextra "${@:3}" -c "$1" -o "$objects/$2.o"; }
case "$("$compiler" -dumpmachine)" in
  x86_64*) target=-DBITSPIKE_X86=1
    compile "$root/csrc/avx2.cc" avx2 $target -O3 -mavx2 "$@"
    for file in "$root"/csrc/avx512*.cc; do
      name="$(basename "$file" .cc)"
      more=""; [ "$name" = avx512_popcount ] && more=-mavx512vpopcntdq
      [ "$name" = avx512_compress ] && more=-mavx512vbmi2
      [ "$name" = avx512_sliced ] && more="-mavx512vbmi -mgfni"
      compile "$file" "$name" $target $avx512 $more "$@"
    done
    if [ "$(uname -s)" = Linux ] && "$compiler" -mamx-int8 -x c++ -fsyntax-only /dev/null 2> /dev/null; then
      target="$target -DBITSPIKE_AMX=1"
      compile "$root/csrc/amx.cc" amx $target $avx512 -mavx512vbmi -mamx-tile -mamx-int8 "$@"
      compile "$root/csrc/amx_attention.cc" amx_attention $target $avx512 -mavx512vbmi -mamx-tile -mamx-int8 "$@"
    fi ;;
  aarch64*) target=-DBITSPIKE_ARM64=1
    compile "$root/csrc/neon.cc" neon $target -O2 "$@"
    compile "$root/csrc/neon_dot.cc" neon_dot $target -O2 -march=armv8.2-a+dotprod "$@" ;;
  *) target=-DBITSPIKE_OTHER=1 ;;
esac
for file in "$root/csrc/scalar.cc" "$root/csrc/dispatch.cc" "$root/csrc/direct.cc" "$root/csrc/lif_of_sums.cc" "$root/tests/native/compare_kernels.cc"; do
  compile "$file" "$(basename "$file" .cc)" $target "$@"
done
"$compiler" "$@" "$objects"/*.o -o "$out"
