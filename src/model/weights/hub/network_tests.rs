//! What goes over the wire, and what happens when it breaks: hosts on the loopback that answer as each test says.

use super::super::source::resolve_with;
use super::*;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as a host saw it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

impl Seen {
    fn range(&self) -> &str {
        self.headers.get("range").map_or("", |r| r)
    }

    fn token(&self) -> Option<&str> {
        self.headers.get("authorization").map(String::as_str)
    }
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Breaks the connection after so many bytes of the body.
    cut: Option<usize>,
    /// Sends no more after so many bytes of the body, and keeps the connection.
    stall: Option<usize>,
}

impl Reply {
    fn of(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status: 200, headers: vec![("ETag", format!("\"{:040x}\"", body.len()))], body, ..Self::default() }
    }

    fn to(location: String) -> Self {
        Self { status: 302, headers: vec![("Location", location)], ..Self::default() }
    }

    fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// `data`, or the part of it that was asked for.
    fn part(seen: &Seen, data: &[u8]) -> Self {
        let Some(from) = seen.range().strip_prefix("bytes=") else { return Self::of(data) };
        let from: usize = from.strip_suffix('-').unwrap().parse().unwrap();
        let range = format!("bytes {from}-{}/{}", data.len() - 1, data.len());
        let headers = vec![("Content-Range", range)];
        Self { status: 206, headers, body: data[from..].to_vec(), ..Self::default() }
    }
}

struct Host {
    listener: Option<TcpListener>,
    port: u16,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Host {
    fn bind() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self { port: listener.local_addr().unwrap().port(), listener: Some(listener), log: Arc::default() }
    }

    /// Answers from now on, until the test's process ends.
    fn serve(&mut self, answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) {
        let (listener, log, answer) = (self.listener.take().unwrap(), self.log.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || converse(stream.unwrap(), &log, &*answer));
            }
        });
    }

    fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn hub(&self, dir: &Path) -> Hub {
        let hub = Hub::from_vars(|name| (name == "HF_HOME").then(|| dir.display().to_string())).unwrap();
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let wait = Duration::from_millis(300);
        let token = Some("hf_secret".into());
        Hub { endpoint, token, pause: Duration::from_millis(1), etag_timeout: wait, download_timeout: wait, ..hub }
    }
}

/// One request, one answer.
fn converse(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, answer: &dyn Fn(&Seen) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split_whitespace().map(String::from);
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return };
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_string());
    }
    let seen = Seen { method, path, headers };
    log.lock().unwrap().push(seen.clone());
    let reply = answer(&seen);
    let mut head =
        format!("HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
    reply.headers.iter().for_each(|(k, v)| head.push_str(&format!("{k}: {v}\r\n")));
    let _ = stream.write_all((head + "\r\n").as_bytes());
    if seen.method == "HEAD" {
        return;
    }
    let end = reply.cut.or(reply.stall).unwrap_or(reply.body.len()).min(reply.body.len());
    let _ = stream.write_all(&reply.body[..end]);
    if reply.stall.is_some() {
        // Until the other side gives up.
        let _ = reader.read_line(&mut String::new());
    }
}

fn list(names: &[&str]) -> Reply {
    let siblings: Vec<_> = names.iter().map(|n| serde_json::json!({ "rfilename": n })).collect();
    Reply::of(serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string())
}

fn sha(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// A redirect of a large file, as the hub answers it.
fn linked(location: String, data: &[u8]) -> Reply {
    let tag = ("X-Linked-ETag", format!("\"{}\"", sha(data)));
    let size = ("X-Linked-Size", data.len().to_string());
    Reply { status: 302, headers: vec![("Location", location), tag, size], ..Reply::default() }
}

fn file_of(path: &str) -> Option<&str> {
    path.strip_prefix("/o/m/resolve/")?.split_once('/').map(|(_, name)| name)
}

const LARGE: &str = "model.safetensors";
const MODEL: &[&str] = &["config.json", LARGE, "tokenizer.json"];

fn large() -> Vec<u8> {
    (0..400_000u32).map(|i| (i / 7) as u8).collect()
}

/// `/api/…`, one small file, and `LARGE` from wherever `from` says.
fn simple(from: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> impl Fn(&Seen) -> Reply + Send + Sync {
    move |seen| match (seen.path.starts_with("/api/models/o/m/"), file_of(&seen.path)) {
        (true, _) => list(&["config.json", LARGE]),
        (_, Some("config.json")) => Reply::of("{}"),
        (_, Some(LARGE)) if seen.method == "HEAD" => linked("http://127.0.0.1:9/".into(), &large()),
        _ => from(seen),
    }
}

fn part_left(hub: &Hub) -> PathBuf {
    hub.folder("o/m").join("blobs").join(format!("{}.incomplete", sha(&large())))
}

/// The token may be seen by the hub, asked by us; never by another name of it, another port, another host, nor by the
/// hub itself when one of those sent us back.
#[test]
fn the_token_never_leaves_its_host() {
    let (mut hub, mut cdn, mut port) = (Host::bind(), Host::bind(), Host::bind());
    let (h, c, p) = (hub.port, cdn.port, port.port);
    let cdn_url = move |path: &str| format!("http://localhost:{c}{path}");
    let port_url = move |path: &str| format!("http://127.0.0.1:{p}{path}");
    hub.serve(move |seen| match (seen.path.as_str(), file_of(&seen.path)) {
        ("/api/models/o/m/revision/main", _) => Reply::to("/api/moved".into()),
        ("/api/moved", _) => Reply::to(port_url("/api/list")),
        // Small: from this host, through a relative redirect and an absolute one.
        (_, Some("config.json")) => Reply::to("/cache/config.json?x=http://a/".into()),
        ("/cache/config.json?x=http://a/", _) => Reply::to(format!("http://127.0.0.1:{h}/really")),
        ("/really", _) => Reply::of("{}"),
        // Large: another name, then another port, then back here.
        (_, Some(LARGE)) => linked(cdn_url("/hop"), &large()),
        ("/back", _) => Reply::part(seen, &large()),
        // Another name for this host, without an ETag before: the question is passed on.
        (_, Some("tokenizer.json")) => Reply::to(format!("http://localhost:{h}/alias")),
        ("/alias", _) => Reply::to(format!("//127.0.0.1:{p}/tokenizer")),
        _ => Reply::status(404),
    });
    cdn.serve(move |seen| match seen.path.as_str() {
        "/hop" => Reply::to(port_url("/hop")),
        _ => Reply::status(404),
    });
    port.serve(move |seen| match seen.path.as_str() {
        "/api/list" => list(MODEL),
        "/hop" => Reply::to(format!("http://127.0.0.1:{h}/back")),
        "/tokenizer" => Reply::of("{ }"),
        _ => Reply::status(404),
    });
    let dir = tempfile::tempdir().unwrap();
    let settings = hub.hub(dir.path());
    // Whole at first, then the rest of what is there.
    for left in [0, 1000] {
        let _ = std::fs::remove_dir_all(settings.folder("o/m"));
        if left > 0 {
            std::fs::create_dir_all(part_left(&settings).parent().unwrap()).unwrap();
            std::fs::write(part_left(&settings), &large()[..left]).unwrap();
        }
        let snapshot = resolve_with("o/m", MODEL, &settings).unwrap();
        assert_eq!(std::fs::read(snapshot.dir.join(LARGE)).unwrap(), large());
        assert_eq!(std::fs::read(snapshot.dir.join("tokenizer.json")).unwrap(), b"{ }");
        let (at_hub, at_cdn, at_port) = (hub.seen(), cdn.seen(), port.seen());
        for seen in at_cdn.iter().chain(&at_port) {
            assert_eq!(seen.token(), None, "{seen:?}");
        }
        for seen in &at_hub {
            let passed_on = ["/back", "/alias"].contains(&seen.path.as_str());
            assert_eq!(seen.token(), (!passed_on).then_some("Bearer hf_secret"), "{seen:?}");
        }
        // All ways were gone.
        let kinds = |seen: &[Seen]| seen.iter().map(|s| format!("{} {} {}", s.method, s.path, s.range())).collect();
        let kinds = [at_hub, at_cdn, at_port].map(|seen| -> Vec<String> { kinds(&seen) });
        let range = if left > 0 { "bytes=1000-" } else { "" };
        assert!(kinds[0].contains(&format!("GET /back {range}")), "{kinds:?}");
        assert_eq!(kinds[1], [format!("GET /hop {range}")]);
        let port =
            ["GET /api/list ".into(), format!("GET /hop {range}"), "HEAD /tokenizer ".into(), "GET /tokenizer ".into()];
        assert_eq!(kinds[2], port);
    }
}

#[test]
fn a_host_that_wants_the_token_of_another_is_named() {
    let (mut hub, mut other) = (Host::bind(), Host::bind());
    let to = format!("http://localhost:{}/api", other.port);
    hub.serve(move |_| Reply::to(to.clone()));
    other.serve(|_| Reply { headers: vec![("X-Error-Message", "who?".into())], ..Reply::status(401) });
    let dir = tempfile::tempdir().unwrap();
    let report = resolve_with("o/m", MODEL, &hub.hub(dir.path())).unwrap_err().report();
    assert!(report.contains(&format!("passed on to localhost:{}, to which the token of", other.port)), "{report}");
    assert!(report.contains("http status: 401 (who?)") && !report.contains("hf_secret"), "{report}");
}

#[test]
fn redirects_without_end_end() {
    let mut hub = Host::bind();
    hub.serve(|seen| Reply::to(format!("{}x", seen.path)));
    let dir = tempfile::tempdir().unwrap();
    let report = resolve_with("o/m", MODEL, &hub.hub(dir.path())).unwrap_err().report();
    assert!(report.contains("more than 10 redirects"), "{report}");
    assert_eq!(hub.seen().len(), 11);
}

/// A connection that stays open and brings nothing is left after the time-out; what has arrived is continued.
#[test]
fn a_stalled_download_goes_on() {
    let mut hub = Host::bind();
    hub.serve(simple(|seen| {
        let stall = (seen.range() != "bytes=300000-").then_some(150_000);
        Reply { stall, ..Reply::part(seen, &large()) }
    }));
    let dir = tempfile::tempdir().unwrap();
    let snapshot = resolve_with("o/m", &["config.json", LARGE], &hub.hub(dir.path())).unwrap();
    assert_eq!(std::fs::read(snapshot.dir.join(LARGE)).unwrap(), large());
    let ranges: Vec<_> =
        hub.seen().into_iter().filter(|s| s.path.ends_with(LARGE)).map(|s| s.range().to_string()).collect();
    assert_eq!(ranges, ["", "", "bytes=150000-", "bytes=300000-"], "a question, and three attempts");
}

#[test]
fn a_download_that_brings_no_more_is_given_up_and_keeps_what_it_has() {
    let mut hub = Host::bind();
    hub.serve(simple(|seen| {
        let stall = if seen.range().is_empty() { 100_000 } else { 0 };
        Reply { stall: Some(stall), ..Reply::part(seen, &large()) }
    }));
    let dir = tempfile::tempdir().unwrap();
    let settings = Hub { download_timeout: Duration::from_millis(100), ..hub.hub(dir.path()) };
    let started = Instant::now();
    let report = resolve_with("o/m", &["config.json", LARGE], &settings).unwrap_err().report();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(report.contains("gave up with 100000 of 400000 bytes after 5 new attempts"), "{report}");
    assert!(report.contains("nothing came for 0.1 s (HF_HUB_DOWNLOAD_TIMEOUT)"), "{report}");
    assert!(report.contains("hint: the network or the hub is disturbed; the same command goes on"), "{report}");
    assert_eq!(std::fs::read(part_left(&settings)).unwrap(), large()[..100_000]);
    assert_eq!(hub.seen().iter().filter(|s| s.range() == "bytes=100000-").count(), 5);
}

#[test]
fn a_question_without_an_answer_is_given_up() {
    let mut hub = Host::bind();
    hub.serve(|_| {
        std::thread::sleep(Duration::from_secs(60));
        Reply::status(500)
    });
    let dir = tempfile::tempdir().unwrap();
    let settings = Hub { etag_timeout: Duration::from_millis(50), ..hub.hub(dir.path()) };
    let report = resolve_with("o/m", MODEL, &settings).unwrap_err().report();
    assert!(report.contains("nothing came for 0.05 s (HF_HUB_ETAG_TIMEOUT)"), "{report}");
    assert_eq!(hub.seen().len(), 6);
}

#[test]
fn a_connection_that_breaks_often_arrives_in_the_end() {
    let mut hub = Host::bind();
    hub.serve(simple(|seen| Reply { cut: Some(70_000), ..Reply::part(seen, &large()) }));
    let dir = tempfile::tempdir().unwrap();
    let snapshot = resolve_with("o/m", &["config.json", LARGE], &hub.hub(dir.path())).unwrap();
    assert_eq!(std::fs::read(snapshot.dir.join(LARGE)).unwrap(), large());
    assert_eq!(hub.seen().iter().filter(|s| s.method == "GET" && s.path.ends_with(LARGE)).count(), 6);
}

/// A host that always begins anew brings nothing, however often it is asked.
#[test]
fn a_host_that_knows_no_ranges() {
    let mut hub = Host::bind();
    hub.serve(simple(|_| Reply { cut: Some(150_000), ..Reply::of(large()) }));
    let dir = tempfile::tempdir().unwrap();
    let settings = hub.hub(dir.path());
    let report = resolve_with("o/m", &["config.json", LARGE], &settings).unwrap_err().report();
    assert!(report.contains("gave up with 150000 of 400000 bytes"), "{report}");
    // Whole, it replaces what is here.
    let mut whole = Host::bind();
    whole.serve(simple(|_| Reply::of(large())));
    let snapshot =
        resolve_with("o/m", &["config.json", LARGE], &Hub { cache: settings.cache, ..whole.hub(dir.path()) });
    assert_eq!(std::fs::read(snapshot.unwrap().dir.join(LARGE)).unwrap(), large());
}

#[test]
fn a_hub_that_is_busy_is_asked_again() {
    let mut hub = Host::bind();
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let fine = simple(|seen| Reply::part(seen, &large()));
    hub.serve(move |seen| match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
        0 => Reply::status(503),
        1 => Reply::status(429),
        _ => fine(seen),
    });
    let dir = tempfile::tempdir().unwrap();
    resolve_with("o/m", &["config.json", LARGE], &hub.hub(dir.path())).unwrap();
    assert_eq!(hub.seen().len(), 15, "list, and two questions and files");
    let mut never = Host::bind();
    never.serve(|_| Reply::status(429));
    let dir = tempfile::tempdir().unwrap();
    let report = resolve_with("o/m", MODEL, &never.hub(dir.path())).unwrap_err().report();
    assert!(report.contains("http status: 429") && report.contains("hint: too many requests"), "{report}");
    assert_eq!(never.seen().len(), 6);
}

/// Who starts cold beside another waits for it, and uses what it has brought.
#[test]
fn side_by_side_one_downloads_and_the_others_wait() {
    let mut hub = Host::bind();
    hub.serve(simple(|seen| {
        std::thread::sleep(Duration::from_millis(100));
        Reply::part(seen, &large())
    }));
    let dir = tempfile::tempdir().unwrap();
    let settings = hub.hub(dir.path());
    std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..4).map(|_| scope.spawn(|| resolve_with("o/m", &["config.json", LARGE], &settings))).collect();
        for one in all {
            assert_eq!(std::fs::read(one.join().unwrap().unwrap().dir.join(LARGE)).unwrap(), large());
        }
    });
    let downloads = hub.seen().into_iter().filter(|s| s.method == "GET" && file_of(&s.path).is_some()).count();
    assert_eq!(downloads, 2, "one for each file");
}
