#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh SECONDS [TARGET...]: fuzz targets under libFuzzer, guided by coverage, so many seconds each; all of them when
# none is named. The stable toolchain does: coverage is a pass of LLVM's, libFuzzer a crate that brings its source.
# Corpora stay in target/fuzz/corpus, so that the next run goes on; an input that fails is in target/fuzz/artifacts.
set -uo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?fuzz.sh SECONDS [TARGET...]}
shift
work=$PWD/target/fuzz
# With a target named, flags are for it alone: no build script and no macro is instrumented.
triple=x86_64-unknown-linux-gnu
flags=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Ccodegen-units=1
)
mkdir -p "$work"
# The versions that everything else is built with.
cp Cargo.lock vmm/fuzz/Cargo.lock
RUSTFLAGS="${flags[*]}" cargo build --quiet --release --target $triple --manifest-path vmm/fuzz/Cargo.toml \
    --target-dir "$work/build" || exit 1
binary=$work/build/$triple/release/atoll-fuzz

if [ $# = 0 ]; then
    mapfile -t targets < <(ATOLL_FUZZ_TARGET=list "$binary")
    set -- "${targets[@]}"
fi
# One number of libFuzzer's last (or first) line of a kind: `#1234 NEW cov: 567 ft: 890 corp: 12/3Kb …`.
field() {
    sed -n "s/^#[0-9]*[[:space:]]*$2 .*$3: \([0-9]*\).*/\1/p" "$1" | "$4" -n 1
}
printf 'target\tseconds\texecutions\tedges at first\tedges at last\tcorpus\tresult\n' > "$work/summary.tsv"
failed=0
for target in "$@"; do
    corpus=$work/corpus/$target artifacts=$work/artifacts/$target log=$work/$target.log
    mkdir -p "$corpus" "$artifacts"
    ATOLL_FUZZ_TARGET=$target ATOLL_FUZZ_SEEDS=$corpus RUST_BACKTRACE=1 nice "$binary" "$corpus" \
        -max_total_time="$seconds" -timeout=60 -rss_limit_mb=2048 -malloc_limit_mb=512 -max_len=16384 \
        -artifact_prefix="$artifacts/" -print_final_stats=1 > "$log" 2>&1
    result=$?
    if [ $result != 0 ]; then
        failed=1
        echo "$target: found something, see $log"
    fi
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$target" "$seconds" "${executions:-?}" "$(field "$log" INITED cov head)" \
        "$(field "$log" '[A-Za-z]*' cov tail)" "$(find "$corpus" -type f | wc -l)" \
        "$([ $result = 0 ] && echo ok || echo FOUND)" >> "$work/summary.tsv"
done
column -t -s $'\t' "$work/summary.tsv"
exit $failed
