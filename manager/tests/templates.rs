// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Downloads from a server that breaks off, and indexes of templates signed by keys that are made for the test.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

#[path = "world/files.rs"]
mod files;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use atoll_manager::error::Error;
use atoll_manager::storage::checksum::Checksum;
use atoll_manager::storage::download::Download;
use atoll_manager::storage::fetch::{self, Limits};
use atoll_manager::storage::incoming::{Existing, Incoming};
use atoll_manager::storage::name::{Content, VolumeName};
use atoll_manager::task::{NewTask, TaskContext};
use atoll_manager::{Node, Settings};
use files::{Seen, Served, Server};

/// Two tries after the first, at once.
const LIMITS: Limits = Limits {
    size_bytes_max: 64 << 20,
    verify_certificates: false,
    waits: &[Duration::ZERO, Duration::ZERO],
};
/// Size of the file of the tests, in bytes, and where its connection breaks.
const SIZE: usize = 5 << 20;
const CUT: usize = 3 << 20;
const TAG: (&str, &str) = ("ETag", "\"one\"");
const OTHER_TAG: (&str, &str) = ("ETag", "\"two\"");

/// Bytes of which no two places look alike.
fn bytes(seed: u32) -> Vec<u8> {
    let numbers = (0..).map(|n: u32| n.wrapping_add(seed).wrapping_mul(2_654_435_761));
    numbers.flat_map(u32::to_le_bytes).take(SIZE).collect()
}

/// What a download has got, with its log.
async fn fetched(url: &str) -> (Result<Vec<u8>, Error>, String) {
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("part");
    std::fs::write(&part, "").unwrap();
    let incoming = Incoming::new(part, folder.path().join("whole"));
    let log = std::sync::Mutex::new(String::new());
    let add = |line: &str| {
        let mut log = log.lock().unwrap();
        log.push_str(line);
        log.push('\n');
    };
    let result = match fetch::fetch(url, &incoming, LIMITS, &add).await {
        Ok(size) => {
            let path = incoming.commit(None, Existing::Refuse).await.unwrap();
            let got = std::fs::read(path).unwrap();
            assert_eq!(size, got.len() as u64);
            Ok(got)
        }
        Err(error) => Err(error),
    };
    (result, log.into_inner().unwrap())
}

fn sent(seen: &[Seen]) -> Vec<usize> {
    seen.iter().map(|request| request.sent).collect()
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_broke() {
    let changed = ("Last-Modified", "Fri, 27 Nov 2026 10:00:00 GMT");
    for (server, validator) in [
        (Server::http(), TAG),
        (Server::http(), changed),
        (Server::https(), TAG),
    ] {
        let file = Served {
            bytes: bytes(1),
            validator: Some(validator),
            cuts: vec![CUT, 1 << 20],
            ..Served::default()
        };
        server.put("/x", file);
        let (got, log) = fetched(&server.url("/x")).await;
        assert!(got.unwrap() == bytes(1), "{log}");
        let seen = server.seen();
        assert_eq!(sent(&seen), [CUT, 1 << 20, 1 << 20], "nothing came twice");
        assert_eq!((&seen[0].range, &seen[0].if_range), (&None, &None));
        for (request, first) in [(&seen[1], CUT), (&seen[2], 4 << 20)] {
            assert_eq!(request.range, Some(format!("bytes={first}-")));
            assert_eq!(request.if_range.as_deref(), Some(validator.1));
            assert!(
                log.contains(&format!("going on at byte {first}\n")),
                "{log}"
            );
        }
        assert!(log.ends_with("5 MiB of 5 MiB (100 %)\n"), "{log}");
    }
}

#[tokio::test]
async fn a_file_that_changed_is_not_glued_to_what_it_was() {
    let weak = ("ETag", "W/\"one\"");
    let just_now = ("Last-Modified", "Sat, 28 Nov 2026 10:00:00 GMT");
    for (validator, next, is_careless, expected) in [
        // The server sees that it is another file.
        (Some(TAG), OTHER_TAG, false, vec![CUT, SIZE]),
        // It does not, but tells which one it sent.
        (Some(TAG), OTHER_TAG, true, vec![CUT, SIZE - CUT, SIZE]),
        // Nothing tells: it is not even asked for a part.
        (None, OTHER_TAG, true, vec![CUT, SIZE]),
        (Some(weak), weak, true, vec![CUT, SIZE]),
        (Some(just_now), just_now, true, vec![CUT, SIZE]),
    ] {
        let server = Server::http();
        let next = Served {
            bytes: bytes(2),
            validator: Some(next),
            is_careless,
            ..Served::default()
        };
        let file = Served {
            bytes: bytes(1),
            validator,
            cuts: vec![CUT],
            next: Some(Box::new(next)),
            is_careless,
        };
        server.put("/x", file);
        let (got, log) = fetched(&server.url("/x")).await;
        assert!(got.unwrap() == bytes(2), "{validator:?}\n{log}");
        assert_eq!(sent(&server.seen()), expected, "{validator:?}\n{log}");
    }
}

#[tokio::test]
async fn a_server_that_sends_nothing_more_is_given_up() {
    let server = Server::http();
    let file = Served {
        bytes: bytes(1),
        validator: Some(TAG),
        cuts: vec![CUT, 0, 0, 0],
        ..Served::default()
    };
    server.put("/x", file.clone());
    assert!(fetched(&server.url("/x")).await.0.is_err());
    assert_eq!(sent(&server.seen()), [CUT, 0, 0]);
    // What is asked for is not there any more: no use in trying on.
    let shorter = Served {
        validator: Some(TAG),
        ..Served::default()
    };
    let next = Some(Box::new(shorter));
    server.put("/x", Served { next, ..file });
    let (got, log) = fetched(&server.url("/x")).await;
    assert!(
        got.is_err() && log.matches("trying again").count() == 1,
        "{log}"
    );
    // A wrong URL is told at once.
    let (got, log) = fetched(&server.url("/y")).await;
    assert!(got.is_err() && !log.contains("trying again"), "{log}");
}

#[tokio::test]
async fn an_unknown_certificate_is_refused() {
    let server = Server::https();
    server.put_bytes("/x", "text");
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("part");
    std::fs::write(&part, "").unwrap();
    let incoming = Incoming::new(part, folder.path().join("whole"));
    let limits = Limits {
        verify_certificates: true,
        ..LIMITS
    };
    let result = fetch::fetch(&server.url("/x"), &incoming, limits, &|_| {}).await;
    assert!(result.is_err());
    assert_eq!(server.seen(), []);
    assert_eq!(fetched(&server.url("/x")).await.0.unwrap(), b"text");
}

/// A node that runs nothing but tasks.
struct Ground {
    folder: tempfile::TempDir,
    node: Node,
}

impl Ground {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let node = Node::open(Settings::new("n1", folder.path()))
            .await
            .unwrap();
        let storage = node.settings().storage_dir();
        std::fs::create_dir_all(&storage).unwrap();
        node.storage().ensure_local(&storage).await.unwrap();
        Self { folder, node }
    }

    /// Runs work as a task to its end: its exit status and its log.
    async fn task<F>(
        &self,
        work: impl FnOnce(TaskContext) -> F + Send + 'static,
    ) -> (String, String)
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let tasks = self.node.tasks();
        let upid = tasks
            .spawn(NewTask::new("download", "", "x@pve"), work)
            .unwrap();
        let status = tasks.wait(&upid).await.unwrap();
        let log = std::fs::read_to_string(tasks.log_file(&upid)).unwrap();
        (status, log)
    }

    async fn download(
        &self,
        url: &str,
        name: &str,
        checksum: Option<Checksum>,
    ) -> (String, String) {
        let download = Download {
            url: url.to_owned(),
            checksum,
            limits: LIMITS,
            storage: self.node.storage().open(&"local".parse().unwrap()).unwrap(),
            volume: VolumeName::file(Content::Vztmpl, name).unwrap(),
        };
        self.task(async move |task: TaskContext| download.run(&task).await)
            .await
    }

    async fn refresh(&self) -> (String, String) {
        let templates = self.node.templates().clone();
        self.task(async move |task: TaskContext| templates.refresh(&task).await)
            .await
    }

    async fn listed(&self) -> Vec<String> {
        let all = self.node.templates().list().await.unwrap();
        all.into_iter().map(|template| template.file).collect()
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("storage/template/cache")
    }

    fn templates(&self) -> PathBuf {
        self.node.settings().templates_dir()
    }
}

/// Names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn sha512(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x");
    std::fs::write(&file, bytes).unwrap();
    let output = Command::new("sha512sum").arg(&file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

#[tokio::test]
async fn a_wrong_file_is_refused_and_nothing_of_it_stays() {
    let (ground, server) = (Ground::new().await, Server::http());
    let file = Served {
        bytes: bytes(1),
        validator: Some(TAG),
        cuts: vec![CUT],
        ..Served::default()
    };
    server.put("/x", file.clone());
    let (url, digest) = (server.url("/x"), sha512(&bytes(1)));
    let checksum = |digest: &str| Some(Checksum::new("sha512", digest).unwrap());

    let wrong = checksum(&"0".repeat(128));
    let (status, _) = ground.download(&url, "a.tar.gz", wrong.clone()).await;
    assert!(status.starts_with("checksum mismatch: got"), "{status}");
    assert_eq!(names(&ground.cache()), <[&str; 0]>::default());

    server.put("/x", file);
    server.seen();
    let (status, log) = ground.download(&url, "a.tar.gz", checksum(&digest)).await;
    assert_eq!(status, "OK", "{log}");
    assert!(log.contains(&format!("going on at byte {CUT}\n")), "{log}");
    assert_eq!(sent(&server.seen()), [CUT, SIZE - CUT]);
    assert_eq!(names(&ground.cache()), ["a.tar.gz"]);
    let path = ground.cache().join("a.tar.gz");
    assert!(std::fs::read(&path).unwrap() == bytes(1));

    // What is there is neither fetched again nor replaced.
    let (status, log) = ground.download(&url, "a.tar.gz", checksum(&digest)).await;
    assert!(status == "OK" && log.contains("is there already"), "{log}");
    for other in [wrong, None] {
        let (status, _) = ground.download(&url, "a.tar.gz", other).await;
        assert!(
            status.starts_with("refusing to override existing file"),
            "{status}"
        );
    }
    assert_eq!(server.seen(), []);
    assert!(std::fs::read(&path).unwrap() == bytes(1));
}

/// What a download of a.tar.gz has left.
const PART: [&str; 1] = [".a.tar.gz.part"];

/// A file that breaks off until the task fails.
fn broken() -> Served {
    Served {
        bytes: bytes(1),
        validator: Some(TAG),
        cuts: vec![CUT, 0, 0],
        ..Served::default()
    }
}

#[tokio::test]
async fn the_next_task_goes_on_with_what_one_has_left() {
    let (ground, server) = (Ground::new().await, Server::http());
    let fails = async || {
        server.put("/x", broken());
        let (status, log) = ground.download(&server.url("/x"), "a.tar.gz", None).await;
        assert!(status.starts_with("download"), "{status}");
        assert!(log.contains("the next download goes on there"), "{log}");
        assert_eq!(names(&ground.cache()), PART);
        server.seen();
    };
    let succeeds = async |expected: u32| {
        let (status, log) = ground.download(&server.url("/x"), "a.tar.gz", None).await;
        assert_eq!(status, "OK", "{log}");
        assert_eq!(names(&ground.cache()), ["a.tar.gz"]);
        let path = ground.cache().join("a.tar.gz");
        assert!(std::fs::read(&path).unwrap() == bytes(expected), "{log}");
        std::fs::remove_file(path).unwrap();
        (sent(&server.seen()), log)
    };
    fails().await;
    let (sent, log) = succeeds(1).await;
    assert_eq!(sent, [SIZE - CUT], "nothing came twice");
    let left = format!("an earlier task has left {CUT} bytes of it");
    assert!(log.contains(&left), "{log}");

    // Another file has that name by now; a careless server sends its rest.
    for is_careless in [false, true] {
        fails().await;
        let other = Served {
            bytes: bytes(2),
            validator: Some(OTHER_TAG),
            is_careless,
            ..Served::default()
        };
        server.put("/x", other);
        let (sent, _) = succeeds(2).await;
        assert_eq!(sent.last(), Some(&SIZE));
    }

    // Another URL is another file, and so is one that nothing is known of.
    fails().await;
    server.put_bytes("/y", bytes(2));
    let (status, log) = ground.download(&server.url("/y"), "a.tar.gz", None).await;
    assert!(status == "OK" && !log.contains("an earlier task"), "{log}");
    std::fs::remove_file(ground.cache().join("a.tar.gz")).unwrap();
    std::fs::write(ground.cache().join(PART[0]), "planted").unwrap();
    server.put_bytes("/x", bytes(1));
    server.seen();
    let (sent, _) = succeeds(1).await;
    assert_eq!(sent, [SIZE]);
}

/// A wrong one does not stay to be gone on with, nor does one that is old.
#[tokio::test]
async fn unfinished_files_do_not_stay_for_ever() {
    let (ground, server) = (Ground::new().await, Server::http());
    let url = server.url("/x");
    let fails = async || {
        server.put("/x", broken());
        let (status, _) = ground.download(&url, "a.tar.gz", None).await;
        assert!(status.starts_with("download"), "{status}");
        assert_eq!(names(&ground.cache()), PART);
    };
    fails().await;
    server.put_bytes("/x", bytes(1));
    let wrong = Some(Checksum::new("sha512", &"0".repeat(128)).unwrap());
    let (status, _) = ground.download(&url, "a.tar.gz", wrong).await;
    assert!(status.starts_with("checksum mismatch"), "{status}");
    assert_eq!(names(&ground.cache()), <[&str; 0]>::default());

    fails().await;
    let part = std::fs::File::open(ground.cache().join(PART[0])).unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    part.set_modified(long_ago).unwrap();
    server.put_bytes("/x", bytes(1));
    let (status, _) = ground.download(&url, "b.tar.gz", None).await;
    assert_eq!(status, "OK");
    assert_eq!(names(&ground.cache()), ["b.tar.gz"]);
}

#[tokio::test]
async fn two_tasks_do_not_write_into_one_file() {
    let (ground, server) = (Ground::new().await, Server::http());
    server.put_bytes("/x", bytes(1));
    let storage = ground
        .node
        .storage()
        .open(&"local".parse().unwrap())
        .unwrap();
    let volume = VolumeName::file(Content::Vztmpl, "a.tar.gz").unwrap();
    let other = storage.receive_rest(&volume).await.unwrap();
    let url = server.url("/x");
    let (status, _) = ground.download(&url, "a.tar.gz", None).await;
    assert_eq!(status, "another task is downloading 'vztmpl/a.tar.gz'");
    drop(other);
    assert_eq!(names(&ground.cache()), <[&str; 0]>::default());
    assert_eq!(ground.download(&url, "a.tar.gz", None).await.0, "OK");
}

/// Has GnuPG believe that it is that day.
const FIRST_DAY: &[&str] = &["--faked-system-time", "20200101T120000"];

/// A key that signs, in a folder of its own.
struct Key {
    home: tempfile::TempDir,
}

impl Key {
    /// Makes one; none, and a line that says so, where GnuPG is not installed.
    fn new() -> Option<Self> {
        Self::with(&[], "never")
    }

    /// One that was made on the first day of 2020, for a day.
    fn of_the_past() -> Option<Self> {
        Self::with(FIRST_DAY, "1d")
    }

    fn with(how: &[&str], lasts: &str) -> Option<Self> {
        for program in ["gpg", "gpgv", "gpg-agent"] {
            if Command::new(program).arg("--version").output().is_err() {
                println!("ATOLL-SKIP: no {program} here (apt-get install {program})");
                return None;
            }
        }
        let key = Self {
            home: tempfile::tempdir().unwrap(),
        };
        let args = ["--passphrase", "", "--quick-generate-key"];
        let whose = ["Test <test@a.example>", "ed25519", "sign", lasts];
        key.gpg(&[how, &args, &whose].concat());
        Some(key)
    }

    fn gpg(&self, args: &[&str]) -> Vec<u8> {
        let mut command = Command::new("gpg");
        command.arg("--homedir").arg(self.home.path());
        let output = command
            .args(["--batch", "--quiet"])
            .args(args)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "gpg {args:?}: {error}");
        output.stdout
    }

    fn sign(&self, text: &str, how: &[&str]) -> Vec<u8> {
        let file = self.home.path().join("text");
        std::fs::write(&file, text).unwrap();
        let args = [&["--armor", "--output", "-"], how, &["--detach-sign"]].concat();
        self.gpg(&[&args[..], &[file.to_str().unwrap()]].concat())
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        let mut command = Command::new("gpgconf");
        let command = command.arg("--homedir").arg(self.home.path());
        // An agent without its folder ends by itself, later.
        let _ = command.args(["--kill", "gpg-agent"]).status();
    }
}

fn packed(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn stanza(package: &str, digest: &str) -> String {
    format!(
        "Package: {package}\nVersion: 1-1\nType: lxc\nOS: debian-13\nSection: system\n\
         Infopage: https://a.example/\nLocation: system/{package}_1-1_amd64.tar.gz\n{digest}\
         Description: A small one\n With a second line\n\n"
    )
}

fn publish(server: &Server, text: &str, signature: impl Into<Vec<u8>>) {
    server.put_bytes("/pve/aplinfo.dat.gz", packed(text));
    server.put_bytes("/pve/aplinfo.dat.asc", signature);
}

fn configure(ground: &Ground, server: &Server) {
    let url = server.url("/pve/aplinfo.dat");
    let text = format!("# Ours\nName: ours\nURL: {url}\nKeyring: ours.gpg\n");
    std::fs::write(ground.templates().join("sources"), text).unwrap();
}

#[tokio::test]
async fn an_index_counts_when_its_signature_is_good() {
    let (Some(key), Some(stranger)) = (Key::new(), Key::new()) else {
        return;
    };
    let (ground, server) = (Ground::new().await, Server::http());
    let keyring = ground.templates().join("ours.gpg");
    std::fs::write(&keyring, key.gpg(&["--export"])).unwrap();
    configure(&ground, &server);
    assert_eq!(ground.listed().await, <[&str; 0]>::default());

    let good = stanza("small", "");
    publish(&server, &good, key.sign(&good, &[]));
    let (status, log) = ground.refresh().await;
    assert_eq!(status, "OK", "{log}");
    assert!(log.contains("index 'ours' has 1 templates"), "{log}");
    let kept = ["small_1-1_amd64.tar.gz"];
    assert_eq!(ground.listed().await, kept);
    let left = names(&ground.templates());
    assert_eq!(left, ["ours.dat", "ours.gpg", "sources"]);

    let evil = stanza("evil", "");
    let refused = "the signature is not good";
    for (text, signature, reason) in [
        (&evil, key.sign(&good, &[]), refused),
        (&evil, stranger.sign(&evil, &[]), refused),
        (&evil, key.sign(&evil, &["--digest-algo", "SHA1"]), refused),
        (&evil, Vec::new(), refused),
        (&evil, b"no signature".to_vec(), refused),
        (
            &"Package\n".to_owned(),
            key.sign("Package\n", &[]),
            "index 'ours', line 1:",
        ),
    ] {
        publish(&server, text, signature);
        let (status, log) = ground.refresh().await;
        assert!(status.starts_with(reason), "{reason} / {status}\n{log}");
        assert_eq!(ground.listed().await, kept);
        assert_eq!(names(&ground.templates()), left);
    }
    publish(&server, &evil, key.sign(&evil, &[]));
    server.put_bytes("/pve/aplinfo.dat.gz", "not packed");
    assert!(ground.refresh().await.0.starts_with("unpack the index"));
    server.remove("/pve/aplinfo.dat.asc");
    assert!(ground.refresh().await.0.starts_with("download failed"));
    assert_eq!(ground.listed().await, kept);
    assert_eq!(names(&ground.templates()), left);

    let expired = Key::of_the_past().unwrap();
    std::fs::write(&keyring, expired.gpg(&["--export"])).unwrap();
    publish(&server, &evil, expired.sign(&evil, FIRST_DAY));
    let (status, _) = ground.refresh().await;
    let told = status.strip_prefix("index 'ours': it is signed by key ");
    let told = told.is_some_and(|told| told.contains(", which has expired: put the renewed one"));
    assert!(told && status.contains("ours.gpg"), "{status}");
    assert_eq!(ground.listed().await, kept);

    publish(&server, &evil, key.sign(&evil, &[]));
    std::fs::write(&keyring, key.gpg(&["--armor", "--export"])).unwrap();
    let (status, _) = ground.refresh().await;
    assert!(status.ends_with("convert it by gpg --dearmor"), "{status}");
    std::fs::write(&keyring, stranger.gpg(&["--export"])).unwrap();
    assert!(ground.refresh().await.0.starts_with(refused));
    assert_eq!(ground.listed().await, kept);
}

#[tokio::test]
async fn a_template_is_the_one_that_the_index_names() {
    let Some(key) = Key::new() else { return };
    let (ground, server) = (Ground::new().await, Server::http());
    std::fs::write(ground.templates().join("ours.gpg"), key.gpg(&["--export"])).unwrap();
    configure(&ground, &server);
    let text = [
        stanza("right", &format!("sha512sum: {}\n", sha512(&bytes(1)))),
        stanza("wrong", &format!("sha512sum: {}\n", sha512(&bytes(2)))),
        stanza("unsure", "md5sum: 00000000000000000000000000000000\n"),
    ]
    .concat();
    publish(&server, &text, key.sign(&text, &[]));
    assert_eq!(ground.refresh().await.0, "OK");
    for package in ["right", "wrong"] {
        server.put_bytes(&format!("/pve/system/{package}_1-1_amd64.tar.gz"), bytes(1));
    }
    let find = async |package: &str| {
        let file = format!("{package}_1-1_amd64.tar.gz");
        ground.node.templates().find(&file).await
    };
    for (package, expected) in [("wrong", "checksum mismatch"), ("right", "OK")] {
        let template = find(package).await.unwrap();
        assert_eq!(template.headline, "A small one");
        assert_eq!(template.description, "With a second line");
        let checksum = Some(template.checksum().unwrap());
        let url = template.location.as_str();
        let (status, log) = ground.download(url, &template.file, checksum).await;
        assert!(status.starts_with(expected), "{status}\n{log}");
    }
    assert_eq!(names(&ground.cache()), ["right_1-1_amd64.tar.gz"]);
    assert!(find("unsure").await.unwrap().checksum().is_err());
    assert!(find("absent").await.is_err());
}

#[tokio::test]
async fn what_is_missing_in_the_configuration_is_told() {
    let ground = Ground::new().await;
    let file = ground.templates().join("sources");
    let said = async || {
        ground
            .node
            .templates()
            .list()
            .await
            .unwrap_err()
            .to_string()
    };
    let path = file.display();
    assert!(said().await.starts_with(&format!(
        "no index of container templates is configured: name one in {path} by three lines"
    )));
    assert!(
        ground
            .refresh()
            .await
            .0
            .starts_with("no index of container templates")
    );
    for (text, expected) in [
        ("Name", "line 1: expected 'Key: value'"),
        ("Name: a\n", "an index has no 'URL'"),
        ("Name: a\nURL: x\n", "'x': relative URL without a base"),
        ("Name: a\nURL: http://h/\n", "an index has no 'Keyring'"),
        ("Name: ../a\n", "'../a' is no name, or that of two indexes"),
    ] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(said().await, format!("{path}: {expected}"));
    }
}
