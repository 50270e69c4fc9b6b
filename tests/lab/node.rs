// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A whole node: what `make lab` starts, and that guests outlive `atolld`.

use std::time::Duration;

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);
const UP: &str =
    "STATE=/var/lib/atoll LISTEN=0.0.0.0 BIN=/payload/bin GUEST=/payload/guest /payload/run/up.sh";
/// The VM's and the container's address and that both answer.
const BOTH_ANSWER: &str = r#"set -e
export STATE=/var/lib/atoll PATH=/payload/bin:$PATH
python3 /payload/lab/console.py /var/lib/atoll/run/vm-101/serial.sock 240 'ping -c 1 -W 5 10.64.0.1 && ip -br address show eth0'
atoll-ct --root /var/lib/atoll/run/ct exec ct-100 ping -c 1 -W 5 10.64.0.1"#;

#[test]
fn guests_start_by_one_command_and_outlive_the_daemon() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    let summary = host.check(UP, SECOND * 600).unwrap();
    assert!(
        summary.contains("container:    100 debian, running, address 10.64.0."),
        "{summary}"
    );
    assert!(
        summary.contains("VM:           101 debian, running"),
        "{summary}"
    );
    host.check(BOTH_ANSWER, SECOND * 300).unwrap();

    // Again: quick, and changes nothing.
    let pids = "cat /var/lib/atoll/run/vm-101/pid; STATE=/var/lib/atoll /payload/bin/atoll-ct \
                --root /var/lib/atoll/run/ct state ct-100 | grep '\"pid\"'";
    let before = host.check(pids, SECOND * 30).unwrap();
    host.check(UP, SECOND * 120).unwrap();
    assert_eq!(before, host.check(pids, SECOND * 30).unwrap());

    // The daemon is killed; its guests go on, and the next daemon takes them over.
    host.check(
        "kill -9 $(jq .pid /var/lib/atoll/run/atolld.json)",
        SECOND * 10,
    )
    .unwrap();
    host.check(BOTH_ANSWER, SECOND * 120).unwrap();
    host.check(UP, SECOND * 120).unwrap();
    assert_eq!(before, host.check(pids, SECOND * 30).unwrap());
    host.check(BOTH_ANSWER, SECOND * 120).unwrap();
    let down = "BIN=/payload/bin STATE=/var/lib/atoll /payload/run/down.sh";
    host.check(down, SECOND * 240).unwrap();
    let left = "pgrep -a 'atoll|dnsmasq'; ip -o link show type bridge; grep /var/lib/atoll/ /proc/self/mounts; true";
    assert_eq!(host.check(left, SECOND * 30).unwrap(), "");
}
