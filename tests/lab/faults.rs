// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Triple faults of a working guest on emulated hosts (see the head of `vmm` for those at its boot): a test's body begins
//! anew after one, a few times at most, and never silently. Any other failure is the test's.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use atoll_tests::lab::Host;

/// Triple faults in spite of which a body has to come to its end.
const FAULTS_MAX: u32 = 2;
const MINUTE: Duration = Duration::from_secs(60);

/// KVM's exits, until the first triple fault (SVM exit code 0x7f). On AMD they alone tell where the guest was: KVM resets
/// the vCPU before it reports.
const TRACE: &str =
    "trace=/sys/kernel/tracing; mountpoint -q $trace || mount -t tracefs tracefs $trace
cd $trace; echo 1 > events/kvm/kvm_exit/enable; echo 1 > events/kvm/kvm_inj_exception/enable
echo 'traceoff if exit_reason==127' > events/kvm/kvm_exit/trigger";

/// What the machine's processes said since the last time, and the exits that led there: nothing without a triple fault.
const FAULT: &str = "cd /var/t 2>/dev/null || exit 0
grep -q 'triple fault' vmm.log 2>/dev/null || exit 0
cat vmm.log; cd /sys/kernel/tracing; tail -n 40 trace; echo > trace; echo 1 > tracing_on";

/// Ends what is left of a machine, so that the next one starts from nothing.
const CLEAR: &str = "mkdir -p /var/t; cd /var/t; [ ! -e pid ] || kill -9 $(cat pid) 2>/dev/null
for i in $(seq 30); do { [ ! -e pid ] || [ ! -d /proc/$(cat pid) ]; } && break; sleep 1; done
rm -f vmm.log pid exit asked moved; nft delete table inet cut 2>/dev/null; true";

/// Runs `body`, which starts its guest on these hosts and leaves none: again when the guest has triple-faulted.
pub fn in_spite_of_triple_faults(hosts: &[Host], body: impl Fn()) {
    for host in hosts {
        host.check(TRACE, MINUTE).unwrap();
    }
    for number in 1.. {
        let Err(failure) = catch_unwind(AssertUnwindSafe(&body)) else {
            return;
        };
        let told = hosts.iter().map(|host| (host, fault(host)));
        let told: Vec<_> = told.filter(|(_, text)| !text.is_empty()).collect();
        for (host, text) in &told {
            println!(
                "ATOLL-TRIPLE-FAULT {number} on node{}:\n{text}",
                host.number()
            );
        }
        if told.is_empty() || number > FAULTS_MAX {
            resume_unwind(failure);
        }
        for host in hosts {
            host.check(CLEAR, MINUTE).unwrap();
        }
    }
}

/// What a host tells of a triple fault. One that cannot be asked tells of none.
fn fault(host: &Host) -> String {
    let told = host.check(FAULT, MINUTE).unwrap_or_default();
    told.trim().to_owned()
}
