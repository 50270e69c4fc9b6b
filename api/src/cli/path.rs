// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll get|create|set|delete PATH --key value …`: any route, as with `pvesh`.

use std::path::Path;

use axum::body::Body;
use serde_json::Value;
use tokio_util::io::ReaderStream;

use super::client::{Client, ClientError};
use super::output::Output;
use super::{CliError, show, task};
use crate::route::Method;

/// A path and everything after it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path below /api2/json, such as /nodes/n1/qemu.
    path: String,
    /// Parameters as `--key value`. Two are the command's own: `--output json|table`, and `--wait`, which follows
    /// the task that was begun. A value `@FILE` is the file's text, without the end of its last line, `@-` standard
    /// input: so no password shows in a list of processes. `@@` is one `@`. Only `--filename @FILE` uploads the file.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    rest: Vec<String>,
}

impl Args {
    /// As if typed.
    pub fn new(path: String, rest: Vec<String>) -> Self {
        Self { path, rest }
    }
}

/// A request by path, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct ByPath {
    path: String,
    params: Vec<(String, String)>,
    output: Output,
    wait: bool,
}

/// Takes the rest of the line apart.
pub fn parse(args: Args, output: Output) -> Result<ByPath, CliError> {
    let mut parsed = ByPath {
        path: format!("/{}", args.path.trim_matches('/')),
        params: Vec::new(),
        output,
        wait: false,
    };
    let mut rest = args.rest.into_iter();
    while let Some(word) = rest.next() {
        let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            return Err(CliError::Usage(format!("expected --KEY before '{word}'")));
        };
        if name == "wait" {
            parsed.wait = true;
            continue;
        }
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let value = rest.next();
                let missing = || CliError::Usage(format!("--{name} needs a value"));
                (name.to_owned(), value.ok_or_else(missing)?)
            }
        };
        if name == "output" {
            parsed.output = <Output as clap::ValueEnum>::from_str(&value, true).map_err(|_| {
                CliError::Usage(format!("--output is json or table, not '{value}'"))
            })?;
            continue;
        }
        let value = if name == "filename" {
            value
        } else {
            text_of(value)?
        };
        parsed.params.push((name, value));
    }
    Ok(parsed)
}

/// A value as it is, or the text that `@` sends us to.
fn text_of(value: String) -> Result<String, CliError> {
    let Some(source) = value.strip_prefix('@') else {
        return Ok(value);
    };
    if source.starts_with('@') {
        return Ok(source.to_owned());
    }
    let text = match source {
        "-" => std::io::read_to_string(std::io::stdin()),
        path => std::fs::read_to_string(path),
    };
    let mut text = text.map_err(|error| CliError::Local(format!("{source}: {error}")))?;
    text.truncate(text.trim_end_matches(['\r', '\n']).len());
    Ok(text)
}

impl ByPath {
    /// Makes the request, and follows its task when asked to.
    pub async fn run(self, client: &Client, method: Method) -> Result<(), CliError> {
        let is_file =
            |(name, value): &(String, String)| name == "filename" && value.starts_with('@');
        let data = match self.params.iter().position(is_file) {
            Some(index) if method == Method::Post => {
                upload(client, &self.path, self.params, index).await?
            }
            _ => client.call(method, &self.path, &self.params).await?,
        };
        match task::of(&data) {
            Some(upid) if self.wait => task::follow(client, upid).await,
            _ => show(&data, self.output),
        }
    }
}

/// Sends a file as the last part of a multipart body, streamed from the disk.
async fn upload(
    client: &Client,
    path: &str,
    mut params: Vec<(String, String)>,
    index: usize,
) -> Result<Value, CliError> {
    let (_, file) = params.remove(index);
    let file = Path::new(&file[1..]);
    let local = |error: std::io::Error| CliError::Local(format!("{}: {error}", file.display()));
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| CliError::Usage(format!("{} has no name", file.display())))?;
    let content = tokio::fs::File::open(file).await.map_err(local)?;
    let size = content.metadata().await.map_err(local)?.len();

    let boundary = uuid::Uuid::new_v4().simple().to_string();
    let mut head = String::new();
    for (name, value) in &params {
        head += &format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
        );
    }
    let quoted = name.replace('"', "%22");
    head += &format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"filename\"; filename=\"{quoted}\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    );
    let tail = format!("\r\n--{boundary}--\r\n");
    let length = head.len() as u64 + size + tail.len() as u64;
    let part = |text: String| futures_util::stream::once(async { Ok(bytes::Bytes::from(text)) });
    let stream = futures_util::StreamExt::chain(part(head), ReaderStream::new(content));
    let stream = futures_util::StreamExt::chain(stream, part(tail));
    let request = client
        .request(Method::Post, &format!("/api2/json{path}"))?
        .header(
            "content-type",
            format!("multipart/form-data; boundary={boundary}"),
        )
        .header("content-length", length)
        .body(Body::from_stream(stream))
        .map_err(|error| ClientError::Settings(error.to_string()))?;
    Ok(client.send(request).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> Result<ByPath, CliError> {
        let args = Args {
            path: "nodes/n1/qemu/".to_owned(),
            rest: words.iter().map(|word| (*word).to_owned()).collect(),
        };
        parse(args, Output::Table)
    }

    #[test]
    fn keys_values_and_the_commands_own() {
        let words = [
            "--vmid",
            "100",
            "-memory=512",
            "--wait",
            "--x",
            "-1",
            "--output",
            "json",
        ];
        let parsed = line(&words).unwrap();
        assert_eq!(parsed.path, "/nodes/n1/qemu");
        let params = [("vmid", "100"), ("memory", "512"), ("x", "-1")];
        let params = params.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(parsed.params, params);
        assert!(parsed.wait && parsed.output == Output::Json);
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        std::fs::write(&secret, "hidden\n").unwrap();
        let at_file = format!("@{}", secret.display());
        let parsed = line(&["--password", &at_file, "--comment", "@@home"]).unwrap();
        let params = [("password", "hidden"), ("comment", "@home")];
        let params = params.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(parsed.params, params);
        assert!(line(&["--password", "@/does/not/exist"]).is_err());
        assert!(line(&["stray"]).is_err());
        assert!(line(&["--last"]).is_err());
        assert!(line(&["--output", "xml"]).is_err());
    }
}
