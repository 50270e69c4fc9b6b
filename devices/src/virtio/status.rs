// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The device status machine, as a pure function. VIRTIO 1.2 §2.1 and §3.1.1.
//!
//! ```text
//!  0 ──► ACKNOWLEDGE ──► DRIVER ──► FEATURES_OK ──► DRIVER_OK          any ──► 0 (reset)
//!                                                                any ──► FAILED (by the driver)
//!                                                                any ──► NEEDS_RESET (by the device)
//! ```

/// The driver has noticed the device.
pub(super) const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub(super) const DRIVER: u8 = 2;
/// The driver is ready; queues run.
pub(super) const DRIVER_OK: u8 = 4;
/// Features are settled.
pub(super) const FEATURES_OK: u8 = 8;
/// The device gave up until it is reset.
pub(super) const NEEDS_RESET: u8 = 0x40;
/// The driver gave up.
pub(super) const FAILED: u8 = 0x80;

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing new.
    Stay,
    /// Set these bits; no further act.
    Set(u8),
    /// Check the driver's features, then set FEATURES_OK.
    SettleFeatures,
    /// Start the queues, then set DRIVER_OK.
    Start,
    /// Stop everything and forget.
    Reset,
    /// Not allowed from here: the device needs a reset.
    Illegal,
}

/// Decides on a write of `new` while the status (without NEEDS_RESET) is `old`.
pub(super) fn step(old: u8, new: u8) -> Step {
    let new = new & !NEEDS_RESET;
    if new == 0 {
        return Step::Reset;
    }
    if old & !new != 0 {
        return Step::Illegal; // The driver must not clear a bit other than by reset.
    }
    match new & !old {
        0 => Step::Stay,
        added if added & FAILED != 0 => Step::Set(FAILED),
        _ if old & FAILED != 0 => Step::Illegal,
        ACKNOWLEDGE if old == 0 => Step::Set(ACKNOWLEDGE),
        DRIVER if old == ACKNOWLEDGE => Step::Set(DRIVER),
        // Some drivers set both at once; nothing lies between the two.
        added if added == ACKNOWLEDGE | DRIVER && old == 0 => Step::Set(added),
        FEATURES_OK if old == ACKNOWLEDGE | DRIVER => Step::SettleFeatures,
        DRIVER_OK if old == ACKNOWLEDGE | DRIVER | FEATURES_OK => Step::Start,
        _ => Step::Illegal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_way() {
        assert_eq!(step(0, 1), Step::Set(1));
        assert_eq!(step(1, 3), Step::Set(2));
        assert_eq!(step(3, 11), Step::SettleFeatures);
        assert_eq!(step(11, 15), Step::Start);
        assert_eq!(step(15, 0), Step::Reset);
        assert_eq!(step(3, 3), Step::Stay);
        assert_eq!(step(3, 0x83), Step::Set(FAILED));
    }

    #[test]
    fn every_other_way_is_illegal() {
        let legal = [(0, 1), (0, 3), (1, 3), (3, 11), (11, 15)];
        for old in [0u8, 1, 3, 11, 15] {
            for new in (1..=0xff_u8).filter(|new| new & (NEEDS_RESET | FAILED) == 0) {
                if new != old && !legal.contains(&(old, new)) {
                    assert_eq!(step(old, new), Step::Illegal, "{old:#x} to {new:#x}");
                }
            }
        }
        assert_eq!(step(0x83, 0x8b), Step::Illegal);
    }
}
