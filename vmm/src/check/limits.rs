// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What of a disk's rates cannot be meant: nothing at all, and a burst of no rate. Asked for a machine's spec, and for
//! what its control API is told later.

use atoll_vmm_protocol::spec::DiskLimits;

use super::{SpecError, refuse};

/// Whether a disk can be held to these rates; the error names the one that it cannot.
pub fn disk_limits(limits: &DiskLimits) -> Result<(), SpecError> {
    let mut limits = *limits;
    for [(rate, per_second), (burst, at_once)] in limits.pairs() {
        match (per_second, at_once) {
            (Some(0), _) => refuse(format!(
                "{rate} is 0, and nothing would move: leave it out for no limit"
            )),
            (None, Some(_)) => refuse(format!("{burst} without {rate}: a burst is of a rate")),
            _ => Ok(()),
        }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_burst_belongs_to_the_rate_before_it() {
        let mut limits = DiskLimits::default();
        for (index, (name, _)) in limits.fields().enumerate() {
            let mut one = DiskLimits::default();
            *one.fields().nth(index).unwrap().1 = Some(1);
            let refused = disk_limits(&one).err().map(|error| error.0);
            let expected = name
                .strip_suffix("_burst")
                .map(|of| format!("{name} without {of}_per_second: a burst is of a rate"));
            assert_eq!(refused, expected);
        }
    }
}
