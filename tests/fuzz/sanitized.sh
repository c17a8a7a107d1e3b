#!/usr/bin/env bash
# sanitized.sh PYTHON FOLDER ARGUMENTS...: run Python with the sanitized build of the package in FOLDER.
# Python itself is not sanitized, so the runtime is loaded before it; its own leaks are none of ours.
set -euo pipefail
python="$1"; folder="$2"; shift 2
compiler="${CXX:-c++}"
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
# an editable installation would put its own build in front of FOLDER
cat > "$folder/sitecustomize.py" <<'EOF'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
EOF
case "$(PYTHONPATH="$folder" "$python" -c 'import importlib.util as u; print(u.find_spec("bitspike").origin)')" in
  "$(cd "$folder" && pwd)"/*) ;;
  *) echo "sanitized.sh: python does not find the package in $folder first" >&2; exit 1 ;;
esac
exec env LD_PRELOAD="$libraries" ASAN_OPTIONS="detect_leaks=0:use_sigaltstack=0:abort_on_error=1:allocator_may_return_null=1" \
  UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1" OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
  PYTHONPATH="$folder" PYTHONDONTWRITEBYTECODE=1 "$python" "$@"
