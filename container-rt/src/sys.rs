// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! System calls that no dependency of ours wraps: pidfds, the new mount API, BPF, keyrings, and the namespaced
//! fork. Thin: each function is one call and turns `-1` into an `io::Error`. Policy lives in the callers.
#![expect(
    unsafe_code,
    reason = "raw system calls; every block is one call whose pointers outlive it"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A process id as the kernel's `pid_t`.
pub type Pid = libc::pid_t;

/// Result of [`fork`] and [`fork_into_user_namespace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// In the caller: the child's process id.
    Parent(Pid),
    /// In the new process.
    Child,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn owned_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel just gave us this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Forks. The process must have one thread: the child goes on running Rust code.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: atoll-ct is single-threaded (no thread is started before any fork), so the child has a whole heap.
    let pid = unsafe { libc::fork() };
    Ok(match check(pid.into())? {
        0 => Fork::Child,
        _ => Fork::Parent(pid),
    })
}

/// Forks a child into a new user namespace (id maps still to be written by the parent).
pub fn fork_into_user_namespace() -> io::Result<Fork> {
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: clone without CLONE_VM and with a null stack is fork; single-threaded as in `fork`.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    let pid = Pid::try_from(check(result)?).map_err(io::Error::other)?;
    Ok(if pid == 0 {
        Fork::Child
    } else {
        Fork::Parent(pid)
    })
}

/// Ends the process without running destructors or exit handlers: the only safe end of a forked child.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// A descriptor for a process, immune to reuse of its id. pidfd_open(2).
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    owned_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal through a pidfd. pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo means "as kill(2)"; the other arguments are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            info,
            0,
        )
    };
    check(result).map(drop)
}

/// Sends a signal by process id; for members of a cgroup, which is re-read until it is empty.
pub fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Reaps the child behind a pidfd once it has ended: its exit code, or the signal that killed it. waitid(2).
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Result<i32, i32>> {
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: all-zero bytes are a valid siginfo_t.
    let mut information: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let pointer = &raw mut information;
    loop {
        // SAFETY: waitid writes one siginfo_t, which lives through the call.
        let result = unsafe { libc::waitid(libc::P_PIDFD, id, pointer, libc::WEXITED) };
        match check(result.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => {
                other?;
                break;
            }
        }
    }
    // SAFETY: waitid succeeded with WEXITED, so the SIGCHLD fields are set.
    let status = unsafe { information.si_status() };
    Ok(if information.si_code == libc::CLD_EXITED {
        Ok(status)
    } else {
        Err(status)
    })
}

/// Reaps ended children that nobody waits for, except the one behind `keep`, so that a subreaper gathers no
/// zombies.
pub fn reap_orphans(keep: BorrowedFd<'_>) {
    loop {
        // SAFETY: all-zero bytes are a valid siginfo_t.
        let mut information: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let pointer = &raw mut information;
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: waitid writes one siginfo_t, which lives through the call.
        if unsafe { libc::waitid(libc::P_ALL, 0, pointer, flags) } != 0 {
            return;
        }
        // SAFETY: waitid succeeded; with nothing to report the field is 0.
        let pid = unsafe { information.si_pid() };
        if pid == 0 || is_ended(keep) {
            return;
        }
        // SAFETY: a null status pointer is allowed; this child has ended, so it does not wait.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

fn is_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, which lives through the call.
    unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
}

/// Opens the other side of a pty, in whatever devpts it is. ioctl_tty(2) TIOCGPTPEER.
pub fn pty_peer(pty: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes integers only.
    owned_fd(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// Lets the other side of a new pty be opened, and answers its number in its devpts. ioctl_tty(2).
pub fn unlock_pty(pty: BorrowedFd<'_>) -> io::Result<u32> {
    let (mut number, unlocked): (u32, libc::c_int) = (0, 0);
    let pointer = &raw const unlocked;
    // SAFETY: TIOCSPTLCK reads one int, which lives through the call.
    check(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCSPTLCK, pointer) }.into())?;
    let pointer = &raw mut number;
    // SAFETY: TIOCGPTN writes one unsigned int, which lives through the call.
    check(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCGPTN, pointer) }.into())?;
    Ok(number)
}

/// A copy of another process's descriptor. pidfd_getfd(2), Linux 5.6.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    owned_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// Joins the namespaces `flags` (CLONE_NEW*) of the process behind a pidfd. setns(2), Linux 5.8.
pub fn setns(pidfd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::setns(pidfd.as_raw_fd(), flags) }.into()).map(drop)
}

/// The parent of a user or process id namespace. ioctl_ns(2).
pub fn parent_namespace(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: NS_GET_PARENT takes no argument.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_PARENT) };
    owned_fd(fd.into())
}

/// Detached copy of the mount at `path`, of it alone or with everything below. open_tree(2).
pub fn open_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: the path is a C string that lives through the call.
    owned_fd(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// Makes a detached mount idmapped by a user namespace. mount_setattr(2), Linux 5.12.
pub fn mount_idmapped(
    tree: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    set_mount_attributes(Where::Tree(tree), &attributes, recursive)
}

/// A mount whose attributes change: what is open, or what is at a path, which ends in no symbolic link.
enum Where<'a> {
    Tree(BorrowedFd<'a>),
    Path(&'a Path),
}

/// With `below`, of all mounts below it, too. mount_setattr(2).
fn set_mount_attributes(
    mount: Where<'_>,
    attributes: &libc::mount_attr,
    below: bool,
) -> io::Result<()> {
    let (folder, path, flags) = match mount {
        Where::Tree(tree) => (tree.as_raw_fd(), c"".to_owned(), libc::AT_EMPTY_PATH),
        Where::Path(path) => (libc::AT_FDCWD, c_path(path)?, libc::AT_SYMLINK_NOFOLLOW),
    };
    let flags = flags | if below { libc::AT_RECURSIVE } else { 0 };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the attributes and the path live through the call, and `size` is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            folder,
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size,
        )
    };
    check(result).map(drop)
}

/// What [`change_mount`] takes away or sets, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountChange {
    attributes: u64,
    cleared: u64,
    propagation: u64,
    below: bool,
}

impl MountChange {
    fn request(self) -> libc::mount_attr {
        libc::mount_attr {
            attr_set: self.attributes,
            attr_clr: self.cleared,
            propagation: self.propagation,
            userns_fd: 0,
        }
    }

    /// Attributes (MOUNT_ATTR_*) to set, and the mask of those to clear before.
    pub const fn attributes(set: u64, cleared: u64) -> Self {
        Self {
            attributes: set,
            cleared,
            propagation: 0,
            below: false,
        }
    }

    /// Writing.
    pub const READONLY: Self = Self {
        attributes: libc::MOUNT_ATTR_RDONLY,
        cleared: 0,
        propagation: 0,
        below: false,
    };
    /// Set-user-id programs, devices and programs.
    pub const HARMLESS: Self = Self {
        attributes: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        cleared: 0,
        propagation: 0,
        below: false,
    };
    /// In every mount below, too.
    pub const BELOW: Self = Self {
        attributes: 0,
        cleared: 0,
        propagation: 0,
        below: true,
    };

    /// How mounts below travel between namespaces: one of MS_SHARED, MS_SLAVE, MS_PRIVATE and MS_UNBINDABLE.
    pub const fn propagation(flag: u64) -> Self {
        Self {
            attributes: 0,
            cleared: 0,
            propagation: flag,
            below: false,
        }
    }
}

impl std::ops::BitOr for MountChange {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self {
            attributes: self.attributes | other.attributes,
            cleared: self.cleared | other.cleared,
            propagation: self.propagation | other.propagation,
            below: self.below || other.below,
        }
    }
}

/// MountChanges the mount at `path`, not following a link there. mount_setattr(2).
pub fn change_mount(path: &Path, what: MountChange) -> io::Result<()> {
    set_mount_attributes(Where::Path(path), &what.request(), what.below)
}

/// Changes a detached mount. mount_setattr(2).
pub fn change_tree(tree: BorrowedFd<'_>, what: MountChange) -> io::Result<()> {
    set_mount_attributes(Where::Tree(tree), &what.request(), what.below)
}

/// Attaches a detached mount at what is open. move_mount(2).
pub fn move_mount_onto(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
    const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
    let empty = c"".as_ptr();
    // SAFETY: the empty path lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty,
            target.as_raw_fd(),
            empty,
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

/// Attaches a detached mount at `target`. move_mount(2).
pub fn move_mount(tree: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    let target = c_path(target)?;
    let empty = c"".as_ptr();
    // SAFETY: both paths are C strings that live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty,
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

/// Detaches the mount at `target`, not following a link there.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the path is a C string that lives through the call.
    let result =
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    check(result.into()).map(drop)
}

/// A counter that the kernel can be given to report events. eventfd(2).
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    owned_fd(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }.into())
}

/// Starts a new session keyring, so that the container does not share the caller's. keyctl(2).
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name is a C string that lives through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    check(result).map(drop)
}

/// Lets orphans below this process become its children. prctl(2) PR_SET_CHILD_SUBREAPER.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into()).map(drop)
}

/// Whether others of the same user may trace this process and open its /proc files. prctl(2) PR_SET_DUMPABLE.
pub fn set_dumpable(dumpable: bool) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(
        unsafe {
            libc::prctl(
                libc::PR_SET_DUMPABLE,
                libc::c_ulong::from(dumpable),
                0,
                0,
                0,
            )
        }
        .into(),
    )
    .map(drop)
}

/// Keeps the capabilities over the next change of user ids. prctl(2) PR_SET_KEEPCAPS.
pub fn keep_capabilities() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Keeps the capabilities over every later change of user ids. prctl(2) PR_SET_SECUREBITS, capabilities(7).
pub fn keep_capabilities_for_good() -> io::Result<()> {
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) }.into())
        .map(drop)
}

/// Forbids gaining privileges by execve for good. prctl(2) PR_SET_NO_NEW_PRIVS.
pub fn set_no_new_privileges() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Lets a broken pipe end the program that takes our place, as usual; Rust's own start ignores the signal for us, and an
/// ignored one stays so. signal(7).
pub fn die_of_broken_pipes() -> io::Result<()> {
    // SAFETY: the default action runs no code of ours, so that nothing has to be safe in a handler.
    match unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Marks every descriptor from `first` on close-on-exec. close_range(2).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: takes integers only and closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result).map(drop)
}

/// Sets the window size of a terminal.
pub fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pointer = &raw const size;
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, pointer) }.into()).map(drop)
}

/// Columns and rows of a terminal.
pub fn window_size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pointer = &raw mut size;
    // SAFETY: TIOCGWINSZ writes one winsize, which lives through the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, pointer) }.into())?;
    Ok((size.ws_col, size.ws_row))
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as we set it. Linux `include/uapi/linux/bpf.h`.
#[repr(C)]
#[derive(Default)]
struct BpfLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
#[derive(Default)]
struct BpfAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Loads a device-filter program of encoded instructions. bpf(2).
pub fn bpf_load_device_filter(instructions: &[u64]) -> io::Result<OwnedFd> {
    let attributes = BpfLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..BpfLoad::default()
    };
    let pointer = &raw const attributes;
    // SAFETY: the attributes, the instructions and the licence they point to live through the call.
    owned_fd(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, pointer, size_of::<BpfLoad>()) })
}

/// Attaches a device filter to a cgroup v2 directory; it replaces one attached before without the multi flag.
pub fn bpf_attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = BpfAttach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    let pointer = &raw const attributes;
    // SAFETY: the attributes live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            pointer,
            size_of::<BpfAttach>(),
        )
    };
    check(result).map(drop)
}

/// Puts a seccomp filter before all system calls of this process to come. Answers the listener where the flags ask for
/// one. seccomp(2).
pub fn load_filter(
    program: &[libc::sock_filter],
    flags: libc::c_ulong,
) -> io::Result<Option<OwnedFd>> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    let pointer = &raw const program;
    // SAFETY: the program lives through the call, which only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            pointer,
        )
    };
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return check(result).map(|_| None);
    }
    owned_fd(result).map(Some)
}
