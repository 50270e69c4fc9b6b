// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which frames a driver wants to receive: its receive mode, its address, its tables. VIRTIO 1.2 §5.1.6.5.1 and
//! §5.1.6.5.2. Pure; the control queue replaces it as a whole, the receive queues ask it for each frame.

use serde::{Deserialize, Serialize};

/// An Ethernet address, in the order of its bytes on the wire.
pub type Mac = [u8; 6];

/// Addresses that one table may have; a driver with more gets everything of that kind. Our choice.
const TABLE_ADDRESSES_MAX: usize = 64;

/// What a driver wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    /// The card's own address.
    pub(super) mac: Mac,
    /// Everything.
    pub(super) promiscuous: bool,
    /// Every frame to a group; every frame to a single card.
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    /// None to groups, to single cards, to everybody.
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    /// Addresses beside the own one; `None`: too many to be told apart.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
}

impl Filter {
    /// Before the driver has said anything, everything passes.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
        }
    }

    /// Takes both tables of a command, or `None` if they are not two tables.
    pub(super) fn set_tables(&mut self, data: &[u8]) -> Option<()> {
        let (unicast, rest) = table(data)?;
        let (multicast, rest) = table(rest)?;
        if !rest.is_empty() {
            return None;
        }
        self.unicast = unicast;
        self.multicast = multicast;
        Some(())
    }

    /// Whether the driver wants a frame that begins so.
    pub(super) fn accepts(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else {
            return true; // Too short for an address: not ours to judge.
        };
        let listed = |table: &Option<Vec<Mac>>| match table {
            Some(table) => table.contains(to),
            None => true,
        };
        if self.promiscuous {
            true
        } else if to == &[0xff; 6] {
            !self.no_broadcast
        } else if to[0] & 1 == 1 {
            !self.no_multicast && (self.all_multicast || listed(&self.multicast))
        } else {
            !self.no_unicast && (self.all_unicast || to == &self.mac || listed(&self.unicast))
        }
    }
}

/// One table, `le32 entries` and the addresses, and what follows it. A table that is too long is `None`.
fn table(data: &[u8]) -> Option<(Option<Vec<Mac>>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (addresses, _) = addresses.as_chunks::<6>();
    let kept = addresses.len() <= TABLE_ADDRESSES_MAX;
    Some((kept.then(|| addresses.to_vec()), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const ALL: Mac = [0xff; 6];

    #[track_caller]
    fn check(change: impl FnOnce(&mut Filter), expected: [bool; 4]) {
        let mut filter = Filter::new(ME);
        filter.promiscuous = false;
        change(&mut filter);
        let accepted = [ME, OTHER, GROUP, ALL].map(|to| filter.accepts(&to));
        assert_eq!(accepted, expected, "me, other, group, all: {filter:?}");
    }

    #[test]
    fn modes_and_tables() {
        check(|_| {}, [true, false, false, true]);
        check(|f| f.promiscuous = true, [true; 4]);
        check(|f| f.all_multicast = true, [true, false, true, true]);
        check(|f| f.all_unicast = true, [true, true, false, true]);
        check(|f| f.no_broadcast = true, [true, false, false, false]);
        check(|f| f.no_unicast = true, [false, false, false, true]);
        check(
            |f| {
                f.all_multicast = true;
                f.no_multicast = true;
            },
            [true, false, false, true],
        );
        let tables = [&1u32.to_le_bytes()[..], &OTHER, &1u32.to_le_bytes(), &GROUP].concat();
        check(|f| f.set_tables(&tables).unwrap(), [true; 4]);
    }

    #[test]
    fn tables_that_cannot_be() {
        let mut filter = Filter::new(ME);
        let before = filter.clone();
        for data in [
            &[][..],
            &[0; 7],
            &[0; 9],
            &[0xff; 64],
            &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(filter.set_tables(data), None, "{data:?}");
        }
        assert_eq!(filter, before);
        let many = [&65u32.to_le_bytes()[..], &[2; 65 * 6], &[0; 4]].concat();
        filter.set_tables(&many).unwrap();
        filter.promiscuous = false;
        assert!(filter.accepts(&OTHER) && !filter.accepts(&GROUP));
    }
}
