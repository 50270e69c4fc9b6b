// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Asks a running machine what it is, and pauses and resumes it:
//!
//!     atoll-vmm run --kernel K --api-socket /tmp/vm.sock &
//!     cargo run -p atoll-vmm-protocol --example ctl -- /tmp/vm.sock

use std::error::Error;

use atoll_vmm_protocol::api::Request;
use atoll_vmm_protocol::client::Client;

#[expect(clippy::print_stdout, reason = "an example talks to its reader")]
fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os()
        .nth(1)
        .ok_or("give the machine's API socket")?;
    let client = Client::new(socket);
    let info = client.info()?;
    println!(
        "{}: {:?}, {} vCPUs, {} MiB",
        info.name, info.state, info.cpu_count, info.memory_mib
    );
    client.act(Request::Pause)?;
    println!("after pause:  {:?}", client.info()?.state);
    client.act(Request::Resume)?;
    println!("after resume: {:?}", client.info()?.state);
    Ok(())
}
