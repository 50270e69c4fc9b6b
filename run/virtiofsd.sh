#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Builds virtiofsd, the process that serves a directory to a guest, from its crate, once for all uses, and prints the
# directory that holds `bin/virtiofsd`. image-cache.sh says where that is. Needs libcap-ng-dev and libseccomp-dev
# (deps.sh test).
set -euo pipefail

version=1.14.0

. "$(dirname "$(readlink -f "$0")")/image-cache.sh" virtiofsd bin/virtiofsd

echo "virtiofsd: building $version from its crate (some minutes, once)" >&2
# Its target directory is not ours: cargo would wait for a build that is under way.
env -u CARGO_TARGET_DIR cargo install --quiet --locked --no-track --root "$work" --target-dir "$work/target" \
    --version "=$version" virtiofsd >&2
rm -rf "$work/target"

publish
