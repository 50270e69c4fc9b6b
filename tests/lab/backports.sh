# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Sourced by the scripts that take packages from the backports suite of $suite, from the mirror that this machine's apt
# uses. $work is an image under way (image-cache.sh).
#
#   find_backports                            reads what there is; `backports` then has the options for apt
#   unpack_backports DIRECTORY PACKAGE...     downloads packages and unpacks them there
#   forget_backports                          removes what both have left in $work

find_backports() {
    local apt=$work/apt uri
    mkdir -p "$apt"/{lists/partial,cache,debs}
    uri=$(apt-get indextargets --format '$(SITE) $(SUITE)' | awk -v s="$suite" '$2 == s {print $1; exit}')
    [ -n "$uri" ] || uri=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite-backports main" > "$apt/sources.list"
    backports=(-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    apt-get -qq "${backports[@]}" update >&2
}

unpack_backports() {
    local to=$1 deb
    shift
    (cd "$work/apt/debs" && apt-get -qq "${backports[@]}" download "$@" >&2)
    for deb in "$work"/apt/debs/*.deb; do
        dpkg -x "$deb" "$to"
        rm "$deb"
    done
}

forget_backports() {
    rm -rf "$work/apt"
}
