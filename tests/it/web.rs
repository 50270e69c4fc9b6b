// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The web page in a real browser: the scripts of `api/web/e2e` against nodes of the tests' own. Its pictures are kept in
//! `target/test/web`.

use std::path::Path;
use std::process::Command;

use atoll_tests::{daemon, lab, skip, tree};

const CHROMIUM: &str = "/usr/bin/chromium";

/// A node for the page, or why there cannot be one here.
fn node() -> Result<daemon::Daemon, String> {
    daemon::isolation()?;
    let chromium = Command::new(CHROMIUM).arg("--version").output();
    chromium.map_err(|error| format!("{CHROMIUM}: {error}"))?;
    let page = tree::root().join("api/web");
    assert!(
        page.join("node_modules").exists() && page.join("dist/index.html").exists(),
        "the page is not built: run npm ci && npm run build in api/web"
    );
    Ok(daemon::Daemon::launch().unwrap())
}

/// Runs one of the page's scripts against a node.
fn browse(node: &daemon::Daemon, script: &str, template: &Path) {
    let status = node
        .command("node")
        .arg(tree::root().join("api/web/e2e").join(script))
        .env("ATOLL_URL", &node.login().url)
        .env("ATOLL_USER", &node.login().username)
        .env("ATOLL_PASSWORD", &node.login().password)
        .env("ATOLL_TEMPLATE", template)
        .env("ATOLL_E2E_OUTPUT", tree::bin_dir().join("../test/web"))
        .env("CHROMIUM", CHROMIUM)
        .status()
        .unwrap();
    assert!(status.success(), "a step failed, see above");
}

#[test]
fn container_from_the_wizard_to_its_deletion() {
    let node = match node() {
        Ok(node) => node,
        Err(reason) => skip!("{reason}"),
    };
    let template = lab::guest_image().unwrap().join("template.tar.zst");
    browse(&node, "run.mjs", &template);
}

#[test]
fn machine_from_the_wizard_to_its_deletion() {
    let probed = Command::new(tree::binary("atoll-vmm"))
        .arg("probe")
        .output()
        .unwrap();
    if !probed.status.success() {
        skip!("{}", String::from_utf8_lossy(&probed.stdout).trim());
    }
    let node = match node() {
        Ok(node) => node,
        Err(reason) => skip!("{reason}"),
    };
    let snippets = node.state().join("storage/snippets");
    std::fs::create_dir_all(&snippets).unwrap();
    let extracted = Command::new(tree::binary("atoll-vmm"))
        .args(["probe", "--extract"])
        .arg(snippets.join("probe"))
        .status();
    assert!(extracted.unwrap().success());
    browse(&node, "machine.mjs", Path::new(""));
}
