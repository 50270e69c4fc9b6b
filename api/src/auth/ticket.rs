// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tickets: short signed texts that say who somebody is. Pure functions of the keys, the time and the text.
//!
//! ```text
//! login     PVE:USER@REALM:HEXTIME::SIGNATURE       two hours
//! CSRF      HEXTIME:SIGNATURE                       as long as the login ticket it belongs to
//! console   PVEVNC:HEXTIME::SIGNATURE               forty seconds, for one user, path and port
//! ```
//!
//! The layout is PVE's, since clients take tickets apart for the user and the time; none of them can check the
//! signature, so that ours is an HMAC-SHA256 under a key in the store, which every node of a cluster reads. Keys
//! are rotated by `auth::keys`; here only two of them are known, and either is good.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;

/// How long a login ticket is good, in seconds. PVE's value; clients renew after half of it.
pub const LOGIN_SECONDS: i64 = 2 * 60 * 60;

/// How long a console ticket is good, in seconds. PVE's value.
pub const CONSOLE_SECONDS: i64 = 40;

/// How far the clock of the node that signed may be ahead of ours, in seconds. PVE's value.
const AHEAD_SECONDS: i64 = 300;

/// The signing keys: the first signs, all verify. Held in memory, read from the store.
pub struct Keys(Vec<hmac::Key>);

impl Keys {
    /// Keys of the given secrets, newest first; at least one.
    pub fn new(secrets: &[Vec<u8>]) -> Self {
        assert!(!secrets.is_empty(), "a node without a signing key");
        let key = |secret: &Vec<u8>| hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self(secrets.iter().map(key).collect())
    }

    fn sign(&self, text: &str) -> String {
        BASE64.encode(hmac::sign(&self.0[0], text.as_bytes()))
    }

    fn verify(&self, text: &str, signature: &str) -> bool {
        let Ok(signature) = BASE64.decode(signature.trim_end_matches('=')) else {
            return false;
        };
        let good = |key: &hmac::Key| hmac::verify(key, text.as_bytes(), &signature).is_ok();
        self.0.iter().any(good)
    }

    /// A login ticket for `user` (`name@realm`), signed at `now` (Unix seconds).
    pub fn login(&self, user: &str, now: i64) -> String {
        let text = format!("PVE:{user}:{now:08X}");
        let signature = self.sign(&text);
        format!("{text}::{signature}")
    }

    /// The user of a login ticket that is good at `now`.
    pub fn login_user<'a>(&self, ticket: &'a str, now: i64) -> Option<&'a str> {
        let (text, signature) = ticket.split_once("::")?;
        let (user, time) = text.strip_prefix("PVE:")?.rsplit_once(':')?;
        (fresh(time, now, LOGIN_SECONDS) && self.verify(text, signature)).then_some(user)
    }

    /// The token that proves a request was made by a page of ours and not by another site.
    pub fn csrf(&self, user: &str, now: i64) -> String {
        let time = format!("{now:08X}");
        let signature = self.sign(&format!("CSRF:{time}:{user}"));
        format!("{time}:{signature}")
    }

    /// Whether `token` was made for `user` and is good at `now`.
    pub fn csrf_fits(&self, token: &str, user: &str, now: i64) -> bool {
        let Some((time, signature)) = token.split_once(':') else {
            return false;
        };
        fresh(time, now, LOGIN_SECONDS) && self.verify(&format!("CSRF:{time}:{user}"), signature)
    }

    /// A ticket for one console: `user` may open `path` at `port` once.
    pub fn console(&self, console: &ConsoleClaim<'_>, now: i64) -> String {
        let time = format!("{now:08X}");
        let signature = self.sign(&console.text(&time));
        format!("PVEVNC:{time}::{signature}")
    }

    /// Whether `ticket` was made for just this console and is good at `now`.
    pub fn console_fits(&self, ticket: &str, console: &ConsoleClaim<'_>, now: i64) -> bool {
        let Some((head, signature)) = ticket.split_once("::") else {
            return false;
        };
        let Some(time) = head.strip_prefix("PVEVNC:") else {
            return false;
        };
        fresh(time, now, CONSOLE_SECONDS) && self.verify(&console.text(time), signature)
    }
}

/// What a console ticket is for.
#[derive(Debug, Clone, Copy)]
pub struct ConsoleClaim<'a> {
    /// `name@realm`, or `name@realm!token`.
    pub user: &'a str,
    /// ACL path of the guest or node: `/vms/100`.
    pub path: &'a str,
    /// The port that `termproxy` answered with.
    pub port: u16,
}

impl ConsoleClaim<'_> {
    fn text(&self, time: &str) -> String {
        format!("PVEVNC:{time}:{}:{}:{}", self.user, self.path, self.port)
    }
}

fn fresh(hex_time: &str, now: i64, seconds_max: i64) -> bool {
    i64::from_str_radix(hex_time, 16)
        .is_ok_and(|time| (-AHEAD_SECONDS..seconds_max).contains(&now.saturating_sub(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 0x6B00_0000;

    fn keys(secrets: &[&str]) -> Keys {
        let secrets: Vec<_> = secrets.iter().map(|s| s.as_bytes().to_vec()).collect();
        Keys::new(&secrets)
    }

    #[test]
    fn login_ticket_has_the_layout_that_clients_take_apart() {
        let ticket = keys(&["a"]).login("root@pam", NOW);
        assert!(
            ticket.starts_with("PVE:root@pam:6B000000::"),
            "unexpected: {ticket}"
        );
    }

    #[test]
    fn login_ticket_lives_two_hours_and_survives_one_rotation() {
        let ticket = keys(&["a"]).login("o:dd@pve", NOW);
        let later = NOW + LOGIN_SECONDS - 1;
        assert_eq!(
            keys(&["b", "a"]).login_user(&ticket, later),
            Some("o:dd@pve")
        );
        assert_eq!(keys(&["a"]).login_user(&ticket, later + 1), None);
        assert_eq!(keys(&["c", "b"]).login_user(&ticket, later), None);
        assert_eq!(
            keys(&["a"]).login_user(&ticket, NOW - AHEAD_SECONDS - 1),
            None
        );
    }

    #[test]
    fn tickets_that_were_touched_are_refused() {
        let keys = keys(&["a"]);
        let ticket = keys.login("user@pve", NOW);
        for forged in [
            ticket.replace("user@pve", "root@pam"),
            ticket.replace("::", ":"),
            ticket.replace("PVE:", "PVEVNC:"),
            ticket[..ticket.len() - 2].to_owned(),
            String::new(),
            "::".to_owned(),
        ] {
            assert_eq!(keys.login_user(&forged, NOW), None, "accepted {forged}");
        }
    }

    #[test]
    fn csrf_token_belongs_to_its_user() {
        let keys = keys(&["a"]);
        let token = keys.csrf("user@pve", NOW);
        assert!(keys.csrf_fits(&token, "user@pve", NOW + 10));
        assert!(!keys.csrf_fits(&token, "root@pam", NOW + 10));
        assert!(!keys.csrf_fits(&token, "user@pve", NOW + LOGIN_SECONDS));
    }

    #[test]
    fn console_ticket_is_for_one_user_path_and_port_and_forty_seconds() {
        let keys = keys(&["a"]);
        let claim = ConsoleClaim {
            user: "user@pve!ci",
            path: "/vms/100",
            port: 5900,
        };
        let ticket = keys.console(&claim, NOW);
        assert!(keys.console_fits(&ticket, &claim, NOW + CONSOLE_SECONDS - 1));
        assert!(!keys.console_fits(&ticket, &claim, NOW + CONSOLE_SECONDS));
        for other in [
            ConsoleClaim {
                port: 5901,
                ..claim
            },
            ConsoleClaim {
                path: "/vms/101",
                ..claim
            },
            ConsoleClaim {
                user: "user@pve",
                ..claim
            },
        ] {
            assert!(!keys.console_fits(&ticket, &other, NOW), "{other:?}");
        }
    }
}
