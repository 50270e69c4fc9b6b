// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk and a network card that come and go under the stock Debian cloud kernel, whose ACPI interpreter and acpiphp do
//! what the probe guest does by hand: on both boards, twice on the same slots.

use std::time::Duration;

use atoll_tests::lab::Host;

use crate::devices::{DISKS, WHAT_HAPPENED, control, hear};
use crate::payload;

const SECOND: Duration = Duration::from_secs(1);

/// What runs in the guest: it uses whatever comes, and tells what is on its bus.
const IN_GUEST: &str = r#"#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1 </dev/null
modprobe virtio_net; mkdir -p /more
echo "T-UP"
disk=0; card=0; had_disk=; had_card=
while sleep 1; do
  if [ ! -b /dev/vdc ]; then had_disk=
  elif [ ! "$had_disk" ]; then
    had_disk=1; disk=$((disk + 1))
    mkfs.ext4 -q -F /dev/vdc && mount /dev/vdc /more && seq 200000 > /more/data && umount /more
    echo 3 > /proc/sys/vm/drop_caches
    mount /dev/vdc /more && echo "T-DATA-$disk" $(cksum < /more/data) $(cat /sys/block/vdc/serial); umount /more
  fi
  if [ ! -e /sys/class/net/eth0 ]; then had_card=
  elif [ ! "$had_card" ]; then
    had_card=1; card=$((card + 1))
    ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up
    ping -c 3 -W 10 10.77.0.1 >/dev/null && echo "T-PING-$card" $(cat /sys/class/net/eth0/address)
  fi
  echo "T-PCI" $(ls /sys/bus/pci/devices)
done
"#;

/// Starts the guest; its serial output goes to `console.log`.
const START: &str = r#"
truncate -s 64M more.raw
setsid /payload/bin/atoll-vmm run --profile BOARD "${boot[@]}" --cpus 2 --memory 512 \
  --console socket=/var/t/console.sock --api-socket /var/t/api.sock </dev/null >vmm.log 2>&1 &
echo $! > pid
for i in $(seq 300); do [ -S console.sock ] && break; sleep 0.1; done
[ -S console.sock ] || { cat vmm.log; exit 1; }
socat -u UNIX-CONNECT:console.sock OPEN:console.log,creat,append >/dev/null 2>&1 &
"#;

/// Waits until the guest's list of its bus has, or has not, a slot.
fn wait_for_slot(host: &Host, slot: u64, is_there: bool) {
    let script = format!(
        "for i in $(seq 60); do last=$(grep -a $'^T-PCI .*\\r' /var/t/console.log | tail -1); there=false; \
         case \"$last\" in *0000:00:{slot:02x}.0*) there=true;; esac; [ $there = {is_there} ] && exit 0; sleep 1; done; \
         tail -n 20 /var/t/console.log; cat /var/t/vmm.log; exit 1"
    );
    host.check(&script, SECOND * 90).unwrap();
}

fn slot_of(added: &str) -> u64 {
    let added: serde_json::Value = serde_json::from_str(added).unwrap();
    added["slot"].as_u64().unwrap()
}

fn comes_and_goes(board: &str) {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    let start = START.replace("BOARD", board);
    let script = format!(
        "set -e; mkdir -p /var/t; cd /var/t; cat > in-guest <<'END-OF-SCRIPT'\n\
         {IN_GUEST}END-OF-SCRIPT\n{DISKS}{start}"
    );
    host.check(&script, SECOND * 120).unwrap();
    hear(host, "T-UP", 300);
    let expected = host.check("seq 200000 | cksum", SECOND * 30).unwrap();
    let mut slots = Vec::new();
    for (round, vhost) in [(1, "off"), (2, "on")] {
        let disk = control(
            host,
            "add-disk --disk path=/var/t/more.raw,format=raw,serial=late",
        );
        let data = hear(host, &format!("T-DATA-{round}"), 120);
        assert_eq!(data, format!("{} late", expected.trim()));
        let card = control(
            host,
            &format!("add-net --net tap=tap0,mac=52:54:00:aa:00:0{round},vhost={vhost}"),
        );
        host.check(
            "ip address replace 10.77.0.1/24 dev tap0; ip link set tap0 up",
            SECOND * 30,
        )
        .unwrap();
        let address = hear(host, &format!("T-PING-{round}"), 120);
        assert_eq!(address, format!("52:54:00:aa:00:0{round}"));
        let slot = [slot_of(&disk), slot_of(&card)];
        slot.iter()
            .for_each(|slot| wait_for_slot(host, *slot, true));
        // Open and locked: nobody else has the image.
        let again = "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock add-disk --disk path=/var/t/more.raw,format=raw";
        let again = format!("{again} || {{ {WHAT_HAPPENED}; }}");
        let again = host.run(&again, SECOND * 60).unwrap();
        assert!(again.text.contains("is in use"), "{}", again.text);

        for id in ["disk2", "net0"] {
            control(host, &format!("remove-device --id {id} --timeout-ms 60000"));
        }
        slot.iter()
            .for_each(|slot| wait_for_slot(host, *slot, false));
        // Closed: the image, and the tap, which goes with its last descriptor.
        let closed =
            "! ls -l /proc/$(cat /var/t/pid)/fd | grep more.raw && [ ! -e /sys/class/net/tap0 ]";
        host.check(closed, SECOND * 30).unwrap();
        slots.push(slot);
    }
    assert_eq!(slots[0], slots[1]);
    control(host, "shutdown");
}

#[test]
fn linux_takes_and_gives_back_a_disk_and_a_card_on_the_micro_board() {
    comes_and_goes("micro");
}

#[test]
fn linux_takes_and_gives_back_a_disk_and_a_card_on_the_pc_board() {
    comes_and_goes("pc");
}
