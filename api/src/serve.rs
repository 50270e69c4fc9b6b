// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The HTTPS server: connections in, requests through the checks in their order, answers out.
//!
//! ```text
//! accept ─► TLS ─► HTTP/1.1 ─┬─ /api2/…  path ─► row ─► who? ─► CSRF ─► parameters ─► may he? ─► fits? ─► handler
//!                            └─ the rest  page
//! ```
//!
//! HTTP/1.1 alone is offered: reason phrases are part of the API and later versions have none. Every wait has a
//! limit, and so has the number of connections.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::header::{HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answer, Refusal, respond};
use crate::daemon::Daemon;
use crate::request::{self, Sent};
use crate::route::{Call, Found, Method, Route};
use crate::{auth, page};

/// Connections at the same time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 2048;
/// How long a TLS handshake may take: no longer than what follows it, but on a very busy host its arithmetic alone
/// takes more than ten seconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take to send its headers, idle time of a kept connection included.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a body of parameters may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers of one request. PVE's limit.
const HEADERS_MAX: usize = 64;
/// Read buffer of one connection, which bounds the size of all headers, in bytes.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// How long requests that are being served may go on when the daemon ends.
const GRACE: Duration = Duration::from_secs(5);
/// First byte of a TLS record that begins a handshake. RFC 8446 §5.1.
const TLS_HANDSHAKE: u8 = 22;

/// Serves until `stop` is cancelled and the last requests have been answered.
pub async fn serve(
    daemon: Arc<Daemon>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let place = place.await.expect("the semaphore is never closed");
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: the connection stays queued, so do not spin.
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = stop.cancelled() => break,
        };
        let connection = Connection {
            daemon: Arc::clone(&daemon),
            acceptor: acceptor.clone(),
            stop: stop.clone(),
            peer,
            _place: place,
        };
        connections.spawn(connection.run(stream));
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(GRACE, connections.wait())
        .await
        .is_err()
    {
        tracing::info!("left connections that were still open");
    }
}

/// One connection and what it holds while it lives.
struct Connection {
    daemon: Arc<Daemon>,
    acceptor: TlsAcceptor,
    stop: CancellationToken,
    peer: SocketAddr,
    /// Given back when the connection ends.
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        // Small answers leave at once.
        drop(stream.set_nodelay(true));
        let mut first = [0];
        let handshake = async {
            if stream.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
                return say_https(stream).await.map(|()| None);
            }
            self.acceptor.accept(stream).await.map(Some)
        };
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(Some(stream))) => stream,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => return tracing::debug!(peer = %self.peer, %error, "handshake"),
            Err(_) => return tracing::debug!(peer = %self.peer, "handshake took too long"),
        };
        let Self {
            daemon,
            stop,
            peer,
            _place,
            ..
        } = self;
        let service = service_fn(move |request| {
            let daemon = Arc::clone(&daemon);
            async move { Ok::<_, std::convert::Infallible>(answer(daemon, peer.ip(), request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS_TIMEOUT)
            .max_headers(HEADERS_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = stop.cancelled() => {
                // The request that is being served is answered; the next one is not taken.
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "connection");
        }
    }
}

/// Tells somebody who came without TLS how to come.
async fn say_https(mut stream: TcpStream) -> std::io::Result<()> {
    use tokio::io::AsyncWriteExt as _;
    let text = "this port speaks HTTPS: use https://\n";
    let length = text.len();
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

async fn answer(
    daemon: Arc<Daemon>,
    peer: IpAddr,
    request: hyper::Request<Incoming>,
) -> Response<Body> {
    let request = request.map(Body::new);
    let mut response = match request::api_path(request.uri().path()) {
        None => page::respond(&request.into_parts().0),
        Some(Err(refusal)) => respond(crate::answer::Format::Json, Err(refusal)),
        Some(Ok((format, parts))) => {
            let arrival = Arrival {
                at: Instant::now(),
                peer,
            };
            let result = api(&daemon, arrival, request, &parts).await;
            if let Err(refusal) = &result
                && refusal.status == StatusCode::UNAUTHORIZED
            {
                daemon.gate.delay(arrival.at).await;
            }
            respond(format, result)
        }
    };
    page::secure(&mut response);
    let name = HeaderValue::from_static(concat!("atolld/", env!("CARGO_PKG_VERSION")));
    response.headers_mut().insert(SERVER, name);
    response
}

/// When and from where a request came.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// When.
    pub at: Instant,
    /// From where.
    pub peer: IpAddr,
}

async fn api(
    daemon: &Arc<Daemon>,
    arrival: Arrival,
    request: Request,
    parts: &[String],
) -> Result<Answer, Refusal> {
    let path = format!("/{}", parts.join("/"));
    let not_implemented = || Refusal::not_implemented(request.method(), &path);
    let method = Method::from_name(request.method().as_str()).ok_or_else(not_implemented)?;
    let found = daemon.routes.find(method, parts);
    let is_open = matches!(&found, Found::Route(route, _) if auth::is_open(&route.check));
    let caller = match (auth::identify(daemon, method, request.headers()), is_open) {
        (Ok(caller), _) => Some(caller),
        (Err(_), true) => None,
        (Err(refusal), false) => return Err(refusal),
    };
    let (route, in_path) = match found {
        Found::Route(route, in_path) => (route, in_path),
        Found::Directory(below) => return Ok(Answer::Data(below.listing(parts))),
        Found::Nothing => return Err(not_implemented()),
    };
    let (request, sent) = read(route, request, in_path).await?;
    auth::authorize(route, caller.as_ref(), &sent)?;
    let values = route.validate(sent).map_err(Refusal::parameters)?;
    if let Some(node) = values.text("node").filter(|_| route.is_of_a_node())
        && node != daemon.node.name()
    {
        let text = format!("no such cluster node '{node}'");
        return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text));
    }
    let call = Call {
        daemon: Arc::clone(daemon),
        route,
        caller,
        values,
        request,
        arrival,
    };
    (route.handler)(call).await
}

/// Collects the parameters: those of the path, of the query and, unless the body is a stream, of the body.
async fn read(
    route: &'static Route,
    request: Request,
    in_path: Sent,
) -> Result<(Request, Sent), Refusal> {
    let (parts, body) = request.into_parts();
    let mut sent = in_path;
    let fixed = sent.len();
    sent.extend(request::query(&parts));
    let is_stream =
        route.has_upload() && request::media_type(&parts.headers).starts_with("multipart/");
    let body = if is_stream {
        body
    } else {
        let read = request::body(&parts, body);
        let in_body = tokio::time::timeout(BODY_TIMEOUT, read)
            .await
            .map_err(|_| {
                Refusal::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "the request's body did not arrive in time",
                )
            })??;
        // The query goes before the body, as in PVE.
        let in_query: Vec<String> = sent[fixed..].iter().map(|(name, _)| name.clone()).collect();
        sent.extend(
            in_body
                .into_iter()
                .filter(|(name, _)| !in_query.contains(name)),
        );
        Body::empty()
    };
    // What the path says cannot be said otherwise: clients repeat `node` and `vmid` in the body.
    let in_path: Vec<String> = sent[..fixed].iter().map(|(name, _)| name.clone()).collect();
    let mut index = 0;
    sent.retain(|(name, _)| {
        index += 1;
        index <= fixed || !in_path.contains(name)
    });
    Ok((Request::from_parts(parts, body), sent))
}

#[cfg(test)]
mod tests {
    use atoll_manager::access::Check;
    use atoll_manager::host::HostMeter;
    use atoll_manager::store::{ConfigStore, Expect, MemoryStore};
    use atoll_manager::{Node, Settings};
    use expect_test::expect;

    use super::*;
    use crate::answer::Format;
    use crate::auth::keys::Keyring;
    use crate::route::Tree;
    use crate::routes::TABLES;

    const USERS: &str =
        "user:nobody@pve:1:0::::::\nuser:other@pve:1:0::::::\ntoken:other@pve!t:0:0::\n";
    const HIDDEN: &str = "hidden-guest";

    /// A node with one guest, an upload's storage, and users without any rights.
    async fn daemon(state: &std::path::Path) -> Arc<Daemon> {
        let store: Arc<dyn ConfigStore> = Arc::new(MemoryStore::new());
        let config = format!("name: {HIDDEN}\nmemory: 512\n");
        for (key, value) in [
            ("user.cfg", USERS.to_owned()),
            ("nodes/n1/qemu-server/100.conf", config),
        ] {
            store.put(key, value.into(), Expect::Absent).await.unwrap();
        }
        let node = Node::with_store(Settings::new("n1", state), Arc::clone(&store))
            .await
            .unwrap();
        node.storage().ensure_local(&state.join("s")).await.unwrap();
        Arc::new(Daemon {
            host: HostMeter::default(),
            address: [127, 0, 0, 1].into(),
            routes: Tree::new(TABLES),
            keyring: Keyring::open(store).await.unwrap(),
            gate: auth::gate::Gate::default(),
            consoles: crate::console::Consoles::default(),
            guest_rows: crate::routes::GuestRows::default(),
            node,
        })
    }

    /// A row's path with something in every place that varies.
    fn filled(route: &Route) -> String {
        let values = [
            ("{node}", "n1"),
            ("{vmid}", "100"),
            ("{storage}", "local"),
            ("{volume}", "local:iso/a.iso"),
            (
                "{upid}",
                "UPID:n1:00000001:00000001:65F0AB12:qmstart:100:other@pve:",
            ),
            ("{userid}", "other@pve"),
            ("{tokenid}", "t"),
            ("{groupid}", "staff"),
            ("{roleid}", "Custom"),
            ("{snapname}", "before"),
        ];
        let fill = |path: String, (name, value): (&str, &str)| path.replace(name, value);
        values.into_iter().fold(route.path.to_owned(), fill)
    }

    /// Status and body of a row's answer to `user`, or to somebody without a ticket.
    async fn ask(daemon: &Arc<Daemon>, route: &Route, user: Option<&str>) -> (u16, String) {
        let path = format!("/api2/json{}", filled(route));
        let mut request = Request::builder().method(route.method.name()).uri(&path);
        if let Some(user) = user {
            let (keys, now) = (daemon.keyring.keys(), jiff::Timestamp::now().as_second());
            let ticket = format!("PVEAuthCookie={}", keys.login(user, now));
            request = request
                .header("Cookie", ticket)
                .header("CSRFPreventionToken", keys.csrf(user, now));
        }
        let request = request.body(Body::empty()).unwrap();
        let (_, parts) = request::api_path(&path).unwrap().unwrap();
        let arrival = Arrival {
            at: Instant::now(),
            peer: [127, 0, 0, 1].into(),
        };
        let result = api(daemon, arrival, request, &parts).await;
        let response = respond(Format::Json, result);
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20)
            .await
            .unwrap();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn no_row_answers_somebody_without_its_privilege() {
        let state = tempfile::tempdir().unwrap();
        let daemon = daemon(state.path()).await;
        let mut open = Vec::new();
        for route in TABLES.iter().copied().flatten() {
            let name = format!("{} {}", route.method.name(), route.path);
            let (status, _) = ask(&daemon, route, None).await;
            let is_world = auth::is_open(&route.check);
            assert_eq!(
                status == 401,
                !is_world,
                "{name} without a ticket: {status}"
            );
            if is_world || matches!(route.check, Check::AnyUser) {
                open.push(name);
                continue;
            }
            let (status, body) = ask(&daemon, route, Some("nobody@pve")).await;
            assert_eq!(status, 403, "{name} without a privilege: {body}");
        }
        // These are for everybody; each says in its handler what of it the caller may see or do. A row that is added
        // here has to be looked at for that.
        open.sort();
        expect![[r#"
            DELETE /nodes/{node}/storage/{storage}/content/{volume}
            DELETE /nodes/{node}/tasks/{upid}
            GET /access/acl
            GET /access/domains
            GET /access/groups
            GET /access/permissions
            GET /access/roles
            GET /access/roles/{roleid}
            GET /access/ticket
            GET /access/users
            GET /atoll/openapi
            GET /atoll/schema
            GET /cluster/nextid
            GET /cluster/options
            GET /cluster/resources
            GET /cluster/tasks
            GET /nodes
            GET /nodes/{node}/aplinfo
            GET /nodes/{node}/capabilities/qemu/cpu
            GET /nodes/{node}/capabilities/qemu/machines
            GET /nodes/{node}/lxc
            GET /nodes/{node}/network
            GET /nodes/{node}/qemu
            GET /nodes/{node}/storage
            GET /nodes/{node}/storage/{storage}/content/{volume}
            GET /nodes/{node}/tasks
            GET /nodes/{node}/tasks/{upid}/log
            GET /nodes/{node}/tasks/{upid}/status
            GET /nodes/{node}/version
            GET /pools
            GET /storage
            GET /version
            POST /access/ticket
            POST /access/vncticket
            POST /nodes/{node}/startall
            POST /nodes/{node}/stopall"#]]
        .assert_eq(&open.join("\n"));
    }

    #[tokio::test]
    async fn all_guests_are_switched_only_by_who_may() {
        let state = tempfile::tempdir().unwrap();
        let daemon = daemon(state.path()).await;
        for path in ["/nodes/{node}/startall", "/nodes/{node}/stopall"] {
            let route = TABLES.iter().copied().flatten().find(|r| r.path == path);
            let (status, body) = ask(&daemon, route.unwrap(), Some("nobody@pve")).await;
            assert_eq!(status, 403, "{body}");
            assert!(body.contains("(/, VM.PowerMgmt)"), "{body}");
        }
    }

    #[tokio::test]
    async fn rows_for_everybody_hide_what_the_caller_may_not_see() {
        let state = tempfile::tempdir().unwrap();
        let daemon = daemon(state.path()).await;
        let rows = TABLES.iter().copied().flatten();
        for route in rows.filter(|route| matches!(route.check, Check::AnyUser)) {
            let (_, body) = ask(&daemon, route, Some("nobody@pve")).await;
            let name = format!("{} {}", route.method.name(), route.path);
            assert!(!body.contains(HIDDEN), "{name}: {body}");
        }
        let all = TABLES.iter().copied().flatten();
        let list = |route: &&Route| route.path == "/cluster/resources";
        let list = all.into_iter().find(list).unwrap();
        let (_, body) = ask(&daemon, list, Some("root@pam")).await;
        assert!(body.contains(HIDDEN), "{body}");
    }
}
