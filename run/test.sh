#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Every test, by one runner. The lab's images are built beside the compiler when they are missing; a failure in
# one suite does not hide the others; the table comes last, and its verdict is the exit code.
set -uo pipefail
cd "$(dirname "$0")/.."

mkdir -p target/test
# A failed assertion says what it compared; the frames of the test harness below it only hide that.
export RUST_BACKTRACE=0
images() {
    tests/lab/qemu-image.sh && tests/lab/host-image.sh && run/guest-image.sh && run/virtiofsd.sh && run/uefi-image.sh
}
images > target/test/images.log 2>&1 &
images=$!

make --no-print-directory lint || exit 1
cargo build --workspace --bins --locked || exit 1
(cd api/web && npm run --silent check) > target/test/web-check.log 2>&1
web=$?
[ $web = 0 ] || { tail -n 40 target/test/web-check.log; echo "the web page's own checks failed (npm run check)"; }

cargo nextest run --workspace --locked --no-run || exit 1
echo "waiting for the lab's images"
wait $images || { tail -n 20 target/test/images.log; echo "the lab's images could not be built"; }

# What the compiler wrote goes to the disk before tests wait for what they write themselves.
sync
rm -f target/nextest/default/junit.xml
cargo nextest run --workspace --locked --no-fail-fast --status-level fail --final-status-level slow
tests=$?
cargo test --workspace --doc --locked --quiet
docs=$?
cargo run --quiet --locked -p atoll-tests --bin atoll-test-summary -- \
    target/nextest/default/junit.xml --output target/test/summary.tsv
summary=$?
[ $web = 0 ] && [ $tests = 0 ] && [ $docs = 0 ] && [ $summary = 0 ]
