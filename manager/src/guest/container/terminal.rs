// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which terminals a container has, and which of them the API shows: keys `console`, `tty` and `cmode`.
//!
//! A container with a distribution's init has logins on `/dev/tty1` and so on, of which the first is shown, as in PVE.
//! One that runs a program of its own (`entrypoint`, an image) has nobody to open a terminal: unless its config says
//! otherwise it has its console only, and that is shown.

use crate::error::Error;
use crate::exec::Program;
use crate::guest::Console;
use crate::guest::config::GuestConfig;
use crate::guest::container::{Container, image};

/// Most terminals, which is also what the key's row allows.
const TTYS_MAX: u8 = 6;
/// The terminal that is shown.
const SHOWN: u8 = 1;
/// What `cmode: shell` runs: root's own shell as a login, without a question. In words that every POSIX shell has built
/// in, since nothing else need be in the container.
const SHELL: &str = "while IFS=: read -r name x id x x home shell; do [ \"$id\" = 0 ] && break; done </etc/passwd; \
                     export HOME=\"${home:-/}\" USER=\"${name:-root}\"; cd \"$HOME\"; exec \"${shell:-/bin/sh}\" -l";

/// Whether init has a console.
pub fn has_console(config: &GuestConfig) -> bool {
    config.is_set("console")
}

/// How many terminals there are besides the console.
pub fn ttys(config: &GuestConfig) -> u8 {
    if runs_program(config) && config.get("tty").is_none() {
        return 0;
    }
    config.number("tty").unwrap_or(0).min(TTYS_MAX)
}

/// The terminals as systemd is told of them, for which it starts logins: its container interface, `container_ttys`.
/// The console's pty is the first of the container's, when it has one.
pub fn announced(config: &GuestConfig) -> Option<String> {
    let first = u8::from(has_console(config));
    let names: Vec<String> = (first..first + ttys(config))
        .map(|number| format!("pts/{number}"))
        .collect();
    (!names.is_empty()).then(|| format!("container_ttys={}", names.join(" ")))
}

fn runs_program(config: &GuestConfig) -> bool {
    config.get("entrypoint").is_some() || config.get(image::KEY).is_some()
}

/// What is shown of a running container. Its terminals are those of its start, whatever its config says now.
pub fn console(container: &Container, config: &GuestConfig) -> Result<Console, Error> {
    let usual = match runs_program(config) {
        true => "console",
        false => "tty",
    };
    let folder = container.state_folder();
    let tty = folder.join(format!("tty{SHOWN}.sock"));
    match config.get("cmode").unwrap_or(usual) {
        "shell" => Ok(Console::Program(shell(container))),
        "tty" if tty.exists() => Ok(Console::Line {
            socket: tty,
            tty: Some(SHOWN),
        }),
        _ if has_console(config) => Ok(Console::main(folder.join("console.sock"))),
        _ => Err(Error::refused(
            "the container has no terminal to show: set the key console or tty, or cmode to shell",
        )),
    }
}

fn shell(container: &Container) -> Program {
    let seat = &container.seat;
    Program::new(seat.site.program("atoll-ct"))
        .arg("--root")
        .arg(seat.site.containers_folder())
        .args(["exec", "--tty", "--env", "TERM=xterm-256color"])
        .args([&seat.name(), "/bin/sh", "-c", SHELL])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn terminals_by_key() {
        let check = |text: &str, count: u8, announcement: Option<&str>| {
            let config = GuestConfig::parse(GuestKind::Container, text);
            assert_eq!(ttys(&config), count, "{text}");
            assert_eq!(announced(&config).as_deref(), announcement, "{text}");
        };
        check("", 2, Some("container_ttys=pts/1 pts/2"));
        check("tty: 1", 1, Some("container_ttys=pts/1"));
        check("tty: 0", 0, None);
        check("console: 0", 2, Some("container_ttys=pts/0 pts/1"));
        check("console: 0\ntty: 0", 0, None);
        check("entrypoint: /bin/app", 0, None);
        check(
            "entrypoint: /bin/app\ntty: 1",
            1,
            Some("container_ttys=pts/1"),
        );
    }
}
