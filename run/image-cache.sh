# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Sourced by the scripts that build an image from Debian's packages, once for all uses:
#
#   . run/image-cache.sh NAME LAST [INGREDIENT...]     LAST is the file that a finished image has
#
# Where the image exists, prints its directory and ends the script. Else the script goes on, alone on this machine,
# to fill $work (a root file system goes into $root, which is not kept), and calls `publish` at its end.
#
# Images are kept under $ATOLL_CACHE (default /var/cache/atoll), keyed by the text of the sourcing script and by the
# ingredients (names of other images, texts of other scripts), and put in place by one rename, so an interrupted build
# leaves nothing that looks finished.

key=$({ cat "$0"; printf '%s' "${@:3}"; } | sha256sum | cut -c1-16)
cache=${ATOLL_CACHE:-/var/cache/atoll}
out=$cache/$1-$key
last=$2

end_if_finished() {
    if [ -e "$out/$last" ]; then
        echo "$out"
        exit 0
    fi
}

publish() {
    rm -rf --one-file-system "$root" "$out"
    chmod 755 "$work"
    mv "$work" "$out"
    trap - EXIT
    echo "$out" >&3
}

end_if_finished
mkdir -p "$cache"
exec 9>"$out.lock"
flock 9
end_if_finished
# What the tools that build say is not the answer: mke2fs -q still tells of a new file.
exec 3>&1 >&2
work=$(mktemp -d "$cache/$1.XXXXXX")
root=$work/root
trap 'rm -rf --one-file-system "$work"' EXIT
