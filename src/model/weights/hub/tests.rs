//! Against a server on the loopback that speaks the endpoints of the hub.

use super::super::source::{MODEL, resolve_with};
use super::*;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tiny_http::{Header, Method, Request, Response, Server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// What the server holds and how it misbehaves.
#[derive(Clone, Default)]
struct Repository {
    files: BTreeMap<&'static str, Vec<u8>>,
    private: bool,
    /// Bytes missing at the end of every large file.
    cut: usize,
    /// Flips the first byte of every large file.
    corrupt: bool,
}

struct Loopback {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    state: Arc<Mutex<Repository>>,
    /// `METHOD PATH [range]` of each request.
    log: Arc<Mutex<Vec<String>>>,
}

impl Loopback {
    fn start(repository: Repository) -> Self {
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let state = Arc::new(Mutex::new(repository));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (s, r, l) = (server.clone(), state.clone(), log.clone());
        let thread = std::thread::spawn(move || {
            let base = format!("http://{}", s.server_addr());
            for request in s.incoming_requests() {
                let range = header(&request, "Range");
                let seen = format!("{} {} {}", request.method(), request.url(), range.as_deref().unwrap_or(""));
                l.lock().unwrap().push(seen.trim().to_string());
                let response = answer(&r.lock().unwrap(), &base, &request, range.as_deref());
                request.respond(response).unwrap();
            }
        });
        Self { server, thread: Some(thread), state, log }
    }

    /// Settings that use this server and a cache in `dir`.
    fn hub(&self, dir: &Path) -> Hub {
        let vars = [("HF_HOME", dir.to_str().unwrap().to_string()), ("HF_ENDPOINT", self.endpoint() + "/")];
        let hub = Hub::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone())).unwrap();
        Hub { pause: Duration::from_millis(1), ..hub }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.server.server_addr())
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.server.unblock();
        self.thread.take().unwrap().join().unwrap();
    }
}

type Answer = Response<Cursor<Vec<u8>>>;

fn header(request: &Request, name: &'static str) -> Option<String> {
    request.headers().iter().find(|h| h.field.equiv(name)).map(|h| h.value.to_string())
}

fn with(response: Answer, headers: &[(&str, String)]) -> Answer {
    headers.iter().fold(response, |r, (k, v)| r.with_header(Header::from_bytes(k.as_bytes(), v.as_bytes()).unwrap()))
}

/// Small files come from the hub itself; `.safetensors` and `.bin` are large: a redirect to another path, their etag the SHA-256.
fn answer(repo: &Repository, base: &str, request: &Request, range: Option<&str>) -> Answer {
    let status = |code: u16| Response::from_string("").with_status_code(code);
    if ![Method::Get, Method::Head].contains(request.method()) {
        return status(405);
    }
    let allowed = !repo.private || header(request, "Authorization").as_deref() == Some("Bearer hf_secret");
    let url = request.url();
    if let Some(name) = url.strip_prefix("/cdn/") {
        let Some(data) = repo.files.get(name) else { return status(404) };
        let mut sent = data.clone();
        if repo.corrupt {
            sent[0] ^= 1;
        }
        return part(&sent, range, repo.cut);
    }
    if !allowed {
        return status(401);
    }
    if ["main", COMMIT].map(|r| format!("/api/models/tiny/model/revision/{r}")).contains(&url.to_string()) {
        let siblings: Vec<_> = repo.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let info = serde_json::json!({ "id": "tiny/model", "sha": COMMIT, "siblings": siblings });
        return Response::from_string(info.to_string());
    }
    let name = url.strip_prefix(&format!("/tiny/model/resolve/{COMMIT}/"));
    let Some((name, data)) = name.and_then(|name| repo.files.get_key_value(name)) else { return status(404) };
    let commit = ("X-Repo-Commit", COMMIT.to_string());
    let sha: String = Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect();
    if name.ends_with(".json") {
        return with(part(data, range, 0), &[commit, ("ETag", format!("\"{}\"", &sha[..40]))]);
    }
    let (size, location) = (data.len().to_string(), format!("{base}/cdn/{name}"));
    let linked = [("X-Linked-ETag", format!("\"{sha}\"")), ("X-Linked-Size", size), ("Location", location), commit];
    with(status(302), &linked)
}

/// The bytes of `range` (`bytes=A-`), else all, without the last `cut`.
fn part(data: &[u8], range: Option<&str>, cut: usize) -> Answer {
    let end = data.len() - cut;
    let Some(range) = range else { return Response::from_data(&data[..end]) };
    let from: usize = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap();
    let content_range = format!("bytes {from}-{}/{}", data.len() - 1, data.len());
    with(Response::from_data(&data[from..end]).with_status_code(206), &[("Content-Range", content_range)])
}

fn sharded() -> Repository {
    let index = r#"{ "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors" } }"#;
    let files = BTreeMap::from([
        ("config.json", br#"{ "model_type": "llama" }"#.to_vec()),
        ("model.safetensors.index.json", index.as_bytes().to_vec()),
        ("model-1.safetensors", vec![1; 3000]),
        ("model-2.safetensors", vec![2; 5000]),
        ("pytorch_model.bin", vec![3; 9000]),
    ]);
    Repository { files, ..Default::default() }
}

#[test]
fn a_sharded_repository_is_fetched_once_and_then_needs_no_network() {
    let server = Loopback::start(sharded());
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let snapshot = resolve_with("tiny/model", MODEL, &hub).unwrap();
    assert_eq!(snapshot.revision.as_deref(), Some(COMMIT));
    assert_eq!(snapshot.dir, dir.path().join("hub/models--tiny--model/snapshots").join(COMMIT));
    for (name, data) in sharded().files {
        let found = std::fs::read(snapshot.dir.join(name)).ok();
        assert_eq!(found, (name != "pytorch_model.bin").then_some(data), "{name}");
    }
    assert_eq!(server.requests()[0], "GET /api/models/tiny/model/revision/main");
    // By branch, by commit, and offline.
    assert_eq!(resolve_with("tiny/model", MODEL, &hub).unwrap(), snapshot);
    assert_eq!(resolve_with(&format!("tiny/model@{COMMIT}"), MODEL, &hub).unwrap(), snapshot);
    assert_eq!(server.requests(), [""; 0]);
    let endpoint = "http://127.0.0.1:9".to_string();
    let offline = Hub { offline: true, endpoint: endpoint.clone(), ..hub.clone() };
    assert_eq!(resolve_with("tiny/model", MODEL, &offline).unwrap(), snapshot);
    let report = resolve_with("tiny/other", MODEL, &offline).unwrap_err().report();
    assert!(
        report.contains("tiny/other@main is not complete in the cache") && report.contains("HF_HUB_OFFLINE is set")
    );
    // An optional file that nobody has asked for yet: the hub is away, what is there will do.
    let away = Hub { endpoint, ..hub };
    assert_eq!(resolve_with("tiny/model", &["config.json", "?tokenizer.json"], &away).unwrap(), snapshot);
    let report = resolve_with("tiny/model", &["config.json", "tokenizer.json"], &away).unwrap_err().report();
    assert!(report.contains("cannot get tiny/model@main from http://127.0.0.1:9"), "{report}");
    assert!(report.contains("hint: is there a network"), "{report}");
}

#[test]
fn a_cache_filled_by_another_tool_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("hub/models--tiny--model");
    let snapshot = folder.join("snapshots").join(COMMIT);
    for (path, text) in [(folder.join("refs/refs/pr/1"), COMMIT), (snapshot.join("config.json"), "{}")] {
        write_whole(&path, text).unwrap();
    }
    let hub = Hub {
        offline: true,
        ..Hub::from_vars(|n| (n == "HF_HOME").then(|| dir.path().display().to_string())).unwrap()
    };
    let found = resolve_with("tiny/model@refs/pr/1", &["config.json"], &hub).unwrap();
    assert_eq!(found, Snapshot { dir: snapshot, revision: Some(COMMIT.into()) });
}

#[test]
fn a_broken_download_is_noticed_and_continued() {
    let server = Loopback::start(Repository { cut: 100, ..sharded() });
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let report = resolve_with("tiny/model", MODEL, &hub).unwrap_err().report();
    assert!(report.contains("gave up with 2900 of 3000 bytes after 5 new attempts"), "{report}");
    assert!(report.contains("tiny/model/model-1.safetensors") && report.contains("connection was closed"), "{report}");
    *server.state.lock().unwrap() = Repository { corrupt: true, ..sharded() };
    // What arrived before was intact and is completed; the next file is not.
    let report = resolve_with("tiny/model", MODEL, &hub).unwrap_err().report();
    assert!(report.contains("model-2.safetensors arrived damaged (5000 bytes, SHA-256 "), "{report}");
    let blobs = dir.path().join("hub/models--tiny--model/blobs");
    assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 3, "config, index and the first");
    // A part that another process left behind: half of the file, one of other bytes, one that is longer than the file.
    let sha: String = Sha256::digest(vec![1; 3000]).iter().map(|b| format!("{b:02x}")).collect();
    *server.state.lock().unwrap() = sharded();
    for (left, asked) in [(vec![1; 1000], "bytes=1000-"), (vec![9; 1000], "bytes=1000-"), (vec![1; 3001], "")] {
        let _ = std::fs::remove_file(blobs.join(&sha));
        std::fs::write(blobs.join(format!("{sha}.incomplete")), left).unwrap();
        server.requests();
        let snapshot = resolve_with("tiny/model", MODEL, &hub).unwrap();
        assert_eq!(std::fs::read(snapshot.dir.join("model-1.safetensors")).unwrap(), vec![1; 3000]);
        let asked = format!("GET /cdn/model-1.safetensors {asked}").trim().to_string();
        assert!(server.requests().contains(&asked), "{asked}");
        assert!(!blobs.join(format!("{sha}.incomplete")).exists());
    }
}

#[test]
fn refusals_say_what_to_do() {
    let server = Loopback::start(Repository { private: true, ..sharded() });
    let dir = tempfile::tempdir().unwrap();
    let hub = server.hub(dir.path());
    let report = |source: &str, what: &[&str], hub: &Hub| resolve_with(source, what, hub).unwrap_err().report();
    let denied = report("tiny/model", MODEL, &hub);
    assert!(
        denied.contains("http status: 401") && denied.contains("set HF_TOKEN if it is private or gated"),
        "{denied}"
    );
    let hub = Hub { token: Some(TOKEN.into()), ..hub };
    assert!(!format!("{hub:?}").contains(TOKEN));
    resolve_with("tiny/model", MODEL, &hub).unwrap();
    let unknown = report("tiny/none", MODEL, &hub);
    assert!(unknown.contains("http status: 404") && unknown.contains("no such repository"), "{unknown}");
    let lacking = report("tiny/model", &["tokenizer.json"], &hub);
    assert!(
        lacking.contains("tiny/model@main has no tokenizer.json\n\nhint: it holds: config.json, model-1"),
        "{lacking}"
    );
}
