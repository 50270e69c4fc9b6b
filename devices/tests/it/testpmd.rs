// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A network card of DPDK's testpmd, a vhost-user backend that others wrote: its one port sends every packet back, on the
//! pair of queues that it came from.

use std::path::Path;

use atoll_devices::state::DeviceState;
use atoll_devices::testing::start_testpmd;
use atoll_devices::virtio::vhost_user::PATIENCE;

use crate::vhost_user::{MAC, Rig, Server, echo_is_logged, log_writes, rig_with};

fn start(directory: &Path) -> Option<Server> {
    match start_testpmd(directory, &["s"], 2) {
        Ok(child) => Some(Server(child)),
        Err(error) => {
            println!("ATOLL-SKIP: dpdk-testpmd: {error}");
            None
        }
    }
}

fn rig(reconnects: bool) -> Option<Rig> {
    let directory = tempfile::tempdir().unwrap();
    let server = start(directory.path())?;
    Some(rig_with(server, directory, reconnects, PATIENCE))
}

#[test]
fn testpmd_carries_packets_of_two_pairs() {
    let Some(mut rig) = rig(false) else { return };
    rig.echo(0, "first");
    rig.use_pairs(2);
    rig.echo(1, "second");
    rig.echo(0, "third");
    // A pause takes the queues back, a resume gives them away again, where they stood.
    rig.driver.device.pause();
    let saved = rig.driver.device.save();
    rig.driver.device.resume().unwrap();
    rig.echo(0, "fourth");
    rig.echo(1, "fifth");
    // Without a plug nobody looks at packets.
    rig.net.set_link(false);
    rig.offer(1);
    rig.send(1, "sixth");
    rig.net.set_link(true);
    rig.expect(1, "sixth");
    // A driver that begins anew, with one pair; and as it was.
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    rig.echo(0, "seventh");
    rig.driver.device.pause();
    rig.driver.reset();
    rig.driver.device.restore(&saved).unwrap();
}

#[test]
fn testpmd_notes_what_it_writes() {
    let Some(mut rig) = rig(true) else { return };
    rig.echo(0, "first");
    log_writes(&rig.driver, true);
    echo_is_logged(&mut rig, "second", true);
    rig.driver.device.pause();
    rig.driver.device.resume().unwrap();
    echo_is_logged(&mut rig, "third", true);
    log_writes(&rig.driver, false);
    echo_is_logged(&mut rig, "fourth", false);
    log_writes(&rig.driver, true);
    echo_is_logged(&mut rig, "fifth", true);
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    echo_is_logged(&mut rig, "sixth", true);
}

#[test]
fn testpmd_tells_where_the_guest_is() {
    let Some(mut rig) = rig(false) else { return };
    rig.echo(0, "first");
    rig.offer(0);
    rig.net.announce();
    let (_, written) = rig.driver.wait_used(0);
    let frame = rig
        .driver
        .get(Rig::place(0) + 0x8000, written.try_into().unwrap());
    // To everybody, from the guest, by reverse ARP.
    assert_eq!(frame[12..18], [0xff; 6]);
    assert_eq!(frame[18..24], MAC);
    assert_eq!(frame[24..26], [0x80, 0x35]);
}

#[test]
fn a_card_outlives_testpmd() {
    let Some(mut rig) = rig(true) else { return };
    rig.use_pairs(2);
    rig.echo(0, "before");
    rig.echo(1, "before");
    rig.offer(0);
    drop(rig.server.take());
    rig.wait_link(false);
    assert_eq!(rig.driver.status() & 0x40, 0, "its driver goes on");
    rig.send(0, "meanwhile");
    rig.server = start(rig.socket.parent().unwrap());
    rig.wait_link(true);
    rig.expect(0, "meanwhile");
    rig.echo(0, "after");
    rig.echo(1, "after");
}
