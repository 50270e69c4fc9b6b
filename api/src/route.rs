// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The form of the API: a route is a row of a table, and everything else derives from the rows.
//!
//! ```text
//! routes::TABLES ──► Tree ──┬─ find      which row serves this method and path
//!                           ├─ listing   GET of a path that is only a directory
//!                           └─ validate  the parameters against the row's schema
//!        │
//!        ├──► openapi.rs    the OpenAPI document and the forms of the web page
//!        └──► cli           `atoll usage`
//! ```
//!
//! No handler is called before its parameters fit the schema and its caller has the row's privilege.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use atoll_manager::access::{Caller, Check};
use atoll_manager::guest::keys;
use atoll_manager::id::GuestKind;
use atoll_manager::schema::{Kind, MISSING, Param, UNKNOWN, split_list};
use axum::extract::Request;
use serde_json::{Value, json};

use crate::answer::{Answer, Refusal};
use crate::daemon::Daemon;
use crate::request::Sent;
use crate::routes::parameters::IN_PATH;
use crate::serve::Arrival;

/// The methods of the API, in PVE's words for the command line: get, create, set, delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// Read.
    Get,
    /// Create, or begin something.
    Post,
    /// Change.
    Put,
    /// Remove.
    Delete,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Get, Self::Post, Self::Put, Self::Delete];

    /// Its name in HTTP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }

    /// The method of this name in HTTP.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// What a route answers with.
#[derive(Debug, Clone, Copy)]
pub enum Returns {
    /// Nothing: `data` is null.
    Null,
    /// The UPID of the task that does the work.
    Upid,
    /// A text.
    Text,
    /// A whole number.
    Integer,
    /// An object with these members, among others that may be absent.
    Object(&'static [&'static str]),
    /// A list of such objects.
    List(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// A file or a websocket.
    Stream,
}

/// Future of a handler.
pub type Outcome = Pin<Box<dyn Future<Output = Result<Answer, Refusal>> + Send>>;

/// What serves a route. Called once its caller and its parameters are checked.
pub type Handler = fn(Call) -> Outcome;

/// One row of the API.
pub struct Route {
    /// Method.
    pub method: Method,
    /// Path below `/api2/FORMAT`, with `{name}` for a part that varies.
    pub path: &'static str,
    /// One sentence for people.
    pub summary: &'static str,
    /// Parameters beside those in the path.
    pub params: &'static [Param],
    /// The guests' config keys are parameters too.
    pub keys: Option<GuestKind>,
    /// What it answers with.
    pub returns: Returns,
    /// Who may call it.
    pub check: Check,
    /// Atoll's own, unknown to PVE.
    pub own: bool,
    /// What serves it.
    pub handler: Handler,
}

impl Route {
    /// A row to read something.
    pub const fn get(path: &'static str, summary: &'static str, handler: Handler) -> Self {
        Self::new(Method::Get, path, summary, handler)
    }

    /// A row to create or begin something.
    pub const fn post(path: &'static str, summary: &'static str, handler: Handler) -> Self {
        Self::new(Method::Post, path, summary, handler)
    }

    /// A row to change something.
    pub const fn put(path: &'static str, summary: &'static str, handler: Handler) -> Self {
        Self::new(Method::Put, path, summary, handler)
    }

    /// A row to remove something.
    pub const fn delete(path: &'static str, summary: &'static str, handler: Handler) -> Self {
        Self::new(Method::Delete, path, summary, handler)
    }

    /// A row without parameters or answer, for root alone: what differs is said by the methods below.
    const fn new(
        method: Method,
        path: &'static str,
        summary: &'static str,
        handler: Handler,
    ) -> Self {
        Self {
            method,
            path,
            summary,
            params: &[],
            keys: None,
            returns: Returns::Null,
            check: Check::Root,
            own: false,
            handler,
        }
    }

    /// The same with parameters.
    pub const fn params(mut self, params: &'static [Param]) -> Self {
        self.params = params;
        self
    }

    /// The same with the config keys of a kind of guest as further parameters.
    pub const fn keys(mut self, kind: GuestKind) -> Self {
        self.keys = Some(kind);
        self
    }

    /// The same with an answer.
    pub const fn returns(mut self, returns: Returns) -> Self {
        self.returns = returns;
        self
    }

    /// The same for those whom `check` lets in.
    pub const fn check(mut self, check: Check) -> Self {
        self.check = check;
        self
    }

    /// The same, marked as Atoll's own.
    pub const fn own(mut self) -> Self {
        self.own = true;
        self
    }

    /// All parameters: those in the path, the route's own, the guests' keys.
    pub fn parameters(&self) -> impl Iterator<Item = &'static Param> {
        let in_path = names_in(self.path).map(|name| {
            let mut known = IN_PATH.iter();
            known
                .find(|param| param.name == name)
                .unwrap_or_else(|| panic!("{}: {name} is not in IN_PATH", self.path))
        });
        let keys = self.keys.map_or(&[][..], keys::table);
        let keys = keys.iter().map(|key| &key.param);
        in_path.chain(self.params).chain(keys)
    }

    /// The route must be served by the node that its path names.
    pub fn is_of_a_node(&self) -> bool {
        self.path.starts_with("/nodes/{node}")
    }

    /// Its body is a stream that the handler reads: an upload.
    pub fn has_upload(&self) -> bool {
        self.params
            .iter()
            .any(|param| matches!(param.kind, Kind::Upload))
    }

    /// Checks what was sent against the schema; texts are PVE's.
    pub fn validate(&self, sent: Sent) -> Result<Values, Vec<(String, String)>> {
        let mut values = BTreeMap::new();
        let mut wrong = Vec::new();
        for (name, value) in sent {
            let Some(param) = self.parameters().find(|param| param.covers(&name)) else {
                wrong.push((name, UNKNOWN.to_owned()));
                continue;
            };
            // A config key may refuse more than its kind of value, and has a form of its own to be kept in.
            let key = self.keys.and_then(|kind| keys::find(kind, &name));
            let key = key.filter(|key| key.param.name == param.name);
            let checked = key.map_or_else(
                || param.check(&name, &value),
                |key| key.check(&name, &value),
            );
            if let Err(text) = checked {
                wrong.push((name, text));
                continue;
            }
            let value =
                key.map_or_else(|| param.kind.normalize(&value), |key| key.normalize(&value));
            if let Err(text) = insert(&mut values, param, name.clone(), value) {
                wrong.push((name, text));
            }
        }
        for param in self.parameters().filter(|param| param.required) {
            // The fields of an upload are in its stream, where the handler meets them.
            let is_in_path = self.path.contains(&format!("{{{}}}", param.name));
            let is_known = values.contains_key(param.name)
                || (self.has_upload() && !is_in_path)
                || wrong.iter().any(|(name, _)| name == param.name);
            if !is_known {
                wrong.push((param.name.to_owned(), MISSING.to_owned()));
            }
        }
        match wrong.is_empty() {
            true => Ok(Values(values)),
            false => Err(wrong),
        }
    }
}

/// A repeated name is a list where the format is one, and a mistake elsewhere.
fn insert(
    values: &mut BTreeMap<String, String>,
    param: &Param,
    name: String,
    value: String,
) -> Result<(), String> {
    let Some(present) = values.get_mut(&name) else {
        values.insert(name, value);
        return Ok(());
    };
    match param.kind {
        Kind::List { .. } => {
            present.push('\0');
            present.push_str(&value);
            Ok(())
        }
        Kind::Format(format) if format.name.ends_with("-list") => {
            present.push(',');
            present.push_str(&value);
            Ok(())
        }
        _ => Err("type check ('string') failed - got ARRAY".to_owned()),
    }
}

fn names_in(path: &'static str) -> impl Iterator<Item = &'static str> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

/// Parameters that fit the schema; booleans are `1` or `0`.
#[derive(Debug, Default)]
pub struct Values(BTreeMap<String, String>);

impl Values {
    /// The text of `name`, if it was given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The text of a parameter that the schema requires.
    pub fn required(&self, name: &str) -> &str {
        self.text(name)
            .unwrap_or_else(|| panic!("{name} is not required by the route's schema"))
    }

    /// A boolean; false when not given.
    pub fn flag(&self, name: &str) -> bool {
        self.text(name) == Some("1")
    }

    /// A boolean, if it was given.
    pub fn flag_if_given(&self, name: &str) -> Option<bool> {
        self.text(name).map(|text| text == "1")
    }

    /// A number that the schema checked, if it was given and fits the type.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.text(name).and_then(|text| text.parse().ok())
    }

    /// The items of a list, split as PVE does: at commas, semicolons, white space and NUL.
    pub fn list(&self, name: &str) -> Vec<String> {
        let items = split_list(self.text(name).unwrap_or_default());
        items.map(str::to_owned).collect()
    }

    /// The texts of a parameter that has several, as they were given.
    pub fn items(&self, name: &str) -> Vec<String> {
        let items = self.text(name).unwrap_or_default().split('\0');
        items.map(str::to_owned).collect()
    }

    /// Every parameter that `wanted` says yes to.
    pub fn filtered(&self, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, String> {
        let pairs = self.0.iter().filter(|(name, _)| wanted(name));
        pairs.map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// A request on its way into a handler: who calls, with what.
pub struct Call {
    /// The running daemon.
    pub daemon: Arc<Daemon>,
    /// The row that was found.
    pub route: &'static Route,
    /// Who calls; on routes for everybody it may be nobody.
    pub caller: Option<Caller>,
    /// The parameters.
    pub values: Values,
    /// When and from where it came.
    pub arrival: Arrival,
    /// The request itself, for uploads (its body) and websockets (its connection).
    pub request: Request,
}

impl Call {
    /// Who calls, on a route that is not for everybody.
    pub fn caller(&self) -> &Caller {
        let caller = self.caller.as_ref();
        caller.expect("only routes with Check::World are called without an identity")
    }
}

/// The routes as a tree of path parts.
#[derive(Default)]
pub struct Tree {
    fixed: BTreeMap<&'static str, Tree>,
    varies: Option<(&'static str, Box<Tree>)>,
    methods: BTreeMap<Method, &'static Route>,
}

/// What a path leads to.
pub enum Found<'a> {
    /// A row, with the values of the varying parts.
    Route(&'static Route, Sent),
    /// No row, but paths below: their first parts.
    Directory(&'a Tree),
    /// Nothing.
    Nothing,
}

impl Tree {
    /// The tree of some tables.
    pub fn new(tables: &[&'static [Route]]) -> Self {
        let mut root = Self::default();
        for route in tables.iter().copied().flatten() {
            root.insert(route);
        }
        root
    }

    fn insert(&mut self, route: &'static Route) {
        let mut tree = self;
        for part in route.path.split('/').filter(|part| !part.is_empty()) {
            tree = match part.strip_prefix('{').and_then(|p| p.strip_suffix('}')) {
                None => tree.fixed.entry(part).or_default(),
                Some(name) => {
                    let (present, below) =
                        tree.varies.get_or_insert_with(|| (name, Box::default()));
                    assert_eq!(*present, name, "{}: two names for one part", route.path);
                    below
                }
            };
        }
        let before = tree.methods.insert(route.method, route);
        assert!(before.is_none(), "{}: two rows for one method", route.path);
    }

    /// What serves `method` at the path of these parts.
    pub fn find(&self, method: Method, parts: &[String]) -> Found<'_> {
        let mut tree = self;
        let mut values = Sent::new();
        for (index, part) in parts.iter().enumerate() {
            if let Some(below) = tree.fixed.get(part.as_str()) {
                tree = below;
                continue;
            }
            let Some((name, below)) = &tree.varies else {
                return Found::Nothing;
            };
            tree = below;
            if *name == "volume" {
                // A volume's name has slashes, and clients send them as they are.
                values.push(((*name).to_owned(), parts[index..].join("/")));
                break;
            }
            values.push(((*name).to_owned(), part.clone()));
        }
        match tree.methods.get(&method) {
            Some(route) => Found::Route(route, values),
            None if method == Method::Get && !tree.fixed.is_empty() => Found::Directory(tree),
            None => Found::Nothing,
        }
    }

    /// The names below a directory, as PVE lists them: under `name` in a few old places, under `subdir` elsewhere.
    pub fn listing(&self, parts: &[String]) -> Value {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let key = match parts.as_slice() {
            ["cluster"] | ["nodes", _] | ["nodes", _, "tasks", _] => "name",
            _ => "subdir",
        };
        self.fixed.keys().map(|name| json!({ key: name })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::TABLES;

    fn parts(path: &str) -> Vec<String> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.map(str::to_owned).collect()
    }

    fn find(method: Method, path: &str) -> String {
        let tree = Tree::new(TABLES);
        match tree.find(method, &parts(path)) {
            Found::Route(route, values) => format!("{} {values:?}", route.path),
            Found::Directory(below) => below.listing(&parts(path)).to_string(),
            Found::Nothing => "nothing".to_owned(),
        }
    }

    fn route(method: Method, path: &str) -> &'static Route {
        match Tree::new(TABLES).find(method, &parts(path)) {
            Found::Route(route, _) => route,
            _ => panic!("{path} is not served"),
        }
    }

    fn validate(method: Method, path: &str, sent: &[(&str, &str)]) -> String {
        let sent = sent.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        match route(method, path).validate(sent.collect()) {
            Ok(values) => format!("{:?}", values.0),
            Err(wrong) => format!("{wrong:?}"),
        }
    }

    #[test]
    fn paths_lead_to_rows_directories_or_nothing() {
        assert_eq!(
            find(Method::Get, "/nodes/n1/qemu/100/config"),
            r#"/nodes/{node}/qemu/{vmid}/config [("node", "n1"), ("vmid", "100")]"#
        );
        assert_eq!(
            find(
                Method::Delete,
                "/nodes/n1/storage/local/content/local:iso/a.iso"
            ),
            r#"/nodes/{node}/storage/{storage}/content/{volume} [("node", "n1"), ("storage", "local"), ("volume", "local:iso/a.iso")]"#
        );
        assert_eq!(
            find(Method::Get, "/nodes/n1/tasks/UPID:x"),
            r#"[{"name":"log"},{"name":"status"}]"#
        );
        assert_eq!(find(Method::Post, "/nodes/n1"), "nothing");
        assert_eq!(find(Method::Get, "/nodes/n1/ceph"), "nothing");
    }

    #[test]
    fn every_row_is_well_formed() {
        for route in TABLES.iter().copied().flatten() {
            let names: Vec<_> = route.parameters().map(|param| param.name).collect();
            let mut unique = names.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(names.len(), unique.len(), "{}: {names:?}", route.path);
            assert!(route.summary.ends_with('.'), "{}", route.path);
        }
    }

    #[test]
    fn parameters_are_checked_in_pve_words() {
        let vms = "/nodes/n1/qemu/100/status/shutdown";
        let node = ("node", "n1");
        let vmid = ("vmid", "100");
        assert_eq!(
            validate(Method::Post, vms, &[node, vmid, ("forceStop", "yes")]),
            r#"{"forceStop": "1", "node": "n1", "vmid": "100"}"#
        );
        let unknown = validate(Method::Post, vms, &[node, vmid, ("nonsense", "1")]);
        assert!(unknown.contains(UNKNOWN), "{unknown}");
        let missing = validate(Method::Get, "/nodes/n1/qemu/100/rrddata", &[node, vmid]);
        assert_eq!(missing, format!("[(\"timeframe\", {MISSING:?})]"));
        let twice = validate(
            Method::Post,
            vms,
            &[node, vmid, ("timeout", "1"), ("timeout", "2")],
        );
        assert!(twice.contains("ARRAY"), "{twice}");
    }
}
