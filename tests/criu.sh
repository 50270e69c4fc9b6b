#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Brings CRIU of Debian 13 onto this machine, with its libraries beside the system's, and prints the directory that
# has the program `criu`. That of Debian 12 cannot read the vDSO of newer kernels than its own.
#
# image-cache.sh says where that is.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
. "$here/../run/image-cache.sh" criu criu

apt=$work/apt
mkdir -p "$apt"/{lists/partial,cache/archives/partial}
touch "$apt/status"
uri=$(apt-get indextargets --format '$(SITE) $(CODENAME)' | awk '$2 == "bookworm" {print $1; exit}')
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri trixie main" > "$apt/sources.list"
options=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
    -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update
# To apt nothing is installed, so it brings the libraries, too.
apt-get "${options[@]}" install -y --no-install-recommends --download-only criu
for package in "$apt"/cache/archives/*.deb; do
    dpkg -x "$package" "$work/debian"
done
rm -rf "$apt"
cat > "$work/criu" <<'X'
#!/bin/sh
debian=$(dirname "$(readlink -f "$0")")/debian
exec "$debian/usr/lib64/ld-linux-x86-64.so.2" --library-path "$debian/usr/lib/x86_64-linux-gnu" "$debian/usr/sbin/criu" "$@"
X
chmod +x "$work/criu"
publish
