// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The container runtime: everything behind the command `atoll-ct`, usable as a library by a **single-threaded**
//! process. libcontainer does the init path (namespaces, mounts, pivot, capabilities, seccomp); what it lacks is
//! here, and each module says what that is.
//!
//! | module | what | why not libcontainer's |
//! |---|---|---|
//! | [`bundle`] | reads and checks config.json, fills in defaults | errors that name the setting; devices closed by default |
//! | [`create`] | cgroups, idmapped mounts, then libcontainer, then the record | its builder reads the file and keeps state by itself |
//! | [`furnish`] | what is left undone in the mount namespace | dropped options, `--no-pivot` |
//! | [`idmap`] | idmapped root file system and bind mounts | refused there |
//! | `copy_up` | a tmpfs that begins with what the image has | refused there |
//! | [`cgroup`] | named hierarchies, use check, recursive removal, freezer, v2 device filter | absent there |
//! | [`exec`] | a further process in a container | joins no user namespace and no seccomp filter there |
//! | [`filter`], `notify` | seccomp: ENOSYS for newer calls, and the agent of a filter that asks | EPERM there; masks mixed up |
//! | [`state`], [`lifecycle`] | state.json by rename; start, kill, delete … | status stored and stale there |
//! | [`monitor`], [`console`] | holds the console, records the exit | absent there |
//! | [`mounts`], [`device_plug`] | what comes and goes while a container runs | absent there |
//! | [`mknod`] | harmless device nodes made from inside | absent there |
//! | [`terminals`] | `/dev/tty1` and so on | not in the runtime-spec |
//! | [`checkpoint`], [`restore`], [`criu`] | a container's processes as files, and back | no restore there; fewer options |
//! | [`events`] | statistics and out-of-memory kills | prints by itself; no such events |
//! | [`run`], [`terminal`] | the foreground, by pidfd | absent there |
//! | [`own_file`] | the program itself cannot be written to from a container | only `youki`'s, by a copy in memory |
//! | [`rdt`] | shares of caches and memory bandwidth | called by its `youki` alone |
//! | `starting` | what `start` is told by the init | its signal goes one way |
//! | `apparmor` | whether the profile is loaded | found out in the middle, without its name |
//! | [`rootless`] | an ordinary user's containers: host's devices, perhaps no cgroup | refusals passed over, on v2 alone |
//! | `inherit`, `workdir` | inheritable capabilities; a missing `process.cwd` | order of the sets; refused there |
//!
//! Not here: SELinux; asking for it is a one-line error.

mod apparmor;
pub mod bundle;
pub mod cgroup;
pub mod checkpoint;
pub mod console;
mod copy_up;
pub mod create;
pub mod criu;
pub mod device_plug;
mod devices;
pub mod error;
pub mod events;
pub mod exec;
pub mod filter;
pub mod furnish;
mod hooks;
pub mod idmap;
mod inherit;
pub mod lifecycle;
pub mod log;
pub mod mknod;
pub mod monitor;
pub mod mounts;
mod notify;
pub mod overlay;
mod own_dev;
pub mod own_file;
pub mod process;
mod program;
pub mod rdt;
pub mod restore;
pub mod rootless;
pub mod run;
mod starting;
pub mod state;
mod sys;
pub mod terminal;
pub mod terminals;
mod tree;
mod workdir;
