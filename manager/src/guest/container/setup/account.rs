// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! root's password and SSH keys in a new container.

use std::io;

use crate::guest::container::root::GuestRoot;

/// Sets root's password, given as a crypt(3) hash.
pub fn set_root_password(root: &GuestRoot, hash: &str) -> io::Result<()> {
    let shadow = root.read("etc/shadow")?.unwrap_or_default();
    let text = shadow_with(&shadow, hash);
    root.write("etc/shadow", &text, 0o640)
}

/// Adds SSH public keys for root.
pub fn add_root_keys(root: &GuestRoot, keys: &str) -> io::Result<()> {
    let path = "root/.ssh/authorized_keys";
    let mut text = root.read(path)?.unwrap_or_default();
    for key in keys.lines().map(str::trim).filter(|key| !key.is_empty()) {
        if !text.lines().any(|line| line == key) {
            text.push_str(key);
            text.push('\n');
        }
    }
    // sshd ignores keys in a folder that others may write to; 0755 is fine, 0600 for the file.
    root.write(path, &text, 0o600)
}

fn shadow_with(shadow: &str, hash: &str) -> String {
    let mut found = false;
    let mut lines: Vec<String> = shadow
        .lines()
        .map(|line| match line.strip_prefix("root:") {
            Some(rest) => {
                found = true;
                let after = rest.split_once(':').map_or("::::::", |(_, after)| after);
                format!("root:{hash}:{after}")
            }
            None => line.to_owned(),
        })
        .collect();
    if !found {
        lines.insert(0, format!("root:{hash}:19000:0:99999:7:::"));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_of_root_alone_changes() {
        let shadow = "daemon:*:1:0:::::\nroot:*:2:0:99999:7:::\n";
        assert_eq!(
            shadow_with(shadow, "$6$x"),
            "daemon:*:1:0:::::\nroot:$6$x:2:0:99999:7:::\n"
        );
        assert_eq!(shadow_with("", "$6$x"), "root:$6$x:19000:0:99999:7:::\n");
    }

    #[test]
    fn keys_are_added_once() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        for _ in 0..2 {
            add_root_keys(&root, "ssh-ed25519 AAAA me\n\n").unwrap();
        }
        assert_eq!(
            root.read("root/.ssh/authorized_keys").unwrap().as_deref(),
            Some("ssh-ed25519 AAAA me\n")
        );
    }
}
