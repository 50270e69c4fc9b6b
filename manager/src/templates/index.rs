// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What an index lists: its stanzas as templates that can be downloaded. Pure; the text is one whose signature is good.

use reqwest::Url;

use super::stanza::{self, ParseError, Stanza};
use crate::error::Error;
use crate::storage::checksum::Checksum;
use crate::storage::name::{Content, VolumeName};

/// The stanza of PVE's news, among the templates of its index.
const NEWS: &str = "pve-web-news";

/// What PVE takes for granted when an index does not say it.
const ARCHITECTURE: &str = "i386";

/// One template of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its file name, by which it is asked for; unique in an index.
    pub file: String,
    /// Where the file is.
    pub location: Url,
    /// Folder of the index that lists it.
    pub source: String,
    /// First line of its description.
    pub headline: String,
    /// The rest of it, in one line.
    pub description: String,
    /// Everything else, by the keys of the index in lower case: `package`, `version`, `type`, `os`, `section`, …
    pub keys: Stanza,
}

impl Template {
    /// The volume that it becomes.
    pub fn volume(&self) -> Result<VolumeName, Error> {
        VolumeName::file(Content::Vztmpl, &self.file)
            .map_err(|error| Error::invalid("template", error.to_string()))
    }

    /// What its file must be. A template without one is not downloaded: the index is signed, its files are not.
    pub fn checksum(&self) -> Result<Checksum, Error> {
        match self.keys.get("sha512sum") {
            Some(digest) => Checksum::new("sha512", digest),
            None => Err(Error::Refused(format!(
                "the index has no sha512sum for '{}', so nothing says what the right file is",
                self.file
            ))),
        }
    }
}

/// The templates of an index.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// In the order of the index.
    pub templates: Vec<Template>,
    /// Stanzas that are no template of a container, each with the reason.
    pub left_out: Vec<String>,
}

/// Reads an index that came from `url`.
pub fn parse(text: &str, url: &Url) -> Result<Index, ParseError> {
    let mut index = Index::default();
    for stanza in stanza::parse(text)? {
        let package = stanza.get("package").cloned().unwrap_or_default();
        if package == NEWS {
            continue;
        }
        match template(stanza, url) {
            Ok(template) => index.templates.push(template),
            Err(reason) => index.left_out.push(format!("'{package}': {reason}")),
        }
    }
    Ok(index)
}

fn template(mut keys: Stanza, url: &Url) -> Result<Template, String> {
    for key in ["package", "version", "type", "os", "infopage"] {
        if keys.get(key).is_none_or(String::is_empty) {
            return Err(format!("it has no {key}"));
        }
    }
    if !["lxc", "openvz"].contains(&keys["type"].as_str()) {
        return Err(format!("its type is '{}'", keys["type"]));
    }
    let section = keys.entry("section".to_owned());
    section.or_insert_with(|| "unknown".to_owned());
    let location = match keys.remove("location") {
        Some(location) => location,
        None => named(&keys),
    };
    // A relative one is in the folder of the index.
    let location = url
        .join(&location)
        .map_err(|error| format!("its location '{location}': {error}"))?;
    let file = location.path().rsplit('/').next().unwrap_or_default();
    let file = file.to_owned();
    VolumeName::file(Content::Vztmpl, &file).map_err(|error| error.to_string())?;
    let text = keys.remove("description").unwrap_or_default();
    let (headline, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let folder = url.join(".").map_err(|error| error.to_string())?;
    Ok(Template {
        file,
        location,
        source: folder.as_str().trim_end_matches('/').to_owned(),
        headline: headline.to_owned(),
        description: rest.replace('\n', " "),
        keys,
    })
}

/// Where a template is whose stanza has no location.
fn named(keys: &Stanza) -> String {
    let architecture = keys
        .get("architecture")
        .map_or(ARCHITECTURE, String::as_str);
    let (os, package) = (&keys["os"], &keys["package"]);
    // A plain system is named after itself once.
    let name = match package.starts_with(&format!("{os}-")) {
        true => package.clone(),
        false => format!("{os}-{package}"),
    };
    let (section, version) = (&keys["section"], &keys["version"]);
    format!("{section}/{name}_{version}_{architecture}.tar.gz")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Package: pve-web-news
Description: News
 of the day

Package: alpine-3.22-default
Version: 20250617
Type: lxc
OS: alpine
Section: system
Location: system/alpine-3.22-default_20250617_amd64.tar.xz
Architecture: amd64
Maintainer: somebody <a@b.example>
Infopage: https://info.example/alpine
ManageUrl: http://__IPADDRESS__/
md5sum: 00000000000000000000000000000000
sha512sum: 11
Description: A small one
 It is
 small.

Package: core
Version: 18.1-1
Type: openvz
OS: debian-12
Infopage: https://info.example/core
Location: https://other.example/x/debian-12-core_18.1-1_amd64.tar.gz

Package: debian-12-old
Version: 1
Type: lxc
OS: debian-12
Infopage: x

Package: machine
Version: 1
Type: vm
OS: x
Infopage: x

Package: half
";

    fn read(text: &str) -> Index {
        parse(
            text,
            &Url::parse("https://h.example/pve/aplinfo.dat").unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn templates_of_an_index() {
        let index = read(TEXT);
        let found: Vec<_> = index
            .templates
            .iter()
            .map(|t| t.location.as_str())
            .collect();
        assert_eq!(
            found,
            [
                "https://h.example/pve/system/alpine-3.22-default_20250617_amd64.tar.xz",
                "https://other.example/x/debian-12-core_18.1-1_amd64.tar.gz",
                "https://h.example/pve/unknown/debian-12-old_1_i386.tar.gz",
            ]
        );
        let alpine = &index.templates[0];
        assert_eq!(alpine.file, "alpine-3.22-default_20250617_amd64.tar.xz");
        assert_eq!(alpine.source, "https://h.example/pve");
        assert_eq!(alpine.headline, "A small one");
        assert_eq!(alpine.description, "It is small.");
        assert_eq!(alpine.keys["manageurl"], "http://__IPADDRESS__/");
        assert_eq!(
            index.left_out,
            ["'machine': its type is 'vm'", "'half': it has no version"]
        );
    }

    #[test]
    fn names_never_leave_the_storage() {
        for location in [
            "../../x",
            "x/.tar.gz",
            "x/..%2f..%2fy.tar.gz",
            "x/",
            "x.exe",
        ] {
            let text = format!(
                "Package: a\nVersion: 1\nType: lxc\nOS: x\nInfopage: x\nLocation: {location}\n"
            );
            let index = read(&text);
            assert_eq!(index.templates, [], "{location}");
            assert_eq!(index.left_out.len(), 1);
        }
    }

    #[test]
    fn only_sha512_counts() {
        let index = read(TEXT);
        assert!(matches!(
            index.templates[0].checksum(),
            Err(Error::Invalid(_))
        ));
        assert!(matches!(
            index.templates[1].checksum(),
            Err(Error::Refused(_))
        ));
    }
}
