// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Limits of what a container's card carries, on the host's end of its pair, where the container cannot undo them.
//!
//! ```text
//! container ◄── root: tbf, queues ────────────── veth101i0 ◄── bridge
//! container ─── ingress: police, drops ────────► veth101i0 ──► bridge
//! ```
//!
//! Cards of virtual machines are limited by their machine, not here.

use serde::Deserialize;

use crate::error::Error;
use crate::exec::{ExecError, Program};

/// Slowest and fastest rate that is kept to, in bytes a second: 32 bits count the time of a burst, in 64 ns, and the
/// bytes that wait.
const RATE_MIN: u64 = 1 << 10;
const RATE_MAX: u64 = 32 << 30;

/// What may pass at once: a second's worth within these bounds, in bytes. The least is more than the largest packet
/// that crosses a pair unsegmented, which the policer would drop for ever; the most is PVE's.
const BURST_MIN: u64 = 128 << 10;
const BURST_MAX: u64 = 1 << 20;

/// Longest that a packet waits for tokens before the queue drops it.
const LATENCY: &str = "100ms";

/// One step on the way to a limit.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    /// Arguments of tc(8).
    args: String,
    /// Parts of the kernel that it needs.
    needs: &'static str,
}

/// Limits both ways of a link that has no limits yet, in bytes a second. `card` (`net0`) is for messages. A link that
/// could not be limited both ways has no limits.
pub async fn set(link: &str, card: &str, bytes_per_second: u64) -> Result<(), Error> {
    for step in steps(link, bytes_per_second) {
        let done = Program::new("tc")
            .args(step.args.split_whitespace())
            .run()
            .await;
        if let Err(error) = done {
            clear(link).await?;
            return Err(refusal(link, card, step.needs, error));
        }
    }
    Ok(())
}

/// Takes the limits of a link away, if it has some.
pub async fn clear(link: &str) -> Result<(), Error> {
    let shown = Program::new("tc")
        .args(["-json", "qdisc", "show", "dev", link])
        .run()
        .await?;
    for place in places(&shown)? {
        Program::new("tc")
            .args(["qdisc", "delete", "dev", link, place])
            .run()
            .await?;
    }
    Ok(())
}

fn steps(link: &str, bytes_per_second: u64) -> [Step; 3] {
    let rate = bytes_per_second.clamp(RATE_MIN, RATE_MAX);
    let burst = rate.clamp(BURST_MIN, BURST_MAX);
    [
        Step {
            args: format!(
                "qdisc add dev {link} root tbf rate {rate}bps burst {burst}b latency {LATENCY}"
            ),
            needs: "sch_tbf",
        },
        Step {
            args: format!("qdisc add dev {link} ingress"),
            needs: "sch_ingress",
        },
        Step {
            // mtu: what is larger is dropped whatever the rate; the default, 2 KiB, is less than what a pair carries.
            args: format!(
                "filter add dev {link} ingress matchall \
                 action police rate {rate}bps burst {burst}b mtu {BURST_MIN}b conform-exceed drop"
            ),
            needs: "cls_matchall and act_police",
        },
    ]
}

fn refusal(link: &str, card: &str, needs: &str, error: ExecError) -> Error {
    match error {
        ExecError::Failed { .. } => Error::failed(
            format!(
                "{card}: its rate cannot be limited on {link}: does this host's kernel have {needs}?"
            ),
            error,
        ),
        other => other.into(),
    }
}

/// Where a link has queues of ours, of what `tc -json qdisc show` prints.
fn places(shown: &str) -> Result<Vec<&'static str>, Error> {
    #[derive(Deserialize)]
    struct Queue {
        kind: String,
    }
    let queues: Vec<Queue> = match shown.trim() {
        "" => Vec::new(),
        shown => serde_json::from_str(shown)
            .map_err(|error| Error::failed("read what tc printed", error))?,
    };
    let ours = queues.iter().filter_map(|queue| match queue.kind.as_str() {
        "tbf" => Some("root"),
        "ingress" => Some("ingress"),
        _ => None,
    });
    Ok(ours.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_have_the_same_rate() {
        let [queue, ingress, police] = steps("veth101i0", 5 << 20).map(|step| step.args);
        assert_eq!(
            queue,
            "qdisc add dev veth101i0 root tbf rate 5242880bps burst 1048576b latency 100ms"
        );
        assert_eq!(ingress, "qdisc add dev veth101i0 ingress");
        assert_eq!(
            police,
            "filter add dev veth101i0 ingress matchall action police rate 5242880bps burst 1048576b \
             mtu 131072b conform-exceed drop"
        );
        let slow = &steps("veth101i0", 1)[0].args;
        assert!(
            slow.contains("rate 1024bps burst 131072b"),
            "the largest packet passes: {slow}"
        );
    }

    #[test]
    fn queues_of_ours_are_found() {
        let shown =
            r#"[{"kind":"tbf","handle":"8001:","root":true},{"kind":"ingress","handle":"ffff:"}]"#;
        assert_eq!(places(shown).unwrap(), ["root", "ingress"]);
        for none in ["", "[]\n", r#"[{"kind":"noqueue","handle":"0:"}]"#] {
            assert!(places(none).unwrap().is_empty(), "{none}");
        }
        assert!(places("qdisc noqueue 0: root").is_err());
    }
}
