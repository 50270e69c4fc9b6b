// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The web page in a real browser: how its scripts, in `api/web/e2e`, are run against a node.

use std::path::PathBuf;
use std::process::Command;

use crate::daemon::Login;
use crate::tree;

const CHROMIUM: &str = "/usr/bin/chromium";

/// What the page's build writes. A debug build of `atolld` reads it from there when it is asked for it.
pub fn built() -> PathBuf {
    tree::root().join("api/web/dist")
}

/// Why no browser can look at the page on this machine, if so. Panics, with the remedy, when the page is not built.
pub fn browser() -> Result<(), String> {
    let chromium = Command::new(CHROMIUM).arg("--version").output();
    chromium.map_err(|error| format!("{CHROMIUM}: {error}"))?;
    assert!(
        tree::root().join("api/web/node_modules").exists() && built().join("index.html").exists(),
        "the page is not built: run npm ci && npm run build in api/web"
    );
    Ok(())
}

/// Runs a script. `node` is the command of Node.js, for where the node can be reached, with what the script is given
/// besides. Pictures go to `target/test/web/PICTURES`. Panics when a step fails; which one, is in the test's output.
pub fn browse(mut node: Command, login: &Login, script: &str, pictures: &str) {
    let status = node
        .arg(tree::root().join("api/web/e2e").join(script))
        .env("ATOLL_URL", &login.url)
        .env("ATOLL_USER", &login.username)
        .env("ATOLL_PASSWORD", &login.password)
        .env(
            "ATOLL_E2E_OUTPUT",
            tree::bin_dir().join("../test/web").join(pictures),
        )
        .env("CHROMIUM", CHROMIUM)
        .status()
        .expect("Node.js can be run");
    assert!(status.success(), "a step failed, see above");
}
