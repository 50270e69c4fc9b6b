// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The range of host user and group numbers of an unprivileged container. Each has its own, so that a process
//! that broke out of one container owns nothing of another.

use crate::error::Error;
use crate::id::{GUEST_ID_MIN, GuestId};

/// First number that is given to containers: above what any distribution uses.
const BASE: u64 = 1_000_000;
/// Numbers of one container, 0 to 65535 inside.
pub const SIZE: u32 = 65_536;

/// First host number of a container's range.
pub fn base(guest: GuestId) -> Result<u32, Error> {
    let index = u64::from(u32::from(guest) - GUEST_ID_MIN);
    let base = BASE + index * u64::from(SIZE);
    // The last number of 32 bits means "no such user" to the kernel.
    u32::try_from(base)
        .ok()
        .filter(|base| base.checked_add(SIZE).is_some())
        .ok_or_else(|| {
            Error::refused(format!(
                "CT {guest}: there is no range of user ids for a number this high; use one below {}",
                u64::from(GUEST_ID_MIN) + (u64::from(u32::MAX) - BASE) / u64::from(SIZE)
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_touch() {
        let of = |text: &str| base(text.parse().unwrap());
        assert_eq!(of("100").unwrap(), 1_000_000);
        assert_eq!(of("101").unwrap(), 1_065_536);
        assert!(of("65619").is_ok());
        let error = of("65621").unwrap_err().to_string();
        assert!(error.ends_with("use one below 65620"), "{error}");
    }
}
