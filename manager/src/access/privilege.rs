// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The privileges, PVE's 47, and sets of them.

use std::fmt;

macro_rules! privileges {
    ($($variant:ident = $name:literal,)*) => {
        /// A right to do one kind of thing on the objects of a path.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "the names are PVE's and say what they allow")]
        pub enum Privilege { $($variant,)* }

        impl Privilege {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// PVE's name, such as `VM.PowerMgmt`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

privileges! {
    DatastoreAllocate = "Datastore.Allocate",
    DatastoreAllocateSpace = "Datastore.AllocateSpace",
    DatastoreAllocateTemplate = "Datastore.AllocateTemplate",
    DatastoreAudit = "Datastore.Audit",
    GroupAllocate = "Group.Allocate",
    MappingAudit = "Mapping.Audit",
    MappingModify = "Mapping.Modify",
    MappingUse = "Mapping.Use",
    PermissionsModify = "Permissions.Modify",
    PoolAllocate = "Pool.Allocate",
    PoolAudit = "Pool.Audit",
    RealmAllocate = "Realm.Allocate",
    RealmAllocateUser = "Realm.AllocateUser",
    SdnAllocate = "SDN.Allocate",
    SdnAudit = "SDN.Audit",
    SdnUse = "SDN.Use",
    SysAccessNetwork = "Sys.AccessNetwork",
    SysAudit = "Sys.Audit",
    SysConsole = "Sys.Console",
    SysIncoming = "Sys.Incoming",
    SysModify = "Sys.Modify",
    SysPowerMgmt = "Sys.PowerMgmt",
    SysSyslog = "Sys.Syslog",
    UserModify = "User.Modify",
    VmAllocate = "VM.Allocate",
    VmAudit = "VM.Audit",
    VmBackup = "VM.Backup",
    VmClone = "VM.Clone",
    VmConfigCdrom = "VM.Config.CDROM",
    VmConfigCpu = "VM.Config.CPU",
    VmConfigCloudinit = "VM.Config.Cloudinit",
    VmConfigDisk = "VM.Config.Disk",
    VmConfigHwType = "VM.Config.HWType",
    VmConfigMemory = "VM.Config.Memory",
    VmConfigNetwork = "VM.Config.Network",
    VmConfigOptions = "VM.Config.Options",
    VmConsole = "VM.Console",
    VmGuestAgentAudit = "VM.GuestAgent.Audit",
    VmGuestAgentFileRead = "VM.GuestAgent.FileRead",
    VmGuestAgentFileSystemMgmt = "VM.GuestAgent.FileSystemMgmt",
    VmGuestAgentFileWrite = "VM.GuestAgent.FileWrite",
    VmGuestAgentUnrestricted = "VM.GuestAgent.Unrestricted",
    VmMigrate = "VM.Migrate",
    VmPowerMgmt = "VM.PowerMgmt",
    VmReplicate = "VM.Replicate",
    VmSnapshot = "VM.Snapshot",
    VmSnapshotRollback = "VM.Snapshot.Rollback",
}

impl Privilege {
    /// The privilege of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|p| p.name() == name)
    }
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of privileges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrivilegeSet(u64);

impl PrivilegeSet {
    /// None.
    pub const EMPTY: Self = Self(0);
    /// All of them.
    pub const FULL: Self = Self((1 << Privilege::ALL.len()) - 1);

    /// A set of some privileges.
    pub const fn of(privileges: &[Privilege]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < privileges.len() {
            bits |= 1 << privileges[index] as u64;
            index += 1;
        }
        Self(bits)
    }

    /// Whether a privilege is in it.
    pub const fn contains(self, privilege: Privilege) -> bool {
        self.0 & (1 << privilege as u64) != 0
    }

    /// What is in either.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in this one only.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its privileges, by name.
    pub fn iter(self) -> impl Iterator<Item = Privilege> {
        Privilege::ALL
            .iter()
            .copied()
            .filter(move |p| self.contains(*p))
    }
}

impl FromIterator<Privilege> for PrivilegeSet {
    fn from_iter<I: IntoIterator<Item = Privilege>>(privileges: I) -> Self {
        privileges
            .into_iter()
            .fold(Self::EMPTY, |set, p| set.union(Self::of(&[p])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_there_are_47() {
        assert_eq!(Privilege::ALL.len(), 47);
        for privilege in Privilege::ALL {
            assert_eq!(Privilege::from_name(privilege.name()), Some(*privilege));
        }
        assert_eq!(PrivilegeSet::FULL.iter().count(), 47);
    }
}
