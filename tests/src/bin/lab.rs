// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-lab`: the lab as a command; `make lab` calls it.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool talks to its terminal"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use atoll_tests::lab;
use clap::{Parser, Subcommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Emulated Debian hosts with KVM, each running a node of Atoll.
#[derive(Parser)]
#[command(name = "atoll-lab")]
struct Arguments {
    /// Directory with the running lab's disks, sockets and logs.
    #[arg(long, default_value = "/var/lib/atoll-lab")]
    directory: PathBuf,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start hosts and what `make run` starts on each; print their URLs and logins.
    Up {
        /// Hosts, 1 to 9.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
        /// Address on this machine that forwards to the hosts.
        #[arg(long, default_value = "127.0.0.1")]
        listen: String,
        /// Port for the first host's 8006; the next host takes the next port.
        #[arg(long, default_value_t = 8006)]
        port: u16,
        /// Start bare hosts, without Atoll, that see this directory at /payload.
        #[arg(long, value_name = "DIRECTORY")]
        bare: Option<PathBuf>,
        /// Boot them with the kernel of Debian's backports.
        #[arg(long)]
        backports: bool,
    },
    /// Run a shell command on a host.
    Exec {
        /// Host, 1 for the first.
        node: u8,
        /// Give up after this many seconds.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The command.
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// End the hosts.
    Down,
}

/// One line of the running lab's record.
#[derive(Serialize, Deserialize)]
struct Running {
    number: u8,
    pid: i32,
    agent_port: u16,
    url: String,
}

/// What `make run` does, with the payload's parts instead of the checkout's, and what it shows of the way here.
fn start_script(url: &str) -> String {
    format!(
        "STATE=/var/lib/atoll LISTEN=0.0.0.0 BIN=/payload/bin GUEST=/payload/guest SHOW_URL={url} \
         SHOW_END='make lab-stop' /payload/run/up.sh"
    )
}

fn main() {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => std::process::exit(code),
        Err(error) => {
            eprintln!("atoll-lab: {error:#}");
            std::process::exit(1);
        }
    }
}

fn run(arguments: &Arguments) -> Result<i32> {
    let record = arguments.directory.join("hosts.json");
    match &arguments.command {
        Action::Up {
            nodes,
            listen,
            port,
            bare,
            backports,
        } => {
            if !alive(&record)?.is_empty() {
                bail!(
                    "a lab is running in {}: end it with make lab-stop",
                    arguments.directory.display()
                );
            }
            let atoll = tempfile::tempdir()?;
            let payload = match bare {
                Some(directory) => directory,
                None => {
                    lab::fill_payload(atoll.path())?;
                    atoll.path()
                }
            };
            let hosts = lab::start(&lab::Settings {
                host_count: *nodes,
                memory_mib: lab::MEMORY_MIB,
                kernel: match backports {
                    true => lab::HostKernel::Backports,
                    false => lab::HostKernel::Suite,
                },
                payload: Some(payload),
                directory: arguments.directory.clone(),
                api: Some((listen.clone(), *port)),
            })?;
            up(hosts, bare.is_none(), &record)?;
            Ok(0)
        }
        Action::Exec {
            node,
            timeout,
            command,
        } => {
            let hosts = alive(&record)?;
            let host = hosts.iter().find(|host| host.number == *node);
            let host = host.with_context(|| format!("host {node} is not running: make lab"))?;
            let output = lab::run_at(
                host.agent_port,
                &command.join(" "),
                Duration::from_secs(*timeout),
            )?;
            print!("{}", output.text);
            Ok(output.code)
        }
        Action::Down => {
            for host in alive(&record)? {
                kill(Pid::from_raw(host.pid), Signal::SIGTERM)?;
                println!("node{} ended", host.number);
            }
            let _ = fs::remove_dir_all(&arguments.directory);
            Ok(0)
        }
    }
}

/// Starts Atoll on the hosts, one after the other since they share this machine's cores; lets them go and writes
/// down how to reach them.
fn up(hosts: Vec<lab::Host>, with_atoll: bool, record: &Path) -> Result<()> {
    for host in hosts.iter().filter(|_| with_atoll) {
        let number = host.number();
        let output = host.follow(
            &start_script(&url(host)),
            Duration::from_secs(900),
            |line| println!("node{number}: {line}"),
        )?;
        if output.code != 0 {
            bail!("Atoll did not start on node{number}");
        }
    }
    let mut running = Vec::new();
    for host in hosts {
        let (number, agent_port, url) = (host.number(), host.agent_port(), url(&host));
        println!("node{number}: {url}");
        let pid = i32::try_from(host.detach())?;
        running.push(Running {
            number,
            pid,
            agent_port,
            url,
        });
    }
    fs::write(record, serde_json::to_vec_pretty(&running)?)?;
    println!(
        "a shell command on a host: target/debug/atoll-lab exec 1 COMMAND; the end: make lab-stop"
    );
    Ok(())
}

/// Where this machine reaches a host's API and page.
fn url(host: &lab::Host) -> String {
    format!("https://{}:{}", host.api().address, host.api().port)
}

/// The hosts of the record whose QEMU still runs.
fn alive(record: &Path) -> Result<Vec<Running>> {
    let Ok(text) = fs::read(record) else {
        return Ok(Vec::new());
    };
    let mut hosts: Vec<Running> = serde_json::from_slice(&text)?;
    hosts.retain(|host| {
        fs::read_to_string(format!("/proc/{}/comm", host.pid))
            .is_ok_and(|name| name.starts_with("qemu-system"))
    });
    Ok(hosts)
}
