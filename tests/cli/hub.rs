//! A recipe whose model lies on the hub, played by a server on the loopback.

use super::folder::{Folder, THREE_STAGES, golden, said};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::Arc;
use std::thread::JoinHandle;
use tiny_http::{Header, Request, Response, Server};

const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

const TEMPLATE: &str = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}";

/// Serves the golden model as `owner/tiny`.
struct Hub {
    server: Arc<Server>,
    thread: Option<JoinHandle<usize>>,
}

impl Hub {
    fn start() -> Self {
        let entry = |e: std::io::Result<fs::DirEntry>| {
            let path = e.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(path).unwrap())
        };
        let mut files: BTreeMap<String, Vec<u8>> = fs::read_dir(golden("model")).unwrap().map(entry).collect();
        // Where llava-hf has its template.
        files.insert("chat_template.json".into(), format!("{{ \"chat_template\": \"{TEMPLATE}\" }}").into());
        let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
        let listening = server.clone();
        let thread = std::thread::spawn(move || {
            let mut served = 0;
            for request in listening.incoming_requests() {
                served += 1;
                answer(&files, request);
            }
            served
        });
        Self { server, thread: Some(thread) }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.server.server_addr())
    }

    /// Ends it; returns the number of requests.
    fn stop(mut self) -> usize {
        self.server.unblock();
        self.thread.take().unwrap().join().unwrap()
    }
}

fn answer(files: &BTreeMap<String, Vec<u8>>, request: Request) {
    let header = |k: &str, v: &str| Header::from_bytes(k.as_bytes(), v.as_bytes()).unwrap();
    let url = request.url().to_string();
    if ["main", COMMIT].iter().any(|r| url == format!("/api/models/owner/tiny/revision/{r}")) {
        let siblings: Vec<_> = files.keys().map(|n| serde_json::json!({ "rfilename": n })).collect();
        let info = serde_json::json!({ "id": "owner/tiny", "sha": COMMIT, "siblings": siblings });
        return request.respond(Response::from_string(info.to_string())).unwrap();
    }
    let data = url.strip_prefix(&format!("/owner/tiny/resolve/{COMMIT}/")).and_then(|n| files.get(n));
    let Some(data) = data else { return request.respond(Response::empty(404)).unwrap() };
    let response = Response::from_data(data.clone())
        .with_header(header("X-Repo-Commit", COMMIT))
        .with_header(header("ETag", &format!("\"{:040x}\"", data.len())));
    request.respond(response).unwrap();
}

#[test]
fn a_model_from_the_hub_then_without_the_network() {
    let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/model", "owner/tiny@main"));
    // Not in the cache, and no network.
    f.fails(&["check", "recipe.toml"], &["owner/tiny@main is not complete in the cache", "HF_HUB_OFFLINE"]);
    // Of a machine with a memory of its own: this one's changes from moment to moment.
    let check = ["check", "recipe.toml", "--memory", "8GiB"];
    let hub = Hub::start();
    let online = f.adfreeze(check).env("HF_ENDPOINT", hub.endpoint()).env("HF_HUB_OFFLINE", "0").output();
    let online = said(online.unwrap());
    assert!(hub.stop() > 4);
    assert_eq!(online.code, Some(0), "{}", online.stderr);
    assert!(online.stdout.contains(&format!("owner/tiny@{COMMIT}")), "{}", online.stdout);
    let offline = f.ok(check);
    assert_eq!(offline.stdout, online.stdout);
    assert!(!offline.stderr.contains("WARN"), "{}", offline.stderr);
    // A cache that may lack an optional file, and a hub that cannot be asked: a warning, not silence.
    let snapshot = f.path("hf/hub/models--owner--tiny");
    fs::remove_dir_all(snapshot.join(".no_exist")).unwrap();
    let unreachable = |args: &[&str]| {
        let mut c = f.adfreeze([args, &check].concat());
        said(c.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HUB_OFFLINE", "0").output().unwrap())
    };
    let said = unreachable(&[]);
    assert_eq!((said.code, &said.stdout), (Some(0), &online.stdout), "{}", said.stderr);
    let warning = said.stderr.lines().find(|l| l.contains("WARN")).expect(&said.stderr);
    assert!(warning.contains("using the cached owner/tiny@main") && !warning.contains('\u{1b}'), "{warning}");
    let lines = unreachable(&["--log", "json"]).stderr;
    let lines: Vec<serde_json::Value> = lines.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
    let warning = lines.iter().find(|l| l["level"] == "WARN").unwrap();
    assert!(warning["message"].as_str().unwrap().contains("using the cached owner/tiny@main"), "{warning}");
    // The run notes the revision.
    f.train(&["--stages", "align", "--set", "defaults.max_steps=2"]);
    assert!(fs::read_to_string(f.path("run/inputs.json")).unwrap().contains(COMMIT));
}

#[test]
fn a_template_of_its_own_file_comes_from_the_hub_as_from_a_folder() {
    let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/model", "owner/tiny"));
    let hub = Hub::start();
    let args = ["score", "--model", "owner/tiny", "--template", "chat", "--out", "out.jsonl"];
    let data = ["--data", "text.json"];
    f.write(
        "text.json",
        r#"[{ "conversations": [{ "from": "human", "value": "a" }, { "from": "gpt", "value": "b" }] }]"#,
    );
    let online =
        f.adfreeze(args.iter().chain(&data)).env("HF_ENDPOINT", hub.endpoint()).env("HF_HUB_OFFLINE", "0").output();
    let online = said(online.unwrap());
    hub.stop();
    assert_eq!(online.code, Some(0), "{}", online.stderr);
    let there = f.path(&format!("hf/hub/models--owner--tiny/snapshots/{COMMIT}/chat_template.json"));
    assert!(fs::read_to_string(there).unwrap().contains("eos_token"));
}

/// Another process holds the lock of a file that is missing: the wait is said, and ends with it.
#[test]
fn the_wait_for_another_process_is_said() {
    let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/model", "owner/tiny"));
    let hub = Hub::start();
    let config = fs::metadata(golden("model/config.json")).unwrap().len();
    let lock = f.write(&format!("hf/hub/.locks/models--owner--tiny/{config:040x}.lock"), "");
    let lock = fs::File::open(lock).unwrap();
    lock.lock().unwrap();
    let mut waiting = f.adfreeze(["check", "recipe.toml"]);
    waiting.env("HF_ENDPOINT", hub.endpoint()).env("HF_HUB_OFFLINE", "0").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut waiting = waiting.spawn().unwrap();
    let mut line = String::new();
    let mut stderr = BufReader::new(waiting.stderr.take().unwrap());
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("another process is downloading owner/tiny/config.json; waiting for it"), "{line}");
    assert_eq!(waiting.try_wait().unwrap(), None);
    lock.unlock().unwrap();
    assert!(waiting.wait().unwrap().success());
    hub.stop();
}
