// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `qmtemplate`, and the same for containers: a guest that is only there to be cloned. It cannot be started any
//! more, and there is no way back but a clone.

use crate::error::Error;
use crate::guest::site::Seat;
use crate::guest::{guest, snapshot};
use crate::id::GuestKind;

/// Makes a guest a template. Making a template one is no error.
pub async fn convert(seat: &Seat) -> Result<(), Error> {
    let _guard = seat.lock().await?;
    let mut stored = seat.unlocked()?;
    if !snapshot::list(&stored.config).is_empty() {
        return Err(Error::refused(
            "unable to create template, because there are snapshots",
        ));
    }
    if guest(seat).process().is_some() {
        return Err(Error::refused(match seat.kind {
            GuestKind::Vm => "you can't convert a VM to template if VM is running",
            GuestKind::Container => "you can't convert a CT to template if the CT is running",
        }));
    }
    stored.config.set("template", "1");
    stored.save(&seat.site.store).await
}
