// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Realm `pam`: the host's own users, checked by the host's own PAM modules.
//!
//! The modules are foreign code that blocks, reads `/etc/shadow` and may crash, so they run in a process of their
//! own: this binary again, as `atolld pam-check`. It gets user and password through its standard input and says
//! by its exit code what PAM said. `check` is the daemon's side, `helper` the other one.

use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use atoll_manager::error::Error;
use nonstick::{
    AuthnFlags, ConversationAdapter, ErrorCode, Result as PamResult, Transaction as _,
    TransactionBuilder,
};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// The subcommand of `atolld` that is the helper.
pub const SUBCOMMAND: &str = "pam-check";

/// Our own service file; a host without it is asked as for a login on its console.
const SERVICE: &str = "atoll";
const SERVICE_FALLBACK: &str = "login";

/// How long PAM may take: modules that ask a server over the network can hang.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Longest input of the helper, in bytes.
const INPUT_BYTES_MAX: u64 = 64 << 10;

/// Exit codes of the helper; anything else means that it died.
const GOOD: u8 = 0;
const WRONG: u8 = 1;
const BROKEN: u8 = 2;

/// Asks PAM whether `password` is `user`'s and the account may be used.
pub async fn check(user: &str, password: &str) -> Result<bool, Error> {
    if user.contains('\0') || password.contains('\0') {
        return Ok(false);
    }
    // By its open file, so that an upgrade of the binary under a running daemon does not matter.
    let mut child = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Error::failed("start the PAM helper", error))?;
    let mut input = child.stdin.take().expect("the helper's input is a pipe");
    let exchange = async {
        input
            .write_all(format!("{user}\0{password}").as_bytes())
            .await?;
        drop(input);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(TIMEOUT, exchange)
        .await
        .map_err(|_| Error::refused("PAM did not answer in time"))?
        .map_err(|error| Error::failed("ask the PAM helper", error))?;
    match output.status.code().map(u8::try_from) {
        Some(Ok(GOOD)) => Ok(true),
        Some(Ok(WRONG)) => Ok(false),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(Error::refused(format!(
                "PAM failed: {said} ({})",
                output.status
            )))
        }
    }
}

/// The helper process: reads `user NUL password`, asks PAM, and is done.
pub fn helper() -> ExitCode {
    let mut input = String::new();
    let read = std::io::stdin()
        .take(INPUT_BYTES_MAX)
        .read_to_string(&mut input);
    let (Ok(_), Some((user, password))) = (read, input.split_once('\0')) else {
        tracing::error!("expected user and password on standard input");
        return ExitCode::from(BROKEN);
    };
    match ask(user, password) {
        Ok(()) => ExitCode::from(GOOD),
        Err(error) if is_the_callers_fault(error) => ExitCode::from(WRONG),
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(BROKEN)
        }
    }
}

fn ask(user: &str, password: &str) -> PamResult<()> {
    let own = Path::new("/etc/pam.d").join(SERVICE).exists();
    let service = if own { SERVICE } else { SERVICE_FALLBACK };
    let answers = Answers {
        user: user.into(),
        password: password.into(),
    };
    let mut transaction = TransactionBuilder::new_with_service(service)
        .username(user)
        .build(answers.into_conversation())?;
    let flags = AuthnFlags::SILENT | AuthnFlags::DISALLOW_NULL_AUTHTOK;
    transaction.authenticate(flags)?;
    transaction.account_management(flags)
}

fn is_the_callers_fault(error: ErrorCode) -> bool {
    matches!(
        error,
        ErrorCode::AuthenticationError
            | ErrorCode::PermissionDenied
            | ErrorCode::CredentialsInsufficient
            | ErrorCode::UserUnknown
            | ErrorCode::MaxTries
            | ErrorCode::NewAuthTokRequired
            | ErrorCode::AccountExpired
            | ErrorCode::AuthTokExpired
    )
}

/// Answers visible questions with the name and hidden ones with the password.
struct Answers {
    user: OsString,
    password: OsString,
}

impl ConversationAdapter for Answers {
    fn prompt(&self, _: impl AsRef<OsStr>) -> PamResult<OsString> {
        Ok(self.user.clone())
    }

    fn masked_prompt(&self, _: impl AsRef<OsStr>) -> PamResult<OsString> {
        Ok(self.password.clone())
    }

    fn error_msg(&self, _: impl AsRef<OsStr>) {}

    fn info_msg(&self, _: impl AsRef<OsStr>) {}
}
